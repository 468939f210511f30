"""The fleecing point: one frozen moment of all disks, open for reading, and how it ends.

`backup`, `mark` and `start` begin here: plan, intent, scratch, freeze, begin, thaw.  `offline` is its like for a guest
that is off.
docs/architecture.md has the write order, and what a crash after each step leaves.
"""

from __future__ import annotations

import os
import socket
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Dict, Iterator, List, Optional, Tuple

from libvirt_cbt import errors, names, processes
from libvirt_cbt.actions import exports, phases, planning, tracking
from libvirt_cbt.actions.planning import DiskPlan
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import checkpoints, connection, documents, domain, guard, job, quiesce, scratch
from libvirt_cbt.repository import manifest, staging, store

QUIESCE = ("auto", "agent", "none")


@dataclass(frozen=True)
class Request:
    """What a user asks of a generation; `mark`: no data.  `max_duration` is in seconds, `max_chain` in layers."""

    mark: bool = False
    full: bool = False
    disks: Tuple[str, ...] = ()
    exclude: Tuple[str, ...] = ()
    quiesce: str = "auto"
    scratch_dir: Optional[str] = None
    max_duration: Optional[float] = None
    allow_plaintext: bool = False
    max_chain: int = planning.MAX_CHAIN

    def __post_init__(self) -> None:
        if self.quiesce not in QUIESCE:
            raise errors.Usage(reason=f"quiesce is one of {', '.join(QUIESCE)}, not '{self.quiesce}'")

    def of(self, dom: domain.Domain) -> Request:
        """The same with the targets of disks that were named by their serial.  Errors: NoSuchDisk."""
        disks, exclude = (tuple(dom.disk(one).target for one in asked) for asked in (self.disks, self.exclude))
        return replace(self, disks=disks, exclude=exclude)


@dataclass(frozen=True)
class Plan:
    """What is known of a generation before its first effect."""

    host: connection.Host
    dom: domain.Domain
    request: Request
    disks: List[DiskPlan]
    unprotected: List[manifest.Unprotected]
    places: scratch.Places
    intent: manifest.Intent
    generation: int
    checkpoint: Optional[str]


def running(host: connection.Host, uuid: names.DomainUuid) -> domain.Domain:
    """The domain as it runs.  Errors: NotRunning."""
    return require_running(domain.read(host, uuid))


def require_running(dom: domain.Domain) -> domain.Domain:
    """The same.  Errors: NotRunning."""
    if not dom.running:
        raise errors.NotRunning(domain=names.printable(dom.name), state=dom.state_name)
    return dom


def planned(session: Session, kept: store.DomainStore, dom: domain.Domain, request: Request) -> Plan:
    """Decides everything that can be decided beforehand; changes nothing.  Errors: those of planning.plan."""
    plans = planning.plan(
        dom,
        kept,
        checkpoints.listed(session.host, dom.uuid),
        partial(tracking.bitmaps, session),
        full=request.full,
        only=request.disks,
        exclude=request.exclude,
        mark=request.mark,
        allow_plaintext=request.allow_plaintext,
        max_chain=request.max_chain,
    )
    return drawn(session, kept, dom, request, plans)


def drawn(
    session: Session,
    kept: store.DomainStore,
    dom: domain.Domain,
    request: Request,
    plans: planning.Plans,
    images: Optional[Dict[str, str]] = None,
) -> Plan:
    """The plan of a generation from those of its disks; `images` of a guest that is off need no scratch files."""
    host = session.host
    disks, unprotected = plans
    identity = names.new_backup_id()
    targets = [d.target for d in disks] if images is None else []
    places = scratch.places(host.site, identity, targets, request.scratch_dir or session.scratch_dir)
    tracked = any(not d.disk.untracked for d in disks)
    intent = manifest.Intent(
        id=identity,
        repository=kept.repository.id,
        domain=manifest.DomainName(uuid=dom.uuid, name=dom.name),
        host=host.hostname,
        tool_host=socket.gethostname(),
        boot_id=processes.boot_id(),
        uri=host.uri,
        checkpoint=names.checkpoint(identity),
        run_dir=places.run_dir,
        socket=places.socket,
        scratch_dir=places.directory,
        scratch=places.scratch,
        images=images or {},
        phase="planned",
        pid=os.getpid(),
        started=now(),
    )
    return Plan(
        host, dom, request, disks, unprotected, places, intent,
        generation=kept.next_generation(),
        checkpoint=names.checkpoint(identity) if tracked else None,
    )  # fmt: skip


class Fleece(ABC):
    """An open fleecing point, of a guest in whatever state; made by an `opened`, closed by `close`."""

    def __init__(self, session: Session, plan: Plan, stage: staging.Staging) -> None:
        self.plan, self.stage = plan, stage
        self._session = session
        self.quiesced = quiesce.Quiesced(plan.request.quiesce, "none", None, None)
        self.started = self.frozen_at = now()
        self._begun = time.monotonic()
        self.warnings: List[str] = []

    @abstractmethod
    def exported(self) -> Dict[str, exports.Exported]:
        """Where each disk can be read, by target."""

    def stop(self) -> None:
        """To be asked often during a copy.  Errors: Interrupted, TookTooLong."""
        self._session.watch.stop()
        limit = self.plan.request.max_duration
        if limit is not None and time.monotonic() - self._begun > limit:
            raise errors.TookTooLong(domain=names.printable(self.plan.dom.name), seconds=limit)

    @abstractmethod
    def alive(self) -> bool:
        """Whether what is exported is still this moment."""

    @abstractmethod
    def lost(self, error: errors.CbtError) -> errors.CbtError:
        """Why a copy really failed."""

    @abstractmethod
    def let_go(self) -> None:
        """Ends the point because it could not be read to its end."""

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around a copy.  One that fails lets the guest go first: the servers of ours, which end next, may hang with the
        storage of the repository.  Errors: why it really failed.
        """
        try:
            yield
        except (errors.SourceLost, errors.NbdError) as e:
            reason = self.lost(e)
            self.let_go()
            raise reason from None
        except BaseException:
            self.let_go()
            raise

    @abstractmethod
    def close(self) -> None:
        """Ends the point, which must have lasted until now, and removes what it needed on disk.  Errors: SourceLost."""


class Job(Fleece):
    """The point of a running guest: a backup job."""

    def __init__(
        self,
        session: Session,
        plan: Plan,
        stage: staging.Staging,
        files: scratch.Made,
        watcher: guard.Guard,
        hooks: phases.Phases,
    ) -> None:
        super().__init__(session, plan, stage)
        self._files, self._guard, self._hooks = files, watcher, hooks
        self._stuck: Optional[errors.CbtError] = None
        self.warnings = [files.tight] if files.tight else []

    def begin(self) -> None:
        """Freeze, begin, thaw.  Errors: NotConsistent, HookStopped, HypervisorError."""
        plan = self.plan
        self._guard.watch(plan.places, {d.target: d.disk.capacity for d in plan.disks})
        with self._hooks.bracketed(plan.request.quiesce):
            freezes = plan.request.quiesce != "none" and not quiesce.unfreezable(plan.dom)
            self.stage.advance("freezing", self._guard.process, thaw_owed=freezes)
            bracket = quiesce.Quiesce(plan.host, plan.dom, plan.request.quiesce, self._guard)
            _, self.quiesced = bracket.around(self._begin_job, self._hooks.frozen)
            self.frozen_at = now()
            self._begun = time.monotonic()
            self._guard.begun()
            self.stage.advance("running", thaw_owed=not self.quiesced.thawed, durably=False)

    def _begin_job(self) -> None:
        try:
            _begin(self.plan)
        except errors.HypervisorError as e:
            raise self._switched_off(e) or e from None

    def exported(self) -> Dict[str, exports.Exported]:
        """Where each disk can be read, by target.  Errors: SourceLost, HostRefused, ProofNotAsked, HypervisorError."""
        try:
            running = job.exports(self.plan.host, self.plan.dom.uuid)
        except errors.HypervisorError as e:
            raise self.lost(e) from None
        reached = self.plan.host.site.reach(self.plan.places, self.stop)
        return exports.of(running, self.plan.disks, reached, self.stop)

    def stop(self) -> None:
        """To be asked often during a copy.  Errors: Interrupted, ScratchExhausted, TookTooLong."""
        super().stop()
        self._guard.check()

    def alive(self) -> bool:
        """Whether what is exported is still this moment: only the job that exports on our socket holds it.

        A way to another host that was cut is made again.  Errors: SourceLost when it cannot be.
        """
        plan = self.plan
        with self._reachable():
            if not job.exporting(plan.host, plan.dom.uuid, plan.places.socket):
                return False
            plan.host.site.reach(plan.places, self.stop)
        return True

    def lost(self, error: errors.CbtError) -> errors.CbtError:
        """Why a copy really failed: the guard or the guest may have ended the job under it."""
        try:
            self._guard.check()
        except errors.ScratchExhausted as e:
            return e
        with self._reachable():
            gone = self._switched_off(error)
            if gone is None and not self.alive():
                gone = errors.SourceLost(target=self._target(error), reason="somebody else ended the backup job")
        return gone or error

    def _switched_off(self, error: errors.CbtError) -> Optional[errors.SourceLost]:
        """The error to tell of instead, if the guest has gone; of a daemon that does not answer nothing can be learnt."""
        if isinstance(error, errors.NoHypervisor) or domain.alive(self.plan.host, self.plan.dom.uuid):
            return None
        return errors.SourceLost(target=self._target(error), reason="the guest was switched off or its QEMU died")

    def _target(self, error: errors.CbtError) -> str:
        return str(error.facts.get("target") or error.facts.get("export") or self.plan.disks[0].target)

    def let_go(self) -> None:
        """Ends the job; where it does not end, `undo` tells of it and does not wait once more."""
        try:
            job.end(self.plan.host, self.plan.dom.uuid, self.plan.places.socket)
        except errors.CbtError as e:
            self._stuck = e

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        """A host that cannot be reached any more is a source that was lost; this machine's daemon may only be away."""
        try:
            yield
        except errors.NoHypervisor as e:
            if self.plan.host.site.here:
                raise
            raise errors.SourceLost(target=self.plan.disks[0].target, reason=str(e)) from None

    def close(self) -> None:
        """Ends the job, which must have lasted until now, and removes what it needed on disk.

        Whoever else ended it (the guard, an administrator) let the guest change what was still being read.
        Errors: ScratchExhausted, SourceLost.
        """
        plan = self.plan
        if not job.end(plan.host, plan.dom.uuid, plan.places.socket):
            gone = errors.SourceLost(target=plan.disks[0].target, reason="the backup job ended before the copy did")
            raise self.lost(gone)
        self._guard.dismiss()
        plan.host.site.leave(plan.places)
        plan.host.site.remove(plan.places)  # before publication: the intent that names these files goes with it

    def undo(self, error: BaseException) -> None:
        """Ends the job and removes the new checkpoint, because something failed before the generation was published."""
        host, uuid = self.plan.host, self.plan.dom.uuid
        self.stage.keep = self._files.keep = True  # until it is known that `recover` has nothing to do
        if not self._stuck:
            self.let_go()
        if self._stuck:
            if isinstance(error, errors.CbtError):
                way_out = f"`libvirt-cbt recover {errors.argument(names.printable(self.plan.dom.name))}` ends it"
                error.add(f"the backup job may still run, {way_out} once libvirt and QEMU answer")
            return
        self._files.keep = False
        try:
            checkpoints.delete(host, uuid, self.plan.intent.checkpoint)
        except errors.CbtError:
            return  # the guest is off: `recover` does it when it runs again
        self.stage.keep = False

    def stay(self) -> None:
        """Leaves the point open when this process ends; the guard goes on.  Errors: HypervisorError without a guard."""
        self.plan.host.site.leave(self.plan.places)
        reason = self._guard.stay(self.plan.places)
        if reason:
            raise errors.HypervisorError(reason=f"a fleecing point is not left open without a guard: {reason}")
        self.stage.advance("open")
        self.stage.keep = self._files.keep = True


@contextmanager
def opened(session: Session, kept: store.DomainStore, plan: Plan, hooks: phases.Phases) -> Iterator[Job]:
    """The open point; whatever fails inside undoes job, checkpoint, scratch and staging.

    Errors: NotConsistent, HookStopped, ScratchSpace, ScratchDenied, HypervisorError, RepositoryError and kin.
    """
    sizes = {d.target: d.disk.capacity for d in plan.disks}
    # Left in this order, inside out: the job ends and the checkpoint goes before the scratch files it writes to.
    with guard.Guard(plan.host, plan.dom.uuid) as watcher, staging.begun(kept, plan.intent) as stage:
        with scratch.made(plan.host.site, plan.places, sizes, plan.dom.qemu_ids) as files:
            fleece = Job(session, plan, stage, files, watcher, hooks)
            try:
                session.watch.stop()
                fleece.begin()
                yield fleece
            except BaseException as error:
                if not stage.published:
                    fleece.undo(error)
                raise


def _begin(plan: Plan) -> None:
    rows = []
    disks = {d.target: d for d in plan.disks}
    for disk in plan.dom.disks:  # every disk of the domain is named: libvirt silently leaves out the others
        one = disks.get(disk.target)
        rows.append(
            documents.JobDisk(
                target=disk.target,
                scratch=plan.places.scratch[disk.target] if one else None,
                tracked=bool(one and not disk.untracked),
                incremental=one.checkpoint if one else None,
            )
        )
    checkpoint = None
    if plan.checkpoint:
        checkpoint = documents.checkpoint(plan.checkpoint, documents.description(plan.intent.repository), rows)
    jobs = (documents.backup(server, rows) for server in plan.host.site.servers(plan.places))
    job.begin(plan.host, plan.dom.uuid, jobs, checkpoint, plan.intent.checkpoint)


def now() -> str:
    """This moment as manifests write it: ISO 8601, UTC, milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
