"""A connection that is cut, a tool that is killed, room that runs out over there: no harm to the guest, nothing left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import libvirt
import pytest

from tests.faults.events import Events, Gone
from tests.faults.held import Held, children
from tests.guests import fake_agent, system
from tests.guests.far import Far
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import guards, models, same
from tests.remote.tool import FarTool, small_scratch

SIZE = 24 * MIB
SECONDS = 60.0
# The command line, with less patience where a host is gone for good.
IMPATIENT = """
import sys
from libvirt_cbt import cli
from libvirt_cbt.hypervisor import connection, faraway, fartls
connection.RECONNECT_SECONDS = faraway.RECONNECT_SECONDS = fartls.RECONNECT_SECONDS = 2.0
cli.main(sys.argv[1:])
"""
# A backup that says so and sleeps in its frozen moment.
FROZEN = """
import sys, time
import libvirt_cbt
from libvirt_cbt.actions import fleecing
def held(plan):
    print("frozen", flush=True)
    time.sleep(60)
fleecing._begin = held
with libvirt_cbt.Session(repository=sys.argv[1]) as session:
    libvirt_cbt.backup(session, sys.argv[2])
"""


@pytest.fixture
def guest(plain_guest: Callable[..., PlainGuest], rng: random.Random) -> PlainGuest:
    made = plain_guest(Disk("vda", SIZE))
    made.write_bytes("vda", 0, rng.randbytes(SIZE))
    return made


def until(condition: Callable[[], Any], complaint: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.05)


def connections(pid: int) -> Dict[str, List[int]]:
    """The ssh processes of a tool: its own and libvirt's."""
    found: Dict[str, List[int]] = {"ours": [], "libvirt's": []}
    for child, words in children(pid).items():
        if words.startswith(("ssh ", "/usr/bin/ssh ")):
            found["ours" if "ControlMaster" in words else "libvirt's"].append(child)
    return found


@pytest.mark.parametrize(
    "which", ["all", pytest.param("ours", marks=pytest.mark.slow), pytest.param("libvirt's", marks=pytest.mark.slow)]
)
def test_a_copy_goes_on_after_a_cut(far: Far, tool: FarTool, guest: PlainGuest, tmp_path: Path, which: str) -> None:
    """By the same job: what the guest writes meanwhile is not in the backup."""
    wanted = models(guest)
    with Held(tool, guest) as held:
        guest.write("vda", 0, MIB, 0xEE)
        if which == "all":
            far.cut()
        else:
            mine = connections(held.pid)[which]
            assert mine
            for pid in mine:
                os.kill(pid, signal.SIGKILL)
        made = held.ended(120).result
    same(tool.restored(guest, made["backup"], str(tmp_path)), wanted)
    tool.nothing_left(guest)
    assert tool.backup(guest)["disks"][0]["dirty_bytes"] == MIB


def test_a_host_that_is_gone_for_good(far: Far, tool: FarTool, guest: PlainGuest) -> None:
    argv = tool.argv("backup", guest.name)
    at = argv.index(next(word for word in argv if word.endswith("libvirt-cbt")))
    with Held(tool, guest, argv=[*argv[:at], sys.executable, "-c", IMPATIENT, *argv[at + 1 :]]) as held:
        guardian = held.guardian
        far.stop(cut=True)
        ended = held.ended(120)
        os.kill(guardian, signal.SIGKILL)
    assert (ended.code, ended.document["error"]["kind"]) == (13, "SourceLost"), ended.stderr
    assert "Connection refused" in ended.stderr
    assert "`libvirt-cbt recover plain` ends it" in ended.stderr
    far.start()
    actions = " ".join(tool.run("recover", guest.name).result["actions"])
    assert "ended backup job" in actions
    assert f"removed {far.name}:/var/lib/libvirt/cbt-scratch/" in actions
    tool.nothing_left(guest, checkpoints=0)


@pytest.mark.parametrize("guarded", [True, False])
def test_a_killed_tool(far: Far, tool: FarTool, guest: PlainGuest, tmp_path: Path, *, guarded: bool) -> None:
    """Its connections end with it; the guard ends the job at once, the next run removes what lies about there."""
    with Held(tool, guest) as held:
        mine = [pid for pids in connections(held.pid).values() for pid in pids]
        assert len(mine) == 2
        held.kill(guardian=not guarded)
    until(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in mine), "an ssh process outlived the tool")
    if guarded:
        until(lambda: not guest.has_job, "nobody ended the job")
    until(lambda: not guards(guest.uuid), "the guard stays")
    assert [path for path in far.left() if path.startswith("far:")]
    made = tool.backup(guest)
    assert made["generation"] == 1
    same(tool.restored(guest, made["backup"], str(tmp_path)), models(guest))
    tool.nothing_left(guest)


@pytest.mark.slow
def test_a_job_is_ended_there_when_nobody_is_left_here(far: Far, tool: FarTool, guest: PlainGuest) -> None:
    """Tool, guard and network at once: the shell over there waits for a minute, and ends the job by itself."""
    with Held(tool, guest) as held:
        far.stop()
        held.kill(guardian=True)
    assert guest.has_job
    until(lambda: not guest.has_job, "nobody ended the job", 180)
    far.start()
    assert tool.run("recover", guest.name).code == 0
    tool.nothing_left(guest, checkpoints=0)


@pytest.fixture
def small(far: Far) -> Iterator[Callable[[int], None]]:
    with small_scratch(far.host) as mount:
        yield mount


def test_room_runs_out_there(
    tool: FarTool, guest: PlainGuest, small: Callable[[int], None], rng: random.Random, tmp_path: Path
) -> None:
    """Seen from beside it, and the job ended before a write of the guest's fails."""
    tool.backup(guest)
    small(16)
    guest.write_bytes("vda", 0, rng.randbytes(SIZE))
    with Events(guest) as events, Held(tool, guest) as held, Gone(guest) as gone:
        place = 0
        while not gone():
            guest.write("vda", place % (SIZE // MIB) * MIB, MIB, 1 + place % 255)
            place += 1
        ended = held.ended()
        assert events.harm() == []
    assert (ended.code, ended.document["error"]["kind"]) == (14, "ScratchExhausted"), ended
    assert guest.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    tool.nothing_left(guest)
    small(256)
    made = tool.backup(guest)
    assert made["disks"][0]["mode"] == "incremental"
    same(tool.restored(guest, made["backup"], str(tmp_path)), models(guest))


def test_without_room_there_nothing_is_begun(tool: FarTool, guest: PlainGuest, small: Callable[[int], None]) -> None:
    small(2)
    ended = tool.run("backup", guest.name)
    assert (ended.code, ended.document["error"]["kind"]) == (14, "ScratchSpace")
    tool.nothing_left(guest, checkpoints=0)


Pair = Tuple[system.SystemGuest, fake_agent.FakeAgent]


def test_a_frozen_guest_is_thawed_there_when_nobody_is_left_here(far: Far, tool: FarTool, relay_guest: Pair) -> None:
    """An honest backup first, which freezes and thaws once; then tool and guard die at once, in the frozen moment."""
    guest, agent = relay_guest
    assert tool.run("backup", guest.name).result["quiesce"]["result"] == "frozen"
    assert (agent.freezes, agent.thaws) == (1, 1)
    argv = far.near([sys.executable, "-c", FROZEN, tool.repository, guest.name])
    process = subprocess.Popen(argv, env=tool.environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "frozen\n"
        assert agent.frozen
        for pid in [*guards(guest.uuid), process.pid]:
            os.kill(pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    until(lambda: not agent.frozen, "the guest stays frozen")
    assert tool.run("recover", guest.name).code == 0
    assert tool.run("untrack", guest.name).code == 0
    assert far.left() == []
