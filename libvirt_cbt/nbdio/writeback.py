"""Writes out behind a copy what lies in the page cache, so that its sync finds little to do.

Left alone the kernel begins when a tenth of the memory is dirty: the disk idles, and then everybody waits for it.
A layer's writer even stops for it in the middle (qcow2 flushes with each new L2 table, every 512 MiB).
https://man7.org/linux/man-pages/man2/posix_fadvise.2.html
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Final, Iterator

from libvirt_cbt import durable

STEP: Final = 16 << 20  # bytes


class WriteBack:
    """One file or device, whoever writes it; what has been written out is dropped from the cache."""

    def __init__(self, fd: int) -> None:
        self._fd, self._new = fd, 0

    def wrote(self, count: int) -> None:
        """`count` more bytes are in the cache.  Returns when the disk has been told, not when it is done."""
        self._new += count
        if self._new >= STEP:
            self._new = 0
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def behind(path: str) -> Iterator[WriteBack]:
    """For a file that a server of ours writes: the cache is the kernel's, whoever filled it."""
    with durable.explained(os.path.dirname(path), path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield WriteBack(fd)
    finally:
        os.close(fd)
