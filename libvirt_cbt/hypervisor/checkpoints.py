"""The checkpoints of a domain: which are ours, whether their bitmaps are sound, and how they end."""

from __future__ import annotations

from typing import Dict, List, Optional, Sequence

import libvirt

from libvirt_cbt import names
from libvirt_cbt.hypervisor import connection, documents

_MISSING = "not found in backing chain"


def listed(
    host: connection.Host, uuid: names.DomainUuid, *, sizes: bool = True
) -> Dict[str, documents.CheckpointInfo]:
    """Every checkpoint by name; with `sizes` dirty bytes are there when the guest runs (5 to 8 ms each, no job needed).

    https://libvirt.org/html/libvirt-libvirt-domain-checkpoint.html#virDomainCheckpointGetXMLDesc
    """
    dom = host.lookup(uuid)
    found: Dict[str, documents.CheckpointInfo] = {}
    with host.translated(uuid):
        running = sizes and dom.isActive()
        for checkpoint in dom.listAllCheckpoints(0):
            flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
            try:
                text = checkpoint.getXMLDesc(flags | libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE if running else flags)
            except libvirt.libvirtError as e:
                if e.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT:
                    raise  # somebody's job: no answer does not mean that the bitmaps are broken
                text = checkpoint.getXMLDesc(flags)
            info = documents.checkpoint_info(text)
            found[info.name] = info
    return found


def ours(found: Dict[str, documents.CheckpointInfo], repository: str) -> List[str]:
    return [name for name, info in found.items() if documents.repository_of(info) == repository]


def redefine(
    host: connection.Host, uuid: names.DomainUuid, info: documents.CheckpointInfo, present: Sequence[str]
) -> Dict[str, Optional[int]]:
    """Gives a checkpoint back whose metadata libvirt has lost; what each of its disks then has.

    Of the targets `present` on the domain those in `info.disks` are tracked.  A disk whose bitmap is missing or broken
    has None; where no disk has one, nothing is left behind, neither metadata nor the remains of broken bitmaps.  Of a
    domain that is off libvirt knows no bitmaps: it takes the caller's word for them.
    https://libvirt.org/html/libvirt-libvirt-domain-checkpoint.html#virDomainCheckpointCreateFlags
    """
    text = documents.redefinition(info, [documents.JobDisk(t, None, tracked=t in info.disks) for t in present])
    dom = host.lookup(uuid)
    plainly = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
    with host.translated(uuid):
        if not dom.isActive():
            dom.checkpointCreateXML(text, plainly)
            return dict(info.disks)
        try:
            dom.checkpointCreateXML(text, plainly | libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE)
        except libvirt.libvirtError as e:
            if e.get_error_code() != libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT:
                raise
            # At least one is not sound.  All of it comes back in one step, the unsound with it: so the sound ones go on,
            # and whatever is in the images goes when the checkpoint goes.
            dom.checkpointCreateXML(text, plainly)
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN | libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE
        sizes = documents.checkpoint_info(dom.checkpointLookupByName(info.name).getXMLDesc(flags)).disks
    if all(size is None for size in sizes.values()):
        delete(host, uuid, info.name)
    return sizes


def delete(host: connection.Host, uuid: names.DomainUuid, name: str) -> bool:
    """Removes a checkpoint, its bitmaps and its metadata; False when there was none.

    Where some bitmaps are missing libvirt refuses the whole, and dropping the metadata alone would leave the others
    recording for ever: so the metadata goes, comes back over the disks that still have it, and then all goes.
    """
    dom = host.lookup(uuid)
    try:
        checkpoint = dom.checkpointLookupByName(name)
    except libvirt.libvirtError as e:
        if e.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
            return False
        raise host.translate(e, uuid) from None
    with host.translated(uuid):
        try:
            checkpoint.delete(0)
        except libvirt.libvirtError as e:
            if _MISSING not in str(e) and e.get_error_code() != libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT:
                raise
            _delete_partly_missing(dom, checkpoint)
    return True


def _delete_partly_missing(dom: object, checkpoint: object) -> None:
    info = documents.checkpoint_info(
        checkpoint.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN)  # type: ignore[attr-defined]
    )
    checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)  # type: ignore[attr-defined]
    for target in info.disks:
        # One disk at a time: whichever bitmap is missing is then known by its own refusal.
        disks = [documents.JobDisk(t, None, tracked=t == target) for t in info.disks]
        text = documents.redefinition(info, disks)
        redefined = dom.checkpointCreateXML(  # type: ignore[attr-defined]
            text, libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
        )
        try:
            redefined.delete(0)
        except libvirt.libvirtError:
            redefined.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
