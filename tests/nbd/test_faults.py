"""A source, a sink or a layer that fails: a typed error in seconds, never wrong data, no client left connected."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import Any, Callable, ContextManager, Dict, List, Optional, Type

import pytest

from libvirt_cbt import errors, extents
from libvirt_cbt.nbdio import copy, lanes, qcow2, server
from tests import patience
from tests.guests.proxy import CUT, GO_AWAY, Proxy
from tests.nbd import histories
from tests.nbd.conftest import MIB, Chain, Disk, nbdkit, none_also, nothing, served

SIZE = 16 * MIB
QUICK = lanes.Options(stall_seconds=1.0)


def full(
    source: server.Endpoint,
    sink: server.Endpoint,
    *,
    size: int = SIZE,
    bitmap: Optional[str] = None,
    progress: Any = nothing,
    stop: Any = nothing,
    has_parent: bool = False,
    options: lanes.Options = QUICK,
) -> copy.Pulled:
    one = copy.Pull(
        target="vda",
        source=source,
        capacity=size,
        bitmap=bitmap,
        copy=copy.DIRTY if bitmap else copy.ALL,
        expected=size,
        sink=copy.Sink([sink], "/repo/x/vda.qcow2", has_parent),
        also=none_also,
        delta=nothing,
        contents=nothing,
    )
    return copy.pull([one], options, progress=progress, stop=stop)[0]


def pattern(folder: str, *argv: str, size: int = SIZE) -> ContextManager[server.Endpoint]:
    return nbdkit(folder, "pattern", f"size={size}", *argv)


def memory(folder: str, *argv: str, size: int = SIZE) -> ContextManager[server.Endpoint]:
    return nbdkit(folder, "memory", f"size={size}", *argv)


# The source's answers


@pytest.mark.fault(29)
def test_a_missing_bitmap_is_fatal(folder: str) -> None:
    """NBD leaves an unknown context out in silence; an increment without it would be empty."""
    disk = Disk(folder, MIB)
    disk.next_bitmap()
    with disk.export() as source, memory(folder) as sink, pytest.raises(errors.NbdError, match="does not offer"):
        full(source, sink, size=MIB, bitmap="qemu:dirty-bitmap:other", has_parent=True)


@pytest.mark.fault(29)
def test_without_allocation_all_is_read(folder: str) -> None:
    with memory(folder, "--filter=noextents") as source, memory(folder) as sink:
        assert full(source, sink).read_bytes == SIZE
    with memory(folder) as source, memory(folder) as sink:
        assert full(source, sink).read_bytes == 0


@pytest.mark.fault(33)
@pytest.mark.parametrize("size", [SIZE - 512, SIZE + 512])
def test_another_size_is_refused(folder: str, size: int) -> None:
    with memory(folder, size=size) as source, memory(folder) as sink, pytest.raises(errors.NbdError, match="bytes"):
        full(source, sink)


def test_a_wrong_export_is_refused(folder: str) -> None:
    with Disk(folder, MIB).export() as source, memory(folder) as sink:
        with pytest.raises(errors.NbdError, match="other"):
            full(server.Endpoint(source.socket, "other"), sink, size=MIB)


def test_no_server(folder: str) -> None:
    with memory(folder) as sink, pytest.raises(errors.NbdError):
        full(server.Endpoint(f"{folder}/nobody", ""), sink)


@pytest.mark.fault(27)
@pytest.mark.parametrize("sector", [0, 2048, 32767])
def test_an_unreadable_sector_is_named(folder: str, sector: int) -> None:
    disk = Disk(folder, SIZE)
    disk.write(("write", 0, SIZE, 1))
    raw, path = f"{folder}/raw", f"{folder}/bad.sock"
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk.path, raw], check=True)
    bad = {"event": "none", "iotype": "read", "errno": 5, "sector": sector, "once": False}
    file = {"driver": "blkdebug", "image": {"driver": "file", "filename": raw}, "inject-error": [bad]}
    argv = ["qemu-nbd", "-r", "-t", "-k", path, "json:" + json.dumps({"driver": "raw", "file": file})]
    with served(argv, path), memory(folder) as sink, pytest.raises(errors.SourceUnreadable) as caught:
        full(server.Endpoint(path, ""), sink)
    facts = caught.value.facts
    assert facts["offset"] <= sector * 512 < facts["offset"] + facts["length"]
    assert facts["target"] == "vda"
    assert "Input/output error" in facts["reason"]


# The source goes


@pytest.mark.parametrize("budget", [0, 100, 1 << 16, 5 * MIB, 15 * MIB])
@pytest.mark.parametrize("goes", [True, False])
def test_a_lost_source(folder: str, budget: int, *, goes: bool) -> None:
    """One that goes, or that is cut and may not be connected again; that it may is in test_reconnects."""
    watch = patience.Stopwatch()
    options = lanes.Options() if goes else lanes.Options(reconnects=0)
    with (
        pattern(folder) as source,
        memory(folder) as sink,
        Proxy(f"{folder}/wire.sock", source.socket, budgets=[budget], then=GO_AWAY if goes else CUT) as p,
    ):
        kind: Type[errors.CbtError] = errors.SourceLost if budget > 1000 else errors.NbdError
        with pytest.raises(kind) as caught:
            full(server.Endpoint(p.path, ""), sink, options=options)
        assert caught.value.kind in ("SourceLost", "NbdError")
        assert len(p.handed) == 1
    assert watch.seconds() < 30


def test_a_killed_source(folder: str) -> None:
    path = f"{folder}/source.sock"
    with served(["nbdkit", "-f", "-U", path, "--filter=rate", "pattern", f"size={SIZE}", "rate=200M"], path) as process:
        with memory(folder) as sink, pytest.raises(errors.SourceLost) as caught:
            full(server.Endpoint(path, ""), sink, progress=lambda *_: process.kill())
    assert caught.value.kind == "SourceLost"


def stopped(process: subprocess.Popen[bytes]) -> Callable[..., None]:
    def progress(*_: Any) -> None:
        process.send_signal(signal.SIGSTOP)

    return progress


@pytest.mark.fault(28)
def test_a_stalled_source(folder: str) -> None:
    path, asked = f"{folder}/source.sock", []
    with served(["nbdkit", "-f", "-U", path, "pattern", f"size={SIZE}"], path) as process, memory(folder) as sink:
        watch = patience.Stopwatch()
        with pytest.raises(errors.SourceStalled):
            full(
                server.Endpoint(path, ""),
                sink,
                progress=stopped(process),
                stop=lambda: asked.append(time.monotonic()),
            )
        assert watch.wall() > 1 and watch.seconds() < 30  # the stall, and 5 for the goodbye to a server that does not hear it
    assert sum(when > asked[-1] - 1 for when in asked) > 1  # also while it stalls


class Enough(Exception):
    pass


def stop_after(seconds: float) -> Callable[[], None]:
    end = time.monotonic() + seconds

    def stop() -> None:
        if time.monotonic() > end:
            raise Enough

    return stop


def test_stop_ends_a_stall(folder: str) -> None:
    path = f"{folder}/source.sock"
    with served(["nbdkit", "-f", "-U", path, "pattern", f"size={SIZE}"], path) as process, memory(folder) as sink:
        with pytest.raises(Enough):
            full(server.Endpoint(path, ""), sink, progress=stopped(process), stop=stop_after(0.5))


def test_stop_ends_a_handshake_that_hangs(folder: str) -> None:
    path = f"{folder}/source.sock"
    watch = patience.Stopwatch()
    with served(["nbdkit", "-f", "-U", path, "pattern", f"size={SIZE}"], path) as process, memory(folder) as sink:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(Enough):
            full(server.Endpoint(path, ""), sink, stop=stop_after(0.5))
    assert watch.seconds() < 10


def test_a_long_stop_of_ourselves_is_no_stall(folder: str) -> None:
    """Suspended and continued (Ctrl-Z): the answers are there, only we were not."""
    slept: List[int] = []

    def progress(*_: Any) -> None:
        if not slept:
            slept.append(1)
            time.sleep(QUICK.stall_seconds * 1.5)

    with pattern(folder) as source, memory(folder) as sink:
        assert full(source, sink, progress=progress).read_bytes == SIZE


@pytest.mark.fault(36)
@pytest.mark.parametrize("raised", [True, False])
def test_no_client_is_left(folder: str, raised: bool) -> None:
    """Every handle has said goodbye when pull returns or raises: CVE-2024-7409 of QEMU."""
    path, log = f"{folder}/source.sock", f"{folder}/log"
    argv = ["nbdkit", "-f", "-U", path, "--filter=log", "pattern", f"size={SIZE}", f"logfile={log}"]
    def logged() -> List[str]:
        with open(log, encoding="utf-8") as file:
            return file.read().splitlines()

    def in_the_middle() -> None:
        if any(" Read " in line for line in logged()):
            raise Enough

    with served(argv, path), memory(folder) as sink:
        if raised:
            with pytest.raises(Enough):
                full(server.Endpoint(path, ""), sink, stop=in_the_middle)
        else:
            full(server.Endpoint(path, ""), sink)
        lines = logged()
    connected = sum(" Connect " in line for line in lines)
    assert sum(" Disconnect " in line for line in lines) == connected > 0


# The sink


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_sink_that_refuses(folder: str, error: str) -> None:
    kind: Type[errors.CbtError] = errors.RepositoryFull if error == "ENOSPC" else errors.RepositoryError
    failing = memory(folder, "--filter=error", f"error-pwrite={error}", "error-pwrite-rate=100%")
    with pattern(folder) as source, failing as sink, pytest.raises(kind, match=r"vda.qcow2"):
        full(source, sink)


def test_a_sink_whose_flush_fails(folder: str) -> None:
    disk = Disk(folder, MIB)
    path = f"{folder}/sink.sock"
    bad = {"event": "none", "iotype": "flush", "errno": 5, "once": False}
    file: Dict[str, Any] = {"driver": "blkdebug", "image": {"driver": "file", "filename": disk.path}}
    file["inject-error"] = [bad]
    argv = ["qemu-nbd", "-t", "-k", path, "json:" + json.dumps({"driver": "qcow2", "file": file})]
    with pattern(folder, size=MIB) as source, served(argv, path), pytest.raises(errors.RepositoryError):
        full(source, server.Endpoint(path, ""), size=MIB)


def test_a_killed_sink(folder: str) -> None:
    path = f"{folder}/sink.sock"
    with pattern(folder) as source, served(["nbdkit", "-f", "-U", path, "memory", f"size={SIZE}"], path) as process:
        with pytest.raises(errors.RepositoryError, match=r"vda\.qcow2"):
            full(source, server.Endpoint(path, ""), progress=lambda *_: process.kill())


def test_a_stalled_sink_is_not_the_sources_fault(folder: str) -> None:
    path = f"{folder}/sink.sock"
    with pattern(folder) as source, served(["nbdkit", "-f", "-U", path, "memory", f"size={SIZE}"], path) as process:
        with pytest.raises(errors.RepositoryError, match="has not moved"):
            full(source, server.Endpoint(path, ""), progress=stopped(process))


def test_a_full_file_system_under_a_real_layer(folder: str) -> None:
    small = os.path.join(folder, "small")
    os.mkdir(small)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small], check=False, capture_output=True)
    if mount.returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        layer = os.path.join(small, "vda.qcow2")
        qcow2.create_layer(layer, SIZE, backing=None, compress=False)
        with pattern(folder) as source, server.sink(layer, folder, compress=False) as [sink]:
            with pytest.raises(errors.RepositoryFull):
                full(source, sink)
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
def test_no_room_for_an_empty_layer(folder: str) -> None:
    """qemu-img says it in words only."""
    small = os.path.join(folder, "small")
    with histories.tmpfs(small, "64k"):
        with pytest.raises(errors.RepositoryFull, match=r"vda\.qcow2"):
            qcow2.create_layer(os.path.join(small, "vda.qcow2"), SIZE, backing=None, compress=True)
    with pytest.raises(errors.ToolFailed, match="No such file"):
        qcow2.create_layer(os.path.join(folder, "nowhere/vda.qcow2"), SIZE, backing=None, compress=True)


def test_an_increment_is_whole_after_a_failed_attempt(folder: str) -> None:
    """What was cut is thrown away; the same bitmap gives the increment again."""
    disk, chain = Disk(folder, 4 * MIB), Chain(folder)
    disk.write(("write", 0, MIB, 1))
    with disk.export() as source:
        chain.backup(source, disk.model, None)
    disk.next_bitmap()
    disk.write(("write", MIB // 2, 3 * MIB, 2))
    with disk.export() as source:
        wire = Proxy(f"{folder}/wire.sock", source.socket, budgets=[MIB], then=GO_AWAY)
        with memory(folder, size=4 * MIB) as sink, wire as proxy:
            with pytest.raises(errors.SourceLost):
                full(
                    server.Endpoint(proxy.path, "disk"),
                    sink,
                    size=4 * MIB,
                    bitmap=f"qemu:dirty-bitmap:{disk.bitmap}",
                    has_parent=True,
                )
        layer = chain.backup(source, disk.model, disk.bitmap)
    assert extents.total(layer.delta) == 3 * MIB
    chain.prove()
