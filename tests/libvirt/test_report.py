"""The report of what a real guest's backups and a real verification have left."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Iterator

import pytest
from lxml import html

from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Tool


@pytest.fixture
def guest(libvirtd: daemon.Daemon) -> Iterator[PlainGuest]:
    with PlainGuest(libvirtd, "plain", [Disk("vda", 8 * MIB)]) as made:
        made.define()
        made.start()
        yield made


def test_backups_a_mark_and_a_verification(
    libvirtd: daemon.Daemon, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    tool = Tool(libvirtd, str(tmp_path / "repository"))
    for verb in ("backup", "backup", "mark", "backup"):
        guest.random_writes(rng, "vda", 5)
        tool.run(verb, guest.name, *(("--scratch-dir", libvirtd.scratch) if verb == "mark" else ()))
    checked = tool.run("verify").result
    page = tmp_path / "page.html"
    (one,) = tool.run("report", "--html", str(page)).result["domains"]
    assert (one["domain"], one["backups"], one["marks"]) == (guest.name, 3, 1)
    assert (one["verified"]["newest"], one["verified"]["damage"]) == (4, 0)
    assert one["verified"]["checked_bytes"] == checked["checked_bytes"] > 0
    (disk,) = one["disks"]
    assert (disk["target"], disk["chain"], disk["since"]) == ("vda", 3, 1)
    dirty = {g["generation"]: g["dirty_bytes"] for g in one["generations"]}
    for line in disk["heatmap"]["generations"]:
        assert sum(line["changed_bytes"]) == dirty[line["generation"]]
    assert html.document_fromstring(page.read_bytes()).findtext(".//title") == "Backups of plain"
