"""The timer and the service of `run`: what is in them, and that nothing of anybody else's is touched."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

import libvirt_cbt
from libvirt_cbt import errors
from libvirt_cbt.actions import results
from libvirt_cbt.hooks import timers, units

AUTOMATION = Path(__file__).resolve().parents[2] / "docs" / "automation.md"
NAME = 'a "repository" of 100% $HOME \\'


@pytest.fixture
def session(tmp_path: Path) -> Iterator[libvirt_cbt.Session]:
    with libvirt_cbt.Session(None, str(tmp_path / NAME)) as made:
        libvirt_cbt.init(made)
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "units"


def install(session: libvirt_cbt.Session, folder: Path, *options: str, **more: Any) -> results.TimerInstalled:
    return timers.install(session, options, directory=str(folder), **more)


def parsed(path: str) -> Dict[str, Dict[str, str]]:
    found = configparser.RawConfigParser(delimiters="=", comment_prefixes="#", inline_comment_prefixes=None)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    assert found.read(path, encoding="utf-8")
    return {section: dict(found[section]) for section in found.sections()}


def argv(service: Dict[str, str]) -> List[str]:
    """As systemd splits a command line."""
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(service["ExecStart"])]


def verified(*paths: str) -> None:
    """systemd has nothing against these units; what it thinks of others of this machine is not asked."""
    analyze = shutil.which("systemd-analyze")
    if not analyze:
        pytest.skip("systemd-analyze is not installed")
    command = [analyze, "verify", "--man=no", *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert [line for line in done.stderr.splitlines() if "libvirt-cbt" in line] == [], done.stderr


def test_systemd_takes_them(session: libvirt_cbt.Session, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "program", lambda: [shutil.which("true")])
    made = install(session, folder, "--config", "/etc/a $b.toml", environment={"LIBVIRT_CBT_RUN_DIR": "/x/$y", "PATH": "/z"})
    assert [os.path.basename(path) for path in made.files] == [made.timer, made.timer.replace(".timer", ".service")]
    assert made.next == [f"run `systemctl daemon-reload; systemctl enable --now {made.timer}`"]
    timer, service = (parsed(path) for path in made.files)
    assert timer["Timer"]["OnCalendar"] == timers.DAILY
    assert argv(service["Service"])[1:] == ["--config", "/etc/a $b.toml", "-r", session.path, "run"]
    assert service["Service"]["Environment"] == '"LIBVIRT_CBT_RUN_DIR=/x/$y"'  # where a dollar is a dollar
    assert "@" not in "".join(Path(path).read_text(encoding="utf-8") for path in made.files)
    verified(*made.files)


def test_systemd_takes_those_of_the_document(
    session: libvirt_cbt.Session, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "program", lambda: [shutil.which("true")])
    timer, service = install(session, folder).files
    blocks = re.findall("```ini\n(.*?)```", AUTOMATION.read_text(encoding="utf-8"), re.DOTALL)
    override, mail, own = (block.replace("/usr/local/bin/libvirt-cbt", "/bin/true") for block in blocks)
    Path(f"{service}.d").mkdir()
    Path(f"{service}.d", "override.conf").write_text(override, encoding="utf-8")
    assert "OnFailure=libvirt-cbt-mail@%n.service" in override
    (folder / "libvirt-cbt-mail@.service").write_text(mail, encoding="utf-8")
    (folder / "libvirt-cbt-own.service").write_text(own, encoding="utf-8")
    instance = folder / f"libvirt-cbt-mail@{Path(service).name}.service"
    verified(timer, service, str(instance), str(folder / "libvirt-cbt-own.service"))


def test_what_the_service_needs_is_not_shut_off(session: libvirt_cbt.Session, folder: Path) -> None:
    service = parsed(install(session, folder).files[1])["Service"]
    assert service["KillMode"] == "process"  # guards
    assert service["OOMPolicy"] == "continue"
    # Block devices (of which ProtectClock, too, leaves none), /tmp and /home, where images, sockets and keys may lie.
    shut = {"PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock", "PrivateTmp", "ProtectHome", "PrivateUsers"}
    assert not shut & set(service)
    assert service["ProtectSystem"] == "full"
    quoted = units.words([f"-{session.path}"])
    assert service["ReadWritePaths"] == quoted


def test_it_is_there_until_it_is_removed(session: libvirt_cbt.Session, folder: Path) -> None:
    assert timers.status(session, directory=str(folder)).state == "absent"
    made = install(session, folder)
    assert install(session, folder) == made  # safe to repeat
    found = timers.status(session, directory=str(folder))
    assert (found.state, found.files) == ("warning", made.files) and "not enabled" in found.detail
    wants = folder / "timers.target.wants"
    wants.mkdir()
    (wants / made.timer).symlink_to(made.files[0])
    assert timers.status(session, directory=str(folder)).state == "ok"
    other = folder / "other.service"
    other.touch()
    gone = timers.remove(session, directory=str(folder))
    assert gone.files == made.files and f"systemctl disable --now {made.timer}" in gone.next[0]
    assert sorted(os.listdir(folder)) == ["other.service", "timers.target.wants"]
    assert timers.remove(session, directory=str(folder)).files == []


def test_what_is_wrong_is_told(session: libvirt_cbt.Session, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "program", lambda: ["/no/such/libvirt-cbt"])
    timer, service = (Path(path) for path in install(session, folder).files)
    timer.write_text(timer.read_text(encoding="utf-8").replace("Persistent=true", "Persistent=false"), encoding="utf-8")
    detail = timers.status(session, directory=str(folder)).detail
    assert "run-" in detail and "is of another release" in detail and "/no/such/libvirt-cbt is not there" in detail
    service.unlink()
    assert f"{service} is missing" in timers.status(session, directory=str(folder)).detail
    service.write_text("[Service]\n", encoding="utf-8")
    with pytest.raises(errors.TargetExists):
        install(session, folder)
    assert timers.remove(session, directory=str(folder)).files == [str(timer)]


@pytest.mark.parametrize("calendar", ["", " ", "02:00\nPersistent=false", "noon or so"])
def test_what_is_no_calendar(session: libvirt_cbt.Session, folder: Path, calendar: str) -> None:
    if calendar == "noon or so" and not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    with pytest.raises(errors.Usage):
        install(session, folder, calendar=calendar)
    assert not folder.exists()


def test_a_repository_whose_name_would_be_lines_of_a_unit(folder: Path, tmp_path: Path) -> None:
    with libvirt_cbt.Session(None, str(tmp_path / "a\nExecStart=evil")) as session:
        libvirt_cbt.init(session)
        with pytest.raises(errors.Usage, match="cannot be in a unit"):
            install(session, folder)
    assert not folder.exists()


def test_where_systemd_does_not_run(session: libvirt_cbt.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "BOOTED", "/no/such/place")
    for call in (timers.install, timers.remove, timers.status):
        with pytest.raises(errors.NotFound, match="systemd does not run here"):
            call(session)
