"""How the backups of domains fare, from the repository's notes alone: for `check` and `metrics`; no layer is read."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from typing import List, Optional, Tuple

from libvirt_cbt import errors
from libvirt_cbt.actions import results
from libvirt_cbt.repository import checked, manifest, outcomes, runs, store


def domain(kept: store.DomainStore, now: datetime) -> results.DomainHealth:
    """Of a domain that may never have been backed up.  Errors: Damaged when none of it can be read; RepositoryDenied."""
    generations = kept.generations()
    if kept.unread() and not generations:
        raise kept.unread()[0].error
    held = [m for m in generations if m.kind != "mark"]
    newest = held[-1] if held else None
    states = _states(kept)
    return results.DomainHealth(
        domain=kept.name,
        uuid=kept.uuid,
        generation=newest.generation if newest else None,
        time=newest.frozen_at if newest else None,
        age_seconds=_age(checked.moment(newest.frozen_at), now) if newest else None,
        seconds=_seconds(newest) if newest else None,
        consistent=newest.quiesce.result == "frozen" if newest else None,
        backups=len(held),
        marks=len(generations) - len(held),
        dirty_bytes=sum(d.dirty_bytes for d in newest.disks) if newest else None,
        stored_bytes=sum(d.stored_bytes for d in newest.disks) if newest else None,
        unread_seconds=max((_age(state.since, now) or 0.0 for state in states), default=None),
        damage=sum(state.damage for state in states),
        failing=_failing(kept),
        unreadable=[str(one.error) for one in kept.unread()],
    )


def _states(kept: store.DomainStore) -> List[checked.State]:
    try:
        return checked.states(kept)
    except errors.Damaged:
        # The note of what was re-read is: nobody knows of any of them.
        held = [m for m in kept.generations() if m.kind != "mark"]
        return [checked.State(m.id, checked.moment(m.frozen_at) or checked.NEVER, None, 0) for m in held]


def _failing(kept: store.DomainStore) -> List[results.PastFailure]:
    try:
        failing = outcomes.failing(kept)
    except errors.Damaged:
        return []  # a note that nothing depends on
    return [results.PastFailure(work, o.code, o.kind, o.message, o.time) for work, o in sorted(failing.items())]


def last_runs(repository: store.Repository) -> List[results.LastRun]:
    return [
        results.LastRun(
            one.hosts, one.started, one.ended, one.code, one.domains, len(one.failed), [f.message for f in one.host_failures]
        )
        for one in runs.last(repository)
    ]


def space(repository: store.Repository) -> Tuple[int, int]:
    """Bytes in all, and free, of the file system that the repository lies on."""
    found = os.statvfs(repository.path)
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _age(then: Optional[datetime], now: datetime) -> Optional[float]:
    """Never below zero: a clock that was put back makes nothing younger than new."""
    return None if then is None else max(0.0, round((now - then).total_seconds(), 1))


def _seconds(made: manifest.Manifest) -> Optional[float]:
    begun, ended = checked.moment(made.started), checked.moment(made.finished)
    return round((ended - begun).total_seconds(), 3) if begun and ended else None


def now() -> datetime:
    return datetime.now(timezone.utc)
