"""What the tests of lineages have in common: a guest that is backed up again and again, and compared each time."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Final, List, Set
from unittest import mock

import libvirt
import libvirt_qemu
from lxml import etree

import libvirt_cbt
from libvirt_cbt.actions import session
from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Tool, models, same

METADATA: Final = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY


class _Notes(session.Watch):
    def __init__(self) -> None:
        self.notes: List[str] = []

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


class Kept:
    """A guest, the tool with its repository, and the comparison after each backup."""

    def __init__(self, tool: Tool, guest: PlainGuest, folder: Path, rng: random.Random) -> None:
        self.tool, self.guest, self.rng = tool, guest, rng
        self._folder = str(folder)
        self.said = ""  # notes and warnings of the last backup

    def write(self, *targets: str) -> None:
        for target in targets or self.guest.disks:
            self.guest.random_writes(self.rng, target, 3)

    def backup(self, *, orphans: int = 0, checkpoints: int = 1, **asked: Any) -> Dict[str, Any]:
        """A backup that restores to what the guest holds and leaves one checkpoint; each disk's result by target.

        Made in this process, as most of a command's time goes into its beginning.
        """
        host, held, watch = self.tool.host, models(self.guest), _Notes()
        output = tempfile.mkdtemp(dir=self._folder)
        with mock.patch.dict(os.environ, host.environment()):
            with libvirt_cbt.Session(repository=self.tool.repository, watch=watch) as opened:
                made = libvirt_cbt.backup(opened, self.guest.name, scratch_dir=host.scratch, **asked)
                files = libvirt_cbt.restore(opened, self.guest.name, output, at=made.backup or "").files
        self.said = "\n".join([*watch.notes, *made.warnings])
        for file in files:
            same({file.target: Path(file.path).read_bytes()}, held)
        shutil.rmtree(output)
        disks = {d.target: dataclasses.asdict(d) for d in made.disks}
        assert {f.target for f in files} == {t for t, d in disks.items() if d["mode"] != "mark"}
        self.tool.nothing_left(self.guest, checkpoints)
        assert not self.guest.running or len(self.orphans()) == orphans
        return disks

    def modes(self, **asked: Any) -> Dict[str, str]:
        return {target: d["mode"] for target, d in self.backup(**asked).items()}

    def orphans(self) -> Set[str]:
        """Bitmaps in QEMU that no checkpoint has."""
        command = '{"execute":"query-named-block-nodes"}'
        nodes = json.loads(libvirt_qemu.qemuMonitorCommand(self.guest.domain, command, 0))["return"]
        names = {b["name"] for node in nodes for b in node.get("dirty-bitmaps", [])}
        return names - set(self.checkpoints())

    def checkpoints(self) -> List[str]:
        return [c.getName() for c in self.guest.domain.listAllCheckpoints()]

    def lose_metadata(self) -> None:
        for checkpoint in self.guest.domain.listAllCheckpoints():
            checkpoint.delete(METADATA)

    def broken(self, target: str, since: int, until: int, reason: str) -> None:
        """The query across the break: 12, both lineages, the reason."""
        shown = {m["generation"]: m for m in self.tool.run("list", self.guest.name).result["generations"]}
        lineages = [_lineage(shown[g], target) for g in (since, until)]
        ended = self.tool.run("changed", self.guest.name, target, "--since", str(since), "--until", str(until))
        error = ended.document["error"]
        assert (ended.code, error["kind"], ended.document["results"]) == (12, "LineageBroken", [])
        assert [error["since_lineage"], error["until_lineage"]] == lineages
        assert lineages[0] != lineages[1]
        assert re.search(reason, error["broken_by"]), error["broken_by"]

    def unbroken(self, target: str, since: int, until: int) -> None:
        asked = ("--since", str(since), "--until", str(until))
        assert self.tool.run("changed", self.guest.name, target, *asked).result["until"] == until


def _lineage(generation: Dict[str, Any], target: str) -> str:
    disk = next(d for d in generation["disks"] if d["target"] == target)
    return str(disk["change_id"]).split(":", 1)[1].split("/", 1)[0]


def maker(
    libvirtd: daemon.Daemon, plain_guest: Callable[..., PlainGuest], folder: Path, rng: random.Random
) -> Callable[..., Kept]:
    """Makes a running guest with these disks, backed up once after a few writes and written to since."""

    def make(*disks: Disk, first: bool = True) -> Kept:
        guest = plain_guest(*(disks or (Disk("vda", MIB),)))
        kept = Kept(Tool(libvirtd, str(folder / "repository")), guest, folder, rng)
        if first:
            kept.write()
            kept.backup()
            kept.write()
        return kept

    return make


def two(size: int = MIB) -> List[Disk]:
    return [Disk("vda", MIB), Disk("vdb", size)]


def wait_for(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pivot(guest: PlainGuest, target: str) -> None:
    def ready() -> bool:
        tree = etree.fromstring(guest.domain.XMLDesc())
        return bool(tree.xpath(f"devices/disk[target/@dev='{target}']/mirror[@ready='yes']"))

    wait_for(ready)
    guest.domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)


def block_copy(guest: PlainGuest, target: str) -> None:
    path = f"{guest.disks[target].path}.copy"
    guest.domain.blockCopy(
        target,
        f"<disk type='file'><driver type='qcow2'/><source file='{path}'/></disk>",
        {},
        libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB,
    )
    pivot(guest, target)
