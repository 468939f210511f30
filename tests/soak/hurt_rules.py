"""What hurts: the tool killed or told to stop, its source lost, the daemon gone under it, its rooms full."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import replace
from typing import Callable, Final, List, Optional, Sequence, Tuple

from tests.faults.test_scratch import AMPLE
from tests.soak import calls, tool_rules
from tests.soak.calls import Ended, Trouble
from tests.soak.guest import RUNNING
from tests.soak.model import EITHER, SECTOR, Chronicle, Made, Moment, Point, layered, require
from tests.soak.rules import rule
from tests.soak.world import World

SLOW: Final = ("--bandwidth", "2M")
LONGEST: Final = 1.5  # seconds; a command that was not killed by then is done, mostly
STOPS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OVERWRITING: Final = 3.0  # seconds
FILLED: Final = 400 * 1024  # bytes that are left at most in a file system that is filled


def changing(world: World, chronicle: Chronicle, rng: random.Random) -> List[str]:
    """Any command that changes something, as words."""
    verbs = ["backup", "backup", "backup", "mark", "recover", "prune", "prune"]
    if not world.guest.tracked():
        verbs = ["backup", "prune"]
    elif world.guest.state == RUNNING:
        verbs.append("start")
    if chronicle.point:
        verbs += ["stop", "stop --discard"]
    verb = rng.choice(verbs)
    if verb == "prune" and len(chronicle.made) > 1:
        return [verb, *tool_rules.prune_options(chronicle, rng)]
    if verb in ("backup", "prune"):
        return ["backup", *tool_rules.backup_options(world, rng)]
    return verb.split()


def hurt(world: World, chronicle: Chronicle, words: Sequence[str], trouble: Trouble) -> Tuple[Ended, Optional[Made]]:
    """Runs a command to which something happens, and takes note of what it has done by then."""
    point, moment = chronicle.point, world.moment(chronicle)
    ended = world.command(chronicle, *words, trouble=trouble)
    if words[0] == "prune":
        pruned(world, chronicle)
    if words[0] == "stop" and point:
        moment = point.moment
    made = world.published(chronicle, moment)
    if words[0] != "prune":
        chronicle.killed = made is None and (chronicle.killed or ended.code != 0)
        if made is None:
            _pointed(world, chronicle, words, ended, moment)
    return ended, made


def _pointed(world: World, chronicle: Chronicle, words: Sequence[str], ended: Ended, moment: Moment) -> None:
    """Whether a fleecing point is open now, as far as that can be known."""
    staged, point = world.staged(chronicle), chronicle.point
    known = point.id if point else ""
    if words[0] == "start" and staged and staged != [known]:
        chronicle.point = Point(moment, next(one for one in staged if one != known), doubtful=ended.code != 0)
    elif point and point.id not in staged:
        chronicle.point = None
    elif point and (words[0] == "stop" or not world.busy):
        chronicle.point = replace(point, doubtful=True)


def pruned(world: World, chronicle: Chronicle) -> None:
    """What a prune has done that was ended half-way: any backup may be gone that it might take."""
    rows = {row["id"]: row for row in world.listed(chronicle)}
    gone = [made for made in chronicle.made if made.id not in rows]
    require(gone == chronicle.made[: len(gone)], "not the oldest were forgotten", [made.number for made in gone])
    require(not any(made.protected for made in gone), "what was protected is forgotten")
    chronicle.made = chronicle.made[len(gone) :]
    newest = chronicle.made[-1]
    needed = {target for target in newest.disks if any(target in made.layered for made in chronicle.made)}
    for made in chronicle.made:
        now = layered(rows[made.id])
        require(now <= made.layered, "a prune has given a generation data", made.number)
        require(now == made.layered or not made.protected, "what was protected was removed", made.number)
        made.layered = now
    still = {target for target in newest.disks if any(target in made.layered for made in chronicle.made)}
    require(needed == still, "the newest backup of a disk was removed", needed - still)


def _tell(chronicle: Chronicle, words: Sequence[str], ended: Ended, made: Optional[Made]) -> str:
    return f"{chronicle.name} {' '.join(words)}: {ended}" + (f", generation {made.number}" if made else "")


def expected(world: World, chronicle: Chronicle, words: Sequence[str], ended: Ended, *, busy: bool) -> bool:
    """Whether a command ended as it should although it did nothing."""
    if words[0] == "prune":
        return ended.kind == "Usage"
    if words[0] == "stop":
        return ended.kind in ("NoPointOpen", "PointLost")
    if ended.kind == "NotInRepository":
        return not chronicle.made
    return world.in_the_way(chronicle, ended, was_busy=busy)


@rule(14)
def kill_tool(world: World, rng: random.Random) -> Optional[str]:
    """SIGKILL at some moment, for the tool alone or for all processes of ours."""
    chronicle = world.choose(rng)
    words, busy = changing(world, chronicle, rng), world.busy
    everyone = rng.random() < 0.4
    others = world.processes.kill_others if everyone else lambda _: None
    ended, made = hurt(world, chronicle, words, calls.after(rng.uniform(0.05, LONGEST), others=others))
    world.processes.note(" ".join(words))
    if everyone:
        for one in world.chronicles:  # their guards have died, too
            one.killed = True
        if not world.guest.running:
            world.guest.broke(world.guest.disks, EITHER)  # a qemu-img that dies with an image open does not save its bitmaps
    require(ended.code in (0, -signal.SIGKILL) or expected(world, chronicle, words, ended, busy=busy), "it failed", ended)
    return ("all of " if everyone else "") + _tell(chronicle, words, ended, made)


@rule(5)
def stop_tool(world: World, rng: random.Random) -> Optional[str]:
    """A signal that asks it to end."""
    chronicle = world.choose(rng)
    words, busy, number = changing(world, chronicle, rng), world.busy, rng.choice(STOPS)
    ended, made = hurt(world, chronicle, words, calls.after(rng.uniform(0.05, LONGEST), number))
    stopped = ended.code in (128 + number, -number)  # or before it could mind signals
    require(ended.code == 0 or stopped or expected(world, chronicle, words, ended, busy=busy), "it failed", ended)
    return _tell(chronicle, words, ended, made)


def _slow(world: World, rng: random.Random, then: Callable[[], None], good: Callable[[Ended], bool]) -> Optional[str]:
    """A slow backup, in the middle of which something happens."""
    chronicle = world.choose(rng)
    if world.guest.state != RUNNING or world.busy:
        return None
    words = ["backup", *tool_rules.backup_options(world, rng), *SLOW]
    ended, made = hurt(world, chronicle, words, calls.once(lambda: world.busy, then))
    require(good(ended), "it failed", ended)
    require((ended.code == 0) == (made is not None), "it did not tell the truth", ended)
    return _tell(chronicle, words, ended, made)


@rule(4)
def write_meanwhile(world: World, rng: random.Random) -> Optional[str]:
    """The guest writes during a backup, whose moment is before."""

    def writes() -> None:
        for target in world.guest.disks:
            world.guest.random_writes(rng, target, 6)

    return _slow(world, rng, writes, lambda ended: ended.code == 0)


@rule(3)
def lose_source(world: World, rng: random.Random) -> Optional[str]:
    """The guest is switched off, or its QEMU dies, in the middle of a backup."""
    how = rng.choice((world.guest.destroy, world.guest.kill))
    return _slow(world, rng, how, lambda ended: ended.code in (0, 13))


@rule(3)
def lose_libvirtd(world: World, rng: random.Random) -> Optional[str]:
    """The daemon restarts, or dies and comes back, in the middle of a backup.

    If it goes while it begins the job, nobody can tell whether it has: then the backup fails, and nothing is left.
    """
    how, pause = rng.choice((world.host.stop, world.host.kill)), rng.choice((0.0, 0.1, 0.3))

    def restart() -> None:
        time.sleep(pause)
        world.lose_daemon(how)
        world.host.start()

    return _slow(world, rng, restart, lambda ended: ended.code == 0 or ended.kind == "NoHypervisor")


@rule(3)
def fill_scratch(world: World, rng: random.Random) -> Optional[str]:
    """No room for what the guest overwrites: its own writes come first.

    They go through the monitor here, which waits for those that are slowed: so they are small, and not too many.
    """

    def writes() -> None:
        end = time.monotonic() + OVERWRITING
        while time.monotonic() < end:
            target = rng.choice(sorted(world.guest.disks))
            size = world.guest.disks[target].size
            length = min(64 * 1024, size)
            world.guest.write(target, rng.randrange((size - length) // SECTOR + 1) * SECTOR, length, rng.randint(1, 255))

    if world.busy:
        return None  # a guard gives the open point up, as it should
    world.host.resize(rng.randint(1, 6))
    try:
        return _slow(world, rng, writes, lambda ended: ended.code in (0, 14))
    finally:
        world.host.resize(AMPLE)


@rule(5)
def fill_repository(world: World, rng: random.Random) -> Optional[str]:
    """No room in the repository, or little."""
    chronicle = world.choose(rng)
    words, busy = changing(world, chronicle, rng), world.busy
    ballast = os.path.join(world.rooms, "ballast")
    status = os.statvfs(world.rooms)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, status.f_bavail * status.f_frsize - rng.randint(0, FILLED)))
    try:
        ended, made = hurt(world, chronicle, words, lambda _: None)
    finally:
        os.unlink(ballast)
    require(ended.code in (0, 15) or expected(world, chronicle, words, ended, busy=busy), "it failed", ended)
    return _tell(chronicle, words, ended, made)
