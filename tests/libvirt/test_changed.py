"""`changed` with real guests: what --exact leaves out, the mark of --live, and a fleecing point that is open."""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

import numpy as np
import pytest

import libvirt_cbt
from libvirt_cbt import errors
from libvirt_cbt.actions import exact
from libvirt_cbt.cli import formats
from libvirt_cbt.nbdio import server
from libvirt_cbt.repository import plan
from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Tool, models

SECTOR = 512
GRAIN = 65536
Rows = List[Tuple[int, int, int, int]]


@pytest.fixture
def tool(libvirtd: daemon.Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    monkeypatch.setenv("LIBVIRT_CBT_RUN_DIR", libvirtd.run_dir)  # of what is asked by the library
    return Tool(libvirtd, str(tmp_path / "repository"))


@pytest.fixture
def guest(libvirtd: daemon.Daemon) -> Iterator[PlainGuest]:
    disks = [Disk("vda", 8 * MIB), Disk("vdb", 3 * MIB + 17 * SECTOR, options=("cluster_size=512",))]
    with PlainGuest(libvirtd, "plain", disks) as made:
        made.define()
        made.start()
        yield made


def asked(tool: Tool, domain: str, target: str, since: Any, until: Any = None, **more: Any) -> Any:
    """By the library, which does not need libvirt for it."""
    session = libvirt_cbt.Session(uri="nowhere:///", repository=tool.repository)
    return libvirt_cbt.changed(session, domain, target, since=since, until=until, **more)


def rows(found: Any) -> Rows:
    return [tuple(row) for page in found for row in page.tolist()]


def told(found: Rows, capacity: int) -> Set[int]:
    """The sectors of an answer; each extent is whole sectors, but for the end of the disk."""
    out: Set[int] = set()
    for offset, length, _, _ in found:
        assert offset % SECTOR == 0
        assert length % SECTOR == 0 or offset + length == capacity
        out.update(range(offset // SECTOR, -(-(offset + length) // SECTOR)))
    return out


def differ(before: bytes, after: bytes) -> Set[int]:
    """The sectors whose bytes are not the same; beyond the older end there were zeroes."""
    old, new = np.zeros(len(after), np.uint8), np.frombuffer(after, np.uint8)
    old[: len(before)] = np.frombuffer(before, np.uint8)
    return {int(where) // SECTOR for where in np.flatnonzero(old != new)}


def within(some: Rows, all_: Rows) -> None:
    """Every extent lies in one of the other answer, with its state and generation."""
    place = iter(all_)
    offset, length, state, generation = next(place, (0, 0, 0, 0))
    for one in some:
        while offset + length <= one[0]:
            offset, length, state, generation = next(place)
        assert offset <= one[0] and one[0] + one[1] <= offset + length
        assert (state, generation) == one[2:]


def pages(tool: Tool, domain: str, target: str, since: int, until: int, size: int, start: int = 0) -> Rows:
    out: Rows = []
    offset: Optional[int] = start
    while offset is not None:
        found = asked(tool, domain, target, since, until, exact=True, start_offset=offset, max_results=size)
        page = rows(found)
        assert len(page) <= size
        out += page
        offset = found.pages.next_offset
    return out


def _rewrite(guest: PlainGuest, rng: random.Random, target: str) -> None:
    """One write of a kind that an exact answer must judge."""
    disk = guest.disks[target]
    length = min(disk.size, SECTOR * rng.choice((1, 2, 8, 64, 127, 128, 129, 600, 1500)))
    offset = rng.choice((SECTOR * rng.randint(0, (disk.size - length) // SECTOR), disk.size - length))
    held = bytes(disk.model[offset : offset + length])
    kind = rng.choice(("same", "half", "sector", "byte", "zero", "unmap", "discard", "new"))
    if kind == "same":
        guest.write_bytes(target, offset, held)
    elif kind == "half":
        half = length // SECTOR // 2 * SECTOR
        guest.write_bytes(target, offset, held[:half] + rng.randbytes(length - half))
    elif kind in ("sector", "byte"):
        content = bytearray(held)
        for _ in range(3):
            where = rng.randrange(length)
            size = 1 if kind == "byte" else SECTOR
            where -= where % size
            content[where : where + size] = rng.randbytes(size)
        guest.write_bytes(target, offset, bytes(content))
    elif kind == "new":
        guest.write_bytes(target, offset, rng.randbytes(length))
    elif kind == "discard":
        guest.discard(target, offset, length)
    else:
        guest.write_zeroes(target, offset, length, unmap=kind == "unmap")


def _back_and_forth(guest: PlainGuest, target: str, before: bytes) -> None:
    """Other bytes, and then those of an older moment again: two layers between hold them."""
    now = bytes(guest.disks[target].model)
    guest.write_bytes(target, MIB, before[MIB : MIB + 3 * GRAIN])
    guest.write_bytes(target, 2 * MIB, now[2 * MIB : 2 * MIB + GRAIN])


def test_exact_is_every_sector_that_differs_and_no_other(
    tool: Tool, guest: PlainGuest, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every pair of backups; marks lie between, a full, a growth, and a backup of one disk only."""
    held: Dict[int, Dict[str, bytes]] = {}
    lacking: Set[Tuple[int, str]] = set()
    for target in guest.disks:
        guest.write_bytes(target, GRAIN // 2, rng.randbytes(2 * MIB))
        guest.write_bytes(target, guest.disks[target].size - 3 * SECTOR, rng.randbytes(3 * SECTOR))
    for generation in range(1, 9):
        for target in guest.disks:
            for _ in range(rng.randrange(8)):
                _rewrite(guest, rng, target)
        if generation == 4:
            guest.grow("vda", 8 * MIB + 5 * GRAIN + 3 * SECTOR)
            guest.grow("vdb", 3 * MIB + GRAIN)
        if generation > 2:
            _back_and_forth(guest, "vda", held[1]["vda"])
        if generation == 3:
            tool.run("mark", guest.name, "--scratch-dir", tool.host.scratch).result  # noqa: B018
            lacking |= {(3, "vda"), (3, "vdb")}
        else:
            more = {5: ["--full"], 6: ["--disk", "vda"]}.get(generation, [])
            tool.backup(guest, *more)
            lacking |= {(6, "vdb")} if generation == 6 else set()
        held[generation] = models(guest)
    guest.destroy()
    for small in (False, True):
        if small:
            monkeypatch.setattr(plan, "WINDOW", GRAIN * rng.randrange(1, 20))
            monkeypatch.setattr(exact, "BATCH", rng.randrange(1, 5))
        for target, (since, until) in itertools.product(guest.disks, itertools.combinations(range(1, 9), 2)):
            if {(since, target), (until, target)} & lacking:
                with pytest.raises(errors.Usage, match="holds no data of disk"):
                    asked(tool, guest.name, target, since, until, exact=True)
                continue
            answer = asked(tool, guest.name, target, since, until, exact=True)
            found = rows(answer)
            capacity = len(held[until][target])
            assert told(found, capacity) == differ(held[since][target], held[until][target])
            within(found, rows(asked(tool, guest.name, target, since, until)))
            assert (answer.granularity, answer.guarantee) == (SECTOR, "exact to the sector")
            if rng.random() < 0.2:
                assert pages(tool, guest.name, target, since, until, rng.randrange(1, len(found) + 2)) == found
                start = rng.randrange(capacity)
                clipped = [
                    (max(o, start), o + n - max(o, start), state, number)
                    for o, n, state, number in found
                    if o + n > start
                ]
                assert pages(tool, guest.name, target, since, until, 7, start) == clipped
    for target in guest.disks:
        assert rows(asked(tool, guest.name, target, 2, 2, exact=True)) == []


def test_what_is_on_record_as_the_same_is_not_read(
    tool: Tool, guest: PlainGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.write("vda", MIB, MIB, 7)
    guest.write_zeroes("vda", 3 * MIB, MIB)
    tool.backup(guest)
    guest.write("vda", MIB, MIB, 7)
    guest.write_zeroes("vda", 3 * MIB, MIB, unmap=True)
    tool.backup(guest)
    assert len(rows(asked(tool, guest.name, "vda", 1))) == 2
    monkeypatch.setattr(server, "layers", lambda *_: pytest.fail("a layer was opened"))
    assert rows(asked(tool, guest.name, "vda", 1, exact=True)) == []


def test_the_command_prints_an_exact_answer(tool: Tool, guest: PlainGuest, rng: random.Random) -> None:
    guest.write_bytes("vda", 0, rng.randbytes(MIB))
    tool.backup(guest)
    content = bytearray(guest.disks["vda"].model[: 4 * GRAIN])
    content[5 * SECTOR] ^= 1
    content[3 * GRAIN + 8 * SECTOR] ^= 1
    guest.write_bytes("vda", 0, bytes(content))
    tool.backup(guest)
    want = [
        {"offset": 5 * SECTOR, "length": SECTOR, "state": "data", "generation": 2},
        {"offset": 3 * GRAIN + 8 * SECTOR, "length": SECTOR, "state": "data", "generation": 2},
    ]
    answer = tool.run("changed", guest.name, "vda", "--since", "1", "--exact").result
    assert (answer["extents"], answer["next_offset"], answer["granularity"]) == (want, None, SECTOR)
    first = tool.run("changed", guest.name, "vda", "--since", "1", "--exact", "--max-results", "1").result
    assert (first["extents"], first["next_offset"]) == (want[:1], 6 * SECTOR)
    for wrong in (
        ("--since", "*", "--exact"),
        ("--since", "1", "--live", "--exact"),
        ("--since", "1", "--live", "--until", "latest"),
        ("--since", "1", "--scratch-dir", tool.host.scratch),
        ("--since", "1", "--live", "--start-offset", "-1"),
        ("--since", "1", "--live", "--max-results", "0"),
    ):
        ended = tool.run("changed", guest.name, "vda", *wrong)
        assert (ended.code, ended.document["error"]["kind"]) == (2, "Usage"), wrong
    assert len(tool.run("list", guest.name).result["generations"]) == 2, "nothing was marked for those"


@pytest.mark.parametrize("which", [1, 2])
def test_damage_never_makes_a_sector_look_equal(tool: Tool, guest: PlainGuest, rng: random.Random, which: int) -> None:
    """A layer whose bytes are those of the other backup, too: the contents tell."""
    old = rng.randbytes(2 * GRAIN)
    new = bytearray(old)
    new[GRAIN + 100] ^= 1  # one bit, so that one flip makes both the same
    guest.write_bytes("vda", 4 * GRAIN, old)
    tool.backup(guest, "--compress", "none")
    guest.write_bytes("vda", 4 * GRAIN, bytes(new))
    tool.backup(guest, "--compress", "none")
    want = [(5 * GRAIN, SECTOR, 1, 2)]
    assert rows(asked(tool, guest.name, "vda", 1, 2, exact=True)) == want
    made = tool.run("list", guest.name).result["generations"][which - 1]["id"]
    path = Path(tool.repository, guest.uuid, "backups", made, "vda.qcow2")
    held = bytearray(path.read_bytes())
    where = held.index((new if which == 2 else old)[GRAIN + 64 : GRAIN + 128]) + 36
    held[where] ^= 1
    path.write_bytes(held)
    with pytest.raises(errors.Damaged, match="the digest does not match") as caught:
        rows(asked(tool, guest.name, "vda", 1, 2, exact=True))
    assert caught.value.facts["path"] == str(path)
    ended = tool.run("changed", guest.name, "vda", "--since", "1", "--exact")
    assert (ended.code, ended.document["error"]["kind"]) == (16, "Damaged")
    assert ended.document["results"][0]["extents"] == []
    assert ended.document["results"][0]["next_offset"] == 0
    assert os.listdir(tool.host.run_dir) == []


@pytest.mark.parametrize("how", ["cut", "gone", "header", "contents"])
def test_layers_that_cannot_be_opened(tool: Tool, guest: PlainGuest, rng: random.Random, how: str) -> None:
    guest.write_bytes("vda", 0, rng.randbytes(4 * GRAIN))
    made = tool.backup(guest)["backup"]
    guest.write_bytes("vda", 0, rng.randbytes(4 * GRAIN))
    tool.backup(guest)
    name = "vda.contents.npy" if how == "contents" else "vda.qcow2"
    path = Path(tool.repository, guest.uuid, "backups", made, name)
    held = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    else:
        held[0 if how == "header" else -3] ^= 1
        path.write_bytes(held[: 3 * GRAIN] if how == "cut" else held)
    with pytest.raises(errors.Damaged) as caught:
        rows(asked(tool, guest.name, "vda", 1, exact=True))
    assert caught.value.facts["path"] == str(path)


def test_an_exact_answer_that_is_not_taken_leaves_nothing(
    tool: Tool, guest: PlainGuest, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "BATCH", 1)  # else all is read before the first extent
    for _ in range(2):
        for place in range(0, 8 * MIB, MIB):
            guest.write_bytes("vda", place, rng.randbytes(SECTOR))
        tool.backup(guest)
    asked(tool, guest.name, "vda", 1, exact=True)
    begun = asked(tool, guest.name, "vda", 1, exact=True)
    next(begun.pages)
    assert _open_files(tool) and os.listdir(tool.host.run_dir)
    begun.pages.close()
    assert len(rows(asked(tool, guest.name, "vda", 1, exact=True, max_results=1))) == 1
    assert _open_files(tool) == os.listdir(tool.host.run_dir) == []


def _open_files(tool: Tool) -> List[str]:
    """Of the repository and in memory, by this process."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue
    return [path for path in found if path.startswith((tool.repository, "/memfd:libvirt-cbt"))]


def test_live_marks_and_answers_until_then(tool: Tool, guest: PlainGuest, rng: random.Random) -> None:
    everything = _live(tool, guest, "*")
    assert (everything["since"], everything["until"]) == (None, 1)
    guest.write_bytes("vda", MIB, rng.randbytes(GRAIN))
    first = _live(tool, guest, "1")
    assert (first["since"], first["until"]) == (1, 2)
    assert [(e["offset"], e["length"]) for e in first["extents"]] == [(MIB, GRAIN)]
    guest.write_bytes("vda", 3 * MIB, rng.randbytes(GRAIN))
    page = _live(tool, guest, first["change_id"], "--max-results", "1", "--start-offset", str(MIB))
    assert (page["until"], page["next_offset"]) == (3, None)
    assert len(_live(tool, guest, "1", "--max-results", "1")["extents"]) == 1
    for since, code in (("9", 12), ("3", 0)):
        ended = tool.run("changed", guest.name, "vda", "--since", since, "--live", "--scratch-dir", tool.host.scratch)
        assert ended.code == code
    ended = tool.run("changed", guest.name, "vdz", "--since", "1", "--live", "--scratch-dir", tool.host.scratch)
    assert ended.code == 10
    assert len(tool.run("list", guest.name).result["generations"]) == 5, "what cannot be answered is not marked for"
    tool.nothing_left(guest)
    beyond = tool.run(
        *("changed", guest.name, "vda", "--since", "1", "--live", "--scratch-dir", tool.host.scratch),
        *("--start-offset", str(1 << 40)),
    )
    assert beyond.code == 2


def _live(tool: Tool, guest: PlainGuest, since: str, *more: str) -> Any:
    argv = ("changed", guest.name, "vda", "--since", since, "--live", "--scratch-dir", tool.host.scratch, *more)
    return tool.run(*argv).result


def test_live_of_a_guest_that_nobody_knows(tool: Tool, guest: PlainGuest) -> None:
    for since in ("1", "latest"):
        ended = tool.run("changed", guest.name, "vda", "--since", since, "--live")
        assert (ended.code, ended.document["error"]["kind"]) == (10, "NotInRepository")
    assert tool.run("changed", "nobody", "vda", "--since", "*", "--live").code == 10


def test_an_open_point_alone_in_its_repository(tool: Tool, guest: PlainGuest, rng: random.Random) -> None:
    guest.write_bytes("vda", MIB, rng.randbytes(GRAIN))
    point = tool.run("start", guest.name, "--scratch-dir", tool.host.scratch).result
    number, change_id = str(point["generation"]), point["disks"][0]["change_id"]
    want = [{"offset": MIB, "length": GRAIN, "state": "data", "generation": 1}]
    for until in (number, point["id"], point["id"][:15], change_id):
        for domain in (guest.name, guest.uuid):
            answer = tool.run("changed", domain, "vda", "--since", "*", "--until", until).result
            assert (answer["domain"], answer["until"], answer["extents"]) == (guest.name, 1, want)
    assert tool.run("changed", guest.name, "vda", "--since", number, "--until", number).result["extents"] == []
    for wrong in (("--since", "*"), ("--since", "*", "--until", "latest")):
        assert tool.run("changed", guest.name, "vda", *wrong).code == 10
    assert tool.run("changed", guest.name, "vda", "--since", "*", "--until", "2").code == 12
    assert tool.run("changed", guest.name, "vdz", "--since", "*", "--until", "1").code == 10
    busy = tool.run("changed", guest.name, "vda", "--since", "*", "--live")
    assert (busy.code, busy.document["error"]["kind"]) == (11, "PointOpen")
    tool.run("stop", guest.name).result  # noqa: B018
    for until in ("latest", number, change_id):
        assert tool.run("changed", guest.name, "vda", "--since", "*", "--until", until).result["extents"] == want


def test_an_open_point_above_others(tool: Tool, guest: PlainGuest, rng: random.Random) -> None:
    """`latest` is what is committed; the point is asked for by its name, and nothing older changes for it."""
    tool.backup(guest)
    guest.write_bytes("vda", MIB, rng.randbytes(GRAIN))
    tool.backup(guest)
    guest.write_bytes("vda", 4 * MIB, rng.randbytes(GRAIN))
    point = tool.run("start", guest.name, "--scratch-dir", tool.host.scratch).result
    places = {since: [e[0] for e in rows(asked(tool, guest.name, "vda", since, 3))] for since in ("*", 1, 2, 3)}
    assert places == {"*": [MIB, 4 * MIB], 1: [MIB, 4 * MIB], 2: [4 * MIB], 3: []}
    assert asked(tool, guest.name, "vda", 1).until == 2
    assert asked(tool, guest.name, "vda", 1, 2).until == 2
    with pytest.raises(errors.GenerationUnknown, match="the newest is 2"):
        asked(tool, guest.name, "vda", 3)
    with pytest.raises(errors.Usage, match="generation 3 holds no data"):
        asked(tool, guest.name, "vda", 1, 3, exact=True)
    begun = asked(tool, guest.name, "vda", 1, 3)
    late = asked(tool, guest.name, "vda", 1, 3)
    assert len(next(begun.pages))
    tool.run("stop", guest.name, "--discard").result  # noqa: B018
    assert rows(begun) == [(4 * MIB, GRAIN, 1, 3)], "what was begun goes on"
    with pytest.raises(errors.GenerationUnknown, match="meanwhile"):
        next(late.pages)
    with pytest.raises(errors.GenerationUnknown, match="the newest is 2"):
        asked(tool, guest.name, "vda", 1, 3)
    with pytest.raises(errors.ChangeIdBroken):
        asked(tool, guest.name, "vda", 1, point["disks"][0]["change_id"])


def test_the_formats_of_an_exact_answer(tool: Tool, guest: PlainGuest, rng: random.Random) -> None:
    guest.write_bytes("vda", 0, rng.randbytes(4 * GRAIN))
    tool.backup(guest)
    guest.write_bytes("vda", GRAIN, rng.randbytes(3 * SECTOR))
    tool.backup(guest)
    session = libvirt_cbt.Session(uri="nowhere:///", repository=tool.repository)
    found = libvirt_cbt.changed(session, guest.name, "vda", since=1, exact=True)
    document = json.loads("".join(formats.vmware(found, 0, None)))
    assert document["changedArea"] == [{"start": GRAIN, "length": 3 * SECTOR}]
