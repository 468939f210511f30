"""A tool that is killed at any of its steps loses nothing: rows 7, 24, 37, 38 and 39 of the faults.

`script/sweep` does the same by hand, with a line for each loss that repeats it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest

from tests.faults import sweep, tracer
from tests.faults.commands import COMMANDS
from tests.faults.sweep import Sweep
from tests.faults.tracer import Point
from tests.faults.world import World
from tests.guests import daemon

SAMPLE = 12


@pytest.fixture
def world(libvirtd: daemon.Daemon, tmp_path: Path) -> Iterator[World]:
    with World(libvirtd, str(tmp_path)) as made:
        yield made


def test_a_kill_before_a_call_leaves_it_undone_and_one_after_it_done(tmp_path: Path) -> None:
    place = tmp_path / "repository"
    arguments = ["-r", str(place), "init"]
    found = tracer.points(["-r", str(tmp_path / "other"), "init"], dict(os.environ))[1]
    number = next(point.number for point, what in found if what == f"mkdir {tmp_path}/other")
    for after in (False, True):
        ended = tracer.hit(arguments, dict(os.environ), Point("mkdir", number, after))
        assert (ended.code, ended.what) == (-signal.SIGKILL, f"mkdir {place}")
        assert place.exists() == after


def test_a_run_without_the_point_is_not_touched(tmp_path: Path) -> None:
    place = tmp_path / "repository"
    ended, found = tracer.points(["-r", str(place), "init"], dict(os.environ))
    assert ended.code == 0
    assert [what for point, what in found if point == Point("rename", 1)] == [
        f"rename {place}/repository.json.new -> {place}/repository.json"
    ]
    again = tmp_path / "again"
    beyond = Point("rename", 2)
    assert tracer.hit(["-r", str(again), "init"], dict(os.environ), beyond).what is None
    assert os.listdir(again) == os.listdir(place) == ["repository.json"]


@pytest.mark.parametrize("text", ["rename", "rename:x", "read:1", "rename:1:before", "rename:1:after:2"])
def test_a_mistyped_point_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a point is KIND:NUMBER"):
        Point.parse(text)
    assert str(Point.parse("rename:3:after")) == "rename:3:after"


def _commit(found: List[Tuple[Point, str]]) -> int:
    return next(i for i, (p, what) in enumerate(found) if p.kind == "rename" and "/backups/" in what)


@pytest.mark.fault(38)
def test_everything_is_on_disk_before_it_is_published(world: World) -> None:
    """Row 38, for a whole backup; in the repository's own room tests/unit/test_repository_order has it finer."""
    world.write()
    ended, found = tracer.points(world.tool.argv("backup", world.guest.name)[1:], world.tool.environment())
    assert ended.code == 0
    done = [(point, what) for point, what in found if point.after]
    commit = _commit(done)
    calls = [what.split(" ", 1) for _, what in done]
    staging, place = calls[commit][1].split(" -> ")
    synced = {what: i for i, (call, what) in enumerate(calls[:commit]) if call in ("fsync", "fdatasync")}
    changed = {w: i for i, (c, w) in enumerate(calls[:commit]) if c in ("openat", "write", "pwrite64", "ftruncate")}
    sent = max(i for i, (point, _) in enumerate(done) if point.kind == "nbd")
    for name in os.listdir(place):
        path = os.path.join(staging, name)
        assert synced[path] > (sent if name.endswith(".qcow2") else changed[path]), name
    named = max(i for i, (call, what) in enumerate(calls[:commit]) if call == "openat" and what.startswith(staging))
    assert synced[staging] > named
    after = [what for call, what in calls[commit:] if call == "fsync"]
    assert {os.path.dirname(place), os.path.dirname(staging)} <= set(after)


@pytest.mark.fault(39)
def test_an_fsync_that_fails_fails_the_backup_and_nothing_is_lost(world: World, rng: random.Random) -> None:
    """Row 39: never tried again, as the kernel may have dropped what it could not write."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    assert world.backup() == []
    _, found = tracer.points(world.tool.argv("backup", world.guest.name)[1:], world.tool.environment())
    world.keep(world.models())
    before = [point for point, what in found[: _commit(found)] if what.startswith("fsync ") and not point.after]
    for point in rng.sample(before, 3):
        world.write()
        known = world.published()
        inject = ["-e", "trace=fsync", "-e", f"inject=fsync:error=EIO:when={point.number}"]
        ended = subprocess.run(
            ["strace", "-o", "/dev/null", *inject, *world.tool.argv("backup", world.guest.name)],
            env=world.tool.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (ended.returncode, world.published()) == (15, known), (point, ended.stderr)
        assert "Input/output error" in ended.stderr
        assert world.left() == [], point
    assert world.backup() == []
    world.check_everything()
    assert world.late == []


def _swept(found: Sweep) -> None:
    losses = [f"{loss.command} {loss.point}: {loss.complaint}" for loss in found.losses]
    assert not losses, f"with script/sweep --seed {found.seed}: " + "; ".join(losses)


@pytest.mark.fault(7, 37)
def test_a_sample_of_kill_points_loses_nothing(world: World, seed: int, rng: random.Random) -> None:
    found = Sweep(world, seed)
    chosen = rng.sample(list(COMMANDS), 3)
    points = [(name, point) for name in chosen for point, _ in found.points(name)]
    said: List[str] = []
    drawn = sweep.sample(points, SAMPLE, rng)
    for name in chosen:
        found.command(name, [point for n, point in drawn if n == name], said.append)
    _swept(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_kill_point_loses_nothing(world: World, seed: int, name: str) -> None:
    found = Sweep(world, seed)
    points = [point for point, _ in found.points(name)]
    said: List[str] = []
    report = found.command(name, points, said.append)
    _swept(found)
    # How often NBD is sent to depends on how much comes at once; that the others are reached shows that this swept.
    assert report.missed <= sum(p.kind in ("nbd", "libvirt") for p in points) // 4
