"""What the writer hands to targets that want an order or hold old data; and QEMU's lock, which says who has an image."""

from __future__ import annotations

import os
import random
import subprocess
from typing import Dict, List, Tuple

import pytest

from libvirt_cbt import errors, extents
from libvirt_cbt.actions import writing
from libvirt_cbt.nbdio import check, imagelock, targets
from libvirt_cbt.repository import plan
from tests.nbd.conftest import MIB, nothing, run, served

GRAIN = extents.GRAIN


def random_runs(rng: random.Random, grains: int) -> Tuple[List[plan.Run], Dict[int, int]]:
    """Runs as plan.restore yields them, and which run owns each grain of the disk."""
    owner: Dict[int, int] = {}
    runs: List[plan.Run] = []
    at = 0
    while at < grains:
        length = rng.randrange(1, 17)
        for grain in range(at, min(at + length, grains)):
            if rng.random() < 0.6:
                owner[grain] = len(runs)
        runs.append(plan.Run(0, at * GRAIN, length * GRAIN, bytes(32), ()))
        at += rng.randrange(1, length + 1)
    found = []
    for number, run_ in enumerate(runs):
        keep = tuple((g * GRAIN, GRAIN) for g, who in sorted(owner.items()) if who == number)
        if keep:
            found.append(plan.Run(number, run_.offset, run_.length, run_.digest, keep))
    return sorted(found, key=lambda r: r.keep[0][0]), owner


def test_pieces_come_in_order_each_once_and_the_gaps_between_them(rng: random.Random) -> None:
    for _ in range(50):
        grains = rng.randrange(1, 3000)
        runs, owner = random_runs(rng, grains)
        ordered = [(r.keep[0][0] // GRAIN, r.layer) for r in writing._in_order(iter(runs))]
        assert ordered == sorted(owner.items())
        at = 0
        for piece in writing._with_gaps(iter(runs), grains * GRAIN - 512):
            [(offset, length)] = piece.keep
            if piece.layer == check.ZEROES:
                assert offset == at
                assert not any(g in owner for g in range(offset // GRAIN, (offset + length) // GRAIN))
            at = offset + length
        assert at == grains * GRAIN - (0 if grains - 1 in owner else 512)


def test_a_stream_fills_what_was_not_written() -> None:
    read, write = os.pipe()
    flow = targets.Stream(write, nothing)
    flow.put(b"abc", 10)
    flow.put(b"d", 13)
    flow.fill(20)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == bytes(10) + b"abcd" + bytes(6)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_an_image_that_is_open_is_seen_and_one_that_we_hold_stays_shut(folder: str, fmt: str) -> None:
    path, socket = f"{folder}/image", f"{folder}/s"
    run("qemu-img", "create", "-q", "-f", fmt, path, str(MIB))
    for mode in ([], ["--read-only"]):
        with served(["qemu-nbd", "--persistent", *mode, f"--format={fmt}", f"--socket={socket}", path], socket):
            with pytest.raises(errors.TargetInUse), imagelock.held(path):
                pass
    with imagelock.held(path):
        for argv in (["qemu-io", "-f", fmt, "-c", "write 0 512", path], ["qemu-img", "resize", "-f", fmt, path, "2M"]):
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            assert done.returncode and "lock" in done.stderr
        with pytest.raises(errors.TargetInUse), imagelock.held(path):
            pass
    run("qemu-io", "-f", fmt, "-c", "write 0 512", path)
