"""Reads stored runs back, each against its digest: restore and verify are this loop with and without an output."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Callable, Final, Iterator, List, Optional, Sequence, Tuple

from libvirt_cbt import errors
from libvirt_cbt.nbdio import client, lanes
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.nbdio.server import Endpoint
from libvirt_cbt.nbdio.writeback import WriteBack

ZEROES: Final = -1  # in the place of a layer's number


@dataclass(frozen=True)
class Read:
    """One run of layer number `layer`; `keep` are the absolute (offset, length) pieces of it to write.

    With ZEROES as the layer nothing is read: zeroes are written to the pieces.
    """

    layer: int
    offset: int
    length: int
    digest: bytes
    keep: Tuple[Tuple[int, int], ...]


@dataclass(frozen=True)
class Output:
    """Where restored bytes go: a file descriptor of a raw image, an NBD export, or whoever is called with each piece.

    `put(piece, offset)` and `zero(offset, length)` raise OSError; with one request in flight the pieces come in the
    order of the reads.  `old`: there is something in it already, so what is damaged must be zeroed, too.
    """

    path: str
    fd: Optional[int] = None
    endpoint: Optional[Endpoint] = None
    put: Optional[Callable[[Any, int], None]] = None
    zero: Optional[Callable[[int, int], None]] = None
    old: bool = False


def check(
    target: str,
    sources: Sequence[Endpoint],
    reads: Iterator[Read],
    output: Optional[Output],
    options: Options,
    *,
    damaged: Callable[[Read, str], None],
    progress: Callable[[str, int], None],
    stop: Callable[[], None],
) -> int:
    """Bytes read.  A run that cannot be read or has another digest is given to `damaged` and never written.

    Errors: NbdError, OutputFailed, SourceStalled, what `damaged` and `stop` raise.
    """
    with ExitStack() as stack:
        lane = _Check(target, sources, reads, output, options, damaged, progress)
        stack.callback(lane.close)
        lane.open(stop)
        lanes.run([lane], stop)
        return lane.bytes


class _Check(lanes.Lane):
    def __init__(
        self,
        target: str,
        sources: Sequence[Endpoint],
        reads: Iterator[Read],
        output: Optional[Output],
        options: Options,
        damaged: Callable[[Read, str], None],
        progress: Callable[[str, int], None],
    ) -> None:
        super().__init__(target, options)
        self._endpoints, self._reads, self._output = sources, reads, output
        self._damaged, self._progress = damaged, progress
        self._sources: List[client.Connection] = []
        self._sink: Optional[client.Connection] = None
        self._exhausted = self._flushed = False
        self._blank = bytearray()
        self._behind = WriteBack(output.fd) if output and output.fd is not None else None
        self.bytes = 0

    def open(self, stop: Callable[[], None]) -> None:
        for endpoint in self._endpoints:
            self._sources += client.connect(endpoint, 1, (), None, stop)
        if self._output and self._output.endpoint:
            [self._sink] = client.connect(self._output.endpoint, 1, (), None, stop)

    def close(self) -> None:
        lanes.close([self])
        if self._behind:
            self._behind.close()

    @property
    def connections(self) -> List[client.Connection]:
        return [*self._sources, *([self._sink] if self._sink else [])]

    @property
    def done(self) -> bool:
        return self._exhausted and not self.busy and self._flushed

    def lost(self, gone: client.Lost) -> errors.CbtError:
        if self._output and gone.connection is self._sink:
            return errors.OutputFailed(path=self._output.path, reason=str(gone))
        return errors.NbdError(export=gone.connection.endpoint.export, reason=str(gone))

    def advance(self) -> None:
        while self.busy < self.options.requests and not self._exhausted and self.rate.wait <= 0:
            read = next(self._reads, None)
            if read is None:
                self._exhausted = True
            else:
                self._submit(read)
        if self._exhausted and not self.busy and not self._flushed:
            self._flushed = True
            if self._sink:
                self.busy += 1
                self._sink.flush(self._written)

    def _submit(self, read: Read) -> None:
        if read.layer == ZEROES:
            self._zero(read)
            return
        source = self._sources[read.layer]
        if read.length > lanes.LONGEST_RUN or read.offset + read.length > source.size:
            self._lost(read, "the layer is shorter than its contents say")
            return
        self.busy += 1
        self.rate.spend(read.length)
        buffer = self.take(read.length)

        def arrived(error: int) -> None:
            if error in lanes.GONE:
                raise client.Lost(source, os.strerror(error))
            self.busy -= 1
            if error:
                self._lost(read, os.strerror(error))
            elif lanes.digest(buffer) != read.digest:
                self._lost(read, "the digest does not match")
            else:
                self._write(read, buffer)
            self.bytes += read.length
            self._progress(self.target, self.bytes)

        source.read(buffer, read.offset, arrived)

    def _lost(self, read: Read, reason: str) -> None:
        self._damaged(read, reason)
        if self._output and self._output.old:
            self._zero(read)

    def _zero(self, read: Read) -> None:
        """The only requests beyond the bound of those in flight: they carry no data."""
        assert self._output is not None
        for start, length in read.keep:
            if self._sink is None:
                self._zero_file(start, length)
                continue
            longest = lanes.ZERO_PIECE if self._sink.can_zero else lanes.LONGEST_RUN
            self._blank = self._blank or bytearray(0 if self._sink.can_zero else longest)
            for offset in range(start, start + length, longest):
                piece = min(longest, start + length - offset)
                self.busy += 1
                if self._sink.can_zero:
                    self._sink.zero(piece, offset, self._written)
                else:
                    self._sink.write(memoryview(self._blank)[:piece], offset, self._written)

    def _zero_file(self, offset: int, length: int) -> None:
        assert self._output is not None
        assert self._output.zero is not None
        try:
            self._output.zero(offset, length)
        except OSError as e:
            raise errors.OutputFailed(path=self._output.path, reason=e.strerror) from None

    def _write(self, read: Read, buffer: bytearray) -> None:
        if self._output is None or not read.keep:
            self.give(buffer)
            return
        view = memoryview(buffer)
        pieces = [(view[o - read.offset : o - read.offset + n], o) for o, n in read.keep]
        if self._sink is None:
            for piece, offset in pieces:
                self._write_file(piece, offset)
            self.give(buffer)
            return
        left = len(pieces)

        def written(error: int) -> None:
            nonlocal left
            left -= 1
            if not left:
                self.give(buffer)
            self._written(error)

        for piece, offset in pieces:
            self.busy += 1
            self._sink.write(piece, offset, written)

    def _write_file(self, piece: Any, offset: int) -> None:
        assert self._output is not None
        try:
            if self._output.put:
                self._output.put(piece, offset)
                return
            assert self._output.fd is not None
            while piece:
                count = os.pwrite(self._output.fd, piece, offset)
                piece, offset = piece[count:], offset + count
                if self._behind:
                    self._behind.wrote(count)
        except OSError as e:
            raise errors.OutputFailed(path=self._output.path, reason=e.strerror) from None

    def _written(self, error: int) -> None:
        self.busy -= 1
        if error and self._output:
            raise errors.OutputFailed(path=self._output.path, reason=os.strerror(error))
