"""Random histories of a disk: every generation must come back, byte for byte, by us and by qemu-img alone."""

from __future__ import annotations

import json
import random
from typing import List, Tuple

import numpy as np
import pytest

from libvirt_cbt import extents
from libvirt_cbt.nbdio import copy, density, lanes
from tests.nbd.conftest import MIB, Chain, Disk, run, runs

KINDS = ("write", "noise", "zero", "unmap", "discard")


def history(rng: random.Random, size: int, step: int) -> List[Tuple[str, int, int, int]]:
    """Odd sizes at odd places, often at the end of the disk and at the edges of clusters and grains."""
    out = []
    for _ in range(rng.randrange(1, 12)):
        length = rng.choice((step, 3 * step, 4096, 65536, 65536 + step, rng.randrange(step, MIB)))
        length = min(length, size) // step * step
        offset = rng.choice((rng.randrange(size), rng.randrange(size) // 65536 * 65536, size - length))
        offset = min(offset // step * step, size - length)
        out.append((rng.choice(KINDS), offset, length, rng.randrange(1, 256)))
    return out


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
@pytest.mark.parametrize("granularity", [512, None])
def test_random_chain(folder: str, rng: random.Random, cluster: int, granularity: int) -> None:
    size = rng.choice((MIB, 4 * MIB + 512, 3 * MIB + 65536 - 512, 5 * MIB + 4096))
    options = lanes.Options(request_size=rng.choice((65536, 262144, MIB)), requests=rng.choice((1, 3, 8)))
    disk, chain = Disk(folder, size, cluster=cluster, granularity=granularity), Chain(folder, options)
    for generation in range(5):
        disk.write(*history(rng, size, 512))
        disk.check_model()
        with disk.export() as source:
            chain.backup(source, disk.model, disk.bitmap if generation else None)
        disk.next_bitmap()
    chain.prove()


@pytest.mark.parametrize("dense", [None, True, False])
def test_what_does_not_compress_passes_the_compressor_by(
    folder: str, monkeypatch: pytest.MonkeyPatch, *, dense: bool | None
) -> None:
    """Both ways into a layer show the same bytes, and so does whatever the sample takes data for."""
    if dense is not None:
        monkeypatch.setattr(density, "dense", lambda _: dense)
    disk, chain = Disk(folder, 8 * MIB + 512), Chain(folder)
    disk.write(("write", 0, 2 * MIB, 1), ("noise", 2 * MIB, 4 * MIB, 0), ("write", 6 * MIB, 2 * MIB + 512, 2))
    with disk.export() as source:
        chain.backup(source, disk.model, None)
    counts = json.loads(run("qemu-img", "check", "--output=json", "-f", "qcow2", chain.layers[0].path))
    assert counts.get("compressed-clusters", 0) == (0 if dense else 4 * MIB // 65536 + 1)
    assert counts["allocated-clusters"] == 8 * MIB // 65536 + 1
    chain.prove()


def test_marks_in_between(folder: str, rng: random.Random) -> None:
    """A backup after marks copies their deltas as well (`also`), with the bytes and states of its own moment."""
    size = 4 * MIB + 512
    disk, chain = Disk(folder, size), Chain(folder)
    disk.write(*history(rng, size, 512), ("write", 0, MIB, 7))
    with disk.export() as source:
        chain.backup(source, disk.model, None)
    disk.next_bitmap()
    marks: List[extents.Extents] = []
    for _ in range(3):
        disk.write(*history(rng, size, 512))
        with disk.export() as source:
            got: List[extents.Extents] = []
            mark = copy.Pull(
                target="vda",
                source=source,
                capacity=size,
                bitmap=f"qemu:dirty-bitmap:{disk.bitmap}",
                copy=copy.NOTHING,
                expected=0,
                sink=None,
                also=lambda _low, _high: extents.empty(),
                delta=got.append,
                contents=lambda _rows: pytest.fail("a mark stores nothing"),
            )
            [pulled] = copy.pull([mark], lanes.Options(), progress=lambda *_: None, stop=lambda: None)
        assert (pulled.data_bytes, pulled.zero_bytes, pulled.read_bytes) == (0, 0, 0)
        assert pulled.dirty_bytes == sum(extents.total(x) for x in got)
        marks.append(np.concatenate(got))
        disk.next_bitmap()
    disk.write(*history(rng, size, 512))
    with disk.export() as source:
        chain.backup(source, disk.model, disk.bitmap, also=lambda low, high: extents.unite(marks, low, min(high, size)))
    chain.prove()


def test_runs_are_joined_across_windows(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "WINDOW", 3 * extents.GRAIN)
    size = 8 * MIB + 512
    disk, chain = Disk(folder, size), Chain(folder)
    with disk.export() as source:
        chain.backup(source, disk.model, None)
    disk.next_bitmap()
    disk.write(("write", MIB, 4 * MIB, 3), ("zero", 5 * MIB, MIB, 0), ("write", 7 * MIB, MIB + 512, 4))
    with disk.export() as source:
        layer = chain.backup(source, disk.model, disk.bitmap)
    assert runs(layer.delta) == [
        (MIB, 4 * MIB, extents.DATA),
        (5 * MIB, MIB, extents.ZERO),
        (7 * MIB, MIB + 512, extents.DATA),
    ]
    chain.prove()


def test_several_disks_in_one_loop(folder: str, rng: random.Random) -> None:
    """Different sizes and modes at once, each right, with progress for each."""
    from contextlib import ExitStack

    from libvirt_cbt.nbdio import qcow2, server

    disks = [Disk(folder, size) for size in (MIB, 3 * MIB + 512, 6 * MIB)]
    seen: dict[str, int] = {}
    stored: List[List[extents.Extents]] = [[], [], []]
    with ExitStack() as stack:
        pulls = []
        for number, disk in enumerate(disks):
            disk.write(*history(rng, disk.size, 512), ("write", 0, 512, 9))
            source = stack.enter_context(disk.export())
            path = f"{folder}/layer-{number}.qcow2"
            qcow2.create_layer(path, disk.size, backing=None, compress=True)
            sink = copy.Sink(stack.enter_context(server.sink(path, folder, compress=True)), path, has_parent=False)
            pulls.append(
                copy.Pull(
                    target=f"vd{number}",
                    source=source,
                    capacity=disk.size,
                    bitmap=None,
                    copy=copy.ALL,
                    expected=disk.size,
                    sink=sink,
                    also=lambda _low, _high: extents.empty(),
                    delta=lambda _rows: None,
                    contents=stored[number].append,
                )
            )
        done = copy.pull(
            pulls, lanes.Options(), progress=lambda target, at, _all: seen.update({target: at}), stop=lambda: None
        )
    assert [one.target for one in done] == ["vd0", "vd1", "vd2"]
    assert {one.target: one.data_bytes for one in done} == seen
    for number, disk in enumerate(disks):
        covered = bytearray(disk.size)
        for offset, length, _, _ in np.concatenate(stored[number]).tolist():
            covered[offset : offset + length] = disk.model[offset : offset + length]
        assert covered == disk.model
