"""What both guests have in common: a transient or defined domain on the private libvirtd, started and ended."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from typing import Any, Dict, List, Optional

import libvirt
import libvirt_qemu
from lxml import etree

from tests.guests import daemon

END_SECONDS = 90.0  # libvirt has one worker for what guests tell, and that one waits up to 30 s for a lock


class Guest(ABC):
    """A domain; a context manager that leaves nothing of it behind.

    A guest may be defined, started, ended and started again any number of times.
    """

    def __init__(self, host: daemon.Daemon, name: str) -> None:
        self.host = host
        self.name = name
        self.uuid = str(uuid.uuid4())
        # By number, not by name: names may be anything.
        self.folder = tempfile.mkdtemp(prefix="guest-", dir=host.images)
        os.chown(self.folder, -1, host.qemu_ids[1])
        os.chmod(self.folder, 0o711)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @abstractmethod
    def xml(self) -> str:
        """The document that defines it."""

    @property
    def domain(self) -> Any:
        """libvirt's domain object."""
        return self.host.domain(self.name)

    @property
    def has_job(self) -> bool:
        return bool(self.job_type() != libvirt.VIR_DOMAIN_JOB_NONE)

    def job_type(self) -> int:
        """Of the job that it has; a backup's statistics go before the job does, and that is waited for."""
        deadline = time.monotonic() + 5
        while True:
            try:
                return int(self.domain.jobStats().get("type", 0))
            except libvirt.libvirtError as e:
                if "backup job data missing" not in str(e) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    @property
    def running(self) -> bool:
        return bool(self.domain.isActive())

    def define(self) -> None:
        self.host.connection.defineXML(self.xml())

    def start(self) -> None:
        self.domain.create()

    def destroy(self) -> None:
        """Pulls the plug; QEMU still ends in order, so persistent bitmaps are saved."""
        self.domain.destroy()

    def kill(self) -> None:
        """kill -9 of QEMU, as a power cut would; returns when libvirt has seen it."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait_until_off()

    @property
    def pid(self) -> int:
        """QEMU's."""
        return self.host.qemu_pid(self.uuid)

    def wait_until_off(self) -> None:
        deadline = time.monotonic() + END_SECONDS
        while self.running:
            assert time.monotonic() < deadline, f"{self.name} did not end: {self.domain.state()}"
            time.sleep(0.02)

    def undefine(self) -> None:
        """With the metadata of its checkpoints, as bitmaps and images go anyway."""
        self.domain.undefineFlags(
            libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
            | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        )

    def remove(self) -> None:
        """Whatever state it is in: ended, undefined, its files gone."""
        if self.host.pid is None:
            self.host.start()
        for step in (self._wake, self.destroy, self.undefine):
            try:
                step()
            except (libvirt.libvirtError, LookupError, ProcessLookupError):
                continue  # not running, or not there any more
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wake(self) -> None:
        if self.running:
            os.kill(self.pid, signal.SIGCONT)  # a test may have stopped it

    def hmp(self, command: str) -> str:
        """A command on QEMU's monitor, for what only the guest could do otherwise."""
        return str(
            libvirt_qemu.qemuMonitorCommand(self.domain, command, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
        )


def disk_xml(target: str, path: str, fmt: str, **driver: str) -> etree._Element:
    """The <disk> of a virtio disk in a file."""
    disk = etree.Element("disk", type="file", device="disk")
    etree.SubElement(disk, "driver", attrib={"name": "qemu", "type": fmt, **driver})
    etree.SubElement(disk, "source", file=path)
    etree.SubElement(disk, "target", dev=target, bus="virtio")
    etree.SubElement(disk, "alias", name=f"ua-{target}")  # what the monitor calls it
    return disk


def domain_xml(
    guest: Guest, memory_mib: int, disks: List[etree._Element], boot: Optional[Dict[str, str]] = None
) -> etree._Element:
    """An emulated PC with these disks and nothing else; `boot`: kernel, initrd, cmdline."""
    root = etree.Element("domain", type="qemu")
    etree.SubElement(root, "name").text = guest.name
    etree.SubElement(root, "uuid").text = guest.uuid
    etree.SubElement(root, "memory", unit="MiB").text = str(memory_mib)
    etree.SubElement(root, "vcpu").text = "1"
    system = etree.SubElement(root, "os")
    etree.SubElement(system, "type", arch="x86_64", machine="pc").text = "hvm"
    for key, value in (boot or {}).items():
        etree.SubElement(system, key).text = value
    etree.SubElement(etree.SubElement(root, "features"), "acpi")
    devices = etree.SubElement(root, "devices")
    devices.extend(disks)
    etree.SubElement(devices, "controller", type="usb", model="none")
    etree.SubElement(devices, "memballoon", model="none")
    return root
