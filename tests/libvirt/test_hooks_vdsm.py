"""oVirt's hooks around real guests: run as vdsm runs them, by a user that is not root."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import libvirt
import pytest

import libvirt_cbt
from libvirt_cbt.hooks import installing
from tests.guests import plain
from tests.guests.vdsm import Vdsm
from tests.libvirt.tool import Tool, models, same

NOBODY = 65534
OPTED = {"libvirt_cbt": "1"}
OVIRT = "8c4ac0a3-3b1f-4b4e-9a0e-3f2f0f2c9a11"  # oVirt's checkpoints are called by a UUID


@pytest.fixture
def vdsm(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vdsm]:
    """An oVirt host, as far as our hooks see one."""
    user = NOBODY if os.geteuid() == 0 else None
    folder = Path(tool.host.root, "vdsm-hooks")
    folder.mkdir(mode=0o755)
    for name, value in tool.host.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(installing, "_vdsm", lambda: (NOBODY, NOBODY) if user else (os.geteuid(), os.getegid()))
    with libvirt_cbt.Session(repository=tool.repository) as session:
        installing.install(session, "vdsm", directory=str(folder), unit_dir="")
        yield Vdsm(folder, user)
        installing.remove(session, "vdsm", directory=str(folder), unit_dir="")
    for event in folder.iterdir():
        event.rmdir()
    folder.rmdir()


def recovered(tool: Tool) -> Dict[str, Any]:
    ended = tool.run("recover", "--noted")
    assert ended.code == 0, ended.stderr
    return {one["domain"]: one["actions"] for one in ended.document["results"]}


def checkpoints(guest: plain.PlainGuest) -> List[str]:
    return sorted(checkpoint.getName() for checkpoint in guest.domain.listAllCheckpoints())


def test_what_ovirt_does_is_looked_into_and_its_checkpoints_are_left_alone(
    tool: Tool, vdsm: Vdsm, plain_guest: Callable[..., plain.PlainGuest], tmp_path: Path, rng: random.Random
) -> None:
    guest, other = plain_guest(plain.Disk("vda"), name="opted"), plain_guest(plain.Disk("vda"), name="not")
    guest.domain.checkpointCreateXML(f"<domaincheckpoint><name>{OVIRT}</name></domaincheckpoint>")
    ours = tool.backup(guest)["checkpoint"]
    tool.backup(other)

    def event(name: str, of: plain.PlainGuest = guest, xml: str = "", **custom: str) -> None:
        raises = name.startswith("before_")
        vdsm.run(name, xml or of.domain.XMLDesc(), custom or OPTED, vm_id=of.uuid, raises=raises)
        assert vdsm.said[-1][1:] == (0, "")

    # A VM that comes up on another host: libvirt there knows no checkpoint.
    guest.domain.checkpointLookupByName(ours).delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    event("after_vm_start", other, libvirt_cbt="0")
    assert recovered(tool) == {}
    for name in ("before_vm_migrate_destination", "after_vm_migrate_destination"):
        event(name)
    assert recovered(tool) == {"opted": [f"gave checkpoint {ours} of generation 1 back to libvirt"]}
    assert checkpoints(guest) == sorted([OVIRT, ours])
    # A disk is plugged in; what is there goes on, the new one begins with the next backup.
    guest.random_writes(rng, "vda", 5)
    guest.attach(plain.Disk("vdb"))
    event("after_disk_hotplug", xml="<disk type='file'><target dev='vdb'/></disk>")
    assert recovered(tool) == {"opted": []}
    made = tool.backup(guest)
    assert {disk["target"]: disk["mode"] for disk in made["disks"]} == {"vda": "incremental", "vdb": "full"}
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    assert checkpoints(guest) == sorted([OVIRT, made["checkpoint"]])
    # It leaves, and is destroyed; nothing is left to be looked into.
    for name in ("before_vm_migrate_source", "after_vm_migrate_source", "after_disk_hotunplug", "after_vm_destroy"):
        event(name)
    guest.destroy()
    assert recovered(tool) == {"opted": []}
    assert recovered(tool) == {}
    guest.start()
    event("after_vm_start")
    assert recovered(tool) == {"opted": []}
    assert checkpoints(guest) == sorted([OVIRT, made["checkpoint"]])
    guest.domain.checkpointLookupByName(OVIRT).delete()
    assert tool.backup(guest)["disks"][0]["mode"] == "incremental"
