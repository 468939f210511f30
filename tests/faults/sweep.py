"""The crash sweep: a command is killed at each of its calls that leave something, and then nothing may be lost.

After each kill the guest writes on, and the next backup has to work unaided; a restore, verify or recover that was
killed is run again.  See `world` for what is judged, `tracer` for where is killed, `pruning` for the commands `prune-...`.  A backup's kill hits the tool alone
(its guardian lives on) or, in `increment-group`, all processes of ours at once, as systemd ends a unit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Callable, List, Optional, Sequence, Tuple

import pytest

from libvirt_cbt import errors
from tests.faults import pruning, tracer
from tests.faults.commands import COMMANDS, Command
from tests.faults.tracer import Point
from tests.faults.world import LEFT, World
from tests.guests import daemon


@dataclass(frozen=True)
class Loss:
    command: str
    point: str
    complaint: str


@dataclass
class Report:
    """Of one command: points tried, how many of them a run then did not have, seconds."""

    command: str
    points: int = 0
    missed: int = 0
    losses: int = 0
    seconds: float = 0.0


class Sweep:
    """Kills commands in one world and gathers the losses."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.seed = world, seed
        self.losses: List[Loss] = []
        self._told = 0

    def _begin(self, name: str, where: str) -> Command:
        """The guest's writes depend on the point alone, so that it can be tried again by itself."""
        self.world.point = f"{name} {where}"
        self.world.rng = random.Random(f"{self.seed} {name} {where}")
        COMMANDS[name].prepare(self.world)
        return COMMANDS[name]

    def points(self, name: str) -> List[Tuple[Point, str]]:
        """The points of a run that is left alone, which is judged, too."""
        command = self._begin(name, "left alone")
        ended, found = tracer.points(command.arguments(self.world), self.world.tool.environment())
        assert ended.code == 0, ended
        self._judged(name, "left alone", command.judge(self.world, ended))
        return [(point, what) for point, what in found if not point.after or point.kind in tracer.AFTER_TOO]

    def kill(self, name: str, point: Point) -> Optional[str]:
        """Kills a run at a point and judges; the call that it was at, or None when the run had no such point."""
        command = self._begin(name, str(point))
        hits: List[str] = []

        def at(here: Point, what: str, pid: int) -> None:
            if here == point:
                hits.append(what)
                if command.group:
                    self.world.processes.kill_others(pid)
                os.kill(pid, signal.SIGKILL)

        try:
            ended = tracer.run(command.arguments(self.world), self.world.tool.environment(), at)
            self.world.processes.note(self.world.point)
            complaints = command.judge(self.world, ended)
            if ended.code not in (0, -signal.SIGKILL):
                complaints.append(f"it ended with {ended.code}: {ended.stderr.strip()}")
        except (AssertionError, TimeoutError, subprocess.TimeoutExpired) as e:
            complaints = [f"{type(e).__name__}: {e}"]
        self._judged(name, f"{point} ({self.world.short(hits[0]) if hits else 'not reached'})", complaints)
        return hits[0] if hits else None

    def _judged(self, name: str, point: str, complaints: Sequence[str]) -> None:
        self.losses += [Loss(name, point, self.world.short(c)) for c in dict.fromkeys(complaints)]
        self._late()
        if all(complaint.startswith(LEFT) for complaint in complaints):
            self.world.tidy()
        else:
            self.world.start_over()

    def _late(self) -> None:
        for point, complaint in self.world.late:
            name, _, where = point.partition(" ")
            self.losses.append(Loss(name, where, self.world.short(complaint)))
        self.world.late = []

    def finish(self) -> None:
        """Everything of the last repository is checked, and every process has ended."""
        self.world.check_everything()
        self.world.late += self.world.processes.overdue(wait=True)
        self._late()

    def command(self, name: str, chosen: Sequence[Point], say: Callable[[str], None]) -> Report:
        """Kills a command at each of the points; every loss is said at once."""
        begun = time.monotonic()
        report = Report(name)
        for point in chosen:
            report.points += 1
            report.missed += self.kill(name, point) is None
            report.losses += self.say(say)
        self.finish()
        report.losses += self.say(say)
        report.seconds = time.monotonic() - begun
        return report

    def say(self, say: Callable[[str], None]) -> int:
        """Tells of the losses that were not told of; how many."""
        told, self._told = self._told, len(self.losses)
        for loss in self.losses[told:]:
            say(f"LOSS: {loss.command} {loss.point}: {loss.complaint}")
        return self._told - told


def sample(points: Sequence[Tuple[str, Point]], number: int, rng: random.Random) -> List[Tuple[str, Point]]:
    """So many of all; kinds first, so that a rename is as likely as one of a hundred sends."""
    kinds = sorted({(name, point.kind) for name, point in points})
    chosen = []
    for name, kind in rng.sample(kinds, min(number, len(kinds))):
        chosen.append((name, rng.choice([p for n, p in points if n == name and p.kind == kind])))
    rest = [one for one in points if one not in chosen]
    order = [*COMMANDS, *pruning.SHAPES]
    return sorted(
        chosen + rng.sample(rest, min(number - len(chosen), len(rest))), key=lambda c: order.index(c[0])
    )


def prunes(name: str, seed: int, asked: argparse.Namespace) -> List[Loss]:
    """The same for one kind of prune, which needs no guest; figures and losses are printed."""
    rng = random.Random(f"{seed} {name}")
    report, losses, begun = Report(name), [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cbt-sweep-") as folder, pruning.killing(folder, name, rng) as killing:
        every = killing.points()
        if asked.list:
            print("\n".join(f"{name} {point} {what.replace(folder, '')}" for point, what in every))
            return []
        for _, point in narrowed([(name, point) for point, _ in every], [name], asked, rng):
            report.points += 1
            try:
                report.missed += killing.kill(point) == pruning.MISSED
            except (
                AssertionError,
                TimeoutError,
                subprocess.SubprocessError,
                errors.CbtError,
                pytest.fail.Exception,
            ) as e:
                losses.append(Loss(name, str(point), f"{type(e).__name__}: {e}".replace(folder, "")))
                print(f"LOSS: {name} {point}: {losses[-1].complaint}", flush=True)
    report.losses, report.seconds = len(losses), time.monotonic() - begun
    tell(report)
    return losses


def narrowed(
    every: Sequence[Tuple[str, Point]], names: Sequence[str], asked: argparse.Namespace, rng: random.Random
) -> List[Tuple[str, Point]]:
    """Those of all points that were asked for."""
    chosen = list(every)
    if asked.point:
        chosen = [(n, Point.parse(p)) for n in names for p in asked.point]
    elif asked.sample:
        chosen = sample(chosen, asked.sample, rng)
    part, parts = asked.part
    return chosen[part - 1 :: parts]


def tell(report: Report) -> None:
    print(
        f"{report.command}: {report.points} kill points ({report.missed} not reached), {report.losses} losses, "
        f"{report.seconds / max(1, report.points):.1f} s each",
        flush=True,
    )


def with_a_guest(names: Sequence[str], seed: int, asked: argparse.Namespace) -> List[Loss]:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="cbt-sweep-") as folder, daemon.Daemon() as host:
        with World(host, folder) as world:
            sweep = Sweep(world, seed)
            every = [(n, point, what) for n in names for point, what in sweep.points(n)]
            sweep.say(print)
            if asked.list:
                for name, point, what in every:
                    print(name, point, world.short(what))
                return sweep.losses
            chosen = narrowed([(n, p) for n, p, _ in every], names, asked, rng)
            for name in names:
                points = [p for n, p in chosen if n == name]
                tell(sweep.command(name, points, lambda line: print(line, flush=True)))
            return sweep.losses


def _part(text: str) -> Tuple[int, int]:
    part, _, parts = text.partition("/")
    found = int(part), int(parts)
    if not 1 <= found[0] <= found[1]:
        raise ValueError
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="script/sweep", description="Kills the tool at every step; nothing may be lost."
    )
    parser.add_argument(
        "--sample", type=int, metavar="N", help="only N points, drawn by --seed (of each kind of prune)"
    )
    parser.add_argument("--seed", type=int, help="of the guest's writes and the sample; printed")
    parser.add_argument("--point", action="append", default=[], help="only this point (KIND:NUMBER, as of a LOSS line)")
    parser.add_argument(
        "--part", type=_part, metavar="I/N", default=(1, 1), help="only each Nth point, from the Ith on"
    )
    parser.add_argument("--list", action="store_true", help="print the points of each command and kill nothing")
    known = [*COMMANDS, *pruning.SHAPES]
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=", ".join(known))
    asked = parser.parse_args()
    unknown = set(asked.commands) - set(known)
    if unknown:
        parser.error(f"no command {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    seed = asked.seed if asked.seed is not None else random.SystemRandom().getrandbits(32)
    names = asked.commands or known
    print(f"seed {seed}", flush=True)
    guests = [name for name in names if name in COMMANDS]
    losses = with_a_guest(guests, seed, asked) if guests else []
    for name in names:
        if name in pruning.SHAPES:
            losses += prunes(name, seed, asked)
    for loss in {f"{one.command} {one.point}": one for one in losses}.values():
        where = "--list" if loss.point == "left alone" else f"--point {loss.point.split(' ')[0]}"
        print(f"again: script/sweep --seed {seed} {where} {loss.command}")
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
