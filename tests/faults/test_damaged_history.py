"""Backups go on over a history of which a manifest is damaged: right, with its name, and with no number used twice."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Callable, List

import pytest

from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Tool, models, same


class Past:
    """A guest, its backups and marks, and what it held at each."""

    def __init__(self, tool: Tool, guest: PlainGuest, rng: random.Random, folder: str) -> None:
        self.tool, self.guest, self._rng, self._folder = tool, guest, rng, folder
        self.made: List[Any] = []
        self.held: List[Any] = []

    def add(self, kind: str = "backup") -> Any:
        self.guest.random_writes(self._rng, "vda", 3)
        scratch = ("--scratch-dir", self.tool.host.scratch) if kind == "mark" else ()
        found = self.tool.run(kind, self.guest.name, *scratch).result
        self.made.append(found)
        self.held.append(models(self.guest))
        return found

    def manifest(self, number: int) -> Path:
        made = self.made[number - 1]
        identity = made.get("backup") or self._listed(number)
        return Path(self.tool.repository, self.guest.uuid, "backups", identity, "manifest.json")

    def _listed(self, number: int) -> Any:
        rows = self.tool.run("list", self.guest.name).result["generations"]
        return next(row["id"] for row in rows if row["generation"] == number)

    def prove(self) -> None:
        for number, made in enumerate(self.made, 1):
            if "backup" in made:
                same(self.tool.restored(self.guest, made["backup"], self._folder), self.held[number - 1])


@pytest.mark.fault(41)
@pytest.mark.parametrize(("kinds", "hurt", "mode"), [
    (["backup", "backup", "backup"], 1, "incremental"),
    (["backup", "backup", "backup"], 2, "incremental"),
    (["backup", "mark", "mark"], 2, "full"),  # what it recorded would be missed
    (["backup", "backup"], 2, "full"),  # it had the checkpoint
])  # fmt: skip
def test_the_next_backup_is_right(
    tool: Tool,
    plain_guest: Callable[..., PlainGuest],
    rng: random.Random,
    tmp_path: Path,
    kinds: List[str],
    hurt: int,
    mode: str,
) -> None:
    guest = plain_guest(Disk("vda", 4 * MIB))
    past = Past(tool, guest, rng, str(tmp_path))
    for kind in kinds:
        past.add(kind)
    path = past.manifest(hurt)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    made = past.add()
    assert [d["mode"] for d in made["disks"]] == [mode]
    assert any(str(path) in warning for warning in made["warnings"])
    assert made["generation"] == len(kinds) + 1
    same(tool.restored(guest, made["backup"], str(tmp_path)), past.held[-1])
    if hurt < len(kinds):
        same(tool.restored(guest, "latest", str(tmp_path)), past.held[-1])
    tool.nothing_left(guest)
    assert past.add()["disks"][0]["mode"] == "incremental"
    asked = tool.run("changed", guest.name, "vda", "--since", str(len(kinds) + 1))
    assert asked.result["until"] == len(kinds) + 2
    across = tool.run("changed", guest.name, "vda", "--since", "1")
    assert (across.code, str(path) in across.stderr) == ((16, True) if hurt == 1 else (12, True))
    path.write_bytes(whole)
    numbers = [g["generation"] for g in tool.run("list", guest.name).result["generations"]]
    assert numbers == list(range(1, len(past.made) + 1))
    assert tool.run("verify", guest.name).result["damage"] == []
    past.prove()
    tool.nothing_left(guest)
