"""One backup, from the top: plan, open a fleecing point, copy, end, publish, retire."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Collection, List, Optional, Tuple

from libvirt_cbt import errors, names
from libvirt_cbt.actions import (
    auditing,
    events,
    fleecing,
    healing,
    opening,
    phases,
    planning,
    pulling,
    recording,
    recover,
    results,
    telling,
)
from libvirt_cbt.actions.fleecing import Request
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import bitmaps, domain
from libvirt_cbt.nbdio import copy
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import outcomes, store


def backup(
    session: Session,
    domain_name: str,
    *,
    full: bool = False,
    disks: Collection[str] = (),
    exclude: Collection[str] = (),
    require_all: bool = False,
    quiesce: str = "auto",
    scratch_dir: Optional[str] = None,
    compress: str = "zstd",
    wait: float = 0.0,
    max_duration: Optional[float] = None,
    audit: bool = False,
    heal: bool = False,
    allow_plaintext: bool = False,
    dry_run: bool = False,
    max_chain: int = planning.MAX_CHAIN,
    options: Optional[Options] = None,
) -> results.Backup:
    """Backs up a domain, running or off: each disk by its changed blocks, or in full with the reason.

    `domain_name` is a name, UUID or id; `wait` and `max_duration` are seconds: for other work on the domain to end, and
    for the job to last at most.  `audit` reads whole disks and compares them with the chain; what differs and was not
    told of by a bitmap ends the run (AuditFailed), or with `heal` is stored and counts as changed now.  `heal` also holds
    what the backups below show against its digests, stores what is damaged again, and writes damaged layers anew where
    the guest still holds their bytes.  With `require_all` a disk that cannot be backed up is an error, unless `disks` or
    `exclude` leave it out.  A disk that QEMU encrypts is stored in plaintext, with `allow_plaintext`, or not at all.  A
    `dry_run` estimates and changes nothing.
    A chain ends with `max_chain` layers.
    Errors: NoSuchDomain, NoSuchDisk, DiskUnprotected, WouldBePlaintext, DomainBusy, ImageInUse, RepositoryBusy, HookStopped,
    NotConsistent (with quiesce "agent"), ScratchSpace and kin, SourceLost, RepositoryError and kin; nothing is published
    then, and the next run is an increment.
    """
    _require_sense(compress)
    request = Request(
        False, full, tuple(disks), tuple(exclude), quiesce, scratch_dir, max_duration, allow_plaintext, max_chain
    )
    begun, options = time.monotonic(), options or Options()
    if dry_run:
        return _estimate(session, domain_name, request, require_all=require_all)
    with phases.around(session, "backup", domain_name) as hooks:
        uuid = session.host.find(domain_name)
        kept = session.repository(make=True).domain(uuid)
        with outcomes.noted(kept, "backup", *(("audit",) if audit else ())), kept.lock(wait, session.watch.stop):
            warnings = opening.prepared(session, kept, domain_name, wait)
            plan = _planned(session, kept, request, require_all=require_all)
            ills = healing.looked(session, kept, plan, options) if heal else healing.healthy(plan)
            hooks.preflight(ills.plan)
            with opening.opened(session, kept, ills.plan, hooks) as fleece:
                fleece.warnings += warnings
                hooks.ready(fleece)
                audits, missed = (
                    _audited(session, kept, fleece, options, ills.again, heal=heal) if audit else (None, {})
                )
                zstd = compress == "zstd"
                reads = pulling.pulled(session, kept, fleece, options, compress=zstd, missed=missed, again=ills.again)
                fleece.close()
                hooks.disks_done(reads)
                fleece.warnings += hooks.complaints() + events.unsure(kept, ills.plan.disks, audits or [])
                made, layers = recording.recorded(fleece, reads)
                session.watch.stop()
                fleece.stage.publish(made, layers)
            events.settled(kept, made, audits or [])
            recover.retire(session, kept)
            healed = healing.mended(session, kept, made, ills.ill, options, compress=zstd)
        result = telling.backup(made, round(time.monotonic() - begun, 3), audits)
        result = replace(result, healed=healed, warnings=result.warnings + healing.sentences(healed))
        return replace(result, warnings=result.warnings + hooks.committed(kept, made, result))


def _require_sense(compress: str) -> None:
    """Errors: Usage."""
    if compress not in ("zstd", "none"):
        raise errors.Usage(reason=f"compress is zstd or none, not '{compress}'")


def _planned(session: Session, kept: store.DomainStore, request: Request, *, require_all: bool) -> fleecing.Plan:
    plan = opening.planned(session, kept, request)
    if require_all:
        planning.require_all(plan.dom, plan.unprotected)
    return plan


def _audited(
    session: Session,
    kept: store.DomainStore,
    fleece: fleecing.Fleece,
    options: Options,
    again: healing.Again,
    *,
    heal: bool,
) -> Tuple[List[results.Audited], auditing.Missed]:
    audits, missed = auditing.audited(session, kept, fleece, options, again)
    wrong = [one for one in audits if one.differing_bytes]
    if wrong and not heal:
        raise errors.AuditFailed(
            domain=names.printable(kept.name),
            differences="; ".join(f"{one.target}: {one.differing_bytes} bytes" for one in wrong),
            audit=[asdict(one) for one in audits],
        )
    fleece.warnings += [
        f"the audit found {one.differing_bytes} bytes of disk {one.target} that no bitmap told of; they are stored now, "
        "older backups since they were written lack them"
        for one in wrong
    ]
    return audits, missed


def _estimate(session: Session, domain_name: str, request: Request, *, require_all: bool) -> results.Backup:
    uuid = session.host.find(domain_name)
    kept = session.repository().domain(uuid)
    planned = _planned(session, kept, request, require_all=require_all)
    disks = []
    for plan in planned.disks:
        whole = domain.allocation(session.host, kept.uuid, plan.target) if plan.copy == copy.ALL else 0
        dirty = plan.estimate if plan.base else whole
        data = {copy.ALL: whole, copy.DIRTY: dirty, copy.NOTHING: 0}[plan.copy]
        disks.append(
            results.BackupDisk(
                plan.target,
                plan.mode,
                plan.reason,
                plan.base,
                plan.parent,
                plan.disk.capacity,
                dirty_bytes=dirty,
                data_bytes=data,
                zero_bytes=0,
                read_bytes=data,
                stored_bytes=data,
                change_id=None,
            )
        )
    unknown = []
    if any(plan.base for plan in planned.disks) and bitmaps.off(planned.dom):
        unknown.append("the guest is off: how much has changed is known only when its images are read")
    return results.Backup(
        domain=planned.dom.name,
        uuid=kept.uuid,
        backup=None,
        generation=planned.generation,
        checkpoint=None,
        quiesce=results.Quiesced(request.quiesce, "none", None),
        disks=disks,
        unprotected=telling.unprotected(planned.unprotected),
        seconds=0.0,
        warnings=unknown,
        dry_run=True,
    )
