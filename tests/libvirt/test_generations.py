"""Marks, open fleecing points and the query between any two generations, with real guests."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import COMMAND, Tool, guards, models, same

GRANULARITY = 65536


@pytest.fixture
def guest(libvirtd: daemon.Daemon) -> Iterator[PlainGuest]:
    disks = [Disk("vda", 8 * MIB), Disk("vdb", 3 * MIB + 17 * 512, options=("cluster_size=512",))]
    with PlainGuest(libvirtd, "plain", disks) as made:
        made.define()
        made.start()
        yield made


def changed(tool: Tool, guest: PlainGuest, target: str, *arguments: str) -> Any:
    return tool.run("changed", guest.name, target, *arguments).result


def covers(answer: Any, before: bytes, after: bytes) -> None:
    """Nothing missed, and the states are right: outside the extents nothing differs, and a zero extent reads as zeroes."""
    at = 0
    for extent in [*answer["extents"], {"offset": len(after), "length": 0, "state": "data"}]:
        offset, end = extent["offset"], extent["offset"] + extent["length"]
        assert offset >= at
        old = before[at:offset].ljust(offset - at, b"\0")  # a disk that has grown read as zeroes there
        assert old == after[at:offset], f"a change before byte {offset} is missing"
        if extent["state"] == "zero":
            assert not any(after[offset:end]), f"no zeroes at {offset}"
        at = end


def touched(writes: List[Tuple[int, int]], granularity: int, capacity: int) -> set[int]:
    """The 512-byte sectors that writes may mark at most: rounded outward to the bitmap's granularity."""
    found: set[int] = set()
    for offset, length in writes:
        low = offset // granularity * granularity
        high = min(-(-(offset + length) // granularity) * granularity, capacity)
        found.update(range(low // 512, -(-high // 512)))
    return found


def test_every_pair_of_generations_answers_as_the_model(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    held: Dict[int, Dict[str, bytes]] = {}
    written: Dict[int, Dict[str, List[Tuple[int, int]]]] = {}
    for generation in range(1, 8):
        writes: Dict[str, List[Tuple[int, int]]] = {"vda": [], "vdb": []}
        for target in guest.disks:
            for _ in range(6):
                writes[target].append(_write(guest, rng, target))
        if generation == 4:
            guest.destroy()
            guest.start()
        if generation == 6:
            guest.host.restart()
        verb = "backup" if generation in (2, 5) else "mark"
        assert tool.run(verb, guest.name, *_scratch(tool)).result["generation"] == generation
        tool.nothing_left(guest)
        held[generation], written[generation] = models(guest), writes
    for target in guest.disks:
        for since, until in itertools.combinations_with_replacement(range(1, 8), 2):
            answer = changed(tool, guest, target, "--since", str(since), "--until", str(until))
            covers(answer, held[since][target], held[until][target])
            told = {s for e in answer["extents"] for s in range(e["offset"] // 512, -(-(e["offset"] + e["length"]) // 512))}
            between = [w for g in range(since + 1, until + 1) for w in written[g][target]]
            assert told <= touched(between, answer["granularity"], answer["capacity"]), "more than was written"
        everything = changed(tool, guest, target, "--since", "*")
        covers(everything, b"", held[7][target])
    for generation in (2, 5):
        same(tool.restored(guest, str(generation), str(tmp_path)), held[generation])
    assert len(tool.run("list", guest.name).result["generations"]) == 7


def _write(guest: PlainGuest, rng: random.Random, target: str) -> Tuple[int, int]:
    size = guest.disks[target].size
    length = min(size, 512 * rng.choice((1, 8, 128, 129, 300)))
    offset = 512 * rng.randint(0, (size - length) // 512)
    kind = rng.choice(("write", "zero", "unmap"))
    if kind == "write":
        guest.write(target, offset, length, rng.randint(1, 255))
    else:
        guest.write_zeroes(target, offset, length, unmap=kind == "unmap")
    return offset, length


def _scratch(tool: Tool) -> Tuple[str, ...]:
    return ("--scratch-dir", tool.host.scratch)


def test_a_backup_after_marks_holds_all_since_the_last_backup(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    tool.run("mark", guest.name, *_scratch(tool)).result  # noqa: B018
    guest.random_writes(rng, "vda", 5)
    first = tool.backup(guest)
    assert [d["mode"] for d in first["disks"]] == ["full", "full"]
    for _ in range(3):
        guest.random_writes(rng, "vdb", 5, discards=True)
        tool.run("mark", guest.name, *_scratch(tool)).result  # noqa: B018
    guest.random_writes(rng, "vda", 5)
    made = tool.backup(guest)
    assert [(d["mode"], d["base"], d["parent"]) for d in made["disks"]] == [("incremental", 5, first["backup"])] * 2
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


def test_an_open_point_serves_its_moment_until_it_is_stopped(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    guest.random_writes(rng, "vda", 8)
    tool.backup(guest)
    before = models(guest)
    guest.random_writes(rng, "vda", 4)
    at = models(guest)
    point = tool.run("start", guest.name, *_scratch(tool)).result
    guest.random_writes(rng, "vda", 12)  # goes to the scratch files' side: the point shows the moment before
    for disk in point["disks"]:
        raw = str(tmp_path / f"{disk['target']}.raw")
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", disk["uri"], raw], check=True)
        same({disk["target"]: Path(raw).read_bytes()}, at)
        listed = json.loads(subprocess.check_output(["nbdinfo", f"--map={disk['context']}", "--json", disk["uri"]]))
        assert sum(e["length"] for e in listed if e["type"] & 1) == disk["dirty_bytes"]
        answer = changed(tool, guest, disk["target"], "--since", "1", "--until", str(point["generation"]))
        covers(answer, before[disk["target"]], at[disk["target"]])
    shown = tool.run("status", guest.name).result["open_point"]
    assert (shown["id"], shown["generation"], shown["socket"]) == (point["id"], point["generation"], point["socket"])
    assert shown["alive"]
    text = subprocess.check_output([COMMAND, "-r", tool.repository, "status", guest.name], env=tool.environment(), text=True)
    assert f"fleecing point of generation {point['generation']} open since {shown['since']}" in text
    busy = tool.run("backup", guest.name)
    assert (busy.code, busy.document["error"]["kind"]) == (11, "PointOpen")
    assert tool.run("recover", guest.name).code == 11
    assert tool.run("stop", guest.name).result["committed"]
    assert tool.run("status", guest.name).result["open_point"] is None
    tool.nothing_left(guest)
    _no_guard(guest)
    now = models(guest)
    assert tool.backup(guest)["generation"] == 3
    covers(changed(tool, guest, "vda", "--since", "2"), at["vda"], now["vda"])
    same(tool.restored(guest, "latest", str(tmp_path)), now)


def _no_guard(guest: PlainGuest) -> None:
    deadline = time.monotonic() + 30
    while guards(guest.uuid):
        assert time.monotonic() < deadline, "a guard process is left"
        time.sleep(0.05)


def test_a_discarded_point_leaves_no_trace(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    tool.backup(guest)
    guest.random_writes(rng, "vda", 4)
    tool.run("start", guest.name, *_scratch(tool)).result  # noqa: B018
    guest.random_writes(rng, "vda", 4)
    assert not tool.run("stop", guest.name, "--discard").result["committed"]
    tool.nothing_left(guest)
    _no_guard(guest)
    assert tool.run("stop", guest.name).code == 10
    made = tool.backup(guest)
    assert (made["generation"], made["disks"][0]["mode"]) == (2, "incremental")
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


def test_a_point_whose_guest_died_cannot_be_committed(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    tool.backup(guest)
    guest.random_writes(rng, "vda", 4)
    tool.run("start", guest.name, *_scratch(tool)).result  # noqa: B018
    guest.destroy()
    assert not tool.run("status", guest.name).result["open_point"]["alive"]
    ended = tool.run("stop", guest.name)
    assert (ended.code, ended.document["error"]["kind"]) == (13, "PointLost")
    guest.start()
    made = tool.backup(guest)
    assert (made["generation"], made["disks"][0]["mode"]) == (2, "incremental")
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    tool.nothing_left(guest)
    _no_guard(guest)


def test_a_point_is_left_alone_from_another_connection(tool: Tool, guest: PlainGuest, rng: random.Random) -> None:
    tool.backup(guest)
    guest.random_writes(rng, "vda", 4)
    point = tool.run("start", guest.name, *_scratch(tool)).result
    elsewhere = {**tool.environment(), "LIBVIRT_DEFAULT_URI": "test:///default"}
    for verb in (("recover",), ("stop",), ("stop", "--discard")):
        argv = tool.argv(verb[0], guest.uuid, *verb[1:])
        done = subprocess.run(argv, env=elsewhere, capture_output=True, text=True, check=False)
        assert done.returncode == (0 if verb == ("recover",) else 20), done
        assert tool.host.uri in done.stdout
    assert os.path.exists(point["socket"])
    assert guards(guest.uuid)
    assert tool.run("stop", guest.name).result["committed"]
    tool.nothing_left(guest)
    _no_guard(guest)


KILLED = """
import os, sys
import libvirt_cbt
from libvirt_cbt.actions import recover
recover.committed = lambda *_: os._exit(9)
with libvirt_cbt.Session(repository=sys.argv[1]) as session:
    libvirt_cbt.stop(session, sys.argv[2])
"""


def test_a_stop_that_was_killed_is_finished_by_the_next_run(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    tool.backup(guest)
    before = models(guest)
    guest.random_writes(rng, "vda", 4)
    at = models(guest)
    tool.run("start", guest.name, *_scratch(tool)).result  # noqa: B018
    argv = [sys.executable, "-c", KILLED, tool.repository, guest.name]
    assert subprocess.run(argv, env=tool.environment(), check=False).returncode == 9
    made = tool.backup(guest)
    assert (made["generation"], made["disks"][0]["mode"]) == (3, "incremental")
    covers(changed(tool, guest, "vda", "--since", "1", "--until", "2"), before["vda"], at["vda"])
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    tool.nothing_left(guest)
    _no_guard(guest)
