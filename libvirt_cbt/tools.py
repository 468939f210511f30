"""Runs the programs of the distribution (qemu-img above all), with argument lists only."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Dict, Final, Sequence

from libvirt_cbt import durable, errors, names, processes

PACKAGES: Final[Dict[str, str]] = {
    "qemu-img": "qemu-utils (Debian) or qemu-img (Fedora)",
    "qemu-nbd": "qemu-utils (Debian) or qemu-img (Fedora)",
    "qemu-storage-daemon": "qemu-system-common (Debian) or qemu-storage-daemon (Fedora)",
}

UMASK: Final = 0o077  # of every program of ours: its files and sockets are for us alone from their first moment


def find(tool: str) -> str:
    """The absolute path of a tool.  Errors: ToolMissing with the package to install."""
    # A service's PATH often lacks the sbin folders and a user's too.
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    found = shutil.which(tool, path=path)
    if not found:
        raise errors.ToolMissing(tool=tool, package=PACKAGES.get(tool, tool))
    return found


def descriptor(fd: int) -> str:
    """The name under which a program that inherits `fd` can open the file behind it, whatever its path leads to by now."""
    return f"/proc/self/fd/{fd}"


def run(argv: Sequence[str], *, timeout: float = 600, keep: Sequence[int] = ()) -> str:
    """Standard output of a tool that succeeds; it inherits the descriptors `keep`.

    Errors: ToolMissing, ToolFailed with its last line of stderr.
    """
    command = [find(argv[0]), *argv[1:]]
    try:
        # A session of its own: Ctrl-C in the terminal is for us to handle, not for qemu-img to die of half-way.
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            start_new_session=True,
            pass_fds=(*processes.inherited(), *keep),
            umask=UMASK,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise errors.ToolFailed(tool=argv[0], reason=f"no end after {timeout:.0f} s") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise errors.ToolFailed(tool=argv[0], reason=names.printable(lines[-1], 500))
    return done.stdout.decode(errors="replace")


def out_of_room(error: errors.ToolFailed) -> bool:
    """Whether a tool failed because the file system that it wrote to is full."""
    return any(str(error.facts["reason"]).endswith(os.strerror(number)) for number in durable.FULL)
