"""Arrays of extents as .npy files: written as a stream, read in windows by pread.

A mapped file would count as memory, and a header from disk is not trusted: what
is accepted is exactly what the writer here writes, and numpy's own loader is
not asked.  Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Any, Final, Tuple

import blake3
import numpy as np

from libvirt_cbt import durable, errors, extents

HEADER_BYTES: Final = 256
SLICE: Final = 65536  # rows read at once where all are wanted
BEYOND: Final = 1 << 62  # bytes: no disk is as large, and sums of two do not wrap around


def _header(dtype: np.dtype[Any], rows: int) -> bytes:
    text = f"{{'descr': {dtype.descr!r}, 'fortran_order': False, 'shape': ({rows},), }}"
    body = text.encode("ascii")
    return b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + body.ljust(HEADER_BYTES - 11) + b"\n"


class Writer:
    """Appends arrays of one dtype to a new file; `finish` writes the header, syncs, and gives (digest, rows)."""

    def __init__(self, path: str, dtype: np.dtype[Any]) -> None:
        self.path, self._dtype, self._rows, self._end = path, dtype, 0, 0
        self._fd = durable.create(path)
        durable.write_all(self._fd, _header(dtype, 0))

    def append(self, rows: extents.Extents) -> None:
        if len(rows):
            if rows.dtype != self._dtype:
                raise TypeError(f"{rows.dtype} is not {self._dtype}")
            stop = extents.ends(rows)
            if int(rows["offset"][0]) < self._end or (rows["offset"][1:] < stop[:-1]).any():
                raise ValueError(f"{self.path}: runs overlap or are out of order")
            self._end = int(stop[-1])
            with durable.explained(os.path.dirname(self.path), self.path):
                durable.write_all(self._fd, np.ascontiguousarray(rows).tobytes())
            self._rows += len(rows)

    def finish(self) -> Tuple[str, int]:
        with durable.explained(os.path.dirname(self.path), self.path):
            os.pwrite(self._fd, _header(self._dtype, self._rows), 0)
            os.fsync(self._fd)
        self.close()
        return file_digest(self.path), self._rows

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def file_digest(path: str) -> str:
    """BLAKE3 of a file, in hex."""
    hasher = blake3.blake3()
    with open(path, "rb", buffering=0, opener=_opener) as file:
        while True:
            piece = file.read(1 << 20)
            if not piece:
                return hasher.hexdigest()
            hasher.update(piece)


def _opener(path: str, flags: int) -> int:
    # O_NONBLOCK: a FIFO in the file's place must not hold us up.
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return fd


class Reader:
    """Rows of a file of ours, a window at a time; a context manager.  Errors: Damaged naming the file."""

    def __init__(self, path: str, dtype: np.dtype[Any], digest: str) -> None:
        self.path, self._dtype = path, dtype
        try:
            self._fd = _opener(path, os.O_RDONLY)
        except OSError as e:
            raise errors.Damaged(path=path, reason=e.strerror) from None
        try:
            size = os.fstat(self._fd).st_size
            self.rows, rest = divmod(size - HEADER_BYTES, dtype.itemsize)
            if size < HEADER_BYTES or rest or os.pread(self._fd, HEADER_BYTES, 0) != _header(dtype, self.rows):
                raise errors.Damaged(path=path, reason="its header is not one of ours")
            if file_digest(path) != digest:
                raise errors.Damaged(path=path, reason="its digest does not match the manifest")
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def slice(self, first: int, last: int) -> extents.Extents:
        """Rows [first, last), which follow one another and the row before: a digest proves nothing against who made it."""
        size = self._dtype.itemsize
        before = min(first, 1)
        begin = first - before
        data = os.pread(self._fd, (last - begin) * size, HEADER_BYTES + begin * size)
        if len(data) != (last - begin) * size:
            raise errors.Damaged(path=self.path, reason="it was cut short")
        rows = np.frombuffer(data, self._dtype)
        problem = extents.check(rows, BEYOND)
        if not problem and self._dtype == extents.CONTENT and (rows["offset"] % extents.GRAIN).any():
            problem = "a run does not begin on a grain"
        if problem:
            raise errors.Damaged(path=self.path, reason=problem)
        return rows[before:]

    def index(self, offset: int) -> int:
        """The first row that ends beyond byte `offset` of the disk."""
        low, high = 0, self.rows
        while high - low > SLICE:
            middle = (low + high) // 2
            row = self.slice(middle, middle + 1)[0]
            if int(row["offset"]) + int(row["length"]) > offset:
                high = middle  # the row sought is this one or before it
            else:
                low = middle + 1
        return low + int(np.searchsorted(extents.ends(self.slice(low, high)), np.uint64(offset), side="right"))

    def window(self, low: int, high: int) -> extents.Extents:
        """Whole rows that touch bytes [low, high) of the disk."""
        parts = []
        first = self.index(low)
        while first < self.rows:
            rows = self.slice(first, min(first + SLICE, self.rows))
            inside = int(np.searchsorted(rows["offset"], np.uint64(high), side="left"))
            parts.append(rows[:inside].copy())  # a view would keep the whole slice
            if inside < len(rows):
                break
            first += len(rows)
        return np.concatenate(parts) if parts else np.empty(0, self._dtype)
