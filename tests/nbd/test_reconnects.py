"""A source whose connection is cut, anywhere and again and again: the copy is the one that an unbroken wire gives."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Sequence

import nbd
import numpy as np
import pytest

from libvirt_cbt import errors, extents
from libvirt_cbt.nbdio import client, copy, lanes, server, source
from tests import patience
from tests.guests.proxy import GO_AWAY, STALL, Proxy
from tests.nbd.conftest import MIB, Chain, Disk, assert_same, nbdkit, none_also, nothing, served

SIZE = 6 * MIB + 512
UNTOUCHED = 0xEE  # what the sink holds before


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "FIRST_PAUSE", 0.001)


class Copied(NamedTuple):
    sink: bytes
    delta: bytes
    contents: bytes
    pulled: copy.Pulled


class Bench:
    """A fragmented disk with a bitmap, its fleecing point behind a wire, and a sink whose bytes can be looked at."""

    def __init__(self, folder: str, disk: Disk, point: server.Endpoint, sink: server.Endpoint) -> None:
        self.folder, self.disk, self.point, self.sink = folder, disk, point, sink

    def pull(
        self,
        budgets: Sequence[Optional[int]],
        *,
        markers: Sequence[Optional[int]] = (),
        then: str = "cut",
        alive: Callable[[], bool] = copy.always,
        stop: Callable[[], None] = nothing,
        progress: Callable[[str, int, int], None] = nothing,
        what: str = copy.DIRTY,
        **options: Any,
    ) -> Copied:
        """Each time `connections` that read are made, which have the next `budgets`, and then one for the bitmap."""
        raw = Path(self.folder, "sink.raw")
        with open(raw, "r+b") as file:  # never cut short: its server is running
            file.write(bytes([UNTOUCHED]) * os.path.getsize(raw))
        delta: List[extents.Extents] = [extents.empty()]
        contents: List[extents.Extents] = [np.empty(0, extents.CONTENT)]
        each, left = options.get("connections", 1), [*markers]
        rows: List[Optional[int]] = []
        for at in range(0, max(len(budgets), len(markers) * each), each):
            readers = [*budgets[at : at + each], *[None] * each][:each]
            rows += [*readers, left.pop(0) if left else None]
        with Proxy(f"{self.folder}/wire.sock", self.point.socket, budgets=rows, then=then) as self.wire:
            one = copy.Pull(
                target="vda",
                source=server.Endpoint(self.wire.path, self.point.export),
                capacity=SIZE,
                bitmap=f"qemu:dirty-bitmap:{self.disk.bitmap}",
                copy=what,
                expected=SIZE,
                sink=copy.Sink([self.sink], "/repo/x/vda.qcow2", has_parent=True) if what != copy.NOTHING else None,
                also=none_also,
                delta=delta.append,
                contents=contents.append,
            )
            bounds = lanes.Options(**{"request_size": 65536, "requests": 4, "stall_seconds": 20.0, **options})
            [pulled] = copy.pull([one], bounds, progress=progress, stop=stop, alive=alive)
        return Copied(raw.read_bytes(), np.concatenate(delta).tobytes(), np.concatenate(contents).tobytes(), pulled)

    def same(self, found: Copied, wanted: Copied, reconnects: int) -> None:
        assert_same(found.sink, wanted.sink, f"the sink after cuts, {self.wire.handed} bytes handed on")
        assert found.delta == wanted.delta
        assert found.contents == wanted.contents
        assert found.pulled == replace(wanted.pulled, reconnects=reconnects)


@pytest.fixture
def bench(folder: str, rng: random.Random) -> Iterator[Bench]:
    disk = Disk(folder, SIZE, cluster=512, granularity=512)
    disk.fill(b"".join(bytes([rng.choice((0, 0x11, 0x12))]) * 512 for _ in range(SIZE // 512)))
    disk.next_bitmap()
    disk.write(("zero", MIB + 4096, 5 * extents.GRAIN, 0))
    grains = rng.sample(range(SIZE // extents.GRAIN), 40)
    places = [grain * extents.GRAIN + 512 * rng.randrange(128) for grain in grains]
    disk.write(*((rng.choice(("write", "zero")), place, 512, rng.randrange(1, 256)) for place in places))
    raw = Path(folder, "sink.raw")
    raw.write_bytes(bytes(-(-SIZE // extents.GRAIN) * extents.GRAIN))
    argv = ["qemu-nbd", "-t", "-e", "8", "-f", "raw", "-x", "layer", "-k", f"{folder}/sink.sock", str(raw)]
    with disk.export() as point, served(argv, f"{folder}/sink.sock"):
        yield Bench(folder, disk, point, server.Endpoint(f"{folder}/sink.sock", "layer"))


def handshake(bench: Bench, context: str = "base:allocation") -> int:
    """Bytes that the server sends before the first request is answered."""
    with Proxy(f"{bench.folder}/probe.sock", bench.point.socket) as wire:
        client.close(client.connect(server.Endpoint(wire.path, "disk"), 1, (context,), SIZE, nothing))
    return wire.handed[0]  # it counts what it has handed on, so a moment later than the client has it


def test_an_unbroken_wire(bench: Bench) -> None:
    """What the others are compared with is itself right."""
    whole = bench.pull([])
    assert len(bench.wire.handed) == 2
    assert whole.pulled.reconnects == 0
    assert 1.7 * MIB < whole.pulled.data_bytes < SIZE
    assert whole.pulled.zero_bytes
    for offset, length, *_ in np.frombuffer(whole.contents, extents.CONTENT).tolist():
        assert_same(whole.sink[offset : offset + length], bench.disk.model[offset : offset + length], f"at {offset}")


@pytest.mark.fault(26)
def test_a_cut_anywhere(bench: Bench, rng: random.Random) -> None:
    whole = bench.pull([])
    first, last = handshake(bench), bench.wire.handed[0]
    places = [*range(first, first + 24), first + 1000, *(rng.randrange(first, last) for _ in range(60)), last - 1]
    for budget in places:
        bench.same(bench.pull([budget]), whole, 1)


@pytest.mark.fault(26)
@pytest.mark.parametrize("what", [copy.DIRTY, copy.NOTHING])
def test_a_cut_of_the_bitmaps_connection(bench: Bench, rng: random.Random, what: str) -> None:
    whole = bench.pull([], what=what)
    first, last = handshake(bench, f"qemu:dirty-bitmap:{bench.disk.bitmap}"), bench.wire.handed[1]
    for budget in sorted({first, first + 1, last - 1, *(rng.randrange(first, last) for _ in range(20))}):
        bench.same(bench.pull([], markers=[budget], what=what), whole, 1)
    bench.same(bench.pull([None, MIB], markers=[first, rng.randrange(first)], what=what), whole, 2)


def test_a_cut_in_the_second_handshake(bench: Bench, rng: random.Random) -> None:
    whole = bench.pull([])
    last = bench.wire.handed[0]
    length = handshake(bench)
    for budget in sorted({0, 1, length - 1, *rng.sample(range(length), 40)}):
        bench.same(bench.pull([rng.randrange(length, last), budget]), whole, 2)


def test_cuts_again_and_again(bench: Bench, rng: random.Random) -> None:
    whole = bench.pull([])
    last = bench.wire.handed[0]
    length = handshake(bench)
    for _ in range(20):
        # Small ones, too, so that the new connection dies in the block status that is asked again.
        four = [rng.choice((rng.randrange(length, last // 5), length + rng.randrange(2000))) for _ in range(4)]
        bench.same(bench.pull(four[:2]), whole, 2)
        bench.same(bench.pull(four, reconnects=4), whole, 4)
        with pytest.raises(errors.SourceLost) as caught:
            bench.pull(four)
        assert caught.value.facts["target"] == "vda"
        assert len(bench.wire.handed) == 8


def test_a_mark_is_resumed(bench: Bench, rng: random.Random) -> None:
    whole = bench.pull([], what=copy.NOTHING)
    first, last = handshake(bench), bench.wire.handed[0]
    for budget in [first, last - 1, *(rng.randrange(first, last) for _ in range(20))]:
        bench.same(bench.pull([budget], what=copy.NOTHING), whole, 1)


def test_several_connections_of_a_disk(bench: Bench, rng: random.Random) -> None:
    """One of them is cut: all are made again, and that counts once."""
    whole = bench.pull([], connections=3)
    least, length = min(bench.wire.handed[:3]), handshake(bench)
    cuts = 0
    for _ in range(200):
        budgets: List[Optional[int]] = [None, None, None]
        budgets[rng.randrange(3)] = rng.randrange(length, least // 2)
        found = bench.pull(budgets, connections=3)
        cut = len(bench.wire.handed) > 4  # how much each of them carries is never the same twice
        bench.same(found, whole, int(cut))
        assert not cut or len(bench.wire.handed) == 8
        cuts += cut
        if cuts == 20:
            return
    pytest.fail(f"only {cuts} of 200 were cut")


def test_without_reconnects_a_cut_is_the_end(bench: Bench) -> None:
    with pytest.raises(errors.SourceLost):
        bench.pull([MIB], reconnects=0)
    assert len(bench.wire.handed) == 2


def test_another_job_is_another_moment(bench: Bench) -> None:
    """Asked before connecting, and again when connected: the socket might have changed hands in between."""
    with pytest.raises(errors.SourceLost):
        bench.pull([MIB], alive=lambda: False)
    assert len(bench.wire.handed) == 2
    answers = [True, False]
    with pytest.raises(errors.SourceLost):
        bench.pull([MIB], alive=lambda: answers.pop(0))
    assert len(bench.wire.handed) == 4


def test_a_server_that_went_is_not_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "FIRST_PAUSE", 0.05)
    watch = patience.Stopwatch()
    with pytest.raises(errors.SourceLost):
        bench.pull([MIB], then=GO_AWAY, reconnects=100)
    assert watch.seconds() < 30  # three minutes of pauses


def test_a_socket_that_nobody_listens_on(bench: Bench) -> None:
    """QEMU killed: the file is there, connecting is refused."""

    def dead() -> bool:
        bench.wire.go_away()
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(bench.wire.path)
        return True

    watch = patience.Stopwatch()
    with pytest.raises(errors.SourceLost):
        bench.pull([MIB], alive=dead, reconnects=100)
    assert watch.seconds() < 30


@pytest.mark.parametrize("other", ["size", "bitmap", "export"])
def test_an_export_that_is_another_is_refused(bench: Bench, other: str) -> None:
    disk = Disk(bench.folder, SIZE + 512 if other == "size" else SIZE)
    if other == "size":
        disk.next_bitmap()
    path = f"{bench.folder}/other.sock"
    argv = ["qemu-nbd", "-r", "-t", "-e", "8", "-x", "none" if other == "export" else "disk", "-f", "qcow2", "-k", path]
    if disk.bitmap:
        argv += ["-B", disk.bitmap]
    with served([*argv, disk.path], path):

        def changed() -> bool:
            bench.wire.server_path = path
            return True

        kind, words = {
            "size": (errors.NbdError, "bytes where"),
            "bitmap": (errors.NbdError, "does not offer"),
            "export": (errors.SourceLost, "vda"),  # the job has ended: its export is not there any more
        }[other]
        with pytest.raises(kind, match=words):
            bench.pull([MIB], alive=changed)


def test_the_lost_handle_is_freed_before_the_next_one_is_made(bench: Bench) -> None:
    """Freed at once, not by the garbage collector: it has buffers of ours, and a socket that holds up the job's end."""
    left: List[int] = []

    def count() -> bool:
        left.append(sum(isinstance(x, nbd.NBD) for x in gc.get_objects()))
        return True

    gc.collect()
    gc.disable()
    try:
        bench.pull([MIB, MIB // 2], alive=count)
    finally:
        gc.enable()
    assert left == [1, 3, 1, 3]  # the sink's; and those of the new connections


def test_stop_ends_the_pause(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "FIRST_PAUSE", 60.0)
    monkeypatch.setattr(source, "LONGEST_PAUSE", 60.0)
    watch = patience.Stopwatch()

    def stop() -> None:
        if watch.wall() > 0.5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bench.pull([MIB], stop=stop)
    assert watch.seconds() < 30


def test_a_new_connection_that_hangs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handshake that stalls is given up once, not three times: other disks wait meanwhile."""
    monkeypatch.setattr(client, "CONNECT_SECONDS", 0.5)

    tries: List[float] = []

    def hang() -> bool:
        tries.append(time.monotonic())
        bench.wire.stall()
        return True

    with pytest.raises(errors.SourceLost):
        bench.pull([MIB], alive=hang)
    assert len(tries) == 1 and time.monotonic() - tries[0] > 0.4


def test_a_stall_is_no_cut(bench: Bench) -> None:
    with pytest.raises(errors.SourceStalled):
        bench.pull([MIB], then=STALL, stall_seconds=1.5)
    assert len(bench.wire.handed) == 2
    whole = bench.pull([])

    def go_on(*_: Any) -> None:
        if stalled and time.monotonic() > stalled[0] + 0.3:
            bench.wire.go_on()

    def stall(*_: Any) -> None:
        if not stalled:
            stalled.append(time.monotonic())
            bench.wire.stall()

    stalled: List[float] = []
    bench.same(bench.pull([], progress=stall, stop=go_on), whole, 0)


def test_one_of_two_disks_is_cut(folder: str, rng: random.Random) -> None:
    """The other one is copied on, and both are right."""
    disks = [Disk(folder, 4 * MIB) for _ in range(2)]
    stored: List[List[extents.Extents]] = [[], []]
    with contextlib.ExitStack() as stack:
        pulls: List[copy.Pull] = []
        for number, disk in enumerate(disks):
            disk.fill(rng.randbytes(4 * MIB))
            point, path = stack.enter_context(disk.export()), f"{folder}/sink{number}"
            if number:
                point = server.Endpoint(f"{folder}/wire.sock", point.export)
                stack.enter_context(Proxy(point.socket, pulls[0].source.socket, budgets=[MIB]))
            Path(path).write_bytes(bytes(disk.size))
            stack.enter_context(served(["qemu-nbd", "-t", "-f", "raw", "-k", f"{path}.sock", path], f"{path}.sock"))
            pulls.append(
                copy.Pull(
                    target=f"vd{number}",
                    source=point,
                    capacity=disk.size,
                    bitmap=None,
                    copy=copy.ALL,
                    expected=disk.size,
                    sink=copy.Sink([server.Endpoint(f"{path}.sock", "")], path, has_parent=False),
                    also=none_also,
                    delta=nothing,
                    contents=stored[number].append,
                )
            )
        done = copy.pull(pulls, lanes.Options(), progress=nothing, stop=nothing)
    assert [one.reconnects for one in done] == [0, 1]
    for number in range(2):
        assert_same(Path(f"{folder}/sink{number}").read_bytes(), disks[0].model, f"disk {number}")


def test_a_resumed_copy_is_a_whole_backup(folder: str, rng: random.Random) -> None:
    """Through real layers, with each generation cut three times."""
    disk, chain = Disk(folder, 4 * MIB + 512), Chain(folder)
    for generation in range(4):
        disk.write(*(("write", rng.randrange(4080) * 1024, 9 * 1024, rng.randrange(1, 256)) for _ in range(40)))
        with disk.export() as point:
            budgets = [900 + rng.randrange(200 * 1024) for _ in range(3)]
            with Proxy(f"{folder}/wire.sock", point.socket, budgets=budgets) as wire:
                chain.backup(server.Endpoint(wire.path, "disk"), disk.model, disk.bitmap if generation else None)
                assert chain.layers[-1].pulled.reconnects
        disk.next_bitmap()
    chain.prove()


def test_no_client_is_left_after_a_resumed_copy(folder: str) -> None:
    path, log = f"{folder}/source.sock", f"{folder}/log"
    # One thread: with more, nbdkit 1.32 dies of an assertion when a client goes while it answers.
    argv = ["nbdkit", "-f", "-t", "1", "-U", path, "--filter=log", "pattern", f"size={4 * MIB}", f"logfile={log}"]
    wire = Proxy(f"{folder}/wire.sock", path, budgets=[MIB, MIB])
    with wire, served(argv, path), nbdkit(folder, "memory", f"size={4 * MIB}") as sink:
        one = copy.Pull(
            target="vda",
            source=server.Endpoint(wire.path, ""),
            capacity=4 * MIB,
            bitmap=None,
            copy=copy.ALL,
            expected=0,
            sink=copy.Sink([sink], "/repo/x/vda.qcow2", has_parent=False),
            also=none_also,
            delta=nothing,
            contents=nothing,
        )
        assert copy.pull([one], lanes.Options(), progress=nothing, stop=nothing)[0].reconnects == 2
        deadline = time.monotonic() + 30
        while True:
            lines = Path(log).read_text(encoding="utf-8").splitlines()
            connected = sum(" Connect " in line for line in lines)
            if connected == 3 and sum(" Disconnect " in line for line in lines) == connected:
                break
            assert time.monotonic() < deadline, lines
            time.sleep(0.01)
