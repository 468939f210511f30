"""What must be true whenever no run is under way: every backup, every answer, and nothing left behind."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from pathlib import Path
from typing import Final, List, Optional, Set, Tuple

import libvirt_qemu
import numpy as np
from numpy.typing import NDArray

import libvirt_cbt
from libvirt_cbt import errors
from tests.guests import plain
from tests.soak.guest import SAVED
from tests.soak.model import SECTOR, Chronicle, Made, Written, require, united
from tests.soak.world import World

BITMAPS: Final = '{"execute":"query-named-block-nodes"}'


def everything(world: World) -> None:
    """All of it, of all repositories."""
    for chronicle in world.chronicles:
        backups(world, chronicle)
        for pair in pairs(chronicle):
            answer(world, chronicle, *pair)
    left(world)
    if world.guest.state != SAVED:
        world.guest.check()


def some(world: World, rng: random.Random, most: int) -> None:
    """A few restores and answers, drawn."""
    for chronicle in world.chronicles:
        asked = pairs(chronicle)
        for pair in rng.sample(asked, min(most, len(asked))):
            answer(world, chronicle, *pair)
        whole = [made for made in chronicle.made if made.layered]
        for made in rng.sample(whole, min(2, len(whole))):
            restored(world, chronicle, made)


# Backups


def backups(world: World, chronicle: Chronicle) -> None:
    """`verify` is clean, and each backup restores to what the guest held."""
    if not chronicle.made:
        return
    damage = world.command(chronicle, "verify").result["damage"]
    require(not damage, "verify finds damage", damage)
    for made in chronicle.made:
        if made.layered:
            restored(world, chronicle, made)


def restored(world: World, chronicle: Chronicle, made: Made, *, refused: bool = False) -> bool:
    """Each disk of one backup, in full; False when it is `refused` for its damage, where it may be."""
    output = os.path.join(world.folder, "restored")
    try:
        ended = world.command(chronicle, "restore", "--at", made.id, "--output", output)
        if refused and ended.code == 16:
            require(not os.path.exists(output) or not os.listdir(output), "a refused restore wrote files", ended)
            return False
        require(ended.code == 0, "a backup does not restore", f"{chronicle.name} generation {made.number}: {ended}")
        found = sorted(os.listdir(output))
        require(found == sorted(f"{t}.raw" for t in made.layered), "a restore wrote other files", found)
        for target in made.layered:
            same(Path(output, f"{target}.raw").read_bytes(), made, target, chronicle)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    world.counts["restores compared"] += 1
    return True


def same(content: bytes, made: Made, target: str, chronicle: Chronicle) -> None:
    where = plain.first_difference(content, made.disks[target].held)
    shown = f"{chronicle.name} generation {made.number} {target} at byte {where} ({len(content)} bytes)"
    require(where is None, "a backup holds other bytes than the guest did", shown)


# Queries

Pair = Tuple[Optional[Made], Made, str]  # since (None: everything), until, disk


def pairs(chronicle: Chronicle) -> List[Pair]:
    """Every question that can be asked of the disks of both generations."""
    found: List[Pair] = []
    for since, until in itertools.combinations_with_replacement(chronicle.made, 2):
        found += [(since, until, target) for target in sorted({*since.disks, *until.disks})]
    for until in chronicle.made:
        found += [(None, until, target) for target in sorted(until.disks)]
    return found


def answer(
    world: World, chronicle: Chronicle, since: Optional[Made], until: Made, target: str, *, refused: bool = False
) -> None:
    """Nothing is missed, nothing is told beyond the granularity; over a break the answer is the error, with its reason."""
    world.counts["pairs asked"] += 1
    shown = f"{chronicle.name} {target} {since.number if since else '*'}..{until.number}"
    between = _between(chronicle, since, until, target)
    with libvirt_cbt.Session("nowhere:///", chronicle.repository) as session:
        try:
            found = libvirt_cbt.changed(
                session, world.guest.uuid, target, since=since.id if since else "*", until=until.id
            )
            rows = [tuple(int(x) for x in row) for page in found for row in page.tolist()]
        except errors.LineageBroken as e:
            if refused and "manifest.json" in str(e):
                return
            require(between is None, "changes are not told although tracking went on", f"{shown}: {e}")
            require(e.facts["reason"], "a break without a reason", shown)
            world.counts["breaks told"] += 1
            return
        except errors.Damaged:
            if not refused:
                raise
            return
    require(between is not None, "an answer across a break of tracking", shown)
    old = since.disks[target].held if since else b""
    covered(rows, old, until.disks[target].held, shown)
    if since and between is not None:
        told = _sectors(rows, len(until.disks[target].held))
        _within(told, united(between), found.granularity, shown)


def _between(chronicle: Chronicle, since: Optional[Made], until: Made, target: str) -> Optional[List[Written]]:
    """What each generation between has written; None when tracking broke there."""
    if since is None:
        return [] if _begun(chronicle, until, target) else None
    if target not in since.disks or target not in until.disks:
        return None
    found = []
    for number in range(since.number + 1, until.number + 1):
        made = chronicle.find(number)
        if made is None or made.lineage.get(target) != since.lineage[target]:
            return None
        found.append(made.written[target])
    return found


def _begun(chronicle: Chronicle, until: Made, target: str) -> bool:
    """Whether the lineage's beginning is known: its first generation, or a backup of what that left."""
    lineage = until.lineage[target]
    if chronicle.firsts.get(lineage) in [made.id for made in chronicle.made]:
        return True
    return any(target in m.layered for m in chronicle.made if m.lineage.get(target) == lineage and m.number <= until.number)


def covered(rows: List[Tuple[int, ...]], old: bytes, new: bytes, shown: str) -> None:
    """Outside the answer nothing differs, and what it calls zero reads as zeroes."""
    at = 0
    for offset, length, state, _ in [*rows, (len(new), 0, 1, 0)]:
        before = old[at:offset].ljust(offset - at, b"\0")  # a disk that has grown read as zeroes there
        require(offset >= at, "extents out of order", shown)
        require(before == new[at:offset], "a change is missing in an answer", f"{shown} in {at}..{offset}")
        if state == 2:
            require(not any(new[offset : offset + length]), "no zeroes where zeroes are told", f"{shown} at {offset}")
        at = offset + length
    require(at == len(new), "an answer beyond the disk", shown)


def _sectors(rows: List[Tuple[int, ...]], size: int) -> NDArray[np.bool_]:
    told = np.zeros(-(-size // SECTOR), bool)
    for offset, length, _, _ in rows:
        told[offset // SECTOR : -(-(offset + length) // SECTOR)] = True
    return told


def _within(told: NDArray[np.bool_], written: Written, granularity: Optional[int], shown: str) -> None:
    sectors = len(told)
    written.reach(sectors)
    missed = np.flatnonzero(written.sure[:sectors] & ~told)
    require(not len(missed), "a write is missing in an answer", f"{shown} at byte {missed[:1] * SECTOR}")
    if granularity is None:
        return
    grain = max(1, granularity // SECTOR)
    grains = np.zeros(-(-sectors // grain) * grain, bool)
    grains[:sectors] = written.possible[:sectors]
    allowed = np.repeat(grains.reshape(-1, grain).any(axis=1), grain)[:sectors]
    more = np.flatnonzero(told & ~allowed)
    require(not len(more), "more is told than was written", f"{shown} at byte {more[:1] * SECTOR}, {len(more)} sectors")


# What is left


def left(world: World) -> None:
    """After `recover` nothing of ours is on disk, in libvirt, in QEMU or among the processes."""
    for chronicle in world.chronicles:
        ended = world.command(chronicle, "recover")
        if ended.kind == "PointOpen":
            require(chronicle.point, "a point is open that nobody opened", ended)
            return  # it holds scratch, a socket, a guard
        if ended.kind != "NotInRepository":
            require(ended.code == 0 and not ended.result["left"], "recover leaves something", ended)
            world.settled(chronicle)
        require(not world.staged(chronicle), "staging is left", world.staged(chronicle))
    for folder in (world.host.scratch, world.host.run_dir):
        require(not os.listdir(folder), "files are left", f"{folder}: {os.listdir(folder)}")
    world.processes.note("now")
    late = world.processes.overdue(wait=True)
    require(not late, "a process is left", late)
    require(not world.busy, "a job is left")
    _in_libvirt(world)


def _in_libvirt(world: World) -> None:
    """One checkpoint of each repository at most, and no bitmap that none has."""
    names = {c.getName() for c in world.guest.domain.listAllCheckpoints()}
    ours = {f"cbt-{made.id}": (one, made) for one in world.chronicles for made in one.made}
    for chronicle in world.chronicles:
        mine = [n for n in names if n in ours and ours[n][0] is chronicle]
        if world.guest.running or not any(world.guest.disk(target).below for target in world.guest.disks):
            # Else they wait: of a bitmap that is in a backing file, too, only a running QEMU can let go.
            require(len(mine) <= 1, "an older checkpoint is left", mine)
            require(not mine or ours[mine[0]][1] is chronicle.made[-1], "the checkpoint is not the newest's", mine)
    strange = {n for n in names if n not in ours}
    require(len(strange) <= sum(one.strays for one in world.chronicles), "a checkpoint of no generation", strange)
    if world.guest.running and world.guest.pid not in world.forgotten:
        folder = f"/proc/{world.guest.pid}/fd"
        opened = [_target(os.path.join(folder, fd)) for fd in os.listdir(folder)]
        require(not [p for p in opened if p.startswith(world.host.scratch)], "QEMU has scratch files open", opened)


def orphans(world: World) -> Set[str]:
    """Bitmaps in QEMU that no checkpoint has."""
    nodes = json.loads(libvirt_qemu.qemuMonitorCommand(world.guest.domain, BITMAPS, 0))["return"]
    names = {b["name"] for node in nodes for b in node.get("dirty-bitmaps", [])}
    return names - {c.getName() for c in world.guest.domain.listAllCheckpoints()}


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""
