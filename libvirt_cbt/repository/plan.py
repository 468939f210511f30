"""Which run of which layer gives which bytes of a restored disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Iterator, List, Sequence, Tuple

import numpy as np

from libvirt_cbt import errors, extents
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
        high = min(low + WINDOW, capacity)
        rows: List[extents.Extents] = [r.window(low, high) for r in chain]
        cells = extents.Cells(low, high, extents.GRAIN)
        first_of = np.append(0, np.cumsum([len(r) for r in rows]))
        for layer in range(len(chain) - 1, -1, -1):
            problem = extents.check(rows[layer], 1 << 62)
            if problem:
                raise errors.Damaged(path=chain[layer].path, reason=problem)
            whole = rows[layer]
            inside = extents.clip(whole, low, high)
            number = np.arange(1, len(inside) + 1, dtype=np.int64) + first_of[layer]
            cells.paint(inside, np.where(inside["state"] == extents.DATA, number, 0).astype(np.int32))
        yield from _window(cells, rows, first_of, high)


def _window(
    cells: extents.Cells, rows: List[extents.Extents], first_of: np.ndarray[Tuple[int], np.dtype[np.int64]], high: int
) -> Iterator[Run]:
    keep: dict[int, List[Tuple[int, int]]] = {}
    for first, last, number in cells.runs():
        offset = cells.low + first * cells.grain
        keep.setdefault(number, []).append((offset, min(cells.low + last * cells.grain, high) - offset))
    for number, pieces in keep.items():
        layer = int(np.searchsorted(first_of, number - 1, side="right")) - 1
        row = rows[layer][number - 1 - int(first_of[layer])]
        offset, length = int(row["offset"]), int(row["length"])
        # The last run of a disk that has grown since ends inside a grain: beyond it are zeroes.
        shown = tuple((o, min(n, offset + length - o)) for o, n in pieces)
        yield Run(layer, offset, length, row["digest"].tobytes(), shown)


def everything(contents: npy.Reader, layer: int) -> Iterator[Run]:
    """Every data run of one layer, for verification."""
    for first in range(0, contents.rows, npy.SLICE):
        rows = contents.slice(first, min(first + npy.SLICE, contents.rows))
        for row in rows[rows["state"] == extents.DATA]:
            yield Run(layer, int(row["offset"]), int(row["length"]), row["digest"].tobytes(), ())
