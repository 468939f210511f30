"""One writer per domain: flock on a file that also says, for people, who holds it."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import sys
import time
from contextlib import contextmanager
from typing import Callable, Final, Iterator

from libvirt_cbt import durable, errors, names

ORPHANED_SECONDS: Final = 10.0


@contextmanager
def exclusive(
    path: str,
    repository: str,
    busy: Callable[[str], errors.CbtError],
    wait: float = 0,
    stop: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Holds the lock; the kernel lets go of it when the holder dies.

    Errors: what `busy` makes of the owner's name.
    `wait` is in seconds; `stop` is called ten times a second while waiting and may raise.  What a dead holder has
    started holds it, too, and ends by itself: that is waited for a moment.
    """
    with durable.explained(repository, path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, durable.FILE_MODE)
    try:
        begun = time.monotonic()
        while not _taken(fd, path, repository):
            stop()
            owner = os.pread(fd, 300, 0).decode(errors="replace").strip()
            if time.monotonic() - begun >= (max(wait, ORPHANED_SECONDS) if _dead(owner) else wait):
                raise busy(names.printable(owner) or "another process")
            time.sleep(0.1)
        _sign(fd)
        yield
    finally:
        os.close(fd)


def _dead(owner: str) -> bool:
    """Whether who signed was a process of this machine that is no more."""
    found = re.match(r"process (\d{1,9}) on (\S+) ", owner)
    return found is not None and found[2] == socket.gethostname() and not os.path.exists(f"/proc/{found[1]}")


def _sign(fd: int) -> None:
    # Not the whole command line: a URI in it may hold a password.
    command = os.path.basename(sys.argv[0]) or "python"
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = f"process {os.getpid()} on {socket.gethostname()} ({command}) since {since}"
    try:
        os.fchmod(fd, durable.FILE_MODE)
        os.ftruncate(fd, 0)
        os.pwrite(fd, text.encode(errors="replace"), 0)
    except OSError:
        pass  # for people only; on a full disk prune must still get the lock


def _taken(fd: int, path: str, repository: str) -> bool:
    with durable.explained(repository, path):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # Somebody who removed the file let another process lock a new one of that name.
        if not os.path.samestat(os.fstat(fd), os.lstat(path)):
            raise errors.RepositoryError(reason=f"{path} was removed while it was waited for; run it again")
    return True
