"""A disk that QEMU encrypts (LUKS in qcow2, the passphrase a libvirt secret): in plaintext only when that is asked for."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Iterator

import libvirt
import pytest
from lxml import etree

from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Tool, models, same

PASSPHRASE = "correct horse battery staple"
SECRET = "5ec7e700-1234-4321-8888-0123456789ab"


class Sealed(PlainGuest):
    """Its vda is encrypted, its vdb is not."""

    def __init__(self, host: daemon.Daemon, image: Path) -> None:
        super().__init__(host, "sealed", [Disk("vdb", MIB)])
        path = os.path.join(self.folder, "vda.qcow2")
        shutil.copyfile(image, path)
        self._adopt(Disk("vda", 4 * MIB, path=path, model=bytearray(4 * MIB)))

    def xml(self) -> str:
        tree = etree.fromstring(super().xml())
        source = tree.find("devices/disk/target[@dev='vda']/../source")
        assert source is not None
        encryption = etree.SubElement(source, "encryption", format="luks")
        etree.SubElement(encryption, "secret", type="passphrase", uuid=SECRET)
        return etree.tostring(tree, encoding="unicode")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests: how often a key is to be hashed takes seconds to find out."""
    path = tmp_path_factory.mktemp("sealed") / "vda.qcow2"
    key = f"secret,id=key,data={PASSPHRASE}"
    luks = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "--object", key, "-o", luks, str(path), str(4 * MIB)]
    subprocess.run(argv, check=True)
    return path


@pytest.fixture
def guest(libvirtd: daemon.Daemon, image: Path) -> Iterator[PlainGuest]:
    definition = f"<secret ephemeral='yes' private='yes'><uuid>{SECRET}</uuid></secret>"
    secret = libvirtd.connection.secretDefineXML(definition)
    secret.setValue(PASSPHRASE.encode())
    try:
        with Sealed(libvirtd, image) as made:
            made.define()
            made.start()
            yield made
    finally:
        libvirtd.connection.secretLookupByUUIDString(SECRET).undefine()


def refused(tool: Tool, guest: PlainGuest, *command: str) -> None:
    ended = tool.run(*command)
    assert (ended.code, ended.document["error"]["kind"]) == (2, "WouldBePlaintext")
    assert "vda" in ended.stderr and "--allow-plaintext" in ended.stderr
    assert tool.run("list").document["results"] == []
    tool.nothing_left(guest, checkpoints=0)


def stored(tool: Tool) -> bytes:
    return b"".join(p.read_bytes() for p in Path(tool.repository).rglob("*") if p.is_file())


def test_it_is_refused_unless_plaintext_is_asked_for(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    mark = b"the owner of this line wants it encrypted".ljust(512)
    for target in guest.disks:
        guest.random_writes(rng, target, 6)
    guest.write_bytes("vda", 65536, mark)
    assert mark not in Path(guest.disks["vda"].path).read_bytes(), "the image is encrypted"
    before = [sorted(os.listdir(guest.folder)), guest.domain.XMLDesc(0)]
    for command in (["backup"], ["backup", "--dry-run"], ["backup", "--disk", "vda"], ["mark"], ["start"]):
        refused(tool, guest, command[0], guest.name, *command[1:])
    assert [sorted(os.listdir(guest.folder)), guest.domain.XMLDesc(0)] == before
    # Left out it does not even take part: a scratch file would hold what the guest overwrites, decrypted.
    made = tool.backup(guest, "--exclude", "vda", "--compress", "none")
    assert [d["target"] for d in made["disks"]] == ["vdb"]
    assert [u["target"] for u in made["unprotected"]] == ["vda"]
    assert mark not in stored(tool) and PASSPHRASE.encode() not in stored(tool)
    ended = tool.run("changed", guest.name, "vdb", "--since", "1", "--live", "--scratch-dir", tool.host.scratch)
    assert ended.document["error"]["kind"] == "WouldBePlaintext"
    # Asked for, it is as any other, and says what it is.
    made = tool.backup(guest, "--allow-plaintext", "--compress", "none")
    assert any("vda" in w and "plaintext" in w for w in made["warnings"])
    assert mark in stored(tool) and PASSPHRASE.encode() not in stored(tool)
    guest.random_writes(rng, "vda", 6)
    live = ["--since", "2", "--live", "--allow-plaintext", "--scratch-dir", tool.host.scratch]
    tool.run("changed", guest.name, "vda", *live).result  # noqa: B018
    made = tool.backup(guest, "--allow-plaintext")
    assert {d["mode"] for d in made["disks"]} == {"incremental"}
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    for verb in ("mark", "start"):
        tool.run(verb, guest.name, "--allow-plaintext", "--scratch-dir", tool.host.scratch).result  # noqa: B018
    tool.run("stop", guest.name).result  # noqa: B018
    # Tracking goes on while it is left out, if scratch files may hold it.
    tool.backup(guest, "--exclude", "vda", "--allow-plaintext")
    made = tool.backup(guest, "--allow-plaintext")
    assert {d["mode"] for d in made["disks"]} == {"incremental"}
    doctor = tool.run("doctor", guest.name).result
    assert any("--allow-plaintext" in check["detail"] for check in doctor["checks"])


def test_what_lies_below_an_overlay_counts_too(tool: Tool, guest: PlainGuest) -> None:
    """After an external snapshot the new image is plain, and most of the disk is still in the encrypted one."""
    row = f"<disk name='vda' snapshot='external'><source file='{guest.folder}/over.qcow2'/></disk>"
    xml = f"<domainsnapshot><disks>{row}<disk name='vdb' snapshot='no'/></disks></domainsnapshot>"
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    guest.domain.snapshotCreateXML(xml, flags)
    assert guest.domain.XMLDesc(0).index("<encryption") > guest.domain.XMLDesc(0).index("<backingStore")
    refused(tool, guest, "backup", guest.name)


def test_a_guest_that_is_off_keeps_its_secret(tool: Tool, guest: PlainGuest) -> None:
    """Only libvirt has the key then; it is not asked for."""
    guest.destroy()
    for more in ([], ["--allow-plaintext"]):
        ended = tool.run("backup", guest.name, *more)
        assert (ended.code, ended.document["error"]["kind"]) == (20, "ImageUnreadable")
        assert "encrypted" in ended.stderr
    assert [d["target"] for d in tool.backup(guest, "--exclude", "vda")["disks"]] == ["vdb"]
