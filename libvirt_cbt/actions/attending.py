"""The tool's end of its attendant, the process that runs scripts (`libvirt_cbt/attendant.py`)."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, Final, List, Optional, Sequence

from libvirt_cbt import attendant

TICK: Final = 0.1  # seconds between two looks whether to stop
STOP_SECONDS: Final = 5.0
DIED: Final = "the process that runs scripts has died"


@dataclass(frozen=True)
class Order:
    """Scripts to be run one after another: `seconds` is the time each has, `total` that of all."""

    scripts: Sequence[str]
    environment: Dict[str, str]
    document: str  # on standard input
    seconds: float
    total: Optional[float] = None

    def words(self, verb: str) -> Dict[str, Any]:
        return {
            "do": verb,
            "scripts": list(self.scripts),
            "environment": self.environment,
            "input": self.document,
            "seconds": self.seconds,
            "total": self.total,
        }


@dataclass(frozen=True)
class Ended:
    """`code` is None for a script that was ended; `said` the end of what it printed."""

    script: str
    code: Optional[int]
    said: str


class Attendant:
    """One for a run; ended by `close`."""

    def __init__(self) -> None:
        self._pending = b""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", attendant.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is the tool's
            cwd="/",
        )

    def run(self, order: Order, stop: Callable[[], None]) -> List[Ended]:
        """Those that were run, in order; of an attendant that died none more.  What `stop` raises ends the script."""
        self._say(order.words("run"))
        try:
            return self._answers(order, stop, None)
        except BaseException:
            self._say({"do": "stop"})
            self._answers(order, lambda: None, time.monotonic() + STOP_SECONDS)
            raise

    def owe(self, order: Order) -> None:
        """They are run if we die before `paid`."""
        self._say(order.words("owe"))

    def paid(self) -> None:
        self._say({"do": "paid"})

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                try:
                    stream.close()
                except OSError:
                    pass
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.returncode = 0  # what is owed goes on without us: no warning about a child left running

    def _answers(self, order: Order, stop: Callable[[], None], deadline: Optional[float]) -> List[Ended]:
        found: List[Ended] = []
        while deadline is None or time.monotonic() < deadline:
            words = self._word()
            if words is None:
                stop()
            elif "script" in words:
                found.append(Ended(str(words["script"]), words["code"], str(words["said"])))
            elif "died" in words:
                return [*found, *(Ended(path, 255, DIED) for path in order.scripts[len(found) :])]
            elif "done" in words:
                break
        return found

    def _word(self) -> Optional[Dict[str, Any]]:
        """The next answer; None when there is none yet."""
        assert self._process.stdout
        fd = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            if not select.select([fd], [], [], TICK)[0]:
                return None
            data = os.read(fd, 65536)
            if not data:
                return {"died": True}
            self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        words: Dict[str, Any] = json.loads(line)
        return words

    def _say(self, words: Dict[str, Any]) -> None:
        try:
            assert self._process.stdin
            self._process.stdin.write(json.dumps(words).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it died: the answers say so
