"""One writer per domain: flock on a file that also says, for people, who holds it."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from contextlib import contextmanager
from typing import Iterator

from libvirt_cbt import durable, errors, names


@contextmanager
def exclusive(path: str, repository: str, domain: str, wait: float = 0) -> Iterator[None]:
    """Holds the lock; the kernel lets go of it when the holder dies.  Errors: RepositoryBusy naming the owner."""
    with durable.explained(repository, path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, durable.FILE_MODE)
    try:
        deadline = time.monotonic() + wait
        while not _taken(fd):
            if time.monotonic() >= deadline:
                owner = names.printable(os.pread(fd, 300, 0).decode(errors="replace").strip()) or "another process"
                raise errors.RepositoryBusy(domain=domain, repository=repository, owner=owner)
            time.sleep(0.1)
        with durable.explained(repository, path):
            os.ftruncate(fd, 0)
            command = " ".join(sys.argv[:2]) or "python"
            since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            text = f"process {os.getpid()} on {socket.gethostname()} ({os.path.basename(command)}) since {since}"
            os.pwrite(fd, text.encode(errors="replace"), 0)
        yield
    finally:
        os.close(fd)


def _taken(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
