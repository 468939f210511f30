"""Hooks are put where they are called, and nothing of anybody else's is touched."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any, Iterator, List

import pytest

import libvirt_cbt
from libvirt_cbt import errors, spool
from libvirt_cbt.actions import results
from libvirt_cbt.hooks import installing, listing, units

UUID = "0123abcd-0123-4567-89ab-0123456789ab"


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[libvirt_cbt.Session]:
    monkeypatch.setenv("LIBVIRT_CBT_SPOOL_DIR", str(tmp_path / "spool"))
    monkeypatch.setenv("LIBVIRT_CBT_HOOKS_DIR", str(tmp_path / "hooks.d"))
    monkeypatch.setattr(installing, "_vdsm", lambda: (os.getuid(), os.getgid()))
    path = str(tmp_path / 'a "repository" of 100% $HOME')
    with libvirt_cbt.Session("qemu:///system", path) as made:
        libvirt_cbt.init(made)
        yield made


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """/etc/libvirt/hooks and vdsm's folder."""
    (tmp_path / "etc" / "hooks").mkdir(parents=True)
    (tmp_path / "vdsm").mkdir()
    return tmp_path


def install(session: libvirt_cbt.Session, host: Path, kind: str, **more: Any) -> results.HooksInstalled:
    folder = {"libvirt": "etc/hooks/qemu.d", "vdsm": "vdsm"}[kind]
    return installing.install(session, kind, directory=str(host / folder), unit_dir=str(host / "units"), **more)


def statuses(session: libvirt_cbt.Session, host: Path) -> List[results.Hook]:
    places = {"libvirt": str(host / "etc/hooks/qemu.d"), "vdsm": str(host / "vdsm")}
    return listing.listed(session, places)


def test_libvirt_s_hook_is_there_until_it_is_removed(session: libvirt_cbt.Session, host: Path) -> None:
    made = install(session, host, "libvirt")
    script = Path(made.files[0])
    assert script.parent == host / "etc/hooks/qemu.d" and stat.S_IMODE(script.stat().st_mode) == 0o755
    subprocess.run(
        [str(script), "web", "started", "begin", "-"], input=f"<uuid>{UUID}</uuid>".encode(), check=True, timeout=60
    )
    place = spool.place(session.repository().id)
    assert os.listdir(os.path.join(place, "new")) == [f"{UUID}.started"]
    (found, absent, *_) = statuses(session, host)
    assert (found.state, found.events, absent.state) == ("ok", 1, "absent")
    assert install(session, host, "libvirt") == made  # safe to repeat
    gone = installing.remove(session, "libvirt", directory=str(script.parent), unit_dir=str(host / "units"))
    assert gone.removed == made.files
    assert not os.path.exists(place) and list((host / "units").iterdir()) == []
    again = installing.remove(session, "libvirt", directory=str(script.parent), unit_dir=str(host / "units"))
    assert again.removed == []


def test_vdsm_s_hooks_are_in_every_event_s_folder(session: libvirt_cbt.Session, host: Path) -> None:
    other = host / "vdsm" / "after_vm_start" / "50_other"
    other.parent.mkdir()
    other.touch()
    made = install(session, host, "vdsm")
    names = {os.path.relpath(path, host / "vdsm").split("/")[0] for path in made.files if "/units/" not in path}
    assert names == set(installing.EVENTS)
    install(session, host, "libvirt")
    assert [hook.state for hook in statuses(session, host)[:2]] == ["ok", "ok"]
    installing.remove(session, "vdsm", directory=str(host / "vdsm"), unit_dir=str(host / "units"))
    assert other.exists()
    # The units and the spool are libvirt's hook's, too.
    assert len(list((host / "units").iterdir())) == 2
    assert sorted(os.listdir(spool.place(session.repository().id))) == ["aside", "new", "taken"]


def test_a_spool_of_its_own_place(session: libvirt_cbt.Session, host: Path, tmp_path: Path) -> None:
    made = install(session, host, "libvirt", spool_dir=str(tmp_path / "mine"))
    assert made.spool == str(tmp_path / "mine" / session.repository().id)
    assert (Path(made.spool) / "new").is_dir()
    service = next(Path(path).read_text() for path in made.files if path.endswith(".service"))
    assert f'Environment="LIBVIRT_CBT_SPOOL_DIR={tmp_path / "mine"}"' in service
    installing.remove(session, "libvirt", directory=str(host / "etc/hooks/qemu.d"), unit_dir="")
    assert not (tmp_path / "mine").exists()


def test_what_is_wrong_is_told(session: libvirt_cbt.Session, host: Path) -> None:
    made = install(session, host, "vdsm")
    scripts = [Path(path) for path in made.files if "/units/" not in path]
    scripts[0].unlink()
    scripts[1].chmod(0o644)
    scripts[2].write_text(scripts[2].read_text().replace("MOST = 1000", "MOST = 100"))
    shutil.rmtree(made.spool)
    found = statuses(session, host)[1]
    assert found.state == "warning" and len(found.files) == len(scripts) - 1
    for sentence in ("is missing;", "is not executable", "is of another release", "so nothing is noted", "mends it"):
        assert sentence in found.detail
    install(session, host, "vdsm")
    assert statuses(session, host)[1].state == "ok"


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_what_is_another_s_is_never_replaced(session: libvirt_cbt.Session, host: Path, kind: str) -> None:
    path = Path(install(session, host, "libvirt").files[0])
    ours = path.read_text()
    path.unlink()
    if kind == "file":
        path.write_text("#!/bin/sh\n")
    elif kind == "link":
        (host / "target").write_text(ours)
        path.symlink_to(host / "target")
    else:
        path.mkdir()
    with pytest.raises(errors.TargetExists):
        install(session, host, "libvirt")
    gone = installing.remove(session, "libvirt", directory=str(path.parent), unit_dir="")
    assert gone.removed == [] and os.path.lexists(path)


def test_a_host_without_libvirt_or_vdsm(
    session: libvirt_cbt.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("libvirt", "vdsm"):
        monkeypatch.setitem(installing.DIRECTORIES, kind, str(tmp_path / "no" / "such" / "place"))
        with pytest.raises(errors.NotFound, match="this host has no"):
            installing.install(session, kind)
    monkeypatch.undo()
    monkeypatch.setattr(installing, "USER", "no-such-user")
    with pytest.raises(errors.NotFound, match="has no vdsm"):
        installing.install(session, "vdsm", directory=str(tmp_path))


def test_the_units_are_what_systemd_takes(session: libvirt_cbt.Session, host: Path) -> None:
    made = install(session, host, "libvirt")
    unit = units.name(session.repository().id)
    assert sorted(os.path.basename(path) for path in made.files[1:]) == [f"{unit}.path", f"{unit}.service"]
    assert f"systemctl enable --now {unit}.path" in made.next[1]
    service = (host / "units" / f"{unit}.service").read_text()
    escaped = session.path.replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    assert f'"-c" "qemu:///system" "-r" "{escaped}" "-q" "recover" "--noted"' in service
    assert "@" not in service.replace("-c ", "")
    analyze = shutil.which("systemd-analyze")
    if not analyze:
        pytest.skip("systemd-analyze is not installed")
    command = [analyze, "verify", "--man=no", str(host / "units" / f"{unit}.path"), str(host / "units" / f"{unit}.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    mine = [line for line in done.stderr.splitlines() if unit in line]
    assert mine == [], done.stderr


def test_where_systemd_does_not_run_there_are_no_units(session: libvirt_cbt.Session, host: Path, tmp_path: Path) -> None:
    made = installing.install(session, "libvirt", directory=str(host / "etc/hooks/qemu.d"), unit_dir="")
    assert len(made.files) == 1
    assert "recover --noted" in made.next[1]
