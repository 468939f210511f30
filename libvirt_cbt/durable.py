"""Files that are whole after a power cut, below a root that is never left.

A path is walked from its root by directory descriptors and no symbolic link on
the way is followed (the root itself may be one: people do link a repository to
a larger disk).  Files are 0600 and directories 0700, whatever the umask.

The order is always: data, fsync of the file, rename, fsync of the directory.
A failed fsync is never repeated: after EIO the kernel may have dropped the
pages, and the next fsync would report success (PostgreSQL's lesson of 2018).

Every function takes `root`, the repository's directory (by default the one the
path lies in), and raises RepositoryFull, RepositoryDenied, RepositoryError, or
Damaged where a symbolic link or anything else odd stands in a file's place.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import contextmanager
from typing import Final, Iterator, List, Optional, Tuple

from libvirt_cbt import errors

FILE_MODE: Final = 0o600
DIR_MODE: Final = 0o700

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO in a file's place must not hold us up; it changes nothing for a regular file.
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_RENAME_NOREPLACE: Final = 1  # linux/fs.h


class Missing(errors.Damaged):
    """A file that has to be there is not."""


@contextmanager
def translated(path: str, root: str) -> Iterator[None]:
    """Turns OSError into the repository's errors; `path` is what was being used."""
    try:
        yield
    except OSError as e:
        raise _typed(e, path, root) from e


def _typed(e: OSError, path: str, root: str) -> errors.CbtError:
    reason = os.strerror(e.errno) if e.errno else str(e)
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return errors.RepositoryFull(repository=root, path=path)
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return errors.RepositoryDenied(repository=root, reason=f"{path}: {reason}")
    if e.errno in (errno.ELOOP, errno.ENOTDIR):
        return errors.Damaged(path=path, reason="a symbolic link or another kind of file stands in its place")
    if e.errno == errno.ENOENT:
        return Missing(path=path, reason="it is missing")
    return errors.RepositoryError(reason=f"cannot use {path}: {reason}")


def _parts(path: str, root: str) -> List[str]:
    if path == root:
        return []
    inside = path[len(root) :] if root == "/" else path[len(root) + 1 :]
    parts = inside.split("/")
    if os.path.join(root, inside) != path or any(part in {"", ".", ".."} for part in parts):
        raise ValueError(f"{path} does not lie below {root}")
    return parts


def _walk(path: str, root: str) -> int:
    fd = os.open(root, _DIRECTORY)
    for part in _parts(path, root):
        try:
            inner = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        finally:
            os.close(fd)
        fd = inner
    return fd


@contextmanager
def directory(path: str, *, root: Optional[str] = None) -> Iterator[int]:
    """A descriptor of the directory at `path`, for `dir_fd`."""
    root = root or path
    with translated(path, root):
        fd = _walk(path, root)
        try:
            yield fd
        finally:
            os.close(fd)


@contextmanager
def _parent(path: str, root: Optional[str]) -> Iterator[Tuple[int, str]]:
    above, name = os.path.split(path)
    with translated(path, root or above), directory(above, root=root) as fd:
        yield fd, name


def make_dir(path: str, *, root: Optional[str] = None, exist_ok: bool = False) -> bool:
    """Makes a directory and fsyncs the one it lies in; says whether it was made."""
    with _parent(path, root) as (fd, name):
        try:
            os.mkdir(name, DIR_MODE, dir_fd=fd)
        except FileExistsError:
            if not exist_ok:
                raise
            if not stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
            return False
        os.chmod(name, DIR_MODE, dir_fd=fd)  # mkdir's mode is cut by the umask
        os.fsync(fd)
        return True


def open_new(path: str, *, root: Optional[str] = None, mode: int = FILE_MODE, read: bool = False) -> int:
    """A descriptor of a file that did not exist; to write, and with `read` to read too."""
    with _parent(path, root) as (fd, name):
        flags = _NEW & ~os.O_WRONLY | os.O_RDWR if read else _NEW
        file = os.open(name, flags, mode, dir_fd=fd)
        try:
            os.fchmod(file, mode)
        except BaseException:
            os.close(file)
            raise
        return file


def write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def write_new(path: str, data: bytes, *, root: Optional[str] = None, mode: int = FILE_MODE) -> None:
    """Writes a file that did not exist and fsyncs it (its directory is the caller's to fsync)."""
    fd = open_new(path, root=root, mode=mode)
    with translated(path, root or os.path.dirname(path)):
        try:
            write_all(fd, data)
            os.fsync(fd)
        except BaseException:
            unlink(path, root=root)
            raise
        finally:
            os.close(fd)


def replace(path: str, data: bytes, *, root: Optional[str] = None) -> None:
    """Puts a file in the place of another: at every moment the old or the new one, whole."""
    with _beside(path, data, root) as (fd, new, name):
        os.rename(new, name, src_dir_fd=fd, dst_dir_fd=fd)
        os.fsync(fd)


def create(path: str, data: bytes, *, root: Optional[str] = None) -> None:
    """Like `replace` where nothing was before: whole or not there at all, and never over an existing file."""
    with _beside(path, data, root) as (fd, new, name):
        _rename_new(fd, new, fd, name)
        os.fsync(fd)


@contextmanager
def _beside(path: str, data: bytes, root: Optional[str]) -> Iterator[Tuple[int, str, str]]:
    with _parent(path, root) as (fd, name):
        new = f".{name}.{secrets.token_hex(4)}.new"
        fresh = os.path.join(os.path.dirname(path), new)
        write_new(fresh, data, root=root)
        try:
            yield fd, new, name
        except BaseException:
            try:
                os.unlink(new, dir_fd=fd)
            except FileNotFoundError:
                pass  # the rename was done, something after it failed
            raise


def fsync_dir(path: str, *, root: Optional[str] = None) -> None:
    with directory(path, root=root) as fd:
        os.fsync(fd)


def fsync_file(path: str, *, root: Optional[str] = None) -> int:
    """Fsyncs a file that another program wrote, makes it 0600, and says its size in bytes."""
    fd = open_regular(path, root=root)
    with translated(path, root or os.path.dirname(path)):
        try:
            os.fchmod(fd, FILE_MODE)
            os.fsync(fd)
            return os.fstat(fd).st_size
        finally:
            os.close(fd)


def publish(source: str, destination: str, *, root: str) -> None:
    """Gives a directory or file its final name, never over an existing one, and fsyncs both places."""
    with _parent(source, root) as (here, name), _parent(destination, root) as (there, published):
        _rename_new(here, name, there, published)


def settle(*paths: str, root: str) -> None:
    """Fsyncs directories after a rename between them; apart from `publish`, so that the two can fail apart."""
    for path in paths:
        fsync_dir(path, root=root)


def _rename_new(here: int, source: str, there: int, destination: str) -> None:
    """renameat2 with RENAME_NOREPLACE; plain rename takes the place of an empty directory without a word."""
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is not None:
        if not call(here, os.fsencode(source), there, os.fsencode(destination), ctypes.c_uint(_RENAME_NOREPLACE)):
            return
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(number, os.strerror(number))
    # No such call, or a file system (NFS) without the flag: our lock keeps other writers away in between.
    try:
        os.stat(destination, dir_fd=there, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(source, destination, src_dir_fd=here, dst_dir_fd=there)
    else:
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))


def unlink(path: str, *, root: Optional[str] = None, missing_ok: bool = False) -> None:
    with _parent(path, root) as (fd, name):
        try:
            os.unlink(name, dir_fd=fd)
        except FileNotFoundError:
            if not missing_ok:
                raise


def remove_tree(path: str, *, root: str, last: str = "") -> None:
    """Removes a directory below `root` (no error if it is gone); the file `last` in it goes after all the others.

    A crash half-way therefore leaves a directory that still says by `last` what it was.
    """
    if not _parts(path, root):
        raise ValueError("a root is not removed")
    try:
        with _parent(path, root) as (fd, name):
            for _, dirs, files, here in os.fwalk(name, topdown=False, onerror=_raise, dir_fd=fd):
                for file in files:
                    if file != last:
                        os.unlink(file, dir_fd=here)
                for inner in dirs:
                    # fwalk names a symbolic link to a directory a directory, but does not enter it
                    link = stat.S_ISLNK(os.stat(inner, dir_fd=here, follow_symlinks=False).st_mode)
                    (os.unlink if link else os.rmdir)(inner, dir_fd=here)
            if last:
                try:
                    os.unlink(os.path.join(name, last), dir_fd=fd)
                except FileNotFoundError:
                    pass
            os.rmdir(name, dir_fd=fd)
            os.fsync(fd)
    except Missing:
        return


def _raise(e: OSError) -> None:
    raise e


def open_regular(path: str, *, root: Optional[str] = None) -> int:
    """A descriptor to read a regular file; a symbolic link, FIFO or directory in its place is Damaged."""
    with _parent(path, root) as (fd, name):
        return open_at(fd, name, path)


def open_at(directory_fd: int, name: str, path: str) -> int:
    """As `open_regular`, in a directory that is open already; raises OSError too."""
    fd = os.open(name, _READ, dir_fd=directory_fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise errors.Damaged(path=path, reason="it is not a regular file")
    return fd


def read(path: str, *, root: Optional[str] = None, limit: int) -> bytes:
    """A whole file of at most `limit` bytes."""
    fd = open_regular(path, root=root)
    with translated(path, root or os.path.dirname(path)):
        return read_fd(fd, path, limit)


def read_fd(fd: int, path: str, limit: int) -> bytes:
    """Reads a descriptor to its end and closes it; raises OSError too."""
    with open(fd, "rb", buffering=0) as file:
        size = os.fstat(fd).st_size
        data = file.read(min(size, limit) + 1) if size <= limit else b""
        # One byte more than there should be was asked for: a regular file answers with all of it or less.
        if size > limit or len(data) != size:
            raise errors.Damaged(path=path, reason=f"it has {size} bytes, which is more than {limit} or more than it gives")
        return data
