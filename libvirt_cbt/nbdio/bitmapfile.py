"""A qcow2 image that holds a dirty bitmap and no data: how an old delta gets into a storage daemon.

Laid over a chain of layers it shows their bytes, and the server offers its bitmap as a meta context.  Bits are packed
here and read by QEMU when it opens the file: a request for each extent (write zeroes over a null node that has a
bitmap, then block-dirty-bitmap-merge) takes a hundred times as long and needs a monitor.
https://www.qemu.org/docs/master/interop/qcow2.html, "Bitmaps extension"
"""

from __future__ import annotations

import os
import struct
from typing import Any, BinaryIO, Callable, Final, Iterator, Optional, Tuple

import numpy as np

from libvirt_cbt import extents

Pages = Callable[[], Iterator[extents.Extents]]  # ordered, disjoint extents, from the start each time it is called

CLUSTER_BITS: Final = 16
CLUSTER: Final = 1 << CLUSTER_BITS
BITS: Final = 8 * CLUSTER  # of the bitmap, in one cluster
FINEST: Final = 512  # QEMU's: BME_MIN_GRANULARITY_BITS, block/qcow2-bitmap.c
COARSEST: Final = 65536  # coarser bits would save less than 2 MiB for a disk of 1 TiB
MOST_BITS: Final = 1 << 30  # 128 MiB in the daemon; the format allows four times that
ALL_ONES: Final = 1  # a bitmap table entry without a cluster; 0: all zeroes

_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQII")  # qcow2 version 3, 104 bytes
_EXTENSION: Final = struct.Struct(">IIIIQQII")  # "bitmaps", and the end of the extensions
_DIRECTORY: Final = struct.Struct(">QIIBBHI")
_AUTOCLEAR_BITMAPS: Final = 1


def granularity(pages: Pages, capacity: int) -> int:
    """The coarsest power of two, within QEMU's bounds, on which every boundary lies: the bitmap then says no more
    than the extents do.  Where that would take more than MOST_BITS it is coarser: a superset, as bits always are.
    """
    bits = COARSEST
    for page in pages():
        stop = extents.ends(page)
        bits |= int(np.bitwise_or.reduce(page["offset"])) | int(np.bitwise_or.reduce(stop[stop < capacity]))
    grain = max(FINEST, bits & -bits)
    while -(-capacity // grain) > MOST_BITS:
        grain *= 2
    return grain


def write(path: str, name: str, capacity: int, pages: Pages) -> Tuple[int, int]:
    """Makes the image `path` (mode 0600, never over a file) with the bitmap `name`: (granularity, bytes it covers).

    A block is dirty when any extent touches it.  `capacity` in bytes, a multiple of 512.  Errors: OSError.
    """
    grain = granularity(pages, capacity)
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        return grain, _write(file, name.encode(), capacity, grain, pages())


def _write(file: BinaryIO, name: bytes, capacity: int, grain: int, pages: Iterator[extents.Extents]) -> int:
    # Header, L1 table (empty: no data), bitmap directory, bitmap table, the bitmap's clusters, refcounts.
    l1_entries = -(-capacity // (CLUSTER * CLUSTER // 8))
    table = [0] * -(-capacity // (grain * BITS))
    l1_at = CLUSTER
    directory_at = l1_at + _clusters(8 * l1_entries) * CLUSTER
    table_at = directory_at + CLUSTER
    end = table_at + _clusters(8 * len(table)) * CLUSTER
    dirty = 0
    for number, bits in _windows(pages, capacity, grain):
        dirty += _covered(bits, number, capacity, grain)
        if bits is None:
            table[number] = ALL_ONES
            continue
        file.seek(end)
        file.write(np.packbits(bits, bitorder="little").tobytes())
        table[number], end = end, end + CLUSTER
    refcounts_at, end = end, _write_refcounts(file, end)
    extension = (0x23852875, 24, 1, 0, _padded(name), directory_at, 0, 0)
    header = (b"QFI\xfb", 3, 0, 0, CLUSTER_BITS, capacity, 0, l1_entries, l1_at, refcounts_at, 1, 0, 0)
    file.seek(0)
    file.write(_HEADER.pack(*header, 0, 0, _AUTOCLEAR_BITMAPS, 4, _HEADER.size) + _EXTENSION.pack(*extension))
    file.seek(directory_at)
    # Not in use, not "auto": it counts nothing by itself.
    entry = _DIRECTORY.pack(table_at, len(table), 0, 1, grain.bit_length() - 1, len(name), 0)
    file.write((entry + name).ljust(_padded(name), b"\0"))
    file.seek(table_at)
    file.write(struct.pack(f">{len(table)}Q", *table))
    file.truncate(end)
    return dirty


def _padded(name: bytes) -> int:
    return -(-(_DIRECTORY.size + len(name)) // 8) * 8


def _clusters(size: int) -> int:
    return -(-size // CLUSTER)


def _write_refcounts(file: BinaryIO, begin: int) -> int:
    """A table of one cluster and its blocks, every cluster of the file used once; where the file ends."""
    per_block = CLUSTER // 2
    blocks = 1
    while (used := begin // CLUSTER + 1 + blocks) > blocks * per_block:
        blocks += 1
    file.seek(begin)
    file.write(struct.pack(f">{blocks}Q", *(begin + (1 + i) * CLUSTER for i in range(blocks))))
    file.seek(begin + CLUSTER)
    file.write(np.ones(used, ">u2").tobytes())
    return begin + (1 + blocks) * CLUSTER


def _windows(pages: Iterator[extents.Extents], capacity: int, grain: int) -> Iterator[Tuple[int, Optional[Any]]]:
    """(number, one bool for each bit or None for all ones) of every cluster of the bitmap that has ones, ascending."""
    span = grain * BITS
    cells: Optional[extents.Cells] = None  # the cluster that is being painted: pages end where they like
    for page in pages:
        at, last = int(page["offset"][0]), int(extents.ends(page[-1:])[0])
        while at < last:
            low = at // span * span
            high = min(low + span, capacity)
            if cells and cells.low != low:
                yield cells.low // span, cells.values != 0
                cells = None
            part = extents.clip(page, low, high)
            if int(part["length"][0]) == high - low:  # long runs are not painted bit by bit
                yield low // span, None
            else:
                cells = cells or extents.Cells(low, high, grain)
                cells.paint(part, 1)
            rest = int(np.searchsorted(extents.ends(page), np.uint64(high), side="right"))
            at = max(high, int(page["offset"][rest])) if rest < len(page) else last
    if cells:
        yield cells.low // span, cells.values != 0


def _covered(bits: Optional[Any], number: int, capacity: int, grain: int) -> int:
    """Bytes of the disk that the ones stand for."""
    first = number * grain * BITS
    if bits is None:
        return min(grain * BITS, capacity - first)
    beyond = first + len(bits) * grain - capacity if bits[-1] else 0  # the last bit may stand for less
    return int(np.count_nonzero(bits)) * grain - max(0, beyond)
