"""What hooks have noted, until somebody looks into it: one empty file for each domain and kind of event.

    ROOT/<repository id>/new      by libvirt's hook, which runs as root
                        /vdsm     by vdsm's hooks, which run as user vdsm
                        /taken    events that are being looked into, or have to wait
                        /aside    what else was found in the first two

The file's name is UUID.KIND, its time the event's; what may be in it is never read.  Who wrote to a folder is not
trusted: names are checked, links are not followed, and of whatever does not look like an event nothing is removed.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Dict, Final, List, Optional, Tuple

from libvirt_cbt import folders, names

DEFAULT: Final = "/var/lib/libvirt-cbt-spool"
NEW, VDSM, TAKEN, ASIDE = "new", "vdsm", "taken", "aside"
# Kinds by folder.  What vdsm's user says can make us look, and no more than that.
LOOKS: Final = frozenset({"started", "stopped", "arriving", "leaving", "plugged", "unplugged"})
KINDS: Final[Dict[str, frozenset[str]]] = {NEW: LOOKS | {"crashed", "reverted"}, VDSM: LOOKS}
OVERFLOW: Final = "overflow"  # more domains than there is room for: all are looked at
BASE_MODE: Final = 0o711
MOST: Final = 5000  # names that are looked at at a time
EVENT: Final = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.([a-z]{1,16})")


@dataclass(frozen=True)
class Event:
    """`uuid` is None for the overflow; `time` is ISO 8601 UTC."""

    uuid: Optional[names.DomainUuid]
    kind: str
    time: str
    path: str

    def done(self) -> None:
        """Nobody needs it any more."""
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass  # another run was as quick


def root() -> str:
    """LIBVIRT_CBT_SPOOL_DIR, else the place of root's hooks."""
    return os.path.abspath(os.environ.get("LIBVIRT_CBT_SPOOL_DIR") or DEFAULT)


def place(repository: str, base: Optional[str] = None) -> str:
    """The spool of a repository, by its id."""
    return os.path.join(base or root(), repository)


def make(directory: str, folder: str, owner: Optional[Tuple[int, int]] = None) -> None:
    """The folders, of those that hooks write to NEW or VDSM; `owner` is the user and group of the hook.  Errors: OSError.

    Nobody but the owner may put an event into it, or look.  A base that is there already may be /srv or worse: it stays
    as it is, and has to be fit.
    """
    base = os.path.dirname(directory)
    if os.path.isdir(base):
        _require_fit(base, owner)
    else:
        folders.make(os.path.dirname(base), 0o755)
        _folder(base, BASE_MODE)
    _folder(directory, BASE_MODE)
    for name in (folder, TAKEN, ASIDE):
        _folder(os.path.join(directory, name), 0o700)
    if owner:
        os.chown(os.path.join(directory, folder), *owner, follow_symlinks=False)


def drop(directory: str, folder: str) -> bool:
    """Removes the folder that a hook has written to, with its events, and with the last of them the others.

    Whether hooks of another kind still note something here.  What is no event stays.  Errors: OSError.
    """
    _empty(os.path.join(directory, folder))
    if any(os.path.isdir(os.path.join(directory, name)) for name in KINDS):
        return True
    for name in (TAKEN, ASIDE):
        _empty(os.path.join(directory, name))
    _removed(directory)
    base = os.path.dirname(directory)
    if os.path.isdir(base) and stat.S_IMODE(os.stat(base).st_mode) == BASE_MODE:  # as we make it, and hardly anybody else
        _removed(base)
    return False


def _empty(folder: str) -> None:
    try:
        for entry in _entries(folder):
            if EVENT.fullmatch(entry.name) or entry.name == OVERFLOW:
                os.unlink(entry.path)
    except FileNotFoundError:
        return
    _removed(folder)


def _removed(folder: str) -> None:
    """If nothing is in it."""
    try:
        os.rmdir(folder)
    except OSError as e:
        if e.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY):
            raise


def count(directory: str) -> int:
    """How many events wait."""
    found = 0
    for name in (*KINDS, TAKEN):
        try:
            found += len(os.listdir(os.path.join(directory, name)))
        except OSError:
            continue
    return found


def _require_fit(base: str, owner: Optional[Tuple[int, int]]) -> None:
    status = os.stat(base)
    mode = status.st_mode
    if mode & 0o022 or status.st_uid not in (0, os.geteuid()):
        raise PermissionError(errno.EPERM, f"others may write to {base}; name another --spool-dir")
    if owner and not mode & 0o001:
        raise PermissionError(errno.EPERM, f"user {owner[0]} may not pass {base}; run `chmod o+x` on it")


def _folder(path: str, mode: int) -> None:
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode):
            raise
        if status.st_uid == os.geteuid():
            os.chmod(path, mode)
    else:
        os.chmod(path, mode)  # whatever the umask


def taken(directory: str) -> Tuple[List[Event], List[str]]:
    """Every event that is to be looked into, the newest of each kind, and sentences about what is wrong with the spool.

    They are moved first, so that one which comes meanwhile is another one.
    """
    complaints: List[str] = []
    for name, kinds in KINDS.items():
        try:
            _take(directory, name, kinds, complaints)
        except (FileNotFoundError, PermissionError):
            continue  # no such hook is installed, or it is root's and we are not
        except OSError as e:
            complaints.append(f"{os.path.join(directory, name)}: {e.strerror}")
    return _waiting(directory), complaints


def _take(directory: str, name: str, kinds: frozenset[str], complaints: List[str]) -> None:
    folder = os.path.join(directory, name)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or not _ours(os.lstat(directory)):
        complaints.append(f"{folder} is not looked into: it is a link, or others may write to what it lies in")
        return
    if name == NEW and not _ours(status):
        complaints.append(f"{folder} is not looked into: others may write to it")
        return
    for entry in _entries(folder):
        found = EVENT.fullmatch(entry.name)
        event = entry.is_file(follow_symlinks=False) and (
            entry.name == OVERFLOW or bool(found and found[2] in kinds)
        )
        try:
            os.rename(entry.path, os.path.join(directory, TAKEN if event else ASIDE, entry.name))
        except FileNotFoundError:
            continue  # another run was as quick
        except OSError as e:
            complaints.append(f"{names.printable(entry.path)} cannot be moved: {e.strerror}")


def _ours(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def _entries(folder: str) -> List[os.DirEntry[str]]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            found.append(entry)
            if len(found) >= MOST:
                break
    return found


def _waiting(directory: str) -> List[Event]:
    events = []
    try:
        entries = _entries(os.path.join(directory, TAKEN))
    except OSError:
        return []
    for entry in entries:
        found = EVENT.fullmatch(entry.name)
        try:
            when = datetime.fromtimestamp(entry.stat(follow_symlinks=False).st_mtime, timezone.utc)
        except (OSError, ValueError, OverflowError):
            continue  # another run was as quick, or a time that is none
        time = when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if found:
            events.append(Event(names.domain_uuid(found[1]), found[2], time, entry.path))
        elif entry.name == OVERFLOW:
            events.append(Event(None, OVERFLOW, time, entry.path))
    return sorted(events, key=lambda event: event.time)
