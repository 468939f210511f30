"""Any file of a repository damaged in any way: named with what depends on it, never restored as good, salvaged around."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
from pathlib import Path
from typing import Callable, Dict, Final, Iterator, List, Optional, Set, Tuple

import pytest

import libvirt_cbt
from libvirt_cbt import config, errors
from libvirt_cbt.actions import check, metrics, results
from libvirt_cbt.repository import doubts, outcomes
from tests.nbd.conftest import MIB, assert_same
from tests.nbd.histories import History
from tests.unit import repository_samples as samples

FILES: Final = ("manifest.json", "layers.json", "vda.delta.npy", "vda.contents.npy", "vda.qcow2")
WHOLE: Final = MIB + 512
SAMPLE: Final = 6


def flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def zeroed(data: bytes, rng: random.Random) -> bytes:
    """A page of it, as a disk gives it back that has lost a write."""
    at = rng.randrange(-(-len(data) // 4096)) * 4096
    return data[:at] + bytes(min(4096, len(data) - at)) + data[at + 4096 :]


HOW: Final[Dict[str, Optional[Callable[[bytes, random.Random], bytes]]]] = {
    "flip": flipped, "truncate": cut, "zero": zeroed, "delete": None, "swap": None,
}  # fmt: skip


@pytest.fixture
def history(folder: str, rng: random.Random) -> History:
    """Three backups on one another; every pair of files of one name differs."""
    found = History(folder, WHOLE)
    for _ in range(3):
        found.write(rng)
        found.disks["vda"].write(("write", rng.randrange(8) * 131072, 65536, rng.randrange(1, 255)))
        found.generation()
    return found


@contextlib.contextmanager
def damaged(history: History, number: int, name: str, how: str, rng: random.Random) -> Iterator[List[int]]:
    """Which generations (from 0) have a file that is not what it was."""
    path = Path(history.layer(list(history.models)[number], name=name))
    other = (number + 1) % 3
    neighbour = Path(history.layer(list(history.models)[other], name=name))
    good = {one: one.read_bytes() for one in (path, neighbour)}
    hurt = HOW[how]
    if hurt:
        path.write_bytes(hurt(good[path], rng))
    elif how == "delete":
        path.unlink()
    else:
        path.write_bytes(good[neighbour])
        neighbour.write_bytes(good[path])
    changed = [n for n, one in ((number, path), (other, neighbour)) if not one.exists() or one.read_bytes() != good[one]]
    yield changed
    for one, data in good.items():
        one.parent.mkdir(exist_ok=True)
        one.write_bytes(data)
        one.chmod(0o600)


def must_be_seen(name: str, how: str) -> bool:
    """In an image many bytes mean nothing, and some only to other programs; all the rest is under a digest."""
    return name != "vda.qcow2" or how == "delete"


class Judge:
    """What each command says of a damaged repository, against the models."""

    def __init__(self, history: History) -> None:
        self.history, self.ids = history, list(history.models)

    def around(self, changed: List[int], name: str, how: str) -> str:
        with self.history.session() as session:
            named = self._named(session)
            refused = {identity for identity in self.ids if not self.restored(session, identity)}
            assert refused <= named, "a restore is refused and verify has not said why"
            if changed and must_be_seen(name, how):
                assert {self.ids[number] for number in changed} <= named
            for identity in self.ids:
                self._salvaged(session, identity, refused, name)
            self._others(session)
        return f"{len(named)} named, {len(refused)} refused"

    def _named(self, session: libvirt_cbt.Session) -> Set[str]:
        """All that verify says is damaged, or depends on what is."""
        damage = libvirt_cbt.verify(session, samples.UUID).damage
        named = {one.backup for one in damage}
        for one in damage:
            above = self.ids[self.ids.index(one.backup) + 1 :] if one.backup in self.ids else []
            assert sorted(one.dependents) == sorted(above), "each lies on the one before it"
        return named | {backup for one in damage for backup in one.dependents}

    def restored(self, session: libvirt_cbt.Session, identity: str) -> bool:
        output = os.path.join(self.history.folder, "out")
        try:
            libvirt_cbt.restore(session, samples.UUID, output, at=identity)
        except errors.Damaged:
            assert os.listdir(output) == [] if os.path.isdir(output) else True
            return False
        self._same(output, identity, [])
        return True

    def _salvaged(self, session: libvirt_cbt.Session, identity: str, refused: Set[str], name: str) -> None:
        output = os.path.join(self.history.folder, "salvaged")
        try:
            found = libvirt_cbt.restore(session, samples.UUID, output, at=identity, salvage=True)
        except errors.Damaged:
            assert name == "manifest.json", "only without its manifest nobody knows what a backup was"
            assert identity in refused
            return
        assert bool(found.damage) <= (identity in refused)
        self._same(output, identity, found.damage)

    def _same(self, output: str, identity: str, lost: List[results.Lost]) -> None:
        path = os.path.join(output, "vda.raw")
        wanted = bytearray(self.history.models[identity]["vda"])
        for one in lost:
            wanted[one.offset : one.offset + one.length] = bytes(one.length)
        assert_same(Path(path).read_bytes(), bytes(wanted), identity)
        os.unlink(path)

    def _others(self, session: libvirt_cbt.Session) -> None:
        """They answer or say what is wrong."""
        verbs: List[Callable[[], object]] = [
            lambda: libvirt_cbt.generations(session),
            lambda: list(libvirt_cbt.changed(session, samples.UUID, "vda", since=1)),
            lambda: list(libvirt_cbt.changed(session, samples.UUID, "vda", since=1, until=3, exact=True)),
            lambda: list(libvirt_cbt.changed(session, samples.UUID, "vda", since="*")),
            lambda: libvirt_cbt.heatmap(session, samples.UUID, "vda"),
            lambda: libvirt_cbt.report(session),
            lambda: self.history.prune(keep_last=2, dry_run=True),
        ]
        for verb in verbs:
            with contextlib.suppress(errors.CbtError):
                verb()


def cases() -> List[Tuple[int, str, str]]:
    return list(itertools.product(range(3), FILES, HOW))


@pytest.mark.fault(41)
def test_damage_of_some_kinds(history: History, rng: random.Random) -> None:
    sweep(history, rng, rng.sample(cases(), SAMPLE))


@pytest.mark.slow
@pytest.mark.fault(41)
def test_damage_of_every_kind(history: History, rng: random.Random) -> None:
    sweep(history, rng, cases())


@pytest.mark.fault(41)
def test_a_prune_over_damage_of_some_kinds(history: History, rng: random.Random) -> None:
    prunes(history, rng, rng.sample(cases(), SAMPLE))


@pytest.mark.slow
@pytest.mark.fault(41)
def test_a_prune_over_damage_of_every_kind(history: History, rng: random.Random) -> None:
    prunes(history, rng, cases())


@pytest.mark.fault(41)
@pytest.mark.parametrize("name", ["verified.json", "checked.json", "outcomes.json", "doubts.json", "prune.json", "reserve", "lock"])
def test_notes_are_needed_by_nobody(history: History, rng: random.Random, name: str) -> None:
    with history.session() as session:
        libvirt_cbt.verify(session, samples.UUID)
        outcomes.failed(history.kept, "prune", errors.Damaged(path="x", reason="y"))
        doubts.crashed(history.kept, "2026-01-01T00:00:00Z")
        path = Path(history.kept.path, name)
        good = path.read_bytes() if path.exists() else b"{}"
        for data in (flipped(good, rng), cut(good, rng), bytes(len(good)), b""):
            path.write_bytes(data)
            judge = Judge(history)
            assert all(judge.restored(session, identity) for identity in judge.ids)
            assert len(libvirt_cbt.generations(session)[0].generations) == 3
            libvirt_cbt.report(session)
            assert check.check(session, config.load([])).domains
            metrics.metrics(session)
            assert libvirt_cbt.verify(session, samples.UUID).damage == []
    history.prune(remove=["2"])
    for note in ("doubts.json", "outcomes.json"):
        Path(history.kept.path, note).unlink()
    history.prove()


@pytest.mark.fault(41)
def test_without_its_own_file_it_is_no_repository(history: History, rng: random.Random) -> None:
    path = Path(history.repository.path, "repository.json")
    good = path.read_bytes()
    for data in (flipped(good, rng), cut(good, rng), bytes(len(good)), b""):
        path.write_bytes(data)
        for verb in (libvirt_cbt.generations, libvirt_cbt.report):
            with history.session() as session, pytest.raises(errors.Damaged, match=r"repository\.json"):
                verb(session)
    path.write_bytes(good)
    history.prove()


def prunes(history: History, rng: random.Random, chosen: List[Tuple[int, str, str]]) -> None:
    """It refuses, or does what is right: what was restored before and was not to go is restored after, to the same."""
    held, copy = history.kept.path, os.path.join(history.folder, "copy")
    shutil.copytree(held, copy)
    for number, name, how in chosen:
        gone = str(rng.choice((1, 2)))
        print(number + 1, name, how, "remove", gone, flush=True)
        with damaged(history, number, name, how, rng):
            judge = Judge(history)
            with history.session() as session:
                sound = {identity for identity in judge.ids if judge.restored(session, identity)}
                try:
                    print(history.prune(remove=[gone]).removed, flush=True)
                except errors.CbtError as e:
                    print(e.kind, flush=True)
                left = {m.id for m in history.backups()} & sound
                assert left >= sound - {judge.ids[int(gone) - 1]}
                assert all(judge.restored(session, identity) for identity in left)
        shutil.rmtree(held)
        shutil.copytree(copy, held)
    history.prove()


@pytest.mark.slow
@pytest.mark.fault(41)
@pytest.mark.parametrize("name", FILES)
def test_every_thousandth_byte(history: History, rng: random.Random, name: str) -> None:
    path = Path(history.layer(list(history.models)[1], name=name))
    good = path.read_bytes()
    for at in range(rng.randrange(min(1000, len(good))), len(good), max(1000, len(good) // 60)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :])
        print(at, Judge(history).around([1], name, "flip"), flush=True)
    path.write_bytes(good)
    history.prove()


def sweep(history: History, rng: random.Random, chosen: List[Tuple[int, str, str]]) -> None:
    for number, name, how in chosen:
        with damaged(history, number, name, how, rng) as changed:
            print(number + 1, name, how, flush=True)
            print(Judge(history).around(changed, name, how), flush=True)
    history.prove()
