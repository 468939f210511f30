"""An export that is read, over connections that are made again when they are cut.

A fleecing point outlives its clients: while the same job exports it, a new
connection shows the same snapshot, and what was asked on the lost one is asked
again.  Whoever asked notices nothing.
"""

from __future__ import annotations

import os
import time
from functools import partial
from itertools import count
from typing import Any, Callable, Dict, Final, FrozenSet, List, Optional

from libvirt_cbt import errors, extents
from libvirt_cbt.nbdio import blockstatus, client, lanes
from libvirt_cbt.nbdio.blockstatus import Status
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.nbdio.server import Endpoint

WINDOW: Final = (1 << 32) - extents.GRAIN  # the longest length of a request without extended headers, in grains
LONG_WINDOW: Final = 1 << 40  # with them (QEMU 8.2, libnbd 1.18); an answer has 131072 extents at most all the same
FIRST_PAUSE: Final = 0.05  # seconds before the first reconnect; four times as long before each next one
LONGEST_PAUSE: Final = 2.0

Told = Callable[[int, Dict[str, List[int]]], None]
Send = Callable[[client.Connection, Callable[..., None]], None]


class Source:
    """All connections to one export of `capacity` bytes (None: whatever it has), and what is in flight on them.

    `alive` says that the job behind the socket is still the same: only then is a new connection the same moment.
    With `apart` the bitmap has a connection of its own for `marks`, and `block_status` does not tell of it: a server
    answers for all contexts of a connection or for none (block_status_filter: QEMU 8.2, libnbd 1.20).
    """

    def __init__(
        self,
        target: str,
        endpoint: Endpoint,
        capacity: Optional[int],
        bitmap: Optional[str],
        options: Options,
        alive: Callable[[], bool],
        *,
        apart: bool = False,
    ) -> None:
        self.target, self.endpoint, self.bitmap = target, endpoint, bitmap
        self._apart = apart
        self._readers: List[client.Connection] = []
        self._markers: List[client.Connection] = []
        self.reconnects = 0
        self.size = capacity
        self.window = WINDOW  # bytes that block status may be asked for at once
        self.contexts: FrozenSet[str] = frozenset()
        self._options, self._alive = options, alive
        self._numbers = count()
        self._unanswered: Dict[int, Callable[[], None]] = {}  # how to ask again, in the order asked

    @property
    def connections(self) -> List[client.Connection]:
        return [*self._readers, *self._markers]

    def open(self, stop: Callable[[], None]) -> None:
        """Errors: NbdError, also when there is no such bitmap; what `stop` raises."""
        try:
            self._connect(stop)
        except client.Unmade as e:
            raise e.error(self.endpoint) from None

    def _connect(self, stop: Callable[[], None]) -> None:
        marks = [self.bitmap] if self.bitmap else []
        wanted = [blockstatus.ALLOCATION, *([] if self._apart else marks)]
        self._readers = client.attempt(self.endpoint, self._options.connections, wanted, self.size, stop)
        offered = frozenset.intersection(*(c.contexts for c in self._readers))
        if self._apart:
            self._markers = client.attempt(self.endpoint, 1, marks, self._readers[0].size, stop)
            self._markers[0].short = True
            offered |= self._markers[0].contexts
        # The server leaves an unknown context out in silence; an increment without it would be empty.
        missing = sorted((self.contexts or frozenset([self.bitmap] if self.bitmap else [])) - offered)
        if missing:
            raise errors.NbdError(export=self.endpoint.export, reason=f"it does not offer '{missing[0]}'")
        self.contexts, self.size = offered, self._readers[0].size
        self.window = LONG_WINDOW if all(c.extended for c in self.connections) else WINDOW

    def read(self, buffer: Any, offset: int, done: Callable[[int], None]) -> None:
        """`done` gets an errno or 0, never one that means that the server went."""
        self._ask(lambda connection, answered: connection.read(buffer, offset, answered), done)

    def block_status(self, length: int, offset: int, done: Told) -> None:
        self._ask(lambda connection, answered: connection.block_status(length, offset, answered), done)

    def marks(self, length: int, offset: int, done: Told) -> None:
        """Block status of the bitmap alone."""
        self._ask(lambda connection, answered: connection.block_status(length, offset, answered), done, marks=True)

    def progress(self, status: Status, position: int) -> Status:
        """The same.  Errors: NbdError when there is nothing in it."""
        if not len(status.end):
            reason = f"block status makes no progress at offset {position}"
            raise errors.NbdError(export=self.endpoint.export, reason=reason)
        return status

    def _ask(self, send: Send, done: Callable[..., None], *, marks: bool = False) -> None:
        number = next(self._numbers)

        def again() -> None:
            connection = lanes.least_busy(self._markers if marks else self._readers)

            def answered(error: int, *found: Any) -> None:
                if error in lanes.GONE:
                    raise client.Lost(connection, os.strerror(error))
                del self._unanswered[number]
                done(error, *found)

            send(connection, answered)

        self._unanswered[number] = again
        again()

    def unreadable(self, offset: int, length: int, error: int) -> errors.CbtError:
        return errors.SourceUnreadable(target=self.target, offset=offset, length=length, reason=os.strerror(error))

    def reopen(self, reason: str, stop: Callable[[], None]) -> None:
        """New connections instead of the present ones, one of which was lost; what is unanswered is asked again.

        Errors: SourceLost when the server or its job has gone, or after the last of `Options.reconnects`; NbdError when
        the export is not what it was; what `alive` and `stop` raise.
        """
        while True:
            for connection in self.connections:
                connection.drop()
            self._readers, self._markers = [], []
            if self.reconnects >= self._options.reconnects:
                raise errors.SourceLost(target=self.target, reason=reason)
            self._pause(stop)
            self.reconnects += 1
            try:
                if not self._alive():
                    raise errors.SourceLost(target=self.target, reason=reason)
                self._connect(stop)
                # Once more: had another job taken the socket in between, it would be another moment.
                if not self._alive():
                    raise errors.SourceLost(target=self.target, reason=reason)
                for again in [*self._unanswered.values()]:
                    again()
                return
            except client.Unmade as e:
                if e.hopeless:
                    raise errors.SourceLost(target=self.target, reason=reason) from None
                reason = str(e)
            except client.Lost as e:
                reason = str(e)

    def _pause(self, stop: Callable[[], None]) -> None:
        end = time.monotonic() + min(FIRST_PAUSE * 4**self.reconnects, LONGEST_PAUSE)
        while (left := end - time.monotonic()) > 0:
            stop()
            time.sleep(min(left, client.TURN_SECONDS))


class Survey:
    """Block status of a source from its beginning on; what is known and was not yet taken is kept.

    `learned` is called after every answer.  `failed(offset, length, errno)` raises, or lets the stretch count as data.
    """

    def __init__(
        self, source: Source, window: int, learned: Callable[[], None], failed: Callable[[int, int, int], None]
    ) -> None:
        self.position = 0  # how far block status is known, bytes
        self.asking = False
        self._source, self._window, self._learned, self._failed = source, window, learned, failed
        self._kept: Optional[Status] = None

    @property
    def whole(self) -> int:
        """How far whole grains are known."""
        ended = self.position == self._source.size
        return self.position if ended else self.position // extents.GRAIN * extents.GRAIN

    @property
    def done(self) -> bool:
        return self.position == self._source.size

    def ask(self) -> None:
        """Asks for the next window, unless that is under way."""
        if self.asking or self.position == self._source.size:
            return
        assert self._source.size is not None
        length = min(self._window, self._source.size - self.position)
        if not self._source.contexts:  # no server of ours or libvirt's, but the protocol allows it
            self._learn(length, 0, {})
            return
        self.asking = True
        self._source.block_status(length, self.position, partial(self._learn, length))

    def _learn(self, length: int, error: int, found: Dict[str, List[int]]) -> None:
        self.asking = False
        allocation, dirty = None, None
        if error:
            self._failed(self.position, length, error)
        else:
            contexts, bitmap = self._source.contexts, self._source.bitmap
            allocation = found.get(blockstatus.ALLOCATION, []) if blockstatus.ALLOCATION in contexts else None
            dirty = found.get(bitmap, []) if bitmap else None
        status = self._source.progress(blockstatus.merge(self.position, length, allocation, dirty), self.position)
        self.position = int(status.end[-1])
        self._kept = status if self._kept is None else blockstatus.join([self._kept, status])
        self._learned()

    def take(self, at: int) -> Status:
        """The pieces before byte `at` that were not taken yet; it is known so far, or to the end of the source."""
        if self._kept is None:
            return blockstatus.merge(0, 0, None, None)
        ready, rest = self._kept.cut(at)
        self._kept = rest if len(rest.end) else None
        return ready
