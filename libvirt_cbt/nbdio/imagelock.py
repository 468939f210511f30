"""QEMU's own lock on an image: who holds one has it open, and while we hold one nobody can open it for writing.

QEMU locks single bytes of the file, shared: 100 and on say what a user does, 200 and on what it forbids to others; bit
1 is writing, bit 3 resizing.  https://gitlab.com/qemu-project/qemu/-/blob/master/block/file-posix.c, RAW_LOCK_PERM_BASE
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import contextmanager
from typing import Final, Iterator, Optional

from libvirt_cbt import errors

FIRST: Final = 100
COUNT: Final = 200
FORBIDDEN: Final = (201, 203)
_FLOCK: Final = "hhqqi4x"  # struct flock of 64-bit Linux
_GETLK: Final = getattr(fcntl, "F_OFD_GETLK", 36)
_SETLK: Final = getattr(fcntl, "F_OFD_SETLK", 37)


def used(fd: int) -> Optional[bool]:
    """Whether a QEMU has the image open, for whatever; None where the file system knows no such locks."""
    wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, FIRST, COUNT, 0)
    try:
        answer = fcntl.fcntl(fd, _GETLK, wanted)
    except OSError:
        return None
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


@contextmanager
def held(path: str) -> Iterator[int]:
    """A descriptor of an image that nobody has open, with a lock that keeps every QEMU from writing to it.

    Errors: TargetInUse; OutputFailed when it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise errors.OutputFailed(path=path, reason=e.strerror) from None
    try:
        forbid(fd, path)
        yield fd
    finally:
        os.close(fd)  # and the lock goes


def forbid(fd: int, path: str) -> None:
    """Takes that lock.  Errors: TargetInUse when somebody has the image open."""
    try:
        for byte in FORBIDDEN:
            fcntl.fcntl(fd, _SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK):
            raise errors.TargetInUse(path=path, reason="a QEMU is just opening it") from None
    if used(fd):
        raise errors.TargetInUse(path=path, reason="a QEMU has it open (a guest, qemu-nbd, another restore); end that first")
