"""Builds the boot image of the guest with an OS: busybox, QEMU's guest agent with its libraries, virtio modules."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Final, List

from tests.guests import daemon

CACHE: Final = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../.cache"))
# In the order in which they need each other; ext4 is built in, and with Debian 13 so are some of these.
MODULES: Final = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
)
RELAY: Final = "cbt.agent=relay"
AGENT_PORT: Final = "org.qemu.guest_agent.0"
RELAY_PORT: Final = "org.libvirt-cbt.relay"
# Every disk with a file system is mounted on /disks/<name>; the agent's port is linked where it looks for it.
# With RELAY on the kernel's command line no agent runs: while somebody on the host is connected to the relay's port,
# the agent's port is open and bytes are handed on both ways.  A port may be opened once only and both pumps must share
# that; it reads as ended while its host's end is shut, and writing waits for it.  Opened anew it holds nothing old.
INIT: Final = f"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /run /tmp /disks /sbin /usr/bin /usr/sbin /var/run /etc
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in {" ".join(MODULES)}; do [ ! -e /modules/$module.ko ] || insmod /modules/$module.ko; done
ln -sf /proc/self/mounts /etc/mtab
for disk in /sys/block/vd*; do
    name=${{disk##*/}}
    mkdir -p /disks/$name
    mount -t ext4 /dev/$name /disks/$name || rmdir /disks/$name
done
mkdir -p /dev/virtio-ports
for port in /sys/class/virtio-ports/*; do
    ln -s ../${{port##*/}} "/dev/virtio-ports/$(cat $port/name)"
done
echo ready
connected() {{ grep -q 'host_connected: 1' /sys/kernel/debug/virtio-ports/$relay; }}
pump() {{ while :; do cat <&$1 >&$2; sleep 0.05; done; }}
if grep -q {RELAY} /proc/cmdline; then
    mount -t debugfs debugfs /sys/kernel/debug
    relay=$(readlink /dev/virtio-ports/{RELAY_PORT})
    relay=${{relay##*/}}
    while :; do
        until connected; do sleep 0.05; done
        (
            exec 4<>/dev/virtio-ports/{RELAY_PORT} 3<>/dev/virtio-ports/{AGENT_PORT}
            pump 3 4 & up=$!
            pump 4 3 & down=$!
            while connected; do sleep 0.1; done
            kill -9 $up $down
            killall -9 cat
            sleep 0.1 # they are gone and have shut the ports
        ) 2>/dev/null
    done
fi
while :; do
    /usr/sbin/qemu-ga -m virtio-serial -p /dev/virtio-ports/{AGENT_PORT} -t /run
    sleep 1
done
"""
# What the agent's guest-shutdown calls, as `shutdown -hP +0`.
SHUTDOWN: Final = """#!/bin/sh
sync
umount -a -t ext4
poweroff -f
"""


@dataclass(frozen=True)
class Boot:
    """Paths of a kernel and its initramfs."""

    kernel: str
    initrd: str


def boot() -> Boot:
    """The newest kernel that script/bootstrap --tests fetched, and an initramfs for it.  Errors: daemon.Unavailable."""
    kernels = sorted(glob.glob(os.path.join(CACHE, "kernel/*/vmlinuz")), key=os.path.getmtime)
    if not kernels:
        raise daemon.Unavailable("no kernel for a guest with an OS; script/bootstrap --tests fetches it")
    busybox, agent = (_tool(name) for name in ("busybox", "qemu-ga"))
    modules = os.path.dirname(kernels[-1])
    key = hashlib.sha256()
    for path in (__file__, busybox, agent, kernels[-1]):
        status = os.stat(path)
        key.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    initrd = os.path.join(CACHE, f"initramfs-{key.hexdigest()[:16]}.cpio")
    with open(os.path.join(CACHE, "initramfs.lock"), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(initrd):
            _build(initrd, busybox, agent, modules)
    return Boot(kernels[-1], initrd)


def _tool(name: str) -> str:
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin")
    if not path:
        raise daemon.Unavailable(f"{name} is not installed; script/bootstrap --tests does it")
    return os.path.realpath(path)


def _build(initrd: str, busybox: str, agent: str, modules: str) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        root = os.path.join(folder, "root")
        _copy(busybox, root, "/bin/busybox")
        _copy(agent, root, "/usr/sbin/qemu-ga")
        for library in _libraries(agent):
            _copy(library, root, library)
        os.mkdir(os.path.join(root, "modules"))
        for module in MODULES:
            _unpack(os.path.join(modules, f"{module}.ko"), os.path.join(root, f"modules/{module}.ko"))
        for path, text in (("/init", INIT), ("/sbin/shutdown", SHUTDOWN)):
            full = root + path
            os.makedirs(os.path.dirname(full), exist_ok=True)
            with open(full, "w", encoding="utf-8") as script:
                script.write(text)
            os.chmod(full, 0o755)
        names = sorted(
            os.path.relpath(os.path.join(place, name), root)
            for place, folders, files in os.walk(root)
            for name in (*folders, *files)
        )
        made = os.path.join(folder, "initrd")
        # Not compressed: the emulated guest would spend longer on that than on reading it.
        with open(made, "wb") as archive:
            subprocess.run(
                ["cpio", "--quiet", "-o", "-H", "newc", "--owner", "0:0"],
                cwd=root,
                input="\n".join(names).encode(),
                stdout=archive,
                check=True,
            )
        os.chmod(made, 0o644)
        os.replace(made, initrd)


def _copy(source: str, root: str, place: str) -> None:
    target = root + place
    os.makedirs(os.path.dirname(target), exist_ok=True)
    shutil.copy(source, target)
    os.chmod(target, 0o755)


def _unpack(source: str, target: str) -> None:
    """A kernel module, compressed or not, or none."""
    for path, opened in ((source, open), (f"{source}.xz", lzma.open)):
        if os.path.exists(path):
            with opened(path, "rb") as packed, open(target, "wb") as file:
                shutil.copyfileobj(packed, file)


def _libraries(program: str) -> List[str]:
    """The shared libraries and the loader, at the paths under which it looks for them."""
    listed = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    return re.findall(r"(?:=> )?(/[^ ]+) \(0x", listed)
