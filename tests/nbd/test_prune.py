"""Backups taken away: every other one stays byte for byte, at a cost of the increments, whatever happens on the way."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple, Type

import pytest

import libvirt_cbt
from libvirt_cbt import errors
from libvirt_cbt.repository import pins
from tests.nbd.conftest import MIB, run
from tests.nbd.histories import History, dense, drain, fill, flood, thin, tmpfs
from tests.unit import repository_samples as samples


def made(folder: str, rng: random.Random, generations: int, *sizes: int, **options: Any) -> History:
    found = History(folder, *(sizes or (2 * MIB + 512,)), **options)
    for _ in range(generations):
        found.write(rng)
        found.generation()
    return found


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("gone", [[2], [1], [1, 2, 3], [2, 3, 4], [2, 4], [1, 3, 4]])
def test_any_backup_can_go(folder: str, rng: random.Random, gone: List[int], compress: bool) -> None:
    history = made(folder, rng, 5, 2 * MIB + 512, MIB, compress=compress)
    everyone = [m.id for m in history.backups()]
    removed = [everyone[number - 1] for number in gone]
    untouched = [i for n, i in enumerate(everyone, 1) if n not in gone and n - 1 not in gone]
    before = {identity: history.files(identity) for identity in untouched}
    found = history.prune(remove=[str(number) for number in gone])
    assert [one.id for one in found.removed] == removed
    assert [one.id for one in found.kept] == [i for i in everyone if i not in removed]
    assert found.skipped == []
    assert {one.backup for one in found.merged} == set(removed)
    history.prove()
    assert {identity: history.files(identity) for identity in untouched} == before
    # A mark answers queries as before.
    with history.session() as session:
        for since in range(1, 6):
            answer = libvirt_cbt.changed(session, samples.UUID, "vda", since=since)
            assert answer.until == 5
    # Again: nothing is to be done.
    again = history.prune(remove=[str(number) for number in gone])
    assert (again.removed, again.merged) == ([], [])
    history.write(rng)
    history.generation()
    history.prove()


@pytest.mark.parametrize("round_", range(3))
def test_random_histories_and_random_prunes(folder: str, rng: random.Random, round_: int) -> None:
    sizes = [rng.choice((MIB, 2 * MIB + 512, 3 * MIB - 512, MIB + 65536 + 4096)) for _ in range(rng.choice((1, 2)))]
    history = History(folder, *sizes, compress=rng.random() < 0.7, cluster=rng.choice((512, 4096, 65536)))
    for _ in range(4):
        for _ in range(rng.randrange(2, 5)):
            history.write(rng)
            if rng.random() < 0.2:
                target = rng.choice(list(history.disks))
                history.grow(target, history.disks[target].size + rng.choice((512, 65536, MIB + 512)))
            kind = rng.random()
            history.generation(
                mark=kind < 0.2 and bool(history.models),
                full=0.2 <= kind < 0.3,
                only=["vda"] if 0.3 <= kind < 0.4 else (),
            )
        backups = history.backups()
        if not backups:
            continue
        newest = {t: [m.id for m in backups if (d := m.disk(t)) and d.mode != "mark"][-1:] for t in history.disks}
        staying = {backups[-1].id, *(i for found in newest.values() for i in found)}
        gone = [m.id for m in backups if m.id not in staying and rng.random() < 0.5]
        if gone:
            found = history.prune(remove=gone)
            assert {one.id for one in found.removed} == set(gone)
            assert found.skipped == []
        history.prove()


@pytest.mark.parametrize("compress", [True, False])
def test_the_cost_follows_what_is_merged(folder: str, rng: random.Random, compress: bool) -> None:
    """At most 1.1 times the stored size of the increments, also when several neighbours go, also for the oldest full."""
    history = History(folder, 48 * MIB, compress=compress)
    fill(history, rng, "vda", 0, 40 * MIB)
    history.generation()
    for _ in range(6):
        for _ in range(4):
            fill(history, rng, "vda", rng.randrange(40) * MIB, 512 * 1024)
        history.generation()
    everyone = [m.id for m in history.backups()]
    stored = [history.stored(identity) for identity in everyone]
    found = history.prune(remove=["4", "5"])
    history.prove()
    assert 0 < sum(one.written_bytes for one in found.merged) <= 1.1 * (stored[3] + stored[4])
    stored = [history.stored(identity) for identity in everyone[:3]] + [history.stored(everyone[5])]
    found = history.prune(remove=["1", "2"])
    history.prove()
    assert 0 < sum(one.written_bytes for one in found.merged) <= 1.1 * (stored[1] + stored[2])
    assert history.stored(everyone[2]) < 1.1 * stored[0], "what was rewritten was given back"
    assert found.freed_bytes > 0


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize(("content", "runs"), [(dense, (MIB,) * 4), (thin, (65536, 131072, 524288) * 4)])
def test_the_bytes_that_the_kernel_is_given(
    folder: str, rng: random.Random, content: Callable[[random.Random, int], bytes], runs: Tuple[int, ...]
) -> None:
    """The same, not as the tool says but as the kernel sees it; every backup that has no part in it is not touched.

    Text in small pieces is the harder case: QEMU's tables are many times what is stored of it.
    """
    history = History(folder, 24 * MIB)
    fill(history, rng, "vda", 0, 20 * MIB, content)
    history.generation()
    for _ in range(5):
        for length in runs:
            fill(history, rng, "vda", rng.randrange(20 * MIB // 65536 - length // 65536) * 65536, length, content)
        history.generation()
    everyone = [m.id for m in history.backups()]
    stored = [history.stored(identity) for identity in everyone]
    others = {identity: history.files(identity) for identity in (everyone[0], everyone[1], everyone[5])}
    written = traced(folder, history, "3", "4")  # they go into the fifth
    assert 0 < written <= 1.1 * (stored[2] + stored[3]), (written, stored)
    assert {identity: history.files(identity) for identity in others} == others
    stored = [history.stored(identity) for identity in (everyone[1], everyone[4], everyone[5])]
    others = {identity: history.files(identity) for identity in everyone[4:]}
    written = traced(folder, history, "1")  # the second takes its place
    assert 0 < written <= 1.1 * stored[0], (written, stored)
    assert {identity: history.files(identity) for identity in others} == others
    history.prove()


def traced(folder: str, history: History, *removed: str) -> int:
    """Bytes that a prune and all that it starts write to files of the repository."""
    log = os.path.join(folder, "trace")
    calls = "trace=write,writev,pwrite64,pwritev,pwritev2"
    removes = [x for number in removed for x in ("--remove", number)]
    tool = [
        sys.executable,
        "-c",
        "from libvirt_cbt import cli; cli.main()",
        "-c",
        "test:///default",
        "-r",
        history.repository.path,
    ]
    run(
        "strace",
        "-f",
        "-y",
        "-s0",
        "-qq",
        "-e",
        calls,
        "-e",
        "signal=none",
        "-o",
        log,
        *tool,
        "prune",
        samples.UUID,
        *removes,
    )
    total = 0
    waiting: Dict[str, str] = {}
    for line in Path(log).read_text(errors="replace").splitlines():
        pid, _, call = line.partition(" ")
        where = re.search(r"\(\d+<([^>]*)>", call)
        path = where.group(1) if where else waiting.pop(pid, "")
        if call.endswith("<unfinished ...>"):
            waiting[pid] = path
        elif path.startswith(history.repository.path) and (answer := re.search(r"= (\d+)$", call)):
            total += int(answer.group(1))
    return total


def test_an_old_chain_goes_without_a_byte_written(folder: str, rng: random.Random) -> None:
    history = made(folder, rng, 3)
    history.generation(full=True)
    history.write(rng)
    history.generation()
    found = history.prune(keep_last=2)
    assert (len(found.removed), found.merged) == (3, [])
    history.prove()


def test_rules_by_time(folder: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    from libvirt_cbt.actions import prune as action

    history = History(folder, MIB)
    for hour in (0, 1, 24, 25, 49, 49.5):
        history.write(rng)
        history.generation(hours=hour)
    moment = action._time(history.backups()[-1])
    monkeypatch.setattr(action, "now", lambda: moment)
    plan = history.prune(keep_daily=3, dry_run=True)
    assert [one.generation for one in plan.kept] == [2, 4, 6]
    assert plan.dry_run and len(plan.merged) == 3
    assert len(history.backups()) == 6
    found = history.prune(keep_daily=3)
    assert (found.kept, found.removed) == (plan.kept, plan.removed)
    history.prove()
    assert history.prune(keep_daily=3).removed == []
    assert [one.reasons for one in found.kept] == [["daily"], ["daily"], ["the newest", "daily"]]


def test_a_protected_backup_stays_until_it_is_not(folder: str, rng: random.Random) -> None:
    history = made(folder, rng, 4)
    with history.session() as session:
        assert libvirt_cbt.protect(session, samples.UUID, at="2").protected
        assert libvirt_cbt.protect(session, samples.UUID, at="2").protected
        assert [g.protected for g in libvirt_cbt.generations(session, samples.UUID)[0].generations] == [
            False,
            True,
            False,
            False,
        ]
        with pytest.raises(errors.Usage, match="protected"):
            history.prune(remove=["2"])
        assert [one.generation for one in history.prune(keep_last=1).kept] == [2, 4]
        history.prove()
        assert not libvirt_cbt.unprotect(session, samples.UUID, at="2").protected
        with pytest.raises(errors.NoSuchBackup):
            libvirt_cbt.unprotect(session, samples.UUID, at="2")
        with pytest.raises(errors.NoSuchBackup):
            libvirt_cbt.protect(session, samples.UUID, at="1")
    assert [one.generation for one in history.prune(keep_last=1).kept] == [4]
    history.prove()


def test_what_is_asked_wrongly_is_refused(folder: str, rng: random.Random) -> None:
    history = made(folder, rng, 2)
    history.write(rng)
    history.generation(mark=True)
    wrong: List[Tuple[Dict[str, Any], Type[errors.CbtError]]] = [
        ({}, errors.Usage),
        ({"remove": ["2"]}, errors.Usage),
        ({"remove": ["latest"]}, errors.Usage),
        ({"remove": ["3"]}, errors.Usage),
        ({"remove": ["9"]}, errors.NoSuchBackup),
        ({"keep_last": 0}, errors.Usage),
        ({"keep_within": "soon"}, errors.Usage),
    ]
    for rules, kind in wrong:
        with pytest.raises(kind):
            history.prune(**rules)
    with history.kept.lock(), pytest.raises(errors.RepositoryBusy):
        history.prune(keep_last=1)
    history.prove()


def test_the_newest_data_of_every_disk_stays(folder: str, rng: random.Random) -> None:
    history = made(folder, rng, 2, MIB, MIB + 512)
    history.write(rng)
    history.generation(only=["vda"])
    found = history.prune(keep_last=1)
    assert [(one.generation, one.reasons) for one in found.kept] == [
        (2, ["the newest with disk vdb"]),
        (3, ["the newest", "last"]),
    ]
    history.prove()


def test_forget_drops_what_lies_before_the_oldest_backup(folder: str, rng: random.Random) -> None:
    history = made(folder, rng, 3)
    history.write(rng)
    history.generation(mark=True)
    history.write(rng)
    history.generation()
    found = history.prune(remove=["1", "2"], forget=True)
    assert len(found.forgotten) == 2
    history.prove()
    with history.session() as session:
        [listing] = libvirt_cbt.generations(session, samples.UUID)
        assert [g.generation for g in listing.generations] == [3, 4, 5]
        assert sum(map(len, libvirt_cbt.changed(session, samples.UUID, "vda", since="*")))
        assert libvirt_cbt.changed(session, samples.UUID, "vda", since=3).until == 5
        for since in (1, 2):
            with pytest.raises(errors.GenerationUnknown):
                libvirt_cbt.changed(session, samples.UUID, "vda", since=since)
    # The newest two generations stay, whatever they hold.
    assert history.prune(keep_last=1, forget=True).forgotten == [found.kept[0].id]
    history.prove()
    history.write(rng)
    history.generation()
    history.prove()


# Readers


def test_a_chain_that_is_read_is_left_alone(folder: str, rng: random.Random) -> None:
    history = made(folder, rng, 4)
    everyone = [m.id for m in history.backups()]
    kept = history.repository.domain(samples.UUID)
    with pins.reading(kept, everyone[2], ["vda"]):
        with pytest.raises(errors.ChainPinned) as caught:
            history.prune(remove=["2"])
        assert caught.value.code == 11
        history.prove(settled=False)
        with pins.reading(kept, everyone[0], ["vda"]):  # readers are no trouble to one another
            pass
    with pins.reading(kept, everyone[0], ["vda"]):
        found = history.prune(remove=["1", "3"])
        assert [one.generation for one in found.removed] == [3]
        assert [(one.backup, one.kind) for one in found.skipped] == [(everyone[0], "ChainPinned")]
    assert [one.generation for one in history.prune(remove=["1"]).removed] == [1]
    history.prove()


def test_a_reader_that_is_killed_holds_nothing(folder: str, rng: random.Random) -> None:
    history = made(folder, rng, 3)
    program = (
        "import sys, libvirt_cbt\n"
        "with libvirt_cbt.Session('test:///default', sys.argv[1]) as session:\n"
        "    with libvirt_cbt.serve(session, sys.argv[2], sys.argv[3], at=2) as served:\n"
        "        print('ready', flush=True)\n"
        "        sys.stdin.read()\n"
    )
    argv = [sys.executable, "-c", program, history.repository.path, samples.UUID, f"{folder}/s"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        with pytest.raises(errors.ChainPinned):
            history.prune(remove=["1"])
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 30
        while True:  # its server sees a moment later that nobody is there
            try:
                assert [one.generation for one in history.prune(remove=["1"]).removed] == [1]
                break
            except errors.ChainPinned:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    history.prove()


def test_a_running_backup_does_not_hold_up_readers(folder: str, rng: random.Random) -> None:
    history = made(folder, rng, 2)
    with history.repository.domain(samples.UUID).lock():
        history.prove(settled=False)


# Damage and full disks


def test_damage_is_not_merged_away(folder: str, rng: random.Random) -> None:
    history = History(folder, 2 * MIB, compress=False)
    for place in (0, 1, 0):
        fill(history, rng, "vda", place * MIB, 512 * 1024)
        history.generation()
    second = history.backups()[1].id
    layer = Path(history.layer(second))
    data = bytearray(layer.read_bytes())
    where = data.index(history.models[second]["vda"][MIB + 65536 : MIB + 65536 + 4096])
    data[where] ^= 1
    layer.write_bytes(data)
    with pytest.raises(errors.Damaged) as caught:
        history.prune(remove=["2"])
    assert second in str(caught.value)
    with history.session() as session:
        [damage] = libvirt_cbt.verify(session, samples.UUID).damage
        assert damage.backup == second
    data[where] ^= 1
    layer.write_bytes(data)
    assert len(history.prune(remove=["2"]).removed) == 1
    history.prove()


@contextlib.contextmanager
def small(folder: str, size: str) -> Iterator[History]:
    """A history of one incompressible disk of 8 MiB on a file system of its own, restored elsewhere."""
    place = os.path.join(folder, "small")
    with tmpfs(place, size):
        os.mkdir(f"{place}/history")
        history = History(f"{place}/history", 8 * MIB, compress=False)
        history.proofs = folder
        yield history


@pytest.mark.fault(40)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
def test_on_a_full_disk_whole_chains_go_first(folder: str, rng: random.Random) -> None:
    with small(folder, "48m") as history:
        for number in range(6):
            for _ in range(2):
                fill(history, rng, "vda", rng.randrange(16) * MIB // 2, 256 * 1024)
            history.generation(full=number == 3)
        flood(f"{folder}/small")
        found = history.prune(remove=["1", "2", "3", "5"])
        assert [one.generation for one in found.removed] == [1, 2, 3, 5]
        assert found.freed_bytes > 0 and found.skipped == []
        drain(f"{folder}/small")
        history.prove()


@pytest.mark.fault(40)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
@pytest.mark.parametrize("gone", [["2"], ["3"], ["1", "2", "3"]])
def test_on_a_full_disk_a_merge_goes_in_steps(folder: str, rng: random.Random, gone: List[str]) -> None:
    """Larger than all the room there is, the reserve of 1 MiB."""
    with small(folder, "80m") as history:
        for number in range(4):
            fill(history, rng, "vda", (number % 2) * 4 * MIB, 4 * MIB)
            fill(history, rng, "vda", (number % 2) * 4 * MIB + MIB, MIB)
            history.generation()
        flood(f"{folder}/small")
        found = history.prune(remove=gone)
        assert [str(one.generation) for one in found.removed] == gone and found.skipped == []
        assert sum(one.written_bytes for one in found.merged) <= len(gone) * 4.4 * MIB
        drain(f"{folder}/small")
        history.prove()


@pytest.mark.fault(40)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
def test_without_any_room_it_says_so_and_nothing_is_lost(folder: str, rng: random.Random) -> None:
    with small(folder, "80m") as history:
        for number in range(4):
            fill(history, rng, "vda", (number % 2) * 4 * MIB, 4 * MIB)
            history.generation()
        flood(f"{folder}/small")
        # The second has nothing in common with the oldest: together they are as large as both.
        with pytest.raises(errors.NoRoomToMerge) as caught:
            history.prune(remove=["1"])
        assert caught.value.code == 15
        drain(f"{folder}/small")
        history.prove(settled=False)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(history.kept.path, "reserve"))
        flood(f"{folder}/small")
        with pytest.raises(errors.RepositoryError) as full:
            history.prune(remove=["3"])
        assert full.value.code == 15
        drain(f"{folder}/small")
        history.prove(settled=False)
        history.prune(remove=["3"])
        history.prove()
        assert [m.generation for m in history.backups()] == [2, 4]


def test_a_place_whose_bytes_were_given_back_is_written(folder: str, rng: random.Random) -> None:
    """A merge that was killed may leave a cluster in the table whose bytes are a hole in the file: it reads as zeroes."""
    history = History(folder, 4 * MIB)
    fill(history, rng, "vda", 0, 4 * MIB)
    oldest = history.layer(history.generation())
    history.disks["vda"].write(("write", MIB, 2 * MIB, 7))
    history.generation()
    for one in json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", oldest)):
        low, high = max(one["start"], MIB), min(one["start"] + one["length"], 3 * MIB)
        if low < high:
            place = one["offset"] + low - one["start"]
            run("fallocate", "--punch-hole", f"--offset={place}", f"--length={high - low}", oldest)
    assert len(history.prune(remove=["1"]).removed) == 1
    history.prove()
