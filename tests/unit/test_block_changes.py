"""Block status of an increment, against a model: whatever order and length the answers have, no change is missed."""

from __future__ import annotations

import errno
import random
from typing import Any, Callable, Dict, List, Optional, Tuple, cast

import numpy as np
import pytest

from libvirt_cbt import errors, extents
from libvirt_cbt.nbdio import blockstatus, changes, source
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.nbdio.server import Endpoint

SECTOR = 512
IN_GRAIN = extents.GRAIN // SECTOR
WINDOW = 4 * extents.GRAIN
BITMAP = "qemu:dirty-bitmap:b"

Told = Callable[[int, Dict[str, List[int]]], None]


class Model(source.Source):
    """A source that answers when told to, in any order, and as little at once as it likes."""

    def __init__(self, dirty: np.ndarray[Any, Any], zero: np.ndarray[Any, Any], rng: Optional[random.Random]) -> None:
        super().__init__("vda", Endpoint("/nowhere", "vda"), len(dirty) * SECTOR, BITMAP, Options(), bool, apart=True)
        self.contexts = frozenset((blockstatus.ALLOCATION, BITMAP))
        self.window = WINDOW
        self.flags = {BITMAP: dirty.astype(int), blockstatus.ALLOCATION: zero * 3}
        self.rng = rng
        self.waiting: List[Tuple[str, int, int, Told]] = []
        self.asked: List[Tuple[str, int, int]] = []
        self.most = 0

    def marks(self, length: int, offset: int, done: Told) -> None:
        self._wait(BITMAP, length, offset, done)

    def block_status(self, length: int, offset: int, done: Told) -> None:
        self._wait(blockstatus.ALLOCATION, length, offset, done)

    def _wait(self, context: str, length: int, offset: int, done: Told) -> None:
        assert offset % SECTOR == 0 and length > 0 and offset + length <= cast(int, self.size)
        self.waiting.append((context, length, offset, done))
        self.asked.append((context, length, offset))
        self.most = max(self.most, len(self.waiting))

    def answer(self) -> None:
        number = self.rng.randrange(len(self.waiting)) if self.rng else 0
        context, length, offset, done = self.waiting.pop(number)
        flags = self.flags[context][offset // SECTOR : (offset + length) // SECTOR]
        if self.rng:
            flags = flags[: self.rng.choice((1, self.rng.randrange(1, len(flags) + 1), len(flags)))]
        edges = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
        done(0, {context: [x for a, b in zip(edges, edges[1:]) for x in ((b - a) * SECTOR, int(flags[a]))]})


def never(*_: Any) -> None:
    raise AssertionError


def clusters(rng: random.Random, sectors: int, share: float) -> np.ndarray[Any, Any]:
    """Runs of sectors of all lengths, some of which are set."""
    found: List[bool] = []
    while len(found) < sectors:
        found += [rng.random() < share] * rng.choice((1, 3, 8, IN_GRAIN, rng.randrange(1, 6 * IN_GRAIN)))
    return np.array(found[:sectors])


def through(model: Model, **more: Any) -> List[Tuple[blockstatus.Status, extents.Extents]]:
    found: List[Tuple[blockstatus.Status, extents.Extents]] = []
    one = changes.Changes(model, lambda status, also: found.append((status, also)), never, **more)
    while not one.done:
        one.ask()
        if model.waiting:
            model.answer()
    assert not model.waiting
    return found


def as_extents(sectors: np.ndarray[Any, Any]) -> extents.Extents:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], sectors.astype(int), [0]))))
    return extents.make(edges[::2] * SECTOR, (edges[1::2] - edges[::2]) * SECTOR, extents.DATA)


@pytest.mark.parametrize("round_", range(40))
def test_every_change_and_what_of_it_is_zero(rng: random.Random, round_: int) -> None:
    sectors = rng.randrange(1, 40 * IN_GRAIN)
    dirty, extra, also = (clusters(rng, sectors, rng.choice((0, 0.02, 0.5))) for _ in range(3))
    zero = clusters(rng, sectors, 0.5)
    more = {}
    if round_ % 2:
        more = {
            "extra": lambda low, high: extents.clip(as_extents(extra), low, high),
            "also": lambda low, high: extents.clip(as_extents(also), low, high),
        }
    else:
        extra[:], also[:] = False, False
    model = Model(dirty, zero, rng)
    seen, last = np.zeros(sectors, bool), 0
    for status, others in through(model, **more):
        assert int(status.start[0]) >= last, "in order"
        assert (status.start[1:] == status.end[:-1]).all() and (status.start < status.end).all(), "without gaps"
        last = int(status.end[-1])
        low, high = int(status.start[0]) // SECTOR, last // SECTOR
        assert low % IN_GRAIN == 0 and (high % IN_GRAIN == 0 or high == sectors), "whole grains"
        lengths = ((status.end - status.start) // np.uint64(SECTOR)).astype(int)
        assert (np.repeat(status.dirty, lengths) == (dirty | extra)[low:high]).all()
        assert (np.repeat(status.zero, lengths) == zero[low:high]).all()
        wanted = also.copy()
        wanted[:low], wanted[high:] = False, False
        assert (extents.clip(others, low * SECTOR, last) == as_extents(wanted)).all()
        seen[low:high] = True
    assert seen[dirty | extra | also].all(), "nothing is missed"
    assert model.most <= changes.DEPTH + 1


def test_of_a_clean_disk_the_bitmap_alone_is_asked_and_many_windows_at_once() -> None:
    sectors = 100 * 4 * IN_GRAIN
    dirty = np.zeros(sectors, bool)
    model = Model(dirty, ~dirty, None)
    assert through(model) == []
    assert {context for context, *_ in model.asked} == {BITMAP}
    assert len(model.asked) == 100
    assert model.most == changes.DEPTH


def test_what_is_allocated_is_asked_of_the_grains_that_changed() -> None:
    dirty = np.zeros(100 * 4 * IN_GRAIN, bool)
    dirty[[7 * IN_GRAIN + 5, 50 * 4 * IN_GRAIN + 3, 50 * 4 * IN_GRAIN + 2 * IN_GRAIN]] = True
    model = Model(dirty, ~dirty, None)
    assert len(through(model)) == 2
    looked = sorted((offset, length) for context, length, offset in model.asked if context == blockstatus.ALLOCATION)
    assert looked == [(7 * extents.GRAIN, extents.GRAIN), (200 * extents.GRAIN, 3 * extents.GRAIN)]


def test_after_a_long_answer_there_is_no_second_one_to_keep() -> None:
    """Each of them may hold 131072 extents of each context."""
    dirty = np.arange(40 * 4 * IN_GRAIN) % 2 == 0
    model = Model(dirty, dirty, None)
    through(model)
    assert model.most <= 2  # one of the bitmap, one of what is allocated


def test_longer_windows_where_the_protocol_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "WINDOW", WINDOW)
    dirty = np.zeros(64 * IN_GRAIN, bool)
    model = Model(dirty, dirty, None)
    model.window = 32 * extents.GRAIN
    through(model)
    assert [length for _, length, _ in model.asked] == [32 * extents.GRAIN] * 2
    model.asked.clear()
    through(model, also=lambda _low, _high: extents.empty())  # united by the cell, in memory
    assert {length for _, length, _ in model.asked} == {WINDOW}


@pytest.mark.parametrize("context", [BITMAP, blockstatus.ALLOCATION])
def test_an_answer_without_progress_is_an_error(monkeypatch: pytest.MonkeyPatch, context: str) -> None:
    dirty = np.ones(IN_GRAIN, bool)
    model = Model(dirty, ~dirty, None)
    answers = {BITMAP: [extents.GRAIN, 1], context: []}
    monkeypatch.setattr(Model, "answer", lambda self: self.waiting.pop()[3](0, answers))
    with pytest.raises(errors.NbdError, match="no progress at offset 0"):
        through(model)


def test_a_request_that_fails_is_told_of() -> None:
    dirty = np.ones(IN_GRAIN, bool)
    model = Model(dirty, ~dirty, None)

    def failed(offset: int, length: int, error: int) -> None:
        raise OSError(error, f"{offset} {length}")

    one = changes.Changes(model, never, failed)
    one.ask()
    with pytest.raises(OSError, match=f"0 {extents.GRAIN}"):
        model.waiting.pop()[3](errno.EIO, {})
