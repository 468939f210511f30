"""Re-reads every layer by itself and holds each run against its digest."""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import ExitStack
from typing import Dict, List, Optional, Set, Tuple

from libvirt_cbt import errors, extents, places, points
from libvirt_cbt.actions import results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.nbdio import check, server
from libvirt_cbt.nbdio.lanes import READING, Options
from libvirt_cbt.repository import checked, manifest, npy, outcomes, pins, plan, published, store, verified


def verify(
    session: Session,
    domain_name: str,
    *,
    at: Optional[str] = None,
    sample: Optional[int] = None,
    options: Optional[Options] = None,
) -> results.Verify:
    """Checks every backup of a domain, or with `at` one and what it depends on; damage is in the result.

    With `sample` the newest and so many others, at which nobody has looked for longest: each by itself, so that in time
    all are read.  Errors: NotInRepository, NoSuchBackup, LayerInUse, NbdError; Damaged when the manifest of `at` itself cannot
    be read.
    """
    begun = time.monotonic()
    kept = session.stored(domain_name)
    with outcomes.noted(kept, "verify"):
        wanted = _needed(kept, kept.resolve(points.at(at))) if at else None
        if sample is not None:
            wanted = set(checked.longest_unread(kept, sample))
        total, read, seen = _read(session, kept, wanted, options or Options(requests=READING), sampled=sample is not None)
    damage = Counter(one.backup for one in seen.damage)
    notes = [checked.record(kept, {backup: damage[backup] for backup in read})]
    if wanted is None:
        notes.append(verified.record(kept, backups=len(read), checked_bytes=total, damage=len(seen.damage)))
    for unnoted in filter(None, notes):
        session.watch.note(unnoted)
    return results.Verify(kept.name, total, len(read), seen.damage, round(time.monotonic() - begun, 3))


def _read(
    session: Session, kept: store.DomainStore, wanted: Optional[Set[str]], options: Options, *, sampled: bool
) -> Tuple[int, List[str], _Findings]:
    """Bytes that were read, of which generations, and what was found."""
    seen = _Findings(kept)
    total = 0
    read: List[str] = []
    for generation in kept.generations():
        if wanted is not None and generation.id not in wanted:
            continue
        # Each by itself: a prune may go on with the others.
        try:
            with pins.one(kept, generation.id, session.watch.stop):
                seen.files(generation)
                for target, entry in seen.layers(generation):
                    stored = generation.require(target).data_bytes
                    total += _layer(session, generation.id, target, entry, stored, seen, options)
        except errors.Damaged:
            if os.path.lexists(kept.directory(generation.id)):
                raise
            continue  # a prune forgot it meanwhile
        read.append(generation.id)
    for lost in kept.unread():
        if wanted is None or sampled or lost.id in wanted:
            total += _lost(session, lost, seen, options)
    return total, read, seen


def _lost(session: Session, lost: published.Unread, seen: _Findings, options: Options) -> int:
    """A generation without its manifest: its layers are what others lie on.  No prune changes them meanwhile."""
    backup = lost.id or os.path.basename(lost.path)
    seen.add(backup, None, f"{os.path.basename(lost.path)}: {lost.reason}")
    total = 0
    try:
        layers = seen.kept.layers(backup) if lost.id else None
    except errors.Damaged as e:
        seen.add(backup, None, str(e))
        return total
    entries = sorted({**layers.disks, **layers.below}.items()) if layers else []
    for target, entry in entries:
        total += _layer(session, backup, target, entry, 0, seen, options)
    return total


def _needed(kept: store.DomainStore, generation: manifest.Manifest) -> Set[str]:
    found = {generation.id}
    for disk in generation.disks:
        if disk.mode != "mark":
            found.update(link.backup for link in kept.chain(generation.id, disk.target))
    return found


class _Findings:
    """Damage so far, each with the backups that need the damaged file."""

    def __init__(self, kept: store.DomainStore) -> None:
        self.kept = kept
        self.damage: List[results.Damage] = []
        self._parents: Dict[str, Set[str]] = {}
        made = {m.id: {d.parent for d in m.disks if d.parent} for m in kept.generations()}
        for backup in kept.members():
            try:
                layers = kept.layers(backup)
                entries = [*layers.disks.values(), *layers.below.values()]
                self._parents[backup] = {e.parent for e in entries if e.parent}
            except errors.Damaged:
                self._parents[backup] = made.get(backup, set())

    def dependents(self, backup: str) -> List[str]:
        """Whose chains go through a backup: generations, ascending, then those whose manifests are damaged."""
        found = {backup}
        before = 0
        while len(found) > before:
            before = len(found)
            found |= {one for one, parents in self._parents.items() if parents & found}
        return [one for one in self._parents if one in found and one != backup]

    def add(
        self,
        backup: str,
        target: Optional[str],
        reason: str,
        offset: Optional[int] = None,
        length: Optional[int] = None,
    ) -> None:
        self.damage.append(results.Damage(backup, target, offset, length, reason, self.dependents(backup)))

    def files(self, generation: manifest.Manifest) -> None:
        place = self.kept.directory(generation.id)
        wanted = [(None, n, d) for n, d in generation.files.items()]
        wanted += [(d.target, f"{d.target}.delta.npy", d.delta.digest) for d in generation.disks]  # type: ignore[misc]
        for target, name, digest in wanted:
            try:
                good = npy.file_digest(os.path.join(place, name)) == digest
            except OSError as e:
                self.add(generation.id, target, f"{name}: {e.strerror}")
                continue
            if not good:
                self.add(generation.id, target, f"{name}: its digest does not match the manifest")

    def layers(self, generation: manifest.Manifest) -> List[tuple[str, manifest.LayerEntry]]:
        try:
            layers = self.kept.layers(generation.id)
        except errors.Damaged as e:
            self.add(generation.id, None, str(e))
            return []
        for disk in generation.disks:
            if disk.mode != "mark" and disk.target not in {**layers.disks, **dict.fromkeys(layers.removed)}:
                self.add(generation.id, disk.target, "layers.json does not name its layer")
        return sorted({**layers.disks, **layers.below}.items())

    def place(self, backup: str, name: str) -> str:
        return os.path.join(self.kept.directory(backup), name)


def _layer(
    session: Session,
    backup: str,
    target: str,
    entry: manifest.LayerEntry,
    stored: int,
    seen: _Findings,
    options: Options,
) -> int:
    """Bytes read of one layer, of about `stored`."""

    def damaged(read: check.Read, reason: str) -> None:
        seen.add(backup, target, reason, read.offset, read.length)

    path = seen.place(backup, entry.file)
    with ExitStack() as stack:
        try:
            contents = stack.enter_context(
                npy.Reader(seen.place(backup, entry.contents), extents.CONTENT, entry.digest)
            )
            if not os.path.isfile(path):
                raise errors.Damaged(path=path, reason="the layer is missing")
            run_dir = stack.enter_context(places.temporary())
            endpoints = stack.enter_context(server.layers([path], run_dir))
        except errors.Damaged as e:
            seen.add(backup, target, str(e))
            return 0
        return check.check(
            target,
            endpoints,
            (check.Read(r.layer, r.offset, r.length, r.digest, ()) for r in plan.everything(contents, 0)),
            None,
            options,
            damaged=damaged,
            progress=lambda disk, done: session.watch.progress(disk, done, max(stored, done)),
            stop=session.watch.stop,
        )
