"""Readers hold what they read: a shared flock on the manifest of each backup in the chain, for as long as they read.

Who changes or takes away a layer (prune) holds the same locks alone.  The kernel lets go of them when their holder has
died, however it dies, and every program that it started meanwhile: a server that has the layers open is killed with it,
but is not gone at that moment.  A manifest never changes and is never replaced, so its inode is the backup's; readers
need no right to write, and a running backup, which only adds, is in nobody's way.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from contextlib import ExitStack, contextmanager
from typing import Callable, Collection, Final, Iterator, List, Optional, Sequence, Set

from libvirt_cbt import durable, errors, names, processes
from libvirt_cbt.repository.store import DomainStore

PAUSE: Final = 0.05  # seconds between two tries
DYING_SECONDS: Final = 10.0  # within which the programs of a tool that was killed have ended, on a busy host, too


@contextmanager
def reading(
    kept: DomainStore, backup: str, targets: Sequence[str], stop: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Pins a backup and the chains below its disks `targets`; waits while a prune has one of them.

    Errors: NoSuchBackup when a prune took it away meanwhile; Damaged; what `stop` raises.
    """
    while True:
        with ExitStack() as stack:
            members = _members(kept, backup, targets)
            for one in sorted(members):
                _shared(kept, one, stack, stop)
            kept.refresh()
            # Asked again under the pins: a prune may have been through between looking and holding.
            if _members(kept, backup, targets) == members:
                yield
                return


@contextmanager
def one(kept: DomainStore, backup: str, stop: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Pins one backup by itself, for who reads layers alone."""
    with ExitStack() as stack:
        _shared(kept, backup, stack, stop)
        yield


@contextmanager
def changing(kept: DomainStore, backups: Collection[str]) -> Iterator[None]:
    """Nobody reads these backups meanwhile.  Errors: ChainPinned, at once."""
    with ExitStack() as stack:
        for backup in sorted(set(backups)):
            fd = _opened(kept, backup, stack)
            if not _taken(kept, fd, backup, fcntl.LOCK_EX):
                raise errors.ChainPinned(domain=names.printable(kept.name), backup=backup)
        yield


def outlive(kept: DomainStore, stop: Callable[[], None]) -> None:
    """Waits until nobody has any backup, but no longer than the programs of a killed prune may need to end."""
    deadline = time.monotonic() + DYING_SECONDS
    for backup in kept.ids():
        with ExitStack() as stack:
            try:
                fd = _opened(kept, backup, stack)
            except errors.Damaged:
                continue  # whoever needs it is told
            while not _taken(kept, fd, backup, fcntl.LOCK_EX):
                stop()
                if time.monotonic() > deadline:
                    return
                time.sleep(PAUSE)


def _members(kept: DomainStore, backup: str, targets: Sequence[str]) -> Set[str]:
    found = {backup}
    for target in targets:
        disk = kept.require(backup).disk(target)
        if disk is None or disk.mode == "mark":
            raise errors.NoSuchBackup(
                domain=names.printable(kept.name),
                point=f"{backup} of disk {names.printable(target)}",
                repository=kept.repository.path,
            )
        found.update(_below(kept, backup, target))
    return found


def _below(kept: DomainStore, backup: str, target: str) -> Iterator[str]:
    """The chain as far as it can be followed: of damage the reader tells, or salvages what is above it."""
    at: Optional[str] = backup
    seen: Set[str] = set()
    while at is not None and at not in seen:
        # Without a manifest there is nothing to hold; no prune changes such a layer.
        if _regular(os.path.join(kept.directory(at), "manifest.json")):
            yield at
        seen.add(at)
        try:
            entry = kept.layers(at).entry(target)
        except errors.CbtError:
            return
        at = entry.parent if entry else None


def _regular(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _opened(kept: DomainStore, backup: str, stack: ExitStack) -> int:
    path = os.path.join(kept.directory(backup), "manifest.json")
    flags: List[int] = [os.O_RDWR, os.O_RDONLY]  # NFS wants the right to write for an exclusive lock
    with durable.readable(kept.repository.path, path):
        for access in flags:
            try:
                fd = os.open(path, access | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
                break
            except OSError:
                if access == flags[-1]:
                    raise
    stack.callback(os.close, fd)
    stack.enter_context(processes.handed_on(fd))
    return fd


def _shared(kept: DomainStore, backup: str, stack: ExitStack, stop: Callable[[], None]) -> None:
    fd = _opened(kept, backup, stack)
    while not _taken(kept, fd, backup, fcntl.LOCK_SH):
        stop()
        time.sleep(PAUSE)


def _taken(kept: DomainStore, fd: int, backup: str, how: int) -> bool:
    with durable.explained(kept.repository.path, kept.directory(backup)):
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
