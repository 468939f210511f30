"""Reads disks at a fleecing point: what is dirty, and the data of it, into layers.

`pull` is the data path from the top.  Per disk and window of block status:

    dirty and data  -> read, digest, write       dirty and zero -> write zeroes (they hide the parent's data)
    clean           -> nothing

Block status is asked in windows and dropped after use: the whole map is never in memory.
"""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Callable, Deque, Final, List, Optional, Sequence, Union

import numpy as np

from libvirt_cbt import errors, extents
from libvirt_cbt.nbdio import blockstatus, changes, client, density, lanes, source
from libvirt_cbt.nbdio.blockstatus import Status
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.nbdio.server import Endpoint
from libvirt_cbt.nbdio.writeback import WriteBack

WINDOW: Final = source.WINDOW
AHEAD: Final = 1024  # runs prepared before the next block status is asked for

ALL: Final = "all"
DIRTY: Final = "dirty"
NOTHING: Final = "nothing"


@dataclass(frozen=True)
class Sink:
    """An open layer.  Of `endpoints` the last one gets what would not compress, the first one (it may be the same) the rest.

    `path` is for error messages, `has_parent` says that zeroes must be written, `behind` is told of data.
    """

    endpoints: Sequence[Endpoint]
    path: str
    has_parent: bool
    behind: Optional[WriteBack] = None


@dataclass(frozen=True)
class Pull:
    """One disk to read.  `bitmap` None: all that is allocated counts as dirty.

    `also(low, high)` gives further extents to copy (the deltas of marks since the parent), `extra_dirty(low, high)`
    extents that count as dirty though the bitmap does not know them: they are copied and in D(j); None: there are none.
    `delta` gets D(j) as EXTENT arrays and `contents` the runs stored as CONTENT arrays, both in ascending offset.  Sizes
    in bytes.
    """

    target: str
    source: Endpoint
    capacity: int
    bitmap: Optional[str]
    copy: str
    expected: int
    sink: Optional[Sink]
    also: Optional[changes.Find]
    delta: Callable[[extents.Extents], None]
    contents: Callable[[extents.Extents], None]
    extra_dirty: Optional[changes.Find] = None


@dataclass(frozen=True)
class Pulled:
    """Bytes: of D(j), stored as data, stored as zero, read over NBD; and how often the source was connected again."""

    target: str
    dirty_bytes: int
    data_bytes: int
    zero_bytes: int
    read_bytes: int
    reconnects: int = 0


def always() -> bool:
    return True


def pull(
    pulls: Sequence[Pull],
    options: Options,
    *,
    progress: Callable[[str, int, int], None],
    stop: Callable[[], None],
    alive: Callable[[], bool] = always,
) -> List[Pulled]:
    """Reads all disks at once; when it returns everything is flushed and every connection is closed.

    A source whose connection is cut is connected again, `options.reconnects` times a disk, and read on, as long as
    `alive` says that the same job still exports it: a later one is another moment.  It is asked before and after each
    new connection.

    Errors: SourceLost, SourceStalled, SourceUnreadable, NbdError, RepositoryFull, RepositoryError; what `stop` and
    `alive` raise.
    """
    with ExitStack() as stack:
        disks = [_Disk(one, options, progress, alive) for one in pulls]
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
    def __init__(
        self, pull: Pull, options: Options, progress: Callable[[str, int, int], None], alive: Callable[[], bool]
    ) -> None:
        super().__init__(pull.target, options)
        self.pull, self._progress = pull, progress
        # Only of a full copy all has to be known that is allocated.
        apart = pull.bitmap is not None and pull.copy != ALL
        self._source = source.Source(pull.target, pull.source, pull.capacity, pull.bitmap, options, alive, apart=apart)
        self._survey: Union[changes.Changes, source.Survey]
        if apart:
            also = pull.also if pull.copy == DIRTY else None
            self._survey = changes.Changes(self._source, self._prepare, self._unreadable, extra=pull.extra_dirty, also=also)
        else:
            self._survey = source.Survey(self._source, WINDOW, self._learned, self._unreadable)
        self._sinks: List[client.Connection] = []
        self._tail = extents.empty()  # the delta's last extent, which may go on in the next window
        self._windows: Deque[_Window] = deque()
        self._flushed = False
        self._dirty = self._data = self._zero = self._read = 0

    def open(self, stop: Callable[[], None]) -> None:
        self._source.open(stop)
        if self.pull.sink:
            for endpoint in self.pull.sink.endpoints:
                self._sinks += client.connect(endpoint, 1, (), None, stop)

    def result(self) -> Pulled:
        return Pulled(self.target, self._dirty, self._data, self._zero, self._read, self._source.reconnects)

    @property
    def connections(self) -> List[client.Connection]:
        return [*self._source.connections, *self._sinks]

    @property
    def _read_all(self) -> bool:
        return self._survey.done and not self._windows and not self.busy

    @property
    def done(self) -> bool:
        return self._read_all and self._flushed

    def recover(self, lost: client.Lost, stop: Callable[[], None]) -> None:
        if lost.connection in self._sinks:
            raise self.lost(lost)
        self._source.reopen(str(lost), stop)

    def lost(self, gone: client.Lost) -> errors.CbtError:
        if self.pull.sink and gone.connection in self._sinks:
            return errors.RepositoryError(reason=f"the writer of {self.pull.sink.path} has gone: {gone}")
        return super().lost(gone)

    def stalled(self) -> errors.CbtError:
        if (
            self.pull.sink
            and any(c.in_flight for c in self._sinks)
            and not any(c.in_flight for c in self._source.connections)
        ):
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
        if sum(len(w.rows) - w.next for w in self._windows) <= AHEAD:
            self._survey.ask()

    def _learned(self) -> None:
        assert isinstance(self._survey, source.Survey)
        ready = self._survey.take(self._survey.whole)
        if len(ready.end):
            low, high = int(ready.start[0]), int(ready.end[-1])
            if self.pull.extra_dirty:
                ready = blockstatus.mark(ready, self.pull.extra_dirty(low, high))
            more = self.pull.also(low, high) if self.pull.also and self.pull.copy == DIRTY else extents.empty()
            self._prepare(ready, more)

    def _prepare(self, status: Status, also: extents.Extents) -> None:
        dirty = blockstatus.delta(status)
        if len(dirty):
            self._dirty += extents.total(dirty)
            joined = extents.coalesce(np.concatenate([self._tail, dirty]))
            self.pull.delta(joined[:-1])
            self._tail = joined[-1:]
        runs = self._to_copy(status, also)
        if len(runs):
            self._windows.append(_Window(runs))

    def _to_copy(self, status: Status, also: extents.Extents) -> extents.Extents:
        if self.pull.copy == NOTHING:
            return extents.empty()
        touched = blockstatus.covered(status, also) if self.pull.copy == DIRTY else None
        found = blockstatus.to_copy(status, touched, self.pull.capacity)
        return extents.split(found, self.options.request_size)

    # Data

    def _submit_one(self) -> bool:
        window = next((w for w in self._windows if w.next < len(w.rows)), None)
        if window is None or not self._sinks:
            return False
        row = window.next
        reads = window.rows["state"][row] != extents.ZERO
        if reads and self.rate.wait > 0:
            return False
        window.next += 1
        offset, length = int(window.rows["offset"][row]), int(window.rows["length"][row])
        self.busy += 1
        if reads:
            self.rate.spend(length)
            self._data += length
            self._read_run(window, row, offset, length)
        else:
            self._zero += length
            self._write_zeroes(window, offset, length)
        return True

    def _read_run(self, window: _Window, row: int, offset: int, length: int) -> None:
        buffer = self.take(-(-length // extents.GRAIN) * extents.GRAIN)
        view = memoryview(buffer)[:length]
        if length < len(buffer):
            buffer[length:] = bytes(len(buffer) - length)  # the last grain of the disk, padded

        def arrived(error: int) -> None:
            if error:
                self._unreadable(offset, length, error)
            self._read += length
            window.rows["digest"][row] = np.frombuffer(lanes.digest(view), np.uint8)
            as_it_is = len(self._sinks) > 1 and density.dense(buffer)
            self._sinks[-1 if as_it_is else 0].write(buffer, offset, lambda e: self._run_written(window, e, buffer))

        self._source.read(view, offset, arrived)

    def _write_zeroes(self, window: _Window, offset: int, length: int) -> None:
        padded = -(-length // extents.GRAIN) * extents.GRAIN
        piece = min(padded, lanes.ZERO_PIECE)

        def written(error: int) -> None:
            if error or piece == padded:
                self._run_written(window, error, None)
            else:
                self._write_zeroes(window, offset + piece, padded - piece)

        self._sinks[0].zero(piece, offset, written)

    def _run_written(self, window: _Window, error: int, buffer: Optional[bytearray]) -> None:
        if buffer is not None:
            self.give(buffer)
        self._written(error)
        if buffer is not None and self.pull.sink and self.pull.sink.behind:
            self.pull.sink.behind.wrote(len(buffer))
        window.open -= 1
        self._progress(self.target, self._data, max(self.pull.expected, self._data))
        while self._windows and not self._windows[0].open:
            self.pull.contents(self._windows.popleft().rows)

    def _written(self, error: int) -> None:
        self.busy -= 1
        if error:
            raise lanes.write_failed(self.pull.sink.path if self.pull.sink else "", error)

    def _unreadable(self, offset: int, length: int, error: int) -> None:
        raise self._source.unreadable(offset, length, error)
