"""Stored extents of several generations united, exactly, as a stream.

They are painted oldest to newest into cells, a window of the disk at a time; the cells are as large as the boundaries
in the window allow, so that nothing is rounded: a block's state and generation are those of the newest source that has
it.  Rows are read once and in order: neither a delta nor the answer is ever in memory as a whole.
"""

from __future__ import annotations

import resource
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from libvirt_cbt import extents
from libvirt_cbt.repository import npy

CHANGE: Final = np.dtype([("offset", "<u8"), ("length", "<u8"), ("state", "u1"), ("generation", "<u8")])

WINDOW: Final = 1 << 34  # bytes of the disk painted at once
CELLS: Final = 1 << 20  # of one size in a window: 4 MiB, and some times that while long runs are painted
ROWS: Final = 1 << 18  # of all sources together in memory at once
LEAST_ROWS: Final = 1024  # of one source, however many there are
LARGEST_GRAIN: Final = 1 << 30

U64 = npt.NDArray[np.uint64]
Part = Tuple[int, extents.Extents]


@dataclass(frozen=True)
class Source:
    """A file of extents; what only it has was last written in `generation`."""

    path: str
    dtype: np.dtype[Any]
    digest: str
    generation: int


@contextmanager
def opened(sources: Sequence[Source]) -> Iterator[List[npy.Reader]]:
    """Readers of all sources.  Errors: Damaged.

    Each file is held against its digest here, whole, also for one page: a part cannot be proved, and it costs little
    (30 deltas of 1 TiB at 1 % are 85 MB, below 0.1 s).
    """
    _allow_files(len(sources))
    with ExitStack() as stack:
        yield [stack.enter_context(npy.Reader(s.path, s.dtype, s.digest)) for s in sources]


def _allow_files(count: int) -> None:
    """Raises the soft limit of open files where a long history needs it; the hard one is the administrator's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 256
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def union(sources: Sequence[Source], start: int, capacity: int) -> Iterator[extents.Extents]:
    """CHANGE arrays, none empty: bytes [start, capacity) of sources ordered oldest to newest.

    Rows are ordered and disjoint, neighbours of one state and generation are joined: the rows do not depend on where
    windows or arrays end.  Errors: Damaged.
    """
    with opened(sources) as readers:
        generations = np.array([0, *(s.generation for s in sources)], np.uint64)
        yield from joined(_windows(readers, generations, start, capacity), "state", "generation")


def joined(pages: Iterator[extents.Extents], *fields: str) -> Iterator[extents.Extents]:
    """The same rows with neighbours that agree in `fields` made one, also across pages."""
    tail: Optional[extents.Extents] = None
    for page in pages:
        whole = _join(page if tail is None else np.concatenate((tail, page)), fields)
        tail = whole[-1:]
        if len(whole) > 1:
            yield whole[:-1]
    if tail is not None and len(tail):
        yield tail


def _join(rows: extents.Extents, fields: Sequence[str]) -> extents.Extents:
    if len(rows) < 2:
        return rows
    stop = extents.ends(rows)
    breaks = np.empty(len(rows), np.bool_)
    breaks[0] = True
    np.not_equal(stop[:-1], rows["offset"][1:], out=breaks[1:])
    for field in fields:
        breaks[1:] |= rows[field][1:] != rows[field][:-1]
    starts = np.flatnonzero(breaks)
    if len(starts) == len(rows):
        return rows
    out = rows[starts]
    out["length"] = stop[np.append(starts[1:], len(rows)) - 1] - out["offset"]
    return out


class _Cursor:
    """Goes through the rows of one file once, in order."""

    def __init__(self, reader: npy.Reader, start: int, rows_at_once: int) -> None:
        self._reader, self._at_once = reader, rows_at_once
        self._next = reader.index(start) if start else 0
        self.rows: extents.Extents = np.empty(0, CHANGE)
        self._ends = extents.ends(self.rows)

    def advance(self, low: int) -> None:
        """Lets go of rows that end at or before byte `low`, and reads on."""
        gone = int(np.searchsorted(self._ends, np.uint64(low), side="right"))
        self.rows, self._ends = self.rows[gone:], self._ends[gone:]
        while len(self.rows) < max(1, self._at_once // 2) and self._next < self._reader.rows:
            last = min(self._next + self._at_once, self._reader.rows)
            read = self._reader.slice(self._next, last)
            self._next = last
            self.rows = np.concatenate((self.rows, read)) if len(self.rows) else read
            self._ends = extents.ends(self.rows)

    def clipped(self, low: int, high: int) -> extents.Extents:
        """The part of the rows in [low, high); `advance` came to `low`, and they are known up to `high`."""
        return extents.clip(self.rows[: int(np.searchsorted(self.rows["offset"], np.uint64(high)))], low, high)

    @property
    def known_until(self) -> int:
        """The byte up to which all rows are here."""
        return int(self._ends[-1]) if self._next < self._reader.rows else 1 << 63


def _windows(readers: Sequence[npy.Reader], generations: U64, start: int, capacity: int) -> Iterator[extents.Extents]:
    at_once = max(LEAST_ROWS, ROWS // max(1, len(readers)))
    cursors = [_Cursor(reader, start, at_once) for reader in readers]
    low = start
    while low < capacity:
        for cursor in cursors:
            cursor.advance(low)
        live = [c for c in cursors if len(c.rows)]
        low = max([low, *([min(int(c.rows["offset"][0]) for c in live)] if live else [capacity])])
        if low >= capacity:
            return
        high = min([low - low % WINDOW + WINDOW, capacity, *(c.known_until for c in live)])
        parts = [(number, c.clipped(low, high)) for number, c in enumerate(cursors, 1)]
        yield _painted([(number, rows) for number, rows in parts if len(rows)], generations, low, high)
        low = high


def _painted(parts: Sequence[Part], generations: U64, low: int, high: int) -> extents.Extents:
    """One window; the parts are ordered oldest first, each with its place in `generations`."""
    if len(parts) == 1:
        number, rows = parts[0]
        return _page(rows["offset"], extents.ends(rows), rows["state"], generations[number])
    grain = _grain(parts, low, high)
    base = low // grain * grain
    edges: Optional[U64] = None
    if (high - base) // grain < CELLS:
        cells = extents.Cells(base, high, grain)
    else:  # boundaries too fine for cells of one size: as many cells as there are boundaries
        edges = np.unique(np.concatenate([x for _, rows in parts for x in (rows["offset"], extents.ends(rows))]))
        cells = extents.Cells(0, len(edges) - 1, 1)
    for number, rows in parts:
        values = (2 * number + (rows["state"] == extents.ZERO)).astype(np.int32)
        cells.paint(rows if edges is None else _renumbered(rows, edges), values)
    first, last, values = cells.run_arrays()
    if edges is None:
        begin, stop = np.maximum(first * grain + base, low), np.minimum(last * grain + base, high)
    else:
        begin, stop = edges[first], edges[last]
    return _page(begin, stop, np.where(values & 1, extents.ZERO, extents.DATA), generations[values >> 1])


def _renumbered(rows: extents.Extents, edges: U64) -> extents.Extents:
    first = np.searchsorted(edges, rows["offset"])
    return extents.make(first, np.searchsorted(edges, extents.ends(rows)) - first, rows["state"])


def _page(begin: Any, stop: Any, states: Any, generations: Any) -> extents.Extents:
    page = np.empty(len(begin), CHANGE)
    page["offset"], page["length"], page["state"], page["generation"] = begin, stop - begin, states, generations
    return page


def _grain(parts: Sequence[Part], low: int, high: int) -> int:
    """The largest power of two on which every boundary inside the window lies."""
    bits = LARGEST_GRAIN
    for _, rows in parts:
        stop = extents.ends(rows)
        # The first and the last row may have been cut by the window.
        bits |= int(np.bitwise_or.reduce(rows["offset"][1:])) | int(np.bitwise_or.reduce(stop[:-1]))
        bits |= int(rows["offset"][0]) if int(rows["offset"][0]) != low else 0
        bits |= int(stop[-1]) if int(stop[-1]) != high else 0
    return bits & -bits
