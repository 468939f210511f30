"""Which scripts of an administrator there are, and which of them may be run."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from typing import Dict, Final, List, Optional, Tuple

from libvirt_cbt import names

PHASES: Final = (
    "preflight",
    "pre-freeze",
    "post-freeze",
    "post-thaw",
    "ready",
    "disk-done",
    "committed",
    "failed",
    "lineage-reset",
)
NAME: Final = re.compile(r"[0-9]{2}_[A-Za-z0-9_-]+")  # as run-parts: no 10_x.dpkg-old, no 10_x~
OTHERS_WRITE: Final = 0o022


@dataclass(frozen=True)
class Found:
    """Absolute paths by phase, in the order in which they run; and a sentence about each thing that is not run."""

    directory: str
    scripts: Dict[str, Tuple[str, ...]] = field(default_factory=dict)
    refused: Tuple[str, ...] = ()


def directory() -> str:
    """LIBVIRT_CBT_HOOKS_DIR, else /etc/libvirt-cbt/hooks.d for root and libvirt-cbt/hooks.d in the user's configuration."""
    asked = os.environ.get("LIBVIRT_CBT_HOOKS_DIR")
    if asked:
        return os.path.abspath(asked)
    if os.geteuid() == 0:
        return "/etc/libvirt-cbt/hooks.d"
    configuration = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(configuration, "libvirt-cbt", "hooks.d")


def find(root: str) -> Found:
    """What is in hooks.d.  Whoever could write to a script, or put another in its place, could run it as us."""
    try:
        entries = sorted(os.listdir(root))
    except (FileNotFoundError, NotADirectoryError):
        return Found(root)
    except OSError as e:
        return Found(root, refused=(f"no script is run: {root}: {e.strerror}",))
    path = os.path.realpath(root)
    while True:
        reason = _unsafe_directory(path, sticky=path != os.path.realpath(root))
        if reason:
            return Found(root, refused=(f"no script of {root} is run: {path} {reason}",))
        if path == "/":
            break
        path = os.path.dirname(path)
    scripts: Dict[str, Tuple[str, ...]] = {}
    refused: List[str] = []
    for entry in entries:
        phase = os.path.join(root, entry)
        if entry in PHASES:
            found = _phase(phase, refused)
            if found:
                scripts[entry] = found
        elif os.path.isdir(phase):
            refused.append(f"{_shown(phase)} is not looked into: no phase is called so ({', '.join(PHASES)})")
    return Found(root, scripts, tuple(refused))


def _phase(folder: str, refused: List[str]) -> Tuple[str, ...]:
    reason = _unsafe_directory(folder, sticky=False)
    if reason:
        refused.append(f"no script of {folder} is run: it {reason}")
        return ()
    found = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if not NAME.fullmatch(name):
            continue  # a README, or what an editor or a package left beside a script
        reason = _unsafe(path)
        if reason:
            refused.append(f"{path} is not run: it {reason}")
        elif os.access(path, os.X_OK):
            found.append(path)
    return tuple(found)


def _unsafe_directory(path: str, *, sticky: bool) -> Optional[str]:
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        return "is no directory"
    if sticky and status.st_mode & stat.S_ISVTX:
        return None if status.st_uid in (0, os.geteuid()) else f"belongs to user {status.st_uid}"
    return _writable(status)


def _unsafe(path: str) -> Optional[str]:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file (links are not followed)"
    return _writable(status)


def _writable(status: os.stat_result) -> Optional[str]:
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & OTHERS_WRITE:
        return f"may be written by others (mode {stat.S_IMODE(status.st_mode):04o}); run `chmod go-w` on it"
    return None


def _shown(path: str) -> str:
    return names.printable(path)
