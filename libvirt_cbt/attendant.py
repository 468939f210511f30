"""The process that runs an administrator's scripts, and ends them when their time is up or the tool has died.

Started by path with the bare interpreter and the standard library alone: it must be there within milliseconds.  Every
script gets a session of its own.  At the end of its time its process group is killed, and so is what left the group:
this process is the sub-reaper, orphans of a script become its children.  When the tool dies, however hard, the script
that runs is killed, the scripts that are owed (what must come after one that ran) are run, and it ends.

Lines of JSON on standard input, answers on standard output:

    {"do": "run", "scripts": [PATH...], "environment": {...}, "input": TEXT, "seconds": N, "total": N or null}
        answered by {"script": PATH, "code": N, "said": TEXT} for each (code null: it was ended, 255: it could not be
        run, 128 + N: signal N), and {"done": true}.  After a code 2 no further script is run.  `seconds` is each one's
        time, `total` that of all of them.
    {"do": "stop"}         kills the script that runs; its code is null
    {"do": "owe", ...}     as run, later: when the tool dies
    {"do": "paid"}         nothing is owed any more
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import time
from typing import Any, Dict, List, Optional, Set

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MOST_SAID = 2000  # bytes of what a script printed, the last ones
STOPS = 2  # the exit code after which no other script is run

_prctl = ctypes.CDLL(None).prctl


class Attendant:
    """One for each run of the tool."""

    def __init__(self, wake: int) -> None:
        self._wake = wake
        self._pending = b""
        self._orders: List[Dict[str, Any]] = []
        self._owed: Optional[Dict[str, Any]] = None
        self._stop = self._orphaned = False

    def attend(self) -> None:
        """Until the tool has gone and nothing is owed."""
        while not self._orphaned:
            if self._orders:
                self._run(self._orders.pop(0))
            else:
                self._listen([0], None)
        if self._owed:
            self._run(self._owed)

    def _listen(self, files: List[int], seconds: Optional[float]) -> List[int]:
        """Waits for one of the files, a child's end or the tool's word, which is heard."""
        ready = select.select([*files, self._wake], [], [], seconds)[0]
        if self._wake in ready:
            os.read(self._wake, 4096)
        if 0 in ready:
            self._hear(os.read(0, 65536))
        return list(ready)

    def _hear(self, data: bytes) -> None:
        self._orphaned = not data
        self._pending += data
        *lines, self._pending = self._pending.split(b"\n")
        for line in lines:
            order = json.loads(line)
            if order["do"] == "run":
                self._orders.append(order)
            elif order["do"] == "owe":
                self._owed = order
            elif order["do"] == "paid":
                self._owed = None
            elif order["do"] == "stop":
                self._stop = True

    def _run(self, order: Dict[str, Any]) -> None:
        until = time.monotonic() + order["total"] if order["total"] is not None else None
        self._stop = False
        for path in order["scripts"]:
            deadline = time.monotonic() + order["seconds"]
            said = bytearray()
            code = self._script(path, order, deadline if until is None else min(deadline, until), said)
            say(script=path, code=code, said=bytes(said[-MOST_SAID:]).decode(errors="replace"))
            if code == STOPS or self._stop or (self._orphaned and order is not self._owed):
                break
        say(done=True)

    def _script(self, path: str, order: Dict[str, Any], deadline: float, said: bytearray) -> Optional[int]:
        """One script's exit code; None when it was killed."""
        if time.monotonic() >= deadline:
            return None
        before = children()
        read, write = os.pipe()
        try:
            pid = started(path, order, write)
        finally:
            os.close(write)
        code = self._ended(pid, read, deadline, said, alone=order is self._owed)
        if code is None:
            kill(pid, before)
        drain(read, said)
        os.close(read)
        return code

    def _ended(self, pid: int, read: int, deadline: float, said: bytearray, *, alone: bool) -> Optional[int]:
        """`alone`: the tool is dead already, and that is why the script runs."""
        output = [read]
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                return 128 - code if code < 0 else code
            reap(pid)
            left = deadline - time.monotonic()
            if left <= 0 or self._stop or (self._orphaned and not alone):
                return None
            ready = self._listen(output if self._orphaned else [0, *output], left)
            if read in ready and not drain(read, said):
                output = []


def started(path: str, order: Dict[str, Any], output: int) -> int:
    """The pid of a new process group that runs `path`, and dies with this process."""
    given = os.memfd_create("input")
    try:
        with os.fdopen(os.dup(given), "wb") as file:
            file.write(order["input"].encode())
        os.lseek(given, 0, os.SEEK_SET)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(1)
                for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD):
                    signal.signal(number, signal.SIG_DFL)
                for old, new in ((given, 0), (output, 1), (output, 2)):
                    os.dup2(old, new)
                os.execve(path, [path], order["environment"])  # noqa: S606 -- no shell is the point
            except OSError as e:
                os.write(2, f"cannot be run: {e.strerror}".encode())
            finally:
                os._exit(255)
    finally:
        os.close(given)
    return pid


def drain(read: int, said: bytearray) -> bool:
    """Takes what a script has printed by now, without waiting; False when nobody can print any more."""
    while select.select([read], [], [], 0)[0]:
        data = os.read(read, 65536)
        if not data:
            return False
        said += data
        del said[:-MOST_SAID]
    return True


def kill(pid: int, before: Set[int]) -> None:
    """SIGKILL for a child's process group, then for whatever of it has become our child."""
    os.killpg(pid, signal.SIGKILL)  # not reaped yet, so the number is not another's
    os.waitpid(pid, 0)
    while True:
        left = children() - before
        if not left:
            return
        for one in left:
            os.kill(one, signal.SIGKILL)
        for one in left:
            os.waitpid(one, 0)


def children() -> Set[int]:
    """Our children; orphans of theirs are among them."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as listed:
            return {int(pid) for pid in listed.read().split()}
    except OSError:
        return set()  # a kernel without CONFIG_PROC_CHILDREN: the group alone is killed


def reap(but: int) -> None:
    """Collects orphans that have ended."""
    for pid in children() - {but}:
        os.waitpid(pid, os.WNOHANG)


def say(**words: Any) -> None:
    try:
        os.write(1, json.dumps(words).encode() + b"\n")
    except OSError:
        pass  # the tool has gone


def main() -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # it ends with the tool, and not before it
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    say(ready=True)
    Attendant(wake).attend()


if __name__ == "__main__":
    main()
