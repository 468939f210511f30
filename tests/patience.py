"""How long something took, for tests of faults that must not be waited for: of a busy machine nobody can ask more."""

from __future__ import annotations

import os
import signal
import time
from typing import Final, Optional

PRESSURE: Final = "/proc/pressure/cpu"  # https://docs.kernel.org/accounting/psi.html


class Stopwatch:
    """Seconds since it was made, without those in which something on this machine waited for a processor."""

    def __init__(self) -> None:
        self._begun, self._waited = time.monotonic(), _waited()

    def wall(self) -> float:
        """Seconds by the clock."""
        return time.monotonic() - self._begun

    def seconds(self) -> float:
        """At most `wall`; on an idle machine the same."""
        wall, now = self.wall(), _waited()
        if self._waited is None or now is None:
            return wall / max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        return wall - min(wall, now - self._waited)


def until_caught(pid: int, number: int = signal.SIGTERM, *, seconds: float = 60) -> None:
    """Waits until a process handles a signal: before that Python has not come to the tool's first line.

    https://man7.org/linux/man-pages/man5/proc_pid_status.5.html
    """
    deadline = time.monotonic() + seconds
    while True:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            caught = next(int(line.split()[1], 16) for line in file if line.startswith("SigCgt:"))
        if caught >> (number - 1) & 1:
            return
        assert time.monotonic() < deadline, f"process {pid} does not handle signal {number}"
        time.sleep(0.01)


def _waited() -> Optional[float]:
    """Seconds since the start of the machine in which at least one process waited; None where the kernel counts none."""
    try:
        with open(PRESSURE, encoding="ascii") as file:
            return int(file.readline().rpartition("total=")[2]) / 1_000_000
    except (OSError, ValueError):
        return None
