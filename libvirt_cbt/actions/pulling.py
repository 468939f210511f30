"""Reads an open fleecing point into staging: every disk's delta, and the layers of those that are copied."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Dict, Iterator, Mapping, Optional

from libvirt_cbt import extents, places
from libvirt_cbt.actions.fleecing import Fleece
from libvirt_cbt.actions.planning import DiskPlan
from libvirt_cbt.actions.session import Session
from libvirt_cbt.nbdio import changes, copy, qcow2, server, writeback
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import manifest, npy, store


@dataclass(frozen=True)
class Read:
    """One disk as it was read: counts, the record of its delta, and that of its layer if it has one."""

    counts: copy.Pulled
    delta: manifest.Delta
    layer: Optional[manifest.LayerEntry]


def pulled(
    session: Session,
    kept: store.DomainStore,
    fleece: Fleece,
    options: Options,
    *,
    compress: bool = True,
    missed: Mapping[str, extents.Extents] = MappingProxyType({}),
    again: Mapping[str, extents.Extents] = MappingProxyType({}),
) -> Dict[str, Read]:
    """Reads all disks at once; by target.  `missed`: what no bitmap told of, by target; it counts as changed, too.
    `again`: what increments copy besides, though it did not change.

    Errors: those of copy.pull, of `fleece.stop`, Damaged.
    """
    plan = fleece.plan
    exports = fleece.exported()
    with ExitStack() as stack:
        run_dir = stack.enter_context(places.temporary())  # the job's own folder is QEMU's, too
        deltas: Dict[str, npy.Writer] = {}
        contents: Dict[str, npy.Writer] = {}
        pulls = []
        for disk in plan.disks:
            deltas[disk.target] = fleece.stage.deltas(disk.target)
            sink = None
            if disk.copy != copy.NOTHING:
                contents[disk.target] = fleece.stage.contents(disk.target)
                sink = stack.enter_context(_sink(fleece, disk, run_dir, compress=compress))
            # Only an increment copies what marks since its parent recorded; for the others the range is empty.
            after = disk.since if disk.copy == copy.DIRTY else disk.base or 0
            earlier = stack.enter_context(kept.deltas(disk.target, after, disk.base or 0, lineage=disk.lineage))
            export = exports[disk.target]
            pulls.append(
                copy.Pull(
                    target=disk.target,
                    source=export.endpoint,
                    capacity=disk.disk.capacity,
                    bitmap=export.context,
                    copy=disk.copy,
                    expected=disk.estimate,
                    sink=sink,
                    also=with_also(earlier.union, again.get(disk.target)) if earlier or disk.target in again else None,
                    delta=deltas[disk.target].append,
                    contents=contents[disk.target].append if sink else _nowhere,
                    extra_dirty=_untold(disk, missed.get(disk.target)),
                )
            )
        with fleece.reading():
            counts = copy.pull(pulls, options, progress=session.watch.progress, stop=fleece.stop, alive=fleece.alive)
    return {
        disk.target: _finished(fleece, disk, one, deltas[disk.target], contents.get(disk.target))
        for disk, one in zip(plan.disks, counts)
    }


def _untold(disk: DiskPlan, missed: Optional[extents.Extents]) -> Optional[changes.Find]:
    """What counts as changed though the bitmap does not have it."""
    if missed is None and not len(disk.uncovered):
        return None
    return with_also(partial(extents.clip, disk.uncovered), missed)


def with_also(union: changes.Find, *more: Optional[extents.Extents]) -> changes.Find:
    """A union of deltas by window, and further extents in it."""
    some = [one for one in more if one is not None and len(one)]
    if not some:
        return union
    return lambda low, high: extents.unite([union(low, high), *some], low, high)


def _nowhere(_: extents.Extents) -> None:
    """A mark stores no runs."""


@contextmanager
def _sink(fleece: Fleece, disk: DiskPlan, run_dir: str, *, compress: bool) -> Iterator[copy.Sink]:
    path = fleece.stage.layer(disk.target)
    backing = store.layer_backing(disk.parent, disk.target)
    qcow2.create_layer(path, disk.disk.capacity, backing=backing, compress=compress)
    with server.sink(path, run_dir, compress=compress) as endpoints:
        behind = writeback.WriteBack(fleece.stage.opened(disk.target))
        try:
            yield copy.Sink(endpoints, path, disk.parent is not None, behind)
        finally:
            behind.close()


def _finished(
    fleece: Fleece, disk: DiskPlan, counts: copy.Pulled, delta: npy.Writer, contents: Optional[npy.Writer]
) -> Read:
    digest, rows = delta.finish()
    layer = None
    if contents:
        qcow2.finish_layer(fleece.stage.layer(disk.target), disk.disk.capacity)
        layer = manifest.LayerEntry(
            file=f"{disk.target}.qcow2",
            parent=disk.parent,
            contents=os.path.basename(contents.path),
            digest=contents.finish()[0],
        )
    return Read(counts, manifest.Delta(digest=digest, extents=rows), layer)
