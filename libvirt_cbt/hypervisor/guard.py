"""The tool's end of its guard: a small process that thaws the guest and ends the job when the tool cannot.

It is started before the first effect and holds a pipe.  When the pipe ends, however
hard the tool was killed, it thaws the guest and ends our job; while the tool lives
it minds the time a guest stays frozen and the room that the scratch files have.
`guardian` is the process; the two talk in lines of JSON.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from typing import Any, Dict, Final, Mapping, Optional

from libvirt_cbt import errors, names, processes
from libvirt_cbt.hypervisor import connection, pace, scratch

READY_SECONDS: Final = 15.0
FAR_SECONDS: Final = 60.0  # to be ready on another host, by three connections
ANSWER_SECONDS: Final = 5.0
PACKAGE: Final = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Ours alone: neither the user's PYTHON variables nor the working directory decide what a guard runs.
PROGRAM: Final = (
    "import sys; sys.path.insert(0, sys.argv[1]); from libvirt_cbt.hypervisor import guardian; guardian.main(sys.argv[2:])"
)


class Guard:
    """One guardian; a context manager that lets it go.

    Where there can be none (the embedded driver belongs to one process) `absent` says why, and nothing is guarded.
    """

    def __init__(self, host: connection.Host, uuid: names.DomainUuid) -> None:
        self.absent: Optional[str] = None
        self._host, self._uuid = host, uuid
        self._slowed: Optional[str] = None
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._pending = b""
        self._said: Dict[str, bool] = {}
        self._full: Optional[int] = None  # bytes that were free when the guardian ended the job
        self._fired = False
        self._ready = self._stays = self._dismissed = False
        self._directory = ""
        self._reserve = 0
        if host.embedded:
            self.absent = "the embedded driver has no second connection for a thaw watchdog"
            return
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", PROGRAM, PACKAGE, uuid],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is the tool's, and so is the end of its session
            cwd="/",
        )
        self._say(connect=host.address)  # not as an argument: those are for everybody to see, and a URI may hold a password

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def process(self) -> Optional[processes.Process]:
        """Which process it is, for the intent."""
        return processes.identify(self._process.pid) if self._process else None

    def wait_ready(self) -> Optional[str]:
        """Why it cannot guard, or None once it has its own connection to libvirt."""
        if not self.absent and not self._ready and not self._answer("ready", READY_SECONDS if self._host.site.here else FAR_SECONDS):
            self.absent = "the thaw watchdog did not start"
        return self.absent

    def freezing(self, budget: float) -> Optional[str]:
        """Tells it that a freeze comes and how many seconds it may last; why it must not be, or None."""
        reason = self.wait_ready()
        if reason:
            return reason
        self._say(do="freeze", budget=budget)
        return None if self._answer("armed", ANSWER_SECONDS) else "the thaw watchdog does not answer"

    def thawed(self, *, sure: bool) -> bool:
        """The thaw is done, or (not `sure`) failed and is the guardian's from here on; whether it had fired before."""
        if self._process and self._ready:
            self._say(do="thawed" if sure else "nurse")
            self._answer("disarmed", ANSWER_SECONDS)
        return self._fired

    def watch(self, where: scratch.Places, sizes: Mapping[str, int]) -> None:
        """From now on the job that exports on our socket ends when the scratch files' room runs out, or with us.

        With plenty of room nobody waits for an answer: the words are in the pipe before the job begins, and `check` looks
        at the room, too.  With little the guest is slowed before.
        """
        site = self._host.site
        free = site.room(where.directory)
        self._directory = where.directory
        self._reserve = scratch.reserve(free)
        speed = scratch.speed(sizes, free, site.reaction)
        if speed and self.wait_ready() is None:
            self._slowed = pace.group(where.socket)
        self._say(do="watch", socket=where.socket, directory=where.directory, reserve=self._reserve, speed=speed)
        if not site.here:
            self._require_watching(site.name)
        elif self._slowed:
            self._answer("watching", ANSWER_SECONDS)

    def begun(self) -> None:
        """The job is there: from now on libvirt is asked, too, how much of the room is used."""
        self._say(do="begun")

    def _require_watching(self, host: str) -> None:
        """From here nobody else sees the room there."""
        reason = self.wait_ready()
        if reason or not self._answer("watching", READY_SECONDS):
            reason = reason or "the guard process does not answer"
            raise errors.HypervisorError(reason=f"scratch files on {host} are not left without a guard: {reason}")

    def stay(self, where: scratch.Places) -> Optional[str]:
        """It outlives the tool and guards the job until that has ended; why it cannot, or None.

        The way to a job on another host is the guard's from then on.
        """
        reason = self.wait_ready()
        if reason is None:
            self._say(do="stay", run_dir=where.run_dir, socket=where.socket)
            self._stays = self._answer("staying", READY_SECONDS)
        return reason if self._stays else reason or "the guard process does not answer"

    def check(self) -> None:
        """Errors: ScratchExhausted when the job had to be ended for lack of room, or has to be now."""
        self._read(0)
        if self._full is None and self._directory and self._host.site.here:  # there it is the guardian that looks
            free = scratch.room(self._directory)
            self._full = free if free < self._reserve else None
        if self._full is not None:
            raise errors.ScratchExhausted(directory=os.path.dirname(self._directory), free=self._full)

    def dismiss(self) -> None:
        """The job has ended, and the guest was thawed or it was told of that: it goes while we do the rest."""
        if self._process is None or self._stays:
            return
        self._read(0)
        if self._ready:
            self._say(do="release")
        else:
            self._process.kill()  # it is still importing or connecting, and has read nothing of what it was told
        self._dismissed = True

    def release(self) -> None:
        """Ends it in order; where it is to stay, or still nurses a guest that does not answer, it goes on alone."""
        if self._process is None:
            return
        if not self._stays and not self._dismissed:
            self._say(do="release")
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                try:
                    stream.close()
                except OSError:
                    pass
        try:
            self._process.wait(0 if self._stays else 1.0)
        except subprocess.TimeoutExpired:
            self._process.returncode = 0  # it belongs to nobody from here on: no warning about a child left running
        self._process = None
        if self._slowed and not self._stays:
            try:
                pace.restore(self._host, self._uuid, self._slowed)  # the guardian may have been killed
            except errors.CbtError:
                pass  # libvirt is away: the guardian, which has not ended then, or `recover` does it

    def _say(self, **words: Any) -> None:
        if self._process and self._process.stdin:
            try:
                self._process.stdin.write(json.dumps(words).encode() + b"\n")
                self._process.stdin.flush()
            except OSError:
                pass  # it died: the next answer does not come

    def _answer(self, wanted: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self._said.pop(wanted, False):
            if time.monotonic() > deadline or self._process is None or self._process.poll() is not None:
                return False
            self._read(deadline - time.monotonic())
        return True

    def _read(self, seconds: float) -> None:
        """Takes in what it has said."""
        if self._process is None or self._process.stdout is None:
            return
        if select.select([self._process.stdout], [], [], max(0.0, seconds))[0]:
            self._pending += os.read(self._process.stdout.fileno(), 65536)
        *lines, self._pending = self._pending.split(b"\n")
        for line in lines:
            said = json.loads(line)
            self._said[said["is"]] = True
            self._ready |= said["is"] == "ready"
            self._fired |= said["is"] == "fired"
            if said["is"] == "full":
                self._full = int(said["free"])
