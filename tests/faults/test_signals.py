"""Row 25: SIGINT, SIGTERM and SIGHUP at any step end a backup by its own hand, and nothing is left for a next run."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Final, Iterator, List, Optional, Sequence

import pytest

from tests.faults import sweep, tracer
from tests.faults.tracer import Ended, Point
from tests.faults.world import World
from tests.guests import daemon

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAMPLE: Final = 5
GUARDIAN_SECONDS: Final = 30.0  # it is told to go and waited for, but not for ever


@pytest.fixture
def world(libvirtd: daemon.Daemon, tmp_path: Path) -> Iterator[World]:
    with World(libvirtd, str(tmp_path)) as made:
        yield made
        made.check_everything()
        assert made.late == []


def _signalled(world: World, first: Point, number: int, later: int = 0) -> Ended:
    """A backup that gets a signal at a point, and with `later` another one that many points afterwards."""
    hits: List[str] = []
    seen = 0

    def at(here: Point, what: str, pid: int) -> None:
        nonlocal seen
        if hits:
            seen += 1
        if here == first or (later and seen == later):
            hits.append(what)
            os.kill(pid, number)

    world.write()
    ended = tracer.run(world.tool.argv("backup", world.guest.name)[1:], world.tool.environment(), at)
    return Ended(ended.code, " and ".join(hits) or None, ended.stdout, ended.stderr)


def _judge(world: World, ended: Ended, number: int) -> List[str]:
    known = set(world.published())
    world.keep(world.models())
    deadline = time.monotonic() + GUARDIAN_SECONDS
    while world.processes.ours() and time.monotonic() < deadline:
        time.sleep(0.02)
    complaints = [f"still runs: {line}" for line in world.processes.ours().values()]
    complaints += world.left(checkpoints=1 if known else 0)
    if ended.code not in (0, 128 + number):
        complaints.append(f"it ended with {ended.code}: {ended.stderr.strip()}")
    return complaints


def _all(world: World, points: Sequence[Point], signals: Sequence[int], rng: Optional[random.Random]) -> None:
    """Signals at points; with `rng` twice each."""
    losses = []
    for index, point in enumerate(points):
        number = signals[index % len(signals)]
        world.point = f"{signal.Signals(number).name} at {point}"
        world.room_for(2)
        before = world.published()
        ended = _signalled(world, point, number, rng.randint(1, 40) if rng else 0)
        complaints = _judge(world, ended, number)
        if (world.published() != before) != (ended.code == 0) or bool(ended.code) == ('"error"' not in ended.stdout):
            complaints.append(f"it ended with {ended.code}, {before} became {world.published()}; {ended.stdout[:80]}")
        losses += [f"{world.point} ({ended.what}): {world.short(c)}" for c in complaints]
    world.write()
    losses += world.backup()
    assert not losses, "; ".join(losses)


def _points(world: World) -> List[Point]:
    return [point for point, _ in sweep.Sweep(world, 0).points("increment") if not point.after]


def _drawn(world: World, rng: random.Random, number: int) -> List[Point]:
    return [p for _, p in sweep.sample([("increment", p) for p in _points(world)], number, rng)]


@pytest.mark.fault(25)
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_backup_which_cleans_up_itself(
    world: World, rng: random.Random, number: signal.Signals
) -> None:
    _all(world, _drawn(world, rng, SAMPLE), [number], None)


def test_a_second_signal_does_not_skip_the_cleaning(world: World, rng: random.Random) -> None:
    _all(world, _drawn(world, rng, SAMPLE), SIGNALS, rng)


def test_a_signal_at_a_first_backup_leaves_no_checkpoint(world: World, rng: random.Random) -> None:
    found = sweep.Sweep(world, 0).points("full")
    # Not at the end: how often the job is asked for until it has gone is never the same.
    first = next(n for n, (point, _) in enumerate(found) if point.kind == "nbd")
    calls = [point for point, _ in found[:first] if point.kind == "libvirt" and point.number >= 10 and not point.after]
    sends = [point for point, _ in found[first:] if point.kind == "nbd" and not point.after]
    for point in (rng.choice(calls), rng.choice(sends[: len(sends) // 2])):
        world.renew()
        ended = _signalled(world, point, signal.SIGTERM)
        assert (ended.code, _judge(world, ended, signal.SIGTERM)) == (128 + signal.SIGTERM, []), ended


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_signals_at_every_point(world: World, rng: random.Random, twice: bool) -> None:
    _all(world, _points(world), SIGNALS, rng if twice else None)
