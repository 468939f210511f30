"""Rows 15 to 18 of the faults: disks that change their size or place, that cannot be tracked, or are written unseen."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Callable, Final

import libvirt
import pytest
from lxml import etree

from tests.faults import lineages
from tests.faults.lineages import Kept, block_copy, two, wait_for
from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest

ODD: Final = MIB + 3 * 512  # ends inside a cluster, and inside a grain


@pytest.fixture
def keep(
    libvirtd: daemon.Daemon, plain_guest: Callable[..., PlainGuest], tmp_path: Path, rng: random.Random
) -> Callable[..., Kept]:
    return lineages.maker(libvirtd, plain_guest, tmp_path, rng)


# 15: sizes


def shrink(guest: PlainGuest, target: str, size: int) -> None:
    guest.domain.blockResize(target, size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    guest.disks[target].size = size
    del guest.disks[target].model[size:]


@pytest.mark.fault(15)
def test_growth_keeps_the_lineage(keep: Callable[..., Kept]) -> None:
    kept = keep(Disk("vda", MIB), Disk("vdb", 700 * 512, options=("cluster_size=512",)))
    for size in (ODD, 2 * MIB - 512, 2 * MIB + 5 * 65536):
        for target in kept.guest.disks:
            kept.guest.grow(target, size)
            kept.guest.write(target, size - 1024, 1024, 0x33)
        kept.write()
        assert kept.modes() == {"vda": "incremental", "vdb": "incremental"}
    kept.guest.destroy()
    for target, disk in kept.guest.disks.items():
        size = 3 * MIB + 7 * 512
        subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", disk.path, str(size)], check=True)
        disk.model.extend(bytes(size - disk.size))
        disk.size = size
        kept.unbroken(target, 1, 4)
    kept.guest.start()
    kept.write()
    assert kept.modes() == {"vda": "incremental", "vdb": "incremental"}


def _reappeared(guest: PlainGuest, target: str, end: int) -> bytes:
    """What the guest reads past the old `end` of a disk that shrank and has grown; the model learns it.

    QEMU neither zeroes nor forgets the rest of the last cluster of a qcow2 image that shrinks: growth shows it again.
    """
    rest = guest.read_back(target)[end : end - end % 65536 + 65536]
    guest.disks[target].model[end : end + len(rest)] = rest
    return rest


@pytest.mark.fault(15)
@pytest.mark.parametrize("stale", [True, False])
@pytest.mark.parametrize("where", ["live", "off"])
def test_a_disk_that_shrank_begins_a_new_lineage(keep: Callable[..., Kept], where: str, stale: bool) -> None:
    kept = keep(Disk("vda", 2 * MIB), Disk("vdb", MIB))
    kept.guest.write("vda", ODD - 512, 65536, 0x55 if stale else 0)
    if where == "live":
        shrink(kept.guest, "vda", ODD)
    else:
        kept.guest.destroy()
        disk = kept.guest.disks["vda"]
        subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", disk.path, str(ODD)], check=True)
        disk.size = ODD
        del disk.model[ODD:]
        kept.guest.start()
    kept.write()
    made = kept.backup()
    assert {t: d["mode"] for t, d in made.items()} == {"vda": "full", "vdb": "incremental"}
    kept.broken("vda", 1, 2, f"^the disk shrank from {2 * MIB} to {ODD} bytes$")
    kept.guest.grow("vda", 2 * MIB)
    assert any(_reappeared(kept.guest, "vda", ODD)) is stale
    if where == "live":
        assert kept.tool.run("mark", kept.guest.name).result["generation"] == 3
    kept.write()
    assert kept.modes(audit=True) == {"vda": "incremental", "vdb": "incremental"}
    told = kept.tool.run("changed", kept.guest.name, "vda", "--since", "2", "--start-offset", str(ODD)).result["extents"]
    assert told[0]["offset"] == ODD


@pytest.mark.fault(15)
def test_a_disk_that_shrank_and_grew_back_between_two_generations(keep: Callable[..., Kept]) -> None:
    kept = keep(Disk("vda", 2 * MIB), first=False)
    kept.guest.write("vda", MIB, MIB, 0x44)
    kept.backup()
    shrink(kept.guest, "vda", MIB)
    kept.guest.grow("vda", 2 * MIB)
    made = kept.tool.backup(kept.guest)["disks"][0]
    assert (made["mode"], made["dirty_bytes"]) == ("incremental", 0)  # the limit that the documents name
    only_an_audit_sees_it(kept)


# 16: disks that come, go and change places


@pytest.mark.fault(16)
def test_a_disk_that_is_plugged_in_is_full_and_the_others_go_on(keep: Callable[..., Kept]) -> None:
    kept = keep()
    kept.guest.attach(Disk("vdb", MIB))
    kept.write()
    made = kept.backup()
    assert {t: d["mode"] for t, d in made.items()} == {"vda": "incremental", "vdb": "full"}
    assert made["vdb"]["reason"] == "first backup of this disk"
    ended = kept.tool.run("changed", kept.guest.name, "vdb", "--since", "1")
    assert (ended.code, ended.document["error"]["kind"]) == (12, "LineageBroken")
    # Away over a generation, and back: what happened to it meanwhile nobody knows.
    kept.guest.destroy()
    gone = kept.guest.detach("vdb")
    kept.guest.start()
    assert kept.modes() == {"vda": "incremental"}
    kept.guest.destroy()
    kept.guest.attach(gone)
    kept.guest.start()
    kept.write()
    made = kept.backup(orphans=1)
    assert {t: d["mode"] for t, d in made.items()} == {"vda": "incremental", "vdb": "full"}
    assert made["vdb"]["reason"] == "generation 3 does not have disk vdb; the last that has it is 2"
    ended = kept.tool.run("changed", kept.guest.name, "vdb", "--since", "2")
    assert (ended.code, ended.document["error"]["until_lineage"]) == (12, made["vdb"]["change_id"][5:41])
    assert "generation 3 does not have this disk" in ended.stderr
    assert kept.modes(orphans=0) == {"vda": "incremental", "vdb": "incremental"}


@pytest.mark.fault(16)
def test_a_disk_that_was_away_between_two_generations(keep: Callable[..., Kept]) -> None:
    kept = keep(*two())
    kept.guest.destroy()
    gone = kept.guest.detach("vdb")
    kept.guest.start()
    kept.write()
    kept.guest.destroy()
    kept.guest.attach(gone)
    kept.guest.start()
    kept.write()
    assert kept.modes() == {"vda": "incremental", "vdb": "incremental"}


@pytest.mark.fault(16)
@pytest.mark.parametrize("other", ["new", "copy of another disk", "the other disk", "same file, other serial"])
def test_a_target_that_is_used_for_another_disk(keep: Callable[..., Kept], other: str) -> None:
    kept = keep(*two())
    guest = kept.guest
    guest.destroy()
    vda, vdb = guest.disks["vda"], guest.disks["vdb"]
    was = vdb.path
    if other == "new":
        vdb.path += ".new"
        vdb.create()
        vdb.model[:] = bytes(vdb.size)
        reason = f"bitmap of generation 1 is missing or broken in {vdb.path} .the disk was {was} then"
    elif other == "copy of another disk":
        vdb.path += ".new"
        shutil.copyfile(vda.path, vdb.path)
        vdb.model[:] = vda.model
        reason = f"its image is {vdb.path} and was {was} in generation 1: .*no copy of disk vda"
    elif other == "the other disk":
        vda.path, vdb.path = vdb.path, vda.path
        vda.model, vdb.model = vdb.model, vda.model
        reason = "this image was disk vda in generation 1, now it is disk vdb"
    else:
        vdb.serial = "2-of-2"
        reason = "serial changed from none to 2-of-2"
    guest.define()
    guest.start()
    kept.write()
    made = kept.backup()
    swapped = other == "the other disk"
    assert {t: d["mode"] for t, d in made.items()} == {"vda": "full" if swapped else "incremental", "vdb": "full"}
    kept.broken("vdb", 1, 2, reason)
    kept.write()
    assert kept.modes() == {"vda": "incremental", "vdb": "incremental"}


@pytest.mark.fault(16)
def test_an_image_under_another_target(keep: Callable[..., Kept]) -> None:
    kept = keep(*two())
    guest = kept.guest
    guest.destroy()
    moved = guest.detach("vdb")
    moved.target = "vdc"
    guest.attach(moved)
    guest.start()
    kept.write()
    made = kept.backup(orphans=1)
    assert {t: d["mode"] for t, d in made.items()} == {"vda": "incremental", "vdc": "full"}
    assert kept.modes(orphans=0) == {"vda": "incremental", "vdc": "incremental"}


@pytest.mark.fault(12, 16)
def test_a_block_copy_of_one_disk_of_two_cannot_be_told_from_a_copy_of_the_other(keep: Callable[..., Kept]) -> None:
    kept = keep(*two())
    block_copy(kept.guest, "vdb")
    kept.write()
    made = kept.backup()
    assert {t: d["mode"] for t, d in made.items()} == {"vda": "incremental", "vdb": "full"}
    kept.broken("vdb", 1, 2, "that it is no copy of disk vda cannot be proved")
    kept.write()
    assert kept.modes() == {"vda": "incremental", "vdb": "incremental"}


@pytest.mark.fault(1, 16)
def test_the_query_across_a_qemu_that_died(keep: Callable[..., Kept]) -> None:
    kept = keep()
    kept.guest.flush("vda")
    kept.guest.kill()
    kept.guest.start()
    assert kept.modes() == {"vda": "full"}
    kept.broken("vda", 1, 2, "bitmap of generation 1 is missing or broken")
    everything = kept.tool.run("changed", kept.guest.name, "vda", "--since", "*").result
    assert everything["since"] is None


# 17: kinds of disks


class _Tagged(Disk):
    """A disk with one more element, such as <readonly/>, or another device."""

    def xml(self) -> etree._Element:
        row = super().xml()
        kind = {"vdc": "readonly", "vdd": "shareable", "vde": "transient"}.get(self.target)
        if kind:
            etree.SubElement(row, kind)
        if kind == "shareable":
            part(row, "driver").set("cache", "none")
        if self.target.startswith("hd"):
            row.set("device", "cdrom")
            part(row, "target").set("bus", "ide")
            row.remove(part(row, "alias"))
            if self.serial == "empty":
                row.remove(part(row, "serial"))
                row.remove(part(row, "source"))
        return row


def part(row: etree._Element, name: str) -> etree._Element:
    found = row.find(name)
    assert found is not None
    return found


@pytest.mark.fault(17)
def test_every_disk_is_tracked_or_full_each_time_or_not_protected_and_that_is_said(keep: Callable[..., Kept]) -> None:
    kept = keep(
        Disk("vda", MIB),
        Disk("vdb", MIB, fmt="raw"),
        _Tagged("vdc", MIB),
        _Tagged("vdd", MIB, fmt="raw"),
        _Tagged("vde", MIB),
        Disk("vdf", MIB, options=("compat=0.10",)),
        _Tagged("hda", MIB, fmt="raw"),
        _Tagged("hdb", MIB, fmt="raw", serial="empty"),
        first=False,
    )
    for _ in range(2):
        for target in ("vda", "vdb", "vdf"):
            kept.write(target)
        made = kept.backup()
    reasons = {target: (d["mode"], d["reason"] or "") for target, d in made.items()}
    assert reasons["vda"] == ("incremental", "")
    assert reasons["vdb"] == ("full", "a raw image cannot hold a bitmap")
    assert reasons["vdf"][0] == "full"
    assert "version 2" in reasons["vdf"][1]
    made_by_command = kept.tool.backup(kept.guest)
    left_out = {u["target"]: u["reason"] for u in made_by_command["unprotected"]}
    assert set(left_out) == {"vdc", "vdd", "vde", "hda", "hdb"}
    for target, word in (("vdc", "read-only"), ("vdd", "shareable"), ("vde", "transient"), ("hda", "cdrom")):
        assert word in left_out[target]
    _require_all(kept)


def _require_all(kept: Kept) -> None:
    name = kept.guest.name
    before = kept.checkpoints()
    refused = kept.tool.run("backup", name, "--require-all")
    assert (refused.code, refused.document["error"]["kind"]) == (2, "DiskUnprotected")
    for target in ("vdc", "vdd", "vde", "hda"):
        assert f"{target}: " in refused.document["error"]["disks"]
    assert "hdb" not in refused.document["error"]["disks"]  # nothing is in that drive
    assert kept.tool.run("backup", name, "--require-all", "--dry-run").code == 2
    assert kept.checkpoints() == before
    assert len(kept.tool.run("list", name).result["generations"]) == 3
    assert kept.modes(require_all=True, exclude=["vdc", "vdd", "vde", "hda"])["vda"] == "incremental"
    assert kept.modes(require_all=True, disks=["vda"])["vda"] == "incremental"


class _Network(Disk):
    """The same disk over NBD."""

    def xml(self) -> etree._Element:
        row = super().xml()
        row.set("type", "network")
        source = part(row, "source")
        source.attrib.clear()
        source.set("protocol", "nbd")
        source.set("name", self.target)
        etree.SubElement(source, "host", transport="unix", socket=f"{self.path}.sock")
        return row


@pytest.mark.fault(17)
def test_a_network_disk_is_backed_up_and_tracked_by_its_format(
    keep: Callable[..., Kept], libvirtd: daemon.Daemon
) -> None:
    folder = os.path.join(libvirtd.images, "network")
    os.mkdir(folder)
    os.chmod(folder, 0o777)
    servers = []
    disks = []
    try:
        for target, fmt in (("vda", "qcow2"), ("vdb", "raw")):
            disk = _Network(target, MIB, fmt=fmt, path=os.path.join(folder, target))
            disk.create()
            with open(disk.path, "r+b") as image:
                image.truncate(8 * MIB if fmt == "qcow2" else MIB)  # an export does not grow: there must be room
            disk.model = bytearray(MIB)
            argv = ["qemu-nbd", "-f", "raw", "-t", "-e", "4", "-x", target, "-k", f"{disk.path}.sock", disk.path]
            servers.append(subprocess.Popen(argv))
            wait_for(partial(os.path.exists, f"{disk.path}.sock"))
            os.chmod(f"{disk.path}.sock", 0o777)
            disks.append(disk)
        kept = keep(*disks)
        made = kept.backup()
        assert {t: d["mode"] for t, d in made.items()} == {"vda": "incremental", "vdb": "full"}
        kept.lose_metadata()
        kept.write()
        assert kept.modes() == {"vda": "incremental", "vdb": "full"}
        kept.guest.destroy()
        kept.guest.start()
        kept.write()
        assert kept.modes() == {"vda": "incremental", "vdb": "full"}
        kept.guest.destroy()
    finally:
        for server in servers:
            server.kill()
            server.wait()
        shutil.rmtree(folder)


# 18: written behind QEMU's back


@pytest.mark.fault(18)
def test_what_is_written_behind_qemus_back_only_a_full_read_sees(keep: Callable[..., Kept], tmp_path: Path) -> None:
    kept = keep(first=False)
    guest = kept.guest
    guest.destroy()
    disk = guest.disks["vda"]
    data = os.path.join(guest.folder, "vda.data")
    disk.options = (f"data_file={data}", "data_file_raw=on")
    os.unlink(disk.path)
    disk.create()
    os.chown(data, *guest.host.qemu_ids)
    guest.start()
    kept.write()
    kept.backup()
    kept.write()
    guest.write("vda", 256 * 1024, 128 * 1024, 0x11)  # where the guest has zeroed, the file's content is not looked at
    assert kept.modes() == {"vda": "incremental"}
    guest.destroy()
    with open(data, "r+b") as file:
        file.seek(300 * 1024)
        file.write(b"\x77" * 4096)
    guest.start()
    assert kept.modes() == {"vda": "incremental"}  # nobody told QEMU, so nobody knows
    disk.model[300 * 1024 : 304 * 1024] = b"\x77" * 4096
    only_an_audit_sees_it(kept)


def only_an_audit_sees_it(kept: Kept) -> None:
    """What the newest backup lacks is found by an audit, and stored by it when asked."""
    audited = kept.tool.run("backup", kept.guest.name, "--audit")
    assert (audited.code, audited.document["error"]["kind"]) == (16, "AuditFailed")
    assert kept.modes(audit=True, heal=True) == dict.fromkeys(kept.guest.disks, "incremental")
