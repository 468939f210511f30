"""A guest, three backups of it and their restores compared byte for byte, in a few seconds and without a daemon.

libvirt's embedded driver lives in the process that uses it, so the commands run
in this process; what a user would type is printed above each.
"""

from __future__ import annotations

import contextlib
import grp
import hashlib
import io
import json
import os
import pwd
import random
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict, Iterator, List, Tuple

# The embedded driver logs to stderr what a daemon logs to its file.
os.environ.setdefault("LIBVIRT_LOG_OUTPUTS", "4:file:/dev/null")
os.environ.setdefault("LIBVIRT_DEBUG", "4")

import libvirt
import libvirt_qemu

from libvirt_cbt import cli
from libvirt_cbt.hypervisor import connection

MIB = 1 << 20
DISKS = {"vda": 64 * MIB, "vdb": 32 * MIB + 5 * 512}  # the second is no multiple of 64 KiB

GUEST = """
<domain type='qemu'>
  <name>demo</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>
  <os><type arch='x86_64'>hvm</type></os>
  <devices>{disks}<controller type='usb' model='none'/><memballoon model='none'/></devices>
</domain>"""
DISK = """
<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>
  <source file='{path}'/><target dev='{target}' bus='virtio'/></disk>"""


class Guest:
    """A QEMU without an operating system, written to from outside; `held` is what its disks hold."""

    def __init__(self, uri: str, folder: str) -> None:
        self._folder = folder
        self._connection = connection.Host(uri)  # starts libvirt's event loop, too
        self._conn = libvirt.open(uri)
        self.held: Dict[str, bytearray] = {}
        rows = []
        for target, size in DISKS.items():
            path = os.path.join(folder, f"{target}.qcow2")
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)], check=True)
            let_qemu_in(path, 0o600)
            rows.append(DISK.format(path=path, target=target))
            self.held[target] = bytearray(size)
        self._domain = self._conn.createXML(GUEST.format(disks="".join(rows)))

    def close(self) -> None:
        with contextlib.suppress(libvirt.libvirtError):
            self._domain.destroy()
        self._conn.close()
        self._connection.close()

    def write(self, target: str, offset: int, data: bytes) -> None:
        path = os.path.join(self._folder, "data")
        with open(path, "wb") as file:
            file.write(data)
        let_qemu_in(path, 0o600)
        self._io(target, f"write -s {path} {offset} {len(data)}")
        self.held[target][offset : offset + len(data)] = data

    def zero(self, target: str, offset: int, length: int, how: str = "write -z") -> None:
        self._io(target, f"{how} {offset} {length}")
        self.held[target][offset : offset + length] = bytes(length)

    def _io(self, target: str, command: str) -> None:
        number = list(DISKS).index(target)
        line = f'qemu-io -d /machine/peripheral/virtio-disk{number}/virtio-backend "{command}"'
        said = libvirt_qemu.qemuMonitorCommand(self._domain, line, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
        if "bytes at offset" not in said and said.strip():
            raise SystemExit(f"the guest's write failed: {said}")


def let_qemu_in(path: str, mode: int) -> None:
    """As root QEMU runs as another user, who must reach its files."""
    os.chmod(path, mode)
    if os.geteuid() == 0:
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam("libvirt-qemu" if "libvirt-qemu" in {u.pw_name for u in pwd.getpwall()} else "qemu")
            os.chown(path, user.pw_uid, grp.getgrgid(user.pw_gid).gr_gid)


def command(arguments: List[str]) -> Any:
    """Runs a command of ours as a user would; what it printed as JSON."""
    shown = " ".join(a for a in arguments if a != "--json")
    print(f"\n$ libvirt-cbt {shown}")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.exit_code(arguments)
    if code:
        raise SystemExit(f"libvirt-cbt ended with {code}")
    return json.loads(out.getvalue())["results"][0]


def life(guest: Guest, chance: random.Random) -> Iterator[str]:
    """What the guest does before each backup."""
    guest.write("vda", 0, chance.randbytes(8 * MIB))
    guest.write("vda", 20 * MIB + 512, chance.randbytes(3 * MIB))
    guest.write("vdb", 0, b"database " * (MIB // 3))
    guest.write("vdb", DISKS["vdb"] - 1536, chance.randbytes(1536))
    yield "8 MiB of random data, text, and the very last sectors"
    guest.zero("vda", MIB, 2 * MIB)
    guest.zero("vdb", MIB // 2, MIB, "discard")
    guest.write("vda", 30 * MIB + 1024, chance.randbytes(100 * 1024))
    yield "zeroed 2 MiB, discarded 1 MiB, wrote 100 KiB"
    guest.write("vda", MIB + 65536, chance.randbytes(65536))
    guest.zero("vda", 21 * MIB, 300 * 1024, "write -z -u")
    guest.write("vdb", 16 * MIB, chance.randbytes(12345 * 512 // 64))
    yield "wrote into the zeroed part, zeroed with unmap, wrote more"


def same(path: str, held: bytes) -> bool:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).digest() == hashlib.sha256(held).digest()


def show(rows: List[Tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def main() -> int:
    begun = time.monotonic()
    folder = tempfile.mkdtemp(prefix="cbt-demo-")
    os.chmod(folder, 0o711)
    for name in ("images", "scratch"):
        os.mkdir(os.path.join(folder, name))
        os.chmod(os.path.join(folder, name), 0o711)
    let_qemu_in(os.path.join(folder, "images"), 0o711)
    os.environ["LIBVIRT_CBT_RUN_DIR"] = os.path.join(folder, "run")
    root, repository = os.path.join(folder, "libvirt"), os.path.join(folder, "repository")
    uri = f"qemu:///embed?root={root}"
    os.makedirs(os.path.join(root, "etc"))
    with open(os.path.join(root, "etc", "qemu.conf"), "w", encoding="ascii") as file:
        file.write('stdio_handler = "file"\n')  # no virtlogd is needed
    os.chmod(root, 0o711)
    chance = random.Random(20261124)
    print("starting a guest (QEMU without an operating system, two qcow2 disks) ...", flush=True)
    guest = Guest(uri, os.path.join(folder, "images"))
    try:
        return demonstrate(guest, uri, repository, folder, chance, begun)
    finally:
        guest.close()
        shutil.rmtree(folder, ignore_errors=True)


def demonstrate(guest: Guest, uri: str, repository: str, folder: str, chance: random.Random, begun: float) -> int:
    base = ["-c", uri, "-r", repository, "--json"]
    command([*base, "init"])
    moments = []
    for what in life(guest, chance):
        print(f"\nthe guest: {what}")
        made = command([*base, "backup", "demo", "--quiesce", "none", "--scratch-dir", os.path.join(folder, "scratch")])
        moments.append((made, {t: bytes(b) for t, b in guest.held.items()}))
    rows: List[Tuple[str, ...]] = [("generation", "backup", "disk", "mode", "changed", "zero", "stored", "restored")]
    wrong = 0
    for made, held in moments:
        number = str(made["generation"])
        output = os.path.join(folder, f"restored-{number}")
        command([*base, "restore", "demo", "--at", number, "--output", output])
        for disk in made["disks"]:
            good = same(os.path.join(output, f"{disk['target']}.raw"), held[disk["target"]])
            wrong += not good
            sizes = [f"{disk[key] / 1024:.0f} KiB" for key in ("dirty_bytes", "zero_bytes", "stored_bytes")]
            verdict = "byte for byte" if good else "WRONG"
            rows.append((number, made["backup"], disk["target"], disk["mode"], *sizes, verdict))
    verified = command([*base, "verify", "demo"])
    wrong += len(verified["damage"])
    print()
    show(rows)
    print(f"\n{len(rows) - 1} disks restored, {wrong} wrong, in {time.monotonic() - begun:.1f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
