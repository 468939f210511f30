"""A wire that can be cut: a socket (unix or TCP) whose every connection is handed on to another one.

    with Proxy(f"{folder}/wire.sock", server.socket, budgets=[5000, 100]) as wire:
        ...                # clients use wire.path; the first is cut after 5000 bytes from the server, the second after 100
        wire.cut()         # now
        wire.stall()       # nothing moves, nothing is closed ...
        wire.go_on()       # ... until now
        wire.go_away()     # cut, and nobody listens any more, as after the server's end

``Proxy.in_front_of(path)`` takes the place of a server that listens already: its socket is renamed, so that clients who
know only `path` come through the wire.  Parses nothing, knows nothing of NBD, imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Any, List, Optional, Sequence, Tuple, Union

CUT, STALL, GO_AWAY = "cut", "stall", "go away"


Address = Union[str, Tuple[str, int]]  # the path of a unix socket, or host and port


def _socket(address: Address) -> socket.socket:
    return socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)


class Proxy:
    """Listens from the moment it is made; `budgets` are bytes from the server, one for each connection as it comes.

    A connection whose budget is None, or for which none is left, is never cut.  `then` is what happens at the end of a
    budget: exactly so many bytes have been handed on.
    """

    def __init__(
        self, path: Address, server_path: Address, *, budgets: Sequence[Optional[int]] = (), then: str = CUT
    ) -> None:
        self.path: Any = path
        self.server_path, self.then = server_path, then
        self.handed: List[int] = []  # bytes from the server, of each connection so far
        self._budgets = [*budgets]
        self._gone = self._renamed = False
        self._flow = threading.Event()
        self._flow.set()
        self._lock = threading.Lock()
        self._pairs: List[Tuple[socket.socket, socket.socket]] = []
        self._threads: List[threading.Thread] = []
        self._listener = _socket(path)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(path)
        self._listener.listen()
        self._start(self._accept)

    @classmethod
    def in_front_of(cls, path: str, *, budgets: Sequence[Optional[int]] = (), then: str = CUT) -> Proxy:
        """Between the server that listens on `path` and clients still to come; its socket comes back at the end."""
        os.rename(path, path + ".far")
        proxy = cls(path, path + ".far", budgets=budgets, then=then)
        proxy._renamed = True
        return proxy

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cuts everything and waits for its threads; may be called again."""
        self.go_away()
        self._flow.set()
        while self._threads:
            thread = self._threads.pop()
            thread.join(10)
            assert not thread.is_alive()
        for pair in self._pairs:
            for one in pair:
                one.close()
        if self._renamed and os.path.exists(str(self.server_path)):
            os.rename(str(self.server_path), self.path)
        self._renamed = False

    def cut(self) -> None:
        """Ends the connections that there are; new ones are welcome."""
        with self._lock:
            for pair in self._pairs:
                _end(pair)

    def stall(self) -> None:
        """From now on nothing is handed on, in neither direction; connections stay open and new ones are accepted."""
        self._flow.clear()

    def go_on(self) -> None:
        """Ends a stall; nothing was lost."""
        self._flow.set()

    def go_away(self) -> None:
        """Cuts, and removes the socket: connecting fails from now on."""
        if not self._gone:
            self._gone = True
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            self._listener.close()
            if isinstance(self.path, str):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path)
        self.cut()

    def _start(self, *call: object) -> None:
        run, *arguments = call
        thread = threading.Thread(target=run, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = _socket(self.server_path)
                with self._lock:
                    self._pairs.append((near, far))
                    if self._gone:
                        _end((near, far))
                        return
                    self.handed.append(0)
                    number = len(self.handed) - 1
                    budget = self._budgets.pop(0) if self._budgets else None
                try:
                    far.connect(self.server_path)
                except OSError:
                    _end((near, far))
                    continue
                self._start(self._pump, near, far, None, None)
                self._start(self._pump, far, near, budget, number)

    def _pump(self, take: socket.socket, give: socket.socket, budget: Optional[int], number: Optional[int]) -> None:
        with contextlib.suppress(OSError):
            if budget == 0:
                self._spent((take, give))
                budget = None
            while data := take.recv(65536 if budget is None else min(65536, budget)):
                self._flow.wait()
                give.sendall(data)
                if number is not None:
                    self.handed[number] += len(data)
                if budget is not None and not (budget := budget - len(data)):
                    self._spent((take, give))
                    budget = None
        _end((take, give))

    def _spent(self, pair: Tuple[socket.socket, socket.socket]) -> None:
        if self.then == STALL:
            self.stall()
        elif self.then == GO_AWAY:
            self.go_away()
        else:
            _end(pair)


def _end(pair: Tuple[socket.socket, socket.socket]) -> None:
    for one in pair:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
