"""Which scripts of an administrator are run: nobody else can put one there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable

import pytest

from libvirt_cbt import scripts

NOBODY = 65534


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "hooks.d"
    path.mkdir(mode=0o755)
    return path


def script(root: Path, phase: str = "preflight", name: str = "10_ask", mode: int = 0o755) -> Path:
    (root / phase).mkdir(mode=0o755, exist_ok=True)
    path = root / phase / name
    path.write_text("#!/bin/sh\n")
    path.chmod(mode)
    return path


def test_no_directory_is_no_script(tmp_path: Path) -> None:
    assert scripts.find(str(tmp_path / "none")) == scripts.Found(str(tmp_path / "none"))
    (tmp_path / "file").touch()
    assert scripts.find(str(tmp_path / "file" / "hooks.d")).scripts == {}


def test_they_run_in_the_order_of_their_numbers(root: Path) -> None:
    paths = [str(script(root, "ready", name)) for name in ("20_a", "10_z", "05_m")]
    other = str(script(root, "failed"))
    found = scripts.find(str(root))
    assert found.scripts == {"ready": tuple(reversed(paths)), "failed": (other,)}
    assert found.refused == ()


@pytest.mark.parametrize("name", ["README", "10_a.dpkg-old", "10_a~", "1_a", "a_10", "10_", "10_a b", "10_a\n", ".10_a"])
def test_what_only_lies_there_is_left_alone(root: Path, name: str) -> None:
    script(root, name=name)
    script(root, name="20_off", mode=0o644)
    (root / "README").write_text("all about it")
    assert scripts.find(str(root)) == scripts.Found(str(root))


def test_a_phase_that_there_is_not_is_named(root: Path) -> None:
    script(root, "pre-frezee")
    (told,) = scripts.find(str(root)).refused
    assert "pre-frezee is not looked into" in told and "pre-freeze," in told


def _chown(path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    os.chown(path, NOBODY, NOBODY)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.chmod(0o775), "may be written by others"),
        (lambda path: path.chmod(0o757), "may be written by others"),
        (_chown, "belongs to user"),
    ],
)
@pytest.mark.parametrize("what", ["script", "phase", "root", "above"])
def test_what_others_could_change_is_not_run(
    root: Path, spoil: Callable[[Path], None], reason: str, what: str
) -> None:
    path = script(root)
    good = script(root, "ready")
    spoil({"script": path, "phase": path.parent, "root": root, "above": root.parent}[what])
    found = scripts.find(str(root))
    assert found.scripts == ({"ready": (str(good),)} if what in ("script", "phase") else {})
    (told,) = found.refused
    assert reason in told


def test_a_link_is_not_followed(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("#!/bin/sh\n")
    target.chmod(0o755)
    (root / "preflight").mkdir(mode=0o755)
    (root / "preflight" / "10_link").symlink_to(target)
    (root / "ready").symlink_to(root / "preflight")
    found = scripts.find(str(root))
    assert found.scripts == {}
    assert [("10_link" in told, "ready" in told) for told in found.refused] == [(True, False), (False, True)]


def test_the_directory_is_root_s_the_user_s_or_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIBVIRT_CBT_HOOKS_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert scripts.directory() == "/etc/libvirt-cbt/hooks.d"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/home/x/.config")
    assert scripts.directory() == "/home/x/.config/libvirt-cbt/hooks.d"
    monkeypatch.setenv("LIBVIRT_CBT_HOOKS_DIR", "/some/where")
    assert scripts.directory() == "/some/where"
