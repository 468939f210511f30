"""An audit finds what a bitmap has missed, all of it and nothing else; healing puts it right."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

import numpy as np
import pytest

from libvirt_cbt import errors, extents
from libvirt_cbt.nbdio import audit, blockstatus, lanes, server, source
from tests.guests.proxy import Proxy
from tests.nbd.conftest import MIB, Chain, Disk, none_also, nothing, run, runs, served
from tests.nbd.test_chains import history

GRAIN = extents.GRAIN


def lie(disk: Disk, *writes: Tuple[str, int, int, int]) -> None:
    """The guest writes and the bitmap of its disk does not know: it is made anew afterwards, with the bits it had."""
    assert disk.bitmap
    marked = dirty_of(disk)
    bare = disk.path + ".bare"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", "-o", f"cluster_size={disk.cluster}", disk.path, bare)
    os.rename(bare, disk.path)
    disk.write(*writes)
    grain = ["-g", str(disk.granularity)] if disk.granularity else []
    run("qemu-img", "bitmap", "-f", "qcow2", "--add", *grain, disk.path, disk.bitmap)
    for offset, length in marked:
        same = Path(disk.path + ".same")
        same.write_bytes(disk.model[offset : offset + length])
        run("qemu-io", "-f", "qcow2", "-c", f"write -s {same} {offset} {length}", disk.path)
        same.unlink()
    assert dirty_of(disk) == marked


def dirty_of(disk: Disk) -> List[Tuple[int, int]]:
    with disk.export() as point:
        uri = f"nbd+unix:///disk?socket={point.socket}"
        found = json.loads(run("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{disk.bitmap}", uri))
    return [(x["offset"], x["length"]) for x in found if x["type"] & 1]


class Found:
    def __init__(self) -> None:
        self.rows: List[extents.Extents] = [extents.empty()]
        self.progress: List[Tuple[int, int]] = []
        self.result: Optional[audit.Audit] = None

    @property
    def differs(self) -> extents.Extents:
        return np.concatenate(self.rows)

    @property
    def grains(self) -> Set[int]:
        return {g for o, n, _ in runs(self.differs) for g in range(o // GRAIN, -(-(o + n) // GRAIN))}


@contextlib.contextmanager
def shown(chain: Chain) -> Iterator[server.Endpoint]:
    with server.chain([layer.path for layer in chain.layers[::-1]], chain.folder) as endpoint:
        yield endpoint


def compare(
    point: server.Endpoint,
    stored: server.Endpoint,
    capacity: int,
    bitmap: Optional[str] = None,
    *,
    also: Any = none_also,
    stop: Callable[[], None] = nothing,
    alive: Callable[[], bool] = audit.always,
    options: Optional[lanes.Options] = None,
) -> Found:
    found = Found()
    one = audit.Compare(
        target="vda",
        source=point,
        chain=stored,
        capacity=capacity,
        bitmap=bitmap and f"qemu:dirty-bitmap:{bitmap}",
        also=also,
        differs=found.rows.append,
    )
    [found.result] = audit.compare(
        [one],
        options or lanes.Options(),
        progress=lambda _, done, whole: found.progress.append((done, whole)),
        stop=stop,
        alive=alive,
    )
    assert found.progress[-1] == (capacity, capacity) or not capacity
    assert found.progress == sorted(found.progress)
    assert extents.check(found.differs, capacity) == ""
    assert len(extents.coalesce(found.differs)) == len(found.differs), "runs are joined, also across windows"
    assert found.result.differing_bytes == extents.total(found.differs)
    return found


def expected(new: bytes, old: bytes, skip: List[Tuple[int, int]]) -> Set[int]:
    """The grains with a byte that differs and is not skipped; slow and plain."""
    ours, theirs = np.frombuffer(new, np.uint8), np.zeros(len(new), np.uint8)
    theirs[: len(old)] = np.frombuffer(old, np.uint8)[: len(new)]
    unequal = ours != theirs
    for offset, length in skip:
        unequal[offset : offset + length] = False
    return {int(x) // GRAIN for x in np.flatnonzero(unequal)}


@pytest.mark.parametrize("cluster", [4096, 65536])
@pytest.mark.parametrize("window", [None, 5 * GRAIN + 512])
def test_all_that_the_bitmap_missed(
    folder: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch, cluster: int, window: Optional[int]
) -> None:
    """Random honest writes and random lies, in one grain, too; healed, the chain is whole and the delta tells it."""
    if window:
        monkeypatch.setattr(audit, "WINDOW", window)
    size = rng.choice((3 * MIB + 512, 2 * MIB + GRAIN - 512, 4 * MIB))
    disk, chain = Disk(folder, size, cluster=cluster, granularity=512 if cluster == 4096 else None), Chain(folder)
    disk.write(*history(rng, size, 512), ("write", size // 3, MIB, 0x11))
    with disk.export() as point:
        chain.backup(point, disk.model, None)
    disk.next_bitmap()
    disk.write(*history(rng, size // 1024 * 512, 512)[:4])
    old = chain.layers[0].model
    lie(disk, *history(rng, size, 512)[:4], ("write", size // 4 * 3 // 512 * 512, 512, 0x77))
    mine = dirty_of(disk)
    also = extents.make([GRAIN // 2, size // 2 // 512 * 512], [3 * GRAIN, 8192], extents.DATA)
    with disk.export() as point:
        with shown(chain) as stored:
            options = lanes.Options(request_size=rng.choice((GRAIN, 4 * GRAIN)), requests=rng.choice((1, 8)))
            found = compare(
                point,
                stored,
                size,
                disk.bitmap,
                also=lambda low, high: extents.clip(also, low, high),
                options=options,
            )
        skip = mine + [(o, n) for o, n, _ in runs(also)]
        assert found.grains == expected(bytes(disk.model), old, skip) != set()
        for offset, length, state in runs(found.differs):
            assert offset % GRAIN == 0
            assert length % GRAIN == 0 or offset + length == size
            assert state != extents.ZERO or not any(disk.model[offset : offset + length])
        covered = bytearray(size)
        for offset, length in skip:
            covered[offset : offset + length] = b"\1" * length
        assert found.result and found.result.compared_bytes == size - sum(covered)
        healed = chain.backup(
            point,
            disk.model,
            disk.bitmap,
            also=lambda low, high: extents.clip(also, low, high),
            extra_dirty=lambda low, high: extents.clip(found.differs, low, high),
        )
        for grain in found.grains:
            low, high = grain * GRAIN, min((grain + 1) * GRAIN, size)
            assert extents.total(extents.clip(healed.delta, low, high)) == high - low
        chain.prove()
        with shown(chain) as stored:
            assert not len(compare(point, stored, size).differs)


def test_an_honest_bitmap_leaves_nothing_to_find(folder: str, rng: random.Random) -> None:
    size = 3 * MIB + 512
    disk, chain = Disk(folder, size), Chain(folder)
    for generation in range(3):
        disk.write(*history(rng, size, 512))
        with disk.export() as point:
            if generation:
                with shown(chain) as stored:
                    assert not len(compare(point, stored, size, disk.bitmap).differs)
            chain.backup(point, disk.model, disk.bitmap if generation else None)
        disk.next_bitmap()


def test_states_are_the_sources(folder: str) -> None:
    disk, chain = Disk(folder, 16 * GRAIN), Chain(folder)
    disk.write(("write", 0, 12 * GRAIN, 0x21))
    with disk.export() as point:
        chain.backup(point, disk.model, None)
    disk.write(("zero", 2 * GRAIN, 3 * GRAIN, 0), ("write", 5 * GRAIN, 512, 0x22), ("write", 15 * GRAIN, 1, 0x23))
    with disk.export() as point, shown(chain) as stored:
        found = compare(point, stored, disk.size)
    assert runs(found.differs) == [
        (2 * GRAIN, 3 * GRAIN, extents.ZERO),
        (5 * GRAIN, GRAIN, extents.DATA),
        (15 * GRAIN, GRAIN, extents.DATA),
    ]
    assert found.result
    # Of the sixteen three were never written on either side.
    assert (found.result.compared_bytes, found.result.read_bytes) == (16 * GRAIN, 13 * GRAIN)


@pytest.mark.parametrize("old", [MIB + 512, MIB - 512, MIB])
def test_a_disk_that_has_grown(folder: str, old: int) -> None:
    """Behind the end of the chain there are zeroes, whatever stands in its last grain."""
    disk, chain = Disk(folder, old), Chain(folder)
    disk.write(("write", 0, old, 0x31))
    # One request at a time uses each buffer again, with what it held.
    one = lanes.Options(request_size=GRAIN, requests=1)
    with disk.export() as point:
        chain.backup(point, disk.model, None)
        with shown(chain) as stored:
            assert not len(compare(point, stored, disk.size, options=one).differs)
    run("qemu-img", "resize", "-q", "-f", "qcow2", disk.path, str(2 * MIB + 512))
    disk.model += bytes(2 * MIB + 512 - old)
    disk.size = len(disk.model)
    # Zeroes that are written are read and compared.
    disk.write(("write", MIB + GRAIN, 3 * GRAIN, 0), ("write", 2 * MIB, 512, 0))
    with disk.export() as point, shown(chain) as stored:
        assert not len(compare(point, stored, disk.size, options=one).differs)
    disk.write(("write", old, 1, 0x32), ("write", disk.size - 1, 1, 0x33))
    with disk.export() as point, shown(chain) as stored:
        assert compare(point, stored, disk.size, options=one).grains == {old // GRAIN, (disk.size - 1) // GRAIN}


@contextlib.contextmanager
def damaged(folder: str, raw: str, events: List[Dict[str, Any]]) -> Iterator[server.Endpoint]:
    path = f"{folder}/damaged.sock"
    file = {"driver": "blkdebug", "image": {"driver": "file", "filename": raw}, "inject-error": events}
    argv = ["qemu-nbd", "-r", "-t", "-k", path, "json:" + json.dumps({"driver": "raw", "file": file})]
    with served(argv, path):
        yield server.Endpoint(path, "")


def bad(sector: int) -> Dict[str, Any]:
    return {"event": "none", "iotype": "read", "errno": 5, "sector": sector, "once": False}


def test_a_damaged_chain_differs_where_it_is(folder: str) -> None:
    disk = Disk(folder, 2 * MIB + 512)
    disk.write(("write", 0, disk.size, 0x41))
    raw = f"{folder}/raw"
    Path(raw).write_bytes(disk.model)
    with disk.export() as point, damaged(folder, raw, [bad(300), bad(2 * MIB // 512)]) as stored:
        found = compare(point, stored, disk.size)
    assert found.grains == {300 // 128, 2 * MIB // GRAIN}
    assert found.result and found.result.unreadable_bytes == GRAIN + 512


def test_a_chain_whose_map_is_broken_differs(folder: str) -> None:
    """The second level table of the layer lies askew: neither its map nor its data can be read."""
    disk, chain = Disk(folder, MIB), Chain(folder)
    disk.write(("write", 0, MIB, 0x42))
    with disk.export() as point:
        layer = chain.backup(point, disk.model, None)
        with open(layer.path, "r+b") as file:
            file.seek(40)
            at = int.from_bytes(file.read(8), "big")
            file.seek(at)
            file.write((1 << 63 | 5 * GRAIN + 512).to_bytes(8, "big"))
        with shown(chain) as stored:
            found = compare(point, stored, disk.size)
    assert runs(found.differs) == [(0, MIB, extents.DATA)]
    assert found.result and found.result.unreadable_bytes == MIB


def test_a_source_that_cannot_be_read_is_no_difference(folder: str) -> None:
    disk, chain = Disk(folder, MIB), Chain(folder)
    disk.write(("write", 0, MIB, 0x43))
    with disk.export() as point:
        chain.backup(point, disk.model, None)
    raw = f"{folder}/raw"
    Path(raw).write_bytes(disk.model)
    with damaged(folder, raw, [bad(300)]) as point, shown(chain) as stored:
        with pytest.raises(errors.SourceUnreadable) as caught:
            compare(point, stored, disk.size)
    assert caught.value.facts["offset"] <= 300 * 512 < caught.value.facts["offset"] + caught.value.facts["length"]


def test_an_unknown_bitmap_is_refused(folder: str) -> None:
    disk, chain = Disk(folder, MIB), Chain(folder)
    with disk.export() as point:
        chain.backup(point, disk.model, None)
        with shown(chain) as stored, pytest.raises(errors.NbdError, match="does not offer"):
            compare(point, stored, disk.size, "other")


@pytest.fixture
def pair(folder: str, rng: random.Random) -> Iterator[Tuple[Disk, server.Endpoint, server.Endpoint]]:
    """A disk of which three grains differ from its chain."""
    disk, chain = Disk(folder, 4 * MIB), Chain(folder)
    disk.fill(rng.randbytes(4 * MIB))
    with disk.export() as point:
        chain.backup(point, disk.model, None)
    disk.write(*(("write", grain * GRAIN + 512, 512, 0x51) for grain in (3, 33, 63)))
    with disk.export() as point, shown(chain) as stored:
        yield disk, point, stored


def test_a_cut_source_is_resumed(
    folder: str,
    pair: Tuple[Disk, server.Endpoint, server.Endpoint],
    rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source, "FIRST_PAUSE", 0.001)
    disk, point, stored = pair
    for _ in range(20):
        budgets = [600 + rng.randrange(MIB) for _ in range(3)]
        with Proxy(f"{folder}/wire.sock", point.socket, budgets=budgets) as wire:
            found = compare(server.Endpoint(wire.path, "disk"), stored, disk.size)
            assert found.grains == {3, 33, 63}
            assert found.result and found.result.reconnects == 3
            assert found.result.read_bytes == disk.size
    with Proxy(f"{folder}/wire.sock", point.socket, budgets=[MIB]) as wire:
        with pytest.raises(errors.SourceLost):
            compare(server.Endpoint(wire.path, "disk"), stored, disk.size, alive=lambda: False)


def test_a_chain_that_goes_is_named(folder: str, pair: Tuple[Disk, server.Endpoint, server.Endpoint]) -> None:
    disk, point, stored = pair
    with Proxy(f"{folder}/wire.sock", stored.socket, budgets=[MIB]) as wire:
        with pytest.raises(errors.NbdError, match=r"chain.*backup has gone"):
            compare(point, server.Endpoint(wire.path, "chain"), disk.size)


@pytest.mark.parametrize("side", ["source", "chain"])
def test_a_stall_is_named(folder: str, pair: Tuple[Disk, server.Endpoint, server.Endpoint], side: str) -> None:
    disk, point, stored = pair
    quick = lanes.Options(stall_seconds=1.5)
    far = point if side == "source" else stored
    kind = errors.SourceStalled if side == "source" else errors.NbdError
    with Proxy(f"{folder}/wire.sock", far.socket, budgets=[MIB], then="stall") as wire:
        near = server.Endpoint(wire.path, far.export)
        with pytest.raises(kind):
            compare(*((near, stored) if side == "source" else (point, near)), disk.size, options=quick)


def test_stop_ends_it(pair: Tuple[Disk, server.Endpoint, server.Endpoint]) -> None:
    def stop() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compare(pair[1], pair[2], pair[0].size, stop=stop)


def test_several_disks_at_once(folder: str, rng: random.Random) -> None:
    found: List[List[extents.Extents]] = [[], [], []]
    with contextlib.ExitStack() as stack:
        disks = []
        for number, size in enumerate((MIB, 0, 3 * MIB + 512)):
            home = f"{folder}/{number}"
            os.mkdir(home)
            disk, chain = Disk(home, max(size, 512)), Chain(home)
            disk.write(("write", 0, disk.size, 0x61))
            with disk.export() as point:
                chain.backup(point, disk.model, None)
            disk.write(("write", disk.size - 1, 1, 0x62))
            point, stored = stack.enter_context(disk.export()), stack.enter_context(shown(chain))
            disks.append(audit.Compare(f"vd{number}", point, stored, disk.size, None, none_also, found[number].append))
        done = audit.compare(disks, lanes.Options(), progress=nothing, stop=nothing)
    assert [one.target for one in done] == ["vd0", "vd1", "vd2"]
    assert [runs(np.concatenate(rows)) for rows in found] == [
        [(15 * GRAIN, GRAIN, extents.DATA)],
        [(0, 512, extents.DATA)],
        [(48 * GRAIN, 512, extents.DATA)],
    ]


def test_memory_does_not_follow_the_differences(folder: str) -> None:
    """A TiB with nothing in it is windows without a piece; they are not kept."""
    import tracemalloc

    paths = [f"{folder}/{name}.qcow2" for name in ("new", "old")]
    for path in paths:
        run("qemu-img", "create", "-q", "-f", "qcow2", path, str(1 << 40))
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 1 {(1 << 40) - 512} 512", paths[0])
    with server.chain(paths[:1], folder) as new, server.chain(paths[1:], folder) as old:
        tracemalloc.start()
        found = compare(new, old, 1 << 40)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found.grains == {(1 << 24) - 1}
    assert found.result and found.result.compared_bytes == 1 << 40
    assert peak < 16 * MIB


# The arithmetic behind it


def test_stretches_against_a_model(rng: random.Random) -> None:
    for _ in range(300):
        low, units = rng.randrange(3) * GRAIN, rng.randrange(1, 600)
        end = low + units * 512
        capacity = end if units % 128 or rng.random() < 0.5 else end + GRAIN
        cuts = [0, *sorted(rng.sample(range(1, units), min(units - 1, rng.randrange(9)))), units]
        start = np.array([low + 512 * x for x in cuts[:-1]], np.uint64)
        stop = np.array([low + 512 * x for x in cuts[1:]], np.uint64)
        dirty, zero = (np.array([rng.random() < 0.5 for _ in start]) for _ in range(2))
        status = blockstatus.Status(start, stop, zero, dirty)
        edges = sorted(rng.sample(range(units + 1), min(units, rng.randrange(9)) // 2 * 2))
        pairs = list(zip(edges[::2], edges[1::2]))
        also = extents.make([low + 512 * a for a, _ in pairs], [512 * (b - a) for a, b in pairs], extents.ZERO)
        model = spread(status.dirty, cuts)
        for a, b in pairs:
            model[a:b] = True

        covered = blockstatus.covered(status, also)
        found = np.zeros(units, np.bool_)
        for a, b in zip(covered.start.tolist(), covered.end.tolist()):
            found[(a - low) // 512 : (b - low) // 512] = True
        assert (found == model).all()
        assert covered.total == 512 * int(model.sum())
        assert (covered.start[1:] > covered.end[:-1]).all()

        grains = [model[g : g + 128] for g in range(0, units, 128)]
        whole = [g.all() and (len(g) == 128 or end == capacity) for g in grains]
        cells = extents.Cells(low, end, GRAIN)
        cells.paint(covered.whole_grains(low, capacity), 1)
        assert (cells.values == np.array(whole)).all()

        marked = blockstatus.mark(status, also)
        places = [0, *((marked.end - np.uint64(low)) // 512).tolist()]
        assert (spread(marked.dirty, places) == model).all()
        assert (spread(marked.zero, places) == spread(zero, cuts)).all()


def spread(flags: Any, cuts: List[int]) -> Any:
    return np.repeat(flags, np.diff(cuts))
