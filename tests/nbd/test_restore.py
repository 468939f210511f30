"""The way back: every stored byte is judged by its digest before it is written."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any, List, Optional, Set, Tuple

import pytest

from libvirt_cbt import errors, extents
from libvirt_cbt.nbdio import check, lanes, qcow2, server
from tests.nbd.conftest import MIB, Chain, Disk, assert_same, nothing, run, served


def history(folder: str, generations: int, size: int, *, compress: bool = True, seed: int = 1) -> Chain:
    """A full and increments over it of text-like, and so compressible, data."""
    dice = random.Random(seed)
    disk, chain = Disk(folder, size), Chain(folder, compress=compress)
    disk.write(("write", 0, size, 0xFE))
    for generation in range(generations):
        if generation:
            at = dice.randrange(size // 65536) * 65536
            disk.write(("write", at, min(70000 // 512 * 512, size - at), generation))
            disk.write(("zero", dice.randrange(size // 65536) * 65536, 512, 0))
        with disk.export() as source:
            chain.backup(source, disk.model, disk.bitmap if generation else None)
        disk.next_bitmap()
    return chain


def test_sixty_layers_in_one_storage_daemon(folder: str) -> None:
    chain = history(folder, 60, 2 * MIB + 512)
    assert_same(chain.restore(59), chain.layers[59].model, "restore of the newest")
    assert_same(chain.restore(30), chain.layers[30].model, "restore of one in the middle")


def test_into_a_qcow2_image(folder: str) -> None:
    chain = history(folder, 4, 5 * MIB + 512)
    path, raw = f"{folder}/restored.qcow2", f"{folder}/restored.raw"
    size = len(chain.layers[0].model)
    read = 0
    with server.layers([x.path for x in chain.layers[::-1]], folder) as sources, open(path, "x+b") as file:
        qcow2.create_image(file.fileno(), size)
        with server.image(file.fileno(), folder) as endpoint:
            output = check.Output(path, endpoint=endpoint)
            read = check.check(
                "vda",
                sources,
                chain.reads(3),
                output,
                lanes.Options(),
                damaged=lambda found, why: pytest.fail(f"{found} {why}"),
                progress=nothing,
                stop=nothing,
            )
    assert read == sum(one.length for one in chain.reads(3))
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    assert_same(Path(raw).read_bytes(), chain.layers[3].model, "the qcow2 image")


def verify(chain: Chain, layer: int, *, output: Optional[check.Output] = None) -> Tuple[int, List[Tuple[int, str]]]:
    """Bytes read, and (offset, reason) of what is damaged in one layer alone."""
    damaged: List[Tuple[int, str]] = []
    reads = (
        check.Read(0, offset, length, bytes(digest), ((offset, length),) if output else ())
        for offset, length, state, digest in chain.layers[layer].contents.tolist()
        if state == extents.DATA
    )
    with server.layers([chain.layers[layer].path], chain.folder) as sources:
        read = check.check(
            "vda",
            sources,
            reads,
            output,
            lanes.Options(),
            damaged=lambda found, why: damaged.append((found.offset, why)),
            progress=nothing,
            stop=nothing,
        )
    return read, damaged


def test_verify_reads_all_of_a_layer_alone(folder: str) -> None:
    chain = history(folder, 3, 2 * MIB + 512)
    for layer in (1, 2):
        os.unlink(chain.layers[layer - 1].path)  # also when its parent has gone
        assert verify(chain, layer) == (chain.layers[layer].pulled.data_bytes, [])


def test_a_flipped_byte_is_named_and_not_written(folder: str) -> None:
    """Uncompressed, so that the bytes of the guest can be found in the file."""
    size = 4 * MIB
    disk, chain = Disk(folder, size), Chain(folder, compress=False)
    disk.write(("write", 0, size, 0xFE), ("write", 2 * MIB + 5120, 512, 0x77))
    with disk.export() as source:
        chain.backup(source, disk.model, None)
    with open(chain.layers[0].path, "r+b") as file:
        where = file.read().index(b"\x77" * 512) + 100
        file.seek(where)
        file.write(b"\x76")
    path = f"{folder}/out.raw"
    Path(path).write_bytes(b"\xee" * size)
    with open(path, "r+b") as out:
        read, damaged = verify(chain, 0, output=check.Output(path, fd=out.fileno()))
    assert read == size
    assert damaged == [(2 * MIB, "the digest does not match")]
    wanted = bytearray(disk.model)
    wanted[2 * MIB : 2 * MIB + lanes.Options().request_size] = b"\xee" * lanes.Options().request_size
    assert_same(Path(path).read_bytes(), wanted, "all but the damaged run")


def test_any_flipped_byte_of_a_compressed_layer(folder: str, rng: random.Random) -> None:
    """Wherever it is: named as damage, refused when the layer is opened, or of no consequence for the bytes."""
    chain = history(folder, 1, 3 * MIB)
    path = chain.layers[0].path
    good = Path(path).read_bytes()
    used: Set[int] = {i for i in range(len(good)) if good[i]}
    outcomes = {"same": 0, "damaged": 0, "refused": 0}
    for where in rng.sample(sorted(used), 25):
        bad = bytearray(good)
        bad[where] ^= 1 << rng.randrange(8)
        Path(path).write_bytes(bad)
        damage: List[Any] = []
        try:
            restored = chain.restore(0, damaged=lambda *a, kept=damage: kept.append(a))
        except (errors.ToolFailed, errors.Damaged):
            outcomes["refused"] += 1
            continue
        if damage:
            outcomes["damaged"] += 1
        else:
            assert_same(restored, chain.layers[0].model, f"undetected damage at {where}")
            outcomes["same"] += 1
    assert outcomes["damaged"]


def test_one_damaged_cluster_does_not_hide_the_rest(folder: str, rng: random.Random) -> None:
    """Compressed garbage gives EIO; QEMU must not cut the connection over it: the others are still checked."""
    size = 4 * MIB
    disk, chain = Disk(folder, size), Chain(folder)
    disk.fill(rng.randbytes(size))  # does not compress: clusters lie one behind another
    with disk.export() as source:
        chain.backup(source, disk.model, None)
    disk.fill(b"compress me " * (size // 12) + bytes(size % 12))
    chain.layers.clear()
    with disk.export() as source:
        chain.backup(source, disk.model, None)
    path = chain.layers[0].path
    data = bytearray(Path(path).read_bytes())
    start = data.index(b"\x28\xb5\x2f\xfd")  # the first zstd frame
    data[start : start + 4] = b"\0\0\0\0"
    Path(path).write_bytes(data)
    read, damaged = verify(chain, 0)
    assert read == size
    assert [reason for _, reason in damaged] == ["Input/output error"]


def test_contents_that_reach_beyond_the_layer(folder: str) -> None:
    chain = history(folder, 1, MIB)
    reads = [check.Read(0, MIB, 65536, bytes(32), ()), check.Read(0, 0, 1 << 60, bytes(32), ())]
    damaged: List[int] = []
    with server.layers([chain.layers[0].path], folder) as sources:
        check.check(
            "vda",
            sources,
            iter(reads),
            None,
            lanes.Options(),
            damaged=lambda read, _why: damaged.append(read.length),
            progress=nothing,
            stop=nothing,
        )
    assert damaged == [65536, 1 << 60]


def test_damaged_may_raise(folder: str) -> None:
    chain = history(folder, 1, MIB)

    class Refused(Exception):
        pass

    def refuse(*_: Any) -> None:
        raise Refused

    chain.layers[0].contents["digest"][0] = 1
    with pytest.raises(Refused):
        chain.restore(0, damaged=refuse)


def test_a_full_disk_under_the_output(folder: str) -> None:
    chain = history(folder, 1, MIB)
    with server.layers([chain.layers[0].path], folder) as sources, open("/dev/full", "wb") as full:
        with pytest.raises(errors.OutputFailed, match="No space"):
            check.check(
                "vda",
                sources,
                chain.reads(0),
                check.Output("/x/vda.raw", fd=full.fileno()),
                lanes.Options(),
                damaged=nothing,
                progress=nothing,
                stop=nothing,
            )


def test_a_killed_output(folder: str) -> None:
    chain, path = history(folder, 1, 8 * MIB), f"{folder}/out.sock"
    with served(["nbdkit", "-f", "-U", path, "memory", "size=8M"], path) as process:
        with server.layers([chain.layers[0].path], folder) as sources, pytest.raises(errors.OutputFailed):
            check.check(
                "vda",
                sources,
                chain.reads(0),
                check.Output("/x/vda.qcow2", endpoint=server.Endpoint(path, "")),
                lanes.Options(requests=1),
                damaged=nothing,
                progress=lambda *_: process.kill(),
                stop=nothing,
            )
