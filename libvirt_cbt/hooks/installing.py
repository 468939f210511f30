"""Puts hooks for libvirt and for oVirt's vdsm where they are called, takes them away again, and says which are there.

All of them only note what has happened, in the spool of one repository; `recover` and every backup look into it.
"""

from __future__ import annotations

import ast
import os
import pwd
from importlib import resources
from typing import Dict, Final, List, Optional, Tuple

from libvirt_cbt import errors, spool
from libvirt_cbt.actions import results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hooks import placed, units

DIRECTORIES: Final = {"libvirt": "/etc/libvirt/hooks/qemu.d", "vdsm": "/usr/libexec/vdsm/hooks"}
FOLDERS: Final = {"libvirt": spool.NEW, "vdsm": spool.VDSM}
# vdsm's scripts are the same for all; the name of the folder that one lies in tells it which event it is for.
EVENTS: Final = (
    "after_vm_start",
    "before_vm_migrate_source",
    "after_vm_migrate_source",
    "before_vm_migrate_destination",
    "after_vm_migrate_destination",
    "after_vm_destroy",
    "after_disk_hotplug",
    "after_disk_hotunplug",
)
USER: Final = "vdsm"
UNSET: Final = 'SPOOL = ""'


def install(
    session: Session,
    kind: str,
    *,
    directory: Optional[str] = None,
    spool_dir: Optional[str] = None,
    unit_dir: Optional[str] = None,
) -> results.HooksInstalled:
    """Installs the hooks of a kind, libvirt or vdsm, for the session's repository; safe to repeat.

    The default repository is made if need be.  `directory` is libvirt's qemu.d or vdsm's hooks, `unit_dir` where
    systemd's units go (None: where systemd looks, if it runs; "": nowhere).
    Errors: NotFound where there is no libvirt or vdsm; TargetExists for a file that is not ours; OutputFailed.
    """
    folder = _folder(kind, directory)
    owner = _vdsm() if kind == "vdsm" else None
    repository = session.repository(make=True)
    place = spool.place(repository.id, os.path.abspath(spool_dir) if spool_dir else None)
    text = _text(kind, os.path.join(place, FOLDERS[kind]))
    wanted: Dict[str, Tuple[str, int]] = dict.fromkeys(_scripts(kind, folder, repository.id), (text, 0o755))
    where = units.folder(unit_dir)
    for name, unit in units.texts(session, place).items() if where else ():
        wanted[os.path.join(str(where), name)] = (unit, 0o644)
    placed.require_free(wanted)
    with placed.writing(place):
        spool.make(place, FOLDERS[kind], owner)
    for path, (content, mode) in wanted.items():
        placed.write(path, content, mode)
    after = []
    if kind == "libvirt":
        after.append("restart libvirtd (or virtqemud) once, if it had no hook for QEMU when it was started; guests go on")
    if where:
        after.append(f"run `systemctl daemon-reload; systemctl enable --now {errors.argument(units.name(repository.id))}.path`")
    else:
        after.append("let a timer run `libvirt-cbt recover --noted`; without one each backup looks into what was noted")
    return results.HooksInstalled(kind, list(wanted), place, after)


def remove(
    session: Session, kind: str, *, directory: Optional[str] = None, unit_dir: Optional[str] = None
) -> results.HooksRemoved:
    """Takes the hooks of a kind away, with what they have noted, and with the last kind the units; others' files stay.

    Errors: NotFound; NoRepository; OutputFailed.
    """
    repository = session.repository()
    gone: List[str] = []
    places = {spool.place(repository.id)}
    for path in _scripts(kind, _folder(kind, directory), repository.id):
        found = _spool_of(kind, path)
        places |= {os.path.dirname(found)} if found else set()
        gone += placed.removed(path)
    left = False
    for place in places:
        with placed.writing(place):
            left = spool.drop(place, FOLDERS[kind]) or left
    where, unit = units.folder(unit_dir), units.name(repository.id)
    files: List[str] = []
    if where and not left:
        for suffix in ("path", "service"):
            files += placed.removed(os.path.join(where, f"{unit}.{suffix}"))
    after = [f"run `systemctl disable --now {errors.argument(unit)}.path; systemctl daemon-reload`"] if files else []
    return results.HooksRemoved(kind, gone + files, after)


def status(session: Session, kind: str, *, directory: Optional[str] = None) -> results.Hook:
    """Whether the hooks of a kind are there and as this release has them, and how much waits to be looked into."""
    repository = session.repository()
    try:
        scripts = _scripts(kind, _folder(kind, directory), repository.id)
    except errors.NotFound as e:
        return results.Hook(kind, "absent", str(e), [])
    there = [path for path in scripts if placed.ours(path)]
    if not there:
        return results.Hook(kind, "absent", f"`libvirt-cbt hooks install {errors.argument(kind)}` installs them", [])
    wrong = [f"{path} is missing" for path in scripts if path not in there]
    events = 0
    for path in there:
        found = _spool_of(kind, path)
        if not os.access(path, os.X_OK):
            wrong.append(f"{path} is not executable")
        if found is None:
            wrong.append(f"{path} is of another release")
        elif not os.path.isdir(found):
            wrong.append(f"{found} is missing, so nothing is noted")
        else:
            events = spool.count(os.path.dirname(found))
    if wrong:
        way = f"`libvirt-cbt hooks install {errors.argument(kind)}` mends it"
        return results.Hook(kind, "warning", "; ".join([*wrong, way]), there, events)
    return results.Hook(kind, "ok", f"{events} events wait" if events else "nothing waits", there, events)


def _folder(kind: str, directory: Optional[str]) -> str:
    folder = os.path.abspath(directory or DIRECTORIES[kind])
    host = os.path.dirname(folder) if kind == "libvirt" and not directory else folder
    host = os.path.dirname(host) if kind == "libvirt" else host
    if not os.path.isdir(host):
        raise errors.NotFound(reason=f"there is no {host}: this host has no {kind}; otherwise name the place by --directory")
    return folder


def _vdsm() -> Tuple[int, int]:
    try:
        found = pwd.getpwnam(USER)
    except KeyError:
        raise errors.NotFound(reason=f"there is no user '{USER}': this host has no vdsm") from None
    return found.pw_uid, found.pw_gid


def _scripts(kind: str, folder: str, repository: str) -> List[str]:
    if kind == "libvirt":
        return [os.path.join(folder, f"libvirt-cbt-{repository[:8]}")]
    return [os.path.join(folder, event, f"50_libvirt_cbt_{repository[:8]}") for event in EVENTS]


def _text(kind: str, place: str) -> str:
    name = {"libvirt": "qemu", "vdsm": "vdsm"}[kind]
    text = (resources.files("libvirt_cbt.hooks") / "files" / name).read_text(encoding="utf-8")
    return text.replace(UNSET, f"SPOOL = {place!r}")


def _spool_of(kind: str, path: str) -> Optional[str]:
    """Where an installed script notes; None for one that this release would not make."""
    text = placed.content(path)
    for line in text.splitlines():
        if line.startswith("SPOOL = "):
            try:
                found = str(ast.literal_eval(line[len("SPOOL = ") :]))
            except (ValueError, SyntaxError):
                return None
            return found if text == _text(kind, found) else None
    return None
