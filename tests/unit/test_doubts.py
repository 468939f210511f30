"""Doubts about a domain stay until its disks were compared or copied as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from libvirt_cbt.repository import doubts, store
from tests.unit import repository_samples as samples

WHEN = "2026-01-02T03:04:05.678Z"
LATER = "2026-01-02T04:04:05.678Z"


@pytest.fixture
def kept(tmp_path: Path) -> store.DomainStore:
    one = store.Repository.init(str(tmp_path / "repo")).domain(samples.UUID)
    with one.lock():
        return one


def test_where_nothing_is_stored_nothing_is_in_doubt(kept: store.DomainStore) -> None:
    assert not doubts.crashed(kept, WHEN) and not doubts.put_back(kept, WHEN)
    doubts.settle(kept, ["vda"])
    assert doubts.read(kept).suspect == []


def test_a_crash_is_noted_once_and_until_it_is_settled(kept: store.DomainStore) -> None:
    samples.publish(kept)
    assert doubts.crashed(kept, WHEN) and not doubts.crashed(kept, WHEN)
    doubts.settle(kept, ["vdb"])
    found = doubts.read(kept)
    assert (found.crashed, found.suspect) == (WHEN, ["vda"])
    doubts.settle(kept, ["vda"])
    assert not (Path(kept.path) / doubts.FILE).exists()
    assert doubts.crashed(kept, LATER)


def test_a_revert_holds_until_the_next_generation(kept: store.DomainStore) -> None:
    samples.publish(kept)
    assert doubts.put_back(kept, WHEN) and not doubts.put_back(kept, LATER)
    doubts.crashed(kept, WHEN)
    doubts.settle(kept, ["vda"])
    assert doubts.reverted(kept) == WHEN
    samples.publish(kept)
    assert doubts.reverted(kept) is None
    doubts.settle(kept, [])
    assert not (Path(kept.path) / doubts.FILE).exists()


@pytest.mark.parametrize("text", ["", "{}", '{\n"format": 1\n}\n'])
def test_a_note_that_is_damaged_puts_every_disk_in_doubt(kept: store.DomainStore, text: str) -> None:
    samples.publish(kept)
    path = Path(kept.path) / doubts.FILE
    path.write_text(text)
    assert doubts.read(kept).suspect == ["vda"]
    doubts.settle(kept, ["vda"])
    assert not path.exists()


def test_a_note_of_another_domain_says_nothing_of_this_one(kept: store.DomainStore) -> None:
    samples.publish(kept)
    doubts.put_back(kept, WHEN)
    path = Path(kept.path) / doubts.FILE
    other = doubts.Doubts.load(str(path)).model_copy(update={"domain": samples.UUID.replace("0123", "4567", 1)})
    path.write_bytes(other.dump())
    assert doubts.reverted(kept) is None
    assert doubts.read(kept).suspect == ["vda"]
