"""Block status of an increment: the dirty bitmap of the whole disk, and what is allocated only where it is marked.

QEMU tells of 4 GiB of a clean bitmap in microseconds, but finds out what is allocated in steps of a few MiB.  And most
of the time goes into waiting: so several windows are asked for at once, as long as the answers are short.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Callable, Deque, Dict, Final, List, Optional

import numpy as np

from libvirt_cbt import extents
from libvirt_cbt.nbdio import blockstatus, source
from libvirt_cbt.nbdio.blockstatus import Status

DEPTH: Final = 16  # windows asked for at once; more has no effect, QEMU takes so many requests of a connection
SHORT: Final = 64  # numbers in an answer; after a longer one the next window waits for it, as answers can be of 2 MB
SECTIONS: Final = 2  # stretches to copy that wait for what is allocated in them

Find = Callable[[int, int], extents.Extents]


@dataclass
class _Window:
    """Bytes [start, end) of the bitmap, asked for; with an answer it is wholly `clean`, or so much of it `known`."""

    start: int
    end: int
    known: Optional[Status] = None
    clean: bool = False


@dataclass
class _Section:
    """A stretch that something in it was written in, and as far as that is known what of it is zero."""

    status: Status
    also: extents.Extents
    zero: List[Status] = field(default_factory=list)

    @property
    def end(self) -> int:
        return int(self.status.end[-1])

    @property
    def position(self) -> int:
        return int(self.zero[-1].end[-1]) if self.zero else int(self.status.start[0])


class Changes:
    """Hands each stretch with changes to `found(status, also)`, in order; the others never show.

    `extra(low, high)` gives extents that count as dirty, too, and `also(low, high)` such as are to be copied without
    being dirty; None: there are none.  `failed(offset, length, errno)` raises.
    """

    def __init__(
        self,
        of: source.Source,
        found: Callable[[Status, extents.Extents], None],
        failed: Callable[[int, int, int], None],
        *,
        extra: Optional[Find] = None,
        also: Optional[Find] = None,
    ) -> None:
        self._source, self._found, self._failed = of, found, failed
        self._extra, self._also = extra, also
        self._next = 0  # how far windows were asked for
        self._depth = 1
        self._windows: Deque[_Window] = deque()
        self._kept: Optional[Status] = None  # known, but not in whole grains
        self._sections: Deque[_Section] = deque()
        self._asking = False

    @property
    def done(self) -> bool:
        return self._next == self._source.size and not self._windows and not self._sections

    def ask(self) -> None:
        """Asks for as many windows as may be on their way."""
        assert self._source.size is not None
        # The deltas of marks are united in memory by the cell: no windows beyond 4 GiB for these.
        longest = source.WINDOW if self._also or self._extra else self._source.window
        # Not one for each that is answered: several at once wake QEMU, and us, less often.
        few = len(self._windows) <= self._depth // 2 and len(self._sections) < SECTIONS
        while few and len(self._windows) < self._depth and self._next < self._source.size:
            window = _Window(self._next, min(self._next + longest, self._source.size))
            self._next = window.end
            self._windows.append(window)
            self._source.marks(window.end - window.start, window.start, partial(self._answered, window))
        if self._sections and not self._asking:
            self._look()

    # The bitmap

    def _answered(self, window: _Window, error: int, found: Dict[str, List[int]]) -> None:
        length = window.end - window.start
        if error:
            self._failed(window.start, length, error)
        assert self._source.bitmap
        marks = found.get(self._source.bitmap, [])
        window.clean = len(marks) == 2 and marks[0] >= length and not marks[1] & blockstatus.DIRTY
        if not window.clean:
            window.known = self._source.progress(blockstatus.merge(window.start, length, None, marks), window.start)
        self._depth = min(2 * self._depth, DEPTH) if len(marks) <= SHORT else 1
        while self._windows and (self._windows[0].clean or self._windows[0].known):
            self._learn(self._windows[0])

    def _learn(self, window: _Window) -> None:
        """The first window: done with, or asked for again from where the answer ends."""
        if window.clean and self._kept is None and not self._also and not self._extra:
            self._windows.popleft()  # the usual answer of a large disk: it costs nothing
            return
        status = window.known or blockstatus.piece(window.start, window.end - window.start, zero=False, dirty=False)
        known = int(status.end[-1])
        if known == window.end:
            self._windows.popleft()
        else:
            window.start, window.known = known, None
            self._source.marks(window.end - known, known, partial(self._answered, window))
        if self._kept is not None:
            status = blockstatus.join([self._kept, status])
        ready, rest = status.cut(known if known == self._source.size else known // extents.GRAIN * extents.GRAIN)
        self._kept = rest if len(rest.end) else None
        if len(ready.end):
            self._collect(ready)

    def _collect(self, status: Status) -> None:
        low, high = int(status.start[0]), int(status.end[-1])
        if self._extra:
            status = blockstatus.mark(status, self._extra(low, high))
        also = self._also(low, high) if self._also else extents.empty()
        dirty = np.flatnonzero(status.dirty)
        edges = [int(status.start[dirty[0]]), int(status.end[dirty[-1]])] if len(dirty) else []
        edges += [int(also["offset"][0]), int(extents.ends(also)[-1])] if len(also) else []
        if edges:
            low = min(edges) // extents.GRAIN * extents.GRAIN
            high = min(-(-max(edges) // extents.GRAIN) * extents.GRAIN, high)
            self._sections.append(_Section(status.cut(low)[1].cut(high)[0], also))

    # What is allocated

    def _look(self) -> None:
        """Asks about the first section what is not known yet, and hands it on when all is."""
        section = self._sections[0]
        length = section.end - section.position
        self._asking = length > 0 and blockstatus.ALLOCATION in self._source.contexts
        if self._asking:
            self._source.block_status(length, section.position, partial(self._allocated, section, length))
            return
        self._sections.popleft()
        self._found(blockstatus.united(section.status, section.zero), section.also)

    def _allocated(self, section: _Section, length: int, error: int, found: Dict[str, List[int]]) -> None:
        if error:
            self._failed(section.position, length, error)
        known = blockstatus.merge(section.position, length, found.get(blockstatus.ALLOCATION, []), None)
        section.zero.append(self._source.progress(known, section.position))
        self._look()
