"""Carries runs of one layer over into another, each held against its digest: how layers are merged.

The layer written to goes on being what the backups above it see, so a place is only written that shows nothing yet, or
that a newer layer hides.  Per piece of a run, by what the layer has there already:

    nothing               -> write (or write zeroes)
    a cluster, the same   -> nothing: an earlier merge that was ended has written it
    a cluster, another    -> write zeroes, which lets go of it, then write: a cluster that is taken cannot be rewritten
                             with compressible data (EIO)

So what counts is whether there is a cluster, not whether it reads as zeroes: a writer that was killed may have given its
bytes back to the file system (they read as zeroes) before its table said so.
"""

from __future__ import annotations

import json
import os
from collections import deque
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Callable, Deque, Dict, Final, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from libvirt_cbt import errors, extents
from libvirt_cbt.nbdio import client, lanes, qcow2, server
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.nbdio.server import Endpoint

ALLOCATION: Final = "qemu:allocation-depth"  # 0: no cluster, for the layer is opened alone
STEP: Final = 1 << 30  # bytes of one question for block status
BATCHES: Final = 4  # on their way at once
# A table is written in slices of 4 KiB, not whole, for each time that something in it has changed; and what is known of
# the file's clusters, 64 KiB for each 2 GiB of it, is not written early for want of room.
# https://www.qemu.org/docs/master/interop/qcow2.html, docs/qcow2-cache.txt of QEMU's sources.
TABLES: Final = {"l2-cache-entry-size": 4096, "refcount-cache-size": 16 << 20}

Held = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Move:
    """A run of the layer that is read, with its digest; `pieces` are the absolute (offset, length) parts to carry over.

    Pieces begin on a grain, and end on one or with the run.
    """

    offset: int
    length: int
    state: int
    digest: bytes
    pieces: Tuple[Tuple[int, int], ...]


@dataclass(frozen=True)
class Batch:
    """What one stretch of the disk needs, and the CONTENT rows there that stay as they are."""

    moves: Sequence[Move]
    rows: extents.Extents


@dataclass(frozen=True)
class Output:
    """The layer written to; `path` is for messages."""

    endpoint: Endpoint
    path: str


@dataclass(frozen=True)
class Moved:
    """Bytes: read with their digests, written as data, written as zeroes, found there already."""

    read_bytes: int
    data_bytes: int
    zero_bytes: int
    same_bytes: int


@contextmanager
def output(layer: str, run_dir: str) -> Iterator[Output]:
    """A layer, alone and compressing, whose zeroed clusters are given back to the file system."""
    qcow2.refuse_external_data(layer)
    name = os.path.basename(layer).partition(".")[0]
    file = {"driver": "file", "filename": layer, "discard": "unmap"}
    node = {"driver": "qcow2", "backing": None, "discard": "unmap", "file": file, **TABLES}
    opened = {"driver": "compress", "discard": "unmap", "file": node}
    path = os.path.join(run_dir, f"merge-{name}.sock")
    argv = ["qemu-nbd", "--persistent", "--shared=8", "--cache=writeback", "--discard=unmap", "--export-name=layer"]
    argv.append("--allocation-depth")
    with server.running([*argv, f"--socket={path}", "json:" + json.dumps(opened)], path, [layer]):
        yield Output(Endpoint(path, "layer"), layer)


def move(
    target: str,
    source: Endpoint,
    sink: Optional[Output],
    batches: Iterator[Batch],
    options: Options,
    *,
    stored: Callable[[extents.Extents], None],
    damaged: Callable[[Move, str], None],
    progress: Callable[[int], None],
    stop: Callable[[], None],
    bare: bool = False,
    first: Iterable[Batch] = (),
) -> Moved:
    """Carries every piece over; `stored` gets the rows of the pieces and those of the batches in ascending offset.

    Without a `sink` the runs are only read, and their pieces get digests of their own.  When it returns all is flushed
    and every connection is closed.  `bare`: the layer has none below, so only what it has itself needs zeroes over it.
    All of `first` is done before the rest begins.
    `damaged` is told of a run that cannot be read or has another digest, and raises.
    Errors: RepositoryFull, RepositoryError, NbdError, SourceStalled; what `damaged` and `stop` raise.
    """
    with ExitStack() as stack:
        lane = _Merge(target, source, sink, [iter(first), batches], options, stored, damaged, progress, bare=bare)
        stack.callback(lanes.close, [lane])
        lane.open(stop)
        lanes.run([lane], stop)
        return lane.result()


@dataclass
class _Open:
    """A batch on its way; handed on in order when the last of it is in."""

    moves: Deque[Move]
    rows: extents.Extents
    left: int
    found: List[Tuple[int, int, int, bytes]] = field(default_factory=list)

    def all(self) -> extents.Extents:
        rows = np.zeros(len(self.found), extents.CONTENT)
        for number, (offset, length, state, digest) in enumerate(self.found):
            rows[number] = (offset, length, state, np.frombuffer(digest, np.uint8))
        every = np.concatenate([self.rows, rows])
        ordered: extents.Extents = every[np.argsort(every["offset"], kind="stable")]
        return ordered


class _Merge(lanes.Lane):
    def __init__(
        self,
        target: str,
        source: Endpoint,
        sink: Optional[Output],
        rounds: Sequence[Iterator[Batch]],
        options: Options,
        stored: Callable[[extents.Extents], None],
        damaged: Callable[[Move, str], None],
        progress: Callable[[int], None],
        *,
        bare: bool,
    ) -> None:
        super().__init__(target, options)
        self._endpoint, self._output, self._rounds = source, sink, deque(rounds)
        self._stored, self._damaged, self._progress, self._bare = stored, damaged, progress, bare
        self._source: Optional[client.Connection] = None
        self._sink: Optional[client.Connection] = None
        self._held: Held = np.zeros(0, np.bool_)
        self._surveyed = 0
        self._asked = False
        self._open: Deque[_Open] = deque()
        self._flushed = False
        self._read = self._data = self._zero = self._same = 0

    def open(self, stop: Callable[[], None]) -> None:
        [self._source] = client.connect(self._endpoint, 1, (), None, stop)
        if self._output:
            [self._sink] = client.connect(self._output.endpoint, 1, (ALLOCATION,), None, stop)
            if ALLOCATION not in self._sink.contexts:
                raise errors.NbdError(export=self._output.endpoint.export, reason=f"it does not offer {ALLOCATION}")
            self._held = np.zeros(-(-self._sink.size // extents.GRAIN), np.bool_)

    def result(self) -> Moved:
        return Moved(self._read, self._data, self._zero, self._same)

    @property
    def connections(self) -> List[client.Connection]:
        return [c for c in (self._source, self._sink) if c]

    @property
    def done(self) -> bool:
        return self._flushed and not self.busy

    def lost(self, gone: client.Lost) -> errors.CbtError:
        if self._output and gone.connection is self._sink:
            return errors.RepositoryError(reason=f"the writer of {self._output.path} has gone: {gone}")
        return errors.NbdError(export=gone.connection.endpoint.export, reason=str(gone))

    def advance(self) -> None:
        if self._sink and self._surveyed < self._sink.size:
            self._survey(self._sink)
            return
        while self.busy < self.options.requests:
            batch = next((b for b in self._open if b.moves), None)
            if batch:
                self._submit(batch, batch.moves.popleft())
            elif not self._next():
                break
        if not self._rounds and not self.busy and not self._flushed:
            self._flushed = True
            if self._sink:
                self.busy += 1
                self._sink.flush(self._answered)

    def _next(self) -> bool:
        """Opens another batch; whether there was one, or a round has ended."""
        if not self._rounds or len(self._open) >= BATCHES:
            return False
        batch = next(self._rounds[0], None)
        if batch:
            self._open.append(_Open(deque(batch.moves), batch.rows, len(batch.moves)))
            self._hand_on()
        elif self._open:
            return False
        else:
            self._rounds.popleft()
        return True

    def _hand_on(self) -> None:
        while self._open and not self._open[0].left:
            self._stored(self._open.popleft().all())

    # What the layer has

    def _survey(self, sink: client.Connection) -> None:
        if self._asked:
            return
        self._asked = True
        self.busy += 1
        low, length = self._surveyed, min(STEP, sink.size - self._surveyed)

        def learned(error: int, found: Dict[str, List[int]]) -> None:
            self._asked = False
            self.busy -= 1
            flat = found.get(ALLOCATION, [])
            if error or not flat or not all(flat[0::2]):
                reason = os.strerror(error) if error else "block status makes no progress"
                raise errors.NbdError(export=sink.endpoint.export, reason=reason)
            at = low
            for size, depth in zip(flat[0::2], flat[1::2]):
                if depth:
                    self._held[at // extents.GRAIN : -(-(at + size) // extents.GRAIN)] = True
                at += size
            self._surveyed = min(at, sink.size)

        sink.block_status(length, low, learned)

    # One run

    def _submit(self, batch: _Open, one: Move) -> None:
        if one.state == extents.ZERO:
            self._zeroes(batch, one)
            return
        source = self._source
        assert source is not None
        if one.length > lanes.LONGEST_RUN or one.offset + one.length > source.size:
            self._damaged(one, "the layer is shorter than its contents say")
        self.busy += 1
        buffer = self.take(one.length)

        def arrived(error: int) -> None:
            if error in lanes.GONE:
                raise client.Lost(source, os.strerror(error))
            if error:
                self._damaged(one, os.strerror(error))
            elif lanes.digest(buffer) != one.digest:
                self._damaged(one, "the digest does not match")
            self._read += one.length
            self._progress(self._read)
            self._carry(batch, one, buffer)

        source.read(buffer, one.offset, arrived)

    def _carry(self, batch: _Open, one: Move, buffer: bytearray) -> None:
        left = 1

        def written() -> None:
            nonlocal left
            left -= 1
            if not left:
                self.busy -= 1
                self.give(buffer)
                self._ended(batch)

        view = memoryview(buffer)
        for offset, length in one.pieces:
            piece = view[offset - one.offset : offset - one.offset + length]
            whole = (offset, length) == (one.offset, one.length)
            batch.found.append((offset, length, extents.DATA, one.digest if whole else lanes.digest(piece)))
            for low, high, held in self._parts(offset, length):
                left += 1
                data = bytearray(view[low - one.offset : min(high, offset + length) - one.offset])
                data.extend(bytes(high - low - len(data)))  # the last grain of a disk, padded
                self._place(data, low, written, held=held)
        written()

    def _parts(self, offset: int, length: int) -> List[Tuple[int, int, bool]]:
        """Whole grains of a piece, parted by whether the layer has a cluster there; none without a layer to write to."""
        if not self._sink:
            return []
        first, last = offset // extents.GRAIN, -(-(offset + length) // extents.GRAIN)
        flags = self._held[first:last]
        edges = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), last - first]
        return [
            ((first + low) * extents.GRAIN, (first + high) * extents.GRAIN, bool(flags[low]))
            for low, high in zip(edges, edges[1:])
        ]

    def _place(self, data: bytearray, offset: int, then: Callable[[], None], *, held: bool) -> None:
        sink = self._sink
        assert sink is not None

        def write() -> None:
            self._data += len(data)
            sink.write(data, offset, self._judged(then))

        if not held:
            write()
            return
        there = bytearray(len(data))

        def compared(error: int) -> None:
            if error in lanes.GONE:
                raise client.Lost(sink, os.strerror(error))
            # A writer that was killed may leave clusters that cannot be decompressed: they are another content.
            if not error and there == data:
                self._same += len(data)
                then()
            else:
                sink.zero(len(data), offset, self._judged(write))

        sink.read(there, offset, compared)

    def _zeroes(self, batch: _Open, one: Move) -> None:
        self.busy += 1
        pieces = [(offset, length) for offset, length in one.pieces]
        batch.found += [(offset, length, extents.ZERO, bytes(32)) for offset, length in pieces]
        parts: List[Tuple[int, int]] = []
        for offset, length in pieces:
            for low, high, held in self._parts(offset, length):
                if held or not self._bare:
                    steps = range(low, high, lanes.ZERO_PIECE)
                    parts += [(at, min(lanes.ZERO_PIECE, high - at)) for at in steps]

        def following() -> None:
            if not parts:
                self.busy -= 1
                self._ended(batch)
                return
            offset, length = parts.pop(0)
            self._zero += length
            self._held[offset // extents.GRAIN : -(-(offset + length) // extents.GRAIN)] = False
            assert self._sink is not None
            self._sink.zero(length, offset, self._judged(following))

        following()

    def _ended(self, batch: _Open) -> None:
        batch.left -= 1
        self._hand_on()

    def _judged(self, then: Callable[[], None]) -> Callable[[int], None]:
        def answered(error: int) -> None:
            if error:
                raise lanes.write_failed(self._output.path if self._output else "", error)
            then()

        return answered

    def _answered(self, error: int) -> None:
        self.busy -= 1
        self._judged(lambda: None)(error)
