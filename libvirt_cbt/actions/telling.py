"""What a generation's manifest says, as results.  Nothing here needs libvirt: restoring and listing do without."""

from __future__ import annotations

from typing import Iterable, List, Optional

from libvirt_cbt.actions import results
from libvirt_cbt.repository import manifest


def backup(
    made: manifest.Manifest, seconds: float, audit: Optional[List[results.Audited]] = None
) -> results.Backup:
    """What `backup` returns for a published generation."""
    return results.Backup(
        domain=made.domain.name,
        uuid=made.domain.uuid,
        backup=made.id,
        generation=made.generation,
        checkpoint=made.checkpoint,
        quiesce=quiesced(made.quiesce),
        disks=[disk(d) for d in made.disks],
        unprotected=unprotected(made.unprotected),
        seconds=seconds,
        warnings=list(made.warnings),
        audit=audit,
    )


def quiesced(kept: manifest.Quiesce) -> results.Quiesced:
    return results.Quiesced(kept.requested, kept.result, kept.frozen_ms)


def disk(kept: manifest.ManifestDisk) -> results.BackupDisk:
    return results.BackupDisk(
        target=kept.target,
        mode=kept.mode,
        reason=kept.reason,
        base=kept.base,
        parent=kept.parent,
        capacity=kept.capacity,
        dirty_bytes=kept.dirty_bytes,
        data_bytes=kept.data_bytes,
        zero_bytes=kept.zero_bytes,
        read_bytes=kept.read_bytes,
        stored_bytes=kept.stored_bytes,
        change_id=kept.change_id,
    )


def unprotected(kept: Iterable[manifest.Unprotected]) -> List[results.Unprotected]:
    return [results.Unprotected(one.target, one.reason) for one in kept]
