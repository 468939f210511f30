"""One backup, from the top: plan, freeze, begin, thaw, copy, end, publish, retire.

docs/architecture.md has the write order, and what a crash after each step leaves.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Collection, Dict, Iterator, List, Optional, Tuple

import libvirt_cbt
from libvirt_cbt import errors, names
from libvirt_cbt.actions import planning, recover, results
from libvirt_cbt.actions.planning import DiskPlan
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import checkpoints, connection, documents, domain, job, quiesce, scratch
from libvirt_cbt.nbdio import copy, qcow2, server
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import manifest, staging, store

QUIESCE = ("auto", "agent", "none")


@dataclass(frozen=True)
class Request:
    """What a user asks of a backup; `compress` is zstd or none, `wait` seconds for another job to end."""

    full: bool = False
    disks: Tuple[str, ...] = ()
    exclude: Tuple[str, ...] = ()
    quiesce: str = "auto"
    scratch_dir: Optional[str] = None
    compress: str = "zstd"
    wait: float = 0.0


@dataclass(frozen=True)
class _Run:
    """What is known of a run before its first effect."""

    host: connection.Host
    dom: domain.Domain
    request: Request
    options: Options
    plans: List[DiskPlan]
    unprotected: List[manifest.Unprotected]
    places: scratch.Places
    intent: manifest.Intent
    generation: int
    checkpoint: Optional[str]


def backup(
    session: Session,
    domain_name: str,
    *,
    full: bool = False,
    disks: Collection[str] = (),
    exclude: Collection[str] = (),
    quiesce: str = "auto",
    scratch_dir: Optional[str] = None,
    compress: str = "zstd",
    wait: float = 0.0,
    dry_run: bool = False,
    options: Optional[Options] = None,
) -> results.Backup:
    """Backs up a running domain: each disk by its changed blocks, or in full with the reason.

    `domain_name` is a name, UUID or id.  With `dry_run` nothing is changed and the bytes are estimates.
    Errors: NoSuchDomain, NoSuchDisk, NotRunning, DomainBusy, RepositoryBusy, NotConsistent (with quiesce "agent"),
    ScratchSpace, SourceLost, RepositoryError and kin; nothing is published then, and the next run is an increment.
    """
    _check_request(quiesce, compress)
    request = Request(full, tuple(disks), tuple(exclude), quiesce, scratch_dir, compress, wait)
    host = session.host
    uuid = host.find(domain_name)
    kept = session.repository(make=not dry_run).domain(uuid)
    if dry_run:
        return _estimate(session, kept, uuid, request)
    with kept.lock(wait):
        recover.reconcile(session, kept)
        dom = _running(host, uuid)
        job.wait_idle(host, uuid, dom.name, wait)
        result = _take(session, kept, dom, request, options or Options())
        recover.retire(session, kept)
        return result


def _check_request(quiesce: str, compress: str) -> None:
    if quiesce not in QUIESCE:
        raise errors.Usage(reason=f"quiesce is one of {', '.join(QUIESCE)}, not '{quiesce}'")
    if compress not in ("zstd", "none"):
        raise errors.Usage(reason=f"compress is zstd or none, not '{compress}'")


def _running(host: connection.Host, uuid: names.DomainUuid) -> domain.Domain:
    dom = domain.read(host, uuid)
    if not dom.running:
        raise errors.NotRunning(domain=names.printable(dom.name), state=dom.state_name)
    return dom


def _take(
    session: Session, kept: store.DomainStore, dom: domain.Domain, request: Request, options: Options
) -> results.Backup:
    begun = time.monotonic()
    run = _planned(session, kept, dom, request, options)
    sizes = {p.target: p.disk.capacity for p in run.plans}
    started = _now()
    # Left in this order, inside out: the job ends and the checkpoint goes before the scratch files it writes to.
    with staging.begun(kept, run.intent) as stage, scratch.made(run.places, sizes, dom.qemu_ids):
        with _undone_on_error(run, stage):
            stage.advance("freezing")
            _, quiesced = quiesce.Quiesce(run.host, dom, request.quiesce).around(lambda: _begin(run))
            frozen_at = _now()
            stage.advance("running")
            pulled = _copied(session, kept, run, stage)
            job.end(run.host, dom.uuid, run.places.socket)
            scratch.remove(run.places)  # before publication: the intent that names these files goes with it
            warnings = _warnings(run, quiesced)
            made = _manifest(kept, run, stage, pulled, quiesced, (started, frozen_at), warnings)
            session.watch.stop()
            stage.publish(*made)
    return _result(made[0], round(time.monotonic() - begun, 3))


def _planned(session: Session, kept: store.DomainStore, dom: domain.Domain, request: Request, options: Options) -> _Run:
    host = session.host
    found = checkpoints.listed(host, dom.uuid)
    plans, unprotected = planning.plan(dom, kept, found, full=request.full, only=request.disks, exclude=request.exclude)
    identity = names.new_backup_id()
    places = scratch.places(identity, [p.target for p in plans], request.scratch_dir)
    history = kept.generations()
    tracked = any(not p.disk.untracked for p in plans)
    intent = manifest.Intent(
        id=identity,
        repository=kept.repository.id,
        domain=manifest.DomainName(uuid=dom.uuid, name=dom.name),
        host=host.hostname,
        tool_host=socket.gethostname(),
        boot_id=recover.boot_id(),
        uri=host.uri,
        checkpoint=names.checkpoint(identity),
        run_dir=places.run_dir,
        socket=places.socket,
        scratch_dir=places.directory,
        scratch=places.scratch,
        phase="planned",
        pid=os.getpid(),
        started=_now(),
    )
    return _Run(
        host, dom, request, options, plans, unprotected, places, intent,
        generation=history[-1].generation + 1 if history else 1,
        checkpoint=names.checkpoint(identity) if tracked else None,
    )  # fmt: skip


def _begin(run: _Run) -> None:
    rows = []
    plans = {p.target: p for p in run.plans}
    for disk in run.dom.disks:  # every disk of the domain is named: libvirt silently leaves out the others
        plan = plans.get(disk.target)
        rows.append(
            documents.JobDisk(
                target=disk.target,
                scratch=run.places.scratch[disk.target] if plan else None,
                tracked=bool(plan and not disk.untracked),
                incremental=plan.checkpoint if plan else None,
            )
        )
    checkpoint = None
    if run.checkpoint:
        checkpoint = documents.checkpoint(run.checkpoint, documents.description(run.intent.repository), rows)
    document = documents.backup(run.places.socket, rows)
    job.begin(run.host, run.dom.uuid, document, checkpoint, run.intent.checkpoint)


@contextmanager
def _undone_on_error(run: _Run, stage: staging.Staging) -> Iterator[None]:
    """Ends the job and removes the new checkpoint when anything fails before the generation is published."""
    try:
        yield
    except BaseException:
        if not stage.published:
            try:
                job.end(run.host, run.dom.uuid, run.places.socket)
                checkpoints.delete(run.host, run.dom.uuid, run.intent.checkpoint)
            except errors.CbtError:
                stage.keep = True  # the guest is off, or the daemon: `recover` does it from the intent
        raise


def _copied(
    session: Session, kept: store.DomainStore, run: _Run, stage: staging.Staging
) -> Dict[str, Tuple[copy.Pulled, manifest.Delta, Optional[manifest.LayerEntry]]]:
    """Copies all disks at once; per disk what was read, its delta's record and its layer's."""
    running = job.exports(run.host, run.dom.uuid)
    with ExitStack() as stack:
        pulls, deltas, contents = [], {}, {}
        for plan in run.plans:
            deltas[plan.target] = stage.deltas(plan.target)
            sink = None
            if plan.copy != planning.NOTHING:
                contents[plan.target] = stage.contents(plan.target)
                sink = stack.enter_context(_sink(run, stage, plan))
            # Only an increment copies what marks since its parent recorded; for the others the range is empty.
            after = plan.since if plan.copy == planning.DIRTY else plan.base or 0
            earlier = stack.enter_context(kept.deltas(plan.target, after, plan.base or 0, lineage=plan.lineage))
            export = documents.require(running, plan.target)
            bitmap = export.bitmap or f"cbt-{plan.target}"
            pulls.append(
                copy.Pull(
                    target=plan.target,
                    source=server.Endpoint(run.places.socket, export.export),
                    capacity=plan.disk.capacity,
                    bitmap=f"qemu:dirty-bitmap:{bitmap}" if plan.base else None,
                    copy=plan.copy,
                    expected=plan.estimate,
                    sink=sink,
                    also=earlier.union,
                    delta=deltas[plan.target].append,
                    contents=contents[plan.target].append if sink else deltas[plan.target].append,
                )
            )
        pulled = _pull(session, run, pulls)
    out = {}
    for plan, one in zip(run.plans, pulled):
        digest, rows = deltas[plan.target].finish()
        entry = None
        if plan.target in contents:
            qcow2.finish_layer(stage.layer(plan.target), plan.disk.capacity)
            name = os.path.basename(contents[plan.target].path)
            entry = manifest.LayerEntry(
                file=f"{plan.target}.qcow2", parent=plan.parent, contents=name, digest=contents[plan.target].finish()[0]
            )
        out[plan.target] = (one, manifest.Delta(digest=digest, extents=rows), entry)
    return out


@contextmanager
def _sink(run: _Run, stage: staging.Staging, plan: DiskPlan) -> Iterator[copy.Sink]:
    path = stage.layer(plan.target)
    compress = run.request.compress == "zstd"
    backing = store.layer_backing(plan.parent, plan.target)
    qcow2.create_layer(path, plan.disk.capacity, backing=backing, compress=compress)
    with server.sink(path, run.places.run_dir, compress=compress) as endpoint:
        yield copy.Sink(endpoint, path, has_parent=plan.parent is not None)


def _pull(session: Session, run: _Run, pulls: List[copy.Pull]) -> List[copy.Pulled]:
    try:
        return copy.pull(pulls, run.options, progress=session.watch.progress, stop=session.watch.stop)
    except (errors.SourceLost, errors.NbdError) as e:
        if domain.alive(run.host, run.dom.uuid):
            raise
        target = e.facts.get("target") or e.facts.get("export")
        raise errors.SourceLost(target=target, reason="the guest was switched off or its QEMU died") from None


def _warnings(run: _Run, quiesced: quiesce.Quiesced) -> List[str]:
    found = []
    if quiesced.reason and run.request.quiesce == "auto":
        found.append(f"crash-consistent only: {quiesced.reason}")
    for plan in run.plans:
        first = plan.reason is None or plan.reason.startswith(("first backup", "asked for"))
        if not first and plan.copy == planning.ALL:
            found.append(f"disk {plan.target} was copied in full: {plan.reason}")
    return found


def _manifest(
    kept: store.DomainStore,
    run: _Run,
    stage: staging.Staging,
    pulled: Dict[str, Tuple[copy.Pulled, manifest.Delta, Optional[manifest.LayerEntry]]],
    quiesced: quiesce.Quiesced,
    times: Tuple[str, str],
    warnings: List[str],
) -> Tuple[manifest.Manifest, manifest.Layers]:
    files = {"domain.xml": stage.add("domain.xml", run.dom.xml.encode())}
    disks = []
    for plan in run.plans:
        one, delta, entry = pulled[plan.target]
        disk = plan.disk
        stored = os.stat(stage.layer(plan.target)).st_blocks * 512 if entry else 0
        local_qcow2 = disk.format == "qcow2" and bool(disk.inodes)
        disks.append(
            manifest.ManifestDisk(
                target=disk.target,
                mode=plan.mode,  # type: ignore[arg-type]
                reason=plan.reason,
                base=plan.base,
                parent=plan.parent,
                lineage=plan.lineage,
                capacity=disk.capacity,
                granularity=qcow2.granularity(disk.source) if local_qcow2 else None,
                source=manifest.Source(
                    type=disk.source_type,
                    path=disk.source,
                    format=disk.format,
                    inode=disk.inodes[0] if disk.inodes else None,
                ),
                serial=disk.serial,
                wwn=disk.wwn,
                delta=delta,
                change_id=names.change_id(plan.lineage, run.generation, run.intent.id),
                dirty_bytes=one.dirty_bytes,
                data_bytes=one.data_bytes,
                zero_bytes=one.zero_bytes,
                read_bytes=one.read_bytes,
                stored_bytes=stored,
            )
        )
    modes = {p.mode for p in run.plans if p.copy != planning.NOTHING}
    made = manifest.Manifest(
        id=run.intent.id,
        repository=kept.repository.id,
        domain=run.intent.domain,
        generation=run.generation,
        checkpoint=run.checkpoint,
        kind=("mark" if not modes else modes.pop() if len(modes) == 1 else "mixed"),  # type: ignore[arg-type]
        started=times[0],
        frozen_at=times[1],
        finished=_now(),
        host=run.intent.host,
        uri=run.intent.uri,
        tool=libvirt_cbt.__version__,
        quiesce=manifest.Quiesce(
            requested=quiesced.requested,  # type: ignore[arg-type]
            result=quiesced.result,  # type: ignore[arg-type]
            frozen_ms=quiesced.frozen_ms,
        ),
        disks=disks,
        unprotected=run.unprotected,
        files=files,
        warnings=warnings,
    )
    entries = {t: e for t, (_, _, e) in pulled.items() if e}
    return made, manifest.Layers(backup=run.intent.id, disks=entries)


def _result(made: manifest.Manifest, seconds: float, *, dry_run: bool = False) -> results.Backup:
    return results.Backup(
        domain=made.domain.name,
        uuid=made.domain.uuid,
        backup=None if dry_run else made.id,
        generation=made.generation,
        checkpoint=made.checkpoint,
        quiesce=results.Quiesced(made.quiesce.requested, made.quiesce.result, made.quiesce.frozen_ms),
        disks=[disk_result(d) for d in made.disks],
        unprotected=[results.Unprotected(u.target, u.reason) for u in made.unprotected],
        seconds=seconds,
        warnings=list(made.warnings),
        dry_run=dry_run,
    )


def disk_result(disk: manifest.ManifestDisk) -> results.BackupDisk:
    return results.BackupDisk(
        target=disk.target,
        mode=disk.mode,
        reason=disk.reason,
        base=disk.base,
        parent=disk.parent,
        capacity=disk.capacity,
        dirty_bytes=disk.dirty_bytes,
        data_bytes=disk.data_bytes,
        zero_bytes=disk.zero_bytes,
        read_bytes=disk.read_bytes,
        stored_bytes=disk.stored_bytes,
        change_id=disk.change_id,
    )


def _estimate(session: Session, kept: store.DomainStore, uuid: names.DomainUuid, request: Request) -> results.Backup:
    host = session.host
    dom = _running(host, uuid)
    found = checkpoints.listed(host, uuid)
    plans, unprotected = planning.plan(dom, kept, found, full=request.full, only=request.disks, exclude=request.exclude)
    disks = []
    for plan in plans:
        whole = domain.allocation(host, uuid, plan.target) if plan.copy == planning.ALL else 0
        dirty = plan.estimate if plan.base else whole
        data = {planning.ALL: whole, planning.DIRTY: dirty, planning.NOTHING: 0}[plan.copy]
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
    history = kept.generations()
    return results.Backup(
        domain=dom.name,
        uuid=uuid,
        backup=None,
        generation=history[-1].generation + 1 if history else 1,
        checkpoint=None,
        quiesce=results.Quiesced(request.quiesce, "none", None),
        disks=disks,
        unprotected=[results.Unprotected(u.target, u.reason) for u in unprotected],
        seconds=0.0,
        warnings=[],
        dry_run=True,
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
