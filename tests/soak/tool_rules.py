"""What is done with the tool, all going well."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Collection, List, Optional

from tests.soak import judge
from tests.soak.calls import Ended
from tests.soak.guest import RUNNING
from tests.soak.model import EITHER, Chronicle, Moment, Point, require
from tests.soak.rules import rule
from tests.soak.world import World


def taken(world: World, chronicle: Chronicle, moment: Moment, ended: Ended) -> str:
    """A run that had to publish a generation has done so, and says what it is."""
    require(ended.code == 0, "a run failed", ended)
    made = world.published(chronicle, moment)
    require(made, "nothing was published", ended)
    assert made is not None
    result = ended.result
    identity = result.get("backup") or result.get("id")
    require((result["generation"], identity) == (made.number, made.id), "it tells of another generation", ended)
    chronicle.point, chronicle.killed = None, False
    return f"{chronicle.name} generation {made.number}"


def backup_options(world: World, rng: random.Random) -> List[str]:
    """Some of the ways to back up."""
    guest = world.guest
    options: List[str] = []
    if rng.random() < 0.1:
        options.append("--full")
    if rng.random() < 0.15 and len(guest.disks) > 1:
        options += [rng.choice(("--disk", "--exclude")), rng.choice(sorted(guest.disks))]
    if rng.random() < 0.3:
        options += ["--compress", "none"]
    if rng.random() < 0.1:
        options.append("--audit")
    return options


@rule(16)
def backup(world: World, rng: random.Random) -> Optional[str]:
    chronicle, options = world.choose(rng), backup_options(world, rng)
    moment, busy = world.moment(chronicle), world.busy
    ended = world.command(chronicle, "backup", *options)
    if world.in_the_way(chronicle, ended, was_busy=busy):
        return f"{chronicle.name} kept out: {ended.kind}"
    said = taken(world, chronicle, moment, ended)
    modes = ", ".join(f"{d['target']} {d['mode']}" for d in ended.result["disks"])
    return f"{said} {' '.join(options)} {modes}"


@rule(8)
def mark(world: World, rng: random.Random) -> Optional[str]:
    chronicle = world.choose(rng)
    if not world.guest.tracked():
        return None
    moment, busy = world.moment(chronicle), world.busy
    ended = world.command(chronicle, "mark")
    if world.in_the_way(chronicle, ended, was_busy=busy):
        return f"{chronicle.name} kept out: {ended.kind}"
    return taken(world, chronicle, moment, ended)


@rule(5)
def start(world: World, rng: random.Random) -> Optional[str]:
    chronicle = world.choose(rng)
    if world.guest.state != RUNNING or not world.guest.tracked():
        return None
    moment, busy = world.moment(chronicle), world.busy
    ended = world.command(chronicle, "start")
    if world.in_the_way(chronicle, ended, was_busy=busy):
        return f"{chronicle.name} kept out: {ended.kind}"
    require(ended.code == 0, "a point could not be opened", ended)
    require(world.published(chronicle, moment) is None, "an open point is published")
    for other in world.chronicles:
        if other.point:  # else it would have been in the way
            other.point = replace(other.point, doubtful=True)
    chronicle.point, chronicle.killed = Point(moment, ended.result["id"]), False
    return f"{chronicle.name} generation {ended.result['generation']}"


@rule(7)
def stop(world: World, rng: random.Random) -> Optional[str]:
    chronicle = world.point or world.choose(rng)
    point, busy = chronicle.point, world.busy
    more = ["--discard"] if rng.random() < 0.3 else []
    if point is None and rng.random() < 0.9:
        return None
    ended = world.command(chronicle, "stop", *more)
    if point is None:
        require(ended.code == 10, "a stop without a point", ended)
        return "nothing to stop"
    if point.doubtful:
        require(ended.code == 0 or ended.kind in ("NoPointOpen", "PointLost"), "a stop failed", ended)
        made = world.published(chronicle, point.moment)
        chronicle.point = None
        return f"{chronicle.name} {' '.join(more)} {ended}, published {made and made.number}"
    if more or not busy:
        require(ended.kind == ("" if more else "PointLost"), "a point that was given up", ended)
        require(world.published(chronicle, point.moment) is None, "a point that was given up is published")
        chronicle.point = None
        return f"{chronicle.name} {' '.join(more)} {ended.kind}"
    said = taken(world, chronicle, point.moment, ended)
    return f"{said} committed"


@rule(3)
def recover(world: World, rng: random.Random) -> Optional[str]:
    chronicle = world.choose(rng)
    ended = world.command(chronicle, "recover")
    if ended.kind in ("NotInRepository", "PointOpen"):
        return ended.kind
    world.settled(chronicle)
    return f"{chronicle.name} {ended.result['actions']}"


@rule(1)
def untrack(world: World, rng: random.Random) -> Optional[str]:
    chronicle, busy = world.choose(rng), world.busy
    ended = world.command(chronicle, "untrack")
    if ended.kind in ("PointOpen", "DomainBusy") and busy:
        return f"{chronicle.name} {ended.kind}"
    if ended.kind == "BitmapBelow" and not world.guest.running:
        for key in world.guest.every_key():
            chronicle.broke(key, EITHER)  # some checkpoints may be gone already
        return f"{chronicle.name} {ended.kind}"
    world.settled(chronicle)
    removed = ended.result["removed"]
    for key in world.guest.every_key():
        chronicle.broke(key)
    chronicle.strays = 0
    return f"{chronicle.name} {len(removed)} removed"


@rule(6)
def prune(world: World, rng: random.Random) -> Optional[str]:
    chronicle = world.choose(rng)
    if not chronicle.made:
        return None
    options = prune_options(chronicle, rng)
    ended = world.command(chronicle, "prune", *options)
    if ended.kind == "Usage":  # the newest, or protected
        return f"{chronicle.name} {' '.join(options)}: {ended}"
    require(ended.code == 0, "a prune failed", ended)
    result = ended.result
    require(not result["skipped"], "a prune left something", ended)
    thinned(world, chronicle, {r["id"] for r in result["removed"]}, set(result["forgotten"]))
    return f"{chronicle.name} {' '.join(options)}: {len(result['removed'])} removed, {len(result['forgotten'])} forgotten"


def prune_options(chronicle: Chronicle, rng: random.Random) -> List[str]:
    options: List[str] = []
    if rng.random() < 0.5:
        options += ["--keep-last", str(rng.randint(1, 6))]
    backups = [made for made in chronicle.made if made.layered]
    if (not options or rng.random() < 0.3) and len(backups) > 1:
        chosen = rng.sample(backups[:-1], min(len(backups) - 1, rng.randint(1, 3)))
        options += [word for made in chosen for word in ("--remove", str(made.number))]
    if not options or rng.random() < 0.5:
        options.append("--forget")
    return options


def thinned(world: World, chronicle: Chronicle, removed: Collection[str], forgotten: Collection[str]) -> None:
    """What a prune says is what there is."""
    for made in chronicle.made:
        if made.id in removed:
            require(not made.protected, "a protected backup was removed", made.number)
            require(made is not chronicle.made[-1] or not made.layered, "the newest was removed", made.number)
            made.layered = set()
    gone = [made for made in chronicle.made if made.id in forgotten]
    require(gone == chronicle.made[: len(gone)], "not the oldest were forgotten", [made.number for made in gone])
    require(not any(made.layered for made in gone), "a backup was forgotten", [made.number for made in gone])
    chronicle.made = chronicle.made[len(gone) :]
    require(world.published(chronicle, world.moment(chronicle)) is None, "a prune has published a generation")


@rule(2)
def protect(world: World, rng: random.Random) -> Optional[str]:
    chronicle = world.choose(rng)
    backups = [made for made in chronicle.made if made.layered or made.protected]
    if not backups:
        return None
    made = rng.choice(backups)
    verb = "unprotect" if made.protected else "protect"
    world.command(chronicle, verb, "--at", made.id).result  # noqa: B018
    made.protected = not made.protected
    return f"{chronicle.name} {verb} {made.number}"


@rule(3)
def read(world: World, rng: random.Random) -> Optional[str]:
    """The verbs that look and change nothing."""
    chronicle, busy = world.choose(rng), world.busy
    verb = rng.choice(("status", "doctor", "show", "report", "heatmap", "dry run"))
    if not chronicle.made and verb != "doctor":
        return None
    words = [verb]
    if verb == "heatmap":
        words.append(rng.choice(sorted(chronicle.made[-1].disks)))
    elif verb == "dry run":
        words = ["backup", "--dry-run"]
    ended = world.command(chronicle, *words)
    require(ended.code == 0 or (verb == "dry run" and busy), f"{verb} failed", ended)
    return f"{chronicle.name} {verb}"


@rule(6)
def look(world: World, rng: random.Random) -> Optional[str]:
    """Some backups and answers."""
    judge.some(world, rng, 20)
    return "right"


@rule(3)
def check(world: World, rng: random.Random) -> Optional[str]:
    """Every backup, every pair, and nothing left."""
    judge.everything(world)
    return "all is right"
