"""A server that lies: one sentence and the right exit code within bounded time and memory, and nothing is handed on.

Whatever a server says of data cannot be judged; that it said something of every byte can.
"""

from __future__ import annotations

import os
import struct
from typing import Any, Callable, Dict, List

import pytest

from libvirt_cbt import errors, extents
from libvirt_cbt.nbdio import client, copy, lanes
from tests import patience
from tests.nbd import hostile
from tests.nbd.conftest import MIB, nbdkit, none_also, nothing
from tests.nbd.hostile import (
    ALLOCATION,
    BLOCK_STATUS,
    DIRTY,
    ERROR,
    ERROR_OFFSET,
    NONE,
    OFFSET_DATA,
    OFFSET_HOLE,
    Asked,
    Hostile,
    Wire,
)

QUICK = lanes.Options(stall_seconds=1.0, reconnects=1)


def pulled(source: Any, folder: str, *, size: int = MIB) -> List[extents.Extents]:
    """What a backup of the export stores; it is handed on at the very end only by who called."""
    contents: List[extents.Extents] = []
    with nbdkit(folder, "memory", "size=1M") as sink:
        one = copy.Pull(
            target="vda",
            source=source,
            capacity=size,
            bitmap=DIRTY,
            copy=copy.DIRTY,
            expected=size,
            sink=copy.Sink([sink], os.path.join(folder, "layer"), has_parent=True),
            also=none_also,
            delta=nothing,
            contents=contents.append,
        )
        watch = patience.Stopwatch()

        def stop() -> None:
            assert watch.seconds() < 60, "it does not end"

        copy.pull([one], QUICK, progress=nothing, stop=stop)
    return contents


def refused(folder: str, **script: Any) -> errors.CbtError:
    """The error of a backup from such a server."""
    server = Hostile(os.path.join(folder, "hostile"), **script)
    with server, pytest.raises(errors.CbtError) as caught:
        pulled(server.endpoint, folder)
    error = caught.value
    assert error.code in (13, 20) and str(error).isprintable() and "vda" in str(error), str(error)
    return error


def test_an_honest_one(folder: str) -> None:
    with Hostile(os.path.join(folder, "hostile")) as server:
        rows = pulled(server.endpoint, folder)
    assert sum(int(row["length"].sum()) for row in rows) == MIB


# The handshake


def say(data: bytes) -> Callable[..., None]:
    def script(wire: Wire, *_: Any) -> None:
        wire.say(data)
        raise hostile.Ended

    return script


def hang(wire: Wire, *_: Any) -> None:
    wire.hang()


GREETINGS: Dict[str, Any] = {
    "nothing": say(b""),
    "half": say(hostile.HELLO[:5]),
    "another-protocol": say(b"SSH-2.0-OpenSSH_9.2\r\n" * 20),
    "noise": say(bytes(range(256)) * 16),
    "old-style": say(b"NBDMAGIC" + struct.pack(">QQI", 0x420281861253, 1 << 20, 1) + bytes(124)),
    "hang": hang,
}


@pytest.mark.parametrize("name", GREETINGS)
def test_a_greeting(folder: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(client, "CONNECT_SECONDS", 1.0)
    assert refused(folder, greeting=GREETINGS[name]).code == 20


def on(option: int, say: Callable[[Wire], Any]) -> Callable[[Wire, int], None]:
    def script(wire: Wire, asked: int) -> None:
        if asked == option:
            say(wire)

    return script


def forever(say: Callable[[], Any]) -> None:
    while True:
        say()


def endless_infos(wire: Wire) -> None:
    forever(lambda: wire.option_reply(hostile.GO, hostile.ACK_INFO, struct.pack(">H", 9)))


def endless_contexts(wire: Wire) -> None:
    forever(lambda: wire.option_reply(hostile.SET_META_CONTEXT, hostile.ACK_META, struct.pack(">I", 5) + b"x:y"))


OPTIONS: Dict[str, Any] = {
    "hang": on(hostile.GO, hang),
    "endless-infos": on(hostile.GO, endless_infos),
    "endless-contexts": on(hostile.SET_META_CONTEXT, endless_contexts),
    "no-magic": on(hostile.GO, lambda wire: wire.say(bytes(20))),
    "for-another-option": on(hostile.GO, lambda wire: wire.option_reply(99, hostile.ACK)),
    "huge": on(hostile.GO, lambda wire: wire.option_reply(hostile.GO, hostile.ACK_INFO, length=2**32 - 1)),
    "no-info": on(hostile.GO, lambda wire: wire.option_reply(hostile.GO, hostile.ACK)),
    "a-cut-info": on(hostile.GO, lambda wire: wire.option_reply(hostile.GO, hostile.ACK_INFO, b"\0\0\0")),
    "a-refusal-in-colours": on(hostile.GO, lambda wire: wire.option_reply(hostile.GO, 0x80000002, b"\x1b[2J\x1b[31mno\r\n")),
    "no-contexts": on(hostile.SET_META_CONTEXT, lambda wire: wire.option_reply(hostile.SET_META_CONTEXT, hostile.ACK)),
    "a-cut-context": on(
        hostile.SET_META_CONTEXT, lambda wire: wire.option_reply(hostile.SET_META_CONTEXT, hostile.ACK_META, b"\0")
    ),
    "no-structured-replies": on(
        hostile.STRUCTURED_REPLY, lambda wire: wire.option_reply(hostile.STRUCTURED_REPLY, hostile.UNSUPPORTED)
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option(folder: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(client, "CONNECT_SECONDS", 1.0)
    assert refused(folder, option=OPTIONS[name]).code == 20


@pytest.mark.parametrize("size", [0, MIB - 512, MIB + 512, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_size(folder: str, size: int) -> None:
    assert refused(folder, size=size).code == 20


# Block status


def whole(context: str, *, done: bool = True) -> Callable[[Wire, Asked], None]:
    return lambda wire, asked: wire.extents(asked, context, (asked.length, 1), done=done)


def both(allocation: List[Any], dirty: List[Any]) -> Callable[[Wire, Asked], None]:
    def script(wire: Wire, asked: Asked) -> None:
        wire.extents(asked, ALLOCATION, *allocation, done=False)
        wire.extents(asked, DIRTY, *dirty)

    return script


def raw(kind: int, data: bytes, *, length: Any = None) -> Callable[[Wire, Asked], None]:
    return lambda wire, asked: wire.chunk(asked, kind, data, length=length)


def endless(kind: int, data: bytes = b"") -> Callable[[Wire, Asked], None]:
    """A reply of more and more chunks: bytes come all the time, and nothing is ever finished."""
    return lambda wire, asked: forever(lambda: wire.chunk(asked, kind, data, done=False))


def failed_half_way(wire: Wire, asked: Asked) -> None:
    wire.extents(asked, ALLOCATION, (asked.length, 0), done=False)
    wire.chunk(asked, ERROR, struct.pack(">IH", 5, 4) + b"\x1b[2J")


def of_another_request(wire: Wire, asked: Asked) -> None:
    hostile.right_status(wire, Asked(asked.cookie + 17, asked.offset, asked.length))


REPLIES: Dict[str, Any] = {
    "hang": hang,
    "cut": say(struct.pack(">IHH", hostile.STRUCTURED, 1, BLOCK_STATUS)),
    "no-magic": say(bytes(20)),
    "nothing-of-either": raw(NONE, b""),
    "nothing-of-the-bitmap": whole(ALLOCATION),
    "nothing-of-allocation": whole(DIRTY),
    "no-extent": both([], []),
    "extents-of-nothing": both([(0, 0)] * 9, [(0, 1)] * 9),
    "an-extent-of-nothing-first": both([(0, 0), (0, 3)], [(MIB, 1)]),
    "of-a-context-nobody-asked-for": whole("x:y"),
    "an-id-and-half-an-extent": raw(BLOCK_STATUS, bytes(4 + 12)),
    "half-an-id": raw(BLOCK_STATUS, b"\0\0"),
    "more-than-anybody-takes": raw(BLOCK_STATUS, b"", length=2**32 - 1),
    "data": raw(OFFSET_DATA, bytes(8 + 512)),
    "a-hole": raw(OFFSET_HOLE, struct.pack(">QI", 0, 512)),
    "a-kind-that-is-none": raw(99, b"x"),
    "an-error-of-a-kind-that-is-none": raw(0x8099, struct.pack(">IH", 5, 0)),
    "an-error": raw(ERROR, struct.pack(">IH", 5, 0)),
    "an-error-that-is-none": raw(ERROR, struct.pack(">IH", 0, 0)),
    "an-error-with-a-longer-text-than-it-has": raw(ERROR, struct.pack(">IH", 5, 999)),
    "an-error-half-way": failed_half_way,
    "a-simple-reply": lambda wire, asked: wire.say(struct.pack(">IIQ", hostile.SIMPLE, 0, asked.cookie)),
    "of-another-request": of_another_request,
    "endless-nothing": endless(NONE),
    "endless-extents": endless(BLOCK_STATUS, struct.pack(">III", 1, 512, 0)),
}


@pytest.mark.parametrize("name", REPLIES)
def test_block_status(folder: str, name: str) -> None:
    refused(folder, status=REPLIES[name])


@pytest.mark.parametrize(
    ("allocation", "dirty"),
    [
        ([(2**32 - 1, 0)], [(2**32 - 1, 1)]),
        ([(MIB, 0), (MIB, 3), (2**32 - 1, 3)], [(2**32 - 1, 1)] * 9),
        ([(512, 0)] * 5000, [(512, 1)] * 5000),
        ([(MIB, 0xFFFFFFFC)], [(MIB, 0xFFFFFFFF)]),
    ],
)
def test_extents_beyond_what_was_asked_are_cut(folder: str, allocation: List[Any], dirty: List[Any]) -> None:
    """A disk that has grown meanwhile may have them, too.  Newer releases of libnbd (1.22 does) refuse some themselves."""
    with Hostile(os.path.join(folder, "hostile"), status=both(allocation, dirty)) as server:
        try:
            rows = pulled(server.endpoint, folder)
        except errors.SourceUnreadable as e:
            assert "Protocol error" in str(e) and not client.version().startswith("1.14.")  # noqa: PT017 -- one of two good ends
            return
    assert sum(int(row["length"].sum()) for row in rows) == MIB


def test_a_context_twice(folder: str) -> None:
    """The first holds, wherever it came."""

    def script(wire: Wire, asked: Asked) -> None:
        wire.extents(asked, DIRTY, (asked.length, 1), done=False)
        wire.extents(asked, DIRTY, (asked.length, 0), done=False)
        wire.extents(asked, ALLOCATION, (asked.length, 0))

    with Hostile(os.path.join(folder, "hostile"), status=script) as server:
        rows = pulled(server.endpoint, folder)
    assert sum(int(row["length"].sum()) for row in rows) == MIB


def test_a_server_that_tells_of_one_byte_at_a_time(folder: str) -> None:
    """Every answer is progress, so it ends; the work is the sum of the answers and not its square."""
    size, answers = 2 << 16, 0

    def script(wire: Wire, asked: Asked) -> None:
        nonlocal answers
        answers += 1
        step = min(asked.length, 16)
        both([(step, 0)], [(step, 1)])(wire, asked)

    with Hostile(os.path.join(folder, "hostile"), size=size, status=script) as server:
        rows = pulled(server.endpoint, folder, size=size)
    assert sum(int(row["length"].sum()) for row in rows) == size and answers == 2 * size // 16  # the bitmap, and what is allocated


# Data


def piece(kind: int, *numbers: int, data: bytes = b"") -> Callable[[Wire, Asked], None]:
    """A chunk at the request's offset plus the first of the numbers."""

    def script(wire: Wire, asked: Asked) -> None:
        layout = ">Q" + "I" * (len(numbers) - 1)
        place = (asked.offset + numbers[0]) & (2**64 - 1)
        wire.chunk(asked, kind, struct.pack(layout, place, *numbers[1:]) + data)

    return script


def the_same_twice(wire: Wire, asked: Asked) -> None:
    """As many bytes as were asked for, but the second half of them never."""
    half = asked.length // 2
    for done in (False, True):
        wire.chunk(asked, OFFSET_DATA, struct.pack(">Q", asked.offset) + b"\x11" * half, done=done)


def endless_data(wire: Wire, asked: Asked) -> None:
    forever(lambda: wire.chunk(asked, OFFSET_DATA, struct.pack(">Q", asked.offset) + bytes(512), done=False))


def stopped_within(wire: Wire, asked: Asked) -> None:
    wire.chunk(asked, OFFSET_DATA, struct.pack(">Q", asked.offset) + bytes(512), length=8 + asked.length)
    wire.hang()


READS: Dict[str, Any] = {
    "hang": hang,
    "stopped-within": stopped_within,
    "cut": say(struct.pack(">IHH", hostile.STRUCTURED, 1, OFFSET_DATA)),
    "nothing": raw(NONE, b""),
    "too-little": piece(OFFSET_DATA, 0, data=bytes(512)),
    "too-much": piece(OFFSET_DATA, 0, data=bytes(2 * MIB)),
    "before-it": piece(OFFSET_DATA, -512, data=bytes(512)),
    "behind-it": piece(OFFSET_DATA, 2 * MIB, data=bytes(512)),
    "a-hole-that-is-too-long": piece(OFFSET_HOLE, 0, 2**32 - 1),
    "a-hole-of-nothing": piece(OFFSET_HOLE, 0, 0),
    "an-error": raw(ERROR, struct.pack(">IH", 5, 0)),
    "an-error-at-a-place-outside": piece(ERROR_OFFSET, 2**40, data=b""),
    "block-status": raw(BLOCK_STATUS, struct.pack(">III", 1, 512, 0)),
    "the-same-twice": the_same_twice,
    "endless-nothing": endless(NONE),
    "endless-data": endless_data,
    "a-simple-reply": lambda wire, asked: wire.say(struct.pack(">IIQ", hostile.SIMPLE, 0, asked.cookie) + bytes(asked.length)),
}


@pytest.mark.parametrize("name", READS)
def test_data(folder: str, name: str) -> None:
    refused(folder, read=READS[name])
