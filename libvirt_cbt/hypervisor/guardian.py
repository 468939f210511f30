"""The guard itself, a process of its own with its own connection to libvirt; `guard` starts it and talks to it.

It thaws the guest when the tool dies between freeze and thaw or is too slow, and
ends the tool's job (known by its socket, so never another's) when the tool dies
or the scratch files' room runs out.  It keeps no files and ends by itself.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from typing import Any, Dict, Final, List, Optional

import libvirt

from libvirt_cbt import errors, names
from libvirt_cbt.hypervisor import connection, job, quiesce, scratch

TICK: Final = 0.01  # seconds between two looks at the room: a guest writes some MiB meanwhile
STATISTICS_SECONDS: Final = 1.0
# A request of the tool's may reach libvirt after the tool's death: so long is looked for what it may have begun.
AFTERMATH_SECONDS: Final = 3.0


class Guardian:
    """What it knows, and what is to be done when."""

    def __init__(self, host: connection.Host, uuid: names.DomainUuid) -> None:
        self._host, self._uuid = host, uuid
        self._pending = b""
        self._deadline: Optional[float] = None  # of the frozen guest
        self._nurse: Optional[threading.Thread] = None
        self._socket: Optional[str] = None
        self._directory = ""
        self._reserve = 0
        self._used_limit: Optional[int] = None
        self._used = 0
        self._stays = self._released = False

    def run(self) -> None:
        say("ready")
        while not self._released:
            if self._obey():
                break
            self._look()
        if not self._released:
            self._orphaned()
        if self._nurse:
            self._nurse.join()

    # What the tool says

    def _obey(self) -> bool:
        """Waits for the next word; whether the tool has gone."""
        ready, _, _ = select.select([0], [], [], self._pause())
        if not ready:
            return False
        data = os.read(0, 4096)
        self._pending += data
        *lines, self._pending = self._pending.split(b"\n")
        for line in lines:
            self._do(json.loads(line))
        return not data

    def _pause(self) -> float:
        if self._socket:
            return TICK
        return max(0.0, min(60.0, self._deadline - time.monotonic())) if self._deadline is not None else 60.0

    def _do(self, words: Dict[str, Any]) -> None:
        verb = words["do"]
        if verb == "freeze":
            self._deadline = time.monotonic() + words["budget"]
            say("armed")
        elif verb in ("thawed", "nurse"):
            self._deadline = None
            say("disarmed")
            if verb == "nurse":
                self._thaw()
        elif verb == "watch":
            self._watch(words["socket"], words["directory"], words["reserve"])
            say("watching")
        elif verb == "stay":
            self._stays = True
            say("staying")
        elif verb == "release":
            self._released = True

    # What it minds

    def _look(self) -> None:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._deadline = None
            say("fired")
            self._thaw()
        if self._socket and self._low():
            ended, self._socket = self._socket, None
            self._end(ended)

    def _watch(self, socket: str, directory: str, reserve: int) -> None:
        self._socket, self._directory, self._reserve = socket, directory, reserve
        self._used_limit = max(0, scratch.room(directory) - reserve)
        threading.Thread(target=self._statistics, daemon=True).start()

    def _statistics(self) -> None:
        """libvirt's own count, where the folder is not what fills up; it hangs with a stopped QEMU, so not in the loop."""
        while True:
            try:
                self._used = job.scratch_used(self._host, self._uuid)
            except (errors.CbtError, libvirt.libvirtError):
                self._used = 0
            time.sleep(STATISTICS_SECONDS)

    def _low(self) -> bool:
        try:
            free = scratch.room(self._directory)
        except OSError:
            return False  # the folder has gone, and the job with it
        if free >= self._reserve and (self._used_limit is None or self._used <= self._used_limit):
            return False
        say("full", free=free)
        return True

    # What it does

    def _end(self, socket: str) -> bool:
        try:
            return job.end(self._host, self._uuid, socket)
        except errors.CbtError:
            return False  # libvirt or the guest has gone; `recover` looks again

    def _thaw(self) -> None:
        """Until the agent has answered: a freeze that waits in its queue comes true when it wakes."""
        if self._nurse is None or not self._nurse.is_alive():
            patience = (quiesce.NURSE_SECONDS, AFTERMATH_SECONDS)
            self._nurse = threading.Thread(target=quiesce.nurse, args=(self._host, self._uuid, *patience))
            self._nurse.start()

    def _orphaned(self) -> None:
        """The tool is dead: thaw, and end the job unless it is meant to stay."""
        if self._deadline is not None:
            say("fired")
            self._thaw()
        if self._stays:
            self._stay()
        elif self._socket:
            deadline = time.monotonic() + AFTERMATH_SECONDS
            while not self._end(self._socket) and time.monotonic() < deadline:
                time.sleep(0.1)

    def _stay(self) -> None:
        """Minds the room of a fleecing point that was left open, until its job has ended."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a host that shuts down need not wait for us
        checked = time.monotonic()
        while self._socket:
            self._look()
            time.sleep(TICK)
            if time.monotonic() - checked > STATISTICS_SECONDS:
                checked = time.monotonic()
                if not job.exporting(self._host, self._uuid, self._socket):
                    return


def say(what: str, **facts: Any) -> None:
    try:
        os.write(1, json.dumps({"is": what, **facts}).encode() + b"\n")
    except OSError:
        pass  # nobody listens any more


def main(arguments: List[str]) -> None:
    """`guardian URI UUID`, commands on standard input."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # it ends with the tool, and not before it
    uri, uuid = arguments
    try:
        host = connection.Host(uri)
    except errors.CbtError:
        sys.exit(1)
    Guardian(host, names.domain_uuid(uuid)).run()
    os._exit(0)  # a statistics thread may hang in libvirt
