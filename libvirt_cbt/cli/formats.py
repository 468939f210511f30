"""An answer of `changed` in the shapes of others, as pieces of text: nothing is ever held as a whole.

Each takes the answer, the byte it begins at and the most entries to print; how to go on from there is in the shape
itself: after the last entry of csi and nbdinfo, after startOffset + length of vmware.  None of them tells states or
generations apart, so runs that touch are one.
"""

from __future__ import annotations

from typing import Any, Final, Iterator, List, Optional

import numpy as np
import numpy.typing as npt

from libvirt_cbt import extents
from libvirt_cbt.actions.changed import Changed
from libvirt_cbt.repository import union

AT_ONCE: Final = 65536  # entries formatted at once

MAP: Final = np.dtype([("offset", "<u8"), ("length", "<u8"), ("type", "u1")])
CLEAN: Final = 0
DIRTY: Final = 1


class Taken:
    """Rows of pages up to `most`, or all of them.

    `end` is where the last one ended; `reach` the byte up to which they tell everything, once they were taken.
    """

    def __init__(self, pages: Iterator[extents.Extents], most: Optional[int], start: int, capacity: int) -> None:
        self._pages, self._most, self.end, self.reach = pages, most, start, capacity

    def __iter__(self) -> Iterator[extents.Extents]:
        left = self._most
        for page in self._pages:
            rows = page if left is None else page[:left]
            for first in range(0, len(rows), AT_ONCE):
                piece = rows[first : first + AT_ONCE]
                yield piece
                self.end = int(extents.ends(piece[-1:])[0])
            if len(rows) < len(page):
                self.reach = self.end
                return
            left = None if left is None else left - len(rows)


def entries(template: str, *columns: List[Any], between: str = ", ") -> str:
    """The template once for every row, separated."""
    flat: List[Any] = [None] * (len(columns) * len(columns[0]))
    for number, column in enumerate(columns):
        flat[number :: len(columns)] = column
    return ((template + between) * len(columns[0]) % tuple(flat))[: -len(between)]


def listed(pieces: Iterator[str], between: str = ", ") -> Iterator[str]:
    """Pieces of entries, separated."""
    for number, piece in enumerate(pieces):
        yield between + piece if number else piece


def rows(page: extents.Extents) -> str:
    """The extents of our own JSON."""
    states = [extents.STATES[state] for state in page["state"].tolist()]
    template = '{"offset": %d, "length": %d, "state": "%s", "generation": %d}'
    return entries(template, page["offset"].tolist(), page["length"].tolist(), states, page["generation"].tolist())


def csi(found: Changed, most: Optional[int], block_size: Optional[int] = None) -> Iterator[str]:
    """One message of the stream that GetMetadataDelta, or for everything GetMetadataAllocated, answers with.

    With `block_size` (bytes) FIXED_LENGTH: every block that a change touches; the last one ends with the volume.
    https://github.com/container-storage-interface/spec/blob/master/spec.md#snapshot-metadata-service-rpcs
    JSON as of protobuf, whose readers take field names as in csi.proto, and numbers as well as strings.
    """
    runs = union.joined(found.pages)
    kind = "VARIABLE_LENGTH"
    if block_size:
        kind, runs = "FIXED_LENGTH", _blocks(runs, block_size, found.capacity)
    yield f'{{"block_metadata_type": "{kind}", "volume_capacity_bytes": {found.capacity}, "block_metadata": ['
    template = '{"byte_offset": %d, "size_bytes": %d}'
    taken = Taken(runs, most, 0, found.capacity)
    yield from listed(entries(template, p["offset"].tolist(), p["length"].tolist()) for p in taken)
    yield "]}\n"


def vmware(found: Changed, start: int, most: Optional[int]) -> Iterator[str]:
    """The DiskChangeInfo of QueryChangedDiskAreas; `length` comes last: it is known when the areas are printed.

    https://developer.broadcom.com/xapis/virtual-infrastructure-json-api/latest/data-structures/DiskChangeInfo
    """
    taken = Taken(union.joined(found.pages), most, start, found.capacity)
    yield f'{{"startOffset": {start}, "changedArea": ['
    yield from listed(entries('{"start": %d, "length": %d}', p["offset"].tolist(), p["length"].tolist()) for p in taken)
    yield f'], "length": {taken.reach - start}}}\n'


def nbdinfo(found: Changed, start: int, most: Optional[int]) -> Iterator[str]:
    """What `nbdinfo --map=qemu:dirty-bitmap:... --json` prints, from byte `start` to the end of the disk.

    https://libguestfs.org/nbdinfo.1.html
    """
    taken = Taken(_covered(union.joined(found.pages), start, found.capacity), most, start, found.capacity)
    yield "["
    yield from listed((_map_entries(page) for page in taken), ",")
    yield "\n]\n"


def _map_entries(page: extents.Extents) -> str:
    kinds = page["type"].tolist()
    words = ["dirty" if kind else "clean" for kind in kinds]
    template = '\n{ "offset": %d, "length": %d, "type": %d, "description": "%s"}'
    return entries(template, page["offset"].tolist(), page["length"].tolist(), kinds, words, between=",")


def _covered(runs: Iterator[extents.Extents], start: int, capacity: int) -> Iterator[extents.Extents]:
    """Joined runs with what is clean between them, as MAP arrays over [start, capacity)."""
    at = start
    for page in runs:
        stop = extents.ends(page)
        begins = np.stack((np.append(np.uint64(at), stop[:-1]), page["offset"]), axis=1).ravel()
        lengths = np.stack((page["offset"] - begins[::2], page["length"]), axis=1).ravel()
        out = np.empty(len(begins), MAP)
        out["offset"], out["length"] = begins, lengths
        out["type"] = np.tile(np.array([CLEAN, DIRTY], np.uint8), len(page))
        yield out[out["length"] > 0]  # only the very first change can begin where the answer does
        at = int(stop[-1])
    if at < capacity:
        yield np.array([(at, capacity - at, CLEAN)], MAP)


def _blocks(runs: Iterator[extents.Extents], size: int, capacity: int) -> Iterator[extents.Extents]:
    """Every block of `size` bytes that ordered, joined runs touch, once."""
    block = np.uint64(size)
    done = 0  # blocks below this one were given
    for page in runs:
        last = (extents.ends(page) - np.uint64(1)) // block + np.uint64(1)
        # Two runs may share a block: it belongs to the first of them.
        first = np.maximum(page["offset"] // block, np.append(np.uint64(done), last[:-1]))
        done = int(last[-1])
        new = first < last
        # Counted in blocks from here on, a few at a time however long a run is.
        pieces = extents.split(extents.make(first[new], (last - first)[new], extents.DATA), AT_ONCE)
        counts = np.cumsum(pieces["length"])
        marks = np.arange(AT_ONCE, int(counts[-1]) + AT_ONCE, AT_ONCE) if len(counts) else counts
        cuts = np.unique(np.minimum(np.searchsorted(counts, marks) + 1, len(pieces))).tolist()
        for begin, end in zip([0, *cuts], cuts):
            offsets = _each(pieces[begin:end]) * block
            yield extents.make(offsets, np.minimum(block, np.uint64(capacity) - offsets), extents.DATA)


def _each(pieces: extents.Extents) -> npt.NDArray[np.uint64]:
    """The number of every block in ordered pieces."""
    counts = pieces["length"].astype(np.int64)
    before = np.repeat(np.append(0, np.cumsum(counts)[:-1]), counts)
    found: npt.NDArray[np.uint64] = np.repeat(pieces["offset"], counts)
    found += (np.arange(len(before)) - before).astype(np.uint64)
    return found
