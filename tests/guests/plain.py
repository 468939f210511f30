"""The guest without an OS: its disks are written from outside through QEMU, and a bytearray of each is the oracle."""

from __future__ import annotations

import os
import random
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from typing import Dict, Final, List, Optional, Sequence, Tuple

import libvirt
from lxml import etree

from tests.guests import daemon, domain

MIB: Final = 1024 * 1024
SECTOR: Final = 512
UNITS: Final = {"k": 1024, "K": 1024, "M": MIB}  # of qemu-img's options


class WriteFailed(Exception):
    """A write of the guest's that QEMU refused; the model is as before it."""


@dataclass
class Disk:
    """One disk; `model` is what the guest must read from it.

    `size` in bytes, a multiple of 512.  `fmt` is qcow2 or raw, `options` go to qemu-img create (cluster_size=512, ...).
    With `path` an image that exists already is used: give its contents as `model`.
    """

    target: str
    size: int = 16 * MIB
    fmt: str = "qcow2"
    options: Tuple[str, ...] = ()
    discard: str = "unmap"
    path: str = ""
    serial: Optional[str] = None
    model: bytearray = field(default_factory=bytearray, repr=False)

    @property
    def cluster_size(self) -> int:
        for option in self.options:
            key, _, value = option.partition("=")
            if key == "cluster_size":
                number, unit = (value[:-1], value[-1]) if value[-1] in UNITS else (value, "")
                return int(number) * UNITS.get(unit, 1)
        return 65536

    def create(self) -> None:
        options = [word for option in self.options for word in ("-o", option)]
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", self.fmt, *options, self.path, str(self.size)],
            check=True,
            stdin=subprocess.DEVNULL,
        )

    def xml(self) -> etree._Element:
        disk = domain.disk_xml(self.target, self.path, self.fmt, discard=self.discard)
        if self.serial:
            etree.SubElement(disk, "serial").text = self.serial
        return disk


class PlainGuest(domain.Guest):
    """A domain with any disks, defined on entry to the fixture; see `Disk` for the models.

    Every write goes to QEMU as the guest's own would (and so into the dirty bitmaps), then into the model.
    """

    memory_mib = 32

    def __init__(self, host: daemon.Daemon, name: str = "plain", disks: Sequence[Disk] = ()) -> None:
        super().__init__(host, name)
        self.disks: Dict[str, Disk] = {}
        for disk in disks or [Disk("vda")]:
            self._adopt(disk)

    def _adopt(self, disk: Disk) -> None:
        if not disk.path:
            disk.path = os.path.join(self.folder, f"{disk.target}.{disk.fmt}")
            disk.create()
        if not disk.model:
            disk.model = bytearray(disk.size)
        self.disks[disk.target] = disk

    def xml(self) -> str:
        tree = domain.domain_xml(self, self.memory_mib, [disk.xml() for disk in self.disks.values()])
        return etree.tostring(tree, encoding="unicode")

    # The guest's writes.  Offsets and lengths in bytes, multiples of 512.

    def write(self, target: str, offset: int, length: int, pattern: int) -> None:
        """One byte, repeated."""
        self._io(target, f"write -P {pattern:#04x} {offset} {length}")
        self.disks[target].model[offset : offset + length] = bytes([pattern]) * length

    def write_bytes(self, target: str, offset: int, data: bytes) -> None:
        """Any bytes, by way of a file that QEMU reads."""
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="write-") as source:
            source.write(data)
            source.flush()
            os.chmod(source.name, 0o644)
            self._io(target, f"write -s {source.name} {offset} {len(data)}")
        self.disks[target].model[offset : offset + len(data)] = data

    def write_zeroes(self, target: str, offset: int, length: int, *, unmap: bool = False) -> None:
        """The guest's WRITE ZEROES; with `unmap` the range may become a hole."""
        self._io(target, f"write -z {'-u ' if unmap else ''}{offset} {length}")
        self.disks[target].model[offset : offset + length] = bytes(length)

    def discard(self, target: str, offset: int, length: int) -> None:
        """The guest's TRIM.  Not during a job: QEMU then drops it (facts)."""
        self._io(target, f"discard {offset} {length}")
        disk = self.disks[target]
        low, high = discarded(disk, offset, length)
        disk.model[low:high] = bytes(high - low)

    def flush(self, target: str) -> None:
        self._io(target, "flush")

    def random_writes(self, rng: random.Random, target: str, count: int, *, discards: bool = False) -> None:
        """`count` writes of every kind at random places, up to 256 KiB each; `discards` only while no job runs."""
        disk = self.disks[target]
        for _ in range(count):
            length = min(disk.size, SECTOR * rng.choice((1, 7, 8, 64, 128, 129, rng.randint(1, 512))))
            offset = SECTOR * rng.randint(0, (disk.size - length) // SECTOR)
            kind = rng.choice(("pattern", "bytes", "zeroes", "unmap", *(("discard",) if discards else ())))
            if kind == "pattern":
                self.write(target, offset, length, rng.randint(1, 255))
            elif kind == "bytes":
                self.write_bytes(target, offset, rng.getrandbits(8 * length).to_bytes(length, "little"))
            elif kind == "discard":
                self.discard(target, offset, length)
            else:
                self.write_zeroes(target, offset, length, unmap=kind == "unmap")

    def _io(self, target: str, command: str) -> None:
        device = f"/machine/peripheral/ua-{target}/virtio-backend"
        with open(self.host.qemu_log(self.name), encoding="utf-8", errors="replace") as log:
            log.seek(0, os.SEEK_END)
            answer = self.hmp(f'qemu-io -d {device} "{command}"')
            said = log.read()  # the result is printed there, among other things; the monitor is told only of a wrong name
        verb = command.split(" ", 1)[0]
        done = {"write": "wrote ", "discard": "discard ", "flush": ""}[verb]
        # QEMU's NBD server also complains of failed writes there, to its clients' sockets, with the time in front.
        if "Error" in answer or re.search(f"^{verb} failed", said, re.MULTILINE) or done not in said:
            raise WriteFailed(f"{target}: {command}: {answer.strip()} {said.strip()}")

    # Changes to the disks themselves.

    def grow(self, target: str, size: int) -> None:
        """blockresize of a running guest to `size` bytes; the new end reads as zeroes."""
        disk = self.disks[target]
        self.domain.blockResize(target, size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        disk.model.extend(bytes(size - disk.size))
        disk.size = size

    def attach(self, disk: Disk) -> None:
        """Plugs a disk in, now and for later starts."""
        self._adopt(disk)
        self.domain.attachDeviceFlags(etree.tostring(disk.xml(), encoding="unicode"), self._where())

    def detach(self, target: str) -> Disk:
        """Unplugs a disk; without an OS the guest never acknowledges, so only when it is off."""
        disk = self.disks.pop(target)
        self.domain.detachDeviceFlags(etree.tostring(disk.xml(), encoding="unicode"), libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        return disk

    def _where(self) -> int:
        live = libvirt.VIR_DOMAIN_AFFECT_LIVE if self.running else 0
        return int(live | libvirt.VIR_DOMAIN_AFFECT_CONFIG)

    # The other way to know what the guest reads: the image itself.

    def read_back(self, target: str) -> bytes:
        """What the image holds, by qemu-img; of a running guest, too, so long as nothing writes."""
        disk = self.disks[target]
        path = disk.path
        if self.running:
            self.flush(target)
            path = self._source(target)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            raw = os.path.join(folder, "raw")
            subprocess.run(
                ["qemu-img", "convert", "-U", "-f", disk.fmt, "-O", "raw", path, raw],
                check=True,
                stdin=subprocess.DEVNULL,
            )
            with open(raw, "rb") as image:
                return image.read()

    def _source(self, target: str) -> str:
        """Snapshots and block copies move a disk to another file."""
        tree = etree.fromstring(self.domain.XMLDesc().encode())
        for disk in tree.iterfind("devices/disk"):
            named = disk.find("target")
            source = disk.find("source")
            if named is not None and source is not None and named.get("dev") == target:
                return str(source.get("file"))
        raise AssertionError(f"no disk {target}")

    def check(self) -> None:
        """Every disk reads as its model says; names the first byte that does not."""
        for target, disk in self.disks.items():
            difference = first_difference(self.read_back(target), bytes(disk.model))
            assert difference is None, f"{target} differs from its model at byte {difference}"


def discarded(disk: Disk, offset: int, length: int) -> Tuple[int, int]:
    """The part of a discarded range that then reads as zeroes, as (low, high); measured on QEMU 7.2.

    qcow2 drops whole clusters (the last one may be cut by the end of the disk), raw files drop what is asked.
    """
    if disk.discard != "unmap":
        return 0, 0
    end = offset + length
    if disk.fmt != "qcow2":
        return offset, end
    cluster = disk.cluster_size
    low = -(-offset // cluster) * cluster
    high = end if end == disk.size else end // cluster * cluster
    return (low, high) if low < high else (0, 0)


def first_difference(one: bytes, other: bytes) -> Optional[int]:
    """The first byte at which two strings differ, or None."""
    if one == other:
        return None
    for start in range(0, max(len(one), len(other)), 4096):
        left, right = one[start : start + 4096], other[start : start + 4096]
        if left != right:
            pairs: List[bool] = [a == b for a, b in zip(left, right)]
            return start + (pairs.index(False) if False in pairs else min(len(left), len(right)))
    return None
