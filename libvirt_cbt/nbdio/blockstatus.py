"""Answers of NBD_CMD_BLOCK_STATUS made into arrays.

A reply has a list of (length, flags) per meta context:

    base:allocation     |--data--|------hole,zero------|--data--|
    qemu:dirty-bitmap   |------dirty------|--clean--|              <- ends earlier: fragmented images do that

What counts is the common part: the lists are cut at the end of the shortest
(peers that trust the first list lose data), and at the end of what was asked.
https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, List, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from libvirt_cbt import extents

HOLE: Final = 1
ZERO: Final = 2
DIRTY: Final = 1
ALLOCATION: Final = "base:allocation"

U64 = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Status:
    """Pieces [start, end) of a disk in order and without gaps, each zero or not and dirty or not."""

    start: U64
    end: U64
    zero: Flags
    dirty: Flags

    def cut(self, at: int) -> Tuple[Status, Status]:
        """The pieces before byte `at` of the disk and those behind it."""
        below = int(np.searchsorted(self.start, at, side="left"))
        above = int(np.searchsorted(self.end, at, side="right"))
        left = Status(self.start[:below], np.minimum(self.end[:below], at), self.zero[:below], self.dirty[:below])
        right = Status(np.maximum(self.start[above:], at), self.end[above:], self.zero[above:], self.dirty[above:])
        return left, right


def join(parts: Sequence[Status]) -> Status:
    return Status(
        np.concatenate([p.start for p in parts]),
        np.concatenate([p.end for p in parts]),
        np.concatenate([p.zero for p in parts]),
        np.concatenate([p.dirty for p in parts]),
    )


def merge(offset: int, length: int, allocation: Sequence[int] | None, dirty: Sequence[int] | None) -> Status:
    """One reply from `offset`, as flat lists (length, flags, ...); at most `length` bytes of it count.

    `allocation` None: the server does not tell, all is data.  `dirty` None: no bitmap was asked for, all that is not
    zero counts as dirty.  An empty Status means that the server made no progress.
    """
    known = [x for x in (allocation, dirty) if x is not None]
    if known and all(len(x) == 2 and x[0] >= length for x in known):
        # The usual answer of a large disk with few changes: one piece.
        zero = allocation is not None and bool(allocation[1] & ZERO)
        return piece(offset, length, zero=zero, dirty=not zero if dirty is None else bool(dirty[1] & DIRTY))
    lists = [_column(x, length) for x in known]
    if not lists:
        lists = [(np.array([length], np.uint64), np.array([0], np.uint64))]
    reach = min([length, *(int(ends[-1]) if len(ends) else 0 for ends, _ in lists)])
    edges = np.sort(np.concatenate([np.minimum(ends, reach) for ends, _ in lists]), kind="stable")
    edges = edges[np.append(True, edges[1:] != edges[:-1])[: len(edges)] & (edges > 0)]
    starts = np.append(np.zeros(1, np.uint64), edges[:-1]) if len(edges) else edges
    empty = np.zeros(len(edges), np.bool_)
    if allocation is not None:
        empty = _flags(lists[0], starts) & ZERO != 0
    marked = ~empty if dirty is None else _flags(lists[-1], starts) & DIRTY != 0
    base = np.uint64(offset)
    return Status(starts + base, edges + base, empty, marked)


def piece(offset: int, length: int, *, zero: bool, dirty: bool) -> Status:
    low, high = np.array([[offset], [offset + length]], np.uint64)
    return Status(low, high, np.array([zero]), np.array([dirty]))


def mark(status: Status, extra: extents.Extents) -> Status:
    """The same pieces, and those bytes of them that `extra` (ordered, any state) covers are dirty, too."""
    if not len(extra) or not len(status.end):
        return status
    inside = extents.clip(extra, int(status.start[0]), int(status.end[-1]))
    added = np.stack((inside["offset"], extents.ends(inside)), axis=1).ravel()
    edges = np.unique(np.concatenate((status.start, status.end[-1:], added)))
    start = edges[:-1]
    piece = np.searchsorted(status.start, start, side="right") - 1
    return Status(start, edges[1:], status.zero[piece], status.dirty[piece] | _within(added, start))


def united(marks: Status, allocation: Sequence[Status]) -> Status:
    """What is dirty by `marks`, and zero by `allocation`, which are parts of the same stretch, in order (none: no zero)."""
    if not allocation:
        return marks
    known = join(allocation)
    edges = np.sort(np.concatenate((marks.end, known.end)), kind="stable")
    edges = edges[np.append(True, edges[1:] != edges[:-1])]
    start = np.concatenate((marks.start[:1], edges[:-1]))
    zero = known.zero[np.searchsorted(known.end, start, side="right")]
    return Status(start, edges, zero, marks.dirty[np.searchsorted(marks.end, start, side="right")])


def delta(status: Status) -> extents.Extents:
    """D(j) of one window: exactly the dirty bytes, and "zero" only where whole cells of 4 KiB are.

    A cell is data when any byte of it is, dirty or not: the bitmap may be finer than the cell.
    """
    if not status.dirty.any():
        return extents.empty()
    dirty = np.stack((status.start[status.dirty], status.end[status.dirty]), axis=1).ravel()
    return _states(dirty, _cells(status.start[~status.zero], status.end[~status.zero], extents.STATE_GRAIN))


def to_copy(status: Status, touched: Stretches | None, capacity: int) -> extents.Extents:
    """The whole grains to store: of `touched` data and zero, of everything (None) data.  The disk's last one is cut.

    A grain is data when any byte of it is.  Worked out on edges: the work follows the pieces, not the size of the disk.
    """
    filled = _cells(status.start[~status.zero], status.end[~status.zero], extents.GRAIN)
    if touched is None:
        found = extents.make(filled[::2], filled[1::2] - filled[::2], extents.DATA)
    else:
        found = _states(_cells(touched.start, touched.end, extents.GRAIN), filled)
    if len(found):
        found["length"][-1] = min(int(found["length"][-1]), capacity - int(found["offset"][-1]))
    return found


def _states(touched: U64, filled: U64) -> extents.Extents:
    """What lies between the edges of `touched`, data where it lies between those of `filled`, too, and zero elsewhere."""
    if not len(touched):
        return extents.empty()
    edges = np.sort(np.concatenate((touched, filled)), kind="stable")  # two sorted lists: the stable sort merges them
    begin, length = edges[:-1], np.diff(edges)
    inside = _within(touched, begin) & (length > 0)
    state = np.where(_within(filled, begin), extents.DATA, extents.ZERO)
    return extents.coalesce(extents.make(begin[inside], length[inside], state[inside]))


@dataclass(frozen=True)
class Stretches:
    """Bytes [start, end) in order, apart from each other."""

    start: U64
    end: U64

    @property
    def total(self) -> int:
        return int((self.end - self.start).sum())

    def inside(self, low: int, high: int) -> List[Tuple[int, int]]:
        """Those that touch [low, high), cut to it."""
        first = int(np.searchsorted(self.end, np.uint64(low), side="right"))
        last = int(np.searchsorted(self.start, np.uint64(high), side="left"))
        pairs = zip(self.start[first:last].tolist(), self.end[first:last].tolist())
        return [(max(a, low), min(b, high)) for a, b in pairs]

    def whole_grains(self, low: int, capacity: int) -> extents.Extents:
        """The grains from `low` on that lie inside one stretch; a disk's last one may be short."""
        start = -((low - self.start.astype(np.int64)) // extents.GRAIN)
        end = self.end.astype(np.int64)
        stop = np.where(end == capacity, -((low - end) // extents.GRAIN), (end - low) // extents.GRAIN)
        some = stop > start
        first, last = start[some] * extents.GRAIN, stop[some] * extents.GRAIN
        return extents.make(first + low, last - first, extents.DATA)


def covered(status: Status | None, also: extents.Extents) -> Stretches:
    """What is dirty in `status` (None: nothing), or in the extents of `also`, joined, to the byte."""
    start, end = also["offset"], extents.ends(also)
    if status is not None:
        start = np.concatenate((status.start[status.dirty], start))
        end = np.concatenate((status.end[status.dirty], end))
    order = np.argsort(start, kind="stable")
    start, end = start[order], np.maximum.accumulate(end[order])
    apart = np.append(True, start[1:] > end[:-1])[: len(start)]
    return Stretches(start[apart], end[np.append(apart[1:], True)[: len(start)]])


def _cells(start: U64, end: U64, grain: int) -> U64:
    """The edges (start, end, start, ...) of ordered pieces grown to whole cells."""
    if not len(start):
        return start
    step = np.uint64(grain)
    low, high = start // step * step, (end + step - np.uint64(1)) // step * step
    apart = low[1:] > high[:-1]
    edges: U64 = np.stack((low[np.append(True, apart)], high[np.append(apart, True)]), axis=1).ravel()
    return edges


def _within(edges: U64, at: U64) -> Flags:
    found: Flags = np.searchsorted(edges, at, side="right") % 2 == 1
    return found


def _column(flat: Sequence[int], limit: int) -> Tuple[U64, U64]:
    table = np.array(flat, dtype=np.uint64)[: len(flat) // 2 * 2].reshape(-1, 2)
    # Cut before the sum is formed: extended headers carry lengths of 64 bits, which could wrap around.
    return np.cumsum(np.minimum(table[:, 0], np.uint64(limit)), dtype=np.uint64), table[:, 1]


def _flags(column: Tuple[U64, U64], starts: U64) -> U64:
    ends, flags = column
    found: U64 = flags[np.searchsorted(ends, starts, side="right")]
    return found
