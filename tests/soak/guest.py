"""The guest of the soak: disks that come, go, grow and change their images, and chronicles that are told of all of it."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from typing import Dict, Final, Iterable, List

import libvirt

from tests.faults import lineages
from tests.guests import daemon, plain
from tests.soak.model import MENDED, NEW, Chronicle, View

MIB: Final = plain.MIB
RUNNING, OFF, SAVED = "running", "off", "saved"
GROWN: Final = 5 * MIB  # no disk grows beyond
SMALL: Final = MIB // 2  # or shrinks below


@dataclass
class Disk(plain.Disk):
    """`key`: its own wherever it is plugged in; `below`: the images under the present one, the nearest last."""

    key: str = ""
    below: List[str] = field(default_factory=list)

    @property
    def tracked(self) -> bool:
        return self.fmt == "qcow2"


class Guest(plain.PlainGuest):
    """A plain guest that tells `told`, the chronicles, what happens to its disks."""

    def __init__(self, host: daemon.Daemon, disks: Iterable[Disk], told: List[Chronicle]) -> None:
        self.told, self._numbers = told, 0
        super().__init__(host, "soak", list(disks))
        self.unplugged: List[Disk] = []

    @property
    def state(self) -> str:
        if self.running:
            return RUNNING
        return SAVED if self.domain.hasManagedSaveImage() else OFF

    def disk(self, target: str) -> Disk:
        found = self.disks[target]
        assert isinstance(found, Disk)
        return found

    def tracked(self) -> List[str]:
        """Targets of disks that can hold a bitmap."""
        return [target for target in self.disks if self.disk(target).tracked]

    def every_key(self) -> List[str]:
        """Of all disks that it has ever had."""
        return [self.disk(target).key for target in self.disks] + [disk.key for disk in self.unplugged]

    def views(self) -> Dict[str, View]:
        disks = {target: self.disk(target) for target in self.disks}
        return {
            target: View(disk.key, bytes(disk.model), disk.tracked, (disk.path, *reversed(disk.below)))
            for target, disk in disks.items()
        }

    def _adopt(self, disk: plain.Disk) -> None:
        assert isinstance(disk, Disk)
        super()._adopt(disk)
        if not disk.key:
            self._numbers += 1
            disk.key = f"disk {self._numbers}"

    def new_path(self, target: str, what: str) -> str:
        self._numbers += 1
        return os.path.join(self.folder, f"{target}.{what}-{self._numbers}")

    # Its writes

    def write(self, target: str, offset: int, length: int, pattern: int) -> None:
        super().write(target, offset, length, pattern)
        self._wrote(target, offset, length)

    def write_bytes(self, target: str, offset: int, data: bytes) -> None:
        super().write_bytes(target, offset, data)
        self._wrote(target, offset, len(data))

    def write_zeroes(self, target: str, offset: int, length: int, *, unmap: bool = False) -> None:
        super().write_zeroes(target, offset, length, unmap=unmap)
        self._wrote(target, offset, length)

    def discard(self, target: str, offset: int, length: int) -> None:
        super().discard(target, offset, length)
        low, high = plain.discarded(self.disks[target], offset, length)
        self._wrote(target, offset, length, low, high)

    def write_while_off(self, target: str, offset: int, length: int, pattern: int) -> None:
        """By qemu-io, which minds the bitmaps as QEMU does."""
        disk = self.disk(target)
        command = f"write -P {pattern} {offset} {length}"
        subprocess.run(["qemu-io", "-f", disk.fmt, "-c", command, disk.path], check=True, stdout=subprocess.DEVNULL)
        disk.model[offset : offset + length] = bytes([pattern]) * length
        self._wrote(target, offset, length)

    def _wrote(self, target: str, offset: int, length: int, low: int = -1, high: int = -1) -> None:
        low, high = (offset, offset + length) if low < 0 else (low, high)
        for one in self.told:
            one.write(self.disk(target).key, offset, length, low, high)

    def broke(self, targets: Iterable[str], how: str = NEW) -> None:
        """Whoever asks later must be told that tracking broke; with EITHER it may have."""
        for target in list(targets):
            for one in self.told:
                one.broke(self.disk(target).key, how)

    # Power

    def kill(self) -> None:
        """The bitmaps that QEMU had are lost, whether in memory or in an image that was not closed.

        So is what it had not flushed: what the guest now reads is what the images hold.
        """
        super().kill()
        self.broke(self.tracked())
        for target, disk in self.disks.items():
            disk.model[:] = self.read_back(target)

    def save(self) -> None:
        self.domain.managedSave(0)

    # Disks

    def grow(self, target: str, size: int) -> None:
        """What a cluster that a disk once shrank in still holds comes back: the model learns it, and it may be told of."""
        disk, was = self.disk(target), self.disk(target).size
        if self.running:
            super().grow(target, size)
        else:
            self._resize_image(disk, size)
            disk.model.extend(bytes(size - was))
            disk.size = size
        seam = min(-(-was // (2 * MIB)) * 2 * MIB, size)
        disk.model[was:seam] = self.read_back(target)[was:seam]
        self._wrote(target, was, seam - was, was, was)

    def shrink(self, target: str, size: int) -> None:
        disk = self.disk(target)
        if self.running:
            self.domain.blockResize(target, size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        else:
            self._resize_image(disk, size, "--shrink")
        del disk.model[size:]
        disk.size = size
        for one in self.told:
            one.shrank(disk.key, size)

    def _resize_image(self, disk: Disk, size: int, *how: str) -> None:
        subprocess.run(["qemu-img", "resize", "-q", *how, "-f", disk.fmt, disk.path, str(size)], check=True)

    def lost_bitmaps(self, target: str) -> bool:
        """Whether the image has bitmaps that a QEMU which died had open: qemu-img resizes it when they are gone."""
        disk = self.disk(target)
        argv = ["qemu-img", "info", "-U", "--output=json", "-f", disk.fmt, disk.path]
        told = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout)
        bitmaps = told.get("format-specific", {}).get("data", {}).get("bitmaps", [])
        return any("in-use" in bitmap["flags"] for bitmap in bitmaps)

    def snapshot(self, targets: List[str]) -> None:
        """External: these disks go on in new files."""
        paths = {target: self.new_path(target, "overlay") for target in targets}
        rows = "".join(
            f"<disk name='{t}' snapshot='external'><source file='{paths[t]}'/></disk>"
            if t in paths
            else f"<disk name='{t}' snapshot='no'/>"
            for t in self.disks
        )
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        self.domain.snapshotCreateXML(f"<domainsnapshot><disks>{rows}</disks></domainsnapshot>", flags)
        for target, path in paths.items():
            disk = self.disk(target)
            disk.below.append(disk.path)
            disk.path = path

    def commit(self, target: str) -> None:
        """All overlays into the lowest image."""
        disk = self.disk(target)
        self.domain.blockCommit(target, None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
        lineages.pivot(self, target)
        disk.path, disk.below = disk.below[0], []
        for one in self.told:
            # The lowest image may have a sound bitmap, from before the first overlay, although that of an overlay was
            # lost: and all that is committed into it is recorded there.
            one.broke(disk.key, MENDED)

    def pull(self, target: str) -> None:
        """All that is below into the present image."""
        self.domain.blockPull(target, 0, 0)
        lineages.wait_for(lambda: not self.domain.blockJobInfo(target, 0))
        self.disk(target).below = []

    def copy(self, target: str) -> None:
        """Block copy into a new file, and over to it."""
        path = self.new_path(target, "copy")
        self.domain.blockCopy(
            target,
            f"<disk type='file'><driver type='qcow2'/><source file='{path}'/></disk>",
            {},
            libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB,
        )
        lineages.pivot(self, target)
        disk = self.disk(target)
        disk.path, disk.below = path, []

    def unplug(self, target: str) -> None:
        disk = self.detach(target)
        assert isinstance(disk, Disk)
        self.unplugged.append(disk)

    def plug_again(self, disk: Disk, target: str) -> None:
        self.unplugged.remove(disk)
        disk.target = target
        self.attach(disk)
