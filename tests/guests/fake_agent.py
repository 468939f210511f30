"""A guest agent that can misbehave, on the host: the other end of the relay in a SystemGuest(..., agent="relay").

    with FakeAgent(guest.relay_path) as agent:
        guest.wait_for_agent_state("connected")
        agent.behave(DEAF)            # the freeze is taken and nothing is answered ...
        agent.behave(GOOD)            # ... until now: what has waited is worked off in its order
        agent.freezes, agent.thaws, agent.frozen, agent.intervals
        agent.leave()                 # as if its service had been stopped; libvirt sees it
        agent.come_back()

Like the real one it does one thing at a time, and while frozen refuses to freeze again.  Nothing is really frozen.
Times are time.monotonic()'s.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from typing import Any, Callable, Collection, Final, List, Optional, Tuple

GOOD: Final = "good"
SILENT: Final = "silent"  # never answers, never does it
DEAF: Final = "deaf"  # takes it and stops there, with all that comes later, until it behaves otherwise
SLOW: Final = "slow"  # does it at once, answers `seconds` later
LATE: Final = "late"  # does it `seconds` later, and answers then
MISCOUNTS: Final = "miscounts"  # thaws all, says one less
DENIES: Final = "denies"  # does it, says that it failed, in `words`
NONSENSE: Final = "nonsense"  # does nothing, answers with `rubbish`
ENDLESS: Final = "endless"  # does nothing, answers a line of `size` bytes that does not end
BEHAVIOURS: Final = (GOOD, SILENT, DEAF, SLOW, LATE, MISCOUNTS, DENIES, NONSENSE, ENDLESS)

FREEZE: Final = "guest-fsfreeze-freeze"
THAW: Final = "guest-fsfreeze-thaw"
STATUS: Final = "guest-fsfreeze-status"
SYNC: Final = "guest-sync"
SYNC_DELIMITED: Final = "guest-sync-delimited"
# libvirt sends none of the others before one of these two was answered.
HANDSHAKE: Final = (SYNC, SYNC_DELIMITED)
WORK: Final = (FREEZE, THAW, STATUS, "guest-ping", "guest-info")
EVERYTHING: Final = HANDSHAKE + WORK
# Not JSON, and nothing that should reach a terminal.  libvirt quotes it, and its binding, which takes that for UTF-8,
# raises SystemError (from UnicodeDecodeError) instead of libvirtError.
RUBBISH: Final = b'\x1b[2J\xc3( {"return": \xfe\n'
# libvirt 9.0 reads nothing more behind a NUL: the agent is lost to it until its port is opened anew.
POISON: Final = b"\0\n"
HOSTILE_WORDS: Final = "\x1b[31mno\r\nthe guest was backed up\x07"
TICK: Final = 0.05


class FakeAgent:
    """A context manager; connects to `path` whenever something listens there, again after a cut.

    `freezes` and `thaws` count what was done, not what was asked; `intervals` are (since, until) of each time that it
    was frozen and is no longer; `received` are (time, command) as they came.
    """

    def __init__(self, path: str, *, file_systems: int = 2) -> None:
        self.path, self.file_systems = path, file_systems
        self.freezes = self.thaws = 0
        self.frozen_since: Optional[float] = None
        self.intervals: List[Tuple[float, float]] = []
        self.received: List[Tuple[float, str]] = []
        self.behave(GOOD)
        self._closing = self._away = False
        self._socket: Optional[socket.socket] = None
        self._lines: queue.SimpleQueue[Tuple[socket.socket, bytes]] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=run) for run in (self._read, self._work)]

    def behave(
        self,
        how: str,
        *,
        to: Collection[str] = WORK,
        seconds: float = 3,
        words: str = HOSTILE_WORDS,
        rubbish: bytes = RUBBISH,
        size: int = 256 << 20,
    ) -> None:
        """From now on, also to what is waiting; `to`: the commands it does so to, the others get their answers."""
        assert how in BEHAVIOURS
        self._how = (how, frozenset(to), seconds, words, rubbish, size)

    def __enter__(self) -> FakeAgent:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self.leave()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def leave(self) -> None:
        """Disconnects; what waits is forgotten.  The guest shuts the agent's port, and libvirt says so within 2 s."""
        self._away = True
        while self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            time.sleep(TICK / 10)

    def come_back(self) -> None:
        self._away = False

    @property
    def frozen(self) -> bool:
        return self.frozen_since is not None

    def count(self, command: str) -> int:
        """How often it was asked, answered or not."""
        return [name for _, name in self.received].count(command)

    def wait(self, happened: Callable[[FakeAgent], bool], seconds: float = 60) -> None:
        """Errors: AssertionError."""
        deadline = time.monotonic() + seconds
        while not happened(self):
            assert time.monotonic() < deadline, f"not within {seconds} s; asked so far: {self.received}"
            time.sleep(TICK / 10)

    def _read(self) -> None:
        while not self._closing:
            if not self._away:
                with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as wire:
                    wire.connect(self.path)
                    self._socket = wire
                    self._receive(wire)
                self._socket = None
            time.sleep(TICK)

    def _receive(self, wire: socket.socket) -> None:
        pending = b""
        while not self._away and (got := wire.recv(65536)):
            *lines, pending = (pending + got).split(b"\n")
            for line in lines:
                # 0xFF ends whatever half a line an earlier client left.
                command = line.rsplit(b"\xff", 1)[-1]
                with contextlib.suppress(ValueError):
                    self.received.append((time.monotonic(), json.loads(command).get("execute")))
                    self._lines.put((wire, command))

    def _work(self) -> None:
        while not self._closing:
            with contextlib.suppress(queue.Empty, OSError):
                wire, line = self._lines.get(timeout=TICK)
                if self._socket is wire:
                    self._obey(wire, json.loads(line))

    def _obey(self, wire: socket.socket, asked: Any) -> None:
        name = asked.get("execute")
        while self._how[0] == DEAF and name in self._how[1]:
            self._pause(wire, TICK / 10)
        how, to, seconds, words, rubbish, size = self._how
        if name not in to:
            how = GOOD
        if how == LATE:
            self._pause(wire, seconds)
        if how == NONSENSE:
            wire.sendall(rubbish)
        elif how == ENDLESS:
            self._send_endless(wire, size)
        elif how != SILENT:
            answer = self._do(name, asked.get("arguments", {}), less=int(how == MISCOUNTS))
            if how == DENIES:
                answer = _error(words)
            if how == SLOW:
                self._pause(wire, seconds)
            wire.sendall((b"\xff" if name == SYNC_DELIMITED else b"") + json.dumps(answer).encode() + b"\n")

    def _do(self, name: str, arguments: Any, *, less: int) -> Any:
        now = time.monotonic()
        if name in HANDSHAKE:
            return {"return": arguments["id"]}
        if name == STATUS:
            return {"return": "frozen" if self.frozen else "thawed"}
        if name == FREEZE and not self.frozen:
            self.frozen_since = now
            self.freezes += 1
            return {"return": self.file_systems}
        if name == THAW and self.frozen_since is not None:
            self.intervals.append((self.frozen_since, now))
            self.frozen_since = None
            self.thaws += 1
            return {"return": self.file_systems - less}
        if name == THAW:
            return {"return": 0}
        if name == "guest-ping":
            return {"return": {}}
        if name == "guest-info":
            known = [{"name": command, "enabled": True, "success-response": True} for command in EVERYTHING]
            return {"return": {"version": "7.2.0", "supported_commands": known}}
        return _error(f"Command {name} has been disabled: the agent is in frozen state")

    def _send_endless(self, wire: socket.socket, size: int) -> None:
        block = b'{"return": "' + bytes(65524).replace(b"\0", b"x")
        while size > 0 and self._how[0] == ENDLESS:
            wire.sendall(block[:size])
            size -= len(block)

    def _pause(self, wire: socket.socket, seconds: float) -> None:
        """Errors: OSError when the connection ends meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._socket is not wire:
                raise OSError
            time.sleep(TICK / 10)


def _error(words: str) -> Any:
    return {"error": {"class": "GenericError", "desc": words}}
