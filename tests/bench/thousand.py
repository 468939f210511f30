"""Rows of a long history: what a thousand generations of one guest cost that ten do not, and what they leave.

All but the last of them are synthetic: marks of one small delta each, under the UUID of a guest that runs.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import partial
from typing import Dict, Final, List
from unittest import mock

import libvirt_cbt
from libvirt_cbt import names
from tests.bench import measuring, query
from tests.bench.measuring import MB, Effort, Row, Sample
from tests.bench.world import MIB, Guest, World, run

FEW: Final = 10
SIZE: Final = 256 * MIB
SHARE: Final = 0.01
TIMES: Final = 2.0
MORE_MB: Final = 12.0  # a manifest takes 5 to 10 KB in memory, one that is printed the more
GROWN_MB: Final = 4.0  # the history that it reads grows meanwhile, by as many manifests
QUESTIONS: Final = {
    "open": "show {domain}",
    "list": "list {domain}",
    "changed": "changed {domain} vda --since 5 --until 9",
    "changed-all": "changed {domain} vda --since 1 --until {last}",
    "backup": "backup {domain}",
}
UNBOUND: Final = "changed-all"  # it reads a hundred times as many deltas


@dataclass(frozen=True)
class History:
    """A repository with so many generations of the guest, of which the last is a full backup."""

    repository: str
    count: int

    @property
    def label(self) -> str:
        return f"after {self.count}"


def thousand(world: World, effort: Effort) -> List[Row]:
    """CPU seconds of each process with its children, and the peak of its memory."""
    guest = world.guest("old", {"vda": (SIZE, 0)})
    histories = [_history(world, guest, count) for count in (100 if world.quick else 1000, FEW)]
    rows = []
    for name in QUESTIONS:
        sides = {one.label: partial(_ran, world, _asked(world, guest, one, name)) for one in histories}
        what = f"CPU seconds of {QUESTIONS[name].split()[0]} {' and '.join(sides)} generations"
        target = None if name == UNBOUND else TIMES
        rows.append(measuring.ratio(f"thousand-{name}", what, "", measuring.alternate(effort.rounds, sides), target))
    return [*rows, _memory(world, guest, histories)]


def _history(world: World, guest: Guest, count: int) -> History:
    path = world.new(f"history-{count}")
    uuid = names.domain_uuid(guest.domain.UUIDString())
    with mock.patch("os.fsync"):  # a thousand synthetic ones may be lost
        query.build(path, capacity=SIZE, generations=count - 2, share=SHARE, uuid=uuid, name=guest.name)
    world.ours(path, "backup", guest.name)
    return History(path, count)


def _asked(world: World, guest: Guest, history: History, name: str) -> List[str]:
    # The last generation that is synthetic: the guest itself began another lineage.
    words = QUESTIONS[name].format(domain=guest.name, last=history.count - 1).split()
    return world.argv(history.repository, *words)


def _ran(world: World, argv: List[str], into: List[Sample]) -> None:
    found: List[Sample] = []
    with measuring.timed(found):
        run(*argv, env=world.environment)
    into.append(Sample(found[0].cpu, found[0].cpu))


def _memory(world: World, guest: Guest, histories: List[History]) -> Row:
    """The most that the largest process of a command needs more."""
    peaks: Dict[str, List[float]] = {}
    for name in QUESTIONS:
        found = (measuring.peaks(_asked(world, guest, one, name), world.environment) for one in histories)
        peaks[name] = [max(each.values()) / MB for each in found]
    more = [most - least for most, least in peaks.values()]
    return measuring.plain("thousand-memory", f"more memory than after {FEW} generations", "MB", more, MORE_MB, **peaks)


def lasting(world: World, effort: Effort) -> List[Row]:
    """One process that makes generations on and on: what each leaves there, and how much its memory grows."""
    guest, repository = world.guest("old", {"vda": (SIZE, 0)}), world.init("lasting")
    rounds = 10 if effort.quick else 100
    left: List[float] = []
    sizes: List[float] = []
    with mock.patch.dict(os.environ, world.host.environment()):
        for number in range(rounds):
            with libvirt_cbt.Session(world.host.uri, repository) as session:
                libvirt_cbt.mark(session, guest.name, scratch_dir=world.host.scratch)
                libvirt_cbt.backup(session, guest.name, scratch_dir=world.host.scratch, quiesce="none")
            sizes.append(_resident() / MB)
            if number >= rounds // 2:  # what is imported and opened once is there by then
                left.append(float(_settled(world)))
    what = f"things more (descriptors, children, mounts, sockets, files) after {2 * rounds} generations than after {rounds}"
    grown = f"memory of a process after {2 * rounds} generations, more than after {rounds}"
    return [
        measuring.plain("thousand-left", what, "", [left[-1] - left[0]], 0.0),
        measuring.plain("thousand-growth", grown, "MB", [sizes[-1] - sizes[rounds // 2]], GROWN_MB, sizes=sizes[::10]),
    ]


def _settled(world: World) -> int:
    """The least of a few looks: libvirt's thread closes a connection after it was let go, and a guard takes its leave."""
    found = _held(world)
    for _ in range(20):
        time.sleep(0.02)
        found = min(found, _held(world))
    return found


def _held(world: World) -> int:
    folders = ["/proc/self/fd", world.host.run_dir, world.host.scratch]
    lists = ["/proc/self/mountinfo", f"/proc/self/task/{os.getpid()}/children"]
    count = sum(len(os.listdir(folder)) for folder in folders)
    for name in lists:
        with open(name, encoding="ascii") as listed:
            count += len(listed.read().split("\n" if name.endswith("info") else None))
    return count


def _resident() -> int:
    """Bytes."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
