"""Backups shown to others: one storage daemon on a socket of the user's choice.  A disk may have a dirty bitmap with
the delta since an older generation, which any NBD client can ask for (NBD_CMD_BLOCK_STATUS, qemu:dirty-bitmap:NAME).

The socket comes into being whole and last.  QEMU replaces what is in a socket's way, so it makes this one in a private
folder beside its place; when everything is served it gets mode 0600 and, by link(2), its name, which must be free.
https://www.qemu.org/docs/master/interop/nbd.html
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Callable, Final, Iterator, List, Optional, Sequence, Tuple
from urllib.parse import quote

from libvirt_cbt import errors, folders, tools
from libvirt_cbt.nbdio import bitmapfile, client, qcow2, server

LONGEST: Final = 107  # bytes in the path of a unix socket
PRIVATE: Final = ".cbt-"  # and eight random characters: the folder beside the socket until all is served
LONGEST_FOLDER: Final = LONGEST - len(f"/{PRIVATE}12345678/s")
GRACE_SECONDS: Final = 0.5
TOOL: Final = "qemu-storage-daemon"

# A process that outlives us when we are killed.  It then removes the socket, if it is still ours, and the folder.
SWEEP: Final = """trap '' HUP INT TERM
ours=
while read -r line; do ours=$line; done
if [ -n "$ours" ] && [ "$(stat -c %d:%i -- "$1" 2>/dev/null)" = "$ours" ]; then rm -f -- "$1"; fi
rm -rf -- "$2"
"""


@dataclass(frozen=True)
class Export:
    """A disk to be shown: its layers, newest first, and what goes into the bitmap if there is to be one.

    `capacity` in bytes.  `delta` begins anew each time it is called.
    """

    name: str
    layers: Sequence[str]
    capacity: int
    bitmap: Optional[str] = None
    delta: Optional[bitmapfile.Pages] = None

    @property
    def context(self) -> Optional[str]:
        return f"qemu:dirty-bitmap:{self.bitmap}" if self.bitmap else None


@dataclass(frozen=True)
class Shown:
    """An export that answers; `granularity` of its bitmap and the bytes that are dirty in it, None without one."""

    export: Export
    uri: str
    granularity: Optional[int]
    dirty_bytes: Optional[int]


class Serving:
    """A server that is ready."""

    def __init__(self, shown: List[Shown], connections: List[client.Connection]) -> None:
        self.shown = shown
        self._connections = connections

    def wait(self, stop: Callable[[], None]) -> None:
        """Until `stop`, asked five times a second, raises.  Errors: ToolFailed when the server ends by itself."""
        while True:
            stop()
            try:
                client.turn(self._connections)
            except client.Lost:
                # Whoever ends a service signals all its processes: is ours only a little behind the server's?
                time.sleep(GRACE_SECONDS)
                stop()
                raise errors.ToolFailed(tool=TOOL, reason="it ended while it was serving") from None


@contextmanager
def serving(exports: Sequence[Export], path: str, stop: Callable[[], None]) -> Iterator[Serving]:
    """Shows `exports`, read-only, at the absolute `path`, where nothing may be before and nothing is afterwards.

    Layers are read as they are: no digest is compared.  `stop` may raise while the server starts.
    Errors: Usage for a path that is too long, OutputFailed for one that is taken or cannot be made; Damaged, ToolFailed.
    """
    _require_free(path)
    with _private(path) as (folder, sweeper), ExitStack() as stack:
        bitmaps = [_bitmap(export, folder, number) for number, export in enumerate(exports)]
        socket = os.path.join(folder, "s")
        stack.enter_context(_started(exports, folder, socket))
        connections = stack.enter_context(_proved(exports, socket, stop))
        stack.enter_context(_published(socket, path, sweeper))
        shutil.rmtree(folder, ignore_errors=True)  # QEMU has read the bitmaps, and the socket has its name
        yield Serving([_shown(e, path, b) for e, b in zip(exports, bitmaps)], connections)


def _shown(export: Export, path: str, bitmap: Optional[Tuple[int, int]]) -> Shown:
    grain, dirty = bitmap or (None, None)
    return Shown(export, f"nbd+unix:///{quote(export.name)}?socket={quote(os.fsencode(path))}", grain, dirty)


def _require_free(path: str) -> None:
    folder = os.path.dirname(path)
    if len(os.fsencode(path)) > LONGEST:
        raise errors.Usage(reason=f"a socket's path has at most {LONGEST} bytes, {path} has {len(os.fsencode(path))}")
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        raise errors.Usage(reason=f"the path of the socket's folder has at most {LONGEST_FOLDER} bytes; {folder} has more")
    if os.path.lexists(path):
        raise _taken(path)


def _taken(path: str) -> errors.OutputFailed:
    reason = "it exists already and is never overwritten; name another --socket, or remove it if nobody needs it"
    return errors.OutputFailed(path=path, reason=reason)


@contextmanager
def _private(path: str) -> Iterator[Tuple[str, int]]:
    """A folder of mode 0700 beside `path`, and where the sweeper is told which inode is ours (in ASCII, "device:inode")."""
    folder = os.path.dirname(path)
    try:
        reason = folders.exposed(folder)
        if reason:
            raise errors.OutputFailed(path=path, reason=reason)
        private = tempfile.mkdtemp(prefix=PRIVATE, dir=folder)
    except OSError as e:
        raise errors.OutputFailed(path=folder, reason=e.strerror) from None
    try:
        argv = [tools.find("sh"), "-c", SWEEP, "sh", path, private]
        with subprocess.Popen(
            argv, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, cwd="/",
        ) as sweeper:  # fmt: skip
            assert sweeper.stdin
            yield private, sweeper.stdin.fileno()
    finally:
        shutil.rmtree(private, ignore_errors=True)


@contextmanager
def _published(socket: str, path: str, sweeper: int) -> Iterator[None]:
    """Gives the socket its name, for its owner alone; takes it back at the end unless it is another's by then."""
    try:
        os.chmod(socket, 0o600)
        status = os.lstat(socket)
        os.write(sweeper, f"{status.st_dev}:{status.st_ino}\n".encode())
        os.link(socket, path)
    except FileExistsError:
        raise _taken(path) from None
    except OSError as e:
        raise errors.OutputFailed(path=path, reason=e.strerror) from None
    try:
        yield
    finally:
        try:
            if os.path.samestat(status, os.lstat(path)):
                os.unlink(path)
        except OSError:
            pass  # somebody was quicker, or took the folder away


def _bitmap(export: Export, folder: str, number: int) -> Optional[Tuple[int, int]]:
    """Granularity and dirty bytes."""
    if export.bitmap is None or export.delta is None:
        return None
    path = _overlay(folder, number)
    try:
        return bitmapfile.write(path, export.bitmap, export.capacity, export.delta)
    except OSError as e:
        raise errors.OutputFailed(path=path, reason=e.strerror) from None


def _overlay(folder: str, number: int) -> str:
    return os.path.join(folder, f"bitmap{number}")


@contextmanager
def _started(exports: Sequence[Export], folder: str, socket: str) -> Iterator[None]:
    """The daemon.  Errors: as of `server.running`."""
    argv = [TOOL, "--nbd-server", f"addr.type=unix,addr.path={socket.replace(',', ',,')}"]
    for number, export in enumerate(exports):
        argv += arguments(export, number, folder)
    paths = [path for export in exports for path in export.layers]
    _allow_files(len(paths) + len(exports))
    with server.running(argv, socket, paths):
        yield


def arguments(export: Export, number: int, folder: str = "") -> List[str]:
    """The chain as the repository says, whatever headers name; the bitmap's image above it is as large as the disk."""
    files = list(export.layers)
    for path in files:
        qcow2.refuse_external_data(path)
    _require_size(files[0], export.capacity)
    if export.bitmap:
        files.insert(0, _overlay(folder, number))
    argv: List[str] = []
    below: Optional[str] = None
    for depth, path in reversed(list(enumerate(files))):
        name = f"d{number}n{depth}"
        node = {**qcow2.alone(path), "node-name": name, "read-only": True, "backing": below}
        argv += ["--blockdev", json.dumps(node)]
        below = name
    bitmap = f",bitmaps.0={export.bitmap}" if export.bitmap else ""
    return [*argv, "--export", f"type=nbd,id=e{number},node-name={below},name={export.name}{bitmap}"]


def _require_size(path: str, capacity: int) -> None:
    """The image above would hide that a layer is too short: its end would read as zeroes."""
    size = qcow2.virtual_size(path)
    if size != capacity:
        raise errors.Damaged(path=path, reason=f"it is an image of {size} bytes, the disk had {capacity}")


def _allow_files(count: int) -> None:
    """Many disks of long chains: the daemon inherits a limit of open files that is high enough, if it may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 512  # its clients' connections, too
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard))


@contextmanager
def _proved(exports: Sequence[Export], socket: str, stop: Callable[[], None]) -> Iterator[List[client.Connection]]:
    """A connection to the first export, the sign of life, after every export has answered with its size and bitmap."""
    made: List[client.Connection] = []
    try:
        for export in exports:
            contexts = [export.context] if export.context else []
            endpoint = server.Endpoint(socket, export.name)
            made += client.connect(endpoint, 1, contexts, export.capacity, stop)
            if made[-1].contexts != frozenset(contexts):
                raise errors.NbdError(export=export.name, reason=f"QEMU does not offer the bitmap '{export.bitmap}'")
        client.close(made[1:])
        del made[1:]
        yield made
    finally:
        client.close(made)
