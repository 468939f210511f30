"""The soak, for a moment and for two minutes; `script/soak` does it for as long as you like."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.guests import daemon
from tests.soak import play

SHORT = 25  # steps
LONG = 120.0  # seconds

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="small file systems of our own can be mounted by root only")


def right(seed: str, folder: Path, count: int, until: float = float("inf")) -> play.Outcome:
    steps = play.drawn(seed, count)
    try:
        outcome = play.play(steps, print, until)
    except daemon.Unavailable as e:
        pytest.skip(str(e))
    if outcome.failed is not None:
        path = str(folder / "soak.json")
        play.save(path, steps[: outcome.failed + 1], seed=seed, complaint=outcome.complaint)
        pytest.fail(f"{outcome.trace}\nagain: script/soak --steps {path}")
    return outcome


def test_a_few_steps(tmp_path: Path) -> None:
    """The same ones each time: that the machine itself works.  Others are for the long test."""
    assert right("few", tmp_path, SHORT).counts["check"] >= 1


@pytest.mark.slow
def test_two_minutes(seed: int, tmp_path: Path) -> None:
    until, era = time.monotonic() + LONG, 1
    while time.monotonic() < until:
        right(f"{seed} {era}", tmp_path, 120, until)
        era += 1
