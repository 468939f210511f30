"""How much of each region of a disk was written in each generation."""

from __future__ import annotations

from typing import Final, List, Optional, Union

import numpy as np
import numpy.typing as npt

from libvirt_cbt import errors, extents, points
from libvirt_cbt.actions import results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.repository import changes, npy, union

MOST_REGIONS: Final = 4096

U64 = npt.NDArray[np.uint64]


def heatmap(
    session: Session,
    domain_name: str,
    disk: str,
    *,
    since: Optional[Union[str, int]] = None,
    until: Union[str, int] = "latest",
    regions: int = 64,
) -> results.Heatmap:
    """The generations after `since` up to `until`, the disk cut into at most `regions` equal stretches.

    Without `since` it begins where the known changes of this lineage begin; "*" adds what was allocated before them.
    A stretch has whole 64 KiB, the last one ends with the disk.  Errors: as of `changed`.
    """
    if not 1 <= regions <= MOST_REGIONS:
        raise errors.Usage(reason=f"a disk is shown in 1 to {MOST_REGIONS} regions, not {regions}")
    kept = session.stored(domain_name)
    kept.require_some(domain_name)
    end = points.until(str(until))
    begin = changes.oldest_since(kept, disk, end) if since is None else points.since(str(since))
    span = changes.span(kept, disk, begin, end)
    edges = _edges(span.disk.capacity, regions)
    times = {m.generation: m.frozen_at for m in kept.generations()}
    rows: List[results.HeatGeneration] = []
    for source in span.sources:
        session.watch.stop()
        if source.dtype != extents.EXTENT:
            continue  # contents that stand in for forgotten generations tell of no generation
        with union.opened([source]) as (reader,):
            written = _written(reader, edges)
        rows.append(results.HeatGeneration(source.generation, times[source.generation], written))
    return results.Heatmap(
        domain=kept.name,
        uuid=kept.uuid,
        target=span.disk.target,
        lineage=span.disk.lineage,
        since=span.since.generation if span.since else None,
        until=span.until.generation,
        capacity=span.disk.capacity,
        granularity=span.granularity,
        regions=[_region(n, edges, rows) for n in range(len(edges) - 1)],
        generations=rows,
    )


def _edges(capacity: int, regions: int) -> U64:
    length = max(1, -(-capacity // (regions * extents.GRAIN))) * extents.GRAIN
    return np.array([*range(0, capacity, length), capacity], np.uint64)


def _region(number: int, edges: U64, rows: List[results.HeatGeneration]) -> results.HeatRegion:
    found = [row.generation for row in rows if row.changed_bytes[number]]
    offset = int(edges[number])
    return results.HeatRegion(offset, int(edges[number + 1]) - offset, len(found), found[-1] if found else None)


def _written(reader: npy.Reader, edges: U64) -> List[int]:
    """Bytes of a delta between each pair of edges."""
    out = np.zeros(len(edges) - 1, np.uint64)
    for first in range(0, reader.rows, npy.SLICE):
        rows = reader.slice(first, min(first + npy.SLICE, reader.rows))
        below = np.append(np.uint64(0), np.cumsum(rows["length"], dtype=np.uint64))
        at = np.searchsorted(extents.ends(rows), edges, side="right")  # rows that end at or before each edge
        cut = np.append(rows["offset"], edges[-1])[at]
        out += np.diff(below[at] + np.where(edges > cut, edges - np.minimum(cut, edges), np.uint64(0)))
    return [int(x) for x in out]
