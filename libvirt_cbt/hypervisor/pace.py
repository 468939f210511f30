"""The pace of a guest while scratch room is scarce: no faster than the guard can end the job before the room is gone.

With plenty of room nothing is touched.  A guest of several hundred MiB a second
fills what is left while a busy host gives the guard its turn, and then its own
writes fail or it is stopped.  The limits are libvirt's own (virDomainSetBlockIoTune),
of the running guest only, and in a group that carries the backup's id: so whoever
finds them later knows whose they are.
"""

from __future__ import annotations

import os
import time
from typing import Dict, Final, List

import libvirt

from libvirt_cbt import errors, names
from libvirt_cbt.hypervisor import connection, domain

# What QEMU saves for one write is whole clusters, one more than its length for where it begins and ends.
CLUSTER: Final = 64 * 1024
_LIVE: Final = libvirt.VIR_DOMAIN_AFFECT_LIVE


def group(socket: str) -> str:
    """The name of the limits of the job that exports on `socket`."""
    return names.checkpoint(names.BackupId(os.path.basename(os.path.dirname(socket))))


def slow(host: connection.Host, uuid: names.DomainUuid, name: str, speed: int) -> List[str]:
    """Limits all disks together to what costs `speed` bytes of scratch a second; which disks.

    A disk that has limits keeps them: they are its owner's.
    """
    limits = {
        "write_bytes_sec": max(1, speed // 2),
        "write_iops_sec": max(1, speed // 2 // (2 * CLUSTER)),
        "group_name": name,
    }
    slowed = []
    dom = host.lookup(uuid)
    for target in domain.targets(host, uuid):
        try:
            if not any(value for key, value in dom.blockIoTune(target, _LIVE).items()):
                dom.setBlockIoTune(target, limits, _LIVE)
                slowed.append(target)
        except libvirt.libvirtError:
            continue  # an empty drive, or a libvirt that cannot
    return slowed


def restore(host: connection.Host, uuid: names.DomainUuid, name: str) -> List[str]:
    """Takes away the limits of that name; from which disks."""
    freed: List[str] = []
    dom = host.lookup(uuid)
    none: Dict[str, int] = {"write_bytes_sec": 0, "write_iops_sec": 0}
    for target in domain.targets(host, uuid):
        try:
            if dom.blockIoTune(target, _LIVE).get("group_name") == name:
                dom.setBlockIoTune(target, none, _LIVE)
                freed.append(target)
        except libvirt.libvirtError:
            continue  # the guest is off, and its limits with it
    return freed


def stopped(host: connection.Host, uuid: names.DomainUuid) -> bool:
    """Whether QEMU has stopped the guest for a write that failed (it repeats that write when the guest goes on)."""
    try:
        state, reason = host.lookup(uuid).state()
    except (libvirt.libvirtError, errors.CbtError):
        return False
    return bool(state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_IOERROR)


def go_on(host: connection.Host, uuid: names.DomainUuid, seconds: float) -> None:
    """Lets a guest go on that was, or within `seconds` is, stopped for a write to the scratch files of a job now ended."""
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        if stopped(host, uuid):
            try:
                host.lookup(uuid).resume()
            except (libvirt.libvirtError, errors.CbtError):
                pass  # it was switched off, or somebody else was faster
        time.sleep(0.05)
