"""The order in which a prune takes backups away: whole chains first, then disk by disk of one backup after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Callable, List, Set

from libvirt_cbt import errors
from libvirt_cbt.actions import carrying, results
from libvirt_cbt.actions import merging as steps
from libvirt_cbt.actions.session import Session
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import store


@dataclass(frozen=True)
class Failure:
    backup: str
    target: str
    error: errors.CbtError


@dataclass
class Work:
    """Taking backups away, one disk of one of them at a time; what one cannot do does not stop the others."""

    session: Session
    kept: store.DomainStore
    options: Options
    merged: List[results.Merged] = field(default_factory=list)
    failures: List[Failure] = field(default_factory=list)
    done: int = 0

    def take_away(self, removed: Set[str]) -> None:
        """First whole chains, which costs nothing; then the oldest layers, oldest first, and the others newest first.

        So every run is written once, however many neighbours go.
        """
        targets = sorted({d.target for m in self.kept.generations() for d in m.disks})
        disks = [carrying.Disk(self.session, self.kept, target, self.options) for target in targets]
        for disk in disks:
            for backup in reversed(self._left(disk, removed)):
                if not disk.children(backup):
                    self._try(disk, backup, partial(steps.drop, disk, backup))
        while True:
            before = self.done
            for disk in disks:
                self._merge_all(disk, removed)
            short = [f for f in self.failures if isinstance(f.error, errors.NoRoomToMerge)]
            if self.done == before or not short:
                return
            # What was done since may have made the room.
            self.failures = [f for f in self.failures if f not in short]

    def _merge_all(self, disk: carrying.Disk, removed: Set[str]) -> None:
        # What was begun first: nothing can be merged into a layer that is no backup any more.
        for backup in reversed(self._left(disk, removed)):
            if disk.on_its_way(backup) and disk.entry(backup).parent is not None:
                self._merge(disk, backup, steps.into_child)
        for backup in self._left(disk, removed):
            if disk.entry(backup).parent is None and len(disk.children(backup)) == 1:
                self._merge(disk, backup, steps.into_oldest)
        for backup in reversed(self._left(disk, removed)):
            if disk.entry(backup).parent is None and len(disk.children(backup)) == 1:
                continue
            for _ in disk.children(backup):
                self._merge(disk, backup, steps.into_child)
            if not disk.children(backup):
                self._try(disk, backup, partial(steps.drop, disk, backup))

    def _left(self, disk: carrying.Disk, removed: Set[str]) -> List[str]:
        """What is to go and is still there, ascending; with what a prune that was killed has begun to take away."""
        failed = {f.backup for f in self.failures if f.target == disk.target}
        found = []
        for generation in self.kept.generations():
            layers = self.kept.layers(generation.id)
            here = (disk.target in layers.disks and generation.id in removed) or disk.target in layers.below
            if here and generation.id not in failed:
                found.append(generation.id)
        return found

    def _merge(self, disk: carrying.Disk, backup: str, merging_step: Callable[[carrying.Disk, str, str], int]) -> None:
        children = disk.children(backup)

        def merged() -> None:
            if disk.on_its_way(children[0]):
                # It could not be taken away, so what lies below it stays, too.
                raise next(f.error for f in self.failures if (f.backup, f.target) == (children[0], disk.target))
            written = merging_step(disk, backup, children[0])
            self.merged.append(results.Merged(disk.target, backup, children[0], written))

        if children:
            self._try(disk, backup, merged)

    def _try(self, disk: carrying.Disk, backup: str, step: Callable[[], None]) -> None:
        if any((f.backup, f.target) == (backup, disk.target) for f in self.failures):
            return
        disk.session.watch.stop()
        try:
            step()
            self.done += 1
        except errors.Interrupted:
            raise
        except errors.CbtError as e:
            disk.session.watch.note(f"disk {disk.target} of backup {backup} stays: {e}")
            self.failures.append(Failure(backup, disk.target, e))
