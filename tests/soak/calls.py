"""The tool as a user runs it: in this process, which is quick, or in one of its own, which can be hurt."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, Final, List, Optional

from libvirt_cbt import cli
from tests.guests import daemon
from tests.libvirt.tool import COMMAND
from tests.soak.model import require

SECONDS: Final = 180  # a command that takes longer hangs
SCRATCH: Final = ("backup", "mark", "start")

Trouble = Callable[[subprocess.Popen[bytes]], None]


@dataclass(frozen=True)
class Ended:
    """`code` is negative for a signal; `kind` is the error's class, "" without one."""

    code: int
    document: Dict[str, Any]
    stderr: str

    @property
    def kind(self) -> str:
        return str(self.document.get("error", {}).get("kind", ""))

    @property
    def result(self) -> Any:
        require(self.code == 0, "a command failed", self)
        return self.document["results"][0]

    def __str__(self) -> str:
        said = self.stderr.strip().splitlines()
        return f"exit {self.code} {self.kind} {said[-1] if said else ''}".strip()


class Calls:
    """`libvirt-cbt` on the private libvirtd; every command is asked for its document."""

    def __init__(self, host: daemon.Daemon) -> None:
        self.host = host

    def argv(self, repository: str, verb: str, *arguments: str) -> List[str]:
        more = ["--scratch-dir", self.host.scratch] if verb in SCRATCH else []
        return ["-r", repository, "--json", verb, *arguments, *more]

    def here(self, repository: str, verb: str, *arguments: str) -> Ended:
        """In this process."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.exit_code(self.argv(repository, verb, *arguments))
        return _ended(code, out.getvalue(), err.getvalue())

    def process(self, repository: str, verb: str, *arguments: str, trouble: Optional[Trouble] = None) -> Ended:
        """In one of its own, to which `trouble` happens meanwhile."""
        argv = [COMMAND, *self.argv(repository, verb, *arguments)]
        with subprocess.Popen(
            argv,
            env={**os.environ, **self.host.environment()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as running:
            try:
                if trouble:
                    trouble(running)
                out, err = running.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                require(False, f"{verb} does not end", arguments)
            finally:
                if running.poll() is None:
                    running.kill()
        return _ended(running.returncode, out.decode(), err.decode(errors="replace"))


def _ended(code: int, out: str, err: str) -> Ended:
    # Ctrl-C while Python still starts is Python's.
    starting = code == -signal.SIGINT or "Failed to import the site module" in err
    require(starting or ("Traceback" not in err and code != 70), "a traceback", err)
    document: Dict[str, Any] = {}
    if out.strip() and code >= 0:
        document = json.loads(out)
    require(document or code < 0 or starting, "no document", f"exit {code}: {err}")
    return Ended(code, document, err)


def after(seconds: float, number: int = signal.SIGKILL, others: Callable[[int], None] = lambda _: None) -> Trouble:
    """A signal for the tool after so many seconds; `others` is called just before, with its pid."""

    def trouble(running: subprocess.Popen[bytes]) -> None:
        try:
            running.wait(seconds)
        except subprocess.TimeoutExpired:
            others(running.pid)
            running.send_signal(number)

    return trouble


def once(seen: Callable[[], bool], then: Callable[[], None]) -> Trouble:
    """Something happens as soon as something is seen, unless the command ends before."""

    def trouble(running: subprocess.Popen[bytes]) -> None:
        while running.poll() is None:
            if seen():
                then()
                return
            time.sleep(0.005)

    return trouble
