"""Writes out behind a copy what lies in the page cache, so that its sync finds little to do.

Left alone the kernel begins when a tenth of the memory is dirty: the disk idles, and then everybody waits for it.
https://man7.org/linux/man-pages/man2/posix_fadvise.2.html
"""

from __future__ import annotations

import os
import queue
import threading
from contextlib import suppress
from typing import Final, Optional

STEP: Final = 16 << 20  # bytes


class WriteBack:
    """One file or device, whoever writes it; what has been written out is dropped from the cache.

    A thread asks for it: a disk that is slow, or hangs, holds up nobody who watches over the copy.  It has a descriptor
    of its own, which it closes when `close` was called and nothing hangs.
    """

    def __init__(self, fd: int) -> None:
        self._fd, self._new = os.dup(fd), 0
        self._steps: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread: Optional[threading.Thread] = None

    def wrote(self, count: int) -> None:
        """`count` more bytes are in the cache."""
        self._new += count
        if self._new < STEP:
            return
        self._new = 0
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        if self._steps.empty():  # else the disk is behind anyway
            self._steps.put(True)

    def close(self) -> None:
        """Nothing more is begun; what was, goes on."""
        if self._thread:
            self._steps.put(False)
        else:
            os.close(self._fd)

    def _run(self) -> None:
        while self._steps.get():
            with suppress(OSError):  # advice that is not taken; a write that fails is told of by the sync
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(self._fd)
