from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from libvirt_cbt import durable, errors


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
def test_modes_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        durable.make_directory(str(tmp_path / "d"))
        durable.write_new(str(tmp_path / "f"), b"x")
        durable.replace(str(tmp_path / "f"), b"y")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600


def test_new_is_new(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"old")
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            durable.write_new(str(tmp_path / name), b"new")
    assert (tmp_path / "there").read_bytes() == b"old"
    assert not (tmp_path / "nowhere").exists()


def test_replace_after_a_crash_before_its_rename(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a.new").write_bytes(b"half")
    durable.replace(str(tmp_path / "a"), b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_publish_never_over_anything(tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for kind in ("directory", "file", "link"):
        goal = tmp_path / kind
        with pytest.raises(FileExistsError):
            durable.publish(str(source), str(goal))
        assert source.is_dir()


def test_remove_directory_follows_no_link_and_keeps_the_last_file_to_the_end(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    (inside / "a").touch()
    (inside / "intent.json").touch()
    (inside / "z").mkdir()  # cannot be unlinked: the removal ends half-way
    with pytest.raises(OSError):
        durable.remove_directory(str(inside), last="intent.json")
    assert (inside / "intent.json").exists()
    (inside / "z").rmdir()
    durable.remove_directory(str(inside), last="intent.json")
    assert not inside.exists()
    assert (outside / "kept").exists()


def test_read_refuses_what_is_no_small_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    assert durable.read(str(tmp_path / "f"), 5) == b"12345"
    with pytest.raises(ValueError, match="longer"):
        durable.read(str(tmp_path / "f"), 4)
    os.mkfifo(tmp_path / "p")
    with pytest.raises(ValueError, match="regular"):
        durable.read(str(tmp_path / "p"), 5)
    (tmp_path / "l").symlink_to("f")
    with pytest.raises(OSError) as caught:
        durable.read(str(tmp_path / "l"), 5)
    assert caught.value.errno == errno.ELOOP


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, errors.RepositoryFull),
        (errno.EDQUOT, errors.RepositoryFull),
        (errno.EACCES, errors.RepositoryDenied),
        (errno.EROFS, errors.RepositoryDenied),
        (errno.EIO, errors.RepositoryError),
    ],
)
def test_errors_as_sentences(number: int, kind: type[errors.CbtError]) -> None:
    with pytest.raises(kind) as caught, durable.explained("/repo", "/repo/file"):
        raise OSError(number, os.strerror(number))
    assert "/repo" in str(caught.value)
    assert caught.value.code == 15
    assert (number == errno.EROFS) == ("has to be mounted for writing" in str(caught.value))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_whose_a_repository_is_is_told(tmp_path: Path) -> None:
    for owner, said in ((65534, "; run this as user 65534"), (0, "")):
        os.chown(tmp_path, owner, -1)
        with pytest.raises(errors.RepositoryDenied) as caught, durable.explained(str(tmp_path), str(tmp_path / "x")):
            raise PermissionError(errno.EACCES, "Permission denied")
        assert str(caught.value).endswith(f"{tmp_path}/x: Permission denied{said}")


def test_a_replacement_that_finds_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def full(_fd: int, _data: bytes) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(durable, "write_all", full)
    with pytest.raises(OSError, match="full"):
        durable.replace(str(tmp_path / "a"), b"new")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.fault(54)
def test_a_directory_that_is_exchanged_while_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking and removing somebody puts a link to another directory in its place."""
    ours, others = tmp_path / "ours", tmp_path / "others"
    for place in (ours, others):
        place.mkdir()
        (place / "a").write_bytes(b"x")
    look = os.listdir

    def exchanged(place: int) -> list[str]:
        ours.rename(tmp_path / "away")
        ours.symlink_to(others)
        return look(place)

    monkeypatch.setattr(os, "listdir", exchanged)
    with pytest.raises(OSError, match="Not a directory"):
        durable.remove_directory(str(ours))
    assert look(others) == ["a"]
    monkeypatch.setattr(os, "listdir", look)
    with pytest.raises(OSError, match="Not a directory"):
        durable.remove_directory(str(ours))
    assert os.listdir(others) == ["a"]
