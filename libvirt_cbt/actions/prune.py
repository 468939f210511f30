"""Takes old backups away by rules, from the top: decide, finish what was begun, take away disk by disk, forget."""

from __future__ import annotations

import itertools
import os
import socket
import time
from datetime import datetime, timezone
from typing import Collection, Dict, Final, List, Optional, Set, Tuple

from libvirt_cbt import errors, points
from libvirt_cbt.actions import carrying, results, taking
from libvirt_cbt.actions.session import Session
from libvirt_cbt.nbdio import reshape
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import manifest, merging, outcomes, pins, retention, store

BEFOREHAND: Final = (errors.ChainPinned, errors.NoRoomToMerge)  # found before anything was changed
NO_TIME: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)


def prune(
    session: Session,
    domain_name: str,
    *,
    keep_last: Optional[int] = None,
    keep_hourly: Optional[int] = None,
    keep_daily: Optional[int] = None,
    keep_weekly: Optional[int] = None,
    keep_monthly: Optional[int] = None,
    keep_yearly: Optional[int] = None,
    keep_within: Optional[str] = None,
    remove: Collection[str] = (),
    forget: bool = False,
    dry_run: bool = False,
    options: Optional[Options] = None,
) -> results.Prune:
    """Removes the backups that no rule keeps, and those in `remove` (numbers or ids); any can go but the newest of each
    disk and the protected ones.  A removed backup is a mark from then on; `forget` drops all generations before the
    oldest backup that is left, but for those whose checkpoint may be alive.  `keep_within` is a duration such as 1y5m7d2h.

    What could not be removed is in `skipped`, if anything else could be done.  A backup whose manifest is damaged stays,
    and its layers as they are; while there is one nothing is forgotten.
    Errors: Usage without anything to do; NotInRepository, NoSuchBackup; RepositoryBusy; ChainPinned, NoRoomToMerge,
    Damaged when nothing could be done; RepositoryError and kin.
    """
    within = retention.duration(keep_within) if keep_within else None
    rules = retention.Rules(keep_last, keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly, within)
    if not rules.any and not remove and not forget:
        raise errors.Usage(reason="prune needs a rule such as --keep-daily 7, or --remove ID, or --forget")
    begun = time.monotonic()
    kept = session.stored(domain_name)
    _require_known(kept)
    if dry_run:
        decision = _decided(kept, rules, remove)
        merged = _foreseen(kept, {c.id for c in decision.removed})
        removed = {c.id for c in decision.removed}
        gone = [m.id for m in _forgettable(session, kept, removed)] if forget and not kept.unread() else []
        return _result(kept, decision, merged, gone, [], 0, begun, dry_run=True)
    with outcomes.noted(kept, "prune"), kept.lock():
        _require_known(kept)
        decision = _decided(kept, rules, remove)
        before = _occupied(kept)
        work = taking.Work(session, kept, options or Options())
        killed = merging.begun(kept)
        if killed:
            pins.outlive(kept, session.watch.stop)
        _settle(session, kept, mend=killed)
        _intend(kept, [c.id for c in decision.removed])
        work.take_away({c.id for c in decision.removed})
        gone = _forget(session, kept, work) if forget else []
        if all(isinstance(f.error, BEFOREHAND) or not f.target for f in work.failures):
            merging.end(kept)
        freed = before - _occupied(kept)
        kept.reserve()
        if work.failures and not (work.done or gone):
            raise work.failures[0].error
        return _result(kept, decision, work.merged, gone, work.failures, freed, begun)


def now() -> datetime:
    return datetime.now(timezone.utc)


# What goes


def _require_known(kept: store.DomainStore) -> None:
    """What lies on what must be known of all there is.  Errors: Damaged."""
    for one in kept.unread():
        if one.id is None:
            raise one.error
    for backup in kept.members():
        kept.layers(backup)


def _decided(kept: store.DomainStore, rules: retention.Rules, remove: Collection[str]) -> retention.Decision:
    asked = [kept.resolve(points.at(text)) for text in remove]
    for one in asked:
        if one.kind == "mark" and not kept.layers(one.id).removed:
            raise errors.Usage(reason=f"generation {one.generation} is a mark: it holds no data that could be removed")
    newest = _newest(kept)
    candidates = []
    for generation in kept.generations():
        if generation.kind == "mark":
            continue
        stays = ["protected"] if kept.protected(generation.id) else []
        stays += [f"the newest with disk {target}" for target, one in newest.items() if one == generation.id]
        candidates.append(
            retention.Candidate(generation.id, generation.generation, _time(generation), " and ".join(stays))
        )
    return retention.decide(candidates, rules, now(), [one.id for one in asked if one.kind != "mark"])


def _newest(kept: store.DomainStore) -> Dict[str, str]:
    """The newest backup of each disk that the newest generation knows, where that is not the newest of all."""
    generations = kept.generations()
    if not generations:
        return {}
    last = generations[-1]
    with_data = [m for m in generations if m.kind != "mark"]
    found: Dict[str, str] = {}
    for target in [*(d.target for d in last.disks), *(u.target for u in last.unprotected)]:
        for generation in reversed(with_data):
            disk = generation.disk(target)
            if disk and disk.mode != "mark":
                if generation is not with_data[-1]:
                    found[target] = generation.id
                break
    return found


def _time(generation: manifest.Manifest) -> datetime:
    try:
        found = datetime.fromisoformat(generation.frozen_at.replace("Z", "+00:00"))
    except ValueError:
        return NO_TIME
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


def _intend(kept: store.DomainStore, removing: List[str]) -> None:
    intent = manifest.PruneIntent(
        repository=kept.repository.id,
        domain=manifest.DomainName(uuid=kept.uuid, name=kept.name),
        removing=removing,
        tool_host=socket.gethostname()[:1024],
        pid=os.getpid(),
        started=now().strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    try:
        merging.begin(kept, intent)
    except errors.RepositoryFull:
        # It says to people what went on; what was in flight is seen in the layers themselves.
        kept.give_back()


def _settle(session: Session, kept: store.DomainStore, *, mend: bool) -> None:
    """Puts right what a prune that was killed left: sizes in whole grains, files that nothing names; with `mend` also
    clusters that nothing uses.
    """
    merging.empty_trash(kept)
    for generation in kept.generations():
        try:
            with pins.changing(kept, [generation.id]):
                layers = kept.layers(generation.id)
                for target in (*layers.disks, *layers.below):
                    layer = os.path.join(kept.directory(generation.id), f"{target}.qcow2")
                    if target in layers.disks and os.path.isfile(layer):
                        reshape.cut(layer, generation.require(target).capacity)
                    if mend and os.path.isfile(layer):
                        reshape.mend_leaks(layer)
                for name in merging.tidy(kept, generation.id):
                    session.watch.note(f"removed {name} of backup {generation.id}, which an ended prune left")
        except errors.CbtError as e:
            session.watch.note(f"backup {generation.id} was left as it is: {e}")


def _forgettable(session: Session, kept: store.DomainStore, removed: Set[str]) -> List[manifest.Manifest]:
    """Everything before the oldest backup, up to a generation whose checkpoint may be alive: the newest two may.

    After an external snapshot older ones are, until the guest runs, and only their generation proves them ours.
    """
    generations = kept.generations()
    first = next((n for n, m in enumerate(generations) if m.kind != "mark" and m.id not in removed), len(generations))
    old = generations[: max(0, min(first, len(generations) - 2))]
    alive = _alive(session, kept) if old else set()
    old = list(itertools.takewhile(lambda m: m.checkpoint not in alive, old))
    return [m for m in old if not kept.protected(m.id)]


def _alive(session: Session, kept: store.DomainStore) -> Set[str]:
    from libvirt_cbt.hypervisor import checkpoints  # where only a repository is, there need be no libvirt

    try:
        return set(checkpoints.listed(session.host, kept.uuid, sizes=False))
    except errors.CbtError:
        return set()  # no such guest here


def _forget(session: Session, kept: store.DomainStore, work: taking.Work) -> List[str]:
    gone: List[str] = []
    unread = kept.unread()
    if unread:
        # Where it belongs is known by the numbers that are missing among the others.
        work.failures.append(taking.Failure(unread[0].id or "", "", unread[0].error))
        return gone
    for generation in _forgettable(session, kept, set()):
        if kept.layers(generation.id).below:
            break
        try:
            with pins.changing(kept, [generation.id]):
                merging.forget(kept, generation.id)
        except errors.ChainPinned as e:
            work.failures.append(taking.Failure(generation.id, "", e))
            break
        gone.append(generation.id)
    return gone


# What is said of it


def _foreseen(kept: store.DomainStore, removed: Set[str]) -> List[results.Merged]:
    """For a dry run: which layers would become one, with estimates of the bytes."""
    found = []
    for generation in kept.generations():
        if generation.id not in removed:
            continue
        for target, entry in kept.layers(generation.id).disks.items():
            at, upper = generation.id, None
            while upper is None:
                above = [
                    one
                    for one in kept.members()
                    if (above_it := kept.layers(one).entry(target)) and above_it.parent == at
                ]
                if not above:
                    break
                at = above[0]
                upper = at if at not in removed else None
            if upper:
                read = upper if entry.parent is None else generation.id
                layer = os.path.join(kept.directory(read), f"{target}.qcow2")
                found.append(results.Merged(target, generation.id, upper, carrying.on_disk(layer)))
    return found


def _result(
    kept: store.DomainStore,
    decision: retention.Decision,
    merged: List[results.Merged],
    forgotten: List[str],
    failures: List[taking.Failure],
    freed: int,
    begun: float,
    *,
    dry_run: bool = False,
) -> results.Prune:
    failed = {f.backup for f in failures}
    return results.Prune(
        domain=kept.name,
        uuid=kept.uuid,
        kept=[results.Kept(c.generation, c.id, list(decision.reasons[c.id])) for c in decision.kept],
        removed=[results.Removed(c.generation, c.id) for c in decision.removed if c.id not in failed],
        merged=merged,
        forgotten=forgotten,
        skipped=[
            results.Skipped(f.backup, f.target or None, str(f.error), f.error.kind, f.error.code) for f in failures
        ],
        freed_bytes=freed,
        seconds=round(time.monotonic() - begun, 3),
        dry_run=dry_run,
    )


def _occupied(kept: store.DomainStore) -> int:
    """Bytes on disk of everything the domain has; a file with two names counts once."""
    seen: Dict[Tuple[int, int], int] = {}
    for folder, _, names in os.walk(kept.path):
        for name in names:
            found = os.lstat(os.path.join(folder, name))
            if name != store.RESERVE:
                seen[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(seen.values())
