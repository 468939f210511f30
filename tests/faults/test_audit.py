"""A write that no bitmap recorded: found by an audit, and healed."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Iterator

import pytest

from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Tool, models, same


@pytest.fixture
def guest(libvirtd: daemon.Daemon) -> Iterator[PlainGuest]:
    with PlainGuest(libvirtd, "plain", [Disk("vda", 8 * MIB), Disk("vdb", 4 * MIB)]) as made:
        made.define()
        made.start()
        yield made


def behind_qemus_back(guest: PlainGuest, target: str, offset: int, data: bytes) -> None:
    """Writes into an allocated cluster of the image file itself: the guest reads it, no bitmap records it."""
    disk = guest.disks[target]
    listed = subprocess.check_output(["qemu-img", "map", "-U", "-f", "qcow2", "--output=json", disk.path])
    for entry in json.loads(listed):
        if entry["start"] <= offset and offset + len(data) <= entry["start"] + entry["length"] and "offset" in entry:
            fd = os.open(disk.path, os.O_WRONLY)
            os.pwrite(fd, data, entry["offset"] + offset - entry["start"])
            os.fsync(fd)
            os.close(fd)
            disk.model[offset : offset + len(data)] = data
            return
    raise AssertionError("nothing is allocated there")


@pytest.mark.fault(18, 19)
def test_an_audit_finds_what_the_bitmap_missed_and_heals_it(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    guest.write("vda", 0, 4 * MIB, 0x11)
    guest.write("vdb", 0, 1 * MIB, 0x22)
    tool.backup(guest)
    guest.random_writes(rng, "vda", 4)
    tool.run("mark", guest.name, "--scratch-dir", tool.host.scratch).result  # noqa: B018
    honest = tool.backup(guest, "--audit")
    assert [a["differing_bytes"] for a in honest["audit"]] == [0, 0]
    assert sum(a["compared_bytes"] for a in honest["audit"]) > 4 * MIB
    guest.write("vda", 2 * MIB, 131072, 0x33)
    guest.flush("vda")
    tool.backup(guest)
    behind_qemus_back(guest, "vda", 2 * MIB + 65536, b"\x44" * 4096)
    found = tool.run("backup", guest.name, "--audit")
    assert (found.code, found.document["error"]["kind"]) == (16, "AuditFailed")
    assert found.document["error"]["audit"][0]["extents"] == [{"offset": 2 * MIB + 65536, "length": 65536}]
    tool.nothing_left(guest)
    guest.write("vda", 0, 65536, 0x55)
    unchanged = tool.backup(guest, "--heal")  # its digests are right: that the guest differs only an audit can see
    assert unchanged["healed"] == []
    healed = tool.backup(guest, "--audit", "--heal")
    assert [d["mode"] for d in healed["disks"]] == ["incremental", "incremental"]
    assert "no bitmap" in healed["warnings"][0]
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    extents = tool.run("changed", guest.name, "vda", "--since", str(healed["generation"] - 1)).result["extents"]
    assert any(e["offset"] <= 2 * MIB + 65536 < e["offset"] + e["length"] for e in extents)
    assert tool.backup(guest, "--audit")["audit"][0]["differing_bytes"] == 0
