"""What is stored as it is, and what goes through the compressor."""

from __future__ import annotations

import os
import random
import zlib

import pytest

from libvirt_cbt import extents
from libvirt_cbt.nbdio import density

GRAIN = extents.GRAIN


def words(rng: random.Random, size: int) -> bytes:
    vocabulary = [bytes(rng.choices(b"etaoinshrdlu", k=rng.randrange(2, 10))) + b" " for _ in range(500)]
    return b"".join(rng.choices(vocabulary, k=size // 2))[:size]


def code(size: int) -> bytes:
    with open(os.path.realpath("/proc/self/exe"), "rb") as file:
        file.seek(1 << 20)
        return file.read(size)


@pytest.mark.parametrize("grains", [1, 4])
def test_random_and_compressed_bytes_are_dense(grains: int, rng: random.Random) -> None:
    for _ in range(20):
        assert density.dense(bytearray(rng.randbytes(grains * GRAIN)))
    archive = zlib.compress(words(rng, 12 * grains * GRAIN))
    assert density.dense(memoryview(archive)[: grains * GRAIN])


@pytest.mark.parametrize("grains", [1, 4])
def test_all_that_compresses_is_not(grains: int, rng: random.Random) -> None:
    size = grains * GRAIN
    for data in (
        bytes(size),
        b"\xff" * size,
        bytes(range(256)) * (size // 256),
        words(rng, size),
        code(size),
        rng.randbytes(512) * (size // 512),
        bytes(rng.choices(range(128), k=size)),
    ):
        assert not density.dense(bytearray(data))


def test_one_grain_that_compresses_is_enough(rng: random.Random) -> None:
    for place in range(4):
        data = bytearray(rng.randbytes(4 * GRAIN))
        data[place * GRAIN : (place + 1) * GRAIN] = words(rng, GRAIN)
        assert not density.dense(data)
