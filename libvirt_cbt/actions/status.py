"""Whether a domain is tracked, how much has changed since, and how old its newest backup is."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Dict, List, Optional

from libvirt_cbt import errors, names
from libvirt_cbt.actions import events, offline, results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import bitmaps, checkpoints, documents, domain, job
from libvirt_cbt.repository import manifest, store


def status(session: Session, domain_name: Optional[str] = None) -> List[results.Status]:
    """One domain, or every domain of libvirt; dirty bytes are None for one that is off.

    Errors: NoSuchDomain, NoHypervisor, NoRepository.
    """
    host = session.host
    repository = session.repository()
    uuids = [host.find(domain_name)] if domain_name else [uuid for _, uuid in host.all()]
    return [_status(session, repository.domain(uuid)) for uuid in uuids]


def _status(session: Session, kept: store.DomainStore) -> results.Status:
    dom = domain.read(session.host, kept.uuid)
    found = checkpoints.listed(session.host, kept.uuid)
    history = kept.generations()
    newest = history[-1] if history else None
    with_data = [m for m in history if m.kind != "mark"]
    # libvirt tells sizes of running guests only; of one that is off the images tell whether the bitmaps are sound.
    asleep = offline.unusable(session.host, kept, dom) if bitmaps.off(dom) else {}
    return results.Status(
        domain=dom.name,
        uuid=dom.uuid,
        state=dom.state_name,
        generation=newest.generation if newest else None,
        backup=with_data[-1].id if with_data else None,
        time=newest.frozen_at if newest else None,
        age_seconds=_age(newest.frozen_at) if newest else None,
        disks=[_disk(kept, disk, newest, found, asleep, running=dom.running) for disk in dom.disks],
        open_point=_open_point(session, kept),
        doubt=events.doubtful(kept),
        unreadable=[str(one.error) for one in kept.unread()],
    )


def _open_point(session: Session, kept: store.DomainStore) -> Optional[results.OpenPoint]:
    intent = kept.open_point()
    if intent is None:
        return None
    # Once it is committing its readers are done, and the job may have ended.
    alive = intent.phase == "committing" or job.exporting(session.host, kept.uuid, intent.socket)
    address = job.exports(session.host, kept.uuid).address if alive and intent.phase == "open" else ""
    return results.OpenPoint(intent.id, kept.next_generation(), intent.started, address or intent.socket, alive)


def _disk(
    kept: store.DomainStore,
    disk: domain.Disk,
    newest: Optional[manifest.Manifest],
    found: Dict[str, documents.CheckpointInfo],
    asleep: Dict[str, str],
    *,
    running: bool,
) -> results.StatusDisk:
    reason = disk.unprotected or disk.untracked
    dirty: Optional[int] = None
    if not reason and newest is None:
        reason = "never backed up"
    elif not reason and disk.target in asleep:
        reason = asleep[disk.target]
    elif not reason and newest and newest.checkpoint not in found:
        reason = f"libvirt no longer has the checkpoint of generation {newest.generation}"
    elif not reason and newest:
        dirty = found[newest.checkpoint or ""].disks.get(disk.target)
        if running and dirty is None:
            reason = f"the bitmap of generation {newest.generation} is missing or broken"
    return results.StatusDisk(disk.target, reason is None, reason, dirty, _depth(kept, newest, disk.target))


def _depth(kept: store.DomainStore, newest: Optional[manifest.Manifest], target: str) -> int:
    if newest is None or newest.disk(target) is None:
        return 0
    backup = kept.newest_backup(newest, target)
    try:
        return len(kept.chain(names.BackupId(backup.id), target)) if backup else 0
    except errors.Damaged:
        return 0


def _age(time: str) -> float:
    then = datetime.fromisoformat(time.replace("Z", "+00:00"))
    return round((datetime.now(timezone.utc) - then).total_seconds(), 1)
