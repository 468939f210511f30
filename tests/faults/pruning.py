"""The sweep over prune: killed at each of its calls that leave something, and again every backup must read as it did.

Repositories with real layers and no guest, as `tests.nbd.histories` makes them; killed by `tracer`.  After each kill all
backups are restored and compared, by this tool and by qemu-img, and verified; then the next prune has to end what the
killed one began, and all is compared again.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from typing import Callable, Dict, Final, Iterator, List, Tuple

from tests.faults import tracer
from tests.faults.tracer import Point
from tests.nbd.conftest import MIB
from tests.nbd.histories import History, drain, fill, flood, tmpfs
from tests.unit import repository_samples as samples

# How long the writers of a prune that is killed go on before: all that was sent to them is in flight, or done.
PAUSES: Final = (0.0, 0.0, 0.002, 0.02)
MISSED: Final = "not reached"


@dataclass(frozen=True)
class Shape:
    """A repository, and what is taken away of it; on a `full` disk in steps."""

    make: Callable[[str, random.Random], History]
    removed: Tuple[str, ...]
    kept: Tuple[int, ...]
    left: Tuple[int, ...]
    forget: bool = False
    full: bool = False


def growing(folder: str, rng: random.Random) -> History:
    made = History(folder, MIB + 512)
    for generation in range(6):
        made.write(rng)
        if generation == 3:
            made.grow("vda", made.disks["vda"].size + 65536)
        made.generation()
    return made


def two_disks(folder: str, rng: random.Random) -> History:
    made = History(folder, MIB, MIB // 2 + 65536, compress=False, cluster=4096)
    for generation in range(6):
        made.write(rng)
        made.generation(mark=generation == 2, only=["vda"] if generation == 3 else [])
    return made


def dense(folder: str, rng: random.Random) -> History:
    """Incompressible, and written over again and again: every merge hides much."""
    made = History(folder, 2 * MIB)
    for _ in range(5):
        for _ in range(4):
            fill(made, rng, "vda", rng.randrange(24) * 65536, rng.randrange(1, 8) * 65536)
        made.write(rng)
        made.generation()
    return made


def filled(folder: str, rng: random.Random) -> History:
    made = History(folder, 8 * MIB, compress=False)
    for number in range(4):
        fill(made, rng, "vda", (number % 2) * 4 * MIB, 4 * MIB)
        fill(made, rng, "vda", (number % 2) * 4 * MIB + MIB, MIB)
        made.generation()
    return made


SHAPES: Final[Dict[str, Shape]] = {
    # The oldest twice in a row, one in the middle, and what lies before the oldest that is left is forgotten.
    "prune-growing": Shape(growing, ("1", "2", "4"), (3, 5, 6), (3, 4, 5, 6), forget=True),
    "prune-two-disks": Shape(two_disks, ("2", "5"), (1, 4, 6), (1, 2, 3, 4, 5, 6)),
    "prune-all-but-newest": Shape(dense, ("1", "2", "3", "4"), (5,), (1, 2, 3, 4, 5)),
    "prune-full-disk": Shape(filled, ("1", "2", "3"), (4,), (1, 2, 3, 4), full=True),
}


class Killing:
    """The same prune of the same repository, again and again."""

    def __init__(self, folder: str, shape: Shape, rng: random.Random) -> None:
        self.folder, self.shape, self.rng = folder, shape, rng
        self.place = os.path.join(folder, "place")
        os.makedirs(self.place, exist_ok=True)
        self.history = shape.make(self.place, rng)
        self.history.proofs = folder
        self.begun = os.path.join(folder, "begun")
        shutil.copytree(self.history.repository.path, self.begun)

    @property
    def arguments(self) -> List[str]:
        removes = [x for number in self.shape.removed for x in ("--remove", number)]
        forget = ["--forget"] if self.shape.forget else []
        return ["-c", "test:///default", "-r", self.history.repository.path, "prune", samples.UUID, *removes, *forget]

    @property
    def environment(self) -> Dict[str, str]:
        return {**os.environ, "LIBVIRT_CBT_RUN_DIR": os.path.join(self.folder, "run")}

    def begin(self) -> None:
        shutil.rmtree(self.history.repository.path)
        shutil.copytree(self.begun, self.history.repository.path)
        if self.shape.full:
            flood(self.place)

    def points(self) -> List[Tuple[Point, str]]:
        self.begin()
        ended, found = tracer.points(self.arguments, self.environment)
        assert ended.code == 0, ended.stderr
        self.judge_the_end()
        return [(point, what) for point, what in found if not point.after or point.kind in tracer.AFTER_TOO]

    def kill(self, point: Point) -> str:
        """What the run was at; all is judged."""
        self.begin()
        hits: List[str] = []
        pause = self.rng.choice(PAUSES)

        def at(here: Point, what: str, pid: int) -> None:
            if here == point:
                hits.append(what)
                time.sleep(pause)
                os.kill(pid, signal.SIGKILL)

        ended = tracer.run(self.arguments, self.environment, at)
        if not hits:
            assert ended.code == 0, ended.stderr
            return MISSED
        assert ended.code == -signal.SIGKILL, f"it ended with {ended.code}: {ended.stderr}"
        if self.shape.full:
            drain(self.place)
        # Every backup that is listed is whole, and those that were to be kept are listed.
        self.history.prove(settled=False)
        listed = {m.generation for m in self.history.backups()}
        assert set(self.shape.kept) <= listed, f"only {sorted(listed)} are left"
        found = self.history.prune(remove=self._left(), forget=self.shape.forget)
        assert not found.skipped, found.skipped
        self.judge_the_end()
        return f"{hits[0]} after {pause} s"

    def _left(self) -> List[str]:
        known = {m.generation for m in self.history.repository.domain(samples.UUID).generations()}
        return [number for number in self.shape.removed if int(number) in known]

    def judge_the_end(self) -> None:
        if self.shape.full:
            drain(self.place)
        self.history.prove()
        kept = self.history.repository.domain(samples.UUID)
        backups = tuple(m.generation for m in self.history.backups())
        assert backups == self.shape.kept, f"backups are {backups}"
        left = tuple(m.generation for m in kept.generations())
        assert left == self.shape.left, f"generations are {left}"


@contextlib.contextmanager
def killing(folder: str, name: str, rng: random.Random) -> Iterator[Killing]:
    shape = SHAPES[name]
    with tmpfs(os.path.join(folder, "place"), "80m") if shape.full else contextlib.nullcontext():
        yield Killing(folder, shape, rng)
