"""An OpenStack instance and its volumes are named on the command line as OpenStack names them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Callable

import libvirt

from tests.guests import daemon, nova, plain
from tests.libvirt import tool as tools

VOLUME = "a4d3a0a5-3c0f-4f0c-9f52-1c0f8d3a6f6e"


def called(guest: plain.PlainGuest, name: str) -> None:
    """Nova changes the metadata of a running instance as well."""
    flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG | (libvirt.VIR_DOMAIN_AFFECT_LIVE if guest.running else 0)
    namespace = f"{nova.NAMESPACE}1.1"
    # libvirt puts the namespace in itself, and takes no document that has one.
    bare = nova.instance(name).replace(f' xmlns:nova="{namespace}"', "").replace("nova:", "")
    guest.domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, bare, "nova", namespace, flags)


def test_an_instance_by_its_name_and_a_volume_by_its_id(
    libvirtd: daemon.Daemon, plain_guest: Callable[..., plain.PlainGuest], tmp_path: Path, rng: random.Random
) -> None:
    guest = plain_guest(plain.Disk("vda"), plain.Disk("vdb", serial=VOLUME), name="instance-0000002a")
    called(guest, "Webshop 1")
    tool = tools.Tool(libvirtd, str(tmp_path / "repo"))
    assert tool.run("backup", "Webshop 2").code == 10
    assert tool.run("backup", "Webshop 1", "--disk", "a-volume-of-another").document["error"]["kind"] == "NoSuchDisk"
    made = tool.run("backup", "Webshop 1", "--exclude", VOLUME).result
    assert {d["target"]: d["mode"] for d in made["disks"]} == {"vda": "full", "vdb": "mark"}
    guest.random_writes(rng, "vdb", 5)
    made = tool.run("backup", guest.uuid, "--disk", VOLUME).result
    assert {d["target"]: d["mode"] for d in made["disks"]} == {"vda": "mark", "vdb": "full"}
    found = tool.run("changed", "Webshop 1", VOLUME, "--since", "1").result
    assert found["target"] == "vdb" and found["extents"]
    tool.run("restore", "Webshop 1", "--disk", VOLUME, "--output", str(tmp_path / "out")).result  # noqa: B018
    assert (tmp_path / "out" / "vdb.raw").read_bytes() == guest.disks["vdb"].model


def test_a_name_that_two_instances_have_is_refused(
    libvirtd: daemon.Daemon, plain_guest: Callable[..., plain.PlainGuest], tmp_path: Path
) -> None:
    guests = [plain_guest(plain.Disk("vda"), name=f"instance-0000000{n}", start=False) for n in range(2)]
    for guest in guests:
        called(guest, "twin")
    tool = tools.Tool(libvirtd, str(tmp_path / "repo"))
    ended = tool.run("backup", "twin")
    assert ended.code == 2
    assert all(guest.uuid in ended.stderr for guest in guests)
    called(guests[1], "instance-00000000")  # libvirt's own name comes first
    assert tool.run("backup", "instance-00000000").result["uuid"] == guests[0].uuid
