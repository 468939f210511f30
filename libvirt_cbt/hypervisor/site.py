"""The host whose files a connection's QEMU opens: this machine, or one behind ssh or TLS.

A path in a domain's XML, a scratch file and the socket of a job are its files.  Whoever looks at one asks the site of the
connection: a file of that name on this machine is another one.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Dict, Final, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from libvirt_cbt import durable, errors, machines, names, places, tls
from libvirt_cbt.hypervisor import documents, scratch
from libvirt_cbt.hypervisor.address import Address

if TYPE_CHECKING:
    from libvirt_cbt.hypervisor.connection import Host

HEADER: Final = 32  # bytes: as much as tells a qcow2 image's version, cluster size and capacity


@dataclass(frozen=True)
class Seen:
    """A file: "device:inode", f (file), b (block device) or o, and its first bytes where they may be read."""

    inode: Optional[str]
    kind: str
    header: bytes


@dataclass(frozen=True)
class Folder:
    """The nearest folder above a path that exists, its mode, and whether this user may write to it."""

    path: str
    mode: int
    writable: bool


@dataclass(frozen=True)
class Reached:
    """Where a job's exports are read from: a socket on this machine, or a server by TLS; its exports' names have a prefix."""

    socket: str
    server: Optional[tls.Server] = None
    prefix: str = ""


class Lookout(ABC):
    """Somebody who looks after the scratch files' room for the guard, from where it can be seen."""

    free: Optional[int] = None  # bytes, as last told
    full: Optional[int] = None  # bytes that were left when the job had to be ended

    @abstractmethod
    def freeze(self, seconds: float) -> None:
        """The guest is to be frozen for so long at most."""

    @abstractmethod
    def thawed(self) -> None:
        """It no longer is."""

    @abstractmethod
    def watch(self, socket: str, directory: str, reserve: int) -> None:
        """The job that exports on `socket` must end when less than `reserve` bytes are left in `directory`."""

    @abstractmethod
    def release(self) -> None:
        """Nothing is left to be minded."""


class Site(ABC):
    """Closed with its connection."""

    here = True  # whether it is this machine
    name = "this machine"  # for people
    still = True  # whether images of guests that are off can be worked on
    reaction = 0.5  # seconds from the last look at the scratch files' room to the end of the job, on a busy host

    @abstractmethod
    def begin(self, *, sentry: bool) -> None:
        """Begins what takes a while, with `sentry` a lookout's part, too, and waits for nothing: that is for who asks first."""

    @abstractmethod
    def socket_root(self) -> str:
        """Where the folders of jobs' sockets are."""

    @abstractmethod
    def scratch_root(self, asked: Optional[str]) -> str:
        """Where the folders of scratch files are.  Errors: Usage for a path that the site cannot take."""

    @abstractmethod
    def make(self, where: scratch.Places, sizes: Mapping[str, int], qemu_ids: Optional[Tuple[int, int]]) -> int:
        """Makes the folders and the scratch files of these sizes, afresh; bytes that are free then.

        Errors: ScratchDenied, ScratchSpace.
        """

    @abstractmethod
    def remove(self, where: scratch.Places) -> List[str]:
        """Removes what is there of one job's files, on both sides; the paths that went."""

    @abstractmethod
    def room(self, directory: str) -> int:
        """Bytes that a normal user may still write where `directory` is.  Errors: OSError when it is not there."""

    @abstractmethod
    def folder(self, path: str) -> Folder: ...

    @abstractmethod
    def look(self, paths: Sequence[str]) -> Dict[str, Seen]:
        """Those of the paths that are files there."""

    @abstractmethod
    def read(self, path: str, most: int) -> bytes:
        """A whole file.  Errors: OSError; ValueError for one longer than `most` bytes."""

    def machine(self) -> Optional[machines.Machine]:
        """Where the images of guests that are off are worked on; None for this machine.

        Errors: Elsewhere where there is no way to them.
        """
        return None

    def lookout(self, uuid: names.DomainUuid) -> Optional[Lookout]:
        """One for a domain's job; None where the guard sees for itself.  Errors: HostLost and kin."""
        return None

    def servers(self, where: scratch.Places) -> Iterator[Union[str, documents.Tcp]]:
        """Where QEMU is told to listen, the next one if it cannot there."""
        yield where.socket

    @abstractmethod
    def reach(self, where: scratch.Places, stop: Callable[[], None] = lambda: None) -> Reached:
        """Makes a job's exports reachable from here; repeated it mends a way that was cut, and asks `stop` meanwhile.

        Errors: HostLost and kin; what `stop` raises.
        """

    @abstractmethod
    def leave(self, where: scratch.Places) -> None:
        """Ends that."""

    @abstractmethod
    def close(self) -> None:
        """May be called again."""

    def described(self) -> str:
        """What there is to know of it, for people.  Errors: HostLost and kin."""
        return self.name

    def require_here(self, what: str) -> None:
        """Errors: Elsewhere, for `what` reads or writes files beside the guest's."""
        if not self.here:
            raise errors.Elsewhere(what=what, host=self.name, way_out="run it there, with a connection that is local")


class Here(Site):
    """This machine."""

    def begin(self, *, sentry: bool) -> None:
        pass  # everything is here

    def socket_root(self) -> str:
        return places.run_root()

    def scratch_root(self, asked: Optional[str]) -> str:
        return scratch.scratch_root(asked)

    def make(self, where: scratch.Places, sizes: Mapping[str, int], qemu_ids: Optional[Tuple[int, int]]) -> int:
        return scratch.make(where, sizes, qemu_ids)

    def remove(self, where: scratch.Places) -> List[str]:
        return scratch.remove(where)

    def room(self, directory: str) -> int:
        return scratch.room(directory)

    def folder(self, path: str) -> Folder:
        while not os.path.isdir(path) and path != "/":
            path = os.path.dirname(path)
        return Folder(path, stat.S_IMODE(os.stat(path).st_mode), os.access(path, os.W_OK | os.X_OK))

    def look(self, paths: Sequence[str]) -> Dict[str, Seen]:
        found = {}
        for path in paths:
            try:
                status = os.stat(path)
            except (OSError, ValueError):
                continue
            kind = "f" if stat.S_ISREG(status.st_mode) else "b" if stat.S_ISBLK(status.st_mode) else "o"
            found[path] = Seen(f"{status.st_dev}:{status.st_ino}", kind, _header(path) if kind != "o" else b"")
        return found

    def read(self, path: str, most: int) -> bytes:
        return durable.read(path, most)

    def reach(self, where: scratch.Places, stop: Callable[[], None] = lambda: None) -> Reached:
        return Reached(where.socket)

    def leave(self, where: scratch.Places) -> None:
        pass  # the socket is removed with its folder

    def close(self) -> None:
        pass  # nothing is open


def _header(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as image:
            return image.read(HEADER)
    except OSError:
        return b""


def of(address: Address, host: Host, listening: tls.Listening) -> Site:
    """The site of a connection to `address`; nothing is asked of it yet."""
    if address.here:
        return Here()
    if address.transport == "tls":
        from libvirt_cbt.hypervisor import fartls

        return fartls.Tls(address, host, listening)
    from libvirt_cbt.hypervisor import faraway

    return faraway.Ssh(address)
