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
from libvirt_cbt.hypervisor import connection, job, pace, quiesce, scratch

# Between two looks at the room passes at most the time in which the fastest guest could use up what is above the reserve.
FASTEST: Final = 4 << 30  # bytes a second
TICKS: Final = (0.001, 0.05)  # seconds, the shortest and the longest
NICE: Final = -10  # where many guests want the processors the guard of one must not wait for its turn
STATISTICS_SECONDS: Final = 1.0
# A request of the tool's may reach libvirt after the tool's death: so long is looked for what it may have begun.
AFTERMATH_SECONDS: Final = 3.0
GIVE_UP_SECONDS: Final = 600.0  # a daemon or QEMU that does not answer is given up then; the next run tries, too
GO_ON_SECONDS: Final = 0.5  # a write that failed just before the job ended is reported within this time
HANG_UP_SECONDS: Final = 0.5
PAUSES: Final = (0.1, 60.0)  # seconds between two tries to end a job; each may keep one of libvirtd's workers busy


class Guardian:
    """What it knows, and what is to be done when."""

    def __init__(self, host: connection.Host, uuid: names.DomainUuid) -> None:
        self._host, self._uuid = host, uuid
        self._asks = host  # for what must not wait for an agent that does not answer the nurse
        self._pending = b""
        self._deadline: Optional[float] = None  # of the frozen guest
        self._nurse: Optional[threading.Thread] = None
        self._socket: Optional[str] = None
        self._directory = ""
        self._reserve = 0
        self._used_limit: Optional[int] = None
        self._used = 0
        self._tick = TICKS[0]
        self._stopped = False  # before our job: not ours to let go on
        self._stays = self._released = False
        self._where: Optional[scratch.Places] = None  # of a point that stays open on another host
        # On another host somebody has to look there.
        self._lookout = host.site.lookout(uuid)

    def run(self) -> None:
        say("ready")
        while not self._released:
            if self._obey():
                break
            self._look()
        if not self._released:
            self._orphaned()
        elif self._socket:
            self._finish(0.0)  # there is a job only if the tool could not end it
        if self._nurse:
            self._nurse.join()
        if self._lookout:
            self._lookout.release()
        if self._asks is not self._host:
            self._asks.close()

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
            return self._tick
        return max(0.0, min(60.0, self._deadline - time.monotonic())) if self._deadline is not None else 60.0

    def _do(self, words: Dict[str, Any]) -> None:
        verb = words["do"]
        if verb == "freeze":
            self._deadline = time.monotonic() + words["budget"]
            if self._lookout:
                self._lookout.freeze(words["budget"])
            say("armed")
        elif verb in ("thawed", "nurse"):
            self._deadline = None
            if self._lookout:
                self._lookout.thawed()
            say("disarmed")
            if verb == "nurse":
                self._thaw()
        elif verb == "watch":
            self._watch(words["socket"], words["directory"], words["reserve"], words["speed"])
            say("watching")
        elif verb == "begun":
            threading.Thread(target=self._statistics, name="statistics", daemon=True).start()
        elif verb == "stay":
            self._stays = True
            if self._lookout:
                self._where = scratch.Places(words["run_dir"], words["socket"], "", {})
                self._host.site.reach(self._where)
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
            self._leave_to_tool(self._socket)
            self._finish(0.0)
            if not self._stopped:
                pace.go_on(self._asks, self._uuid, GO_ON_SECONDS)

    def _watch(self, socket: str, directory: str, reserve: int, speed: int) -> None:
        self._socket, self._directory, self._reserve = socket, directory, reserve
        self._note_stopped()
        if speed:
            self._slowed(socket, speed)
        self._used_limit = max(0, self._host.site.room(directory) - reserve)
        if self._lookout:
            self._lookout.watch(socket, directory, reserve)

    def _slowed(self, socket: str, speed: int) -> None:
        try:
            pace.slow(self._host, self._uuid, pace.group(socket), speed)
        except errors.CbtError:
            pass  # libvirt is away; the job will not begin then

    def _note_stopped(self) -> None:
        """A guest that was stopped before us is not ours to let go on."""
        self._stopped = pace.stopped(self._host, self._uuid)

    def _statistics(self) -> None:
        """libvirt's own count, where the folder is not what fills up; it hangs with a stopped QEMU, so not in the loop.

        Never while a job is begun: when that fails, libvirt 9.0 clears up as if nobody else spoke to this QEMU
        (src/qemu/qemu_backup.c, qemuBackupDiskDataCleanupOne), and dies when somebody does.
        """
        while True:
            try:
                self._used = job.scratch_used(self._host, self._uuid)
            except (errors.CbtError, libvirt.libvirtError):
                self._used = 0
            time.sleep(STATISTICS_SECONDS)

    def _low(self) -> bool:
        try:
            free = self._free()
        except OSError:
            return False  # the folder has gone, and the job with it
        if free is None:
            return False
        self._tick = min(TICKS[1], max(TICKS[0], (free - self._reserve) / FASTEST))
        if free >= self._reserve and (self._used_limit is None or self._used <= self._used_limit):
            return False
        say("full", free=free)
        return True

    def _free(self) -> Optional[int]:
        if self._lookout is None:
            return scratch.room(self._directory)
        return self._lookout.free if self._lookout.full is None else self._lookout.full

    def _leave_to_tool(self, socket: str) -> None:
        """Waits a little for the tool, which has been told: it hangs up, then ends the job.

        Ended under a client that reads, QEMU 7.2 at times never comes back from nbd-server-stop, and its guest with it.
        Half of the reserve may go meanwhile; where it cannot be seen going, or the client is a stranger, nothing waits.
        """
        seen = self._lookout is None and (self._used_limit is None or self._used <= self._used_limit)
        end = time.monotonic() + HANG_UP_SECONDS
        try:
            while seen and not self._stays and time.monotonic() < end and scratch.room(self._directory) >= self._reserve // 2:
                if not job.exporting(self._asks, self._uuid, socket):
                    return
                time.sleep(PAUSES[0] / 20)
        except (OSError, errors.CbtError):
            return  # the folder has gone, or libvirt: `_end` looks again

    # What it does

    def _finish(self, settle: float) -> None:
        """No job of ours is left, and the guest is as before."""
        socket, self._socket = self._socket, None
        if not socket:
            return
        self._end(socket, settle)
        try:
            pace.restore(self._asks, self._uuid, pace.group(socket))
        except errors.CbtError:
            pass  # the guest is undefined, or the tool and `recover` look again

    def _end(self, socket: str, settle: float) -> None:
        """Ends the job, which may begin within `settle` seconds; tries again while libvirt or QEMU does not answer."""
        begun, pause = time.monotonic(), PAUSES[0]
        while time.monotonic() - begun < GIVE_UP_SECONDS:
            try:
                if job.end(self._asks, self._uuid, socket) or time.monotonic() - begun >= settle:
                    return
                time.sleep(PAUSES[0])
            except errors.CbtError:
                time.sleep(pause)
                pause = min(2 * pause, PAUSES[1])

    def _thaw(self) -> None:
        """Until the agent has answered: a freeze that waits in its queue comes true when it wakes."""
        if self._nurse is None or not self._nurse.is_alive():
            patience = (quiesce.NURSE_SECONDS, AFTERMATH_SECONDS)
            self._nurse = threading.Thread(target=quiesce.nurse, args=(self._host, self._uuid, *patience))
            self._nurse.start()
            if self._asks is self._host:
                try:
                    self._asks = self._host.another()
                except errors.CbtError:
                    pass  # libvirt is away; then this one serves both

    def _orphaned(self) -> None:
        """The tool is dead: thaw, and end the job unless it is meant to stay."""
        if self._deadline is not None:
            say("fired")
            self._thaw()
        if self._stays:
            self._stay()
        elif self._socket:
            self._finish(AFTERMATH_SECONDS)

    def _stay(self) -> None:
        """Minds the room of a fleecing point that was left open, until its job has ended."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a host that shuts down need not wait for us
        checked = time.monotonic()
        while self._socket:
            self._look()
            time.sleep(self._tick)
            if time.monotonic() - checked > STATISTICS_SECONDS:
                checked = time.monotonic()
                try:
                    if self._where:
                        self._host.site.reach(self._where)  # mends the way when it was cut
                    if self._socket and not job.exporting(self._asks, self._uuid, self._socket):
                        self._finish(0.0)
                except errors.CbtError:
                    # The daemon is away; the guest goes on to write, and the room is still to be minded, while there is one.
                    if self._lookout is None and not os.path.exists(self._directory):
                        return


def say(what: str, **facts: Any) -> None:
    try:
        os.write(1, json.dumps({"is": what, **facts}).encode() + b"\n")
    except OSError:
        pass  # nobody listens any more


def main(arguments: List[str]) -> None:
    """`guardian UUID`; the first line of standard input says where libvirt is, those that follow are commands."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # it ends with the tool, and not before it
    try:
        os.nice(NICE)
    except OSError:
        pass  # not root
    (uuid,) = arguments
    host = _connected(json.loads(_first_line())["connect"])
    try:
        guard = Guardian(host, names.domain_uuid(uuid))
    except errors.CbtError:
        sys.exit(1)
    guard.run()
    host.close()
    os._exit(0)  # a statistics thread may hang in libvirt


def _first_line() -> bytes:
    """Not a byte more: what comes behind it is waited for by `select`.  Without it the tool died before its first effect."""
    found = b""
    while not found.endswith(b"\n"):
        data = os.read(0, 1)
        if not data:
            sys.exit(0)
        found += data
    return found


def _connected(uri: str) -> connection.Host:
    """On a busy host the job may have begun before we are here, and the daemon be away by now: what is to be done then
    waits in the pipe.
    """
    deadline = time.monotonic() + connection.RECONNECT_SECONDS
    while True:
        try:
            return connection.Host(uri, sentry=True)
        except errors.CbtError:
            if time.monotonic() > deadline:
                sys.exit(1)
            time.sleep(PAUSES[0])
