"""Scratch files on a host of which only libvirt is reached: a storage pool of ours, which carries the backup's id.

libvirt makes the folder and the files, counts the room, and removes them.  The pool is persistent: after a crash of
anything, the host too, whoever comes next finds it by its name.
https://libvirt.org/formatstorage.html, https://libvirt.org/html/libvirt-libvirt-storage.html
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, Final, List, Mapping, Optional, Tuple

import libvirt

from libvirt_cbt import errors, xmldoc
from libvirt_cbt.hypervisor import documents

AVAILABLE: Final = 3  # in virStoragePoolInfo
CAPACITY: Final = 1  # in virStorageVolInfo
KIB: Final = 1024


def make(conn: Any, directory: str, qemu_ids: Optional[Tuple[int, int]], floor: int, sizes: Mapping[str, int]) -> int:
    """Folder and sparse qcow2 files, path to size in bytes; bytes that are free then.  With less than `floor` no file.

    A file that is there is an error of libvirt's.  Errors: libvirtError; whatever was made stays.
    """
    pool = conn.storagePoolDefineXML(documents.pool(directory, qemu_ids), 0)
    pool.build(0)
    pool.create(0)
    free = _free(pool)
    if free < floor:
        return free
    for path, size in sizes.items():
        # libvirt has whole KiB made, and rounds up; QEMU wants the disk's own size.
        volume = pool.createXML(documents.volume(path, size // KIB * KIB), 0)
        if size % KIB:
            volume.resize(size, 0)
    free = _free(pool)
    for path, size in sizes.items():
        found = pool.storageVolLookupByName(os.path.basename(path)).info()[CAPACITY]
        if found != size:  # QEMU would refuse it, and libvirt 9.0 does not survive that
            raise errors.HypervisorError(reason=f"its libvirt makes {path} with {found} bytes where {size} are needed")
    return free


def room(conn: Any, directory: str) -> int:
    """Bytes that are free where the pool of `directory` is.  Errors: libvirtError when there is none."""
    return _free(conn.storagePoolLookupByName(os.path.basename(directory)))


def remove(conn: Any, directory: str, paths: List[str]) -> List[str]:
    """Removes the pool with those of the files that are there; what went.  Errors: libvirtError, HypervisorError."""
    try:
        pool = conn.storagePoolLookupByName(os.path.basename(directory))
    except libvirt.libvirtError as e:
        if e.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_POOL:
            raise
        return []
    at = xmldoc.text(xmldoc.parse(pool.XMLDesc(0), "a storage pool"), "target/path")
    if at != directory:
        raise errors.HypervisorError(reason=f"storage pool {os.path.basename(directory)} is of {at}, not of {directory}")
    gone = []
    with suppress(libvirt.libvirtError):  # its folder has gone, or was never made
        if not pool.isActive():
            pool.create(0)
    if pool.isActive():
        pool.refresh(0)
        for volume in pool.listAllVolumes():
            path = volume.path()
            if path in paths:
                volume.delete(0)
                gone.append(path)
        pool.destroy()
    with suppress(libvirt.libvirtError):  # not there, or it holds something that is not ours
        pool.delete(0)
        gone.append(directory)
    pool.undefine()
    return gone


def _free(pool: Any) -> int:
    pool.refresh(0)
    return int(pool.info()[AVAILABLE])
