"""No guest stays frozen: whatever the agent does, and wherever the tool dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

import libvirt
import pytest

from tests import patience
from tests.guests import fake_agent, system
from tests.libvirt.tool import Tool, guards

Pair = Tuple[system.SystemGuest, fake_agent.FakeAgent]
BUDGET = 8.0
# The transaction as it is, but held up for some seconds with the guest frozen.
HELD = """
import sys, time
import libvirt_cbt
from libvirt_cbt.actions import fleecing
begin = fleecing._begin
def held(plan):
    print("frozen", flush=True)
    time.sleep(float(sys.argv[4]))
    begin(plan)
fleecing._begin = held
with libvirt_cbt.Session(repository=sys.argv[1]) as session:
    made = libvirt_cbt.backup(session, sys.argv[2], scratch_dir=sys.argv[3])
    print(made.quiesce.result, *made.warnings, flush=True)
"""


@pytest.fixture
def pair(tool: Tool, relay_guest: Pair) -> Iterator[Pair]:
    """The guest and its agent; without a checkpoint at the end, so that the next test takes the same guest."""
    yield relay_guest
    relay_guest[1].behave(fake_agent.GOOD)
    tool.run("untrack", relay_guest[0].name)


@pytest.fixture
def held(tool: Tool) -> Iterator[Callable[[system.SystemGuest, float], subprocess.Popen[str]]]:
    """Starts a backup that stays in its frozen moment; returns when the guest is frozen."""
    started: List[subprocess.Popen[str]] = []

    def start(guest: system.SystemGuest, seconds: float) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", HELD, tool.repository, guest.name, tool.host.scratch, str(seconds)]
        process = subprocess.Popen(argv, env=tool.environment(), stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "frozen\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def until(condition: Callable[[], bool], seconds: float, complaint: str) -> float:
    """How long it took."""
    watch = patience.Stopwatch()
    while not condition():
        assert watch.seconds() < seconds, complaint
        time.sleep(0.02)
    return watch.wall()


def quiesced(tool: Tool, guest: system.SystemGuest) -> Tuple[str, Any]:
    made = tool.run("backup", guest.name).result
    return made["quiesce"]["result"], " ".join(made["warnings"])


@pytest.mark.fault(23)
def test_an_honest_agent_is_believed(tool: Tool, pair: Pair) -> None:
    guest, agent = pair
    assert quiesced(tool, guest) == ("frozen", "")
    assert (agent.freezes, agent.thaws) == (1, 1)
    until(lambda: not guards(guest.uuid), 30, "the guard process stays")


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (fake_agent.MISCOUNTS, "froze"),
        (fake_agent.DENIES, "the freeze failed"),
        (fake_agent.NONSENSE, "the freeze failed"),
        (fake_agent.ENDLESS, "the freeze failed"),
    ],
)
def test_a_lying_agent_is_not(tool: Tool, pair: Pair, how: Any, reason: str) -> None:
    guest, agent = pair
    agent.behave(how, to=[fake_agent.FREEZE] if how != fake_agent.MISCOUNTS else fake_agent.WORK)
    watch = patience.Stopwatch()
    result, warnings = quiesced(tool, guest)
    assert result == "failed"
    assert reason in warnings
    assert watch.seconds() < 40
    agent.behave(fake_agent.GOOD)
    watch = patience.Stopwatch()
    while agent.frozen or guards(guest.uuid):
        if how in (fake_agent.NONSENSE, fake_agent.ENDLESS):
            tool.host.restart()  # libvirt gives such an agent up until then, and again while its old words are on their way
        with contextlib.suppress(AssertionError):
            until(lambda: not agent.frozen and not guards(guest.uuid), 20, "still frozen, or still guarded")
        assert watch.seconds() < 120, "still frozen, or still guarded"


@pytest.mark.fault(23)
def test_a_silent_agent_is_an_error_only_where_it_must_answer(tool: Tool, pair: Pair) -> None:
    guest, agent = pair
    agent.behave(fake_agent.SILENT)
    watch = patience.Stopwatch()
    ended = tool.run("backup", guest.name, "--quiesce", "agent")
    assert (ended.code, ended.document["error"]["kind"]) == (17, "NotConsistent")
    assert watch.seconds() < 40
    assert not os.listdir(tool.host.scratch)
    result, warnings = quiesced(tool, guest)
    assert result == "failed"
    assert "goes on thawing" in warnings
    agent.behave(fake_agent.GOOD)
    asked = agent.count(fake_agent.THAW)
    until(lambda: not guards(guest.uuid), 60, "the guard process stays when the agent woke")
    assert agent.count(fake_agent.THAW) > asked
    assert not agent.frozen


@pytest.mark.fault(23)
def test_a_freeze_that_runs_late_is_undone(tool: Tool, pair: Pair) -> None:
    guest, agent = pair
    agent.behave(fake_agent.DEAF)
    result, _ = quiesced(tool, guest)
    assert result == "failed"
    assert agent.freezes == 0
    agent.behave(fake_agent.GOOD)
    agent.wait(lambda a: a.freezes == 1)
    took = until(lambda: not agent.frozen, BUDGET + 8, "the late freeze was left alone")
    print(f"frozen for {took:.1f} s")
    until(lambda: not guards(guest.uuid), 30, "the guard process stays")


@pytest.mark.fault(23)
def test_the_end_of_a_point_does_not_end_the_thawing(tool: Tool, pair: Pair) -> None:
    guest, agent = pair
    agent.behave(fake_agent.DEAF)
    tool.run("start", guest.name, "--scratch-dir", tool.host.scratch).result  # noqa: B018
    ended = tool.run("stop", guest.name)
    assert (ended.code, ended.document["error"]["kind"]) == (20, "HypervisorError")
    assert "may be frozen" in ended.document["error"]["message"]
    agent.behave(fake_agent.GOOD)
    until(lambda: agent.freezes == 1 and not agent.frozen, 30, "the late freeze was left alone")
    assert tool.run("stop", guest.name).result["committed"]
    until(lambda: not guards(guest.uuid), 30, "the guard process stays")


@pytest.mark.fault(24)
def test_a_killed_tool_does_not_leave_the_guest_frozen(
    tool: Tool, pair: Pair, held: Callable[[system.SystemGuest, float], subprocess.Popen[str]]
) -> None:
    guest, agent = pair
    tool.run("backup", guest.name).result  # noqa: B018
    process = held(guest, 60)
    assert agent.frozen
    process.send_signal(signal.SIGKILL)
    took = until(lambda: not agent.frozen, BUDGET, "still frozen")
    print(f"thawed after {took:.2f} s")
    until(lambda: not guards(guest.uuid), 30, "the guard process stays")
    made = tool.run("backup", guest.name).result
    assert (made["quiesce"]["result"], made["disks"][0]["mode"]) == ("frozen", "incremental")


@pytest.mark.fault(24)
def test_a_slow_transaction_is_cut_short(
    tool: Tool, pair: Pair, held: Callable[[system.SystemGuest, float], subprocess.Popen[str]]
) -> None:
    guest, agent = pair
    process = held(guest, BUDGET + 2)
    until(lambda: not agent.frozen, BUDGET + 1.5, "frozen for longer than the budget")
    assert process.stdout
    result = process.stdout.readline()
    assert result.startswith("failed ")
    assert "watchdog" in result


@pytest.mark.fault(24)
def test_a_real_guest_writes_again_after_its_tool_was_killed(
    tool: Tool, system_guest: Callable[..., system.SystemGuest], held: Callable[..., subprocess.Popen[str]]
) -> None:
    guest = system_guest(files={"vda": {"hello": b"world"}})
    process = held(guest, 60)
    assert guest.frozen()
    process.send_signal(signal.SIGKILL)

    def writes() -> bool:
        try:
            guest.write_file("/disks/vda/after", b"written")
        except libvirt.libvirtError:
            return False  # a frozen agent runs no commands
        return True

    print(f"the guest wrote after {until(writes, BUDGET, 'the guest cannot write'):.2f} s")
    until(lambda: not guards(guest.uuid), 30, "the guard process stays")
    made = tool.run("backup", guest.name, "--quiesce", "agent").result
    assert made["quiesce"]["result"] == "frozen"


NOW = "cut -d ' ' -f 1 /proc/uptime"  # the clock of time.monotonic(), in hundredths of a second


@pytest.mark.fault(23)
def test_scripts_bracket_the_freeze_and_what_runs_inside_is_cut_short(tool: Tool, pair: Pair, tmp_path: Path) -> None:
    guest, agent = pair
    for phase in ("pre-freeze", "post-freeze", "post-thaw"):
        tool.script(phase, "10_when", f"{NOW} > {tmp_path}/{phase}")
    hangs = tool.script("post-freeze", "20_hangs", "sleep 3600")
    result, warnings = quiesced(tool, guest)
    assert result == "frozen"
    assert warnings == f"post-freeze: {hangs} was ended when its time was up"
    ((since, until_),) = agent.intervals
    assert until_ - since < BUDGET
    before, inside, after = (float((tmp_path / p).read_text()) for p in ("pre-freeze", "post-freeze", "post-thaw"))
    assert before - 0.01 < since < inside + 0.01
    assert inside - 0.01 < until_ < after + 0.01


@pytest.mark.fault(24)
@pytest.mark.parametrize("phase", ["pre-freeze", "post-freeze"])
def test_a_script_that_says_no_leaves_no_guest_frozen(tool: Tool, pair: Pair, tmp_path: Path, phase: str) -> None:
    guest, agent = pair
    tool.script(phase, "10_no", "exit 2")
    tool.script("post-thaw", "10_thaw", f"echo thawed >> {tmp_path}/thawed")
    assert tool.run("backup", guest.name).code == 18
    assert (agent.freezes, agent.frozen) == (1 if phase == "post-freeze" else 0, False)
    assert (tmp_path / "thawed").read_text() == "thawed\n"
    tool.nothing_left(guest, checkpoints=0)  # type: ignore[arg-type]
    until(lambda: not guards(guest.uuid), 30, "the guard process stays")


@pytest.mark.fault(24)
def test_a_tool_that_is_killed_leaves_neither_a_frozen_guest_nor_its_script(
    tool: Tool, pair: Pair, tmp_path: Path
) -> None:
    guest, agent = pair
    hangs = tool.script("post-freeze", "10_hangs", f"echo $$ > {tmp_path}/pid; mv {tmp_path}/pid {tmp_path}/runs; sleep 3600")
    thaw = tool.script("post-thaw", "10_thaw", f"touch {tmp_path}/thawed")
    process = tool.start("backup", guest.name)
    until((tmp_path / "runs").exists, 30, "the script was not run")
    process.kill()
    process.wait()
    until(lambda: not agent.frozen, BUDGET, "still frozen")
    pid = int((tmp_path / "runs").read_text())
    until(lambda: not os.path.exists(f"/proc/{pid}"), 30, "the script outlives the tool")
    until((tmp_path / "thawed").exists, 30, "post-thaw was not run")
    hangs.unlink()
    thaw.unlink()
    assert quiesced(tool, guest) == ("frozen", "")
