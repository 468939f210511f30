"""Writes that survive a crash, and errors of the file system as sentences.

Order is the caller's: files first, then the directory that names them, then the
rename that publishes them.  A failed fsync is never tried again: after it the
kernel may have dropped the very pages that it could not write.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager, suppress
from typing import Callable, Final, Iterator, Optional

from libvirt_cbt import errors

FILE_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o700
FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
# Missing, something else in its place, or what the medium or the file system no longer gives back.
_LOST: Final = (
    errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EIO, errno.EBADMSG, errno.EUCLEAN,
)  # fmt: skip


@contextmanager
def explained(repository: str, path: str) -> Iterator[None]:
    """OSError inside becomes RepositoryFull, RepositoryDenied or RepositoryError."""
    try:
        yield
    except OSError as e:
        reason = e.strerror or str(e)
        if e.errno in FULL:
            raise errors.RepositoryFull(repository=repository, path=path) from None
        if e.errno in _DENIED:
            way_out = _way_out(repository, e.errno)
            raise errors.RepositoryDenied(repository=repository, reason=f"{path}: {reason}{way_out}") from None
        raise errors.RepositoryError(reason=f"repository {repository}: {path}: {reason}") from None


def _way_out(repository: str, number: Optional[int]) -> str:
    if number == errno.EROFS:
        return "; it has to be mounted for writing"
    try:
        owner = os.stat(repository).st_uid
    except OSError:
        return ""
    return "" if owner == os.geteuid() else f"; run this as {f'user {owner}' if owner else 'root'}"


@contextmanager
def readable(repository: str, path: str) -> Iterator[None]:
    """A published file that is missing, no file, or not given back by its medium is damage, not a failed call."""
    with explained(repository, path):
        try:
            yield
        except OSError as e:
            if e.errno not in _LOST:
                raise
            raise errors.Damaged(path=path, reason=e.strerror) from None


def make_directory(path: str) -> None:
    """A new directory of mode 0700 whatever the umask, durable in its parent."""
    os.mkdir(path, DIRECTORY_MODE)
    os.chmod(path, DIRECTORY_MODE)
    sync_directory(os.path.dirname(path))


def ensure_directory(path: str) -> None:
    """As make_directory, for one that may be there already (and then is a directory, not a link to one)."""
    try:
        make_directory(path)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise


def create(path: str) -> int:
    """A descriptor of a new file, mode 0600; never an existing file, never through a link."""
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    os.fchmod(fd, FILE_MODE)
    return fd


def write_new(path: str, data: bytes) -> None:
    """A new file with its content on disk; its name is durable once the directory is synced."""
    fd = create(path)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def begin_new(path: str, data: bytes) -> int:
    """A new file whose content the kernel begins to write out; the descriptor is for the caller to sync and close.

    Of several such files the first sync finds most of all their work done: one commit of the journal, not one each.
    """
    fd = create(path)
    try:
        write_all(fd, data)
        with suppress(OSError):  # advice
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except BaseException:
        os.close(fd)
        raise
    return fd


def write_all(fd: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def replace(path: str, data: bytes, *, durably: bool = True) -> None:
    """The file holds either the old or the new content at every moment, the new one durably on return.

    Not `durably`: a power cut may bring the old content back.
    """
    part = f"{path}.new"
    try:
        os.unlink(part)  # left by a crash before the rename
    except FileNotFoundError:
        pass
    try:
        write_new(part, data)
    except OSError:
        if os.path.lexists(part):
            os.unlink(part)  # on a full disk it must not keep what little it got
        raise
    os.rename(part, path)
    if durably:
        sync_directory(os.path.dirname(path))


def sync_file(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(source: str, destination: str, *, done: Callable[[], None] = lambda: None) -> None:
    """Renames a directory to a name that does not exist, durably in both parents: the commit point of a backup.

    `done` is called once the new name is seen, before the fsyncs: should these fail, it is published all the same.
    """
    if os.path.lexists(destination):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), destination)
    os.rename(source, destination)
    done()
    sync_directory(os.path.dirname(destination))
    sync_directory(os.path.dirname(source))


def read(path: str, limit: int) -> bytes:
    """A small regular file, not through a link.  Errors: OSError; ValueError when it is longer than `limit` bytes."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        data = file.read(min(status.st_size, limit) + 1)  # Python makes room for as much as is asked for
        if len(data) > status.st_size:
            data += file.read(max(0, limit + 1 - len(data)))
    if len(data) > limit:
        raise ValueError(f"it is longer than {limit} bytes")
    return data


def require_directory(path: str) -> None:
    """A directory itself, not a link to one.  Errors: Damaged; FileNotFoundError when there is none."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise errors.Damaged(path=path, reason="it is not a directory but a link or a file")


def require_regular(path: str) -> None:
    """A layer goes to qemu by its path: a link would lead it elsewhere.  Whether it is there, its user will see."""
    try:
        regular = stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    if not regular:
        raise errors.Damaged(path=path, reason="it is not a regular file")


def remove_directory(path: str, last: str = "") -> None:
    """Removes a flat directory of ours with the files in it; links are removed, not followed.

    The file `last` goes after all others: a crash half-way leaves a directory that still says what it was.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # By this descriptor: a link that takes the directory's place meanwhile leads nobody to another's files.
        for name in sorted(os.listdir(fd), key=lambda name: name == last):
            os.unlink(name, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(path)
    sync_directory(os.path.dirname(path))
