"""The two ways in which tools of this kind lose data, and the end of a disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from libvirt_cbt import extents
from libvirt_cbt.nbdio import lanes
from tests.nbd.conftest import MIB, Chain, Disk, assert_same, run, runs

KIB = 1024


def test_contexts_of_different_lengths(folder: str) -> None:
    """Trap A: base:allocation of a fragmented image ends after 131072 extents, the bitmap's answer goes on."""
    size = 96 * MIB
    disk = Disk(folder, size, cluster=512)
    disk.fill((b"\x11" * 512 + bytes(512)) * (size // 1024))
    disk.next_bitmap()
    chain = Chain(folder)
    with disk.export() as source:
        chain.backup(source, disk.model, None)
    # Behind the 64 MiB where one reply's allocation ends, with fragments before, between and after.
    disk.write(
        ("write", 1 * MIB, MIB, 0x21), ("write", 70 * MIB, MIB, 0x22), ("write", 95 * MIB + 300 * KIB, 9000, 0x23)
    )
    with disk.export() as source:
        chain.backup(source, disk.model, disk.bitmap)
    touched = {(o, n) for o, n, _ in runs(chain.layers[1].delta)}
    assert any(o <= 70 * MIB < o + n for o, n in touched)
    chain.prove()


@pytest.mark.fault(31)
def test_dirty_and_zero_hides_the_parents_data(folder: str) -> None:
    """Trap B: the four kinds of write; what the guest zeroed must not come back."""
    disk = Disk(folder, 4 * MIB)
    disk.write(("write", 0, 4 * MIB, 0x55))
    disk.next_bitmap()
    chain = Chain(folder)
    with disk.export() as source:
        chain.backup(source, disk.model, None)
    disk.write(
        ("write", 0, 64 * KIB, 0x66),
        ("zero", 512 * KIB, 256 * KIB, 0),
        ("unmap", 1536 * KIB, 256 * KIB, 0),
        ("discard", 2560 * KIB, 256 * KIB, 0),
    )
    disk.check_model()
    with disk.export() as source:
        layer = chain.backup(source, disk.model, disk.bitmap)
    wanted = [
        (0, 64 * KIB, extents.DATA),
        (512 * KIB, 256 * KIB, extents.ZERO),
        (1536 * KIB, 256 * KIB, extents.ZERO),
        (2560 * KIB, 256 * KIB, extents.ZERO),
    ]
    assert runs(layer.delta) == wanted
    assert runs(layer.contents) == wanted
    chain.prove()


@pytest.mark.parametrize("odd", [512, 4096 + 512, 65536 - 512, 3 * MIB - 512])
@pytest.mark.parametrize("compress", [True, False])
def test_tail(folder: str, odd: int, compress: bool) -> None:
    """A disk that ends inside a grain: full, tail rewritten, tail zeroed, tail written in part."""
    disk = Disk(folder, MIB + odd)
    disk.write(("write", MIB - 70000, odd + 70000, 0x31))
    disk.next_bitmap()
    chain = Chain(folder, compress=compress)
    for change in (
        None,
        ("write", disk.size - 512, 512, 0x32),
        ("zero", MIB, odd, 0),
        ("write", disk.size - 300, 300, 0x33),
        ("unmap", 0, disk.size, 0),
    ):
        if change:
            disk.write(change)
        with disk.export() as source:
            chain.backup(source, disk.model, disk.bitmap if change else None)
        disk.next_bitmap()
    chain.prove()


def test_the_padding_behind_the_end_is_zero(folder: str) -> None:
    """A layer that grows with its disk must not show what the buffer held before."""
    disk = Disk(folder, 3 * 64 * KIB + 512)
    disk.write(("write", 0, disk.size, 0x34))
    chain = Chain(folder, lanes.Options(request_size=64 * KIB, requests=1))
    with disk.export() as source:
        layer = chain.backup(source, disk.model, None)
    run("qemu-img", "resize", "-q", "-f", "qcow2", layer.path, str(4 * 64 * KIB))
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", layer.path, f"{folder}/grown")
    assert_same(Path(f"{folder}/grown").read_bytes(), disk.model + bytes(64 * KIB - 512), "the grown layer")


def test_full_of_an_empty_disk_stores_nothing(folder: str) -> None:
    disk = Disk(folder, 8 * MIB)
    with disk.export() as source:
        layer = Chain(folder).backup(source, disk.model, None)
    assert not len(layer.contents)
    assert not len(layer.delta)
    assert layer.pulled.read_bytes == 0


def test_zero_beside_clean_data_is_no_zero_beyond_itself(folder: str) -> None:
    """Bits finer than 4 KiB: a zeroed sector must not make its clean neighbours zero in the delta."""
    disk = Disk(folder, MIB, cluster=512, granularity=512)
    disk.write(("write", 0, MIB, 0x41))
    disk.next_bitmap()
    chain = Chain(folder)
    with disk.export() as source:
        chain.backup(source, disk.model, None)
    disk.write(("zero", 512, 1024, 0), ("zero", 8192, 4096, 0), ("zero", 20000 // 512 * 512, 6144, 0))
    with disk.export() as source:
        layer = chain.backup(source, disk.model, disk.bitmap)  # judge() compares the delta's zeroes with the model
    assert (8192, 4096, extents.ZERO) in runs(layer.delta)
    chain.prove()


def test_data_is_read_in_bounded_requests(folder: str) -> None:
    disk = Disk(folder, 3 * MIB)
    disk.write(("write", 0, 3 * MIB, 0x51))
    chain = Chain(folder, lanes.Options(request_size=128 * KIB, requests=3))
    with disk.export() as source:
        layer = chain.backup(source, disk.model, None)
    assert [n for _, n, _ in runs(layer.contents)] == [128 * KIB] * 24
