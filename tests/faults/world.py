"""What a crash is judged by: a guest whose every generation is known byte for byte, and all that may be left behind.

A complaint is a sentence; no complaints, no loss.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass
from typing import Any, Dict, Final, List, Set, Tuple
from unittest import mock

import libvirt_qemu

import libvirt_cbt
from libvirt_cbt import errors
from tests.faults import survivors
from tests.guests import daemon, plain
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt import tool as tools

CHAIN: Final = 20  # layers; then everything is checked and a new repository begun


LEFT: Final = ("left ", "the restore has left ")  # complaints about files only: nothing was lost, the guest is as it was


@dataclass(frozen=True)
class Kept:
    """What the guest held at the freeze of one generation, and which kill point it belongs to."""

    held: Dict[str, bytes]
    point: str


class World:
    """One guest with two small disks and one repository after the other; a context manager."""

    def __init__(self, host: daemon.Daemon, folder: str) -> None:
        self.host, self.folder = host, folder
        self.processes = survivors.Survivors(host.run_dir)
        self.rng = random.Random(0)  # of the guest's writes; set anew for every point
        self.point = "at the beginning"
        self.late: List[Tuple[str, str]] = []  # (point, complaint) found later than at its point
        self._kept: Dict[str, Kept] = {}
        self._number = 0
        self.tool: tools.Tool
        self.guest = self._new_guest()
        self.renew()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.processes.end()
        self.guest.remove()

    def _new_guest(self) -> PlainGuest:
        # One disk ends within a grain and has clusters smaller than any write.
        disks = [Disk("vda", 2 * MIB), Disk("vdb", MIB + 17 * 512, options=("cluster_size=512",))]
        guest = PlainGuest(self.host, "sweep", disks)
        guest.define()
        guest.start()
        return guest

    # What happens in it

    def write(self) -> None:
        """The guest's writes, of every kind."""
        for target in self.guest.disks:
            self.guest.random_writes(self.rng, target, 3)

    def models(self) -> Dict[str, bytes]:
        return tools.models(self.guest)

    def renew(self) -> None:
        """A new repository, after all in the old one was checked; nothing of ours is left in libvirt."""
        if self._number:
            self.check_everything()
            shutil.rmtree(self.tool.repository)
        for checkpoint in self.guest.domain.listAllCheckpoints():
            checkpoint.delete(0)
        self._number += 1
        self._kept = {}
        self.tool = tools.Tool(self.host, os.path.join(self.folder, f"repository-{self._number}"))

    def short(self, text: str) -> str:
        """Without the folders that every path here begins with."""
        place = os.path.join(self.tool.repository, self.guest.uuid)
        for folder in (place, self.folder, self.host.root):
            text = text.replace(folder + "/", "")
        return text

    def room_for(self, generations: int) -> None:
        if len(self._kept) + generations > CHAIN:
            self.renew()

    def start_over(self) -> None:
        """After a loss: another guest, and nothing that the last one has left."""
        self.processes.end()
        self._kept = {}
        self.guest.remove()
        self.tidy()
        self.guest = self._new_guest()
        self.renew()

    def tidy(self) -> None:
        """Removes the files that were complained about, so that the next point is judged for its own."""
        for folder in (self.host.scratch, self.host.run_dir):
            for name in os.listdir(folder):
                shutil.rmtree(os.path.join(folder, name))
        for identity in self.published():
            for name in self._strange(identity):
                os.unlink(os.path.join(self.tool.repository, self.guest.uuid, "backups", identity, name))

    def backup(self) -> List[str]:
        """The next run, unaided; an increment if there is anything to build on."""
        known = self.published()
        held = self.models()
        ended = self.tool.run("backup", self.guest.name)
        self.keep(held)
        if ended.code:
            return [f"the next backup ended with {ended.code}: {ended.stderr.strip()}"]
        modes = [d["mode"] for d in ended.result["disks"]]
        if known and modes != ["incremental"] * len(modes):
            return [f"the next backup was not an increment: {[d['reason'] for d in ended.result['disks']]}"]
        return []

    def published(self) -> List[str]:
        """Ids of backups that have their final name."""
        place = os.path.join(self.tool.repository, self.guest.uuid, "backups")
        return sorted(os.listdir(place)) if os.path.isdir(place) else []

    def keep(self, held: Dict[str, bytes]) -> None:
        """Whatever was published since, and is no mark, holds what the guest held then."""
        place = os.path.join(self.tool.repository, self.guest.uuid, "backups")
        for identity in self.published():
            if os.path.exists(os.path.join(place, identity, "vda.qcow2")):
                self._kept.setdefault(identity, Kept(held, self.point))

    # What it is judged by

    def check_everything(self) -> None:
        """`verify` is clean and every generation restores to what the guest held; complaints go to `late`."""
        self.late += self.processes.overdue()
        if not self._kept:
            return
        with mock.patch.dict(os.environ, self.host.environment()):
            with libvirt_cbt.Session(repository=self.tool.repository) as session:
                self._verify(session)
                for identity, kept in self._kept.items():
                    self.late += [(kept.point, c) for c in self._restored(session, identity, kept)]

    def _verify(self, session: libvirt_cbt.Session) -> None:
        try:
            damage: List[Any] = libvirt_cbt.verify(session, self.guest.uuid).damage
        except errors.CbtError as e:
            self.late.append((self.point, f"verify: {e}"))
            return
        for one in damage:
            kept = self._kept.get(one.backup)
            self.late.append((kept.point if kept else self.point, f"verify: {one}"))

    def _restored(self, session: libvirt_cbt.Session, identity: str, kept: Kept) -> List[str]:
        output = os.path.join(self.folder, "check")
        try:
            libvirt_cbt.restore(session, self.guest.uuid, output, at=identity)
            return [f"backup {identity}: {c}" for c in self.compare(output, kept.held)]
        except errors.CbtError as e:
            return [f"backup {identity} does not restore: {e}"]
        finally:
            shutil.rmtree(output, ignore_errors=True)

    @staticmethod
    def compare(output: str, held: Dict[str, bytes]) -> List[str]:
        """A folder holds the images of a restore and nothing else."""
        wanted = {f"{target}.raw": content for target, content in held.items()}
        found = sorted(os.listdir(output))
        complaints = [f"the restore has left {name}" for name in found if name not in wanted]
        for name, content in wanted.items():
            if name not in found:
                complaints.append(f"{name} was not restored")
                continue
            with open(os.path.join(output, name), "rb") as file:
                difference = plain.first_difference(file.read(), content)
            if difference is not None:
                complaints.append(f"{name} differs from what the guest held at byte {difference}")
        return complaints

    def left(self, checkpoints: int = 1) -> List[str]:
        """What of ours is there although no run is: on disk, in libvirt, in QEMU."""
        place = os.path.join(self.tool.repository, self.guest.uuid)
        complaints = [
            f"left behind: {os.path.join(folder, name)}"
            for folder in (self.host.scratch, self.host.run_dir, os.path.join(place, "staging"))
            for name in (os.listdir(folder) if os.path.isdir(folder) else [])
        ]
        for identity in self.published():
            complaints += [f"left in {identity}: {name}" for name in self._strange(identity)]
        if self.guest.has_job:
            complaints.append("a job is left")
        names = [c.getName() for c in self.guest.domain.listAllCheckpoints()]
        if len(names) != checkpoints:
            complaints.append(f"{len(names)} checkpoints, not {checkpoints}: {names}")
        return complaints + self._left_in_qemu(set(names))

    def _strange(self, identity: str) -> List[str]:
        """Files in a published directory that are of the run, not of the backup."""
        names = os.listdir(os.path.join(self.tool.repository, self.guest.uuid, "backups", identity))
        return [name for name in names if name.startswith("intent") or name.endswith(".new")]

    def _left_in_qemu(self, checkpoints: Set[str]) -> List[str]:
        """Bitmaps that no checkpoint has, and files that are gone but still open."""
        answer = json.loads(
            libvirt_qemu.qemuMonitorCommand(self.guest.domain, '{"execute":"query-named-block-nodes"}', 0)
        )
        bitmaps = {b["name"] for node in answer["return"] for b in node.get("dirty-bitmaps", [])}
        complaints = [f"QEMU has a bitmap {name} of no checkpoint" for name in sorted(bitmaps - checkpoints)]
        folder = f"/proc/{self.guest.pid}/fd"
        for fd in os.listdir(folder):
            try:
                where = os.readlink(os.path.join(folder, fd))
            except OSError:
                continue
            if where.startswith(self.host.scratch):
                complaints.append(f"QEMU has {where} open")
        return complaints
