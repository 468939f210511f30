"""`serve` as a user runs it: any two generations of a real guest, asked by other people's NBD clients."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import COMMAND, Tool, models, same


@pytest.fixture
def guest(libvirtd: daemon.Daemon) -> Iterator[PlainGuest]:
    disks = [Disk("vda", 8 * MIB), Disk("vdb", 3 * MIB + 17 * 512, options=("cluster_size=512",))]
    with PlainGuest(libvirtd, "plain", disks) as made:
        made.define()
        made.start()
        yield made


@pytest.fixture
def place() -> Iterator[str]:
    """An empty folder with a short path."""
    with tempfile.TemporaryDirectory(prefix="serve-") as path:
        yield path


class Process:
    """`serve` that is ready."""

    def __init__(self, process: subprocess.Popen[str], result: Any) -> None:
        self.process, self.result = process, result
        self.disks = {disk["target"]: disk for disk in result["disks"]}

    def ended(self) -> Tuple[int, str, str]:
        """Exit code, what else came on stdout, stderr."""
        out, err = self.process.communicate(timeout=60)
        assert "Traceback" not in err, err
        return self.process.returncode, out, err


@contextmanager
def serving(tool: Tool, place: str, *arguments: str, end: signal.Signals = signal.SIGTERM) -> Iterator[Process]:
    """In between it serves; it must end well, and leave nothing."""
    argv = tool.argv("serve", *arguments, "--socket", f"{place}/s")
    with started(tool, argv) as process:
        assert process.stdout
        found = Process(process, json.loads(process.stdout.readline())["results"][0])
        yield found
        process.send_signal(end)
        assert found.ended() == (0, "", "")
    assert os.listdir(place) == []
    assert os.listdir(tool.host.run_dir) == []


@contextmanager
def started(tool: Tool, argv: List[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        argv,
        env=tool.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # which does nothing to one that has ended


def mapped(disk: Any) -> List[Tuple[int, int]]:
    """(offset, length) of what nbdinfo calls dirty, neighbours joined."""
    argv = ["nbdinfo", f"--map={disk['context']}", "--json", disk["uri"]]
    return joined([(e["offset"], e["length"]) for e in json.loads(subprocess.check_output(argv)) if e["type"]])


def joined(rows: List[Tuple[int, int]]) -> List[Tuple[int, int]]:
    out: List[Tuple[int, int]] = []
    for offset, length in rows:
        if out and sum(out[-1]) == offset:
            out[-1] = (out[-1][0], out[-1][1] + length)
        else:
            out.append((offset, length))
    return out


def differs_outside(before: bytes, after: bytes, rows: List[Tuple[int, int]]) -> bool:
    old, new = bytearray(before.ljust(len(after), b"\0")), bytearray(after)
    for offset, length in rows:
        old[offset : offset + length] = new[offset : offset + length] = bytes(length)
    return old != new


def copied(disk: Any, folder: Path) -> bytes:
    path = folder / f"copied-{time.monotonic_ns()}"
    subprocess.check_call(["nbdcopy", disk["uri"], str(path)])
    return path.read_bytes()


def mark(tool: Tool, guest: PlainGuest) -> None:
    assert tool.run("mark", guest.name, "--scratch-dir", tool.host.scratch).code == 0


def generations(tool: Tool, guest: PlainGuest, rng: random.Random) -> List[Tuple[str, Dict[str, bytes]]]:
    """Six backups and marks, each with what the disks held; one of them grows in between."""
    found = []
    for number in range(1, 7):
        for target in guest.disks:
            guest.random_writes(rng, target, 6, discards=True)
        kind = "mark" if number in (2, 5) else "backup"
        mark(tool, guest) if kind == "mark" else tool.backup(guest)
        found.append((kind, models(guest)))
        if number == 3:
            guest.grow("vdb", guest.disks["vdb"].size + 65536 + 512)
    return found


def test_any_older_delta_is_asked_for_by_a_standard_client(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path, place: str
) -> None:
    history = generations(tool, guest, rng)
    guest.domain.destroy()
    backups = [number for number, (kind, _) in enumerate(history, 1) if kind == "backup"]
    pairs = [(f, p) for f, p in itertools.product(range(7), backups) if f <= p]
    for since, at in rng.sample(pairs, 6):
        asked = "*" if not since else str(since)
        with serving(tool, place, guest.name, "--at", str(at), "--since", asked) as found:
            assert (found.result["generation"], found.result["since"]) == (at, since)
            assert found.result["sockets"] == [f"{place}/s"]
            held = history[at - 1][1]
            same({t: copied(d, tmp_path) for t, d in found.disks.items()}, held)
            for target, disk in found.disks.items():
                assert disk["context"] == f"qemu:dirty-bitmap:since-{since}"
                answer = tool.run("changed", guest.name, target, "--since", asked, "--until", str(at)).result
                rows = joined([(e["offset"], e["length"]) for e in answer["extents"]])
                assert mapped(disk) == rows
                assert disk["dirty_bytes"] == sum(length for _, length in rows)
                before = history[since - 1][1][target] if since else b""
                assert not differs_outside(before, held[target], rows)


def test_without_since_and_with_one_disk(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path, place: str
) -> None:
    guest.random_writes(rng, "vdb", 6)
    tool.backup(guest)
    held = models(guest)
    guest.random_writes(rng, "vdb", 6)
    mark(tool, guest)
    with serving(tool, place, guest.name, "--disk", "vdb", end=signal.SIGHUP) as found:
        assert found.result["generation"] == 1, "the newest that has data"
        assert list(found.disks) == ["vdb"] and found.disks["vdb"]["context"] is None
        same({"vdb": copied(found.disks["vdb"], tmp_path)}, held)
        raw = tmp_path / "converted"
        argv = ["qemu-img", "convert", "-f", "raw", "-O", "raw", found.disks["vdb"]["uri"], str(raw)]
        subprocess.check_call(argv)
        same({"vdb": raw.read_bytes()}, held)
        # Backups go on beside it.
        tool.backup(guest)


def test_what_cannot_be_served_is_said_in_the_one_document(
    tool: Tool, guest: PlainGuest, rng: random.Random, place: str
) -> None:
    guest.random_writes(rng, "vda", 3)
    tool.backup(guest)
    tool.backup(guest, "--exclude", "vdb")
    mark(tool, guest)
    where = ["--socket", f"{place}/s"]
    for arguments, code, kind in [
        (["--at", "1", "--since", "2"], 2, "Usage"),
        (["--at", "1", "--since", "latest"], 2, "Usage"),
        (["--since", "nonsense"], 2, "Usage"),
        (["--at", "3"], 10, "NoSuchBackup"),
        (["--at", "2", "--disk", "vdb"], 10, "NoSuchBackup"),
        (["--at", "9"], 10, "NoSuchBackup"),
        (["--disk", "vdz"], 10, "NoSuchDisk"),
        (["--since", "9"], 12, "GenerationUnknown"),
        (["--since", "0"], 12, "GenerationUnknown"),
    ]:
        ended = tool.run("serve", guest.name, *arguments, *where)
        assert (ended.code, ended.document["error"]["kind"]) == (code, kind), arguments
        assert ended.document["results"] == []
        assert os.listdir(place) == []
    assert tool.run("serve", "nobody", *where).code == 10
    Path(f"{place}/s").write_bytes(b"mine")
    ended = tool.run("serve", guest.name, *where)
    assert ended.code == 15 and Path(f"{place}/s").read_bytes() == b"mine"
    os.unlink(f"{place}/s")


def test_a_broken_lineage_is_an_error_never_an_empty_delta(
    tool: Tool, guest: PlainGuest, rng: random.Random, place: str
) -> None:
    tool.backup(guest)
    tool.run("untrack", guest.name).result  # noqa: B018
    tool.backup(guest)
    ended = tool.run("serve", guest.name, "--since", "1", "--socket", f"{place}/s")
    assert (ended.code, ended.document["error"]["kind"]) == (12, "LineageBroken")
    with serving(tool, place, guest.name, "--since", "*", "--at", "2"):
        pass


def test_its_text_and_its_ends(tool: Tool, guest: PlainGuest, place: str) -> None:
    tool.backup(guest)
    argv = [COMMAND, "-r", tool.repository, "serve", guest.name, "--since", "1", "--socket", f"{place}/s"]
    with started(tool, argv) as process:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(4)]
        assert lines[0].startswith("serving plain generation 1") and f"vda?socket={place}/s" in lines[2]
        process.send_signal(signal.SIGINT)
        assert (process.wait(60), os.listdir(place)) == (0, [])
    # A whole service is ended at once, the server too.
    with started(tool, [*argv[:3], "--json", *argv[3:]]) as process:
        assert process.stdout and json.loads(process.stdout.readline())["results"]
        for pid in [_server(process.pid), process.pid]:
            os.kill(pid, signal.SIGTERM)
        assert (process.wait(60), os.listdir(place)) == (0, [])
    # The server ends by itself.
    with started(tool, [*argv[:3], "--json", *argv[3:]]) as process:
        assert process.stdout and json.loads(process.stdout.readline())["results"]
        os.kill(_server(process.pid), signal.SIGKILL)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (20, "") and "qemu-storage-daemon" in err and "Traceback" not in err
    assert os.listdir(place) == []
    # The tool is killed.
    with started(tool, [*argv[:3], "--json", *argv[3:]]) as process:
        assert process.stdout and json.loads(process.stdout.readline())["results"]
        server = _server(process.pid)
        process.kill()
    deadline = time.monotonic() + 30
    while os.listdir(place) or os.path.exists(f"/proc/{server}/exe"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _server(parent: int) -> int:
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            name, _, rest = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8").partition("(")[2].rpartition(")")
        except OSError:
            continue
        if name.startswith("qemu-") and int(rest.split()[1]) == parent:
            return int(entry)
    raise AssertionError(f"no server of process {parent}")
