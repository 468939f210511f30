"""The commands that the sweep kills: what each needs before, and what must be true after it.

A command that was killed is followed by what a user would do: the next backup, or the same command again.
"""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import dataclass
from typing import Callable, Dict, Final, List

from tests.faults import tracer
from tests.faults.tracer import Ended, Point
from tests.faults.world import World


@dataclass(frozen=True)
class Command:
    """`prepare` makes the state that it is run in; `judge` gives the complaints about what is there afterwards."""

    prepare: Callable[[World], None]
    arguments: Callable[[World], List[str]]
    judge: Callable[[World, Ended], List[str]]
    group: bool = False


# init and backup


def _first(world: World) -> None:
    world.renew()
    world.write()


def _increment(world: World) -> None:
    world.room_for(3)
    if not world.published():
        assert world.backup() == []
    world.write()


def _backup(world: World) -> List[str]:
    return world.tool.argv("backup", world.guest.name)[1:]


def _init(world: World) -> List[str]:
    return ["-r", os.path.join(world.folder, "initialised"), "init"]


def _nothing_initialised(world: World) -> None:
    shutil.rmtree(os.path.join(world.folder, "initialised"), ignore_errors=True)


def _initialised_again(world: World, ended: Ended) -> List[str]:
    place = os.path.join(world.folder, "initialised")
    if not os.path.exists(os.path.join(place, "repository.json")):
        again = world.tool.run("init", repository=place)
        if again.code:
            return [f"the next init ended with {again.code}: {again.stderr.strip()}"]
    found = os.listdir(place)
    return [] if found == ["repository.json"] else [f"init has left {found}"]


def _next_backup(world: World, ended: Ended) -> List[str]:
    world.keep(world.models())  # if it was published, with what the guest held when it was killed: it wrote nothing since
    world.write()
    complaints = world.backup()
    world.processes.note(world.point)
    return complaints + world.left()


# mark, start and stop


def _mark(world: World) -> List[str]:
    return world.tool.argv("mark", world.guest.name)[1:]


def _start(world: World) -> List[str]:
    return world.tool.argv("start", world.guest.name)[1:]


def _started(world: World, ended: Ended) -> List[str]:
    """A user gives up the point, whether it came to be or not."""
    return _stopped(world, "--discard") + _next_backup(world, ended)


def _open(world: World) -> None:
    """A fleecing point, and writes since."""
    _increment(world)
    started = world.tool.run("start", world.guest.name)
    assert started.code == 0, started
    world.write()


def _stop(world: World) -> List[str]:
    return world.tool.argv("stop", world.guest.name)[1:]


def _discard(world: World) -> List[str]:
    return world.tool.argv("stop", world.guest.name, "--discard")[1:]


def _stopped_again(world: World, ended: Ended) -> List[str]:
    return _stopped(world) + _next_backup(world, ended)


def _discarded_again(world: World, ended: Ended) -> List[str]:
    return _stopped(world, "--discard") + _next_backup(world, ended)


def _stopped(world: World, *options: str) -> List[str]:
    again = world.tool.run("stop", world.guest.name, *options)
    world.processes.note(world.point)
    if again.code and again.document.get("error", {}).get("kind") != "NoPointOpen":
        return [f"the next stop ended with {again.code}: {again.stderr.strip()}"]
    return []


# restore and verify


def _chain(world: World) -> None:
    """Three generations; nothing that is killed adds to them."""
    if len(world.published()) != 3:
        world.renew()
        for _ in range(3):
            world.write()
            assert world.backup() == []
    shutil.rmtree(_output(world), ignore_errors=True)


def _output(world: World) -> str:
    return os.path.join(world.folder, "restored")


def _restore(world: World) -> List[str]:
    return world.tool.argv("restore", world.guest.name, "--output", _output(world))[1:]


def _restored_again(world: World, ended: Ended) -> List[str]:
    """A finished image keeps its name and is never written over: it is right, and then it is the user's to remove."""
    output = _output(world)
    held = world.models()
    if ended.code == 0:
        return world.compare(output, held) + world.left()
    whole = [n for n in (os.listdir(output) if os.path.isdir(output) else []) if n.endswith(".raw")]
    if whole:
        again = world.tool.run("restore", world.guest.name, "--output", output)
        if (again.code, again.document.get("error", {}).get("kind")) != (15, "TargetExists"):
            return [f"a restore over {whole} ended with {again.code}"]
        complaints = world.compare(output, {n[:-4]: held[n[:-4]] for n in whole})
        complaints = [c for c in complaints if ".part" not in c]
        for name in whole:
            os.unlink(os.path.join(output, name))
    else:
        complaints = []
    again = world.tool.run("restore", world.guest.name, "--output", output)
    if again.code:
        return [*complaints, f"the next restore ended with {again.code}: {again.stderr.strip()}"]
    world.processes.note(world.point)
    return complaints + world.compare(output, held) + world.left()


def _verify(world: World) -> List[str]:
    return world.tool.argv("verify", world.guest.name)[1:]


def _verified_again(world: World, ended: Ended) -> List[str]:
    again = world.tool.run("verify", world.guest.name)
    world.processes.note(world.point)
    if again.code:
        return [f"the next verify ended with {again.code}: {again.stderr.strip()}"]
    return world.left()


# backup --heal


def _damaged(world: World) -> None:
    """One backup, of which a layer is missing; the guest has written nothing since, so all of it can be had again."""
    _first(world)
    assert world.backup() == []
    [only] = world.published()
    os.unlink(os.path.join(world.tool.repository, world.guest.uuid, "backups", only, "vda.qcow2"))


def _heal(world: World) -> List[str]:
    return world.tool.argv("backup", world.guest.name, "--heal")[1:]


def _healed_again(world: World, ended: Ended) -> List[str]:
    """What a killed one has left damaged `verify` notes, and the next one takes up: all backups are whole then."""
    world.tool.run("verify", world.guest.name)
    again = world.tool.run("backup", world.guest.name, "--heal")
    world.keep(world.models())
    world.processes.note(world.point)
    if again.code:
        return [f"the next backup --heal ended with {again.code}: {again.stderr.strip()}"]
    found = world.tool.run("verify", world.guest.name)
    return ([f"damage is left: {found.document}"] if found.code else []) + world.left()


# recover


def _leftover(world: World, here: Callable[[Point, str], bool]) -> None:
    """What a backup leaves that was killed with its guardian and servers."""
    _increment(world)

    def at(point: Point, what: str, pid: int) -> None:
        if here(point, what):
            world.processes.kill_others(pid)
            os.kill(pid, signal.SIGKILL)

    ended = tracer.run(_backup(world), world.tool.environment(), at)
    assert ended.code == -signal.SIGKILL, ended
    world.keep(world.models())


def _copying(world: World) -> None:
    """Job, checkpoint, scratch, sockets, staging."""
    _leftover(world, lambda point, _: point == Point("nbd", 30))


def _committed(world: World) -> None:
    """An older checkpoint, and the intent in the published directory."""
    _leftover(world, lambda p, what: p.after and p.kind == "rename" and "/backups/" in what)


def _recover(world: World) -> List[str]:
    return world.tool.argv("recover", world.guest.name)[1:]


def _recovered_again(world: World, ended: Ended) -> List[str]:
    again = world.tool.run("recover", world.guest.name)
    if again.code or again.result["left"]:
        return [f"the next recover ended with {again.code}: {again.stderr.strip()} {again.document}"]
    complaints = world.left()
    world.write()
    return complaints + world.backup() + world.left()


COMMANDS: Final[Dict[str, Command]] = {
    "init": Command(_nothing_initialised, _init, _initialised_again),
    "full": Command(_first, _backup, _next_backup),
    "increment": Command(_increment, _backup, _next_backup),
    "increment-group": Command(_increment, _backup, _next_backup, group=True),
    "mark": Command(_increment, _mark, _next_backup),
    "start": Command(_increment, _start, _started),
    "stop": Command(_open, _stop, _stopped_again),
    "stop-discard": Command(_open, _discard, _discarded_again),
    "restore": Command(_chain, _restore, _restored_again),
    "verify": Command(_chain, _verify, _verified_again),
    "heal": Command(_damaged, _heal, _healed_again),
    "recover-copying": Command(_copying, _recover, _recovered_again),
    "recover-committed": Command(_committed, _recover, _recovered_again),
}
