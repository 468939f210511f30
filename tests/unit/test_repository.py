"""The repository as a user can ill-treat it."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Callable, List

import pytest

from libvirt_cbt import errors, extents, names, points
from libvirt_cbt.repository import manifest, npy, staging, store
from tests.unit import repository_samples as samples

Repository = store.Repository


@pytest.fixture
def kept(tmp_path: Path) -> store.DomainStore:
    one = Repository.init(str(tmp_path / "repo")).domain(samples.UUID)
    with one.lock():
        return one


def again(kept: store.DomainStore) -> store.DomainStore:
    return Repository.open(kept.repository.path).domain(kept.uuid)


def test_init_and_open(tmp_path: Path) -> None:
    path = str(tmp_path / "repo")
    assert Repository.init(path).id == Repository.open(path).id
    with pytest.raises(errors.RepositoryError, match="already"):
        Repository.init(path)


def test_init_in_a_foreign_directory_or_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "photo.jpg").touch()
    for foreign in (tmp_path / "d", tmp_path / "d" / "photo.jpg"):
        with pytest.raises(errors.RepositoryForeign):
            Repository.init(str(foreign))
    assert os.listdir(tmp_path / "d") == ["photo.jpg"]


def test_open_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(errors.NoRepository):
        Repository.open(str(tmp_path / "mistyped"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.NoRepository):
        Repository.open(str(tmp_path / "empty"))
    (tmp_path / "file").touch()
    with pytest.raises((errors.NoRepository, errors.RepositoryForeign)):
        Repository.open(str(tmp_path / "file"))


def test_a_mistyped_path_is_not_told_to_chmod(tmp_path: Path) -> None:
    """`-r /tmp` must not lead anybody to `chmod 700 /tmp`."""
    (tmp_path / "photo.jpg").touch()
    tmp_path.chmod(0o777)
    with pytest.raises(errors.RepositoryForeign):
        Repository.open(str(tmp_path))


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o702])
def test_a_repository_that_others_can_write(kept: store.DomainStore, mode: int) -> None:
    os.chmod(kept.repository.path, mode)
    with pytest.raises(errors.RepositoryDenied, match="chmod 700"):
        Repository.open(kept.repository.path)


def as_nobody(action: Callable[[], object]) -> str:
    """The name of the error an action raises in a child that is not root."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            action()
            answer = "nothing"
        except BaseException as e:  # noqa: BLE001 -- the child must not go on as a second pytest
            answer = type(e).__name__
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return answer


def test_a_directory_that_is_not_writable(tmp_path: Path) -> None:
    for at in (tmp_path, *tmp_path.parents):
        if at.stat().st_uid == os.geteuid() and at != Path("/"):
            at.chmod(at.stat().st_mode | 0o055)
    tmp_path.chmod(0o555)
    assert as_nobody(lambda: Repository.init(str(tmp_path / "repo"))) == "RepositoryDenied"
    tmp_path.chmod(0o755)
    if os.geteuid() == 0:
        Repository.init(str(tmp_path / "repo"))
        assert as_nobody(lambda: Repository.open(str(tmp_path / "repo"))) == "RepositoryDenied"


@pytest.mark.fault(49)
def test_another_format(kept: store.DomainStore) -> None:
    path = os.path.join(kept.repository.path, "repository.json")
    os.unlink(path)
    Path(path).write_bytes(manifest.RepositoryFile(format=2, id=kept.repository.id).dump())
    with pytest.raises(errors.RepositoryVersion, match="format 2"):
        Repository.open(kept.repository.path)


def sealed(kept: store.DomainStore, which: str) -> tuple[str, Callable[[], object]]:
    """A sealed file's path and what reads it."""
    if which == "repository.json":
        path = os.path.join(kept.repository.path, which)
        return path, lambda: Repository.open(kept.repository.path)
    if which == "intent.json":
        with staging.begun(kept, samples.intent(kept)) as stage:
            stage.keep = True
        path = os.path.join(stage.path, which)
        return path, lambda: manifest.Intent.load(path)
    made = samples.publish(kept)
    path = os.path.join(kept.directory(made.id), which)
    if which == "layers.json":
        return path, lambda: again(kept).layers(made.id)
    return path, lambda: again(kept).require(made.id)


@pytest.mark.parametrize("which", ["repository.json", "intent.json", "manifest.json", "layers.json"])
def test_every_flipped_byte_and_every_cut_is_noticed(kept: store.DomainStore, which: str) -> None:
    path, reads = sealed(kept, which)
    reads()
    good = Path(path).read_bytes()
    rnd = random.Random(1)
    for at in range(len(good)):
        # A flipped case or white space too: what means the same is noticed all the same.
        flips = {1 << rnd.randrange(8), 0x20, good[at] ^ 0x20}
        for flip in flips - {0}:
            Path(path).write_bytes(good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])
            with pytest.raises(errors.Damaged) as caught:
                reads()
            assert which in str(caught.value)
    for length in {0, 1, len(good) // 2, len(good) - 1}:
        Path(path).write_bytes(good[:length])
        with pytest.raises(errors.Damaged):
            reads()


@pytest.mark.parametrize("data", [b"[" * 1000000, b"[]", b"null", b"1" * 5000, b"\xff", b'{"format": NaN}', b'"x"'])
def test_hostile_json(kept: store.DomainStore, data: bytes) -> None:
    path, reads = sealed(kept, "manifest.json")
    Path(path).write_bytes(data)
    with pytest.raises(errors.Damaged):
        reads()


def test_a_manifest_of_other_names_with_a_right_seal(kept: store.DomainStore) -> None:
    made = samples.publish(kept)
    path = Path(kept.directory(made.id), "layers.json")
    entry = kept.layers(made.id).disks["vda"]
    for bad in ({"file": "../../x.qcow2"}, {"file": "vdb.qcow2"}, {"contents": "manifest.json"}):
        # model_copy does not validate: what a hostile writer would do.
        hostile = manifest.Layers(backup=made.id, disks={}).model_copy(
            update={"disks": {"vda": entry.model_copy(update=bad)}}
        )
        path.write_bytes(hostile.dump())
        with pytest.raises(errors.Damaged):
            again(kept).layers(made.id)


def test_a_manifest_of_another_place(kept: store.DomainStore, tmp_path: Path) -> None:
    first, second = samples.publish(kept), samples.publish(kept)
    a, b = (Path(kept.directory(m.id), "manifest.json") for m in (first, second))
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    with pytest.raises(errors.Damaged, match="another backup"):
        again(kept).require(first.id)
    a.write_bytes(one)
    (tmp_path / "other").mkdir()
    other = Repository.init(str(tmp_path / "other")).domain(kept.uuid)
    with other.lock():
        pass
    os.rename(kept.directory(first.id), other.directory(first.id))
    with pytest.raises(errors.Damaged, match="repository"):
        other.require(first.id)


@pytest.mark.parametrize("which", ["manifest.json", "layers.json", "vda.contents.npy", "vda.qcow2", ""])
def test_links_in_place_of_files(kept: store.DomainStore, tmp_path: Path, which: str) -> None:
    made = samples.publish(kept)
    path = os.path.join(kept.directory(made.id), which).rstrip("/")
    os.rename(path, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", path)

    def use() -> None:
        fresh = again(kept)
        fresh.require(made.id)
        link = fresh.chain(made.id, "vda")[0]
        npy.Reader(link.contents, extents.CONTENT, link.digest)

    with pytest.raises((errors.Damaged, errors.RepositoryError)):
        use()


@pytest.mark.parametrize("which", ["", "backups"])
def test_links_in_place_of_directories(kept: store.DomainStore, tmp_path: Path, which: str) -> None:
    samples.publish(kept)
    path = os.path.join(kept.path, which).rstrip("/")
    os.rename(path, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", path)
    with pytest.raises(errors.Damaged):
        again(kept).generations()


def test_modes_of_all_that_is_written(kept: store.DomainStore) -> None:
    old = os.umask(0)
    try:
        samples.publish(kept)
    finally:
        os.umask(old)
    for at, dirs, files in os.walk(kept.repository.path):
        for name in dirs + files:
            assert not os.lstat(os.path.join(at, name)).st_mode & 0o077, name


def test_published_directories_hold_no_intent(kept: store.DomainStore) -> None:
    made = samples.publish(kept)
    found = sorted(os.listdir(kept.directory(made.id)))
    assert found == ["layers.json", "manifest.json", "vda.contents.npy", "vda.delta.npy", "vda.qcow2"]
    assert kept.leftovers() == []


def test_a_failed_run_leaves_nothing_unless_it_must(kept: store.DomainStore) -> None:
    with pytest.raises(ZeroDivisionError), staging.begun(kept, samples.intent(kept)):
        raise ZeroDivisionError
    assert kept.leftovers() == []
    wanted = samples.intent(kept)

    def dies() -> None:
        with staging.begun(kept, wanted) as stage:
            stage.advance("freezing")
            stage.keep = True
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        dies()
    (left,) = kept.leftovers()
    assert left.intent == wanted.model_copy(update={"phase": "freezing"})
    Path(left.path, "intent.json").write_bytes(b"{}")
    (left,) = kept.leftovers()
    assert left.intent is None
    kept.discard(left)
    assert kept.leftovers() == []


def test_find_by_uuid_and_name(kept: store.DomainStore) -> None:
    repository = kept.repository
    with pytest.raises(errors.NotInRepository):
        repository.find("vm")
    samples.publish(kept, name="old")
    samples.publish(kept, name="vm")
    assert repository.find("vm").uuid == kept.uuid
    assert repository.find(kept.uuid.upper()).uuid == kept.uuid
    for unknown in ("old", "..", "", names.new_lineage()):
        with pytest.raises(errors.NotInRepository):
            repository.find(unknown)
    second = repository.domain(names.domain_uuid(names.new_lineage()))
    with second.lock():
        samples.publish(second, name="vm")
    with pytest.raises(errors.Usage, match="UUID"):
        repository.find("vm")


def test_find_is_not_stopped_by_another_domains_damage(kept: store.DomainStore) -> None:
    samples.publish(kept)
    second = kept.repository.domain(names.domain_uuid(names.new_lineage()))
    with second.lock():
        made = samples.publish(second, name="other")
    Path(second.directory(made.id), "manifest.json").write_bytes(b"")
    assert kept.repository.find("vm").uuid == kept.uuid
    with pytest.raises(errors.Damaged):
        kept.repository.find("other")


def test_resolve(kept: store.DomainStore) -> None:
    with pytest.raises(errors.NoSuchBackup):
        kept.resolve(points.Latest())
    made = [samples.publish(kept) for _ in range(3)]
    assert kept.resolve(points.Latest()).id == made[2].id
    assert kept.resolve(points.Generation(2)).id == made[1].id
    assert kept.resolve(points.Id(made[0].id)).id == made[0].id
    change = points.until(made[1].disks[0].change_id)
    assert kept.resolve(change).id == made[1].id
    for unknown in (points.Generation(9), points.Id("zzzz")):
        with pytest.raises(errors.NoSuchBackup):
            kept.resolve(unknown)


def test_resolve_of_an_ambiguous_prefix(kept: store.DomainStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = iter(["abcd000000000000", "abcd000000000001"])
    monkeypatch.setattr(names, "new_backup_id", lambda: next(ids))
    samples.publish(kept)
    samples.publish(kept)
    with pytest.raises(errors.Usage, match=r"abcd000000000000, abcd000000000001.*more digits"):
        kept.resolve(points.Id("abcd"))


@pytest.mark.parametrize("what", ["tag", "lineage", "future"])
def test_change_ids_of_another_history(kept: store.DomainStore, what: str) -> None:
    made = samples.publish(kept)
    lineage = names.new_lineage() if what == "lineage" else samples.LINEAGE
    tag = "00000000" if what == "tag" else made.id[:8]
    with pytest.raises(errors.ChangeIdBroken) as caught:
        kept.resolve(points.ChangeId(lineage, 2 if what == "future" else 1, tag))
    assert isinstance(caught.value, errors.TrackingBroken)
    assert caught.value.code == 12


def test_chain(kept: store.DomainStore) -> None:
    made = [samples.publish(kept) for _ in range(3)]
    chain = kept.chain(made[2].id, "vda")
    assert [link.backup for link in chain] == [m.id for m in reversed(made)]
    assert all(os.path.isfile(link.layer) and os.path.isfile(link.contents) for link in chain)
    os.unlink(os.path.join(kept.directory(made[0].id), "layers.json"))
    with pytest.raises(errors.Damaged, match=made[0].id):
        kept.chain(made[2].id, "vda")
    assert kept.generations()


def test_chain_in_a_circle(kept: store.DomainStore) -> None:
    made = [samples.publish(kept) for _ in range(2)]
    path = Path(kept.directory(made[0].id), "layers.json")
    entry = kept.layers(made[0].id).disks["vda"].model_copy(update={"parent": made[1].id})
    path.write_bytes(manifest.Layers(backup=made[0].id, disks={"vda": entry}).dump())
    with pytest.raises(errors.Damaged, match="circle"):
        kept.chain(made[1].id, "vda")


def test_deltas(kept: store.DomainStore) -> None:
    grain = extents.GRAIN
    samples.publish(kept, rows=[(0, 4 * grain, extents.DATA)])
    samples.publish(kept, rows=[(0, grain, extents.DATA), (2 * grain, grain, extents.DATA)])
    samples.publish(kept, rows=[(grain, 2 * grain, extents.ZERO)])
    with kept.deltas("vda", 1, 3, lineage=samples.LINEAGE) as deltas:
        want = [(0, grain, extents.DATA), (grain, 2 * grain, extents.ZERO)]
        assert deltas.union(0, 4 * grain).tolist() == want
        assert deltas.union(grain, 2 * grain).tolist() == [(grain, grain, extents.ZERO)]
    with kept.deltas("vda", 3, 3) as deltas:
        assert len(deltas.union(0, 4 * grain)) == 0


@pytest.mark.parametrize("how", ["gone", "lineage", "disk"])
def test_deltas_across_a_break(kept: store.DomainStore, how: str) -> None:
    made: List[manifest.Manifest] = [samples.publish(kept)]
    made.append(samples.publish(kept, lineage=names.new_lineage() if how == "lineage" else samples.LINEAGE))
    made.append(samples.publish(kept))
    if how == "gone":
        os.rename(kept.directory(made[1].id), os.path.join(kept.repository.path, "away"))
    target = "vdb" if how == "disk" else "vda"
    with pytest.raises(errors.LineageBroken) as caught, again(kept).deltas(target, 1, 3, lineage=samples.LINEAGE):
        pass
    assert caught.value.code == 12


def test_deltas_notice_damage(kept: store.DomainStore) -> None:
    made = samples.publish(kept)
    path = Path(kept.directory(made.id), "vda.delta.npy")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.Damaged, match=r"vda\.delta\.npy"), kept.deltas("vda", 0, 1):
        pass


def test_a_thousand_manifests_are_listed_for_a_second_of_work(kept: store.DomainStore) -> None:
    made = samples.publish(kept)
    for number in range(2, 1001):
        identity = names.new_backup_id()
        os.mkdir(kept.directory(identity))
        copy = made.model_copy(update={"id": identity, "generation": number})
        Path(kept.directory(identity), "manifest.json").write_bytes(copy.dump())
    begun = time.process_time()  # a busy machine takes longer
    assert [m.generation for m in again(kept).generations()] == list(range(1, 1001))
    seconds = time.process_time() - begun
    print(f"1000 manifests: {seconds:.3f} s")
    assert seconds < 4  # of a machine that is four times as slow
