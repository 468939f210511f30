"""A damaged manifest is named, and stands in the way of nothing that does not need it."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Iterator, List, Set

import pytest

from libvirt_cbt import cli, durable, errors, extents, names, points
from libvirt_cbt.repository import changes, manifest, store
from tests.unit import repository_samples as samples


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[store.DomainStore]:
    (tmp_path / "repo").mkdir()
    found = store.Repository.init(str(tmp_path / "repo")).domain(samples.UUID)
    with found.lock():
        yield found


def damaged(kept: store.DomainStore, *made: manifest.Manifest) -> store.DomainStore:
    """The domain as it is seen with the manifests of these generations damaged."""
    for one in made:
        path = Path(kept.directory(one.id), "manifest.json")
        path.write_bytes(path.read_bytes()[:-9])
    return kept.repository.domain(kept.uuid)


def published(kept: store.DomainStore, marks: str) -> List[manifest.Manifest]:
    """A generation for each letter: f a full backup, i an increment, m a mark (of the sample's kind, without layers)."""
    made: List[manifest.Manifest] = []
    parent = None
    for letter in marks:
        if letter == "f":
            parent = None
        made.append(samples.publish(kept, parent=parent))
        if letter == "m":
            path = Path(kept.directory(made[-1].id), "layers.json")
            path.write_bytes(manifest.Layers(backup=made[-1].id, disks={}, removed=["vda"]).dump())
            manifest_path = Path(kept.directory(made[-1].id), "manifest.json")
            disk = made[-1].disks[0].model_copy(update={"mode": "mark", "parent": None})
            manifest_path.write_bytes(made[-1].model_copy(update={"kind": "mark", "disks": [disk]}).dump())
        else:
            parent = made[-1].id
        kept.refresh()
    return made


@pytest.mark.fault(41)
@pytest.mark.parametrize("marks", ["fii", "fmi", "fim", "fff"])
def test_others_are_found_as_before(kept: store.DomainStore, marks: str) -> None:
    made = published(kept, marks)
    for hurt in made:
        path = Path(kept.directory(hurt.id), "manifest.json")
        good = path.read_bytes()
        seen = damaged(kept, hurt)
        others = [m.id for m in made if m is not hurt]
        assert [m.id for m in seen.generations()] == others
        assert [(one.id, one.path) for one in seen.unread()] == [(hurt.id, str(path))]
        for one in made:
            if one is not hurt:
                assert seen.resolve(points.Generation(one.generation)).id == one.id
                assert seen.resolve(points.Id(one.id)).id == one.id
        for point in (points.Generation(hurt.generation), points.Id(hurt.id[:6])):
            with pytest.raises(errors.Damaged, match=hurt.id):
                seen.resolve(point)
        path.write_bytes(good)


@pytest.mark.fault(41)
@pytest.mark.parametrize(
    ("marks", "hurt", "newest"),
    [
        ("fii", {1}, True),  # its child names it
        ("fii", {2}, True),
        ("fii", {3}, False),
        ("fmm", {2}, True),  # its number is missing
        ("fmm", {3}, False),
        ("ffff", {1}, False),  # nothing lies on it, and a first generation may have been forgotten
        ("fiimmi", {2, 4}, True),
        ("fiimmi", {1, 4}, True),  # the first is no number that is missing between the others
        ("fiimmi", {4, 6}, False),
        ("fii", {1, 2}, True),  # known by its child's layers alone
        ("fii", {2, 3}, False),
        ("fii", {1, 2, 3}, False),
    ],
)
def test_which_is_the_newest_is_said_only_when_it_is_known(
    kept: store.DomainStore, marks: str, hurt: Set[int], newest: bool
) -> None:
    made = published(kept, marks)
    seen = damaged(kept, *(m for m in made if m.generation in hurt))
    if newest:
        assert seen.unplaced() == []
        assert seen.resolve(points.Latest()).generation == max({m.generation for m in made} - hurt)
        assert seen.next_generation() == len(made) + 1
    else:
        assert seen.unplaced()
        with pytest.raises(errors.Damaged, match=r"manifest\.json"):
            seen.resolve(points.Latest())


@pytest.mark.fault(41)
def test_no_number_is_used_twice(kept: store.DomainStore, rng: random.Random) -> None:
    """Whatever is damaged and whatever is made then: should a manifest be put back, each number is there once."""
    for _ in range(40):
        home = kept.repository.domain(names.domain_uuid(names.new_lineage()))
        with home.lock():
            good = {}
            for _ in range(rng.randint(2, 5)):
                made = published(home, "f" + "".join(rng.choice("fim") for _ in range(rng.randint(0, 3))))
                for one in made:
                    good[one.id] = Path(home.directory(one.id), "manifest.json").read_bytes()
                hurt = rng.choice(sorted(good))
                Path(home.directory(hurt), "manifest.json").write_bytes(b"{")
                home.refresh()
                # `publish` of the samples counts from what it sees: as a run does, by `next_generation`.
            for identity, data in good.items():
                Path(home.directory(identity), "manifest.json").write_bytes(data)
            numbers = [m.generation for m in home.repository.domain(home.uuid).generations()]
            assert len(set(numbers)) == len(numbers) == len(good)


@pytest.mark.fault(41)
def test_changes_across_a_damaged_one_are_refused_with_its_name(kept: store.DomainStore) -> None:
    made = published(kept, "fiiii")
    seen = damaged(kept, made[2])
    path = os.path.join(kept.directory(made[2].id), "manifest.json")
    for since, until in ((1, 2), (4, 5)):
        span = changes.span(seen, "vda", points.Generation(since), points.Generation(until))
        assert (span.since and span.since.generation, span.until.generation) == (since, until)
    for since, until in ((1, 4), (2, 5)):
        with pytest.raises(errors.LineageBroken, match=path):
            changes.span(seen, "vda", points.Generation(since), points.Generation(until))
    with pytest.raises(errors.Damaged, match=path):
        changes.span(seen, "vda", points.Generation(3), points.Generation(5))
    # Everything at the newest is known from contents and from the deltas since.
    span = changes.span(seen, "vda", points.Beginning(), points.Generation(5))
    assert [s.generation for s in span.sources][-2:] == [4, 5]


@pytest.mark.fault(41)
def test_a_disk_that_only_a_damaged_one_may_have(kept: store.DomainStore) -> None:
    made = published(kept, "ff")
    seen, newest = damaged(kept, made[1]), points.until(made[1].id)
    for since in (points.Beginning(), points.Generation(1)):
        with pytest.raises(errors.Damaged, match=made[1].id):
            changes.span(seen, "vdx", since, newest)
        with pytest.raises(errors.NoSuchDisk):
            changes.span(seen, "vdx", since, points.Generation(1))


@pytest.mark.fault(41)
def test_everything_up_to_a_mark_past_a_damaged_one_is_refused_with_its_name(kept: store.DomainStore) -> None:
    made = published(kept, "fmm")
    path = os.path.join(kept.directory(made[1].id), "manifest.json")
    with pytest.raises(errors.BeginningUnknown, match=f"generation 2 cannot be read, as {path} is damaged"):
        changes.span(damaged(kept, made[1]), "vda", points.Beginning(), points.Generation(3))


@pytest.mark.fault(41)
@pytest.mark.parametrize("words", [
    ["show"], ["changed", "vda", "--since", "*"], ["changed", "vda", "--since", "1"], ["heatmap", "vda"],
], ids=str)  # fmt: skip
def test_whoever_needs_what_is_all_damaged_is_told_so(kept: store.DomainStore, words: List[str]) -> None:
    damaged(kept, *published(kept, "f"))
    assert cli.exit_code(["-r", kept.repository.path, words[0], samples.UUID, *words[1:]]) == 16


@pytest.mark.fault(42)
def test_a_directory_of_another_name_is_named_and_stops_nobody(kept: store.DomainStore) -> None:
    made = published(kept, "fff")
    os.rename(kept.directory(made[1].id), kept.directory("old copy"))
    Path(kept.path, "backups", ".stray").write_bytes(b"")
    seen = kept.repository.domain(kept.uuid)
    assert [m.id for m in seen.generations()] == [made[0].id, made[2].id]
    assert [(one.id, one.path) for one in seen.unread()] == [(None, kept.directory("old copy"))]
    assert seen.next_generation() == 4
    os.rename(kept.directory("old copy"), kept.directory("00" * 8))
    seen.refresh()
    assert [(one.id, "another backup" in one.reason) for one in seen.unread()] == [("00" * 8, True)]


def test_what_the_medium_does_not_give_back_is_damage(kept: store.DomainStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made = published(kept, "ff")
    bad = os.path.join(kept.directory(made[0].id), "manifest.json")
    read = durable.read

    def failing(path: str, limit: int) -> bytes:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return read(path, limit)

    monkeypatch.setattr(durable, "read", failing)
    seen = kept.repository.domain(kept.uuid)
    assert [m.id for m in seen.generations()] == [made[1].id]
    assert [one.path for one in seen.unread()] == [bad]


def test_deltas_past_a_damaged_one(kept: store.DomainStore) -> None:
    made = published(kept, "fii")
    seen = damaged(kept, made[1])
    with pytest.raises(errors.LineageBroken), seen.deltas("vda", 1, 3, lineage=samples.LINEAGE):
        pass
    with seen.deltas("vda", 2, 3, lineage=samples.LINEAGE) as found:
        assert extents.total(found.union(0, samples.SIZE)) > 0


def test_what_is_published_is_read_once(kept: store.DomainStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long history costs a run one reading: not one for the lock, nor one more for its own generation."""
    published(kept, "fii")
    read: List[str] = []
    before = durable.read

    def counted(path: str, limit: int) -> bytes:
        read.append(os.path.basename(path))
        return before(path, limit)

    monkeypatch.setattr(durable, "read", counted)
    again = kept.repository.domain(kept.uuid)
    with pytest.raises(errors.RepositoryBusy, match="'vm'"), again.lock():
        pass
    read.clear()
    made = samples.publish(kept, parent=kept.generations()[-1].id)
    assert kept.generations()[-1] == made
    assert [m.id for m in kept.generations()] == [m.id for m in kept.repository.domain(kept.uuid).generations()]
    assert read.count("manifest.json") == 3 + 1 + 4
