"""The process that runs scripts: each ends in its time, and none outlives the tool."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional

import pytest

from libvirt_cbt.actions import attending

ENOUGH = 60.0  # seconds, for what takes milliseconds
# A tool that hands its attendant work and waits to be killed.
DOOMED = """
import json, sys
from libvirt_cbt.actions import attending
owed, order = [attending.Order(**one) for one in json.loads(sys.argv[1])]
one = attending.Attendant()
if owed.scripts:
    one.owe(owed)
one.run(order, lambda: None)
"""


@pytest.fixture
def attendant() -> Iterator[attending.Attendant]:
    one = attending.Attendant()
    yield one
    one.close()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    def make(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return make


def order(*scripts: str, document: str = "", seconds: float = ENOUGH, total: Optional[float] = None) -> attending.Order:
    return attending.Order(scripts, {"PATH": os.environ["PATH"], "WORD": "a b"}, document, seconds, total)


def never() -> None:
    pass


def until(condition: Callable[[], Any], complaint: str) -> None:
    deadline = time.monotonic() + ENOUGH
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.01)


def running(pid_file: Path) -> bool:
    try:
        status = Path(f"/proc/{int(pid_file.read_text())}/stat").read_text()
    except (OSError, ValueError):  # not written yet
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_they_run_one_after_another_with_what_they_are_told(
    attendant: attending.Attendant, write: Callable[[str, str], str]
) -> None:
    document = json.dumps({"text": "ü" * 200_000})
    count = write("10_count", 'wc -c; echo "$WORD" >&2; pwd')
    fails = write("20_fails", "exit 1")
    odd = write("30_odd", "kill -USR1 $$")
    silent = write("40_silent", "exit 0")
    ended = attendant.run(order(count, fails, odd, silent, document=document), never)
    assert [one.code for one in ended] == [0, 1, 128 + signal.SIGUSR1, 0]
    assert ended[0].said.split("\n") == [str(len(document)), "a b", "/", ""]
    assert [one.script for one in ended] == [count, fails, odd, silent]


def test_after_a_two_no_other_runs(attendant: attending.Attendant, write: Callable[[str, str], str]) -> None:
    ended = attendant.run(order(write("10_no", "echo no; exit 2"), write("20_never", "")), never)
    assert [(one.code, one.said) for one in ended] == [(2, "no\n")]
    assert [one.code for one in attendant.run(order(write("30_again", "")), never)] == [0]


@pytest.mark.parametrize("content", ["#!/no/such/interpreter\n", "\0\0\0\0"])
def test_what_cannot_be_run_says_so(attendant: attending.Attendant, tmp_path: Path, content: str) -> None:
    path = tmp_path / "10_bad"
    path.write_text(content)
    path.chmod(0o755)
    (ended,) = attendant.run(order(str(path)), never)
    assert ended.code == 255 and ended.said.startswith("cannot be run: ")


def test_of_much_output_the_end_is_kept(attendant: attending.Attendant, write: Callable[[str, str], str]) -> None:
    (ended,) = attendant.run(order(write("10_loud", "head -c 3000000 /dev/zero | tr '\\0' x; echo end")), never)
    assert ended.code == 0 and len(ended.said) == 2000 and ended.said.endswith("xxend\n")


# A script, its child in the background, and one that has left the process group; all would take an hour.
FAMILY = """
echo $$ > self
sleep 3600 & echo $! > child
setsid sh -c 'echo $$ > stranger; exec sleep 3600' &
while ! [ -s stranger ]; do sleep 0.01; done
touch started
wait
"""


@pytest.fixture
def family(tmp_path: Path, write: Callable[[str, str], str]) -> Iterator[Any]:
    members = [tmp_path / name for name in ("self", "child", "stranger")]
    yield write("10_family", f"cd {tmp_path}\n{FAMILY}"), members, tmp_path / "started"
    for member in (*members, tmp_path / "kept"):
        if running(member):
            os.kill(int(member.read_text()), signal.SIGKILL)


def test_a_script_whose_time_is_up_is_killed_with_all_its_children(
    attendant: attending.Attendant, write: Callable[[str, str], str], family: Any
) -> None:
    script, members, _ = family
    background = write("05_background", f"cd {Path(script).parent}; sleep 3600 >/dev/null 2>&1 & echo $! > kept")
    ended = attendant.run(order(background, script, write("20_next", ""), seconds=3), never)
    assert [one.code for one in ended] == [0, None, 0]
    assert not any(map(running, members))
    kept = Path(script).parent / "kept"
    assert running(kept)  # what a script that ended in time left running is its own affair


def test_the_time_of_all_together_is_limited(attendant: attending.Attendant, write: Callable[[str, str], str]) -> None:
    slow, never_begun = write("10_slow", "sleep 3600"), write("20_late", f"touch {write('witness', '')}.was")
    ended = attendant.run(order(slow, never_begun, total=0.3), never)
    assert [one.code for one in ended] == [None, None]
    assert not os.path.exists(f"{Path(slow).parent}/witness.was")


def test_whoever_is_told_to_stop_ends_the_script(attendant: attending.Attendant, family: Any, write: Any) -> None:
    script, members, started = family

    def stop() -> None:
        if started.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attendant.run(order(script, write("20_never", f"touch {started}2")), stop)
    assert not any(map(running, members))
    assert [one.code for one in attendant.run(order(write("30_next", "")), never)] == [0]  # it goes on to serve
    assert not Path(f"{started}2").exists()


def doomed(owed: attending.Order, current: attending.Order) -> subprocess.Popen[bytes]:
    orders = [{k: list(v) if isinstance(v, tuple) else v for k, v in vars(one).items()} for one in (owed, current)]
    return subprocess.Popen([sys.executable, "-c", DOOMED, json.dumps(orders)])


@pytest.mark.parametrize("owes", [False, True])
def test_a_tool_that_is_killed_leaves_no_script_and_what_is_owed_is_done(
    family: Any, write: Callable[[str, str], str], tmp_path: Path, owes: bool
) -> None:
    script, members, started = family
    thaw = write("10_thaw", f"sleep 0.2; cat > {tmp_path}/thawed.new; mv {tmp_path}/thawed.new {tmp_path}/thawed")
    tool = doomed(order(*([thaw] if owes else []), document="told"), order(script))
    until(started.exists, "the script did not start")
    tool.kill()
    tool.wait()
    until(lambda: not any(map(running, members)), "the script outlives the tool")
    if owes:
        until((tmp_path / "thawed").exists, "what was owed was not done")
        assert (tmp_path / "thawed").read_text() == "told"


def test_an_attendant_that_is_killed_takes_its_script_along_and_the_tool_hears_of_it(
    family: Any, write: Callable[[str, str], str], tmp_path: Path
) -> None:
    script, members, started = family
    one = attending.Attendant()
    killed: List[int] = []

    def kill() -> None:
        if started.exists() and not killed:
            killed.append(one._process.pid)
            os.kill(killed[0], signal.SIGKILL)

    ended = one.run(order(script, write("20_next", "")), kill)
    assert [(one.code, one.said) for one in ended] == [(255, attending.DIED)] * 2
    until(lambda: not running(members[0]), "the script outlives its attendant")
    assert [e.code for e in one.run(order(script), never)] == [255]
    one.close()


def test_what_is_paid_is_not_done_again(tmp_path: Path, write: Callable[[str, str], str]) -> None:
    one = attending.Attendant()
    one.owe(order(write("10_thaw", f"touch {tmp_path}/thawed")))
    one.paid()
    one.close()
    assert one._process.returncode == 0
    assert not (tmp_path / "thawed").exists()
