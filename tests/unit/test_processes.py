"""Which service of systemd's a process is of."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import pytest

from libvirt_cbt import processes


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0::/system.slice/nightly.service\n", "nightly.service"),
        ("0::/system.slice/system-nightly.slice/nightly@a:b.service\n", "nightly@a:b.service"),
        ("12:pids:/system.slice/x.service\n1:name=systemd:/system.slice/nightly.service\n0::/\n", "nightly.service"),
        ("0::/user.slice/user-0.slice/session-3.scope\n", None),
        ("0::/user.slice/user-0.slice/user@0.service/app.slice/run-1.scope\n", None),
        ("12:pids:/system.slice/x.service\n0::/\n", None),
        ("", None),
    ],
)
def test_the_service_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, wanted: Optional[str]) -> None:
    monkeypatch.setenv("INVOCATION_ID", "0" * 32)
    path = tmp_path / "cgroup"
    path.write_text(text, encoding="utf-8")
    assert processes.unit(str(path)) == wanted
    monkeypatch.delenv("INVOCATION_ID")  # of a cron job
    assert processes.unit(str(path)) is None
    assert processes.unit(str(tmp_path / "absent")) is None


def test_what_is_to_outlive_a_service_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "unit", lambda: None)
    assert processes.outlived("the guard") == []
    monkeypatch.setattr(processes, "unit", lambda: "nightly.service")
    (sentence,) = processes.outlived("the guard")
    assert sentence.startswith("the guard is a process of nightly.service and is killed when that ends")
