"""Compares disks at a fleecing point with what their backups show: the proof that no bitmap has missed a write.

`compare` is the path from the top.  Both sides' block status is asked in windows, as in a copy; then, per grain:

    wholly dirty, or known to differ          -> nothing: the copy reads it
    zero on both sides                        -> nothing: they are equal
    else                                      -> read both; equal, or the grain differs

Of a grain that is dirty in part the clean bytes are compared.
"""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Callable, Deque, Final, List, Optional, Sequence, Tuple

import numpy as np

from libvirt_cbt import errors, extents
from libvirt_cbt.nbdio import blockstatus, client, lanes, source
from libvirt_cbt.nbdio.blockstatus import Flags, Status, Stretches
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.nbdio.server import Endpoint

WINDOW: Final = source.WINDOW
AHEAD: Final = 1024  # pieces prepared before the next block status is asked for
WINDOWS: Final = 8  # on their way at once: a sparse disk has many without a piece


@dataclass(frozen=True)
class Compare:
    """One disk: its fleecing point `source`, and `chain`, which shows the backup below (zeroes behind its end).

    What `bitmap` marks (None: nothing) or `also(low, high)` names, ordered extents inside [low, high), is not looked at.
    `differs` gets the rest that differs as EXTENT arrays of whole grains in ascending offset, with the state that the
    source has.  Sizes in bytes.
    """

    target: str
    source: Endpoint
    chain: Endpoint
    capacity: int
    bitmap: Optional[str]
    also: Callable[[int, int], extents.Extents]
    differs: Callable[[extents.Extents], None]


@dataclass(frozen=True)
class Audit:
    """Bytes: compared (by reading or by block status), read of the source, in grains that differ, in those of them that
    the chain could not read; and how often the source was connected again.
    """

    target: str
    compared_bytes: int
    read_bytes: int
    differing_bytes: int
    unreadable_bytes: int
    reconnects: int = 0


def always() -> bool:
    return True


def compare(
    disks: Sequence[Compare],
    options: Options,
    *,
    progress: Callable[[str, int, int], None],
    stop: Callable[[], None],
    alive: Callable[[], bool] = always,
) -> List[Audit]:
    """Compares all disks at once; when it returns every connection is closed.  `progress` counts up to the capacity.

    `alive` is as for `copy.pull`.  A chain that cannot be read somewhere differs there.

    Errors: SourceLost, SourceStalled, SourceUnreadable, NbdError (also when the server of a chain goes); what `stop`
    and `alive` raise.
    """
    with ExitStack() as stack:
        audits = [_Audit(one, options, progress, alive) for one in disks]
        stack.callback(lanes.close, audits)
        for audit in audits:
            audit.open(stop)
        lanes.run(audits, stop)
        return [audit.result() for audit in audits]


class _Window:
    """The grains of one stretch of the disk; handed on as a whole when the last was compared."""

    def __init__(self, low: int, state: Flags, pieces: extents.Extents, covered: Stretches) -> None:
        self.low, self.state, self.pieces, self.covered = low, state, pieces, covered
        self.differs = np.zeros(len(state), np.bool_)
        self.next = 0
        self.open = len(pieces)


class _Audit(lanes.Lane):
    def __init__(
        self, disk: Compare, options: Options, progress: Callable[[str, int, int], None], alive: Callable[[], bool]
    ) -> None:
        super().__init__(disk.target, options)
        self.disk, self._progress = disk, progress
        self._source = source.Source(disk.target, disk.source, disk.capacity, disk.bitmap, options, alive)
        own = replace(options, connections=1, reconnects=0)
        self._chain = source.Source(disk.target, disk.chain, None, None, own, alive)
        self._shown = source.Survey(self._source, WINDOW, self._matched, self._unreadable)
        self._stored = source.Survey(self._chain, WINDOW, self._matched, _as_data)
        self._position = 0  # how far both sides are known
        self._windows: Deque[_Window] = deque()
        self._again: Deque[Tuple[_Window, int, int]] = deque()  # grains of a piece that the chain could not read whole
        self._tail = extents.empty()  # the last extent found, which may go on in the next window
        self._ended = False
        self._settled = self._compared = self._read = self._differing = self._damaged = 0

    def open(self, stop: Callable[[], None]) -> None:
        self._source.open(stop)
        self._chain.open(stop)

    def result(self) -> Audit:
        return Audit(self.target, self._compared, self._read, self._differing, self._damaged, self._source.reconnects)

    @property
    def connections(self) -> List[client.Connection]:
        return [*self._source.connections, *self._chain.connections]

    @property
    def done(self) -> bool:
        return self._ended

    def lost(self, gone: client.Lost) -> errors.CbtError:
        if gone.connection in self._chain.connections:
            return errors.NbdError(export=self.disk.chain.export, reason=f"the server of the backup has gone: {gone}")
        return super().lost(gone)

    def recover(self, lost: client.Lost, stop: Callable[[], None]) -> None:
        if lost.connection in self._chain.connections:
            raise self.lost(lost)
        self._source.reopen(str(lost), stop)

    def stalled(self) -> errors.CbtError:
        if not any(c.in_flight for c in self._source.connections):
            seconds = f"{self.options.stall_seconds:.0f}"
            return errors.NbdError(export=self.disk.chain.export, reason=f"the backup was not read for {seconds} s")
        return super().stalled()

    def advance(self) -> None:
        self._ask()
        while self.busy < self.options.requests and self.rate.wait <= 0 and self._submit_one():
            pass
        if self._position == self.disk.capacity and not self._windows:
            self._ended = True
            self.disk.differs(self._tail)

    # Block status

    def _ask(self) -> None:
        waiting = sum(len(w.pieces) - w.next for w in self._windows)
        if waiting > AHEAD or len(self._windows) >= WINDOWS or self._position == self.disk.capacity:
            return
        shown, stored = self._shown.position, self._stored_to(self._stored.position)
        # Only who is behind: what the other knows already is all that has to be kept.
        if shown <= stored:
            self._shown.ask()
        if stored <= shown:
            self._stored.ask()

    def _stored_to(self, known: int) -> int:
        """Of how much of the disk the chain's content is known, when this much of the chain is."""
        return self.disk.capacity if known == self._chain.size else min(known, self.disk.capacity)

    def _matched(self) -> None:
        low, high = self._position, min(self._shown.whole, self._stored_to(self._stored.whole))
        if high > low:
            self._position = high
            self._prepare(low, high, self._shown.take(high), self._stored.take(high))
            self._retire()

    def _prepare(self, low: int, high: int, shown: Status, stored: Status) -> None:
        also = extents.clip(self.disk.also(low, high), low, high)
        covered = blockstatus.covered(shown if self.disk.bitmap else None, also)
        state, cells = (extents.Cells(low, high, extents.GRAIN) for _ in range(2))
        for status, painted in ((shown, (state, cells)), (stored, (cells,))):
            filled = ~status.zero
            rows = extents.make(status.start[filled], (status.end - status.start)[filled], extents.DATA)
            for one in painted:
                one.paint(rows, extents.DATA)
        cells.paint(covered.whole_grains(low, self.disk.capacity), 0)
        pieces = extents.split(cells.extents(self.disk.capacity), self.options.request_size)
        self._windows.append(_Window(low, state.values == extents.DATA, pieces, covered))
        self._compared += high - low - covered.total
        self._settle_bytes(high - low - extents.total(pieces))

    # Data

    def _submit_one(self) -> bool:
        if self._again:
            self._compare(*self._again.popleft())
            return True
        window = next((w for w in self._windows if w.next < len(w.pieces)), None)
        if window is None:
            return False
        piece = window.pieces[window.next]
        window.next += 1
        self._compare(window, int(piece["offset"]), int(piece["length"]))
        return True

    def _compare(self, window: _Window, offset: int, length: int) -> None:
        assert self._chain.size is not None
        padded = -(-length // extents.GRAIN) * extents.GRAIN
        ours, theirs = self.take(padded), self.take(padded)
        stored = min(max(self._chain.size - offset, 0), length)
        ours[length:] = bytes(padded - length)
        theirs[stored:] = bytes(padded - stored)
        self.busy += 1
        self.rate.spend(length)
        missing, failed = 1 + bool(stored), False

        def arrived() -> None:
            nonlocal missing
            missing -= 1
            if not missing:
                self.busy -= 1
                self._judge(window, offset, length, None if failed else (ours, theirs))
                self.give(ours)
                self.give(theirs)

        def ours_arrived(error: int) -> None:
            if error:
                self._unreadable(offset, length, error)
            self._read += length
            arrived()

        def theirs_arrived(error: int) -> None:
            nonlocal failed
            failed = bool(error)
            arrived()

        # The chain first: its loss ends the audit, the source's does not, and must find both requests made.
        if stored:
            self._chain.read(memoryview(theirs)[:stored], offset, theirs_arrived)
        self._source.read(memoryview(ours)[:length], offset, ours_arrived)

    def _judge(self, window: _Window, offset: int, length: int, both: Optional[Tuple[bytearray, bytearray]]) -> None:
        first = (offset - window.low) // extents.GRAIN
        if both is None and length > extents.GRAIN:
            # Which grain it is: each by itself.
            pieces = [
                (o, min(extents.GRAIN, offset + length - o)) for o in range(offset, offset + length, extents.GRAIN)
            ]
            window.open += len(pieces) - 1
            self._again.extend((window, o, n) for o, n in pieces)
            return
        if both is None:
            window.differs[first] = True
            self._damaged += length
        elif both[0] != both[1]:
            unequal = np.frombuffer(both[0], np.uint8) != np.frombuffer(both[1], np.uint8)
            for start, end in window.covered.inside(offset, offset + length):
                unequal[start - offset : end - offset] = False
            found = unequal.reshape(-1, extents.GRAIN).any(axis=1)
            window.differs[first : first + len(found)] = found
        window.open -= 1
        self._settle_bytes(length)
        self._retire()

    def _settle_bytes(self, count: int) -> None:
        self._settled += count
        self._progress(self.target, self._settled, self.disk.capacity)

    def _retire(self) -> None:
        """Hands on the windows that are through, in their order."""
        while self._windows and not self._windows[0].open:
            window = self._windows.popleft()
            cells = extents.Cells(window.low, window.low + len(window.state) * extents.GRAIN, extents.GRAIN)
            states = np.where(window.state, extents.DATA, extents.ZERO)
            cells.values = np.where(window.differs, states, 0).astype(np.int32)
            rows = cells.extents(self.disk.capacity)
            self._differing += extents.total(rows)
            joined = extents.coalesce(np.concatenate([self._tail, rows]))
            self.disk.differs(joined[:-1])
            self._tail = joined[-1:]

    def _unreadable(self, offset: int, length: int, error: int) -> None:
        raise self._source.unreadable(offset, length, error)


def _as_data(_offset: int, _length: int, _error: int) -> None:
    """A chain whose map cannot be read is read: where that fails it differs."""
