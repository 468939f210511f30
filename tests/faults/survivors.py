"""Which processes are of a killed tool, and whether they end by themselves.

All of ours have the folder of sockets in their environment, which no other test has.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Dict, Final, List, Tuple

from libvirt_cbt import processes

# So long may a guardian go on without its tool, on a busy machine: it looks for 3 s whether a late request has begun a job.
SECONDS: Final = 30.0


@dataclass(frozen=True)
class Survivor:
    process: processes.Process
    command: str
    deadline: float
    point: str


class Survivors:
    """Those that were seen; `run_dir` is the value of LIBVIRT_CBT_RUN_DIR that makes a process ours."""

    def __init__(self, run_dir: str) -> None:
        self._mark = f"LIBVIRT_CBT_RUN_DIR={run_dir}".encode()
        self._seen: List[Survivor] = []

    def ours(self) -> Dict[int, str]:
        """Command lines by pid."""
        found: Dict[int, str] = {}
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as environ:
                    if self._mark not in environ.read().split(b"\0"):
                        continue
                with open(f"/proc/{pid}/cmdline", "rb") as line:
                    found[int(pid)] = line.read().replace(b"\0", b" ").decode(errors="replace")[:120]
            except OSError:
                continue  # gone meanwhile, or not ours to see
        return found

    def kill_others(self, pid: int) -> None:
        """Every process of ours but one, as the end of a control group does."""
        for other in self.ours():
            try:
                if other != pid:
                    os.kill(other, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended by itself

    def note(self, point: str) -> None:
        """What still runs after `point` has SECONDS to end by itself."""
        known = {one.process for one in self._seen}
        for pid, command in self.ours().items():
            process = processes.identify(pid)
            if process and process not in known:
                self._seen.append(Survivor(process, command, time.monotonic() + SECONDS, point))

    def overdue(self, *, wait: bool = False) -> List[Tuple[str, str]]:
        """(point, complaint) of those whose time is over, which are ended; with `wait` of all."""
        late: List[Tuple[str, str]] = []
        for one in list(self._seen):
            while wait and processes.alive(one.process) and time.monotonic() < one.deadline:
                time.sleep(0.05)
            if not processes.alive(one.process):
                self._seen.remove(one)
            elif time.monotonic() >= one.deadline:
                self._seen.remove(one)
                processes.kill(one.process)
                late.append((one.point, f"a process did not end by itself: {one.command}"))
        return late

    def end(self) -> None:
        """Without judging."""
        while self._seen:
            processes.kill(self._seen.pop().process)
