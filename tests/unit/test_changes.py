"""The delta query against a model that knows every sector: nothing missed, nothing beyond the deltas."""

from __future__ import annotations

import os
import random
import resource
from pathlib import Path
from typing import Any, Callable, List, Optional, Tuple, Union

import numpy as np
import pytest

import libvirt_cbt
from libvirt_cbt import errors, extents
from libvirt_cbt.actions import exact
from libvirt_cbt.repository import npy, plan, store, union
from tests.unit import changes_samples as samples
from tests.unit import repository_samples

GRAIN = 65536
Rows = List[Tuple[int, int, int, int]]
Asked = Callable[..., Any]


@pytest.fixture
def kept(tmp_path: Path) -> store.DomainStore:
    one = store.Repository.init(str(tmp_path / "repo")).domain(repository_samples.UUID)
    with one.lock():
        return one


@pytest.fixture
def asked(kept: store.DomainStore) -> Asked:
    """Asks a fresh session: ``asked(since=1)``."""

    def ask(since: Union[str, int], until: Union[str, int] = "latest", *, disk: str = "vda", **more: Any) -> Any:
        session = libvirt_cbt.Session(uri="nowhere:///", repository=kept.repository.path)
        return libvirt_cbt.changed(session, "vm", disk, since=since, until=until, **more)

    return ask


def rows(pages: Any) -> Rows:
    found = list(pages)
    assert all(len(page) and page.dtype == union.CHANGE for page in found)
    return [tuple(row) for page in found for row in page.tolist()]


def paged(asked: Asked, since: Any, until: Any, size: int, start: int = 0) -> Rows:
    """The answer in pages of `size`, resumed by offset alone."""
    out: Rows = []
    offset: Optional[int] = start
    while offset is not None:
        page = asked(since, until, start_offset=offset, max_results=size)
        found = rows(page)
        assert len(found) <= size
        assert page.pages.next_offset is None or len(found) == size
        out += found
        offset = page.pages.next_offset
    return out


@pytest.mark.parametrize("grain", [512, 4096, GRAIN])
@pytest.mark.parametrize("small", [False, True])
def test_every_pair_of_generations(
    kept: store.DomainStore, asked: Asked, rng: random.Random, monkeypatch: pytest.MonkeyPatch, grain: int, small: bool
) -> None:
    """Also with windows, buffers and cells so small that all their edges are met."""
    if small:
        monkeypatch.setattr(union, "WINDOW", 1 << rng.randrange(10, 18))
        monkeypatch.setattr(union, "CELLS", rng.choice([2, 64]))
        monkeypatch.setattr(union, "ROWS", 1)
        monkeypatch.setattr(union, "LEAST_ROWS", rng.randrange(1, 4))
    for _ in range(2):
        with kept.lock():
            for entry in os.listdir(os.path.join(kept.path, "backups")):
                os.rename(kept.directory(entry), os.path.join(kept.repository.path, entry))
        model = samples.random_repository(kept, rng, 5, grain)
        for until in range(1, 6):
            assert rows(asked("*", until)) == model.rows(0, until)
            for since in range(1, until + 1):
                found = asked(since, until)
                want = model.rows(since, until)
                assert rows(found) == want
                assert found.pages.next_offset is None
                capacity = model.capacities[until - 1]
                assert (found.since, found.until, found.capacity) == (since, until, capacity)
                start = rng.randrange(capacity + 1)
                assert rows(asked(since, until, start_offset=start)) == model.rows(since, until, start)


@pytest.mark.parametrize("small", [False, True])
def test_every_page_size_gives_the_same_answer(
    kept: store.DomainStore, asked: Asked, rng: random.Random, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    if small:
        monkeypatch.setattr(union, "WINDOW", 1 << 14)
        monkeypatch.setattr(union, "LEAST_ROWS", 2)
        monkeypatch.setattr(union, "ROWS", 2)
    model = samples.random_repository(kept, rng, 4, 4096)
    want = model.rows(1, 4)
    for size in range(1, len(want) + 2):
        assert paged(asked, 1, 4, size) == want
    start = rng.randrange(model.capacities[3])
    assert paged(asked, 1, 4, 3, start) == model.rows(1, 4, start)


def test_runs_longer_than_a_window_are_one(kept: store.DomainStore, asked: Asked) -> None:
    capacity = 5 * union.WINDOW + 512
    samples.publish(kept, [], capacity, first=True)
    samples.publish(kept, [(union.WINDOW - GRAIN, 3 * union.WINDOW, extents.DATA)], capacity)
    samples.publish(kept, [(capacity - 512, 512, extents.ZERO)], capacity)
    want = [(union.WINDOW - GRAIN, 3 * union.WINDOW, extents.DATA, 2), (capacity - 512, 512, extents.ZERO, 3)]
    assert rows(asked(1)) == want
    assert rows(asked(1, start_offset=union.WINDOW + 1))[0] == (union.WINDOW + 1, 3 * union.WINDOW - GRAIN - 1, 1, 2)


def test_boundaries_finer_than_cells(kept: store.DomainStore, asked: Asked, rng: random.Random) -> None:
    """Bytes are no boundaries of any QEMU, but an answer is exact all the same."""
    capacity = 1 << 36
    samples.publish(kept, [], capacity, first=True)
    samples.publish(kept, [(3, 1 << 35, extents.DATA)], capacity)
    samples.publish(kept, [(7, 1, extents.ZERO), ((1 << 35) + 1, 10, extents.ZERO)], capacity)
    assert rows(asked(1)) == [(3, 4, 1, 2), (7, 1, 2, 3), (8, (1 << 35) - 7, 1, 2), ((1 << 35) + 1, 10, 2, 3)]


def test_a_disk_of_the_largest_size(kept: store.DomainStore, asked: Asked) -> None:
    capacity = (1 << 63) - 512
    last = (1 << 62) - GRAIN
    samples.publish(kept, [], capacity, first=True)
    samples.publish(kept, [(0, GRAIN, extents.DATA), (last, GRAIN, extents.DATA)], capacity)
    samples.publish(kept, [(last, GRAIN, extents.ZERO)], capacity)
    assert rows(asked(1)) == [(0, GRAIN, 1, 2), (last, GRAIN, 2, 3)]


def test_the_facts_of_an_answer(kept: store.DomainStore, asked: Asked) -> None:
    samples.publish(kept, [], 4 * GRAIN, first=True)
    samples.publish(kept, [(0, GRAIN, extents.DATA)], 4 * GRAIN, granularity=4096)
    made = samples.publish(kept, [], 5 * GRAIN, granularity=65536)
    found = asked(1, 3)
    assert (found.domain, found.uuid, found.target) == ("vm", kept.uuid, "vda")
    assert (found.lineage, found.change_id) == (repository_samples.LINEAGE, made.disks[0].change_id)
    assert (found.capacity, found.granularity, found.guarantee) == (5 * GRAIN, 65536, "superset by granularity")
    assert asked(1, 2).granularity == 4096
    assert asked("*").since is None
    samples.publish(kept, [], 5 * GRAIN, granularity=None)
    assert asked(1).granularity is None
    with pytest.raises(ValueError, match="last page"):
        _ = found.pages.next_offset
    assert [tuple(r) for page in found for r in page.tolist()] == [(0, GRAIN, 1, 2)]


def test_points_are_numbers_ids_and_change_ids(kept: store.DomainStore, asked: Asked) -> None:
    made = [samples.publish(kept, [(0, GRAIN, 1)], GRAIN, first=not i) for i in range(4)]
    want = rows(asked(2, 3))
    assert want == [(0, GRAIN, extents.DATA, 3)]
    one, other = made[1], made[2]
    for since in ("2", one.id, one.id[:12] if not one.id[:12].isdigit() else one.id, one.disks[0].change_id):
        for until in (3, other.id, other.disks[0].change_id):
            assert rows(asked(since, until)) == want


def test_the_same_generation_twice_is_an_empty_answer(kept: store.DomainStore, asked: Asked) -> None:
    samples.publish(kept, [(0, GRAIN, 1)], GRAIN, first=True)
    samples.publish(kept, [(0, GRAIN, 1)], GRAIN)
    for number in (1, 2, "latest"):
        assert rows(asked(number, number)) == []


def test_offsets_outside_the_disk(kept: store.DomainStore, asked: Asked) -> None:
    samples.publish(kept, [], GRAIN, first=True)
    samples.publish(kept, [(0, GRAIN, 1)], GRAIN)
    at_the_end = asked(1, start_offset=GRAIN)
    assert rows(at_the_end) == []
    assert at_the_end.pages.next_offset is None
    for bad in ({"start_offset": -1}, {"start_offset": GRAIN + 1}, {"start_offset": 1 << 70}, {"max_results": 0}):
        with pytest.raises(errors.Usage):
            asked(1, **bad)


def test_no_answer_goes_beyond_the_disk_of_until(kept: store.DomainStore, asked: Asked) -> None:
    """Nor does it when a delta does: a smaller disk would be a new lineage, but the end of a disk is its end."""
    samples.publish(kept, [], 4 * GRAIN, first=True)
    samples.publish(kept, [(0, 4 * GRAIN, 1), (5 * GRAIN, GRAIN, 1)], 8 * GRAIN)
    samples.publish(kept, [(0, 512, 1)], 2 * GRAIN + 512)
    assert rows(asked(1, 2)) == [(0, 4 * GRAIN, 1, 2), (5 * GRAIN, GRAIN, 1, 2)]
    assert rows(asked(1, 3)) == [(0, 512, 1, 3), (512, 2 * GRAIN, 1, 2)]


def test_a_last_page_that_is_full_is_the_last(kept: store.DomainStore, asked: Asked) -> None:
    samples.publish(kept, [], 4 * GRAIN, first=True)
    samples.publish(kept, [(0, GRAIN, 1), (2 * GRAIN, GRAIN, 1)], 4 * GRAIN)
    for most, resume in ((1, GRAIN), (2, None), (3, None)):
        found = asked(1, max_results=most)
        assert len(rows(found)) == min(most, 2)
        assert found.pages.next_offset == resume


def test_since_after_until(kept: store.DomainStore, asked: Asked) -> None:
    for number in range(3):
        samples.publish(kept, [], GRAIN, first=not number)
    with pytest.raises(errors.Usage, match="older to newer"):
        asked(3, 2)


def test_an_unknown_disk_and_domain(kept: store.DomainStore, asked: Asked) -> None:
    samples.publish(kept, [], GRAIN, first=True)
    with pytest.raises(errors.NoSuchDisk) as caught:
        asked("*", disk="vdb\n")
    assert caught.value.code == 10 and "\n" not in str(caught.value)
    session = libvirt_cbt.Session(uri="nowhere:///", repository=kept.repository.path)
    with pytest.raises(errors.NotInRepository):
        libvirt_cbt.changed(session, "other", "vda", since="*")


@pytest.mark.parametrize("point", ["99", "0", "ffffffffffffffff"])
@pytest.mark.parametrize("which", ["since", "until"])
def test_unknown_generations(kept: store.DomainStore, asked: Asked, point: str, which: str) -> None:
    samples.publish(kept, [], GRAIN, first=True)
    samples.publish(kept, [], GRAIN)
    with pytest.raises(errors.GenerationUnknown) as caught:
        asked(point) if which == "since" else asked(1, point)
    assert caught.value.code == 12 and caught.value.facts["reason"]


def test_a_pruned_generation(kept: store.DomainStore, asked: Asked) -> None:
    """As a point, and between the points."""
    made = [samples.publish(kept, [(0, GRAIN, 1)], GRAIN, first=not i) for i in range(4)]
    os.rename(kept.directory(made[1].id), os.path.join(kept.repository.path, "away"))
    for point in (2, made[1].id, made[1].disks[0].change_id):
        with pytest.raises(errors.GenerationUnknown, match="removed"):
            asked(point)
    with pytest.raises(errors.LineageBroken, match="generation 2 is not in the repository") as caught:
        asked(1)
    assert caught.value.facts["since_lineage"] == caught.value.facts["until_lineage"]
    assert rows(asked(3)) == [(0, GRAIN, 1, 4)]


def test_a_break_of_the_lineage(kept: store.DomainStore, asked: Asked) -> None:
    new = samples.new_lineage()
    why = "the bitmap of generation 2 is missing or broken in the image"
    samples.publish(kept, [(0, GRAIN, 1)], GRAIN, first=True)
    samples.publish(kept, [(0, GRAIN, 1)], GRAIN)
    samples.publish(kept, [(0, GRAIN, 1)], GRAIN, first=True, lineage=new, reason=why)
    samples.publish(kept, [], GRAIN, lineage=new)
    for since, until in ((1, 3), (1, 4), (2, 3), (2, "latest")):
        with pytest.raises(errors.LineageBroken) as caught:
            asked(since, until)
        document = caught.value.document()
        assert document["code"] == 12 and why in document["message"]
        assert (document["since_lineage"], document["until_lineage"]) == (repository_samples.LINEAGE, new)
        assert (document["broken_by"], document["generation"]) == (why, 3)
    assert rows(asked(1, 2)) and rows(asked("*")) == [(0, GRAIN, 1, 3)]
    assert rows(asked("*", 2)) == [(0, GRAIN, 1, 2)]


def test_a_generation_without_the_disk(kept: store.DomainStore, asked: Asked) -> None:
    samples.publish(kept, [(0, GRAIN, 1)], GRAIN, first=True)
    samples.publish(kept, [], GRAIN, first=True, target="vdb")
    samples.publish(kept, [(0, GRAIN, 1)], GRAIN, first=True, lineage=samples.new_lineage())
    for since, until in ((1, 2), (2, 3), (1, 3), (2, 2), ("*", 2)):
        with pytest.raises(errors.LineageBroken, match="generation 2 does not have this disk"):
            asked(since, until)


@pytest.mark.parametrize("what", ["lineage", "tag", "future"])
def test_foreign_change_ids(kept: store.DomainStore, asked: Asked, what: str) -> None:
    made = samples.publish(kept, [], GRAIN, first=True)
    samples.publish(kept, [], GRAIN)
    lineage = samples.new_lineage() if what == "lineage" else repository_samples.LINEAGE
    number = 3 if what == "future" else 1
    with pytest.raises(errors.ChangeIdBroken) as caught:
        asked(f"cbt1:{lineage}/{number}-{'00000000' if what == 'tag' else made.id[:8]}")
    assert caught.value.code == 12


def test_the_change_id_of_another_disk(kept: store.DomainStore, asked: Asked) -> None:
    samples.publish(kept, [], GRAIN, first=True)
    other = samples.publish(kept, [], GRAIN, first=True, target="vdb", lineage=samples.new_lineage())
    with pytest.raises(errors.ChangeIdBroken):
        asked(other.disks[0].change_id)


def test_everything_when_the_first_generations_were_forgotten(kept: store.DomainStore, asked: Asked) -> None:
    """The contents of a backup stand in, with the newest generation that may have written them."""
    made = [samples.publish(kept, [(GRAIN, GRAIN, 1)], 8 * GRAIN, first=True)]
    made.append(samples.publish(kept, [(0, 512, 1)], 8 * GRAIN))
    made.append(samples.publish(kept, [(2 * GRAIN, 512, 2)], 8 * GRAIN))
    whole = [(0, 3 * GRAIN, 1), (4 * GRAIN, GRAIN, 1)]
    made.append(samples.publish(kept, [(4 * GRAIN, GRAIN, 1)], 8 * GRAIN, contents=whole))
    made.append(samples.publish(kept, [(4 * GRAIN, GRAIN, 2)], 8 * GRAIN))
    for gone in made[:2]:
        os.rename(kept.directory(gone.id), os.path.join(kept.repository.path, gone.id))
    found = asked("*")
    assert rows(found) == [
        (0, 2 * GRAIN, 1, 2),
        (2 * GRAIN, 512, 2, 3),
        (2 * GRAIN + 512, GRAIN - 512, 1, 2),
        (4 * GRAIN, GRAIN, 2, 5),
    ]
    assert found.granularity == GRAIN
    with pytest.raises(errors.BeginningUnknown, match="is not in the repository, and no backup after it"):
        asked("*", 3)
    assert rows(asked(3, 5)) == [(4 * GRAIN, GRAIN, 2, 5)]


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "link"])
def test_damage_is_an_error_before_the_first_page(kept: store.DomainStore, asked: Asked, how: str) -> None:
    made = [samples.publish(kept, [(0, GRAIN, 1)], GRAIN, first=not i) for i in range(3)]
    path = Path(kept.directory(made[1].id), "vda.delta.npy")
    if how == "flipped":
        path.write_bytes(path.read_bytes()[:-1] + b"\2")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.rename(path.with_name("elsewhere"))
        if how == "link":
            path.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(errors.Damaged, match=r"vda\.delta\.npy"):
        next(asked(1).pages)
    assert rows(asked(2)) == [(0, GRAIN, 1, 3)]


def test_files_are_closed(kept: store.DomainStore, asked: Asked) -> None:
    for number in range(3):
        samples.publish(kept, [(0, GRAIN, 1), (2 * GRAIN, GRAIN, 1)], 4 * GRAIN, first=not number)
    before = set(os.listdir("/proc/self/fd"))
    rows(asked(1))
    rows(asked(1, max_results=1))
    asked(1)  # not even begun
    begun = asked(1)
    next(begun.pages)
    begun.pages.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_more_generations_than_files_may_be_open(kept: store.DomainStore, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: List[Tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    union._allow_files(100)
    union._allow_files(2000)
    union._allow_files(9000)
    assert limits == [(2256, 4096), (4096, 4096)]


def test_a_question_can_be_interrupted(kept: store.DomainStore) -> None:
    class Stopped(libvirt_cbt.Watch):
        def stop(self) -> None:
            raise errors.Interrupted(number=2, signal="SIGINT")

    samples.publish(kept, [(0, GRAIN, 1)], GRAIN, first=True)
    session = libvirt_cbt.Session(uri="nowhere:///", repository=kept.repository.path, watch=Stopped())
    with pytest.raises(errors.Interrupted):
        list(libvirt_cbt.changed(session, "vm", "vda", since="*"))


def test_rows_that_are_no_extents(kept: store.DomainStore, asked: Asked) -> None:
    """A digest proves that a file is as it was written, not that its writer was right."""
    samples.publish(kept, [], GRAIN, first=True)
    samples.publish(kept, [(0, GRAIN, 7)], GRAIN)
    with pytest.raises(errors.Damaged, match="unknown state"):
        rows(asked(1))


def test_memory_is_bounded_by_rows_not_by_the_disk(
    kept: store.DomainStore, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No slice that is read is larger than the share of its source."""
    read: List[int] = []
    slice_ = npy.Reader.slice

    def counted(self: npy.Reader, first: int, last: int) -> extents.Extents:
        read.append(last - first)
        return slice_(self, first, last)

    monkeypatch.setattr(npy.Reader, "slice", counted)
    monkeypatch.setattr(union, "ROWS", 300)
    monkeypatch.setattr(union, "LEAST_ROWS", 10)
    offsets = np.arange(0, 2000 * GRAIN, 2 * GRAIN).tolist()
    for number in range(4):
        samples.publish(kept, [(o, GRAIN, 1) for o in offsets], 2000 * GRAIN, first=not number)
    assert rows(asked(1)) == [(o, GRAIN, 1, 4) for o in offsets]
    assert max(read) == 100 and sum(read) == 3000


# What an exact answer is made of; with real layers in tests/libvirt/test_changed.py.


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"live": True, "until": 2}, "leave --until out"),
        ({"live": True, "until": "latest"}, "leave --until out"),
        ({"live": True, "exact": True}, "ends at a mark"),
        ({"scratch_dir": "/var/tmp"}, "--live"),
        ({"live": True, "start_offset": -1}, "begin at 0"),
        ({"live": True, "max_results": 0}, "1 or more"),
        ({"exact": True, "since": "*"}, "is none"),
        ({"exact": True}, "generation 1 holds no data"),
        ({"exact": True, "since": 2}, "generation 3 holds no data"),
    ],
)
def test_questions_without_sense(kept: store.DomainStore, more: Any, why: str) -> None:
    """They are refused before libvirt is asked for a mark."""
    samples.publish(kept, [], GRAIN, first=True)
    samples.publish(kept, [], GRAIN, contents=[(0, GRAIN, 1)])
    samples.publish(kept, [], GRAIN)
    session = libvirt_cbt.Session(uri="nowhere:///", repository=kept.repository.path)
    with pytest.raises(errors.Usage, match=why) as caught:
        libvirt_cbt.changed(session, "vm", "vda", **{"since": 1, **more})
    assert caught.value.code == 2


def test_overlaps_of_rows_and_parts(rng: random.Random) -> None:
    for _ in range(200):
        size = rng.randrange(1, 60)
        row_of = [rng.choice((0, 0, 1, 1, 2, 3)) for _ in range(size)]
        in_part = [rng.random() < 0.5 for _ in range(size)]
        made = [_row(low, high, value) for low, high, value in _stretches(row_of)]
        given = np.array(made, union.CHANGE) if made else np.empty(0, union.CHANGE)
        cut = [(low, high - low, 1) for low, high, value in _stretches([int(x) for x in in_part])]
        found = exact.overlaps(given, np.array(cut, extents.EXTENT) if cut else extents.empty())
        want = [v if part else 0 for v, part in zip(row_of, in_part)]
        got = [0] * size
        for offset, length, state, generation in found.tolist():
            assert length and state == 1 + generation % 2
            assert got[offset : offset + length] == [0] * length
            got[offset : offset + length] = [generation] * length
        assert got == want
        assert extents.check(found, size) == ""


def _row(low: int, high: int, generation: int) -> Tuple[int, int, int, int]:
    return low, high - low, 1 + generation % 2, generation


def _stretches(values: List[int]) -> List[Tuple[int, int, int]]:
    """(first, end, value) of equal neighbours that are not 0."""
    cuts = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return [(low, high, values[low]) for low, high in zip(cuts, cuts[1:]) if values[low]]


def test_sectors_that_differ(rng: random.Random) -> None:
    for _ in range(20):
        grains = np.array(sorted(rng.sample(range(40), rng.randrange(1, 6))), np.int64)
        one = bytearray(rng.randbytes(GRAIN) * len(grains))
        two = bytearray(one)
        want = set()
        for _ in range(rng.randrange(12)):
            where = rng.choice((rng.randrange(len(two)), rng.randrange(len(grains)) * GRAIN, len(two) - 1))
            two[where] ^= 1 << rng.randrange(8)
            sector = where // 512
            want.discard(sector) if one[sector * 512 :][:512] == two[sector * 512 :][:512] else want.add(sector)
        low = 7 * GRAIN
        found = exact.runs(exact.sectors(one, two), low, grains)
        assert extents.check(found, 1 << 30) == "" and len(extents.coalesce(found)) == len(found)
        places = [int(grain) * 128 + 7 * 128 + sector for grain in grains for sector in range(128)]
        told = {s for o, n, _ in found.tolist() for s in range(o // 512, (o + n) // 512)}
        assert told == {places[sector] for sector in want}


def test_what_is_on_record_as_the_same(tmp_path: Path) -> None:
    """Zeroes of any origin, and runs of one place, length and digest; whatever layers they lie in."""

    def reader(name: str, rows: List[Tuple[int, int, int]], seed: int) -> npy.Reader:
        writer = npy.Writer(str(tmp_path / name), extents.CONTENT)
        writer.append(repository_samples.content(rows, seed))
        return npy.Reader(writer.path, extents.CONTENT, writer.finish()[0])

    base = [(0, 2 * GRAIN, 1), (2 * GRAIN, GRAIN, 1), (3 * GRAIN, GRAIN, 2), (4 * GRAIN, 2 * GRAIN, 1)]
    written = [(0, GRAIN, 1), (GRAIN, GRAIN, 2), (2 * GRAIN, GRAIN, 1)]
    with reader("full", base, 0) as full, reader("other", written, 1) as other:
        with reader("again", [(0, 2 * GRAIN, 1), (2 * GRAIN, GRAIN, 1)], 0) as again:
            high = 7 * GRAIN
            old, new, back = (plan.Shown(chain, 0, high) for chain in ([full], [other, full], [again, other, full]))
    assert new.same(old).tolist() == old.same(new).tolist() == [False, False, False, True, True, True, True]
    assert back.same(old).all()
    assert old.same(old).all()
    wanted = np.array([False, True, True, True, False, True, False])
    assert [(r.layer, r.offset, r.length, r.keep) for r in new.runs(wanted)] == [
        (0, 2 * GRAIN, GRAIN, ((2 * GRAIN, GRAIN),)),
        (1, 4 * GRAIN, 2 * GRAIN, ((5 * GRAIN, GRAIN),)),
    ]
