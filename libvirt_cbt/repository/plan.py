"""Which run of which layer gives which bytes of a disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from libvirt_cbt import extents
from libvirt_cbt.repository import npy

WINDOW: Final = 1 << 30  # bytes of the disk planned at once: memory stays flat however many runs there are


@dataclass(frozen=True)
class Run:
    """A stored run of data; `keep` are the (offset, length) pieces of it that no newer layer hides."""

    layer: int
    offset: int
    length: int
    digest: bytes
    keep: Tuple[Tuple[int, int], ...]


def restore(chain: Sequence[npy.Reader], capacity: int) -> Iterator[Run]:
    """Every run that shows, in ascending offset; `chain` is newest first.  Zeroes yield nothing: a new file has them.

    Errors: Damaged when a contents file is out of order.
    """
    for low in range(0, capacity, WINDOW):
        yield from Shown(chain, low, min(low + WINDOW, capacity)).runs()


class Shown:
    """What a chain (newest first) shows of bytes [low, high), by whole grains; `low` lies on a grain.

    Errors: Damaged when a contents file is out of order.
    """

    def __init__(self, chain: Sequence[npy.Reader], low: int, high: int) -> None:
        rows: List[extents.Extents] = [r.window(low, high) for r in chain]
        self._high = high
        self._cells = extents.Cells(low, high, extents.GRAIN)
        first_of = np.append(0, np.cumsum([len(r) for r in rows]))
        for layer in range(len(chain) - 1, -1, -1):
            inside = extents.clip(rows[layer], low, high)
            number = np.arange(1, len(inside) + 1, dtype=np.int64) + first_of[layer]
            self._cells.paint(inside, np.where(inside["state"] == extents.DATA, number, 0).astype(np.int32))
        # Most rows of a long chain are hidden: only those that show are kept, numbered from 1.
        numbers, places = np.unique(self._cells.values, return_inverse=True)
        shift = int(len(numbers) == 0 or int(numbers[0]) != 0)
        self._cells.values = (places.reshape(-1) + shift).astype(np.int32)
        numbers = numbers[numbers > 0] - 1
        self._layers = np.searchsorted(first_of, numbers, side="right") - 1
        parts = [rows[n][numbers[self._layers == n] - first_of[n]] for n in range(len(chain))]
        self._rows = np.concatenate(parts) if parts else np.empty(0, extents.CONTENT)

    def same(self, other: Shown) -> extents.Mask:
        """The grains of which it is on record that both show the same: zeroes, or a run of one place and one digest."""
        mine, theirs = self._cells.values, other._cells.values
        found: extents.Mask = (mine == 0) & (theirs == 0)
        data = np.flatnonzero((mine > 0) & (theirs > 0))
        one, two = self._rows[mine[data] - 1], other._rows[theirs[data] - 1]
        equal = (one["offset"] == two["offset"]) & (one["length"] == two["length"])
        found[data] = equal & (one["digest"] == two["digest"]).all(axis=1)
        return found

    def runs(self, wanted: Optional[extents.Mask] = None) -> Iterator[Run]:
        """Every run that shows, or those in the grains `wanted` with the pieces in these, in ascending offset."""
        cells = self._cells
        if wanted is not None:
            cells = extents.Cells(cells.low, cells.high, cells.grain)
            cells.values = np.where(wanted, self._cells.values, 0).astype(np.int32)
        keep: dict[int, List[Tuple[int, int]]] = {}
        for first, last, number in cells.runs():
            offset = cells.low + first * cells.grain
            keep.setdefault(number, []).append((offset, min(cells.low + last * cells.grain, self._high) - offset))
        for number, pieces in keep.items():
            row = self._rows[number - 1]
            offset, length = int(row["offset"]), int(row["length"])
            # The last run of a disk that has grown since ends inside a grain: beyond it are zeroes.
            shown = tuple((o, min(n, offset + length - o)) for o, n in pieces)
            yield Run(int(self._layers[number - 1]), offset, length, row["digest"].tobytes(), shown)


def everything(contents: npy.Reader, layer: int) -> Iterator[Run]:
    """Every data run of one layer, for verification."""
    for first in range(0, contents.rows, npy.SLICE):
        rows = contents.slice(first, min(first + npy.SLICE, contents.rows))
        for row in rows[rows["state"] == extents.DATA]:
            yield Run(layer, int(row["offset"]), int(row["length"]), row["digest"].tobytes(), ())
