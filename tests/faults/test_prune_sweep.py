"""A prune that is killed at any of its steps loses nothing, and the next one ends what it began: rows 37 and 44."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from typing import Dict, Iterator, List, Sequence, Tuple

import pytest

from tests.faults import sweep, tracer
from tests.faults.tracer import Point
from tests.nbd.conftest import MIB
from tests.nbd.histories import History
from tests.unit import repository_samples as samples

SAMPLE = 10
# The oldest twice in a row, one in the middle, and what lies before the oldest that is left is forgotten.
REMOVED = ("1", "2", "4")
KEPT = (3, 5, 6)


@pytest.fixture
def history(rng: random.Random) -> Iterator[History]:
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        made = History(folder, MIB + 512)
        for generation in range(6):
            made.write(rng)
            if generation == 3:
                made.grow("vda", made.disks["vda"].size + 65536)
            made.generation()
        shutil.copytree(made.repository.path, made.repository.path + ".begun")
        yield made


class Killing:
    """The same prune of the same repository, again and again."""

    def __init__(self, history: History) -> None:
        self.history = history

    @property
    def arguments(self) -> List[str]:
        removes = [x for number in REMOVED for x in ("--remove", number)]
        return ["-c", "test:///default", "-r", self.history.repository.path, "prune", samples.UUID, *removes, "--forget"]

    @property
    def environment(self) -> Dict[str, str]:
        return {**os.environ, "LIBVIRT_CBT_RUN_DIR": os.path.join(self.history.folder, "run")}

    def begin(self) -> None:
        place = self.history.repository.path
        shutil.rmtree(place)
        shutil.copytree(place + ".begun", place)

    def points(self) -> List[Tuple[Point, str]]:
        ended, found = tracer.points(self.arguments, self.environment)
        assert ended.code == 0, ended.stderr
        self.judge_the_end()
        return [(point, what) for point, what in found if not point.after or point.kind in sweep.AFTER_TOO]

    def kill(self, point: Point) -> str:
        self.begin()
        ended = tracer.hit(self.arguments, self.environment, point)
        if ended.what is None:
            assert ended.code == 0
            return "not reached"
        assert ended.code == -signal.SIGKILL
        # Every backup that is listed is whole, and those that were to be kept are listed.
        self.history.prove(settled=False)
        assert set(KEPT) <= {m.generation for m in self.history.backups()}
        self.history.prune(remove=self._left(), forget=True)
        self.judge_the_end()
        return ended.what

    def _left(self) -> List[str]:
        known = {m.generation for m in self.history.repository.domain(samples.UUID).generations()}
        return [number for number in REMOVED if int(number) in known]

    def judge_the_end(self) -> None:
        self.history.prove()
        kept = self.history.repository.domain(samples.UUID)
        assert tuple(m.generation for m in self.history.backups()) == KEPT
        assert [m.generation for m in kept.generations()] == [3, 4, 5, 6]


def every(history: History, chosen: Sequence[Point]) -> None:
    killing = Killing(history)
    for number, point in enumerate(chosen):
        print(number, point, flush=True)
        print(killing.kill(point).replace(history.folder, ""), flush=True)


@pytest.mark.fault(37, 44)
def test_a_prune_that_is_killed(history: History, rng: random.Random) -> None:
    points = [("prune", point) for point, _ in Killing(history).points()]
    every(history, [point for _, point in _sampled(points, rng)])


def _sampled(points: List[Tuple[str, Point]], rng: random.Random) -> List[Tuple[str, Point]]:
    kinds = sorted({point.kind for _, point in points})
    chosen = [rng.choice([one for one in points if one[1].kind == kind]) for kind in kinds]
    return chosen[:SAMPLE] + rng.sample(points, max(0, SAMPLE - len(chosen)))


@pytest.mark.slow
@pytest.mark.fault(37, 44)
def test_a_prune_that_is_killed_at_every_step(history: History) -> None:
    points = Killing(history).points()
    assert len(points) > 50
    every(history, [point for point, _ in points])
