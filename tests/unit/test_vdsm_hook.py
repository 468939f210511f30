"""vdsm's hooks, run as vdsm runs them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Final, List

import pytest

from libvirt_cbt import spool
from libvirt_cbt.hooks import installing
from tests.guests.vdsm import HookError, Vdsm

UUID: Final = "0123abcd-0123-4567-89ab-0123456789ab"
DOMAIN: Final = f"<domain><name>vm</name><uuid>{UUID}</uuid></domain>"
DISK: Final = "<disk type='block'><source dev='/rhev/x'/><target dev='sdb'/><serial>1</serial></disk>"
OPTED: Final = {"libvirt_cbt": "1"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "spool" / "vdsm").mkdir(parents=True)
    return tmp_path / "spool"


@pytest.fixture
def vdsm(tmp_path: Path, place: Path) -> Vdsm:
    folder = tmp_path / "hooks"
    text = (resources.files("libvirt_cbt.hooks") / "files" / "vdsm").read_text()
    for event in installing.EVENTS:
        path = folder / event / "50_libvirt_cbt"
        path.parent.mkdir(parents=True)
        path.write_text(text.replace('SPOOL = ""', f"SPOOL = {str(place / 'vdsm')!r}"))
        path.chmod(0o755)
    return Vdsm(folder)


def noted(place: Path) -> List[str]:
    found = sorted(path.name for path in (place / "vdsm").iterdir())
    for path in (place / "vdsm").iterdir():
        path.unlink()
    return found


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ("after_vm_start", "started"),
        ("before_vm_migrate_source", "leaving"),
        ("after_vm_migrate_source", "stopped"),
        ("before_vm_migrate_destination", "arriving"),
        ("after_vm_migrate_destination", "started"),
        ("after_vm_destroy", "stopped"),
        ("after_disk_hotplug", "plugged"),
        ("after_disk_hotunplug", "unplugged"),
    ],
)
def test_every_event_of_a_vm_that_opted_in_is_noted(vdsm: Vdsm, place: Path, event: str, kind: str) -> None:
    xml = DISK if "disk" in event else DOMAIN
    raises = event.startswith("before_")
    assert vdsm.run(event, xml, OPTED, vm_id=UUID, raises=raises) == xml  # the document is not changed
    assert noted(place) == [f"{UUID}.{kind}"]
    assert kind in spool.KINDS[spool.VDSM]
    for custom in ({}, {"libvirt_cbt": "0"}, {"libvirt_cbt": "false"}, {"libvirt_cbt": ""}, {"Libvirt_CBT": "1"}):
        assert vdsm.run(event, xml, custom, vm_id=UUID, raises=raises) == xml
    assert noted(place) == []
    assert all(code == 0 and not error for _, code, error in vdsm.said)


def test_the_uuid_is_the_vm_s_id_or_that_of_its_xml(vdsm: Vdsm, place: Path) -> None:
    vdsm.run("after_vm_start", DOMAIN.replace("0123abcd", "ffffffff"), OPTED, vm_id=UUID.upper())
    assert noted(place) == [f"{UUID}.started"]
    vdsm.run("after_vm_start", DOMAIN, {"libvirt_cbt": "True"})
    assert noted(place) == [f"{UUID}.started"]


@pytest.mark.parametrize(
    ("xml", "vm_id"), [("", ""), (DISK, ""), (DOMAIN.replace("-", "/"), ""), (DOMAIN, "../../etc/passwd"), ("\0", "")]
)
def test_what_cannot_be_noted_fails_and_stops_nothing(vdsm: Vdsm, place: Path, xml: str, vm_id: str) -> None:
    for event in installing.EVENTS:
        vdsm.run(event, xml, OPTED, vm_id=vm_id, raises=event.startswith("before_"))
    assert [code for _, code, _ in vdsm.said] == [0 if e.startswith("before_") else 1 for e in installing.EVENTS]
    assert all(error.startswith("libvirt-cbt: nothing is noted: ") for _, _, error in vdsm.said)
    assert noted(place) == []


def test_a_spool_that_is_not_there_ends_no_migration(vdsm: Vdsm, place: Path) -> None:
    (place / "vdsm").rmdir()
    for event in installing.EVENTS:
        vdsm.run(event, DOMAIN, OPTED, raises=event.startswith("before_"))
    assert {code for _, code, _ in vdsm.said} == {0, 1}


def test_a_hook_of_somebody_else_has_its_say(vdsm: Vdsm, place: Path) -> None:
    other = vdsm.folder / "before_vm_migrate_source" / "60_no"
    other.write_text("#!/bin/sh\nexit 2\n")
    other.chmod(0o755)
    with pytest.raises(HookError):
        vdsm.run("before_vm_migrate_source", DOMAIN, OPTED, raises=True)
    assert noted(place) == [f"{UUID}.leaving"]


def test_the_spool_is_bounded(vdsm: Vdsm, place: Path) -> None:
    for number in range(1000):
        (place / "vdsm" / f"{number:08x}-0000-0000-0000-000000000000.started").touch()
    vdsm.run("after_vm_start", DOMAIN, OPTED)
    assert "overflow" in noted(place)
