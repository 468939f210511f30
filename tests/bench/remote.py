"""Rows of a guest on another host."""

from __future__ import annotations

import os
import shutil
from typing import Dict, Final, List

from tests.bench import backups, measuring, world
from tests.bench.measuring import Effort, Row, Sample, timed
from tests.guests import far

SHARE: Final = 1.1


def ssh(place: world.World, effort: Effort) -> List[Row]:
    """A full backup over ssh, beside nbdcopy through a tunnel of the same client and server."""
    guest = backups.big(place)
    with far.Far(place.host) as other:
        sides: Dict[str, measuring.Side] = {
            "ours": lambda into: _ours(place, other, guest, into),
            "floor": lambda into: _floor(place, other, guest, into),
        }
        found = measuring.alternate(effort.rounds, sides)
    what = "full backup of a running guest over ssh, mixed data, zstd, digests"
    return [measuring.ratio("ssh", what, "nbdcopy through the same tunnel, into the same kind of layer", found, SHARE)]


def _ours(place: world.World, other: far.Far, guest: world.Guest, into: List[Sample]) -> None:
    repository = place.init("ssh")
    argv = other.near([world.COMMAND, "-r", repository, "backup", guest.name, "--quiesce", "none"])
    with timed(into):
        world.run(*argv, env=other.environment())
    place.forget(guest)
    shutil.rmtree(repository)


def _floor(place: world.World, other: far.Far, guest: world.Guest, into: List[Sample]) -> None:
    """As the floor of `full`; libvirt is asked without a detour."""
    layer, sink, near = (place.new(name) for name in ("ssh.qcow2", "ssh-sink.sock", "ssh-near.sock"))
    sizes = {target: guest.domain.blockInfo(target)[0] for target in guest.disks}
    virsh = ["virsh", "-q", "-c", place.host.uri]
    with world.prepared(place, guest, sizes) as (job, checkpoint, name):
        documents = {"job": job, "checkpoint": checkpoint}
        for kind, text in documents.items():
            with open(place.new(kind), "w", encoding="utf-8") as file:
                file.write(text)
        xml = [os.path.join(place.folder, kind) for kind in documents]
        tunnel = other.near(["ssh", "-N", "-T", "-L", f"{near}:{world.bare_socket(place)}", "far"])
        with timed(into):
            world.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", layer, str(sizes["vda"]))
            with world.server(sink, *backups.sink(layer, sink)):
                world.run(*virsh, "backup-begin", guest.name, *xml, "--reuse-external")
                with world.server(near, *tunnel, env=other.environment()):
                    uris = [f"nbd+unix:///vda?socket={near}", f"nbd+unix:///?socket={sink}"]
                    world.run("nbdcopy", "--destination-is-zero", "--flush", *uris)
            world.run(*virsh, "domjobabort", guest.name)
        guest.domain.checkpointLookupByName(name).delete(0)
