"""Messages with fields for systemd's journal, by its own protocol: one datagram each, no library.

https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Final, Mapping

SOCKET: Final = "/run/systemd/journal/socket"
SECONDS: Final = 1.0  # a journal that does not take it in this time must not hold up a backup


def connected(fd: int = 2) -> bool:
    """Whether a stream goes to the journal: systemd says of its pipes, in JOURNAL_STREAM, which they are."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def send(fields: Mapping[str, str], path: str = SOCKET) -> bool:
    """Whether the journal took it.  Names are upper case letters, digits and underscores, and begin with a letter."""
    data = b"".join(_field(name, value) for name, value in fields.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(SECONDS)
            sender.connect(path)
            sender.send(data)
    except OSError:
        return False
    return True


def _field(name: str, value: str) -> bytes:
    data = value.encode(errors="backslashreplace")
    if b"\n" in data:
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return name.encode() + b"=" + data + b"\n"
