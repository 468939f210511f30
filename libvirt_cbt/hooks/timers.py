"""Puts the timer and the service of `run` where systemd looks for them, takes them away again, and says how they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Dict, Final, List, Mapping, Optional, Sequence

from libvirt_cbt import errors
from libvirt_cbt.actions import results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hooks import placed, units

SUFFIXES: Final = ("timer", "service")
DAILY: Final = "*-*-* 02:00:00"
# Where things are on this machine: what a shell says of it the service has to be told.
HANDED_ON: Final = ("LIBVIRT_CBT_RUN_DIR", "LIBVIRT_CBT_SPOOL_DIR", "LIBVIRT_CBT_HOOKS_DIR", "LIBVIRT_CBT_HOOKS_SECONDS")
ANALYZE_SECONDS: Final = 30


def name(repository: str) -> str:
    """Of both units, without the suffix."""
    return f"libvirt-cbt-run-{repository[:8]}"


def install(
    session: Session,
    options: Sequence[str] = (),
    environment: Optional[Mapping[str, str]] = None,
    *,
    directory: Optional[str] = None,
    calendar: str = DAILY,
) -> results.TimerInstalled:
    """Installs both units for the session's repository; safe to repeat.  The default repository is made if need be.

    `options` stand before `run` in its command line (-c and --config, absolute), of `environment` what says where things
    are is handed on; `directory` is where units go (None: where systemd looks, if it runs), `calendar` when the timer
    elapses, as systemd.time has it.
    Errors: NotFound where systemd does not run; Usage for a calendar; TargetExists; OutputFailed; NoRepository and kin.
    """
    folder = _folder(directory)
    _require_calendar(calendar)
    repository = session.repository(make=True)
    handed = [f"{key}={value}" for key, value in (environment or {}).items() if key in HANDED_ON]
    path = units.words([repository.path])
    values = {
        "@REPOSITORY@": units.plain(repository.path),
        "@MOUNTS@": path,
        "@WRITABLE@": units.words([f"-{repository.path}"]),
        "@COMMAND@": units.command_line([*units.program(), *options, "-r", repository.path, "run"]),
        "@ENVIRONMENT@": f"Environment={units.words(handed)}\n" if handed else "",
        "@CALENDAR@": units.plain(calendar),
    }
    wanted = {os.path.join(folder, file): units.filled(template, values) for file, template in _files(repository.id).items()}
    placed.require_free(wanted)
    for place, text in wanted.items():
        placed.write(place, text, 0o644)
    timer = f"{name(repository.id)}.timer"
    return results.TimerInstalled(
        timer, list(wanted), [f"run `systemctl daemon-reload; systemctl enable --now {errors.argument(timer)}`"]
    )


def remove(session: Session, *, directory: Optional[str] = None) -> results.TimerRemoved:
    """Takes both units away; what is another's stays.  Errors: as of install."""
    folder = _folder(directory)
    unit = name(session.repository().id)
    gone = [path for suffix in SUFFIXES for path in placed.removed(os.path.join(folder, f"{unit}.{suffix}"))]
    after = [f"run `systemctl disable --now {errors.argument(unit)}.timer; systemctl daemon-reload`"] if gone else []
    return results.TimerRemoved(f"{unit}.timer", gone, after)


def status(session: Session, *, directory: Optional[str] = None) -> results.Timer:
    """Whether both units are there, as this release has them, and enabled.  Errors: NotFound; NoRepository and kin."""
    folder = _folder(directory)
    files = _files(session.repository().id)
    timer = next(iter(files))
    there = [os.path.join(folder, file) for file in files if placed.ours(os.path.join(folder, file))]
    if not there:
        return results.Timer(timer, "absent", "`libvirt-cbt systemd install` installs it", [])
    wrong = []
    for file, template in files.items():
        path = os.path.join(folder, file)
        text = placed.content(path)
        if path not in there:
            wrong.append(f"{path} is missing")
        elif not {line for line in units.template(template).splitlines() if "@" not in line} <= set(text.splitlines()):
            wrong.append(f"{path} is of another release")
        program = re.search(r'^ExecStart="([^"]*)"', text, re.MULTILINE)
        if program and not os.access(program[1], os.X_OK):
            wrong.append(f"{program[1]} is not there any more")
    if wrong:
        return results.Timer(timer, "warning", "; ".join([*wrong, "`libvirt-cbt systemd install` mends it"]), there)
    if not os.path.lexists(os.path.join(folder, "timers.target.wants", timer)):
        return results.Timer(timer, "warning", f"it is not enabled; run `systemctl enable --now {errors.argument(timer)}`", there)
    return results.Timer(timer, "ok", f"`systemctl list-timers {errors.argument(timer)}` says when it runs", there)


def _folder(directory: Optional[str]) -> str:
    found = units.folder(directory or None)
    if not found:
        raise errors.NotFound(reason="systemd does not run here; otherwise name the folder of its units by --directory")
    return found


def _files(repository: str) -> Dict[str, str]:
    """The template of each unit by its file's name."""
    return {f"{name(repository)}.{suffix}": f"run.{suffix}" for suffix in SUFFIXES}


def _require_calendar(calendar: str) -> None:
    """systemd itself says whether it is one, where it is there to be asked."""
    units.plain(calendar)
    analyze = shutil.which("systemd-analyze")
    if not calendar.strip() or (analyze and not _understood([analyze, "calendar", "--", calendar])):
        raise errors.Usage(reason=f'"{calendar}" is no time such as "02:00" or "Mon..Fri 22:30"; systemd.time(7) has them all')


def _understood(argv: List[str]) -> bool:
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=ANALYZE_SECONDS, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return True  # it will be told by `systemctl enable`
