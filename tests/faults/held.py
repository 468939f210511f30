"""A backup that stands still in the middle of its copy for as long as a test needs.

The process that writes the layer is stopped by a signal: the guest, its QEMU and libvirt are as in any backup, and the
tool waits as it does for slow storage.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from typing import IO, Dict, List, Optional, Sequence

from tests.guests import domain
from tests.libvirt.tool import Ended, Tool

START_SECONDS = 30.0


def children(pid: int) -> Dict[int, str]:
    """The command lines of a process's children, by pid."""
    found = {}
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as listed:
                for child in listed.read().split():
                    with contextlib.suppress(OSError), open(f"/proc/{child}/cmdline", "rb") as words:
                        found[int(child)] = words.read().replace(b"\0", b" ").decode(errors="replace")
    return found


class Held:
    """One backup; held when `__enter__` returns, and let go on at the end.

    The guest needs some 16 MiB of random data to copy, or it may end before.  `argv` replaces the
    command.
    """

    def __init__(
        self,
        tool: Tool,
        guest: domain.Guest,
        *arguments: str,
        argv: Optional[Sequence[str]] = None,
    ) -> None:
        self.tool, self.guest = tool, guest
        self._argv = list(argv) if argv else tool.argv("backup", guest.name, *arguments)
        self._writers: List[int] = []
        self._out: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 -- closed at exit
        self._err: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self) -> Held:
        self.process = subprocess.Popen(
            self._argv, env=self.tool.environment(), stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err
        )
        try:
            self._hold()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._out.close()
        self._err.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def guardian(self) -> int:
        return next(pid for pid, words in children(self.pid).items() if "guardian" in words)

    def _hold(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self._written() < 1024 * 1024:
            assert self.process.poll() is None, f"it ended before it could be held: {self._said()}"
            assert time.monotonic() < deadline, "it never copied"
            time.sleep(0.001)
        self._writers = [pid for pid, words in children(self.pid).items() if "sink-" in words]
        self._signal(signal.SIGSTOP)
        assert self._writers, f"it copied to its end before it could be held: {self._said()}"

    def _written(self) -> int:
        staging = os.path.join(self.tool.repository, self.guest.uuid, "staging")
        with contextlib.suppress(OSError):
            for run in os.listdir(staging):
                for name in os.listdir(os.path.join(staging, run)):
                    if name.endswith(".qcow2"):
                        return os.path.getsize(os.path.join(staging, run, name))
        return 0

    def _signal(self, number: signal.Signals) -> None:
        mine = children(self.pid)
        for pid in self._writers:
            if pid in mine:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def release(self) -> None:
        """It goes on at full speed."""
        self._signal(signal.SIGCONT)

    def copied(self, seconds: float = 30.0) -> None:
        """Lets it go on, and returns when the layers are written."""
        self.release()
        deadline = time.monotonic() + seconds
        while any(pid in children(self.pid) for pid in self._writers):
            assert time.monotonic() < deadline, "it does not end its copy"
            time.sleep(0.005)

    def kill(self, *, guardian: bool = False) -> None:
        """SIGKILL; with `guardian` for the process that guards it, too, before."""
        if guardian:
            os.kill(self.guardian, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def ended(self, seconds: float = 60.0) -> Ended:
        """Lets it go on and waits for its end."""
        self.release()
        code = self.process.wait(seconds)
        said = self._said()
        assert "Traceback" not in said, said
        self._out.seek(0)
        document = self._out.read()
        return Ended(code, json.loads(document) if document else {}, said)

    def _said(self) -> str:
        self._err.seek(0)
        return self._err.read().decode(errors="replace")
