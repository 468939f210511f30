"""Proves the bitmaps right: the whole disk at the fleecing point against what its backups and its bitmap say."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Dict, List, Mapping, Tuple

import numpy as np

from libvirt_cbt import extents, places
from libvirt_cbt.actions import pulling, results
from libvirt_cbt.actions.fleecing import Fleece
from libvirt_cbt.actions.session import Session
from libvirt_cbt.nbdio import audit, copy, server
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import store

SHOWN = 100  # extents of a disk in a result

Missed = Dict[str, extents.Extents]


def audited(
    session: Session, kept: store.DomainStore, fleece: Fleece, options: Options, again: Mapping[str, extents.Extents]
) -> Tuple[List[results.Audited], Missed]:
    """Every disk that is copied as an increment: counts, and by target the extents that no bitmap told of.  `again` is copied anyhow.

    Errors: SourceLost and kin, Damaged for a chain that cannot be opened at all.
    """
    plan = fleece.plan
    exports = fleece.exported()
    with ExitStack() as stack:
        run_dir = stack.enter_context(places.temporary())
        found: Dict[str, List[extents.Extents]] = {}
        disks = []
        for disk in plan.disks:
            if disk.copy != copy.DIRTY or disk.parent is None:
                how = "is copied in full and needs none" if disk.copy == copy.ALL else "is not copied"
                fleece.warnings.append(f"disk {disk.target} was not audited: it {how}")
                continue
            marks = stack.enter_context(kept.deltas(disk.target, disk.since, disk.base or 0, lineage=disk.lineage))
            layers = [link.layer for link in kept.chain(disk.parent, disk.target)]
            found[disk.target] = []
            export = exports[disk.target]
            disks.append(
                audit.Compare(
                    target=disk.target,
                    source=export.endpoint,
                    chain=stack.enter_context(server.chain(layers, run_dir)),
                    capacity=disk.disk.capacity,
                    bitmap=export.context,
                    also=pulling.with_also(marks.union, again.get(disk.target), disk.uncovered),
                    differs=found[disk.target].append,
                )
            )
        with fleece.reading():
            counts = audit.compare(
                disks, options, progress=session.watch.progress, stop=fleece.stop, alive=fleece.alive
            )
    missed = {target: extents.coalesce(np.concatenate([extents.empty(), *rows])) for target, rows in found.items()}
    return [_result(one, missed[one.target]) for one in counts], missed


def _result(counts: audit.Audit, missed: extents.Extents) -> results.Audited:
    return results.Audited(
        target=counts.target,
        compared_bytes=counts.compared_bytes,
        differing_bytes=counts.differing_bytes,
        unreadable_bytes=counts.unreadable_bytes,
        extents=[results.Extent(int(e["offset"]), int(e["length"])) for e in missed[:SHOWN]],
    )
