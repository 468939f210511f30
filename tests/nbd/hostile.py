"""An NBD server that means no good: it speaks the protocol as far as its script wants, and then says something else.

    with Hostile(f"{folder}/s", size=1 << 20, status=endless_chunks) as server:
        ...                     # clients use server.endpoint

`greeting`, `options`, `status` and `read` are what is said in place of the right thing; each gets the connection and, for
requests, what was asked.  https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Any, Callable, Final, List, Optional, Tuple

from libvirt_cbt.nbdio.server import Endpoint

DIRTY: Final = "qemu:dirty-bitmap:cbt-vda"
ALLOCATION: Final = "base:allocation"
HELLO: Final = b"NBDMAGICIHAVEOPT"
OPTION_REPLY: Final = 0x3E889045565A9
REQUEST: Final = 0x25609513
SIMPLE, STRUCTURED = 0x67446698, 0x668E33EF
DONE: Final = 1
NONE, OFFSET_DATA, OFFSET_HOLE, BLOCK_STATUS, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 0x8001, 0x8002
EXPORT_NAME, ABORT, INFO, GO, STRUCTURED_REPLY, SET_META_CONTEXT = 1, 2, 6, 7, 8, 10
ACK, ACK_INFO, ACK_META = 1, 3, 4
UNSUPPORTED: Final = 0x80000001
FLAGS: Final = 1 | 1 << 1 | 1 << 7 | 1 << 8  # has flags, read-only, DF, multi-conn
IDS: Final = {ALLOCATION: 1, DIRTY: 2}


class Ended(Exception):
    """The other end has gone, or the test is over."""


@dataclass(frozen=True)
class Asked:
    cookie: int
    offset: int
    length: int


class Wire:
    """One connection."""

    def __init__(self, server: Hostile, sock: socket.socket) -> None:
        self.server, self._socket = server, sock

    def say(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError:
            raise Ended from None

    def hear(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                piece = self._socket.recv(count - len(data))
            except OSError:
                raise Ended from None
            if not piece:
                raise Ended
            data += piece
        return data

    def hang(self) -> None:
        """Nothing more is said until the other end goes."""
        while True:
            self.hear(1)

    def option_reply(self, option: int, kind: int, data: bytes = b"", *, length: Optional[int] = None) -> None:
        self.say(struct.pack(">QIII", OPTION_REPLY, option, kind, len(data) if length is None else length) + data)

    def chunk(self, asked: Asked, kind: int, data: bytes = b"", *, done: bool = True, length: Optional[int] = None) -> None:
        size = len(data) if length is None else length
        self.say(struct.pack(">IHHQI", STRUCTURED, DONE if done else 0, kind, asked.cookie, size) + data)

    def extents(self, asked: Asked, context: str, *pairs: Tuple[int, int], done: bool = True) -> None:
        data = struct.pack(">I", IDS.get(context, 77)) + b"".join(struct.pack(">II", *pair) for pair in pairs)
        self.chunk(asked, BLOCK_STATUS, data, done=done)


Script = Callable[[Wire, Asked], Any]


def right_status(wire: Wire, asked: Asked) -> None:
    """All is data, all is dirty."""
    wire.extents(asked, ALLOCATION, (asked.length, 0), done=False)
    wire.extents(asked, DIRTY, (asked.length, 1))


def right_read(wire: Wire, asked: Asked) -> None:
    wire.chunk(asked, OFFSET_DATA, struct.pack(">Q", asked.offset) + b"\x11" * asked.length)


class Hostile:
    """A context manager; every connection is served by a thread."""

    def __init__(
        self,
        path: str,
        *,
        size: int = 1 << 20,
        greeting: Optional[Callable[[Wire], Any]] = None,
        option: Optional[Callable[[Wire, int], Any]] = None,
        status: Script = right_status,
        read: Script = right_read,
    ) -> None:
        self.endpoint, self.size = Endpoint(path, "vda"), size
        self.greeting, self.option, self.status, self.read = greeting, option, status, read
        self.connections = 0
        self._sockets: List[socket.socket] = []
        self._threads: List[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._start(self._accept)

    def __enter__(self) -> Hostile:
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        while self._threads:
            thread = self._threads.pop()
            thread.join(30)
            assert not thread.is_alive()
        for one in (self._listener, *self._sockets):
            one.close()

    def _start(self, run: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=run, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                self._sockets.append(sock)
                self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        wire = Wire(self, sock)
        with contextlib.suppress(Ended):
            if self.greeting:
                self.greeting(wire)
            else:
                wire.say(HELLO + struct.pack(">H", 3))
            wire.hear(4)
            while self._negotiate(wire):
                pass
            while self._answer(wire):
                pass
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def _negotiate(self, wire: Wire) -> bool:
        """One option; False when it was the last."""
        _, option, length = struct.unpack(">QII", wire.hear(16))
        data = wire.hear(length)
        if self.option:
            self.option(wire, option)
        if option == STRUCTURED_REPLY:
            wire.option_reply(option, ACK)
        elif option == SET_META_CONTEXT:
            for name, number in IDS.items():
                if name.encode() in data:
                    wire.option_reply(option, ACK_META, struct.pack(">I", number) + name.encode())
            wire.option_reply(option, ACK)
        elif option == GO:
            wire.option_reply(option, ACK_INFO, struct.pack(">HQH", 0, self.size & (2**64 - 1), FLAGS))
            wire.option_reply(option, ACK)
            return False
        elif option == ABORT:
            wire.option_reply(option, ACK)
            raise Ended
        else:
            wire.option_reply(option, UNSUPPORTED)
        return True

    def _answer(self, wire: Wire) -> bool:
        _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", wire.hear(28))
        asked = Asked(cookie, offset, length)
        if command == 2:
            return False
        if command == 7:
            self.status(wire, asked)
        elif command == 0:
            self.read(wire, asked)
        else:
            wire.chunk(asked, NONE)
        return True
