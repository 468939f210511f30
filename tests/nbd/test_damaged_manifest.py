"""A damaged manifest is named, and every backup that can be proved without it is restored as before."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path
from typing import Any, Iterator, List

import pytest

import libvirt_cbt
from libvirt_cbt import errors
from tests.nbd.conftest import MIB, assert_same
from tests.nbd.histories import History
from tests.unit import repository_samples as samples


@pytest.fixture
def history(folder: str, rng: random.Random) -> History:
    """Four backups on one another with a mark between the second and the third, and a chain of its own after them."""
    found = History(folder, MIB + 512)
    for number in range(6):
        found.write(rng)
        found.generation(mark=number == 2, full=number == 5)
    return found


class Told(libvirt_cbt.Watch):
    def __init__(self) -> None:
        self.sentences: List[str] = []

    def failed(self, sentence: str, /, **_: Any) -> None:
        self.sentences.append(sentence)


@contextlib.contextmanager
def damaged(history: History, number: int, how: str) -> Iterator[str]:
    path = Path(history.layer(list(history.models)[number - 1], name="manifest.json"))
    good = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(good[:100])
    yield str(path)
    path.write_bytes(good)
    path.chmod(0o600)


def restored(session: libvirt_cbt.Session, history: History, at: str, **options: Any) -> bytes:
    output = os.path.join(history.folder, "out")
    libvirt_cbt.restore(session, samples.UUID, output, at=at, **options)
    data = Path(output, "vda.raw").read_bytes()
    os.unlink(os.path.join(output, "vda.raw"))
    return data


@pytest.mark.fault(41)
@pytest.mark.parametrize("how", ["cut", "deleted"])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 6])
def test_every_other_backup_is_restored(history: History, number: int, how: str) -> None:
    ids = list(history.models)
    told = Told()
    with damaged(history, number, how) as path, libvirt_cbt.Session("test:///default", history.repository.path, told) as session:
        [listing] = libvirt_cbt.generations(session)
        assert [g.generation for g in listing.generations] == [n for n in range(1, 7) if n != number]
        assert [(one.id, one.path) for one in listing.unreadable] == [(ids[number - 1], path)]
        assert any(path in sentence for sentence in told.sentences)
        for other, identity in enumerate(ids, 1):
            if other in (number, 3):
                continue
            for salvage in (False, True):
                data = restored(session, history, identity, salvage=salvage)
                assert_same(data, history.models[identity]["vda"], f"generation {other}")
        for at in (str(number), ids[number - 1]):
            with pytest.raises(errors.Damaged, match=path):
                restored(session, history, at)
        if number == 6:  # an older one is not given out as the newest
            with pytest.raises(errors.Damaged, match=path):
                restored(session, history, "latest")
        else:
            assert_same(restored(session, history, "latest"), history.models[ids[-1]]["vda"], "latest")
        [found] = libvirt_cbt.verify(session, samples.UUID).damage
        assert (found.backup, path.rpartition("/")[2] in found.reason) == (ids[number - 1], True)
        above = {1: [1, 3, 4], 2: [3, 4], 3: [], 4: [4], 6: []}[number]
        assert found.dependents == [ids[n] for n in above]
    history.prove()


@pytest.mark.fault(41)
def test_its_layer_is_verified_all_the_same(history: History) -> None:
    """What lies on it needs its data."""
    second = list(history.models)[1]
    with damaged(history, 2, "cut"), history.session() as session:
        contents = Path(history.layer(second, name="vda.contents.npy"))
        good = contents.read_bytes()
        contents.write_bytes(good[:-1])
        reasons = [one.reason for one in libvirt_cbt.verify(session, samples.UUID).damage]
        assert len(reasons) == 2 and "manifest.json" in reasons[0] and "vda.contents.npy" in reasons[1]
        contents.write_bytes(good)


@pytest.mark.fault(41)
def test_no_prune_touches_it_nor_what_it_lies_on(history: History) -> None:
    ids = list(history.models)
    with damaged(history, 4, "cut") as path:
        before = history.files(ids[3])
        found = history.prune(remove=["1", "2", "5"], forget=True)
        # The first goes into the second; that one's child is damaged, and what lies on that one goes not into another.
        assert [one.generation for one in found.removed] == [1, 5]
        assert {(one.backup, one.kind) for one in found.skipped} == {(ids[1], "Damaged"), (ids[3], "Damaged")}
        assert all(path in one.reason for one in found.skipped)
        assert found.forgotten == []
        assert history.files(ids[3]) == before
        with pytest.raises(errors.Damaged, match=path):
            history.prune(remove=["2"])
        with pytest.raises(errors.Damaged, match=path):
            history.prune(remove=["4"])
    history.prune(remove=["2", "4"])
    history.prove()


@pytest.mark.fault(41)
def test_what_lies_on_what_must_be_known_to_prune(history: History) -> None:
    ids = list(history.models)
    layers = Path(history.layer(ids[3], name="layers.json"))
    good = layers.read_bytes()
    with damaged(history, 4, "cut"):
        layers.write_bytes(b"{}")
        with pytest.raises(errors.Damaged, match=r"layers\.json"):
            history.prune(remove=["1"])
        layers.write_bytes(good)
    os.rename(history.kept.directory(ids[3]), history.kept.directory("copy"))
    with pytest.raises(errors.Damaged, match="copy"):
        history.prune(remove=["1"])
    os.rename(history.kept.directory("copy"), history.kept.directory(ids[3]))
    history.prove()
