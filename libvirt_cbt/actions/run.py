"""What a policy asks of one domain: a backup, then the rules that thin out, then a look at what is stored."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Callable, Final, List, Optional, TypeVar

from libvirt_cbt import errors, names
from libvirt_cbt.actions import results
from libvirt_cbt.actions.backup import backup
from libvirt_cbt.actions.policies import Chosen
from libvirt_cbt.actions.prune import prune
from libvirt_cbt.actions.session import Session
from libvirt_cbt.actions.verify import verify
from libvirt_cbt.hypervisor import domain
from libvirt_cbt.nbdio.lanes import READING, Options
from libvirt_cbt.repository import checked, outcomes, store

T = TypeVar("T")

KEEP: Final = ("keep_last", "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly", "keep_within")
WARNED: Final = 3


def run(session: Session, chosen: Chosen, *, dry_run: bool = False) -> results.Run:
    """Each of the three is done although one before it failed; a failure is in the result, and noted in the repository.

    Errors: Interrupted; NoRepository and kin.
    """
    begun = time.monotonic()
    kept = session.repository(make=not dry_run).domain(chosen.uuid)
    work = _Work(session, kept, chosen, dry_run=dry_run)
    made = work.tried("backup", work.backup)
    held = bool(kept.ids())
    pruned = work.tried("prune", work.prune) if held and work.thins else None
    read = work.tried("verify", work.verify) if held and chosen.rules.verify and not dry_run else None
    warned = bool(made and made.warnings and chosen.rules.strict)
    return results.Run(
        domain=chosen.name,
        uuid=chosen.uuid,
        host=chosen.place.name,
        policy=chosen.policy,
        code=work.failures[0].code if work.failures else WARNED if warned else 0,
        backup=made,
        prune=pruned,
        verify=read,
        failures=work.failures,
        seconds=round(time.monotonic() - begun, 3),
    )


class _Work:
    """The three verbs under a domain's rules."""

    def __init__(self, session: Session, kept: store.DomainStore, chosen: Chosen, *, dry_run: bool) -> None:
        self._session, self._kept, self._dry_run = session, kept, dry_run
        self._rules = chosen.rules
        self._now = datetime.now(timezone.utc)
        self._options = Options(bandwidth=self._rules.bandwidth) if self._rules.bandwidth else Options()
        self.failures: List[results.Failure] = []

    @property
    def thins(self) -> bool:
        return self._rules.forget or any(getattr(self._rules, name) is not None for name in KEEP)

    def tried(self, work: outcomes.Work, verb: Callable[[], T]) -> Optional[T]:
        try:
            return verb()
        except errors.Interrupted:
            raise
        except errors.CbtError as e:
            # A policy that does not fit its domain fails again tomorrow; `noted` takes these for slips of the pen.
            if isinstance(e, (errors.Usage, errors.NotFound)) and not self._dry_run:
                outcomes.failed(self._kept, work, e)
            self._failed(work, e.code, e.kind, str(e))
            return None

    def _failed(self, work: str, code: int, kind: str, message: str) -> None:
        self.failures.append(results.Failure(work, code, kind, message))
        self._session.watch.failed(f"{work}: {message}", work=work, kind=kind, code=code)

    def backup(self) -> results.Backup:
        rules, session = self._rules, self._session
        audit = due(self._audited(), rules.audit_every, self._now)
        return backup(
            session,
            self._kept.uuid,
            full=due(self._newest_full(), rules.full_every, self._now),
            disks=rules.disks,
            exclude=_present(session, self._kept.uuid, rules.exclude_disks),
            require_all=rules.require_all,
            allow_plaintext=rules.allow_plaintext,
            quiesce=rules.quiesce,
            scratch_dir=rules.scratch_dir,
            compress=rules.compress,
            wait=rules.wait,
            max_duration=rules.max_duration,
            audit=audit,
            heal=audit and rules.heal,
            dry_run=self._dry_run,
            max_chain=rules.max_chain,
            options=self._options,
        )

    def prune(self) -> results.Prune:
        rules = {name: getattr(self._rules, name) for name in KEEP}
        done = prune(
            self._session, self._kept.uuid, forget=self._rules.forget, dry_run=self._dry_run, options=self._options, **rules
        )
        for one in done.skipped:
            if one.code != errors.Busy.code:
                self._failed("prune", one.code, one.kind, f"backup {one.backup} was not removed: {one.reason}")
        return done

    def verify(self) -> results.Verify:
        options = replace(self._options, requests=READING)
        done = verify(self._session, self._kept.uuid, sample=self._rules.verify, options=options)
        for one in done.damage:
            where = f" disk {one.target}" if one.target else ""
            self._failed("verify", errors.Damaged.code, "Damaged", f"backup {one.backup}{where} is damaged: {one.reason}")
        return done

    def _newest_full(self) -> Optional[datetime]:
        """Where a prune took the full ones away the oldest backup took their place."""
        held = [m for m in self._kept.generations() if m.kind != "mark"]
        found = [m for m in held if m.kind == "full"][-1:] or held[:1]
        return checked.moment(found[0].frozen_at) if found else None

    def _audited(self) -> Optional[datetime]:
        """When an audit went well; before the first the age of the oldest backup counts."""
        last = outcomes.read(self._kept).get("audit")
        if last and not last.code:
            return checked.moment(last.time)
        generations = self._kept.generations()
        return checked.moment(generations[0].frozen_at) if generations else None


def due(last: Optional[datetime], every: Optional[float], now: datetime) -> bool:
    """Whether something that was done at `last` is to be done again; what was never done comes by itself."""
    if last is None or every is None:
        return False
    return now - last >= timedelta(seconds=every)


def _present(session: Session, uuid: names.DomainUuid, targets: List[str]) -> List[str]:
    """Those of the disks that the domain has: one policy is for many domains."""
    if not targets:
        return []
    disks = domain.read(session.host, uuid).disks
    known = {disk.target for disk in disks} | {disk.serial for disk in disks}
    return [target for target in targets if target in known]
