"""Runs of a disk as numpy arrays: what a delta and a layer's contents are made of.

An array of EXTENT is ordered by offset and disjoint.  Offsets and lengths are
bytes.  DATA means "read it", ZERO means "reads as zeroes and was written so".
Nothing here knows where extents come from or where they are kept.
"""

from __future__ import annotations

from typing import Any, Dict, Final, Iterator, Sequence, Tuple

import numpy as np
import numpy.typing as npt

DATA: Final = 1
ZERO: Final = 2
STATES: Final[Dict[int, str]] = {DATA: "data", ZERO: "zero"}

EXTENT: Final = np.dtype([("offset", "<u8"), ("length", "<u8"), ("state", "u1")])
CONTENT: Final = np.dtype([("offset", "<u8"), ("length", "<u8"), ("state", "u1"), ("digest", "u1", (32,))])

GRAIN: Final = 65536  # layers are written in whole grains: facts of the qcow2 compress filter
STATE_GRAIN: Final = 4096  # finer changes of state inside a dirty run are rounded to data

Extents = npt.NDArray[np.void]
Mask = npt.NDArray[np.bool_]


def empty() -> Extents:
    return np.empty(0, EXTENT)


def make(offsets: Any, lengths: Any, states: Any) -> Extents:
    """An EXTENT array from three columns; a scalar state is spread over all rows."""
    out = np.empty(len(offsets), EXTENT)
    out["offset"], out["length"], out["state"] = offsets, lengths, states
    return out


def total(extents: Extents, state: int = 0) -> int:
    """Bytes in all extents, or in those of one state."""
    lengths = extents["length"] if not state else extents["length"][extents["state"] == state]
    return int(lengths.sum())


def ends(extents: Extents) -> npt.NDArray[np.uint64]:
    out: npt.NDArray[np.uint64] = extents["offset"] + extents["length"]
    return out


def check(extents: Extents, capacity: int) -> str:
    """Why an array that came from outside is no list of extents, or an empty string."""
    if not len(extents):
        return ""
    # Compared before the sum is formed, so that a hostile length cannot wrap around.
    if (extents["length"] > capacity).any() or (extents["offset"] > capacity).any():
        return "an extent lies beyond the disk"
    stop = ends(extents)
    if (extents["length"] == 0).any():
        return "an extent is empty"
    if int(stop[-1]) > capacity:
        return "an extent lies beyond the disk"
    if (extents["offset"][1:] < stop[:-1]).any():
        return "extents overlap or are out of order"
    if not np.isin(extents["state"], (DATA, ZERO)).all():
        return "an extent has an unknown state"
    return ""


def clip(extents: Extents, low: int, high: int) -> Extents:
    """The part of ordered extents inside [low, high)."""
    if low >= high:
        return extents[:0].copy()
    # As uint64: a Python int makes searchsorted compare as float64, which is slower and wrong beyond 2**53.
    first = int(np.searchsorted(ends(extents), np.uint64(low), side="right"))
    last = int(np.searchsorted(extents["offset"], np.uint64(high), side="left"))
    part = extents[first:last].copy()
    if len(part):
        stop = np.minimum(ends(part), high)
        part["offset"] = np.maximum(part["offset"], low)
        part["length"] = stop - part["offset"]
    return part


def coalesce(extents: Extents) -> Extents:
    """Joins neighbours of one state."""
    if len(extents) < 2:
        return extents
    breaks = np.empty(len(extents), np.bool_)
    breaks[0] = True
    np.not_equal(ends(extents)[:-1], extents["offset"][1:], out=breaks[1:])
    breaks[1:] |= extents["state"][1:] != extents["state"][:-1]
    starts = np.flatnonzero(breaks)
    if len(starts) == len(extents):
        return extents
    last = np.append(starts[1:], len(extents)) - 1
    offsets = extents["offset"][starts]
    return make(offsets, ends(extents)[last] - offsets, extents["state"][starts])


def round_outward(extents: Extents, grain: int, capacity: int) -> Extents:
    """Grows every extent to whole grains (the last one ends with the disk); a grain that holds any data is data."""
    if not len(extents):
        return extents
    cells = Cells(int(extents["offset"][0]) // grain * grain, int(ends(extents)[-1]), grain)
    cells.paint(extents[extents["state"] == ZERO], ZERO)
    cells.paint(extents[extents["state"] == DATA], DATA)
    return cells.extents(capacity)


class Cells:
    """A window of a disk as one byte per cell of `grain` bytes: the cheap way to unite many lists of extents."""

    def __init__(self, low: int, high: int, grain: int, start: int = 0) -> None:
        if low % grain:
            raise ValueError("a window begins on a grain")
        self.start = max(low, start)  # where the window really begins, inside the first cell
        self.low, self.high, self.grain = low, high, grain
        self.values: npt.NDArray[np.int32] = np.zeros(-(-(high - low) // grain), np.int32)

    def spans(self, extents: Extents) -> Tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """First cell and the cell after the last of every extent, rounded outward; extents lie in the window."""
        first = (extents["offset"].astype(np.int64) - self.low) // self.grain
        last = -((self.low - ends(extents).astype(np.int64)) // self.grain)
        return first, last

    def paint(self, extents: Extents, value: Any) -> None:
        """Sets every cell that an extent touches; `value` is one number or one for each extent."""
        if not len(extents):
            return
        first, last = self.spans(extents)
        self._fill(first, last, value)

    def _fill(self, first: npt.NDArray[np.int64], last: npt.NDArray[np.int64], value: Any) -> None:
        if not len(first):
            return
        counts = last - first
        if (counts == 1).all():
            self.values[first] = value
            return
        where = np.repeat(first - np.append(0, np.cumsum(counts)[:-1]), counts) + np.arange(int(counts.sum()))
        self.values[where] = np.repeat(value, counts) if np.ndim(value) else value

    def paint_over(self, extents: Extents) -> None:
        """Paints the states of a newer list; a zero that covers a cell in part does not hide older data in it."""
        zero = extents[extents["state"] == ZERO]
        if len(zero):
            first, last = self.spans(zero)
            # An extent that was cut by the window, or ends with the disk, covers its last cell as far as there is one.
            low, high = zero["offset"].astype(np.int64), ends(zero).astype(np.int64)
            inner_first = np.where(low > np.maximum(self.low + first * self.grain, self.start), first + 1, first)
            inner_last = np.where(high < np.minimum(self.low + last * self.grain, self.high), last - 1, last)
            edges = np.concatenate((first[inner_first > first], last[inner_last < last] - 1))
            self.values[edges[self.values[edges] == 0]] = ZERO
            whole = inner_last > inner_first
            self._fill(inner_first[whole], inner_last[whole], ZERO)
        self.paint(extents[extents["state"] == DATA], DATA)

    def runs(self) -> Iterator[Tuple[int, int, int]]:
        """(first cell, cell after the last, value) of every run of equal non-zero cells."""
        first, last, values = self.run_arrays()
        return zip(first.tolist(), last.tolist(), values.tolist())

    def run_arrays(self) -> Tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        edges = np.flatnonzero(np.diff(self.values)) + 1
        first = np.append(0, edges)
        last = np.append(edges, len(self.values))
        keep = self.values[first] != 0 if len(self.values) else np.zeros(1, np.bool_)
        return first[keep], last[keep], self.values[first[keep]]

    def extents(self, capacity: int) -> Extents:
        """The painted cells as extents whose state is the cell's value, cut at the disk's end."""
        first, last, values = self.run_arrays()
        offsets = first * self.grain + self.low
        return make(offsets, np.minimum(last * self.grain + self.low, capacity) - offsets, values)


def split(extents: Extents, size: int) -> Extents:
    """Cuts data extents into pieces of at most `size` bytes; zero extents stay as long as they are."""
    pieces = np.where(extents["state"] == DATA, -(-extents["length"].astype(np.int64) // size), 1)
    if not len(extents) or (pieces == 1).all():
        return extents
    row = np.repeat(np.arange(len(extents)), pieces)
    nth = np.arange(len(row)) - np.repeat(np.append(0, np.cumsum(pieces)[:-1]), pieces)
    out = extents[row]
    cut = out["state"] == DATA
    begin = np.where(cut, nth * size, 0).astype(np.uint64)
    out["length"] = np.where(cut, np.minimum(out["length"] - begin, size), out["length"])
    out["offset"] += begin
    return out


def unite(lists: Sequence[Extents], low: int, high: int, grain: int = STATE_GRAIN) -> Extents:
    """The union of lists ordered oldest to newest, inside [low, high): the newest that touches a cell gives its state."""
    some = [clip(x, low, high) for x in lists if len(x)]
    some = [x for x in some if len(x)]
    if not some:
        return empty()
    if len(some) == 1:
        return coalesce(some[0])
    cells = Cells(low // grain * grain, high, grain, low)
    for extents in some:
        cells.paint_over(extents)
    return clip(cells.extents(high), low, high)
