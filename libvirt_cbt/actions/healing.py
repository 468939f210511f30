"""What is damaged in a domain's backups is stored again from the guest, where that still holds it.

In two steps.  Before the fleecing point opens, all that the next increment would lie on is held against its digests: what
is damaged is copied by that increment, so the chain is good from there on; a chain that cannot be opened at all is not
built on.  After publication each damaged layer is written anew, of its own good runs and of those that the guest holds
unchanged, to the bit of their digests: then it takes the old one's place by one rename, and every backup is whole again.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Dict, Final, Iterator, List, Optional, Set, Tuple

import numpy as np

from libvirt_cbt import durable, errors, extents, places
from libvirt_cbt.actions import fleecing, planning, results, salvaging, writing
from libvirt_cbt.actions.session import Session
from libvirt_cbt.nbdio import check, copy, merge, qcow2, server
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import checked, manifest, merging, npy, pins, plan, store

NOWHERE: Final = check.Output("nowhere", put=lambda _piece, _offset: None)
NO_ROWS: Final = np.empty(0, extents.CONTENT)

Again = Dict[str, extents.Extents]  # what is to be copied though no bitmap says so, by target


@dataclass(frozen=True)
class Ill:
    """A layer that is damaged: the bytes of it that the newest backup shows and that are lost, and why."""

    target: str
    backup: str
    lost_bytes: int
    reason: str


@dataclass(frozen=True)
class Found:
    """The plan, with disks copied in full whose chain cannot be built on; what to copy besides; the damaged layers."""

    plan: fleecing.Plan
    again: Again
    ill: List[Ill]


def healthy(planned: fleecing.Plan) -> Found:
    """Nothing was looked at."""
    return Found(planned, {}, [])


def looked(session: Session, kept: store.DomainStore, planned: fleecing.Plan, options: Options) -> Found:
    """Reads all that the newest backups of a plan's disks show, against its digests.  The caller holds the domain's lock.

    Errors: NbdError, LayerInUse, what `stop` raises.
    """
    found = healthy(planned)
    disks: List[planning.DiskPlan] = []
    for disk in planned.disks:
        lost, broken = _read(session, kept, disk, options)
        if broken and disk.copy == copy.DIRTY:
            reason = f"the layer of backup {broken[0].backup} in the chain below is damaged: {broken[0].broken}"
            disks.append(replace(disk, copy=copy.ALL, parent=None, since=0, estimate=disk.disk.capacity, reason=reason))
        else:
            disks.append(disk)
            rows = extents.make([one.offset for one in lost], [one.length for one in lost], extents.DATA)
            found.again[disk.target] = extents.coalesce(rows)
        found.ill.extend(_by_layer(disk.target, lost, broken))
    found.ill.extend(_on_record(kept, planned.disks, {(one.target, one.backup) for one in found.ill}))
    return replace(found, plan=replace(planned, disks=disks))


def _read(
    session: Session, kept: store.DomainStore, disk: planning.DiskPlan, options: Options
) -> Tuple[List[results.Lost], List[salvaging.Layer]]:
    """What of a disk's newest backup is damaged, in ascending offset, and the layers that cannot be read at all."""
    lost: List[results.Lost] = []
    below = kept.newest_backup(kept.generations()[-1], disk.target) if disk.base is not None else None
    if below is None or disk.copy == copy.NOTHING:
        return [], []
    try:
        with ExitStack() as stack:
            layers = salvaging.layers(stack, kept, below, below.require(disk.target), salvage=True)
            broken = [one for one in layers if one.broken]
        writing.write(session, kept, below, below.require(disk.target), NOWHERE, options, salvaged=lost)
    except errors.Damaged:
        return [], []  # a manifest: the chain ends there, and planning has said so
    return lost, broken


def _on_record(kept: store.DomainStore, disks: List[planning.DiskPlan], known: Set[Tuple[str, str]]) -> List[Ill]:
    """Layers of backups in which `verify` last found damage, which newer ones may hide."""
    with suppress(errors.Damaged):  # a note that nothing depends on
        return [
            Ill(disk.target, one.backup, 0, "verify found it")
            for one in checked.states(kept)
            if one.damage
            for disk in disks
            if disk.copy != copy.NOTHING and (disk.target, one.backup) not in known
        ]
    return []


def _by_layer(target: str, lost: List[results.Lost], broken: List[salvaging.Layer]) -> List[Ill]:
    found = {one.backup: Ill(target, one.backup, 0, one.broken or "") for one in broken}
    for one in lost:
        before = found.get(one.backup, Ill(target, one.backup, 0, one.reason))
        found[one.backup] = replace(before, lost_bytes=before.lost_bytes + one.length)
    return list(found.values())


def mended(
    session: Session,
    kept: store.DomainStore,
    made: manifest.Manifest,
    ill: List[Ill],
    options: Options,
    *,
    compress: bool,
) -> List[results.Healed]:
    """Writes each damaged layer anew, with what the generation just made holds of it; what became of each.

    The caller holds the domain's lock.  Errors: what `stop` raises; any other leaves the layer as it was.
    """
    found = []
    for one in ill:
        reason: Optional[str] = None
        try:
            if not _rewrite(session, kept, made, one, options, compress=compress):
                continue
        except errors.CbtError as e:
            if isinstance(e, errors.Interrupted):
                raise
            reason = str(e)
        found.append(results.Healed(one.target, one.backup, one.lost_bytes, one.reason, reason is None, reason))
    return found


def sentences(healed: List[results.Healed]) -> List[str]:
    """For the warnings of a backup."""
    return [
        f"disk {one.target} of backup {one.backup} was damaged ({one.reason}): "
        + (
            "it is whole again"
            if one.mended
            else f"this backup has what the guest holds, and is whole; that one is not ({one.left})"
        )
        for one in healed
    ]


def _rewrite(
    session: Session, kept: store.DomainStore, made: manifest.Manifest, one: Ill, options: Options, *, compress: bool
) -> bool:
    """A new layer of the same runs in the place of a damaged one; False when it is not, or not any more.

    A crash leaves the damaged one, and a file beside it that no layers.json names: the next prune removes that.
    Errors: Damaged for what cannot be had from the guest; ChainPinned; RepositoryFull and kin.
    """
    entry = kept.layers(one.backup).disks.get(one.target)
    if entry is None and not one.lost_bytes:
        return False
    if entry is None:
        raise errors.Damaged(path=kept.directory(one.backup), reason=f"no record of its layer of disk {one.target}")
    capacity = kept.require(one.backup).require(one.target).capacity
    layer = os.path.join(kept.directory(one.backup), entry.file)
    new = f"{layer}.new"
    with ExitStack() as stack:
        run_dir = stack.enter_context(places.temporary())
        contents = stack.enter_context(
            npy.Reader(os.path.join(kept.directory(one.backup), entry.contents), extents.CONTENT, entry.digest)
        )
        bad = _bad(session, one.target, layer, contents, run_dir, options)
        merging.tidy(kept, one.backup)
        if bad is not None and not bad:
            return False
        try:
            backing = store.layer_backing(entry.parent, one.target)
            qcow2.create_layer(new, capacity, backing=backing, compress=compress)
            with merge.output(new, run_dir) as output:
                if bad is not None:
                    with server.layers([layer], run_dir) as [good]:
                        _carry(session, one, good, output, contents, options, bad, lost=False)
                chain = [link.layer for link in kept.chain(made.id, one.target)]
                with server.chain(chain, run_dir) as shown:
                    _carry(session, one, shown, output, contents, options, bad, lost=True)
            qcow2.finish_layer(new, capacity)
            with pins.changing(kept, [one.backup]), durable.explained(kept.repository.path, layer):
                durable.sync_file(new)
                os.rename(new, layer)
                durable.sync_directory(os.path.dirname(layer))
        except BaseException:
            if os.path.lexists(new):
                os.unlink(new)
            raise
    return True


def _bad(
    session: Session, target: str, layer: str, contents: npy.Reader, run_dir: str, options: Options
) -> Optional[Set[int]]:
    """Offsets of the runs of a layer that are damaged; None when it cannot be opened at all."""
    found: Set[int] = set()
    try:
        qcow2.refuse_external_data(layer)
        server.require_open([layer])
    except errors.Damaged:
        return None
    with server.layers([layer], run_dir) as endpoints:
        check.check(
            target,
            endpoints,
            (check.Read(r.layer, r.offset, r.length, r.digest, ()) for r in plan.everything(contents, 0)),
            None,
            options,
            damaged=lambda read, _reason: found.add(read.offset),
            progress=lambda disk, done: session.watch.progress(disk, done, done),
            stop=session.watch.stop,
        )
    return found


def _carry(
    session: Session,
    one: Ill,
    source: server.Endpoint,
    output: merge.Output,
    contents: npy.Reader,
    options: Options,
    bad: Optional[Set[int]],
    *,
    lost: bool,
) -> None:
    """Into the new layer: the damaged runs (`lost`) or all others, each against its digest.  Errors: Damaged."""

    def damaged(run: merge.Move, reason: str) -> None:
        where = f"at offset {run.offset}, length {run.length}"
        raise errors.Damaged(path=output.path, reason=f"the guest no longer holds what it did {where} ({reason})")

    def batches() -> Iterator[merge.Batch]:
        for rows in merging.slices(contents):
            moves = [
                merge.Move(p.offset, p.length, p.state, p.digest, p.pieces)
                for p in merging.as_parts(rows)
                if (bad is None or (p.state == extents.DATA and p.offset in bad)) == lost
            ]
            if moves:
                yield merge.Batch(moves, NO_ROWS)

    merge.move(
        one.target,
        source,
        output,
        batches(),
        options,
        stored=lambda _rows: None,
        damaged=damaged,
        progress=lambda done: session.watch.progress(one.target, done, done),
        stop=session.watch.stop,
    )
