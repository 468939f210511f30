"""Reads disks at a fleecing point: what is dirty, and the data of it, into layers.

`pull` is the data path from the top.  Per disk and window of block status:

    dirty and data  -> read, digest, write       dirty and zero -> write zeroes (they hide the parent's data)
    clean           -> nothing

Block status is asked in windows and dropped after use: the whole map is never in memory.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Callable, Deque, Dict, Final, List, Optional, Sequence

import numpy as np

from libvirt_cbt import errors, extents
from libvirt_cbt.nbdio import blockstatus, client, lanes
from libvirt_cbt.nbdio.blockstatus import Status
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.nbdio.server import Endpoint

WINDOW: Final = (1 << 32) - extents.GRAIN  # the longest length of a request without extended headers, in grains
AHEAD: Final = 1024  # runs prepared before the next block status is asked for

ALL: Final = "all"
DIRTY: Final = "dirty"
NOTHING: Final = "nothing"


@dataclass(frozen=True)
class Sink:
    """An open layer; `path` is for error messages, `has_parent` says that zeroes must be written."""

    endpoint: Endpoint
    path: str
    has_parent: bool


@dataclass(frozen=True)
class Pull:
    """One disk to read.  `bitmap` None: all that is allocated counts as dirty.

    `also(low, high)` gives further extents to copy (the deltas of marks since the parent).  `delta` gets D(j) as EXTENT
    arrays and `contents` the runs stored as CONTENT arrays, both in ascending offset.  Sizes in bytes.
    """

    target: str
    source: Endpoint
    capacity: int
    bitmap: Optional[str]
    copy: str
    expected: int
    sink: Optional[Sink]
    also: Callable[[int, int], extents.Extents]
    delta: Callable[[extents.Extents], None]
    contents: Callable[[extents.Extents], None]


@dataclass(frozen=True)
class Pulled:
    """Bytes: of D(j), stored as data, stored as zero, read over NBD."""

    target: str
    dirty_bytes: int
    data_bytes: int
    zero_bytes: int
    read_bytes: int


def pull(
    pulls: Sequence[Pull],
    options: Options,
    *,
    progress: Callable[[str, int, int], None],
    stop: Callable[[], None],
) -> List[Pulled]:
    """Reads all disks at once; when it returns everything is flushed and every connection is closed.

    Errors: SourceLost, SourceStalled, SourceUnreadable, NbdError, RepositoryFull, RepositoryError; what `stop` raises.
    """
    with ExitStack() as stack:
        disks = [_Disk(one, options, progress) for one in pulls]
        stack.callback(lanes.close, disks)
        for disk in disks:
            disk.open(stop)
        lanes.run(disks, stop)
        return [disk.result() for disk in disks]


class _Window:
    """Runs of one stretch of the disk on their way; handed on as a whole when the last digest is in."""

    def __init__(self, runs: extents.Extents) -> None:
        self.rows = np.zeros(len(runs), extents.CONTENT)
        for name in ("offset", "length", "state"):
            self.rows[name] = runs[name]
        self.next = 0
        self.open = len(runs)


class _Disk(lanes.Lane):
    def __init__(self, pull: Pull, options: Options, progress: Callable[[str, int, int], None]) -> None:
        super().__init__(pull.target, options)
        self.pull, self._progress = pull, progress
        self._sources: List[client.Connection] = []
        self._sinks: List[client.Connection] = []
        self._position = 0  # how far block status is known
        self._asking = False
        self._pending: Optional[Status] = None  # known, but short of a whole grain
        self._tail = extents.empty()  # the delta's last extent, which may go on in the next window
        self._windows: Deque[_Window] = deque()
        self._flushed = False
        self._dirty = self._data = self._zero = self._read = 0

    def open(self, stop: Callable[[], None]) -> None:
        contexts = [blockstatus.ALLOCATION] + ([self.pull.bitmap] if self.pull.bitmap else [])
        self._sources = client.connect(self.pull.source, self.options.connections, contexts, self.pull.capacity, stop)
        self.connections += self._sources
        if self.pull.bitmap and any(self.pull.bitmap not in c.contexts for c in self._sources):
            # The server leaves an unknown context out in silence; an increment without it would be empty.
            raise errors.NbdError(export=self.pull.source.export, reason=f"it does not offer '{self.pull.bitmap}'")
        if self.pull.sink:
            self._sinks = client.connect(self.pull.sink.endpoint, 1, (), None, stop)
            self.connections += self._sinks

    def result(self) -> Pulled:
        return Pulled(self.target, self._dirty, self._data, self._zero, self._read)

    @property
    def _read_all(self) -> bool:
        return self._position == self.pull.capacity and not self._windows and not self.busy and not self._asking

    @property
    def done(self) -> bool:
        return self._read_all and self._flushed

    def lost(self, gone: client.Lost) -> errors.CbtError:
        if self.pull.sink and gone.connection in self._sinks:
            return errors.RepositoryError(reason=f"the writer of {self.pull.sink.path} has gone: {gone}")
        return super().lost(gone)

    def stalled(self) -> errors.CbtError:
        if self.pull.sink and any(c.in_flight for c in self._sinks) and not any(c.in_flight for c in self._sources):
            return errors.RepositoryError(
                reason=f"writing {self.pull.sink.path} has not moved for {self.options.stall_seconds:.0f} s"
            )
        return super().stalled()

    def advance(self) -> None:
        self._ask()
        while self.busy < self.options.requests and self._submit_one():
            pass
        if self._read_all and not self._flushed:
            self._finish()

    def _finish(self) -> None:
        self._flushed = True
        self.pull.delta(self._tail)
        for connection in self._sinks:
            self.busy += 1
            connection.flush(self._written)

    # Block status

    def _ask(self) -> None:
        waiting = sum(len(w.rows) - w.next for w in self._windows)
        if self._asking or self._position == self.pull.capacity or waiting > AHEAD:
            return
        source = self._sources[0]
        length = min(WINDOW, self.pull.capacity - self._position)
        if not source.contexts:  # no server of ours or libvirt's, but the protocol allows it
            self._learn(length, 0, {})
            return
        self._asking = True
        source.block_status(length, self._position, lambda e, found: self._learn(length, e, found))

    def _learn(self, length: int, error: int, found: Dict[str, List[int]]) -> None:
        self._asking = False
        if error:
            raise self._unreadable(self._position, length, error)
        contexts = self._sources[0].contexts
        allocation = found.get(blockstatus.ALLOCATION, []) if blockstatus.ALLOCATION in contexts else None
        dirty = found.get(self.pull.bitmap, []) if self.pull.bitmap else None
        status = blockstatus.merge(self._position, length, allocation, dirty)
        if not len(status.end):
            raise errors.NbdError(
                export=self.pull.source.export, reason=f"block status makes no progress at offset {self._position}"
            )
        self._position = int(status.end[-1])
        if self._pending:
            status = blockstatus.join([self._pending, status])
        whole = (
            self._position if self._position == self.pull.capacity else self._position // extents.GRAIN * extents.GRAIN
        )
        ready, rest = status.cut(whole)
        self._pending = rest if len(rest.end) else None
        if len(ready.end):
            self._prepare(ready)

    def _prepare(self, status: Status) -> None:
        low, high = int(status.start[0]), int(status.end[-1])
        dirty = blockstatus.delta(status)
        self._dirty += extents.total(dirty)
        joined = extents.coalesce(np.concatenate([self._tail, dirty]))
        self.pull.delta(joined[:-1])
        self._tail = joined[-1:]
        runs = self._to_copy(status, dirty, low, high)
        if len(runs):
            self._windows.append(_Window(runs))

    def _to_copy(self, status: Status, dirty: extents.Extents, low: int, high: int) -> extents.Extents:
        if self.pull.copy == NOTHING:
            return extents.empty()
        cells = extents.Cells(low, high, extents.GRAIN)
        filled = ~status.zero
        starts, lengths = status.start[filled], (status.end - status.start)[filled]
        cells.paint(extents.make(starts, lengths, extents.DATA), extents.DATA)
        if self.pull.copy == DIRTY:
            touched = extents.Cells(low, high, extents.GRAIN)
            touched.paint(dirty, 1)
            touched.paint(self.pull.also(low, high), 1)
            state = np.where(cells.values == extents.DATA, extents.DATA, extents.ZERO)
            cells.values = np.where(touched.values != 0, state, 0).astype(np.int32)
        return extents.split(cells.extents(self.pull.capacity), self.options.request_size)

    # Data

    def _submit_one(self) -> bool:
        window = next((w for w in self._windows if w.next < len(w.rows)), None)
        if window is None or not self._sinks:
            return False
        row = window.next
        window.next += 1
        offset, length = int(window.rows["offset"][row]), int(window.rows["length"][row])
        self.busy += 1
        if window.rows["state"][row] == extents.ZERO:
            self._zero += length
            self._write_zeroes(window, offset, length)
        else:
            self._data += length
            self._read_run(window, row, offset, length)
        return True

    def _read_run(self, window: _Window, row: int, offset: int, length: int) -> None:
        buffer = self.take(-(-length // extents.GRAIN) * extents.GRAIN)
        view = memoryview(buffer)[:length]
        if length < len(buffer):
            buffer[length:] = bytes(len(buffer) - length)  # the last grain of the disk, padded

        def arrived(error: int) -> None:
            if error:
                raise self._unreadable(offset, length, error)
            self._read += length
            window.rows["digest"][row] = np.frombuffer(lanes.digest(view), np.uint8)
            self.least_busy(self._sinks).write(buffer, offset, lambda e: self._run_written(window, e, buffer))

        self.least_busy(self._sources).read(view, offset, arrived)

    def _write_zeroes(self, window: _Window, offset: int, length: int) -> None:
        padded = -(-length // extents.GRAIN) * extents.GRAIN
        piece = min(padded, lanes.ZERO_PIECE)

        def written(error: int) -> None:
            if error or piece == padded:
                self._run_written(window, error, None)
            else:
                self._write_zeroes(window, offset + piece, padded - piece)

        self.least_busy(self._sinks).zero(piece, offset, written)

    def _run_written(self, window: _Window, error: int, buffer: Optional[bytearray]) -> None:
        if buffer is not None:
            self.give(buffer)
        self._written(error)
        window.open -= 1
        self._progress(self.target, self._data, max(self.pull.expected, self._data))
        while self._windows and not self._windows[0].open:
            self.pull.contents(self._windows.popleft().rows)

    def _written(self, error: int) -> None:
        self.busy -= 1
        if error:
            raise lanes.write_failed(self.pull.sink.path if self.pull.sink else "", error)

    def _unreadable(self, offset: int, length: int, error: int) -> errors.CbtError:
        if error in lanes.GONE:
            return errors.SourceLost(target=self.target, reason=os.strerror(error))
        return errors.SourceUnreadable(target=self.target, offset=offset, length=length, reason=os.strerror(error))
