"""What a list of generations answers, and where it cannot: a break of tracking is an error, never an empty list."""

from __future__ import annotations

from typing import Dict, List, Optional, Sequence

from libvirt_cbt import errors, extents, points
from libvirt_cbt.repository import npy
from libvirt_cbt.repository.manifest import Manifest


def by_change_id(generations: Sequence[Manifest], point: points.ChangeId) -> List[Manifest]:
    """The generation of a change id, or none.  Errors: ChangeIdBroken when its number is another moment here."""
    if generations and point.generation > generations[-1].generation:
        reason = f"the newest generation here is {generations[-1].generation}"
        raise errors.ChangeIdBroken(point=str(point), reason=reason)
    found = [m for m in generations if m.generation == point.generation]
    if found and found[0].id[:8] != point.tag:
        reason = f"generation {point.generation} is backup {found[0].id} here"
        raise errors.ChangeIdBroken(point=str(point), reason=reason)
    if found and not any(d.lineage == point.lineage for d in found[0].disks):
        raise errors.ChangeIdBroken(point=str(point), reason="no disk of that generation has this lineage")
    return found


def require_unbroken(
    generations: Sequence[Manifest], target: str, after: int, until: int, lineage: str, lost: str = ""
) -> None:
    """Every generation after+1..until is there and has the disk in this lineage.

    `lost` are manifests that are damaged, one of which may be of a generation that seems to be missing.
    Errors: LineageBroken, with the lineages at both ends and the reason that the first break left in its manifest.
    """
    known = {m.generation: m for m in generations}
    for number in range(after + 1, until + 1):
        disk = known[number].disk(target) if number in known else None
        if disk and disk.lineage == lineage:
            continue
        if number not in known:
            reason = missing(lost)
        elif disk is None:
            reason = "does not have this disk"
        else:
            reason = "began a new lineage" + (f" ({disk.reason})" if disk.reason else "")
        raise errors.LineageBroken(
            target=target,
            generation=number,
            reason=reason,
            since_lineage=lineage,
            until_lineage=_lineage(known, until, target),
            broken_by=disk.reason if disk else None,
        )


def missing(lost: str) -> str:
    """Why a generation seems to be missing; `lost` as for `require_unbroken`."""
    return f"cannot be read, as {lost} is damaged" if lost else "is not in the repository"


def _lineage(known: Dict[int, Manifest], number: int, target: str) -> Optional[str]:
    disk = known[number].disk(target) if number in known else None
    return disk.lineage if disk else None


def newest_backup(generations: Sequence[Manifest], at: Manifest, target: str) -> Optional[Manifest]:
    """The newest generation up to `at` that holds data of a disk in its lineage."""
    lineage = at.require(target).lineage
    for candidate in reversed([m for m in generations if m.generation <= at.generation]):
        disk = candidate.disk(target)
        if disk is None or disk.lineage != lineage:
            return None
        if disk.mode != "mark":
            return candidate
    return None


class Deltas:
    """The union of several generations' deltas, asked for by window."""

    def __init__(self, readers: List[npy.Reader]) -> None:
        self._readers = readers

    def __bool__(self) -> bool:
        return bool(self._readers)

    def union(self, low: int, high: int) -> extents.Extents:
        """Ordered disjoint extents inside [low, high); the newest delta that touches a block gives its state."""
        return extents.unite([r.window(low, high) for r in self._readers], low, high)
