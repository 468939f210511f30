"""Where a disk may be restored to other than a new file: a block device, somebody's NBD export, standard output."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import stat
import struct
from contextlib import contextmanager
from typing import Any, Callable, Final, Iterator
from urllib.parse import parse_qs, unquote, urlsplit

from libvirt_cbt import errors, names
from libvirt_cbt.nbdio import check, client, imagelock
from libvirt_cbt.nbdio.server import Endpoint

BLKZEROOUT: Final = 0x127F
PIECE: Final = 1 << 20
STDOUT: Final = "standard output"


def parse(place: str) -> str:
    """What a place is: "device", "nbd" or "stdout".  Errors: Usage."""
    if place == "-":
        return "stdout"
    if re.match(r"[a-z][a-z0-9+.-]*:", place):
        endpoint(place)
        return "nbd"
    if not place.startswith("/"):
        raise errors.Usage(
            reason=f"{names.printable(place)!r} is neither the absolute path of a block device, nor an NBD URI, nor -"
        )
    return "device"


def endpoint(uri: str) -> Endpoint:
    """The export of nbd+unix:///NAME?socket=PATH.  Errors: Usage for any other URI.

    libnbd would follow what a URI says: another host without TLS, files with keys.  A socket of this machine has an
    owner and a mode.  https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md
    """
    parts = urlsplit(uri)
    try:
        query = parse_qs(parts.query, strict_parsing=True)
    except ValueError:
        query = {}
    socket = query.get("socket", [""])
    if parts.scheme != "nbd+unix" or parts.netloc or list(query) != ["socket"] or len(socket) != 1:
        raise errors.Usage(reason=f"an NBD target is nbd+unix:///EXPORT?socket=PATH, not {names.printable(uri)}")
    if not socket[0].startswith("/"):
        raise errors.Usage(reason=f"the socket's path is absolute, {names.printable(socket[0])!r} is not")
    return Endpoint(socket[0], unquote(parts.path[1:]))


@contextmanager
def nbd(uri: str, capacity: int, stop: Callable[[], None]) -> Iterator[check.Output]:
    """Somebody's export.  Errors: OutputFailed when it cannot be reached or is smaller than `capacity` bytes."""
    where = endpoint(uri)
    try:
        made = client.connect(where, 1, (), None, stop)
    except errors.NbdError as e:
        raise errors.OutputFailed(path=uri, reason=str(e.facts["reason"])) from None
    size = made[0].size
    client.close(made)
    _require_room(uri, size, capacity)
    yield check.Output(uri, endpoint=where, old=True)


@contextmanager
def device(path: str, capacity: int) -> Iterator[check.Output]:
    """A block device that nobody uses, synced at the end.

    Errors: TargetInUse; OutputFailed when it is no block device, or smaller than `capacity` bytes.
    """
    fd = _opened(path)
    try:
        imagelock.forbid(fd, path)
        _require_room(path, os.lseek(fd, 0, os.SEEK_END), capacity)

        def zero(offset: int, length: int) -> None:
            _zero(fd, offset, length)

        yield check.Output(path, fd=fd, zero=zero, old=True)
        try:
            os.fsync(fd)
        except OSError as e:
            raise errors.OutputFailed(path=path, reason=e.strerror) from None
    finally:
        os.close(fd)


def _opened(path: str) -> int:
    real = os.path.realpath(path)  # /dev/disk/by-id/... are links
    try:
        if not stat.S_ISBLK(os.stat(real).st_mode):
            raise errors.OutputFailed(path=path, reason="it is no block device; --output DIR makes files")
        # Without O_CREAT, O_EXCL asks the kernel for the device alone: open(2).
        return os.open(real, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as e:
        if e.errno == errno.EBUSY:
            reason = "it is mounted, swap, or part of LVM, RAID or the like; end that first"
            raise errors.TargetInUse(path=path, reason=reason) from None
        raise errors.OutputFailed(path=path, reason=e.strerror) from None


def _require_room(path: str, size: int, capacity: int) -> None:
    if size < capacity:
        raise errors.OutputFailed(path=path, reason=f"it has {size} bytes, the disk has {capacity}")


def _zero(fd: int, offset: int, length: int) -> None:
    try:
        fcntl.ioctl(fd, BLKZEROOUT, struct.pack("QQ", offset, length))
    except OSError:
        # Not whole sectors, or a driver without it.
        blank = bytes(min(PIECE, length))
        end = offset + length
        while offset < end:
            offset += os.pwrite(fd, memoryview(blank)[: end - offset], offset)


class Stream:
    """Pieces by ascending offset into a pipe, the gaps between them as zeroes."""

    def __init__(self, fd: int, stop: Callable[[], None]) -> None:
        self._fd, self._stop = fd, stop
        # A pipe takes so much without blocking once it is ready: a signal is seen although nobody reads.
        self._most = PIECE if stat.S_ISREG(os.fstat(fd).st_mode) else select.PIPE_BUF
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self.at = 0

    def put(self, piece: Any, offset: int) -> None:
        self.fill(offset)
        self._write(piece)

    def fill(self, offset: int) -> None:
        """Zeroes up to `offset`."""
        blank = memoryview(bytes(min(PIECE, max(0, offset - self.at))))
        while self.at < offset:
            self._write(blank[: offset - self.at])

    def _write(self, data: Any) -> None:
        left = memoryview(data)
        while left:
            self._stop()
            if self._poll.poll(200):
                count = os.write(self._fd, left[: self._most])
                left = left[count:]
                self.at += count


@contextmanager
def stream(fd: int, capacity: int, stop: Callable[[], None]) -> Iterator[check.Output]:
    """A descriptor that is written from its beginning to its end, as a raw image.  Errors: OutputFailed."""
    if os.isatty(fd):
        raise errors.Usage(reason="a disk is not for a terminal: send it into a file or a pipe")
    flow = Stream(fd, stop)
    yield check.Output(STDOUT, put=flow.put)
    try:
        flow.fill(capacity)
    except OSError as e:
        raise errors.OutputFailed(path=STDOUT, reason=e.strerror) from None
