"""What the guard asks of libvirt, and when: never while the tool begins a job (libvirt 9.0 may die when that fails)."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from libvirt_cbt import names
from libvirt_cbt.hypervisor import guardian, job, pace

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
