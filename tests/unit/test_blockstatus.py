"""Block status against a model of one flag per unit of the disk."""

from __future__ import annotations

import random
from typing import List, Tuple

import numpy as np
import numpy.typing as npt
import pytest

from libvirt_cbt import extents
from libvirt_cbt.nbdio import blockstatus
from libvirt_cbt.nbdio.blockstatus import DIRTY, HOLE, ZERO, Status

CELL = extents.STATE_GRAIN
Flags = npt.NDArray[np.bool_]


def pieces(status: Status) -> List[Tuple[int, int, bool, bool]]:
    columns = (status.start, status.end, status.zero, status.dirty)
    return [(int(a), int(b), bool(z), bool(d)) for a, b, z, d in zip(*columns)]


def test_contexts_of_different_lengths_are_cut_at_the_shorter() -> None:
    """Trap A, drawn in blockstatus.py."""
    found = blockstatus.merge(1000, 900, [100, 0, 200, HOLE | ZERO], [150, DIRTY, 750, 0])
    assert pieces(found) == [(1000, 1100, False, True), (1100, 1150, True, True), (1150, 1300, True, False)]
    found = blockstatus.merge(1000, 900, [100, 0, 800, HOLE | ZERO], [150, DIRTY])
    assert pieces(found) == [(1000, 1100, False, True), (1100, 1150, True, True)]


def test_a_reply_longer_than_asked_is_cut() -> None:
    found = blockstatus.merge(0, 100, [80, 0, 1 << 31, ZERO], [1 << 31, DIRTY])
    assert pieces(found) == [(0, 80, False, True), (80, 100, True, True)]


def test_lengths_that_would_wrap_around_are_cut() -> None:
    found = blockstatus.merge(0, 100, [(1 << 64) - 1, 0, (1 << 64) - 1, 0], [50, DIRTY, (1 << 64) - 40, 0])
    assert pieces(found) == [(0, 50, False, True), (50, 100, False, False)]


def test_empty_extents_say_nothing() -> None:
    found = blockstatus.merge(0, 100, [0, ZERO, 60, 0, 0, ZERO, 40, ZERO], [0, 0, 100, DIRTY])
    assert pieces(found) == [(0, 60, False, True), (60, 100, True, True)]


@pytest.mark.parametrize("allocation", [[], [0, 0], [0, ZERO, 0, 0]])
def test_no_progress_is_seen(allocation: List[int]) -> None:
    """The caller refuses it; also a context that the server agreed to and then left out of its reply."""
    assert not len(blockstatus.merge(0, 100, allocation, [100, DIRTY]).end)


def test_without_allocation_all_is_data() -> None:
    found = blockstatus.merge(0, 100, None, [40, 0, 60, DIRTY])
    assert pieces(found) == [(0, 40, False, False), (40, 100, False, True)]
    assert pieces(blockstatus.merge(5, 100, None, None)) == [(5, 105, False, True)]


def test_without_bitmap_all_but_zero_is_dirty() -> None:
    found = blockstatus.merge(0, 100, [40, 0, 60, HOLE | ZERO], None)
    assert pieces(found) == [(0, 40, False, True), (40, 100, True, False)]


def test_a_hole_that_is_not_zero_is_read() -> None:
    assert pieces(blockstatus.merge(0, 100, [100, HOLE], [100, DIRTY])) == [(0, 100, False, True)]


def test_cut_and_join() -> None:
    whole = blockstatus.merge(0, 100, [30, 0, 40, ZERO, 30, 0], [50, DIRTY, 50, 0])
    for at in range(101):
        left, right = whole.cut(at)
        assert all(end <= at for _, end, _, _ in pieces(left))
        assert all(start >= at for start, _, _, _ in pieces(right))
        assert per_byte(blockstatus.join([left, right]), 100) == per_byte(whole, 100)


def per_byte(status: Status, size: int) -> List[Tuple[bool, bool]]:
    out = [(False, False)] * size
    for start, end, zero, dirty in pieces(status):
        out[start:end] = [(zero, dirty)] * (end - start)
    return out


def test_zero_needs_whole_cells_without_data() -> None:
    """The guest zeroed the second half of a cell whose first half is clean data: "zero" would wipe that out."""
    found = blockstatus.merge(0, 4 * CELL, [2048, 0, 4 * CELL, ZERO], [2048, 0, 2 * CELL, DIRTY, 4 * CELL, 0])
    assert blockstatus.delta(found).tolist() == [
        (2048, CELL - 2048, extents.DATA),
        (CELL, CELL + 2048, extents.ZERO),
    ]


def test_nothing_dirty_is_an_empty_delta() -> None:
    assert not len(blockstatus.delta(blockstatus.merge(0, 100, [100, 0], [100, 0])))


@pytest.mark.fault(30)
@pytest.mark.parametrize("unit", [1, 512, 4096])
def test_random_replies(rng: random.Random, unit: int) -> None:
    """A disk asked for in random steps and answered in random lengths; then its delta."""
    for _ in range(40):
        units = rng.randrange(1, 20000 if unit == 1 else 400)
        zero, dirty = flags(rng, units), flags(rng, units)
        position, parts = 0, []
        while position < units:
            length = rng.randrange(1, units - position + 1)
            parts.append(
                blockstatus.merge(
                    position * unit,
                    length * unit,
                    reply(rng, zero[position:], ZERO, unit),
                    reply(rng, dirty[position:], DIRTY, unit),
                )
            )
            position = int(parts[-1].end[-1]) // unit
        whole = blockstatus.join(parts)
        assert int(whole.start[0]) == 0
        assert (whole.start[1:] == whole.end[:-1]).all()
        judge(blockstatus.delta(whole), np.repeat(zero, unit), np.repeat(dirty, unit))


def flags(rng: random.Random, units: int) -> Flags:
    out = np.zeros(units, np.bool_)
    for _ in range(rng.randrange(20)):
        start = rng.randrange(units)
        out[start : start + rng.randrange(1, max(2, units // 3))] = rng.random() < 0.6
    return out


def reply(rng: random.Random, wanted: Flags, flag: int, unit: int) -> List[int]:
    """A legal answer: at least one extent, shorter or longer than asked, neighbours not always joined."""
    flat: List[int] = []
    position, end = 0, rng.randrange(1, len(wanted) + 1)
    for change in [*(np.flatnonzero(np.diff(wanted[:end])) + 1).tolist(), end]:
        while position < change:
            stop = change if rng.random() < 0.7 else rng.randrange(position + 1, change + 1)
            flat += [(stop - position) * unit, flag if wanted[position] else 0]
            position = stop
    return flat


def judge(delta: extents.Extents, zero: Flags, dirty: Flags) -> None:
    size = len(zero)
    assert extents.check(delta, size) == ""
    assert len(extents.coalesce(delta)) == len(delta)
    state = np.zeros(size, np.uint8)
    for offset, length, value in delta.tolist():
        state[offset : offset + length] = value
    assert ((state != 0) == dirty).all(), "exactly the dirty bytes"
    empty_cells = np.append(zero, np.ones(-size % CELL, np.bool_)).reshape(-1, CELL).all(axis=1)
    empty = np.repeat(empty_cells, CELL)[:size]
    assert (state[dirty & empty] == extents.ZERO).all()
    assert (state[dirty & ~empty] == extents.DATA).all()
