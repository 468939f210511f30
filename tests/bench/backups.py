"""Rows of backups and marks of a running guest."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import time
from typing import Any, Dict, Final, List, Tuple

from tests.bench import measuring
from tests.bench.measuring import Effort, Row, Sample, timed
from tests.bench.world import MIB, Guest, World, bare, bare_socket, prepared, run, server

GIB: Final = 1024 * MIB
BLOCK: Final = 64 * 1024
PEER: Final = "virtnbdbackup"
MARK_TIMES: Final = 3.0


def big(world: World) -> Guest:
    """1.5 GiB of mixed data on a disk of 2 GiB."""
    size = GIB // 4 if world.quick else 2 * GIB
    return world.guest("big", {"vda": (size, size * 3 // 4)})


def twin(world: World) -> Guest:
    """The same for the peer, which refuses a guest with anybody else's checkpoint."""
    size = GIB // 4 if world.quick else 2 * GIB
    return world.guest("twin", {"vda": (size, size * 3 // 4)})


def full(world: World, effort: Effort) -> List[Row]:
    """A full backup against the floor, and against the peer where there is one."""
    guest = big(world)
    sides: Dict[str, measuring.Side] = {
        "ours": lambda into: _full(world, guest, into),
        "floor": lambda into: _floor(world, guest, into),
    }
    found = measuring.alternate(effort.rounds, sides)
    what = "full backup of a running guest, mixed data, zstd, digests"
    rows = [measuring.ratio("full", what, "virsh backup-begin, nbdcopy, domjobabort", found, 1.0)]
    if shutil.which(PEER):
        peer: Dict[str, measuring.Side] = {
            "ours": sides["ours"],
            PEER: lambda into: _peer(world, twin(world), "full", world.new("peer-full"), into),
        }
        rows.append(measuring.ratio("full-peer", what, PEER, measuring.alternate(effort.rounds, peer), 0.35))
    return rows


def _full(world: World, guest: Guest, into: List[Sample]) -> None:
    repository = world.init("full")
    world.ours(repository, "backup", guest.name, into=into)
    world.forget(guest)
    shutil.rmtree(repository)


def _floor(world: World, guest: Guest, into: List[Sample]) -> None:
    """The least that copies a disk of a running guest into a compressed qcow2 image: four programs, no digest."""
    layer, socket = world.new("floor.qcow2"), world.new("floor.sock")
    sizes = {target: guest.domain.blockInfo(target)[0] for target in guest.disks}
    virsh = ["virsh", "-q", "-c", world.host.uri]
    with prepared(world, guest, sizes) as (job, checkpoint, name):
        documents = {"job": job, "checkpoint": checkpoint}
        for kind, text in documents.items():
            with open(world.new(kind), "w", encoding="utf-8") as file:
                file.write(text)
        xml = [os.path.join(world.folder, kind) for kind in documents]
        source = bare_socket(world)
        with timed(into):
            run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", layer, str(sizes["vda"]))
            with server(socket, *sink(layer, socket)):
                run(*virsh, "backup-begin", guest.name, *xml, "--reuse-external")
                uris = [f"nbd+unix:///vda?socket={source}", f"nbd+unix:///?socket={socket}"]
                run("nbdcopy", "--destination-is-zero", "--flush", *uris)
            run(*virsh, "domjobabort", guest.name)
        guest.domain.checkpointLookupByName(name).delete(0)


def sink(layer: str, socket: str) -> List[str]:
    """What writes a compressed image, `layer`, from NBD."""
    node = f"driver=compress,file.driver=qcow2,file.file.driver=file,file.file.filename={layer}"
    return ["qemu-nbd", "--persistent", "--shared=8", "--cache=writeback", "--socket", socket, "--image-opts", node]


def _peer(world: World, guest: Guest, level: str, output: str, into: List[Sample]) -> None:
    argv = [PEER, "-U", world.host.uri, "-d", guest.name, "-l", level, "-o", output, "--noprogress", "--compress"]
    with timed(into):
        run(*argv, env=world.environment)


def increment(world: World, effort: Effort) -> List[Row]:
    """2048 scattered blocks, and what is read for them."""
    guest = big(world)
    blocks = 256 if world.quick else 2048
    rng = random.Random(1)
    repository = world.init("increments")
    world.ours(repository, "backup", guest.name)
    read: List[float] = []
    size = guest.domain.blockInfo("vda")[0]

    def dirtied(guest: Guest) -> None:
        guest.write("vda", [n * BLOCK for n in rng.sample(range(size // BLOCK), blocks)], BLOCK)

    def ours(into: List[Sample]) -> None:
        dirtied(guest)
        [disk] = world.ours(repository, "backup", guest.name, into=into)["disks"]
        assert disk["mode"] == "incremental"
        assert disk["dirty_bytes"] == blocks * BLOCK
        read.append(disk["read_bytes"] / disk["dirty_bytes"])

    what = f"increment of {blocks} scattered blocks of 64 KiB, process start to exit"
    rows: List[Row] = []
    sides: Dict[str, measuring.Side] = {"ours": ours}
    if shutil.which(PEER):
        path = world.new("peer-increments")
        _peer(world, twin(world), "full", path, [])

        def peer(into: List[Sample]) -> None:
            dirtied(twin(world))
            _peer(world, twin(world), "inc", path, into)

        found = measuring.alternate(effort.rounds, {**sides, PEER: peer})
        rows.append(measuring.ratio("increment-peer", what, PEER, found, 0.4))
    else:
        found = measuring.alternate(effort.rounds, sides)
    seconds = [sample.seconds for sample in found["ours"]]
    cpu = round(statistics.median(sample.cpu for sample in found["ours"]), 3)
    rows.append(measuring.plain("increment", what, "s", seconds, None, cpu_seconds=cpu))
    gaps = "no gap is bridged"
    rows.append(measuring.plain("read", "bytes read for an increment, of the dirty grains", "x", read, 1.0, gaps=gaps))
    world.forget(guest)
    return rows


def nothing(world: World, effort: Effort) -> List[Row]:
    """An increment of a guest that wrote nothing."""
    return [_beside_bare(world, effort, "backup", "nothing", "increment with nothing dirty, process start to exit", 0.5)]


def mark(world: World, effort: Effort) -> List[Row]:
    """A mark, as the verb in an open session and as a process."""
    guest, repository = _tracked(world, "marks")
    what = "mark of a guest that wrote nothing"
    verb = measuring.alternate(
        max(effort.rounds, 7), {"ours": lambda into: _verb(world, repository, guest, into), "bare": _bare(world, guest)}
    )
    rows = [measuring.ratio("mark", what + ", the verb", "libvirt's own begin and abort", verb, MARK_TIMES)]
    rows.append(_beside_bare(world, effort, "mark", "mark-process", what + ", process start to exit", None))
    return rows


def _verb(world: World, repository: str, guest: Guest, into: List[Sample]) -> None:
    import libvirt_cbt

    os.environ.update(world.host.environment())
    with libvirt_cbt.Session(world.host.uri, repository) as session:
        assert session.host
        with timed(into):
            libvirt_cbt.mark(session, guest.name, scratch_dir=world.host.scratch)


def _tracked(world: World, name: str) -> Tuple[Guest, str]:
    guest = world.guest("small", {"vda": (256 * MIB, 16 * MIB)})
    world.forget(guest)
    repository = world.init(name)
    world.ours(repository, "backup", guest.name)
    return guest, repository


def _bare(world: World, guest: Guest) -> measuring.Side:
    return lambda into: bare(world, guest, into)


def _beside_bare(world: World, effort: Effort, command: str, name: str, what: str, target: Any) -> Row:
    guest, repository = _tracked(world, name)
    sides: Dict[str, measuring.Side] = {
        "ours": lambda into: world.ours(repository, command, guest.name, into=into),
        "bare": _bare(world, guest),
    }
    found = measuring.alternate(max(effort.rounds, 7), sides)
    return measuring.difference(name, what, "libvirt's own begin and abort", found, target)


def sizes(world: World, effort: Effort) -> List[Row]:
    """64 MiB dirty on disks of three sizes; what libvirt itself needs on each is taken off."""
    tested = {"1 GiB": GIB, "1 TiB": 1024 * GIB, "64 TiB": 64 * 1024 * GIB}
    found: Dict[str, List[Sample]] = {}
    alone: Dict[str, List[Sample]] = {}
    sides: Dict[str, measuring.Side] = {}
    for label, size in tested.items():
        guest = world.guest(f"sparse-{label.replace(' ', '-')}", {"vda": (size, 0)})
        repository = world.init(guest.name)
        world.ours(repository, "backup", guest.name)
        sides[label] = _sized(world, guest, repository, size, alone.setdefault(label, []))
    found = measuring.alternate(effort.rounds, sides)
    rows = []
    for label in ("1 TiB", "64 TiB"):
        pair = {label: found[label], "1 GiB": found["1 GiB"]}
        name = f"size-{label.replace(' ', '')}"
        what = f"increment of 64 MiB dirty on a sparse disk of {label}, begin and abort taken off"
        asked = -(-tested[label] // (4 * GIB))
        row = measuring.ratio(name, what, "the same on 1 GiB", pair, 1.2, less=alone, block_status_requests=asked)
        rows.append(row)
    return rows


def _sized(world: World, guest: Guest, repository: str, size: int, alone: List[Sample]) -> measuring.Side:
    def side(into: List[Sample]) -> None:
        guest.write("vda", [n * (size // 64) for n in range(64)], MIB)
        world.ours(repository, "backup", guest.name, into=into)
        bare(world, guest, alone)

    return side


def disks(world: World, effort: Effort) -> List[Row]:
    """Two disks and four: all at once against one after the other."""
    data = (32 if world.quick else 256) * MIB
    guests = {n: world.guest(f"disks-{n}", {f"vd{'abcd'[i]}": (2 * data, data) for i in range(n)}) for n in (1, 2, 4)}
    first: Dict[int, List[float]] = {1: [], 2: [], 4: []}

    def side(count: int) -> measuring.Side:
        def taken(into: List[Sample]) -> None:
            repository = world.init("disks")
            world.ours(repository, "backup", guests[count].name, into=into)
            world.forget(guests[count])

        return taken

    found = measuring.alternate(effort.rounds, {str(n): side(n) for n in guests})
    rows = []
    for count in (2, 4):
        apart = [Sample(s.seconds * count, s.cpu * count) for s in found["1"]]
        pair = {"at once": found[str(count)], "one after the other": apart}
        first[count] = _first_bytes(world, guests[count])
        what = f"full backup of {count} disks"
        rows.append(
            measuring.ratio(f"disks-{count}", what, f"{count} times one disk", pair, 1.0, first_byte_seconds=first[count])
        )
    return rows


def _first_bytes(world: World, guest: Guest) -> List[float]:
    """When the first data of each disk was stored, seconds after the very first."""
    import libvirt_cbt

    seen: Dict[str, float] = {}

    class Watch(libvirt_cbt.Watch):
        def progress(self, target: str, done: int, total: int) -> None:
            seen.setdefault(target, time.perf_counter())

    os.environ.update(world.host.environment())
    with libvirt_cbt.Session(world.host.uri, world.init("disks"), Watch()) as session:
        libvirt_cbt.backup(session, guest.name, quiesce="none", scratch_dir=world.host.scratch)
    world.forget(guest)
    return sorted(round(at - min(seen.values()), 3) for at in seen.values())
