"""Incremental backups of KVM guests by changed-block tracking.

>>> import libvirt_cbt
>>> with libvirt_cbt.Session(repository="/backups") as session:  # doctest: +SKIP
...     made = libvirt_cbt.backup(session, "web1")
...     libvirt_cbt.restore(session, "web1", "/tmp/web1", at=made.backup)

Every verb of the command line is a function here: it takes a `Session` first
and returns a frozen dataclass of `libvirt_cbt.actions.results`.  Failures are
`libvirt_cbt.errors.CbtError`.  Sizes are bytes, durations seconds, times ISO
8601 in UTC.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from libvirt_cbt.actions.backup import backup
    from libvirt_cbt.actions.boot import boot, discard
    from libvirt_cbt.actions.changed import changed
    from libvirt_cbt.actions.doctor import doctor
    from libvirt_cbt.actions.heatmap import heatmap
    from libvirt_cbt.actions.in_place import restore_in_place
    from libvirt_cbt.actions.init import init
    from libvirt_cbt.actions.listing import generations, show
    from libvirt_cbt.actions.mark import mark
    from libvirt_cbt.actions.protect import protect, unprotect
    from libvirt_cbt.actions.prune import prune
    from libvirt_cbt.actions.recover import recover
    from libvirt_cbt.actions.report import report
    from libvirt_cbt.actions.restore import restore
    from libvirt_cbt.actions.serve import serve
    from libvirt_cbt.actions.session import Session, Watch
    from libvirt_cbt.actions.start import start
    from libvirt_cbt.actions.status import status
    from libvirt_cbt.actions.stop import stop
    from libvirt_cbt.actions.untrack import untrack
    from libvirt_cbt.actions.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Session",
    "Watch",
    "backup",
    "boot",
    "changed",
    "discard",
    "doctor",
    "generations",
    "heatmap",
    "init",
    "mark",
    "protect",
    "prune",
    "recover",
    "report",
    "restore",
    "restore_in_place",
    "serve",
    "show",
    "start",
    "status",
    "stop",
    "unprotect",
    "untrack",
    "verify",
]

_HOME = {
    "Session": "session",
    "Watch": "session",
    "discard": "boot",
    "generations": "listing",
    "restore_in_place": "in_place",
    "show": "listing",
    "unprotect": "protect",
}


VERBS = frozenset(__all__) - {"Session", "Watch"}


def __getattr__(name: str) -> Any:
    # Verbs are imported when they are first used: `--version` and completion stay quick.
    if name not in __all__:
        raise AttributeError(name)
    found = getattr(importlib.import_module(f"libvirt_cbt.actions.{_HOME.get(name, name)}"), name)
    if name not in VERBS:
        return found
    from libvirt_cbt.hooks import entrypoints

    return entrypoints.around(name, found)
