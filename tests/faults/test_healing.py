"""`backup --heal`: what is damaged in the backups is stored again from the guest, and old layers are mended where that will do."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Tool, models, same

BLOCK = 65536


@pytest.fixture
def guest(libvirtd: daemon.Daemon) -> Iterator[PlainGuest]:
    with PlainGuest(libvirtd, "plain", [Disk("vda", 6 * MIB), Disk("vdb", 2 * MIB + 512)]) as made:
        made.define()
        made.start()
        yield made


class Kept:
    """Backups of a guest, and what it held at each."""

    def __init__(self, tool: Tool, guest: PlainGuest, folder: Path) -> None:
        self.tool, self.guest, self._folder = tool, guest, folder
        self.ids: List[str] = []
        self.held: Dict[int, Dict[str, bytes]] = {}

    def backup(self, *arguments: str) -> Any:
        made = self.tool.backup(self.guest, *arguments)
        self.ids.append(made["backup"])
        self.held[made["generation"]] = models(self.guest)
        return made

    def layer(self, generation: int, target: str = "vda", name: str = "qcow2") -> Path:
        folder = Path(self.tool.repository, self.guest.uuid, "backups", self.ids[generation - 1])
        return folder / f"{target}.{name}"

    def hurt(self, generation: int, offset: int, target: str = "vda") -> None:
        """One bit of an uncompressed cluster of a layer."""
        path = self.layer(generation, target)
        alone = "json:" + json.dumps(
            {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": str(path)}}
        )
        for entry in json.loads(subprocess.check_output(["qemu-img", "map", "--output=json", alone])):
            if entry["start"] <= offset < entry["start"] + entry["length"] and "offset" in entry:
                flip(path, entry["offset"] + offset - entry["start"])
                return
        raise AssertionError("nothing is stored there as it is")

    def damaged(self) -> List[str]:
        return sorted(
            {one["backup"] for one in self.tool.run("verify", self.guest.name).document["results"][0]["damage"]}
        )

    def right(self, *generations: int) -> None:
        for generation in generations:
            same(self.tool.restored(self.guest, str(generation), str(self._folder)), self.held[generation])


def flip(path: Path, place: int) -> None:
    fd = os.open(path, os.O_RDWR)
    byte = os.pread(fd, 1, place)
    os.pwrite(fd, bytes([byte[0] ^ 4]), place)
    os.close(fd)


@pytest.fixture
def kept(tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path) -> Kept:
    """Three backups; dense data, so that clusters are stored as they are."""
    made = Kept(tool, guest, tmp_path)
    for offset in (0, 2 * MIB, 4 * MIB):
        guest.write_bytes("vda", offset, rng.randbytes(MIB))
        guest.write_bytes("vdb", offset // 4, rng.randbytes(3 * BLOCK))
        guest.write("vdb", 2 * MIB, 512, 0x21)
        made.backup()
    return made


@pytest.mark.fault(41)
@pytest.mark.parametrize("running", [True, False])
def test_what_the_guest_still_holds_makes_every_backup_whole_again(kept: Kept, running: bool) -> None:
    if not running:
        kept.guest.destroy()
    kept.hurt(1, 5 * BLOCK)
    kept.hurt(2, 2 * MIB + 100)
    kept.hurt(1, BLOCK, "vdb")
    assert kept.damaged() == sorted(kept.ids[:2])
    made = kept.backup("--heal")
    assert {d["mode"] for d in made["disks"]} == {"incremental"}
    assert {(one["target"], one["backup"], one["mended"]) for one in made["healed"]} == {
        ("vda", kept.ids[0], True), ("vda", kept.ids[1], True), ("vdb", kept.ids[0], True)
    }  # fmt: skip
    assert all(one["lost_bytes"] >= BLOCK for one in made["healed"])
    assert sum("whole again" in warning for warning in made["warnings"]) == 3
    # The guest has written nothing: what was stored again is no change.
    assert [d["dirty_bytes"] for d in made["disks"]] == [0, 0]
    assert made["disks"][0]["data_bytes"] >= 2 * BLOCK
    assert kept.damaged() == []
    kept.right(1, 2, 3, 4)
    kept.tool.nothing_left(kept.guest)
    folder = kept.layer(1).parent
    assert not [name for name in os.listdir(folder) if name.endswith(".new")]
    assert (os.stat(kept.layer(1)).st_mode & 0o777) == 0o600
    again = kept.backup("--heal")
    assert again["healed"] == [] and again["disks"][0]["data_bytes"] == 0


@pytest.mark.fault(41)
def test_what_the_guest_has_overwritten_is_lost_to_the_older_ones_alone(
    kept: Kept, rng: random.Random, tmp_path: Path
) -> None:
    kept.hurt(1, 5 * BLOCK)
    kept.hurt(2, 2 * MIB + 100)
    kept.guest.write_bytes("vda", 5 * BLOCK, rng.randbytes(BLOCK))
    made = kept.backup("--audit", "--heal")
    assert [audit["differing_bytes"] for audit in made["audit"]] == [0, 0]
    found = {one["backup"]: one for one in made["healed"]}
    assert found[kept.ids[1]]["mended"] and not found[kept.ids[0]]["mended"]
    assert "no longer holds" in found[kept.ids[0]]["left"]
    assert kept.damaged() == [kept.ids[0]]
    kept.right(4)
    ended = kept.tool.run("restore", kept.guest.name, "--at", "3", "--output", str(tmp_path / "none"))
    assert ended.code == 16
    # The guest holds it again, and what the newest hides is on record since `verify`: now it can be mended.
    kept.guest.write_bytes("vda", 5 * BLOCK, kept.held[1]["vda"][5 * BLOCK : 6 * BLOCK])
    made = kept.backup("--heal")
    assert [(one["backup"], one["lost_bytes"], one["mended"]) for one in made["healed"]] == [(kept.ids[0], 0, True)]
    assert kept.damaged() == []
    kept.right(1, 2, 3, 4, 5)


@pytest.mark.fault(41)
@pytest.mark.parametrize("what", ["missing", "header", "contents"])
def test_a_chain_that_cannot_be_opened_is_not_built_on(kept: Kept, what: str) -> None:
    if what == "missing":
        kept.layer(2).unlink()
    elif what == "header":
        flip(kept.layer(2), 1)
    else:
        flip(kept.layer(2, name="contents.npy"), 300)
    made = kept.backup("--heal")
    vda, vdb = made["disks"]
    assert (vda["mode"], vdb["mode"]) == ("full", "incremental")
    assert kept.ids[1] in vda["reason"] or what == "missing"
    kept.right(1, 4)
    if what == "contents":  # what the layer held, nobody can prove
        assert [one["mended"] for one in made["healed"]] == [False]
        assert kept.damaged() == [kept.ids[1]]
    else:
        assert [(one["backup"], one["mended"]) for one in made["healed"]] == [(kept.ids[1], True)]
        assert kept.damaged() == []
        kept.right(2, 3)
