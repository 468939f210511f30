"""Servers of ours over images of ours: each is a context manager that ends exactly once, by its process id."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Iterator, List, Optional, Sequence

from libvirt_cbt import errors, machines, names, processes, tls, tools
from libvirt_cbt.nbdio import qcow2

START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 60.0
# glibc maps and unmaps larger pieces one by one, and QEMU has a buffer for each request: a page fault for each 4 KiB.
# https://www.gnu.org/software/libc/manual/html_node/Memory-Allocation-Tunables.html
ALLOCATOR: Final = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(16 << 20)}


@dataclass(frozen=True)
class Endpoint:
    """An NBD export: absolute path of a unix socket (107 bytes at most) and the export's name; or of `server`, by TLS."""

    socket: str
    export: str
    server: Optional[tls.Server] = None


@contextmanager
def sink(layer: str, run_dir: str, *, compress: bool) -> Iterator[List[Endpoint]]:
    """A layer, opened alone for writing; with `compress` two ways in: the first compresses, the last writes as it is.

    Both are one image to QEMU, so a flush of either is for all.  It leaves everything with the kernel and waits for no
    disk: QEMU would at each new L2 table, twice, in the middle of the copy (one per 512 MiB of the disk that is written
    to).  Who publishes the layer syncs it.
    https://www.qemu.org/docs/master/tools/qemu-storage-daemon.html
    """
    qcow2.refuse_external_data(layer)
    name = os.path.basename(layer)
    where = os.path.join(run_dir, f"sink-{name.partition('.')[0]}.sock")
    quiet = {"cache": {"no-flush": True}}
    plain = {**qcow2.alone(layer), **quiet, "node-name": "plain"}
    nodes = [{**plain, "file": {**plain["file"], **quiet}}]
    if compress:
        nodes.insert(0, {"driver": "compress", "node-name": "compressing", "file": "plain"})
    # More than there are processors, all busy with compressing, would take turns with its main loop and with the client.
    argv = _storage_daemon(where, _processors())
    for node in reversed(nodes):
        argv += ["--blockdev", json.dumps(node)]
    for node in nodes:
        argv += ["--export", f"type=nbd,id={node['node-name']},node-name={node['node-name']},writable=on"]
    with running(argv, where):
        yield [Endpoint(where, node["node-name"]) for node in nodes]


@contextmanager
def image(fd: int, run_dir: str) -> Iterator[Endpoint]:
    """One qcow2 image of a restore, open for reading and writing."""
    where = os.path.join(run_dir, "image.sock")
    argv = ["qemu-nbd", "--persistent", "--shared=8", "--cache=writeback", "--export-name=image", f"--socket={where}"]
    with running([*argv, "--format=qcow2", "--", tools.descriptor(fd)], where, keep=(fd,)):
        yield Endpoint(where, "image")


@contextmanager
def layers(paths: Sequence[str], run_dir: str) -> Iterator[List[Endpoint]]:
    """Every layer alone (its backing file not opened), read-only, by one storage daemon.  Errors: as of `running`.

    https://www.qemu.org/docs/master/tools/qemu-storage-daemon.html
    """
    where = os.path.join(run_dir, "layers.sock")
    argv = _storage_daemon(where, _readers())
    endpoints: List[Endpoint] = []
    for number, path in enumerate(paths):
        qcow2.refuse_external_data(path)
        node = {**qcow2.alone(path), "node-name": f"n{number}", "read-only": True}
        argv += ["--blockdev", json.dumps(node)]
        argv += ["--export", f"type=nbd,id=e{number},node-name=n{number},name=layer{number}"]
        endpoints.append(Endpoint(where, f"layer{number}"))
    with running(argv, where, paths):
        yield endpoints


@contextmanager
def chain(paths: Sequence[str], run_dir: str) -> Iterator[Endpoint]:
    """What a whole chain of layers (newest first, at least one) shows, read-only, by one storage daemon.

    The chain is as `paths` say: what the headers name as backing files is never opened.  Errors: as of `running`.
    """
    name = os.path.basename(paths[0]).partition(".")[0]
    where = os.path.join(run_dir, f"chain-{name}.sock")
    argv = _storage_daemon(where, _readers())
    below: Optional[str] = None
    for number, path in reversed(list(enumerate(paths))):
        qcow2.refuse_external_data(path)
        node = {**qcow2.alone(path), "node-name": f"n{number}", "read-only": True, "backing": below}
        argv += ["--blockdev", json.dumps(node)]
        below = f"n{number}"
    argv += ["--export", f"type=nbd,id=e,node-name={below},name=chain"]
    with running(argv, where, paths):
        yield Endpoint(where, "chain")


def require_open(paths: Sequence[str]) -> None:
    """Which of a chain's layers cannot be opened.  Errors: Damaged, LayerInUse naming it."""
    for path in paths:
        asking = ["qemu-img", "info", "--output=json", alone(path)]
        try:
            tools.run([*asking, "-U"])
        except errors.ToolFailed as e:
            raise errors.Damaged(path=path, reason=str(e)) from None
        try:
            tools.run(asking)
        except errors.ToolFailed:
            raise errors.LayerInUse(path=path) from None  # sharing it with a writer is all that -U adds


def alone(path: str) -> str:
    """A layer by itself, as a file name that qemu-img takes."""
    return "json:" + json.dumps(qcow2.alone(path))


@contextmanager
def running(argv: List[str], path: str, layers: Sequence[str] = (), *, keep: Sequence[int] = ()) -> Iterator[None]:
    """A server of ours that listens on `path`, up to its greeting; ended by its process id.

    `layers` are what it opens; it inherits the descriptors `keep`.
    Errors: Damaged, LayerInUse naming the layer that it cannot open; else ToolFailed.
    """
    if len(os.fsencode(path)) > 107:
        raise errors.HypervisorError(
            reason=f"the socket path {path} is too long; set LIBVIRT_CBT_RUN_DIR to a shorter one"
        )
    with tempfile.TemporaryFile() as complaints:
        # A session of its own: Ctrl-C in a terminal is ours to handle.
        process = subprocess.Popen(
            [*_dying_with(os.getpid()), tools.find(argv[0]), *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            start_new_session=True,
            pass_fds=(*processes.inherited(), *keep),
            umask=tools.UMASK,
            env={**os.environ, **ALLOCATOR},
        )
        try:
            try:
                _wait_started(process, argv[0], path, complaints)
            except errors.ToolFailed:
                require_open(layers)
                raise
            yield
            if process.poll() is not None:
                raise _failed(argv[0], process, complaints)
        finally:
            _stop(process)
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass


def _storage_daemon(path: str, most: int) -> List[str]:
    """The beginning of one that listens on `path`, with `most` threads for what it reads, writes and compresses."""
    return ["qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={path.replace(',', ',,')}", *threads(most)]


def threads(most: int) -> List[str]:
    """What keeps a storage daemon at `most` threads; left alone it starts one for each request, up to 64."""
    return ["--object", f"main-loop,id=main,thread-pool-max={most}"] if _countable() else []


@functools.cache
def _countable() -> bool:
    """Before QEMU 7.1 they could not be told."""
    return "thread-pool-max" in tools.run(["qemu-storage-daemon", "--object", "main-loop,help"])


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def _readers() -> int:
    """Threads of a daemon that is read from; one processor is for the client, or for the daemon's main loop.

    Many read a file in the order in which they are woken: the kernel takes it for random access and reads nothing ahead.
    """
    return max(1, _processors() - 1)


def _dying_with(parent: int) -> List[str]:
    """The beginning of a command that is killed when we are.

    KILL, not TERM: qemu-nbd ignores a TERM that comes before its main loop, and there is only one.  What it was
    writing is thrown away anyway.  The shell sees whether we had gone before the kernel was told.
    """
    alive = '[ "$PPID" = "$0" ] && exec "$@"'
    return [tools.find("setpriv"), "--pdeathsig", "KILL", "--", tools.find("sh"), "-c", alive, str(parent)]


def _wait_started(process: subprocess.Popen[bytes], tool: str, path: str, complaints: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        # A socket listens before the images are open; the greeting comes when all is.
        if machines.greets(path, 0.5):
            return
        if process.poll() is not None:
            raise _failed(tool, process, complaints)
        time.sleep(0.005)
    raise errors.ToolFailed(tool=tool, reason=f"no answer after {START_SECONDS:.0f} s")


def _failed(tool: str, process: subprocess.Popen[bytes], complaints: Any) -> errors.ToolFailed:
    complaints.seek(0)
    lines = complaints.read(65536).decode(errors="replace").strip().splitlines()
    return errors.ToolFailed(
        tool=tool, reason=names.printable(lines[-1], 500) if lines else f"it ended with code {process.returncode}"
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a server in order; one that does not end is killed."""
    deadline = time.monotonic() + STOP_SECONDS
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            process.wait()
            return
        # Again and again: qemu-nbd ignores a SIGTERM that comes between its listen() and its main loop.
        process.terminate()
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
