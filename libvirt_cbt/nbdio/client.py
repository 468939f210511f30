"""Connections to NBD servers driven by a poll loop of our own.

The synchronous calls of libnbd hang with a stalled server, so none is used.
Callbacks only record (what they raise is lost, facts of libnbd): `aio_*` puts
its outcome into a queue, and everything is judged outside.
https://libguestfs.org/nbd.3.html, https://libguestfs.org/nbd_aio_pread.3.html
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections import deque
from typing import Any, Callable, Deque, Dict, Final, Iterable, List, Optional, Sequence, Tuple

from libvirt_cbt import errors
from libvirt_cbt.nbdio.server import Endpoint

try:
    import nbd
except ImportError:
    raise errors.ToolMissing(
        tool="libnbd's Python binding",
        package="python3-libnbd, and make the virtual environment with --system-site-packages",
    ) from None

CONNECT_SECONDS: Final = 30.0
GOODBYE_SECONDS: Final = 5.0
SILENT_SECONDS: Final = 30
TURN_SECONDS: Final = 0.2  # how long one turn waits at most: `stop` is asked that often

Finished = Callable[[int], None]  # called in the loop, never by libnbd, with an errno or 0


class Lost(Exception):
    """The peer has gone."""

    def __init__(self, connection: Connection, reason: str) -> None:
        super().__init__(reason)
        self.connection = connection


class Unmade(Exception):
    """A connection could not be made; `hopeless`: nobody listens there or answers, so asking again is of no use."""

    def __init__(self, reason: str, error: int = 0) -> None:
        super().__init__(reason)
        self.errno = error
        self.hopeless = error in (errno.ENOENT, errno.ECONNREFUSED, errno.ETIMEDOUT)

    def error(self, endpoint: Endpoint) -> errors.CbtError:
        """What to tell of it."""
        if endpoint.server is None:
            return errors.NbdError(export=endpoint.export, reason=str(self))
        from libvirt_cbt.nbdio import proof

        return proof.explained(endpoint.server, str(self), self.errno)


class Connection:
    """One handle; requests are counted, finished ones wait in a queue until `settle` is called."""

    def __init__(self, endpoint: Endpoint, contexts: Sequence[str], stop: Callable[[], None]) -> None:
        self.endpoint = endpoint
        self.in_flight = 0
        self.short = False  # nothing but short answers are awaited: all that have come are taken at once
        self._finished: Deque[Tuple[Finished, int]] = deque()
        self._handle: Any = nbd.NBD()
        try:
            self._handle.set_export_name(endpoint.export)
            self._handle.set_pread_initialize(False)  # every error is judged, so nothing stale is ever taken for data
            for context in contexts:
                self._handle.add_meta_context(context)
            _connect(self._handle, endpoint)
            deadline = time.monotonic() + CONNECT_SECONDS
            while self._handle.aio_is_connecting():
                stop()
                if time.monotonic() > deadline:
                    raise Unmade("the server does not answer", errno.ETIMEDOUT)
                turn([self])
            self.size = int(self._handle.get_size())  # raises when the server refused us
            if endpoint.server:
                _keep_alive(int(self._handle.aio_get_fd()))
            if self.size < 0:
                raise Unmade("the server names an impossible size")
            # QEMU cuts the connection at the first unreadable sector of a reply in several chunks; of a reply that may
            # not be fragmented it says which request failed (nbd/server.c, nbd_do_cmd_read).  All we read is data.
            self._read_flags = int(nbd.CMD_FLAG_DF) if self._handle.can_df() else 0
            self.can_zero = bool(self._handle.can_zero())
            self._chunks = bool(self._handle.get_structured_replies_negotiated())
            extended = getattr(self._handle, "get_extended_headers_negotiated", None)
            self.extended = bool(extended and extended())  # lengths of 64 bits: libnbd 1.18 and QEMU 8.2
            self.contexts = frozenset(c for c in contexts if self._handle.can_meta_context(c))
        except BaseException as e:
            # Dropped here, not when the error has been handled: its traceback holds this frame, and a socket that is
            # still open keeps QEMU from ending the job.
            self.drop()
            if isinstance(e, nbd.Error):
                raise Unmade(_sentence(e), e.errnum) from None
            if isinstance(e, Lost):
                raise Unmade(str(e)) from None
            raise

    def read(self, buffer: Any, offset: int, done: Finished) -> None:
        """`done` gets EPROTO when the server says that all is well without having given every byte once.

        libnbd 1.14 lets a reply in chunks leave bytes out: what was in the buffer before would be taken for data.
        """
        where = nbd.Buffer.from_buffer(buffer)
        if not self._chunks:
            self._submit(self._handle.aio_pread, (where, offset), done)
            return
        length = len(buffer)
        found: Deque[Tuple[int, int]] = deque(maxlen=length)  # there need be no end of chunks

        def chunk(piece: Any, at: int, _status: int, _error: Any) -> int:
            found.append((at, len(piece)))
            return 0

        def arrived(error: int) -> None:
            done(error or (0 if _whole(found, offset, length) else errno.EPROTO))

        self._submit(self._handle.aio_pread_structured, (where, offset, chunk), arrived, self._read_flags)

    def write(self, buffer: Any, offset: int, done: Finished) -> None:
        self._submit(self._handle.aio_pwrite, (nbd.Buffer.from_buffer(buffer), offset), done)

    def zero(self, length: int, offset: int, done: Finished) -> None:
        self._submit(self._handle.aio_zero, (length, offset), done)

    def flush(self, done: Finished) -> None:
        self._submit(self._handle.aio_flush, (), done)

    def block_status(self, length: int, offset: int, done: Callable[[int, Dict[str, List[int]]], None]) -> None:
        """`done` gets an errno and, per context, the flat list of lengths and flags."""
        found: Dict[str, List[int]] = {}

        def extent(context: str, _offset: int, entries: List[int], _error: Any) -> int:
            found.setdefault(context, entries)  # a second chunk for a context would break the protocol
            return 0

        call = getattr(self._handle, "aio_block_status_64", None)
        if call is None:
            self._submit(self._handle.aio_block_status, (length, offset, extent), lambda e: done(e, found))
            return

        def extent_64(context: str, _offset: int, entries: List[Tuple[int, int]], _error: Any) -> int:
            found.setdefault(context, [number for pair in entries for number in pair])
            return 0

        self._submit(call, (length, offset, extent_64), lambda e: done(e, found))

    def _submit(self, call: Callable[..., Any], args: Tuple[Any, ...], done: Finished, flags: int = 0) -> None:
        finished = self._finished

        def completion(error: Any) -> int:
            finished.append((done, getattr(error, "value", error)))
            return 1  # retires the command

        try:
            call(*args, completion=completion, flags=flags)
        except nbd.Error as e:
            raise Lost(self, _sentence(e)) from None
        self.in_flight += 1

    def settle(self) -> int:
        """Hands out what has finished; the number of requests that had."""
        count = 0
        while self._finished:
            done, error = self._finished.popleft()
            self.in_flight -= 1
            count += 1
            done(error)
        return count

    def notify(self, events: int) -> None:
        try:
            direction = self._handle.aio_get_direction()
            if events & (select.POLLIN | select.POLLHUP) and direction & nbd.AIO_DIRECTION_READ:
                finished = len(self._finished)
                self._handle.aio_notify_read()  # one answer at most
                while self.short and finished < len(self._finished) < self.in_flight:
                    finished = len(self._finished)
                    self._handle.aio_notify_read()  # where nothing has come it does nothing
            elif events & select.POLLOUT and direction & nbd.AIO_DIRECTION_WRITE:
                self._handle.aio_notify_write()
            elif events & (select.POLLERR | select.POLLNVAL | select.POLLHUP):
                raise Lost(self, "the connection was reset")
            if not self._handle.aio_get_direction() and self.gone:  # asked only where nothing is awaited: two calls less
                raise Lost(self, "the connection was closed")
        except nbd.Error as e:
            raise Lost(self, _sentence(e)) from None

    def interest(self) -> Tuple[int, int]:
        """(file descriptor, poll events).  Errors: Lost, when sending a request was what found the peer gone."""
        direction = self._handle.aio_get_direction()
        if not direction and self.gone:
            raise Lost(self, "the connection was closed")
        events = select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0
        return int(self._handle.aio_get_fd()), events | (select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0)

    @property
    def gone(self) -> bool:
        return bool(self._handle.aio_is_closed() or self._handle.aio_is_dead())

    def say_goodbye(self) -> None:
        try:
            self._handle.aio_disconnect()
        except nbd.Error:
            pass  # it is gone already

    def drop(self) -> None:
        """Frees the handle, and with it the buffers of requests that a hanging server still has.

        Nothing is written into them from here on: libnbd has no thread, it writes only when `notify` lets it.
        """
        self._handle = None  # the binding has no close(): the last reference is what holds the socket open
        self._finished.clear()


def _connect(handle: Any, endpoint: Endpoint) -> None:
    """Begins it.  By TCP nothing is said in the clear, and the certificate must be for the host's name."""
    if endpoint.server is None:
        handle.aio_connect_unix(endpoint.socket)
        return
    handle.set_tls(nbd.TLS_REQUIRE)
    handle.set_tls_verify_peer(True)
    handle.set_tls_certificates(endpoint.server.certificates)
    handle.aio_connect_tcp(endpoint.server.host, str(endpoint.server.port))


def _keep_alive(fd: int) -> None:
    """A peer that is silent because the way to it was cut is given up after SILENT_SECONDS."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_SECONDS // 2)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENT_SECONDS // 6)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_SECONDS * 1000)


def turn(connections: Sequence[Connection], timeout: float = TURN_SECONDS) -> int:
    """Waits until something moves on any connection, and lets it; on how many it did.  Errors: Lost."""
    poller = select.poll()
    by_fd: Dict[int, Connection] = {}
    for connection in connections:
        fd, events = connection.interest()
        by_fd[fd] = connection
        poller.register(fd, events)
    moving = poller.poll(timeout * 1000)
    for fd, events in moving:
        by_fd[fd].notify(events)
    return len(moving)


def connect(
    endpoint: Endpoint, count: int, contexts: Sequence[str], capacity: Optional[int], stop: Callable[[], None]
) -> List[Connection]:
    """`count` connections to one export.  Errors: NbdError also when its size is not `capacity` bytes."""
    try:
        return attempt(endpoint, count, contexts, capacity, stop)
    except Unmade as e:
        raise e.error(endpoint) from None


def attempt(
    endpoint: Endpoint, count: int, contexts: Sequence[str], capacity: Optional[int], stop: Callable[[], None]
) -> List[Connection]:
    """The same for a caller who may try again.  Errors: Unmade, NbdError when the size is not `capacity` bytes."""
    made: List[Connection] = []
    try:
        for _ in range(count):
            made.append(Connection(endpoint, contexts, stop))
            if capacity is not None and made[-1].size != capacity:
                raise errors.NbdError(
                    export=endpoint.export, reason=f"it has {made[-1].size} bytes where {capacity} were expected"
                )
    except BaseException:
        close(made)
        raise
    return made


def version() -> str:
    """libnbd's."""
    return str(nbd.NBD().get_version())


def close(connections: Sequence[Connection]) -> None:
    """Says goodbye (NBD_CMD_DISC) on all and waits a little: a job must not be ended under a connected client."""
    for connection in connections:
        connection.say_goodbye()
    deadline = time.monotonic() + GOODBYE_SECONDS
    while time.monotonic() < deadline:
        left = [c for c in connections if not c.gone]
        if not left:
            break
        try:
            turn(left)
        except Lost:
            pass  # that is the goodbye
    for connection in connections:
        connection.drop()


def _whole(pieces: Iterable[Tuple[int, int]], offset: int, length: int) -> bool:
    """Whether (offset, length) pieces are the whole of a stretch, each byte once."""
    end = offset
    for at, size in sorted(pieces):
        if at != end:
            return False
        end += size
    return end == offset + length


def _sentence(error: Any) -> str:
    return str(error.string or os.strerror(error.errnum or errno.EIO))
