"""Stops one process at a chosen system call, to kill it there: exact, repeatable, with no hook in the product.

As strace's injection does, by ptrace; but strace counts every `write`, and nine in ten of the tool's are wake-ups
inside libvirt's client, of which there are now more, now fewer.  Here a call counts by what it is done to: a file, the
socket to libvirt, an NBD socket, a pipe.  Only the main thread is watched.  Measured with `strace -f` (libvirt 9.0,
libnbd 1.14): that is where all of these calls are; libvirt's client sends by write() and in the thread that asks, libnbd
by sendto() (no sendmsg), and the thread of libvirt's events sends nothing but an answer to a keepalive.  Children
(qemu-img, qemu-nbd, the guardian) are not watched and not hit.

A SIGKILL at the entry of a call leaves the call undone: the kernel looks for it before it begins (the same with
strace: `mkdir` under `inject=mkdir:signal=SIGKILL` makes no directory).  At the exit the call is done.
https://man7.org/linux/man-pages/man2/ptrace.2.html
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from typing import Callable, Dict, Final, List, Optional, Tuple

LAUNCH: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "launch.py")
SECONDS: Final = 180.0  # a command that takes longer hangs

_SYSCALL, _SEIZE, _INTERRUPT, _INFO = 24, 0x4206, 0x4207, 0x420E
_SYSGOOD, _STOPPED, _ENTRY, _EXIT = 1, 128, 1, 2
_WALL = 0x40000000
# x86-64's numbers: what changes a file system, ends a write order, speaks to somebody or starts a process.
_CALLS: Final[Dict[int, str]] = {
    1: "write", 18: "pwrite64", 20: "writev", 44: "sendto", 46: "sendmsg", 57: "fork", 58: "vfork", 74: "fsync",
    75: "fdatasync", 77: "ftruncate", 82: "rename", 83: "mkdir", 84: "rmdir", 86: "link", 87: "unlink", 88: "symlink",
    90: "chmod", 91: "fchmod", 92: "chown", 93: "fchown", 257: "openat", 258: "mkdirat", 263: "unlinkat",
    264: "renameat", 265: "linkat", 268: "fchmodat", 285: "fallocate", 316: "renameat2",
}  # fmt: skip
_KINDS: Final[Dict[str, str]] = {
    "renameat": "rename", "renameat2": "rename", "linkat": "link", "unlinkat": "unlink", "mkdirat": "mkdir",
    "chmod": "mode", "fchmod": "mode", "fchmodat": "mode", "chown": "mode", "fchown": "mode", "fork": "spawn",
    "vfork": "spawn", "fdatasync": "fsync", "symlink": "link", "fallocate": "write", "ftruncate": "write",
}  # fmt: skip
_WRITES: Final = ("write", "pwrite64", "writev", "sendto", "sendmsg", "ftruncate", "fallocate")
_BY_FD: Final = (*_WRITES, "fsync", "fdatasync", "fchmod", "fchown")
_AT: Final = ("openat", "mkdirat", "unlinkat", "renameat", "linkat", "fchmodat", "renameat2")
KINDS: Final = (
    "rename", "link", "unlink", "rmdir", "mkdir", "fsync", "create", "write", "mode", "spawn", "libvirt", "nbd", "pipe",
)  # fmt: skip

# After a call of these kinds somebody else acts on it, or it is the last of its kind; after the others comes the next
# call, before which is killed anyway.
AFTER_TOO: Final = ("libvirt", "spawn", "pipe", "rename", "link")

_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_ptrace.restype = ctypes.c_long


class Unavailable(Exception):
    """Processes cannot be watched here; the reason is for a skip."""


@dataclass(frozen=True)
class Point:
    """One moment of a run: before or after the `number`th call (from 1) of one of KINDS."""

    kind: str
    number: int
    after: bool = False

    def __str__(self) -> str:
        return f"{self.kind}:{self.number}{':after' if self.after else ''}"

    @staticmethod
    def parse(text: str) -> Point:
        kind, _, rest = text.partition(":")
        number, _, after = rest.partition(":")
        if kind not in KINDS or not number.isdecimal() or after not in ("", "after"):
            raise ValueError(f"a point is KIND:NUMBER or KIND:NUMBER:after, not '{text}'; kinds: {', '.join(KINDS)}")
        return Point(kind, int(number), bool(after))


@dataclass(frozen=True)
class Ended:
    """How a watched command ended: `code` as of subprocess (negative for a signal); `what` was hit by `hit`."""

    code: int
    what: Optional[str]
    stdout: str
    stderr: str


At = Callable[[Point, str, int], None]  # a point, the call with what it is done to, the process; may kill it


def run(arguments: List[str], environment: Dict[str, str], at: At) -> Ended:
    """Runs `libvirt-cbt ARGUMENTS` and calls `at` at every point.  Errors: Unavailable; TimeoutError."""
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        raise Unavailable("system calls are known by their numbers on x86-64 only")
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [sys.executable, LAUNCH, *arguments], env=environment, stdin=subprocess.PIPE, stdout=out, stderr=err
        )
        assert process.stdin
        hung = threading.Timer(SECONDS, os.kill, (process.pid, signal.SIGKILL))  # its pid is kept until we have its end
        try:
            watched = _Watched(process.pid, at)
            hung.start()
            process.stdin.write(b"!")
            process.stdin.close()
            process.returncode = watched.to_the_end()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            late = hung.finished.is_set()
            hung.cancel()
        if late:
            raise TimeoutError(f"no end after {SECONDS:.0f} s")
        for file in (out, err):
            file.seek(0)
        return Ended(process.returncode, None, out.read().decode(), err.read().decode(errors="replace"))


def points(arguments: List[str], environment: Dict[str, str]) -> Tuple[Ended, List[Tuple[Point, str]]]:
    """The points of one whole run, with what the call was done to."""
    found: List[Tuple[Point, str]] = []
    return run(arguments, environment, lambda point, what, _pid: found.append((point, what))), found


def hit(arguments: List[str], environment: Dict[str, str], point: Point, number: int = signal.SIGKILL) -> Ended:
    """Runs it with one signal at one point; `what` is None when the run had no such point."""

    def at(here: Point, what: str, pid: int) -> None:
        if here == point:
            hits.append(what)
            os.kill(pid, number)

    hits: List[str] = []
    ended = run(arguments, environment, at)
    return Ended(ended.code, hits[0] if hits else None, ended.stdout, ended.stderr)


class _Watched:
    """The main thread of one process, from stop to stop."""

    def __init__(self, pid: int, at: At) -> None:
        self._pid, self._at = pid, at
        self._counts: Dict[str, int] = {}
        self._entered: Optional[Tuple[Point, str]] = None
        self._info = ctypes.create_string_buffer(96)
        try:
            self._request(_SEIZE, _SYSGOOD)
        except PermissionError as e:
            raise Unavailable(f"ptrace: {e.strerror}") from None
        self._request(_INTERRUPT)

    def _request(self, what: int, data: int = 0) -> None:
        if _ptrace(what, self._pid, None, data) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def to_the_end(self) -> int:
        """The exit code, or minus the signal."""
        while True:
            _, status = os.waitpid(self._pid, _WALL)
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
            number = os.WSTOPSIG(status)
            if number == signal.SIGTRAP | 0x80:
                self._stopped()
                number = 0
            elif status >> 16 == _STOPPED:
                number = 0
            try:
                self._request(_SYSCALL, number)
            except ProcessLookupError:
                continue  # killed at this very stop

    def _stopped(self) -> None:
        try:
            size = _ptrace(_INFO, self._pid, len(self._info), ctypes.addressof(self._info))
            if size < 0:
                return
            if self._info.raw[0] == _ENTRY:
                call, *arguments = struct.unpack_from("<7Q", self._info.raw, 24)
                self._entered = self._seen(_CALLS[call], arguments) if call in _CALLS else None
                after = False
            else:
                after = True
            if self._entered:
                point, what = self._entered
                self._at(Point(point.kind, point.number, after), what, self._pid)
        except ProcessLookupError:
            return

    def _seen(self, call: str, arguments: List[int]) -> Optional[Tuple[Point, str]]:
        kind = _KINDS.get(call, call)
        if call in _BY_FD:
            what = os.readlink(f"/proc/{self._pid}/fd/{arguments[0]}")
            if call in _WRITES:
                found = self._written(call, arguments[0], what)
                if not found:
                    return None
                kind = found
        elif call == "openat":
            if not arguments[2] & os.O_CREAT:
                return None
            kind, what = "create", self._text(arguments[1])
            if what == os.devnull:
                return None  # libvirt's client, which is told to log nowhere
        elif kind == "spawn":
            what = "a process"
        else:
            what = self._text(arguments[1 if call in _AT else 0])
            if kind in ("rename", "link"):
                what += " -> " + self._text(arguments[3 if call in _AT else 1])
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return Point(kind, self._counts[kind]), f"{call} {what}"

    def _written(self, call: str, fd: int, what: str) -> Optional[str]:
        if what.startswith("socket:"):
            return "libvirt" if call == "write" else "nbd"
        if what.startswith("pipe:"):
            return "pipe"
        if what.startswith("anon_inode:"):
            return None  # a wake-up of another thread
        regular = stat.S_ISREG(os.stat(f"/proc/{self._pid}/fd/{fd}").st_mode)
        return "write" if regular else None

    def _text(self, address: int) -> str:
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
            found = b""
            while b"\0" not in found and len(found) < 4096:
                # Up to the end of a page: the next may not be there.
                found += os.pread(memory.fileno(), 4096 - (address + len(found)) % 4096, address + len(found))
        return os.fsdecode(found.split(b"\0")[0])
