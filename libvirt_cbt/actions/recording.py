"""A generation written down: its manifest from what was planned and read, and the manifest shown as a result."""

from __future__ import annotations

import os
from typing import Dict, Final, List, Tuple

import libvirt_cbt
from libvirt_cbt import names
from libvirt_cbt.actions import fleecing
from libvirt_cbt.actions.fleecing import Fleece
from libvirt_cbt.actions.planning import DiskPlan
from libvirt_cbt.actions.pulling import Read
from libvirt_cbt.hypervisor import defining, tpm
from libvirt_cbt.nbdio import copy, qcow2
from libvirt_cbt.repository import manifest

MOST_VARIABLES: Final = 128 << 20  # bytes; ARM's firmware has 64 MiB


def recorded(fleece: Fleece, reads: Dict[str, Read]) -> Tuple[manifest.Manifest, manifest.Layers]:
    """The documents that publish a generation; adds the domain's XML to staging."""
    plan = fleece.plan
    files = {"domain.xml": fleece.stage.add("domain.xml", plan.dom.xml.encode())}
    modes = {d.mode for d in plan.disks if d.copy != copy.NOTHING}
    if modes:
        files.update(_variables(fleece))
        files.update(_tpm(fleece))
    made = manifest.Manifest(
        id=plan.intent.id,
        repository=plan.intent.repository,
        domain=plan.intent.domain,
        generation=plan.generation,
        checkpoint=plan.checkpoint,
        kind=("mark" if not modes else modes.pop() if len(modes) == 1 else "mixed"),  # type: ignore[arg-type]
        started=fleece.started,
        frozen_at=fleece.frozen_at,
        finished=fleecing.now(),
        host=plan.intent.host,
        uri=plan.intent.uri,
        tool=libvirt_cbt.__version__,
        quiesce=manifest.Quiesce(
            requested=fleece.quiesced.requested,  # type: ignore[arg-type]
            result=fleece.quiesced.result,  # type: ignore[arg-type]
            frozen_ms=fleece.quiesced.frozen_ms,
        ),
        disks=[_disk(fleece, disk, reads[disk.target]) for disk in plan.disks],
        unprotected=plan.unprotected,
        files=files,
        warnings=_warnings(fleece),
    )
    entries = {target: read.layer for target, read in reads.items() if read.layer}
    return made, manifest.Layers(backup=plan.intent.id, disks=entries)


def _variables(fleece: Fleece) -> Dict[str, str]:
    """The UEFI variables as a file of the generation.

    No bitmap and no freeze covers them: they are as they were a little after the disks.
    """
    path = defining.nvram(fleece.plan.dom.xml)
    if path is None:
        return {}
    try:
        data = fleece.plan.host.site.read(path, MOST_VARIABLES)
    except (OSError, ValueError) as e:
        reason = e.strerror or str(e) if isinstance(e, OSError) else str(e)
        fleece.warnings.append(f"the UEFI variables are not in this backup: {path}: {reason}")
        return {}
    return {"nvram": fleece.stage.add("nvram", data)}


def _tpm(fleece: Fleece) -> Dict[str, str]:
    """The state of an emulated TPM as a file of the generation, as it is a little after the disks."""
    host, dom = fleece.plan.host, fleece.plan.dom
    if not defining.emulated_tpm(dom.xml):
        return {}
    path = tpm.state(host.uri, dom.xml, fleece.plan.intent.domain.uuid)
    try:
        if path is None:
            raise ValueError("its XML has it elsewhere")
        data = host.site.read(path, tpm.MOST)
    except (OSError, ValueError) as e:
        reason = f"{path}: {e.strerror}" if isinstance(e, OSError) else str(e)
        fleece.warnings.append(f"the state of the emulated TPM is not in this backup: {reason}")
        return {}
    return {"tpm": fleece.stage.add("tpm", data)}


def _disk(fleece: Fleece, plan: DiskPlan, read: Read) -> manifest.ManifestDisk:
    disk = plan.disk
    return manifest.ManifestDisk(
        target=disk.target,
        mode=plan.mode,  # type: ignore[arg-type]
        reason=plan.reason,
        base=plan.base,
        parent=plan.parent,
        lineage=plan.lineage,
        capacity=disk.capacity,
        granularity=qcow2.granularity(disk.header) if disk.format == "qcow2" else None,
        source=manifest.Source(
            type=disk.source_type,
            path=disk.source,
            format=disk.format,
            inode=disk.inodes[0] if disk.inodes else None,
        ),
        serial=disk.serial,
        wwn=disk.wwn,
        delta=read.delta,
        change_id=names.change_id(plan.lineage, fleece.plan.generation, fleece.plan.intent.id),
        dirty_bytes=read.counts.dirty_bytes,
        data_bytes=read.counts.data_bytes,
        zero_bytes=read.counts.zero_bytes,
        read_bytes=read.counts.read_bytes,
        stored_bytes=os.stat(fleece.stage.layer(disk.target)).st_blocks * 512 if read.layer else 0,
    )


def _warnings(fleece: Fleece) -> List[str]:
    found = list(fleece.warnings)
    if fleece.quiesced.reason and fleece.plan.request.quiesce == "auto":
        found.append(f"crash-consistent only: {fleece.quiesced.reason}")
    for plan in fleece.plan.disks:
        first = plan.reason is None or plan.reason.startswith(("first backup", "asked for"))
        if not first and plan.copy == copy.ALL:
            found.append(f"disk {plan.target} was copied in full: {plan.reason}")
        elif not first and plan.base is None:
            found.append(f"disk {plan.target} begins a new lineage: {plan.reason}")
        if plan.disk.encrypted and plan.copy != copy.NOTHING:
            found.append(f"disk {plan.target} is encrypted by its QEMU; this backup holds it in plaintext")
    return found
