"""The question "which blocks changed between two generations", checked before anything is read.

    gen(block) = max{ j : block in D(j) }         changed(since=g, until=h) = union of D(g+1..h)

Everything ("since" None) is the same union from the first generation of the lineage on, because the first delta of a
lineage is all that did not read as zeroes then.  Where first generations were forgotten, the contents of the oldest
backup after them stand in: what is neither in them nor in a later delta reads as zeroes.  `union` does the reading.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

from libvirt_cbt import errors, extents, names, points
from libvirt_cbt.repository import aliases, history
from libvirt_cbt.repository.manifest import Manifest, ManifestDisk
from libvirt_cbt.repository.store import DomainStore
from libvirt_cbt.repository.union import Source


@dataclass(frozen=True)
class Span:
    """A checked question: the lineage is unbroken from `since` (None: everything) to `until`.

    `disk` is as of `until`; `sources` oldest first; `granularity` in bytes, the coarsest of them, None if any is unknown.
    """

    target: str
    since: Optional[Manifest]
    until: Manifest
    disk: ManifestDisk
    sources: Tuple[Source, ...]
    granularity: Optional[int]


def span(kept: DomainStore, target: str, since: points.Point, until: points.Point) -> Span:
    """What lies between two generations of a disk, named by target or serial.  Errors: NoSuchDisk; Usage when since is after until; GenerationUnknown, ChangeIdBroken, LineageBroken; Damaged."""
    generations = kept.generations()
    target = aliases.target(kept, target)
    if not any(m.disk(target) for m in generations):
        for point in (since, until):
            if not isinstance(point, points.Beginning):
                with suppress(errors.NoSuchBackup):
                    kept.resolve(point)  # what is damaged may have it, and is what to tell of
        known = ", ".join(sorted({d.target for m in generations for d in m.disks})) or "none"
        raise errors.NoSuchDisk(domain=names.printable(kept.name), target=names.printable(target), known=known)
    last = _generation(kept, until, target)
    if isinstance(since, points.Beginning):
        disk = _disk(last, target)
        found, below = _from_the_beginning(kept, last, target)
        return _span(kept, target, None, last, disk, found, below)
    first = _generation(kept, since, target)
    if first.generation > last.generation:
        raise errors.Usage(
            reason=f"--since {first.generation} is after --until {last.generation}; changes are from older to newer"
        )
    lineage = _disk(first, target, last).lineage
    kept.require_unbroken(target, first.generation, last.generation, lineage)
    found = [m for m in generations if first.generation < m.generation <= last.generation]
    return _span(kept, target, first, last, _disk(last, target), found, [])


def oldest_since(kept: DomainStore, target: str, until: points.Point) -> points.Point:
    """The oldest generation from which every change up to `until` is known.  Errors: as of `span`."""
    target = aliases.target(kept, target)
    last = _generation(kept, until, target) if any(m.disk(target) for m in kept.generations()) else None
    if last is None or not last.disk(target):
        return until  # `span` says what is wrong
    return points.Generation(_known_run(kept, last, target)[0].generation)


def _generation(kept: DomainStore, point: points.Point, target: str) -> Manifest:
    try:
        found = kept.resolve(point)
    except errors.NoSuchBackup:
        generations = kept.generations()
        number = getattr(point, "number", None) if generations else None
        reason = "it was removed, or was never made here"
        if number is not None and number > generations[-1].generation:
            reason = f"the newest is {generations[-1].generation}"
        elif number == 0:
            reason = "they are counted from 1"
        raise errors.GenerationUnknown(
            domain=names.printable(kept.name), point=str(point), repository=kept.repository.path, reason=reason
        ) from None
    disk = found.disk(target)
    if isinstance(point, points.ChangeId) and (disk is None or disk.lineage != point.lineage):
        here = f"in generation {found.generation} disk '{target}' is " + (f"of lineage {disk.lineage}" if disk else "not")
        raise errors.ChangeIdBroken(point=str(point), reason=here, until_lineage=disk.lineage if disk else None)
    return found


def _disk(manifest: Manifest, target: str, until: Optional[Manifest] = None) -> ManifestDisk:
    disk = manifest.disk(target)
    if disk is None:
        last = (until or manifest).disk(target)
        raise errors.LineageBroken(
            target=target,
            generation=manifest.generation,
            reason="does not have this disk",
            since_lineage=None,
            until_lineage=last.lineage if last else None,
            broken_by=None,
        )
    return disk


def _known_run(kept: DomainStore, last: Manifest, target: str) -> List[Manifest]:
    """The generations down from `last`, ascending, for as long as they follow one another in its lineage."""
    by_number = {m.generation: m for m in kept.generations()}
    run = [last]
    while _disk(run[0], target).base is not None:
        before = by_number.get(run[0].generation - 1)
        disk = before.disk(target) if before else None
        if before is None or disk is None or disk.lineage != _disk(last, target).lineage:
            break
        run.insert(0, before)
    return run


def _from_the_beginning(kept: DomainStore, last: Manifest, target: str) -> Tuple[List[Manifest], List[Source]]:
    """All known generations of the lineage, and what stands in for those that are missing at its beginning."""
    run = _known_run(kept, last, target)
    if _disk(run[0], target).base is None:
        return run, []
    # Nobody knows any more which of the forgotten generations wrote a block: at the latest the last of them.
    missing = run[0].generation - 1
    for backup in run:
        if target in kept.layers(backup.id).disks:
            chain = reversed(kept.chain(backup.id, target))
            return run, [Source(link.contents, extents.CONTENT, link.digest, missing) for link in chain]
    raise errors.BeginningUnknown(
        target=target,
        generation=missing,
        reason=history.missing(kept.lost()),
        since_lineage=None,
        until_lineage=_disk(last, target).lineage,
        broken_by=None,
    )


def _span(
    kept: DomainStore,
    target: str,
    first: Optional[Manifest],
    last: Manifest,
    disk: ManifestDisk,
    found: Sequence[Manifest],
    below: List[Source],
) -> Span:
    deltas = [(m, _disk(m, target)) for m in found]
    grains = [d.granularity for _, d in deltas] or [disk.granularity]
    if below:
        grains.append(extents.GRAIN)  # contents are rounded outward
    known = [g for g in grains if g is not None]
    sources = [
        Source(
            os.path.join(kept.directory(m.id), f"{target}.delta.npy"), extents.EXTENT, d.delta.digest, m.generation
        )
        for m, d in deltas
    ]
    granularity = max(known) if len(known) == len(grains) else None
    return Span(target, first, last, disk, (*below, *sources), granularity)
