"""A storage daemon that outlives the tool: what a domain booted from a backup reads from, until it is discarded.

Nobody has to remember its process id: whoever listens on the socket is it (SO_PEERCRED, socket(7)).
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import time
from typing import Final, List, Optional, Sequence

from libvirt_cbt import errors, machines, names, processes, tools
from libvirt_cbt.nbdio import server, serving

TOOL: Final = "qemu-storage-daemon"
NAME: Final = "layers.sock"
LOG: Final = "server.log"
STOP_SECONDS: Final = 20.0


def start(exports: Sequence[serving.Export], folder: str, group: Optional[int]) -> str:
    """Shows `exports` read-only on a socket in `folder`, for members of `group`, too; the socket's path.

    It holds the pins that are held now until it ends.
    The chains are as the exports say; no digest is compared.  Errors: Damaged, ToolFailed, HypervisorError.
    """
    path = os.path.join(folder, NAME)
    if len(os.fsencode(path)) > serving.LONGEST:
        raise errors.HypervisorError(reason=f"the socket path {path} is too long; set LIBVIRT_CBT_RUN_DIR to a shorter one")
    argv = [tools.find("setsid"), "--fork", tools.find(TOOL)]
    argv += ["--nbd-server", f"addr.type=unix,addr.path={path.replace(',', ',,')},max-connections=0"]
    for number, export in enumerate(exports):
        argv += serving.arguments(export, number)
    log = os.open(os.path.join(folder, LOG), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        subprocess.run(
            argv, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, cwd="/",
            pass_fds=processes.inherited(), umask=tools.UMASK,
        )  # fmt: skip
    finally:
        os.close(log)
    if not _answers(path):
        end(folder)
        server.require_open([layer for export in exports for layer in export.layers])
        raise errors.ToolFailed(tool=TOOL, reason=_complaint(folder))
    os.chmod(path, 0o660)
    if group is not None:
        os.chown(path, -1, group)
    return path


def _answers(path: str) -> bool:
    deadline = time.monotonic() + server.START_SECONDS
    while time.monotonic() < deadline:
        if machines.greets(path, 0.5):
            return True
        if _complaint(os.path.dirname(path)) and listening(os.path.dirname(path)) is None:
            return False
        time.sleep(0.01)
    return False


def _complaint(folder: str) -> str:
    try:
        with open(os.path.join(folder, LOG), encoding="utf-8", errors="replace") as log:
            lines = log.read(65536).strip().splitlines()
    except OSError:
        return ""
    return names.printable(lines[-1], 500) if lines else ""


def listening(folder: str) -> Optional[processes.Process]:
    """The server of a folder; None when there is none (any more)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        try:
            probe.connect(os.path.join(folder, NAME))
            pid, _, _ = struct.unpack("iII", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        except OSError:
            return None
    return processes.identify(pid)


def end(folder: str) -> List[str]:
    """Ends the server of a folder; what was done."""
    found = listening(folder)
    if found is None or found.pid == os.getpid():
        return []
    deadline = time.monotonic() + STOP_SECONDS
    while processes.alive(found) and time.monotonic() < deadline:
        try:
            os.kill(found.pid, signal.SIGTERM)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    if processes.alive(found):
        processes.kill(found)
    return [f"ended the server {found.pid}"]
