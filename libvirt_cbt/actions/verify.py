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
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import checked, manifest, npy, outcomes, pins, plan, store, verified


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
    all are read.  Errors: NotInRepository, NoSuchBackup, LayerInUse, NbdError; Damaged when a manifest itself cannot be
    read.
    """
    begun = time.monotonic()
    kept = session.stored(domain_name)
    with outcomes.noted(kept, "verify"):
        wanted = _needed(kept, kept.resolve(points.at(at))) if at else None
        if sample is not None:
            wanted = set(checked.longest_unread(kept, sample))
        total, read, seen = _read(session, kept, wanted, options or Options())
    damage = Counter(one.backup for one in seen.damage)
    notes = [checked.record(kept, {backup: damage[backup] for backup in read})]
    if wanted is None:
        notes.append(verified.record(kept, backups=len(read), checked_bytes=total, damage=len(seen.damage)))
    for unnoted in filter(None, notes):
        session.watch.note(unnoted)
    return results.Verify(kept.name, total, len(read), seen.damage, round(time.monotonic() - begun, 3))


def _read(
    session: Session, kept: store.DomainStore, wanted: Optional[Set[str]], options: Options
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
                    total += _layer(session, generation, target, entry, seen, options)
        except errors.Damaged:
            if os.path.lexists(kept.directory(generation.id)):
                raise
            continue  # a prune forgot it meanwhile
        read.append(generation.id)
    return total, read, seen


def _needed(kept: store.DomainStore, generation: manifest.Manifest) -> Set[str]:
    found = {generation.id}
    for disk in generation.disks:
        if disk.mode != "mark":
            found.update(link.backup for link in kept.chain(generation.id, disk.target))
    return found


class _Findings:
    """Damage so far, each with the backups that need the damaged file."""

    def __init__(self, kept: store.DomainStore) -> None:
        self._kept = kept
        self.damage: List[results.Damage] = []
        self._parents: Dict[str, Set[str]] = {}
        for generation in kept.generations():
            try:
                layers = kept.layers(generation.id)
                entries = [*layers.disks.values(), *layers.below.values()]
                self._parents[generation.id] = {e.parent for e in entries if e.parent}
            except errors.Damaged:
                self._parents[generation.id] = {d.parent for d in generation.disks if d.parent}

    def dependents(self, backup: str) -> List[str]:
        found: List[str] = []
        for generation in self._kept.generations():
            if self._parents[generation.id] & {backup, *found}:
                found.append(generation.id)
        return found

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
        place = self._kept.directory(generation.id)
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
            layers = self._kept.layers(generation.id)
        except errors.Damaged as e:
            self.add(generation.id, None, str(e))
            return []
        for disk in generation.disks:
            if disk.mode != "mark" and disk.target not in {**layers.disks, **dict.fromkeys(layers.removed)}:
                self.add(generation.id, disk.target, "layers.json does not name its layer")
        return sorted({**layers.disks, **layers.below}.items())

    def place(self, generation: manifest.Manifest, name: str) -> str:
        return os.path.join(self._kept.directory(generation.id), name)


def _layer(
    session: Session,
    generation: manifest.Manifest,
    target: str,
    entry: manifest.LayerEntry,
    seen: _Findings,
    options: Options,
) -> int:
    """Bytes read of one layer."""

    def damaged(read: check.Read, reason: str) -> None:
        seen.add(generation.id, target, reason, read.offset, read.length)

    path = seen.place(generation, entry.file)
    stored = generation.require(target).data_bytes
    with ExitStack() as stack:
        try:
            contents = stack.enter_context(
                npy.Reader(seen.place(generation, entry.contents), extents.CONTENT, entry.digest)
            )
            if not os.path.isfile(path):
                raise errors.Damaged(path=path, reason="the layer is missing")
            run_dir = stack.enter_context(places.temporary())
            endpoints = stack.enter_context(server.layers([path], run_dir))
        except errors.Damaged as e:
            seen.add(generation.id, target, str(e))
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
