"""A prune that is killed at any of its steps loses nothing, and the next one ends what it began: rows 37 and 44."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from typing import Final, Iterator, List, Sequence

import pytest

from libvirt_cbt import errors
from libvirt_cbt.repository import pins
from tests.faults import sweep, tracer
from tests.faults.pruning import SHAPES, Killing, killing
from tests.faults.tracer import Point
from tests.nbd.histories import drain
from tests.unit import repository_samples as samples

SAMPLE: Final = 10


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="sweep-") as path:
        yield path


def every(sweeping: Killing, chosen: Sequence[Point]) -> None:
    for number, point in enumerate(chosen):
        print(number, point, flush=True)
        print(sweeping.kill(point).replace(sweeping.folder, ""), flush=True)


@pytest.mark.fault(37, 44)
def test_a_prune_that_is_killed(folder: str, rng: random.Random) -> None:
    name = rng.choice(sorted(n for n, shape in SHAPES.items() if not shape.full or os.geteuid() == 0))
    print(f"a repository of the shape '{name}'")
    with killing(folder, name, rng) as sweeping:
        every(sweeping, _sampled([point for point, _ in sweeping.points()], rng))


def _sampled(points: List[Point], rng: random.Random) -> List[Point]:
    kinds = rng.sample(sorted({point.kind for point in points}), SAMPLE - 2)
    chosen = [rng.choice([one for one in points if one.kind == kind]) for kind in kinds]
    return chosen + rng.sample(points, SAMPLE - len(chosen))


@pytest.mark.parametrize("name", SHAPES)
def test_a_sample_of_a_sweep_may_be_of_prunes(name: str, rng: random.Random) -> None:
    points = [(name, Point("write", number)) for number in range(1, 30)] + [(name, Point("rename", 1))]
    drawn = sweep.sample(points, 5, rng)
    assert len(set(drawn)) == 5 and set(drawn) < set(points)


@pytest.mark.slow
@pytest.mark.fault(37, 44)
@pytest.mark.parametrize("name", SHAPES)
def test_a_prune_that_is_killed_at_every_step(folder: str, name: str, rng: random.Random) -> None:
    if SHAPES[name].full and os.geteuid() != 0:
        pytest.skip("mounts a tmpfs")
    with killing(folder, name, rng) as sweeping:
        points = sweeping.points()
        assert len(points) > 50
        every(sweeping, [point for point, _ in points])


@pytest.mark.fault(40, 44)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
def test_what_lies_below_a_layer_on_its_way_out_is_needed(folder: str, rng: random.Random) -> None:
    """A backup in the middle is no backup any more as soon as its merge goes in steps, but what is below it still is."""
    with killing(folder, "prune-full-disk", rng) as sweeping:
        history = sweeping.history
        third, fourth = (m.id for m in history.backups()[2:])
        sweeping.begin()

        def at(point: Point, _what: str, pid: int) -> None:
            if point.kind == "spawn" and history.repository.domain(samples.UUID).layers(third).below:
                os.kill(pid, signal.SIGKILL)

        command = ["-c", "test:///default", "-r", history.repository.path, "prune", samples.UUID, "--remove", "3"]
        assert tracer.run(command, sweeping.environment, at).code == -signal.SIGKILL
        drain(sweeping.place)
        history.prove(settled=False)
        with pins.one(history.kept, fourth), pytest.raises(errors.ChainPinned):
            history.prune(remove=["2", "3"])
        history.prove(settled=False)
        assert [m.generation for m in history.backups()] == [1, 2, 4]
        history.prune(remove=["2"])
        history.prove()
        assert [m.generation for m in history.backups()] == [1, 4]
