"""Where a fleecing point is read: an NBD export of each disk, on a socket of this machine or by TLS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, Optional, Sequence
from urllib.parse import quote

from libvirt_cbt import tls
from libvirt_cbt.actions.planning import DiskPlan
from libvirt_cbt.hypervisor import documents, site
from libvirt_cbt.nbdio import proof
from libvirt_cbt.nbdio.server import Endpoint


@dataclass(frozen=True)
class Exported:
    """An NBD export of a disk at the fleecing point; `bitmap` is None where everything counts as changed.

    It is read from `server` where there is one, and not from the socket.
    """

    socket: str
    export: str
    bitmap: Optional[str]
    server: Optional[tls.Server] = None

    @property
    def context(self) -> Optional[str]:
        """The meta context of the bitmap."""
        return f"qemu:dirty-bitmap:{self.bitmap}" if self.bitmap else None

    @property
    def uri(self) -> str:
        """For other software; by TLS it has to find certificates of its own."""
        if self.server:
            return f"nbds://{self.server}/{quote(self.export)}"
        return f"nbd+unix:///{quote(self.export)}?socket={quote(self.socket)}"

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.socket, self.export, self.server)


def of(
    job: documents.RunningJob, disks: Sequence[DiskPlan], reached: site.Reached, stop: Callable[[], None]
) -> Dict[str, Exported]:
    """Those of a job, by target.  Errors: ProofNotAsked for a server that lets everybody in; HypervisorError."""
    found = {}
    for disk in disks:
        export = documents.require(job, disk.target)
        bitmap = (export.bitmap or f"cbt-{disk.target}") if disk.base else None
        # libvirt 9.0 forgets the exports' names when it is started again; those with a prefix are ours.
        name = reached.prefix + disk.target if reached.prefix else export.export
        found[disk.target] = Exported(reached.socket, name, bitmap, reached.server)
    if reached.server and found:
        proof.require(next(iter(found.values())).endpoint, stop)
    return found
