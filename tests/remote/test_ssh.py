"""A guest on a host behind ssh: backed up, restored and compared; what is here is never taken for what is there."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Callable

import pytest

from tests.guests.far import ADDRESS, Far
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import models, same
from tests.remote.tool import FarTool

PlainGuests = Callable[..., PlainGuest]


def image(path: Path, *options: str) -> bytes:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), str(MIB)], check=True)
    return path.read_bytes()


def test_increments_of_a_far_guest(
    tool: FarTool, plain_guest: PlainGuests, rng: random.Random, tmp_path: Path
) -> None:
    guest = plain_guest(Disk("vda"), Disk("vdb", size=5 * MIB + 512, options=("cluster_size=4k",)))
    for number in range(3):
        for target in guest.disks:
            guest.random_writes(rng, target, 12, discards=True)
        made = tool.backup(guest)
        assert {d["mode"] for d in made["disks"]} == {"incremental" if number else "full"}
        tool.nothing_left(guest)
    same(tool.restored(guest, made["backup"], str(tmp_path)), models(guest))  # of all three
    assert tool.run("verify").code == 0


def test_a_near_file_is_never_taken_for_the_far_one(
    far: Far, tool: FarTool, plain_guest: PlainGuests, tmp_path: Path
) -> None:
    """Identity, version, granularity and bitmaps of an image: each has a decoy here."""
    guest = plain_guest(Disk("vda", options=("cluster_size=128k",)), Disk("vdb", options=("cluster_size=128k",)))
    old = image(tmp_path / "old", "-o", "compat=0.10")  # cannot hold a bitmap, and has a granularity of 64 KiB
    for disk in guest.disks.values():
        far.decoy(disk.path, old)
    before = far.decoys()
    first = tool.backup(guest)
    guest.write("vda", 0, 65536, 1)
    second = tool.backup(guest)
    assert [d["mode"] for d in second["disks"]] == ["incremental", "incremental"]
    assert [w for w in first["warnings"] + second["warnings"] if "qcow2" in w] == []
    manifest = json.loads(Path(tool.repository, guest.uuid, "backups", first["backup"], "manifest.json").read_text())
    for row in manifest["disks"]:
        status = os.stat(guest.disks[row["target"]].path)
        assert row["source"]["inode"] == f"{status.st_dev}:{status.st_ino}"
        assert row["granularity"] == 131072
    assert far.decoys() == before


def test_swapped_far_images_are_seen(far: Far, tool: FarTool, plain_guest: PlainGuests, tmp_path: Path) -> None:
    """By their inodes, which are the far side's: here both decoys stay where they are."""
    guest = plain_guest(Disk("vda"), Disk("vdb"))
    for disk in guest.disks.values():
        far.decoy(disk.path, image(tmp_path / "decoy"))
    guest.write("vda", 0, 65536, 1)
    tool.backup(guest)
    guest.destroy()
    one, other = (guest.disks[t].path for t in ("vda", "vdb"))
    os.rename(one, one + ".away")
    os.rename(other, one)
    os.rename(one + ".away", other)
    guest.disks["vda"].model, guest.disks["vdb"].model = guest.disks["vdb"].model, guest.disks["vda"].model
    guest.start()
    made = tool.backup(guest)
    assert [d["mode"] for d in made["disks"]] == ["full", "full"]
    assert "this image was disk vdb" in made["disks"][0]["reason"]
    same(tool.restored(guest, made["backup"], str(tmp_path)), models(guest))


def test_what_writes_beside_the_guest_is_refused(far: Far, tool: FarTool, plain_guest: PlainGuests) -> None:
    guest = plain_guest(Disk("vda"))
    tool.backup(guest)
    guest.destroy()
    far.decoy(guest.disks["vda"].path, b"precious")
    before = far.decoys()
    for command, *options in (
        ("restore", "--in-place"),
        ("restore", "--define", "copy", "--output", "/tmp/no-such-output"),
        ("boot", "--name", "copy"),
    ):
        ended = tool.run(command, guest.name, *options)
        assert (ended.code, ended.document["error"]["kind"]) == (2, "Elsewhere")
        assert far.decoys() == before
        assert not os.path.exists("/tmp/no-such-output")
        tool.nothing_left(guest)


def test_marks_and_queries(tool: FarTool, plain_guest: PlainGuests) -> None:
    guest = plain_guest(Disk("vda"))
    tool.backup(guest)
    guest.write("vda", 2 * MIB, 65536, 1)
    assert tool.run("mark", guest.name).result["generation"] == 2
    guest.write("vda", 4 * MIB, 65536, 1)
    extents = tool.run("changed", guest.name, "vda", "--since", "1", "--live").result["extents"]
    assert [(e["offset"], e["length"]) for e in extents] == [(2 * MIB, 65536), (4 * MIB, 65536)]
    tool.nothing_left(guest)


def test_an_open_point_is_read_here(tool: FarTool, plain_guest: PlainGuests) -> None:
    """The guard keeps the way to it when the tool has ended, and closes it with the point."""
    guest = plain_guest(Disk("vda"))
    guest.write("vda", MIB, 65536, 0x5A)
    uri = tool.run("start", guest.name).result["disks"][0]["uri"]
    guest.write("vda", MIB, 65536, 0xEE)
    read = subprocess.run(["nbdcopy", uri, "-"], check=True, capture_output=True).stdout
    assert read[MIB : MIB + 65536] == b"\x5a" * 65536
    assert tool.run("stop", guest.name).result["committed"]
    tool.nothing_left(guest)


def test_uris(far: Far, tool: FarTool, plain_guest: PlainGuests, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same address in other words."""
    guest = plain_guest(Disk("vda"))
    plain, key = f"://root@{ADDRESS}:{far.port}/system", f"keyfile={far.ssh}/id_ed25519"
    for uri in (
        "qemu+ssh://far/system?proxy=native",
        f"qemu+ssh{plain}?{key}",
        f"qemu+libssh{plain}?{key}&known_hosts={far.ssh}/known_hosts",
    ):
        monkeypatch.setattr(far, "uri", uri)
        tool.backup(guest)
        tool.nothing_left(guest)
