"""Which of libvirt's daemons answers here: libvirtd, virtqemud, or virtproxyd, which hands on to the others.

libvirt's client chooses among their sockets by itself, and does not tell which one it took; the kernel does.
https://libvirt.org/daemons.html
"""

from __future__ import annotations

import os
import re
import socket
import stat
import struct
from contextlib import suppress
from typing import Final, List, Optional

from libvirt_cbt import names

SOCKETS: Final = re.compile(r"(libvirt|virt[a-z]+d)-sock(-ro)?")
CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED


def connected(given: Optional[str] = None) -> List[str]:
    """The daemons that this process has a connection to, as "virtqemud (/run/libvirt/virtqemud-sock)".

    `given` is the path of a socket that does not have one of libvirt's names.
    """
    found = set()
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # closed meanwhile, or it is connected to nobody
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                with socket.socket(fileno=os.dup(number)) as one:
                    path = one.getpeername() if one.family == socket.AF_UNIX else None
                    if isinstance(path, str) and (path == given or SOCKETS.fullmatch(os.path.basename(path))):
                        found.add(f"{_listener(one) or _meant(path)} ({names.printable(path)})")
    return sorted(found)


def _listener(one: socket.socket) -> Optional[str]:
    """The name of the process that listens; None where that is not known, or systemd listens for it."""
    pid, _, _ = CREDENTIALS.unpack(one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            name = file.read().strip()
    except OSError:
        return None
    return name if re.fullmatch(r"libvirtd|virt[a-z]+d", name) else None


def _meant(path: str) -> str:
    """By the socket's name; behind libvirt's old one there may be either."""
    name = os.path.basename(path).partition("-sock")[0]
    return name if re.fullmatch(r"virt[a-z]+d", name) else "libvirtd or virtproxyd"
