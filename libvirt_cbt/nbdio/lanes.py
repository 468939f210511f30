"""One poll loop for all disks, and what its lanes have in common.

A lane is one disk's work: `advance` submits as many requests as its bounds
allow and judges what has finished; the loop waits for any of them to move.
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Callable, Dict, Final, List, Optional, Sequence

import blake3

from libvirt_cbt import durable, errors, extents
from libvirt_cbt.nbdio import client

ZERO_PIECE: Final = 1 << 30  # NBD lengths have 32 bits
POOL: Final = 64
LONGEST_RUN: Final = 1 << 20  # of data, with one digest
STOP_SECONDS: Final = 0.02  # how often `stop` is asked: it looks at files and pipes, a turn may take microseconds
BURST_SECONDS: Final = 0.1  # of unused bandwidth that may be made up for
READING: Final = 24  # requests where nothing is written: QEMU takes 16 of a connection at once, and finds the next there
LONGEST_TURN: Final = 1.0  # seconds of one that count as waiting
SLOWEST: Final = extents.GRAIN  # bytes a second
GONE: Final = (errno.ENOTCONN, errno.ESHUTDOWN, errno.EPIPE, errno.ECONNRESET)  # the server went, not the sector


@dataclass(frozen=True)
class Options:
    """Bounds of the copy.

    Bytes a request, requests in flight a disk, connections a disk, seconds without progress, how often the connections
    of a disk are made again after they were cut, and bytes a second that all disks together read (None: no limit).
    """

    request_size: int = 256 * 1024
    requests: int = 8
    connections: int = 1
    stall_seconds: float = 300.0
    reconnects: int = 3
    bandwidth: Optional[int] = None

    def __post_init__(self) -> None:
        if not extents.GRAIN <= self.request_size <= LONGEST_RUN or self.request_size % extents.GRAIN:
            raise errors.Usage(reason="--request-size is a multiple of 64 KiB, at most 1 MiB")
        if not 1 <= self.requests <= 256 or not 1 <= self.connections <= 16:
            raise errors.Usage(reason="--requests is 1 to 256 and --connections 1 to 16")
        if not 0 <= self.reconnects <= 100:
            raise errors.Usage(reason="a lost connection is made again 0 to 100 times")
        if self.bandwidth is not None and self.bandwidth < SLOWEST:
            raise errors.Usage(reason="--bandwidth is at least 64K, bytes a second")


class Rate:
    """Spreads reads over time: what is read now decides when the next read may begin."""

    def __init__(self, bandwidth: Optional[int]) -> None:
        self._bandwidth = bandwidth
        self._free = time.monotonic()  # when all that was read so far is paid for

    @property
    def wait(self) -> float:
        """Seconds until the next read may begin; 0 or less: now."""
        return self._free - time.monotonic() if self._bandwidth else 0.0

    def spend(self, count: int) -> None:
        """`count` bytes are being read."""
        if self._bandwidth:
            self._free = max(self._free, time.monotonic() - BURST_SECONDS) + count / self._bandwidth


class Lane(ABC):
    """Buffers, slots and the clock of one disk."""

    def __init__(self, target: str, options: Options) -> None:
        self.target, self.options = target, options
        self.rate = Rate(options.bandwidth)  # `run` gives all its lanes one
        self.busy = 0  # slots taken
        self.waited = 0.0  # seconds, for whatever is in flight
        self._pool: Dict[int, List[bytearray]] = {}

    @property
    @abstractmethod
    def connections(self) -> List[client.Connection]:
        """All that are open; those that were dropped are not among them."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Nothing is left to do."""

    @abstractmethod
    def advance(self) -> None:
        """Submits what may be submitted."""

    def recover(self, lost: client.Lost, stop: Callable[[], None]) -> None:
        """Goes on after the loss of a connection, or raises what it means."""
        raise self.lost(lost)

    def lost(self, gone: client.Lost) -> errors.CbtError:
        return errors.SourceLost(target=self.target, reason=str(gone))

    def stalled(self) -> errors.CbtError:
        return errors.SourceStalled(target=self.target, seconds=self.options.stall_seconds)

    def settle(self) -> None:
        if sum(c.settle() for c in self.connections) or not any(c.in_flight for c in self.connections):
            self.waited = 0.0

    def take(self, size: int) -> bytearray:
        kept = self._pool.get(size)
        return kept.pop() if kept else bytearray(size)

    def give(self, buffer: bytearray) -> None:
        kept = self._pool.setdefault(len(buffer), [])
        if len(kept) < POOL:
            kept.append(buffer)


def least_busy(connections: Sequence[client.Connection]) -> client.Connection:
    return connections[0] if len(connections) == 1 else min(connections, key=lambda c: c.in_flight)


def close(lanes: Sequence[Lane]) -> None:
    client.close([connection for lane in lanes for connection in lane.connections])


def run(lanes: Sequence[Lane], stop: Callable[[], None]) -> None:
    """Turns until every lane is done.  Errors: what `stop` or a lane raises; SourceLost, SourceStalled."""
    for lane in lanes:
        lane.rate = lanes[0].rate  # the limit is for all of them together
    asked = 0.0
    for number in itertools.count():
        if time.monotonic() - asked >= STOP_SECONDS:
            stop()
            asked = time.monotonic()
        # Each in its turn is the first: where the bandwidth is limited, the first one takes what there is.
        first = number % max(len(lanes), 1)
        for lane in (*lanes[first:], *lanes[:first]):
            _step(lane, stop)
            if lane.waited > lane.options.stall_seconds and not lane.done:
                raise lane.stalled()
        if all(lane.done for lane in lanes):
            return
        begun = time.monotonic()
        _turn(lanes, stop)
        # Whoever stopped us for an hour did not stall the server; one whose bytes come and finish nothing has.
        passed = min(time.monotonic() - begun, LONGEST_TURN)
        for lane in lanes:
            lane.waited += passed


def _step(lane: Lane, stop: Callable[[], None]) -> None:
    try:
        lane.settle()
        if not lane.done:
            lane.advance()
        return
    except client.Lost as gone:
        lost = client.Lost(gone.connection, str(gone))
    # Out here, and without the exception's traceback: its frames hold the handle, which could not be freed.
    lane.recover(lost, stop)
    lane.waited = 0.0


def _turn(lanes: Sequence[Lane], stop: Callable[[], None]) -> None:
    wait = lanes[0].rate.wait
    timeout = min(wait, client.TURN_SECONDS) if wait > 0 else client.TURN_SECONDS
    try:
        client.turn([c for lane in lanes for c in lane.connections if c.in_flight], timeout)
        return
    except client.Lost as gone:
        lost = client.Lost(gone.connection, str(gone))
    owner = next(lane for lane in lanes if lost.connection in lane.connections)
    owner.recover(lost, stop)
    owner.waited = 0.0


def digest(data: Any) -> bytes:
    return blake3.blake3(data).digest()


def write_failed(path: str, error: int) -> errors.CbtError:
    """The typed error for a write that a sink refused."""
    if error in durable.FULL:
        return errors.RepositoryFull(repository=os.path.dirname(path), path=os.path.basename(path))
    return errors.RepositoryError(reason=f"cannot write {path}: {os.strerror(error)}")
