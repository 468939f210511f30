"""Runs one process for each of several domains, so many at once on a host and on all hosts together.

A process each: a guest whose backup hangs, eats memory or brings a library down does so alone, each has its own
connection to libvirt and its own guard, and no two share Python's lock.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from typing import IO, Any, Callable, Dict, Final, Iterator, List, Optional, Sequence

from libvirt_cbt import errors, tools
from libvirt_cbt.actions.policies import Chosen

TICK: Final = 0.05  # seconds between two looks


@dataclass(frozen=True)
class Task:
    """`argv` prints one JSON document for one domain; `environment` is laid over ours."""

    chosen: Chosen
    argv: Sequence[str]
    environment: Dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """`code` is negative for a signal; `document` None when none was printed."""

    task: Task
    code: int
    document: Optional[Dict[str, Any]]

    @property
    def how(self) -> str:
        return f"signal {-self.code}" if self.code < 0 else f"exit code {self.code}"


@dataclass
class _Running:
    task: Task
    process: subprocess.Popen[bytes]
    output: IO[bytes]


def run(tasks: Sequence[Task], total: Optional[int], stop: Callable[[], None]) -> Iterator[Ended]:
    """Gives each as it ends.  `total` limits all hosts together; `stop` raises to end the whole.

    Then (Errors: Interrupted) no more begin, those that run are told by SIGTERM, and given when they have cleaned up.
    """
    waiting = list(tasks)
    running: List[_Running] = []
    stopped: Optional[errors.CbtError] = None
    try:
        while waiting or running:
            for task in _next(waiting, running, total):
                waiting.remove(task)
                running.append(_started(task))
            for one in [r for r in running if r.process.poll() is not None]:
                running.remove(one)
                yield _ended(one)
            try:
                stop()
            except errors.CbtError as e:
                if stopped is None:
                    stopped, waiting = e, []
                    _tell(running)
            time.sleep(TICK)
    finally:
        _tell(running)
        for one in running:
            one.process.wait()
            one.output.close()
    if stopped:
        raise stopped


def _tell(running: Sequence[_Running]) -> None:
    for one in running:
        one.process.send_signal(signal.SIGTERM)


def _next(waiting: Sequence[Task], running: Sequence[_Running], total: Optional[int]) -> List[Task]:
    """Those that may begin now."""
    found: List[Task] = []
    busy = [one.task.chosen.place for one in running]
    for task in waiting:
        place = task.chosen.place
        if busy.count(place) < place.jobs and (total is None or len(busy) < total):
            busy.append(place)
            found.append(task)
    return found


def _started(task: Task) -> _Running:
    output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 -- closed when the process has ended
    # It ends in order, too, when this process is killed.  A session of its own: Ctrl-C comes to it through us alone.
    argv = [tools.find("setpriv"), "--pdeathsig", "TERM", "--", *task.argv]
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, start_new_session=True, cwd="/",
            env={**os.environ, **task.environment},
        )  # fmt: skip
    except OSError as e:
        output.close()
        raise errors.ToolFailed(tool=argv[0], reason=e.strerror or str(e)) from None
    return _Running(task, process, output)


def _ended(one: _Running) -> Ended:
    with one.output:
        one.output.seek(0)
        try:
            document = json.loads(one.output.read())
        except ValueError:
            document = None
    return Ended(one.task, one.process.returncode, document if isinstance(document, dict) else None)
