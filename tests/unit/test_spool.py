"""The spool: what hooks have noted is taken once, and a hostile one does no harm."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import List

import pytest

from libvirt_cbt import spool

ONE = "0123abcd-0123-4567-89ab-0123456789ab"
TWO = "0123abcd-0123-4567-89ab-0123456789ac"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    directory = tmp_path / "root" / "0011223344556677"
    spool.make(str(directory), spool.NEW)
    spool.make(str(directory), spool.VDSM)
    return directory


def note(place: Path, name: str, folder: str = "new", seconds: float = 0) -> Path:
    path = place / folder / name
    path.touch()
    os.utime(path, (seconds, seconds))
    return path


def events(place: Path) -> List[str]:
    found, complaints = spool.taken(str(place))
    assert complaints == []
    return [f"{event.uuid}.{event.kind}" for event in found]


def test_the_folders_are_root_s_and_nobody_else_looks_into_them(place: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (place.parent, place, *place.iterdir())}
    assert modes == {"root": 0o711, place.name: 0o711, "new": 0o700, "vdsm": 0o700, "taken": 0o700, "aside": 0o700}


def test_a_folder_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    """/srv or /tmp, say, by a slip of the pen."""
    bases = ((0o755, True, None), (0o700, True, None), (0o700, False, (1, 1)), (0o1777, False, None), (0o775, False, None))
    for mode, fit, owner in bases:
        base = tmp_path / f"{mode:o}{fit}"
        base.mkdir()
        base.chmod(mode)
        (base / "overflow").touch()
        place = base / "0011223344556677"
        if fit:
            spool.make(str(place), spool.NEW, owner)
            assert (place / spool.NEW).is_dir()
        else:
            with pytest.raises(PermissionError, match=r"may (write to|not pass)"):
                spool.make(str(place), spool.NEW, owner)
        assert not spool.drop(str(place), spool.NEW)
        assert (stat.S_IMODE(base.stat().st_mode), os.listdir(base)) == (mode, ["overflow"])
        (base / "overflow").unlink()
        assert not spool.drop(str(place), spool.NEW)
        assert base.is_dir()


def test_events_come_in_their_order_until_they_are_done_with(place: Path) -> None:
    note(place, f"{TWO}.started", seconds=20)
    note(place, f"{ONE}.crashed", seconds=10)
    note(place, f"{ONE}.plugged", "vdsm", seconds=30)
    wanted = [f"{ONE}.crashed", f"{TWO}.started", f"{ONE}.plugged"]
    assert events(place) == wanted
    assert list((place / "new").iterdir()) == []
    assert events(place) == wanted
    found, _ = spool.taken(str(place))
    assert found[0].time == "1970-01-01T00:00:10.000Z"
    found[0].done()
    found[0].done()
    assert events(place) == wanted[1:]


def test_an_event_that_comes_meanwhile_is_another_one(place: Path) -> None:
    note(place, f"{ONE}.started", seconds=10)
    (event,), _ = spool.taken(str(place))
    note(place, f"{ONE}.started", seconds=20)
    event.done()
    (again,), _ = spool.taken(str(place))
    assert again.time > event.time


def test_no_spool_is_no_event(tmp_path: Path) -> None:
    assert spool.taken(str(tmp_path / "none")) == ([], [])
    assert spool.count(str(tmp_path / "none")) == 0


def test_more_than_there_is_room_for_is_one_event(place: Path) -> None:
    note(place, "overflow")
    (event,), _ = spool.taken(str(place))
    assert (event.uuid, event.kind) == (None, "overflow")


def test_what_is_no_event_goes_aside_and_is_not_followed(place: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    for name in ("README", f"{ONE}.", f"{ONE}.exploded", f"{ONE}.started.new", f"{ONE.upper()}.started", "\udcff\n"):
        note(place, name)
    (place / "new" / f"{ONE}.started").symlink_to(target)
    (place / "new" / f"{ONE}.stopped").mkdir()
    (place / "new" / f"{ONE}.stopped" / "inside").touch()
    os.mkfifo(place / "new" / f"{ONE}.crashed")
    note(place, f"{ONE}.crashed", "vdsm")  # vdsm's user cannot put a guest in doubt
    note(place, f"{TWO}.started", "vdsm").write_bytes(b"x" * 1_000_000)  # what is in it is never read
    assert events(place) == [f"{TWO}.started"]
    assert target.read_text() == "precious"
    aside = {path.name for path in (place / "aside").iterdir()}
    assert {"README", f"{ONE}.started", f"{ONE}.stopped", f"{ONE}.crashed", "\udcff\n"} <= aside
    assert list((place / "new").iterdir()) == [] and list((place / "vdsm").iterdir()) == []


def test_a_directory_that_cannot_go_aside_is_told_of(place: Path) -> None:
    for folder in ("new", "aside"):
        (place / folder / "d").mkdir()
        (place / folder / "d" / "x").touch()
    note(place, f"{ONE}.started")
    found, (complaint,) = spool.taken(str(place))
    assert [event.kind for event in found] == ["started"]
    assert "cannot be moved" in complaint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_folder_that_others_may_write_to_is_not_looked_into(place: Path) -> None:
    note(place, f"{ONE}.crashed")
    os.chown(place / "new", 65534, 65534)
    found, (complaint,) = spool.taken(str(place))
    assert found == [] and "others may write to it" in complaint
    os.chown(place / "new", 0, 0)
    (place / "new").chmod(0o777)
    assert spool.taken(str(place))[0] == []
    (place / "new").chmod(0o700)
    os.chown(place / "vdsm", 65534, 65534)  # that one is vdsm's
    note(place, f"{ONE}.plugged", "vdsm")
    assert events(place) == [f"{ONE}.crashed", f"{ONE}.plugged"]


def test_a_link_in_the_place_of_a_folder(place: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / f"{ONE}.started").touch()
    (place / "vdsm").rmdir()
    (place / "vdsm").symlink_to(elsewhere)
    found, (complaint,) = spool.taken(str(place))
    assert found == [] and "is a link" in complaint
    assert (elsewhere / f"{ONE}.started").exists()


def test_dropping_one_kind_leaves_the_other(place: Path) -> None:
    note(place, f"{ONE}.started")
    note(place, f"{TWO}.started", "vdsm")
    assert spool.drop(str(place), spool.NEW)
    assert events(place) == [f"{TWO}.started"]
    (place / "aside" / "of somebody").touch()
    assert not spool.drop(str(place), spool.VDSM)
    assert [path.name for path in place.iterdir()] == ["aside"]  # what was no event stays
    (place / "aside" / "of somebody").unlink()
    assert not spool.drop(str(place), spool.VDSM)
    assert not place.parent.exists()
    assert not spool.drop(str(place), spool.VDSM)


def test_its_place_is_root_s_or_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIBVIRT_CBT_SPOOL_DIR", raising=False)
    assert spool.place("0011223344556677") == "/var/lib/libvirt-cbt-spool/0011223344556677"
    monkeypatch.setenv("LIBVIRT_CBT_SPOOL_DIR", "/some/where")
    assert spool.place("0011223344556677") == "/some/where/0011223344556677"
    assert spool.place("0011223344556677", "/else") == "/else/0011223344556677"
