"""What the guard asks of libvirt, and when: never while the tool begins a job (libvirt 9.0 may die when that fails)."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from libvirt_cbt import errors, names
from libvirt_cbt.hypervisor import guardian, job, pace, quiesce, scratch

UUID = names.domain_uuid("9999a938-2dfd-4056-963e-b2b3b4727f5a")
WATCH: Dict[str, Any] = {"do": "watch", "socket": "/run/x", "directory": "/scratch", "reserve": 1, "speed": 0}


@pytest.mark.usefixtures("capsys")
def test_statistics_wait_until_the_job_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: List[str] = []
    told = threading.Event()

    def used(*_: object) -> int:
        asked.append("statistics")
        told.set()
        threading.Event().wait()  # a daemon's thread: once is enough
        return 0

    monkeypatch.setattr(job, "scratch_used", used)
    monkeypatch.setattr(pace, "stopped", lambda *_: False)
    started: List[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", _noted(started, threading.Thread.start))
    host: Any = SimpleNamespace(site=SimpleNamespace(lookout=lambda _: None, room=lambda _: 1 << 30))
    made = guardian.Guardian(host, UUID)
    for words in (WATCH, {"do": "freeze", "budget": 5.0}, {"do": "thawed"}):
        made._do(json.loads(json.dumps(words)))
    assert (started, asked) == ([], [])
    made._do({"do": "begun"})
    assert told.wait(30)


def _noted(into: List[threading.Thread], start: Any) -> Any:
    def noting(thread: threading.Thread) -> None:
        into.append(thread)
        start(thread)

    return noting


@pytest.mark.parametrize("away", [False, True])
def test_a_job_is_ended_beside_an_agent_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, *, away: bool) -> None:
    """By another connection: on one libvirt before 10.0 may send what is asked only when the agent was given up."""
    asked: Dict[str, Any] = {}
    begun, answered = threading.Event(), threading.Event()

    def nurse(host: Any, *_: object) -> None:
        asked["thaw"] = host
        begun.set()
        assert answered.wait(30)

    def end(host: Any, *_: object) -> bool:
        asked["end"] = host
        return True

    def another() -> Any:
        if away:
            raise errors.NoHypervisor(uri="x", reason="away")
        return beside

    monkeypatch.setattr(quiesce, "nurse", nurse)
    monkeypatch.setattr(job, "end", end)
    monkeypatch.setattr(pace, "stopped", lambda *_: False)
    monkeypatch.setattr(pace, "restore", lambda *_: None)
    closed: List[str] = []
    beside = SimpleNamespace(close=lambda: closed.append("beside"))
    site = SimpleNamespace(lookout=lambda _: None, room=lambda _: 1 << 30)
    host: Any = SimpleNamespace(site=site, another=another)
    made = guardian.Guardian(host, UUID)
    made._do(WATCH)
    made._do({"do": "nurse"})
    assert begun.wait(30)
    made._do({"do": "release"})
    try:
        made._finish(0.0)
        assert asked == {"thaw": host, "end": host if away else beside}
    finally:
        answered.set()
    made.run()
    assert closed == ([] if away else ["beside"])


@pytest.mark.parametrize(("room", "used", "asked"), [
    ([95, 90, 85], 0, 3),  # the tool ends the job, as soon as it has hung up
    ([95, 60, 49], 0, 2),  # half of the reserve has gone
    ([95], 2 << 30, 0),  # libvirt counts it, and the folder does not show it
])  # fmt: skip
def test_the_tool_hangs_up_before_the_job_is_ended(
    monkeypatch: pytest.MonkeyPatch, room: List[int], used: int, asked: int
) -> None:
    looks: List[str] = []
    rooms = iter(room)

    def exporting(*_: object) -> bool:
        looks.append("job")
        return len(looks) < 3

    monkeypatch.setattr(scratch, "room", lambda _: next(rooms))
    monkeypatch.setattr(job, "exporting", exporting)
    monkeypatch.setattr(guardian, "HANG_UP_SECONDS", 60.0)
    monkeypatch.setattr(pace, "stopped", lambda *_: False)
    host: Any = SimpleNamespace(site=SimpleNamespace(lookout=lambda _: None, room=lambda _: 1 << 30))
    made = guardian.Guardian(host, UUID)
    made._do({**WATCH, "reserve": 100})
    made._used = used
    made._leave_to_tool("/run/x")
    assert len(looks) == asked


def test_a_point_of_which_nothing_is_left_is_not_minded_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """libvirt's host was taken down under it, the guest with it, and its files were removed."""
    folder, asked = tmp_path / "scratch", threading.Semaphore(0)
    folder.mkdir()

    def exporting(*_: object) -> bool:
        asked.release()
        raise errors.NoHypervisor(uri="x", reason="away")

    monkeypatch.setattr(job, "exporting", exporting)
    monkeypatch.setattr(guardian, "STATISTICS_SECONDS", 0.01)
    monkeypatch.setattr(pace, "stopped", lambda *_: False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    host: Any = SimpleNamespace(site=SimpleNamespace(lookout=lambda _: None, room=lambda _: 1 << 30))
    made = guardian.Guardian(host, UUID)
    made._do({**WATCH, "directory": str(folder)})
    thread = threading.Thread(target=made._stay, daemon=True)
    thread.start()
    for _ in range(3):
        assert asked.acquire(timeout=30)
    assert thread.is_alive()
    folder.rmdir()
    thread.join(30)
    assert not thread.is_alive()
