"""What a repository holds and how it fares, as one value: `report`; libvirt is not asked, layers are not read."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from datetime import datetime, timezone
from typing import Dict, Final, List, Optional

from libvirt_cbt import errors, points
from libvirt_cbt.actions import heatmap, results, telling
from libvirt_cbt.actions.session import Session
from libvirt_cbt.repository import changes, manifest, store, verified

REGIONS: Final = 48
MOST_HEAT: Final = 256  # generations of a heat map: each is a file to read and to check
GAPS: Final = 10  # as many last gaps between backups say what is usual
HOUR: Final = 3600


def report(session: Session, domain_name: Optional[str] = None) -> results.Report:
    """One domain, or all of them; one whose manifests are damaged is in it with the reason, by its UUID.

    Errors: NoRepository, NotInRepository; Damaged when the domain that was asked for cannot be read.
    """
    now = datetime.now(timezone.utc)
    repository = session.repository()
    asked = [session.stored(domain_name)] if domain_name else [repository.domain(u) for u in repository.uuids()]
    domains: List[results.ReportDomain] = []
    for kept in asked:
        session.watch.stop()
        try:
            if kept.generations():
                domains.append(_domain(session, kept, now))
            elif kept.unread():
                raise kept.unread()[0].error
        except errors.Damaged as e:
            if domain_name:
                raise
            domains.append(_unreadable(kept, e))
    space = os.statvfs(repository.path)
    return results.Report(
        repository=repository.path,
        id=repository.id,
        time=now.isoformat(timespec="seconds").replace("+00:00", "Z"),
        total_bytes=space.f_blocks * space.f_frsize,
        free_bytes=space.f_bavail * space.f_frsize,
        domains=sorted(domains, key=lambda d: (d.domain, d.uuid)),
    )


def _domain(session: Session, kept: store.DomainStore, now: datetime) -> results.ReportDomain:
    attention = [str(one.error) for one in kept.unread()]
    rows = [_generation(kept, made, attention) for made in kept.generations()]
    with_data = [row for row in rows if row.data]
    taken = [when for when in (_when(row.time) for row in with_data) if when]
    age = round((now - taken[-1]).total_seconds(), 1) if taken else None
    gap = _usual_gap(taken)
    if not with_data:
        attention.append("no backup holds data")
    if age is not None and gap is not None and age > 2 * gap + HOUR:
        attention.append(f"the newest backup is late: backups came every {_hours(gap)}, this one is {_hours(age)} old")
    attention += _told(rows, with_data)
    last = _verified(kept, now, attention)
    disks = [_disk(session, kept, disk, attention) for disk in kept.generations()[-1].disks]
    return results.ReportDomain(
        domain=kept.name,
        uuid=kept.uuid,
        unreadable=None,
        backups=len(with_data),
        marks=len(rows) - len(with_data),
        held_bytes=sum(row.held_bytes for row in rows),
        oldest=with_data[0].time if with_data else None,
        newest=with_data[-1].time if with_data else None,
        age_seconds=age,
        usual_gap_seconds=gap,
        verified=last,
        attention=attention,
        disks=disks,
        days=_days(rows),
        generations=rows,
    )


def _unreadable(kept: store.DomainStore, error: errors.Damaged) -> results.ReportDomain:
    sentence = f"cannot be read: {error}"
    return results.ReportDomain(
        domain=kept.uuid,
        uuid=kept.uuid,
        unreadable=str(error),
        backups=0,
        marks=0,
        held_bytes=0,
        oldest=None,
        newest=None,
        age_seconds=None,
        usual_gap_seconds=None,
        verified=None,
        attention=[sentence],
        disks=[],
        days=[],
        generations=[],
    )


def _generation(kept: store.DomainStore, made: manifest.Manifest, attention: List[str]) -> results.ReportGeneration:
    try:
        kept.layers(made.id)
    except errors.Damaged as e:
        attention.append(str(e))
    begun, ended = _when(made.started), _when(made.finished)
    return results.ReportGeneration(
        generation=made.generation,
        id=made.id,
        kind=made.kind,
        time=made.frozen_at,
        seconds=round((ended - begun).total_seconds(), 3) if begun and ended else None,
        data=made.kind != "mark",
        protected=kept.protected(made.id),
        consistent=made.quiesce.result == "frozen",
        quiesce=results.Quiesced(made.quiesce.requested, made.quiesce.result, made.quiesce.frozen_ms),
        dirty_bytes=sum(d.dirty_bytes for d in made.disks),
        stored_bytes=sum(d.stored_bytes for d in made.disks),
        held_bytes=_held(kept.directory(made.id)),
        disks=[telling.disk(d) for d in made.disks],
        unprotected=telling.unprotected(made.unprotected),
        warnings=list(made.warnings),
    )


def _held(directory: str) -> int:
    """Bytes that a directory's files take on disk; what a prune takes away at this moment takes none."""
    try:
        with os.scandir(directory) as entries:
            return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)
    except FileNotFoundError:
        return 0


def _told(rows: List[results.ReportGeneration], with_data: List[results.ReportGeneration]) -> List[str]:
    """What the newest generation and the newest backup had to say."""
    newest = {row.generation: row for row in (*with_data[-1:], *rows[-1:])}
    found = [f"generation {number}: {warning}" for number, row in newest.items() for warning in row.warnings]
    once = {disk.target for row in rows for disk in row.disks}
    # A CD-ROM is left out for ever: only a disk that was in a backup before is news.
    lost = [one for one in rows[-1].unprotected if one.target in once]
    return found + [f"disk {one.target} is not in backups any more: {one.reason}" for one in lost]


def _verified(kept: store.DomainStore, now: datetime, attention: List[str]) -> Optional[results.LastVerify]:
    try:
        found = verified.last(kept)
    except errors.CbtError as e:
        attention.append(str(e))
        return None
    if found is None:
        attention.append("never verified as a whole")
        return None
    if found.damage:
        attention.append(f"the last verification found {found.damage} damaged")
    when = _when(found.time)
    age = round((now - when).total_seconds(), 1) if when else None
    return results.LastVerify(found.time, age, found.newest, found.backups, found.checked_bytes, found.damage)


def _disk(
    session: Session, kept: store.DomainStore, disk: manifest.ManifestDisk, attention: List[str]
) -> results.ReportDisk:
    """Damage of one disk is told, and stands in nobody's way."""
    newest = kept.generations()[-1]
    chain: Optional[int] = None
    known: Optional[int] = None
    heat: Optional[results.Heatmap] = None
    try:
        begin = changes.oldest_since(kept, disk.target, points.Generation(newest.generation))
        known = begin.number if isinstance(begin, points.Generation) else None
        first = max(known or 0, newest.generation - MOST_HEAT)
        heat = heatmap.heatmap(session, kept.uuid, disk.target, since=first, regions=REGIONS)
        backup = kept.newest_backup(newest, disk.target)
        chain = len(kept.chain(backup.id, disk.target)) if backup else 0
    except (errors.Damaged, errors.TrackingBroken) as e:
        attention.append(f"disk {disk.target}: {e}")
    return results.ReportDisk(disk.target, disk.capacity, disk.lineage, known, disk.granularity, chain, heat)


def _days(rows: List[results.ReportGeneration]) -> List[results.ReportDay]:
    """Days of UTC on which something that is still there was made, ascending."""
    backups: Dict[str, int] = Counter()
    marks: Dict[str, int] = Counter()
    for row in rows:
        when = _when(row.time)
        if when:
            (backups if row.data else marks)[when.date().isoformat()] += 1
    return [results.ReportDay(day, backups.get(day, 0), marks.get(day, 0)) for day in sorted({*backups, *marks})]


def _usual_gap(taken: List[datetime]) -> Optional[float]:
    """Seconds: the median of the last gaps, once there are four backups."""
    recent = taken[-GAPS - 1 :]
    gaps = [(later - sooner).total_seconds() for sooner, later in zip(recent, recent[1:])]
    return round(statistics.median(gaps), 1) if len(gaps) > 2 else None


def _when(time: str) -> Optional[datetime]:
    """A manifest's time; None for one that is none, which a seal does not keep out."""
    try:
        found = datetime.fromisoformat(time.replace("Z", "+00:00"))
    except ValueError:
        return None
    return found.astimezone(timezone.utc) if found.tzinfo else None


def _hours(seconds: float) -> str:
    return f"{seconds / HOUR:.1f} h" if seconds < 48 * HOUR else f"{seconds / HOUR / 24:.1f} days"
