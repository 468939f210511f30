"""Where a report goes: put in its place at once, over an older report only, readable by its owner unless changed.

A page names guests, disks, image paths and hosts, which the repository (0700) keeps to itself: so a new one is 0600.
Whoever lets a web server read it changes that once: the page that replaces it has the same mode and group.
"""

from __future__ import annotations

import os
import secrets
import stat
from typing import Final

from libvirt_cbt import durable, errors

MARK: Final = b'<meta name="generator" content="libvirt-cbt report">'
LOOK: Final = 4096  # bytes of an older page in which the mark must stand


def checked(path: str, repository: str, *, force: bool) -> str:
    """The absolute path, if a report may go there: nothing, an empty file, or an older report is there.

    With `force` any file or link is replaced.  Errors: Usage, OutputFailed.
    """
    path = os.path.abspath(path)
    # A prune or a verify must not stumble over it, and --force must not replace what a backup needs.
    inside = os.path.realpath(repository)
    if os.path.commonpath([inside, os.path.join(os.path.realpath(os.path.dirname(path)), "x")]) == inside:
        raise errors.Usage(reason=f"{path} lies inside the repository; put the report elsewhere")
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISDIR(mode):
            raise errors.Usage(reason=f"{path} is a directory; name a file in it")
        if not force and not (stat.S_ISREG(mode) and _ours(path)):
            raise errors.Usage(
                reason=f"{path} is there and is no report of libvirt-cbt; choose another name, or replace it with --force"
            )
    except FileNotFoundError:
        pass
    except OSError as e:
        raise errors.OutputFailed(path=path, reason=e.strerror) from None
    return path


def _ours(path: str) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        begin = file.read(LOOK)
    return not begin or MARK in begin


def replace(path: str, data: bytes) -> None:
    """A reader sees the old page or the new one, never a part.  Errors: OutputFailed."""
    part = os.path.join(os.path.dirname(path), f".{os.path.basename(path)[:100]}.{secrets.token_hex(8)}")
    try:
        try:
            fd = durable.create(part)
            try:
                durable.write_all(fd, data)
                _alike(path, fd)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(part, path)
        except OSError:
            if os.path.lexists(part):
                os.unlink(part)
            raise
        durable.sync_directory(os.path.dirname(path))
    except OSError as e:
        raise errors.OutputFailed(path=path, reason=e.strerror) from None


def _alike(path: str, part: int) -> None:
    try:
        before = os.lstat(path)
    except FileNotFoundError:
        return
    # Of somebody else's, in a directory that all may write to, neither mode nor group is what our user has chosen.
    if stat.S_ISREG(before.st_mode) and before.st_uid == os.geteuid():
        try:
            os.fchown(part, -1, before.st_gid)
        except PermissionError:
            return  # a group that we are not in (any more)
        os.fchmod(part, before.st_mode & 0o666)
