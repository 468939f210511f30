"""Folders that nobody can exchange under us, whatever the umask.

What lies in a folder that everybody may write to can be renamed away, and a link put in its place between two steps of
ours; only the sticky bit forbids it (unlink(2), rename(2)).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final, Iterator, List, Optional, Tuple

from libvirt_cbt import errors

LINKS: Final = 40  # the kernel follows no more
WHOLE: Final = "0 0 4294967295"  # /proc/self/uid_map where every user of the machine is known
REMOTE: Final = ("nfs", "cifs", "smb", "9p", "virtiofs", "ceph", "fuse", "glusterfs", "lustre", "afs")
UNKNOWN: Final = 65534  # whoever a user namespace, or a file server, has no number for


def exposed(path: str) -> Optional[str]:
    """Why somebody else could put another thing in the place of `path` or of a folder above it; None where nobody can.

    What does not exist yet is as safe as the folder in which it will be made.  Errors: OSError.
    """
    for place, status in _steps(path):
        mode = status.st_mode
        if stat.S_ISLNK(mode) and not _trusted(status) and os.stat(os.path.dirname(place)).st_mode & stat.S_IWOTH:
            return f"{place} is a link of user {status.st_uid}"  # fs.protected_symlinks, proc_sys_fs(5)
        if stat.S_ISDIR(mode) and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"everybody may write to {place} and rename what is in it; run `chmod o-w {errors.argument(place)}`"
    return None


def foreign(path: str) -> Optional[str]:
    """Why a folder is not ours alone to arrange: as `exposed`, or it belongs to somebody else; None for one to be made."""
    reason = exposed(path)
    if reason is not None or not os.path.lexists(path):
        return reason
    status = os.stat(path)
    return None if _trusted(status) or _remote(status.st_dev) else f"{path} belongs to user {status.st_uid}"


def make(path: str, mode: int, *, exact: bool = True) -> None:
    """A folder of this mode if there is none, and what is missing above it, 0755: never writable for others.

    Not `exact`: less whatever the umask takes away.  Errors: OSError.
    """
    missing: List[str] = []
    at = path
    while not os.path.isdir(at):
        missing.append(at)
        at = os.path.dirname(at)
    for place in reversed(missing):
        try:
            os.mkdir(place, 0o700 if exact else 0o755)
        except FileExistsError:
            continue  # another run of ours was quicker
        if exact:
            os.chmod(place, mode if place == path else 0o755)


def root(path: str) -> None:
    """A folder in which ours are made, each with a random name: to be passed through by others, not listed: 0711.

    Errors: OSError; PermissionError with the reason where somebody else could exchange what is in it.
    """
    reason = foreign(path)
    if reason:
        raise PermissionError(errno.EACCES, reason)
    make(path, 0o711)


def _trusted(status: os.stat_result) -> bool:
    """Whether the owner is root or we, or cannot be known here."""
    return status.st_uid in (0, os.geteuid()) or (status.st_uid == UNKNOWN and not _everybody_known())


def _remote(device: int) -> bool:
    """Whether a file server decides who the owner is: NFS makes root another user (root_squash)."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            mounts = [line.split() for line in file]
    except OSError:
        return False
    return any(m[2] == wanted and m[m.index("-") + 1].startswith(REMOTE) for m in mounts)


def _everybody_known() -> bool:
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            return " ".join(file.read().split()) == WHOLE
    except OSError:
        return True


def _steps(path: str) -> Iterator[Tuple[str, os.stat_result]]:
    """Every folder and link that the kernel goes through on the way to an absolute path, and what is at its end."""
    at, links = "/", 0
    pending = path.split("/")[::-1]
    yield at, os.lstat(at)
    while pending:
        name = pending.pop()
        if name in ("", "."):
            continue
        place = os.path.dirname(at) if name == ".." else os.path.join(at, name)
        try:
            status = os.lstat(place)
        except (FileNotFoundError, NotADirectoryError):
            return
        yield place, status
        if not stat.S_ISLNK(status.st_mode):
            at = place
            continue
        links += 1
        if links > LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        target = os.readlink(place)
        at = "/" if target.startswith("/") else at
        pending += target.split("/")[::-1]
