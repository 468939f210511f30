"""A domain that is shut off for good: nothing of libvirt's will touch its images while we change them."""

from __future__ import annotations

import libvirt

from libvirt_cbt import errors, names
from libvirt_cbt.hypervisor import connection


def require(host: connection.Host, uuid: names.DomainUuid) -> None:
    """Errors: NotShutOff; also with a saved memory image, or snapshots, which belong to the images as they are."""
    dom = host.lookup(uuid)
    with host.translated(uuid):
        name = names.printable(dom.name())
        if dom.isActive():
            raise errors.NotShutOff(domain=name, reason="it runs; shut it down first")
        if dom.hasManagedSaveImage():
            way = f"`virsh managedsave-remove {errors.argument(name)}` drops it"
            raise errors.NotShutOff(domain=name, reason=f"its memory was saved and belongs to the present disks; {way}")
        if dom.snapshotNum():
            way = f"`virsh snapshot-delete {errors.argument(name)} SNAPSHOT`"
            raise errors.NotShutOff(domain=name, reason=f"it has snapshots, which live in the present images; {way}")


def forget(host: connection.Host, uuid: names.DomainUuid, checkpoint: str) -> None:
    """Drops a checkpoint's metadata; its bitmaps are gone, or go otherwise."""
    dom = host.lookup(uuid)
    with host.translated(uuid):
        try:
            dom.checkpointLookupByName(checkpoint).delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
        except libvirt.libvirtError as e:
            if e.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
                raise
