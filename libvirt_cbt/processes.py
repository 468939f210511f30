"""Which process is which: a pid alone may be another's tomorrow, a pid with its start time is not.

And what the programs we start inherit: locks, which then last for as long as one of them runs.
"""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Iterator, List, Optional, Tuple

_HANDED_ON: Final[List[int]] = []


@dataclass(frozen=True)
class Process:
    """`started` is the kernel's start time, in clock ticks since boot: good within one boot."""

    pid: int
    started: int


def identify(pid: int) -> Optional[Process]:
    """The process that has this pid now; None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name may hold anything, spaces and brackets too: fields are counted from its end.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] == b"Z" else Process(pid, int(fields[19]))


def alive(process: Process) -> bool:
    return identify(process.pid) == process


def kill(process: Process, seconds: float = 5.0) -> bool:
    """SIGKILL for exactly this process, never for another that got its pid; whether there was one."""
    try:
        fd = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        if not alive(process):
            return False
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    deadline = time.monotonic() + seconds
    while alive(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    return True


@contextmanager
def handed_on(fd: int) -> Iterator[None]:
    """Every program that is started meanwhile inherits this descriptor, and with it a flock on it.

    So a lock on what they have open is let go of when the last of us has ended, not when the first was killed.
    """
    _HANDED_ON.append(fd)
    try:
        yield
    finally:
        _HANDED_ON.remove(fd)


def inherited() -> Tuple[int, ...]:
    """For `subprocess`: pass_fds."""
    return tuple(_HANDED_ON)


def tag() -> str:
    """This process as a part of a file's name; `ended` reads it."""
    me = identify(os.getpid())
    return f"{boot_id()[:8]}-{os.getpid()}-{me.started if me else 0}"


def ended(text: str) -> bool:
    """Whether the process of a `tag` ran in this boot and is gone; False where that cannot be known."""
    found = re.fullmatch(r"([0-9a-f]{8})-([1-9][0-9]*)-([0-9]+)", text)
    if not found or found[1] != boot_id()[:8]:
        return False
    return not alive(Process(int(found[2]), int(found[3])))


def unit(path: str = "/proc/self/cgroup") -> Optional[str]:
    """The systemd service that we are of, which when it ends takes with it what we leave running; None: of none.

    INVOCATION_ID is in the environment of a unit's own processes (systemd.exec), and not of those that cron starts.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            found = re.search(r"^(?:0:|\d+:name=systemd):.*/([^/\n]+\.service)$", file.read(), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found and os.environ.get("INVOCATION_ID") else None


def outlived(what: str) -> List[str]:
    """A sentence about what is to go on when we have ended, where systemd may end it, too."""
    name = unit()
    known = "is killed when that ends, unless its KillMode is process; docs/automation.md has a way round it"
    return [f"{what} is a process of {name} and {known}"] if name else []


def boot_id() -> str:
    """Which boot of this machine it is."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "unknown"
