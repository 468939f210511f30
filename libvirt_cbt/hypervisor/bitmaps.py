"""Checkpoints of a domain that is off: libvirt keeps their metadata, and the bitmaps are in the images."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final, FrozenSet, List, Mapping, Optional, Sequence

import libvirt

from libvirt_cbt import names
from libvirt_cbt.hypervisor import checkpoints, connection, documents, domain

_OFF: Final = (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED)
_UNCLEAN: Final[Mapping[int, str]] = {
    libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED: "the guest was switched off, not shut down",
    libvirt.VIR_DOMAIN_SHUTOFF_CRASHED: "the guest's QEMU died",
    libvirt.VIR_DOMAIN_SHUTOFF_SAVED: "the guest is saved: what it held in memory only is not in the backup",
}


@dataclass(frozen=True)
class Rest:
    """How a domain came to be off; `unclean` is what its disks may lack, `known` whether it surely shut down."""

    known: bool
    unclean: Optional[str]


def off(dom: domain.Domain) -> bool:
    """Whether the domain has no QEMU, so that its images may be read."""
    return dom.state in _OFF


def rest(host: connection.Host, uuid: names.DomainUuid) -> Rest:
    """How the domain was ended, as far as libvirt knows: after a restart of the daemon it does not."""
    dom = host.lookup(uuid)
    with host.translated(uuid):
        state, reason = dom.state()
        if dom.hasManagedSaveImage():
            reason = libvirt.VIR_DOMAIN_SHUTOFF_SAVED
    if state == libvirt.VIR_DOMAIN_CRASHED:
        reason = libvirt.VIR_DOMAIN_SHUTOFF_CRASHED
    return Rest(reason == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN, _UNCLEAN.get(reason))


def redefine(
    host: connection.Host, dom: domain.Domain, name: str, repository: str, tracked: FrozenSet[str]
) -> None:
    """Tells libvirt of a checkpoint whose bitmaps are in the images of the `tracked` disks already.

    https://libvirt.org/html/libvirt-libvirt-domain-checkpoint.html#VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
    """
    _redefined(host, dom.uuid, name, repository, [d.target for d in dom.disks], tracked)


def drop(host: connection.Host, uuid: names.DomainUuid, name: str) -> bool:
    """Removes the metadata of a checkpoint whose bitmaps are gone; False when there was none."""
    with host.translated(uuid):
        for checkpoint in host.lookup(uuid).listAllCheckpoints(0):
            if checkpoint.getName() == name:
                checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
                return True
    return False


def forget(
    host: connection.Host, uuid: names.DomainUuid, name: str, repository: str, targets: Sequence[str]
) -> List[str]:
    """Removes bitmaps of a checkpoint of ours that a running guest has loaded, whether libvirt knows of it or not.

    `targets` may have it; returns the ones that had.  One disk at a time: whichever has none is known by its refusal.
    """
    checkpoints.delete(host, uuid, name)
    gone = []
    present = domain.targets(host, uuid)
    for target in targets:
        if target not in present:
            continue  # unplugged meanwhile
        _redefined(host, uuid, name, repository, present, frozenset({target}))
        with host.translated(uuid):
            checkpoint = host.lookup(uuid).checkpointLookupByName(name)
            try:
                checkpoint.delete(0)
            except libvirt.libvirtError:
                checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
            else:
                gone.append(target)
    return gone


def _redefined(
    host: connection.Host,
    uuid: names.DomainUuid,
    name: str,
    repository: str,
    targets: Sequence[str],
    tracked: FrozenSet[str],
) -> None:
    info = documents.CheckpointInfo(name, documents.description(repository), None, int(time.time()), {})
    text = documents.redefinition(info, [documents.JobDisk(t, None, tracked=t in tracked) for t in targets])
    with host.translated(uuid):
        host.lookup(uuid).checkpointCreateXML(text, libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE)
