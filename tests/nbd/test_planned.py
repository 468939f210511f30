"""Real layers restored as `actions.restore` does it: contents files, the plan, the check; also of a disk that grew."""

from __future__ import annotations

import os
import random
from contextlib import ExitStack
from pathlib import Path

import pytest

from libvirt_cbt import extents
from libvirt_cbt.nbdio import check, lanes, server
from libvirt_cbt.repository import npy, plan
from tests.nbd.conftest import MIB, Chain, Disk, assert_same, nothing, run
from tests.nbd.test_chains import history


def stored(chain: Chain, number: int) -> str:
    """The contents of a layer as a file of the repository; gives its digest."""
    writer = npy.Writer(f"{chain.folder}/{number}.contents.npy", extents.CONTENT)
    writer.append(chain.layers[number].contents)
    return writer.finish()[0]


def restored(chain: Chain, newest: int, folder: str) -> bytes:
    capacity = len(chain.layers[newest].model)
    path = os.path.join(folder, f"planned-{newest}.raw")
    numbers = range(newest, -1, -1)
    with ExitStack() as stack:
        readers = []
        for number in numbers:
            name = f"{folder}/{number}.contents.npy"
            readers.append(stack.enter_context(npy.Reader(name, extents.CONTENT, npy.file_digest(name))))
        sources = stack.enter_context(server.layers([chain.layers[n].path for n in numbers], folder))
        out = stack.enter_context(open(path, "xb"))
        out.truncate(capacity)
        check.check(
            "vda",
            sources,
            (check.Read(r.layer, r.offset, r.length, r.digest, r.keep) for r in plan.restore(readers, capacity)),
            check.Output(path, fd=out.fileno()),
            chain.options,
            damaged=lambda read, reason: pytest.fail(f"{read}: {reason}"),
            progress=nothing,
            stop=nothing,
        )
    return Path(path).read_bytes()


def prove(chain: Chain, folder: str) -> None:
    for number in range(len(chain.layers)):
        stored(chain, number)
    for number, layer in enumerate(chain.layers):
        assert_same(restored(chain, number, folder), layer.model, f"generation {number}")
        converted = os.path.join(folder, "alone.raw")
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", layer.path, converted)
        assert_same(Path(converted).read_bytes(), layer.model, f"layer {number} through qemu-img")


def grow(disk: Disk, size: int) -> None:
    run("qemu-img", "resize", "-q", "-f", "qcow2", disk.path, str(size))
    disk.model += bytes(size - disk.size)
    disk.size = size


@pytest.mark.parametrize("window", [plan.WINDOW, 5 * extents.GRAIN])
def test_every_generation_by_the_plan(
    folder: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(plan, "WINDOW", window)
    disk, chain = Disk(folder, 3 * MIB + 512), Chain(folder, lanes.Options(request_size=rng.choice((65536, MIB))))
    for generation in range(4):
        disk.write(*history(rng, disk.size, 512))
        with disk.export() as source:
            chain.backup(source, disk.model, disk.bitmap if generation else None)
        disk.next_bitmap()
    prove(chain, folder)


@pytest.mark.parametrize("step", [512, 65536 - 512, 65536, 3 * 65536 + 512])
def test_a_disk_that_grows(folder: str, rng: random.Random, step: int) -> None:
    """The tail that no layer holds reads as zeroes, whatever stands in the older layers' last grain."""
    disk, chain = Disk(folder, MIB + 512), Chain(folder)
    disk.write(("write", 0, disk.size, 0x5A))
    for generation in range(4):
        with disk.export() as source:
            chain.backup(source, disk.model, disk.bitmap if generation else None)
        disk.next_bitmap()
        grow(disk, disk.size + step)
        if generation == 1:
            disk.write(*history(rng, disk.size, 512), ("write", disk.size - 512, 512, 0x77))
    prove(chain, folder)
