"""Whole backups of real guests, against the byte model of what they wrote."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
from lxml import etree

from tests.guests import daemon, plain
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Tool, models, same

SLOWLY = ("--bandwidth", "64K")  # a second: 8 MiB take two minutes on any machine


@pytest.fixture
def guest(libvirtd: daemon.Daemon) -> Iterator[PlainGuest]:
    disks = [
        Disk("vda", 8 * MIB),
        Disk("vdb", 3 * MIB + 17 * 512, options=("cluster_size=512",)),
    ]
    with PlainGuest(libvirtd, "plain", disks) as made:
        made.define()
        made.start()
        yield made


def test_every_generation_of_a_random_chain_restores_to_what_the_guest_held(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    kept = []
    for generation in range(1, 6):
        for target in guest.disks:
            guest.random_writes(rng, target, 12, discards=True)
        made = tool.backup(guest)
        assert made["generation"] == generation
        kept.append((made, models(guest)))
        tool.nothing_left(guest)
    assert [d["mode"] for d in kept[0][0]["disks"]] == ["full", "full"]
    for made, _ in kept[1:]:
        assert [d["mode"] for d in made["disks"]] == ["incremental", "incremental"]
        assert all(d["read_bytes"] == d["data_bytes"] for d in made["disks"])
    for made, held in kept:
        same(tool.restored(guest, str(made["generation"]), str(tmp_path)), held)
        same(tool.restored(guest, made["backup"], str(tmp_path)), held)
    assert tool.run("verify", guest.name).result["damage"] == []
    _opens_with_qemu_img(tool, guest, kept[-1][0]["backup"], kept[-1][1], tmp_path)


def _opens_with_qemu_img(tool: Tool, guest: PlainGuest, backup: str, held: Any, tmp_path: Path) -> None:
    for target, content in held.items():
        layer = os.path.join(tool.repository, guest.uuid, "backups", backup, f"{target}.qcow2")
        raw = str(tmp_path / f"{target}.raw")
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", layer], check=True)
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", layer, raw], check=True)
        same({target: Path(raw).read_bytes()}, held)
        assert len(content) == os.path.getsize(raw)


def test_restore_to_qcow2_stands_alone_and_the_domain_may_be_gone(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    guest.random_writes(rng, "vdb", 10)
    tool.backup(guest)
    guest.random_writes(rng, "vdb", 10)
    tool.backup(guest)
    held = models(guest)
    assert len(tool.run("untrack", guest.name).result["removed"]) == 1
    tool.nothing_left(guest, checkpoints=0)
    guest.remove()
    out = tmp_path / "out"
    tool.run("restore", "plain", "--format", "qcow2", "--output", str(out)).result  # noqa: B018
    for target, content in held.items():
        raw = str(tmp_path / f"{target}.raw")
        subprocess.run(
            ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(out / f"{target}.qcow2"), raw], check=True
        )
        same({target: Path(raw).read_bytes()}, {target: content})
        assert "backing" not in subprocess.check_output(
            ["qemu-img", "info", "-f", "qcow2", str(out / f"{target}.qcow2")], text=True
        )
    again = tool.run("restore", "plain", "--format", "qcow2", "--output", str(out))
    assert (again.code, again.document["error"]["kind"]) == (15, "TargetExists")


def test_left_out_disks_go_on_being_tracked_as_marks(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    guest.random_writes(rng, "vdb", 10)
    tool.backup(guest)
    for _ in range(2):
        guest.random_writes(rng, "vdb", 6, discards=True)
        made = tool.backup(guest, "--exclude", "vdb")
        assert {d["target"]: d["mode"] for d in made["disks"]} == {"vda": "incremental", "vdb": "mark"}
        assert [u["target"] for u in made["unprotected"]] == ["vdb"]
    guest.random_writes(rng, "vdb", 6)
    made = tool.backup(guest)
    vdb = next(d for d in made["disks"] if d["target"] == "vdb")
    assert (vdb["mode"], vdb["base"]) == ("incremental", 3)
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


def test_full_keeps_the_lineage(tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path) -> None:
    guest.random_writes(rng, "vda", 6)
    first = tool.backup(guest)
    guest.random_writes(rng, "vda", 6)
    second = tool.backup(guest, "--full")
    lineages = [d["change_id"].split("/")[0] for made in (first, second) for d in made["disks"]]
    assert lineages[:2] == lineages[2:]
    assert [d["mode"] for d in second["disks"]] == ["full", "full"]
    guest.random_writes(rng, "vda", 6)
    tool.backup(guest)
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


@pytest.mark.fault(1)
def test_a_power_cycle_keeps_the_chain_and_a_dead_qemu_begins_a_new_one(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    guest.random_writes(rng, "vda", 6)
    tool.backup(guest)
    guest.random_writes(rng, "vda", 6)
    guest.destroy()
    guest.start()
    guest.random_writes(rng, "vda", 6)
    made = tool.backup(guest)
    assert made["disks"][0]["mode"] == "incremental"
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    for target in guest.disks:
        guest.flush(target)  # what a guest has not flushed may be lost with its QEMU
    guest.kill()
    guest.start()
    guest.random_writes(rng, "vda", 6)
    made = tool.backup(guest)
    assert made["disks"][0]["mode"] == "full"
    assert "bitmap of generation 2 is missing or broken" in made["disks"][0]["reason"]
    assert any("copied in full" in w for w in made["warnings"])
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    tool.nothing_left(guest)


def test_a_new_lineage_goes_on_as_the_first_did(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    tool.backup(guest)
    assert len(tool.run("untrack", guest.name).result["removed"]) == 1
    for arguments, modes in (((), "full"), (("--full",), "full"), (("--exclude", "vdb"), "mark"), ((), "incremental")):
        guest.random_writes(rng, "vdb", 6)
        made = tool.backup(guest, *arguments)
        assert made["disks"][1]["mode"] == modes
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


class _Volume(Disk):
    """The same disk, named by pool and volume."""

    def xml(self) -> etree._Element:
        row = super().xml()
        row.set("type", "volume")
        source = row.find("source")
        assert source is not None
        source.attrib.clear()
        source.set("pool", "cbt")
        source.set("volume", os.path.basename(self.path))
        return row


def test_a_storage_volume_is_backed_up_like_a_file(
    tool: Tool, libvirtd: daemon.Daemon, rng: random.Random, tmp_path: Path
) -> None:
    disk = _Volume("vda", MIB)
    with PlainGuest(libvirtd, "volume", [disk]) as guest:
        pool = libvirtd.connection.storagePoolCreateXML(
            f"<pool type='dir'><name>cbt</name><target><path>{guest.folder}</path></target></pool>"
        )
        try:
            guest.define()
            guest.start()
            for mode in ("full", "incremental"):
                guest.random_writes(rng, "vda", 6)
                assert tool.backup(guest)["disks"][0]["mode"] == mode
                same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
        finally:
            guest.destroy()
            pool.destroy()


class _Block(Disk):
    """The same disk on a block device."""

    def xml(self) -> etree._Element:
        row = super().xml()
        row.set("type", "block")
        source = row.find("source")
        assert source is not None
        source.attrib.clear()
        source.set("dev", self.path)
        return row

    def create(self) -> None:
        backing = f"{self.path}.image"
        with open(backing, "wb") as file:
            file.truncate(8 * MIB)
        loop = subprocess.check_output(["losetup", "--find", "--show", backing], text=True).strip()
        # The private daemon has a /dev of its own: the same device under another name.
        os.mknod(self.path, 0o600 | stat.S_IFBLK, os.stat(loop).st_rdev)
        self.options = (loop,)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", self.path, str(self.size)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a loop device needs root")
def test_a_block_device_is_backed_up_like_a_file(
    tool: Tool, libvirtd: daemon.Daemon, rng: random.Random, tmp_path: Path
) -> None:
    disk = _Block("vda", MIB)
    with PlainGuest(libvirtd, "block", [disk]) as guest:
        try:
            guest.define()
            guest.start()
            for mode in ("full", "incremental"):
                guest.random_writes(rng, "vda", 6)
                assert tool.backup(guest)["disks"][0]["mode"] == mode
                same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
        finally:
            guest.destroy()
            subprocess.run(["losetup", "--detach", disk.options[0]], check=True)


def test_disks_that_changed_places_start_anew(
    tool: Tool, libvirtd: daemon.Daemon, rng: random.Random, tmp_path: Path
) -> None:
    with PlainGuest(libvirtd, "swap", [Disk("vda", MIB), Disk("vdb", MIB)]) as guest:
        guest.define()
        guest.start()
        guest.write("vda", 0, MIB, 0xAA)
        guest.write("vdb", 0, MIB, 0xBB)
        tool.backup(guest)
        guest.destroy()
        one, other = guest.disks["vda"], guest.disks["vdb"]
        one.path, other.path = other.path, one.path
        one.model, other.model = other.model, one.model
        guest.define()
        guest.start()
        made = tool.backup(guest)
        assert [d["mode"] for d in made["disks"]] == ["full", "full"]
        assert "was disk" in made["disks"][0]["reason"]
        same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


def test_untrackable_and_unprotected_disks_are_named_with_the_reason(
    tool: Tool, libvirtd: daemon.Daemon, rng: random.Random, tmp_path: Path
) -> None:
    disks = [Disk("vda", MIB), Disk("vdb", MIB, fmt="raw"), Disk("vdc", MIB, options=("compat=0.10",))]
    with PlainGuest(libvirtd, "kinds", disks) as guest:
        guest.define()
        guest.start()
        for _ in range(2):
            for target in guest.disks:
                guest.random_writes(rng, target, 4)
            made = tool.backup(guest)
        modes = {d["target"]: (d["mode"], d["reason"]) for d in made["disks"]}
        assert modes["vda"] == ("incremental", None)
        assert modes["vdb"] == ("full", "a raw image cannot hold a bitmap")
        assert modes["vdc"][0] == "full"
        assert "version 2" in modes["vdc"][1]
        same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
        seen = tool.run("doctor", guest.name).result
        assert {d["target"]: d["tracked"] for d in seen["disks"]} == {"vda": True, "vdb": False, "vdc": False}


def test_a_dry_run_estimates_and_changes_nothing(tool: Tool, guest: PlainGuest) -> None:
    guest.write("vda", 0, 2 * MIB, 1)
    tool.backup(guest)
    guest.write("vda", MIB, 3 * 65536, 2)
    made = tool.backup(guest, "--dry-run")
    vda = made["disks"][0]
    assert (made["backup"], made["dry_run"], vda["mode"], vda["dirty_bytes"]) == (None, True, "incremental", 3 * 65536)
    assert len(tool.run("list", guest.name).result["generations"]) == 1
    tool.nothing_left(guest)
    assert tool.run("status", guest.name).result["disks"][0]["dirty_bytes"] == 3 * 65536


def _job_began(guest: PlainGuest) -> None:
    deadline = time.monotonic() + 30
    while not guest.has_job:
        assert time.monotonic() < deadline, "no job began"
        time.sleep(0.002)


def test_a_killed_run_is_cleaned_up_by_the_next_one_which_is_an_increment(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    guest.random_writes(rng, "vda", 6)
    tool.backup(guest)
    for _ in range(3):
        guest.write_bytes("vda", 0, rng.getrandbits(8 * 4 * MIB).to_bytes(4 * MIB, "little"))
        process = tool.start("backup", guest.name)
        _job_began(guest)
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.wait()
    made = tool.backup(guest)
    assert made["disks"][0]["mode"] == "incremental"
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    tool.nothing_left(guest)
    assert tool.run("recover", guest.name).result["actions"] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_cleanly(
    tool: Tool, guest: PlainGuest, rng: random.Random, number: signal.Signals
) -> None:
    guest.write_bytes("vda", 0, rng.getrandbits(8 * 8 * MIB).to_bytes(8 * MIB, "little"))
    process = tool.start("backup", guest.name, *SLOWLY)
    _job_began(guest)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    tool.nothing_left(guest, checkpoints=0)


def test_a_foreign_job_and_a_foreign_checkpoint_are_left_alone(tool: Tool, guest: PlainGuest) -> None:
    document = "<domaincheckpoint><name>theirs</name></domaincheckpoint>"
    guest.domain.checkpointCreateXML(document)
    place = os.path.join(guest.folder, "theirs")
    os.mkdir(place)
    os.chmod(place, 0o777)  # QEMU is another user
    socket = os.path.join(place, "nbd.sock")
    scratch = "".join(f"<disk name='{t}' type='file'><scratch file='{place}/{t}.scratch'/></disk>" for t in guest.disks)
    guest.domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>{scratch}</disks></domainbackup>",
        None,
    )
    busy = tool.run("backup", guest.name)
    assert (busy.code, busy.document["error"]["kind"]) == (11, "DomainBusy")
    assert "a backup" in busy.stderr
    assert guest.has_job
    guest.domain.abortJob()
    tool.backup(guest, "--wait", "20")
    tool.run("untrack", guest.name).result  # noqa: B018
    assert [c.getName() for c in guest.domain.listAllCheckpoints()] == ["theirs"]


def test_a_destroyed_guest_is_a_lost_source(tool: Tool, guest: PlainGuest, rng: random.Random) -> None:
    guest.write_bytes("vda", 0, rng.getrandbits(8 * 8 * MIB).to_bytes(8 * MIB, "little"))
    process = tool.start("backup", guest.name, *SLOWLY)
    _job_began(guest)
    guest.destroy()
    assert process.wait(60) in (13, 20)
    guest.start()
    tool.backup(guest)
    tool.nothing_left(guest)


def test_wrong_input_gets_its_code_and_one_sentence(tool: Tool, guest: PlainGuest, tmp_path: Path) -> None:
    tool.backup(guest)
    foreign = tmp_path / "foreign"
    foreign.mkdir(mode=0o700)
    (foreign / "file").write_text("theirs")
    cases = [
        (("backup", "nobody"), None, 10, "NoSuchDomain"),
        (("backup", guest.name, "--disk", "vdz"), None, 10, "NoSuchDisk"),
        (("backup", guest.name), str(tmp_path / "mistyped"), 10, "NoRepository"),
        (("backup", guest.name), str(foreign), 15, "RepositoryForeign"),
        (("init",), str(foreign), 15, "RepositoryForeign"),
        (("restore", guest.name, "--at", "77", "--output", str(tmp_path / "x")), None, 10, "NoSuchBackup"),
        (("restore", guest.name, "--at", "../x", "--output", str(tmp_path / "x")), None, 2, "Usage"),
        (("restore", "nobody", "--output", str(tmp_path / "x")), None, 10, "NotInRepository"),
        (("backup", guest.name, "--quiesce", "agent"), None, 17, "NotConsistent"),
    ]
    for arguments, repository, code, kind in cases:
        ended = tool.run(*arguments, repository=repository)
        assert (ended.code, ended.document["error"]["kind"]) == (code, kind), (arguments, ended)
        assert len(ended.stderr.strip().splitlines()) == 1
    assert os.listdir(foreign) == ["file"]
    tool.nothing_left(guest)


def test_damage_is_named_and_never_restored(tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path) -> None:
    guest.write_bytes("vda", 0, rng.getrandbits(8 * MIB).to_bytes(MIB, "little"))
    first = tool.backup(guest)
    guest.write("vda", 4 * MIB, 65536, 7)
    second = tool.backup(guest)
    place = Path(tool.repository, guest.uuid, "backups", first["backup"])
    layer = place / "vda.qcow2"
    good = layer.read_bytes()
    layer.write_bytes(good[:-70000] + bytes([good[-70000] ^ 1]) + good[-69999:])
    seen = tool.run("verify", guest.name)
    assert seen.code == 16
    damage = seen.document["results"][0]["damage"]
    assert {(d["backup"], d["target"]) for d in damage} == {(first["backup"], "vda")}
    assert damage[0]["dependents"] == [second["backup"]]
    out = tmp_path / "out"
    ended = tool.run("restore", guest.name, "--output", str(out))
    assert (ended.code, ended.document["error"]["kind"]) == (16, "Damaged")
    assert os.listdir(out) == []
    layer.write_bytes(good)
    manifest = place / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[: len(whole) // 2])
    for command, code in (("list", 0), ("show", 0), ("status", 0), ("verify", 16)):
        ended = tool.run(command, guest.name)
        assert ended.code == code
        assert "manifest.json" in ended.stderr + json.dumps(ended.document)
    manifest.write_bytes(whole)
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


def test_the_first_difference_names_the_byte() -> None:
    assert plain.first_difference(b"a" * 5000, b"a" * 4999 + b"b") == 4999


def test_a_chain_stays_under_the_length_that_was_asked_for(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    modes = []
    for _ in range(5):
        guest.random_writes(rng, "vda", 2)
        made = tool.backup(guest, "--max-chain", "2")
        modes.append((made["disks"][0]["mode"], made["disks"][0]["reason"]))
    assert [mode for mode, _ in modes] == ["full", "incremental", "full", "incremental", "full"]
    assert modes[2][1] == "the chain has 2 layers"
    lineages = {d["change_id"].split("/")[0] for d in made["disks"]}  # tracking went on
    shown = tool.run("show", guest.name, "--at", "1").result["generations"][0]["disks"]
    assert lineages == {d["change_id"].split("/")[0] for d in shown}
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
