"""What is published of one domain, read as values; what cannot be read of it is named beside, and stops nobody else.

A manifest alone says which generation it is.  So of a damaged one it is known only by its neighbours whether it is
older than the others: the layers of those that lie on it, and the numbers that are missing among them.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Dict, List, Optional, Set, Tuple

from libvirt_cbt import durable, errors, names, points
from libvirt_cbt.repository import history
from libvirt_cbt.repository.manifest import Layers, Manifest

if TYPE_CHECKING:
    from libvirt_cbt.repository.store import Repository


@dataclass(frozen=True)
class Unread:
    """A published generation whose manifest is damaged; `id` is None where not even the directory's name is right."""

    id: Optional[names.BackupId]
    error: errors.Damaged

    @property
    def path(self) -> str:
        return str(self.error.facts["path"])

    @property
    def reason(self) -> str:
        return str(self.error.facts["reason"])


class Published:
    """The generations of one domain."""

    def __init__(self, repository: Repository, uuid: names.DomainUuid) -> None:
        self.repository, self.uuid = repository, uuid
        self.path = os.path.join(repository.path, uuid)
        self._generations: Optional[List[Manifest]] = None
        self._unread: List[Unread] = []
        self._open: Optional[names.BackupId] = None

    @property
    def name(self) -> str:
        """As of the newest generation."""
        generations = self.generations()
        return generations[-1].domain.name if generations else self.uuid

    def directory(self, backup: str) -> str:
        return os.path.join(self.path, "staging" if backup == self._open else "backups", backup)

    def generations(self) -> List[Manifest]:
        """Every published generation that can be read as it is now, ascending; what was taken away is a mark.

        Errors: RepositoryDenied and kin; Damaged for the directory of them all.
        """
        if self._generations is None:
            found, unread = self._listed()
            made: List[Manifest] = []
            for backup in found:
                try:
                    current = self._current(backup)
                except errors.Damaged as e:
                    unread.append(Unread(backup, e))
                else:
                    made += [current] if current else []
            self._generations = sorted(made, key=lambda m: m.generation)
            self._unread = sorted(unread, key=lambda one: one.path)
        return self._generations

    def unread(self) -> List[Unread]:
        """What is published and cannot be read.  Errors: those of `generations`."""
        self.generations()
        return self._unread

    def members(self) -> List[str]:
        """The ids of all that is published: of `generations`, ascending, then of those that cannot be read."""
        return [m.id for m in self.generations()] + [one.id for one in self.unread() if one.id]

    def refresh(self) -> None:
        """Reads the generations anew when they are next asked for."""
        self._generations = None

    def grown(self, backup: str) -> None:
        """One more was published, under the lock: the others are as they were when they were read under it."""
        if self._generations is not None:
            try:
                made = self._current(names.BackupId(backup))
            except errors.CbtError:
                made = None
            self._generations = sorted([*self._generations, made], key=lambda m: m.generation) if made else None

    def unplaced(self) -> List[Unread]:
        """Those of `unread` of which it is not known that they are older than the newest of `generations`, at most.

        A number that is missing among the generations is one of theirs: only what lies before all backups is forgotten.
        """
        unread = self.unread()
        if not unread:
            return []
        numbers = {m.generation for m in self.generations()}
        missing = set(range(min(numbers), max(numbers))) - numbers if numbers else set()
        older = self._below(unread)
        taken = [backup for backup, above in older.items() if any(number < above for number in missing)]
        rest = [one for one in unread if one.id is None or one.id not in older]
        return rest[max(0, len(missing) - len(taken)) :]

    def _below(self, unread: List[Unread]) -> Dict[str, int]:
        """What some layer lies on, directly or not, with the lowest generation that is known to be above it."""
        lost = {one.id for one in unread if one.id}
        above: Dict[str, int] = {}
        for made in reversed(self.generations()):
            waiting: Set[str] = {d.parent for d in made.disks if d.parent} | self._parents(made.id)
            while waiting:
                parent = waiting.pop()
                if parent in lost and above.get(parent) != made.generation:
                    above[parent] = made.generation
                    waiting |= self._parents(parent)
        return above

    def _parents(self, backup: str) -> Set[str]:
        try:
            layers = self.layers(backup)
        except errors.CbtError:
            return set()
        return {entry.parent for entry in (*layers.disks.values(), *layers.below.values()) if entry.parent}

    def _current(self, backup: names.BackupId) -> Optional[Manifest]:
        """A manifest as `layers.json` makes it now; None for a generation that was forgotten at this moment."""
        try:
            made = self._load(backup)
        except errors.Damaged:
            if os.path.lexists(self.directory(backup)):
                raise
            return None
        try:
            return made.as_of(self.layers(backup))
        except errors.CbtError:
            return made  # whoever needs the layers is told

    def ids(self) -> List[names.BackupId]:
        """The ids of what is published, in no order, their manifests unread."""
        return self._listed()[0]

    def _listed(self) -> Tuple[List[names.BackupId], List[Unread]]:
        """What is published, and directories there that are called as none may be."""
        folder = os.path.join(self.path, "backups")
        found: List[names.BackupId] = []
        strange: List[Unread] = []
        with durable.explained(self.repository.path, self.path):
            try:
                durable.require_directory(self.path)
                durable.require_directory(folder)
                entries = os.listdir(folder)
            except FileNotFoundError:
                return [], []
            for entry in entries:
                try:
                    found.append(names.backup_id(entry))
                except errors.Usage:
                    if _folder(os.path.join(folder, entry)):
                        reason = "a backup's directory has its id as its name, 16 hex digits"
                        strange.append(Unread(None, errors.Damaged(path=os.path.join(folder, entry), reason=reason)))
        return found, strange

    def _load(self, backup: str) -> Manifest:
        path = os.path.join(self.directory(backup), "manifest.json")
        with durable.readable(self.repository.path, path):
            durable.require_directory(os.path.dirname(path))
            manifest = Manifest.load(path)
        if manifest.id != backup or manifest.domain.uuid != self.uuid:
            raise errors.Damaged(path=path, reason="it belongs to another backup")
        if manifest.repository != self.repository.id:
            raise errors.Damaged(path=path, reason=f"it belongs to repository {manifest.repository}")
        return manifest

    def layers(self, backup: str) -> Layers:
        """Errors: Damaged."""
        path = os.path.join(self.directory(backup), "layers.json")
        with durable.readable(self.repository.path, path):
            durable.require_directory(os.path.dirname(path))
            layers = Layers.load(path)
        if layers.backup != backup:
            raise errors.Damaged(path=path, reason="it belongs to another backup")
        return layers

    def resolve(self, point: points.Point) -> Manifest:
        """The generation that a point names.  Errors: NoSuchBackup; Usage for an ambiguous prefix;

        ChangeIdBroken for a change id whose number stands for another moment here; Damaged where the manifest is, or
        may be, that of the generation which is meant.
        """
        generations = self.generations()
        if isinstance(point, points.Latest):
            self.require_newest()
            found = generations[-1:]
        elif isinstance(point, points.Generation):
            found = [m for m in generations if m.generation == point.number]
            if not found and 0 < point.number < self.next_generation():
                self._damaged(self.unread(), f"it may be that of generation {point.number}")
        elif isinstance(point, points.Id):
            found = [m for m in generations if m.id.startswith(point.prefix)]
            if not found:
                self._damaged([one for one in self.unread() if one.id and one.id.startswith(point.prefix)])
        elif isinstance(point, points.ChangeId):
            self._damaged([one for one in self.unread() if one.id and one.id[:8] == point.tag])
            found = history.by_change_id(generations, point)
        else:
            found = []
        if len(found) > 1:
            raise errors.Usage(
                reason=f"'{point}' is the beginning of {', '.join(m.id for m in found)}; give more digits"
            )
        if not found:
            raise errors.NoSuchBackup(domain=self.name, point=str(point), repository=self.repository.path)
        return found[0]

    def require_some(self, asked: str) -> None:
        """Errors: Damaged when nothing that is published can be read; NotInRepository, as `asked`, when nothing is."""
        if not self.generations():
            self._damaged(self.unread())
            raise errors.NotInRepository(domain=names.printable(asked), repository=self.repository.path)

    def require_newest(self) -> None:
        """Errors: Damaged when which generation is the newest cannot be said."""
        newest = self.generations()[-1:]
        if newest:
            number = newest[0].generation
            self._damaged(self.unplaced(), f"it may be newer than generation {number}; say which one is meant by its number")
        else:
            self._damaged(self.unread())

    def _damaged(self, unread: List[Unread], why: str = "") -> None:
        if unread:
            reason = unread[0].reason + (f", and {why}" if why else "")
            raise errors.Damaged(path=unread[0].path, reason=reason)

    def require(self, backup: str) -> Manifest:
        """The manifest of a published backup.  Errors: Damaged when it is, or there is none: a layer names it as its parent."""
        found = next((m for m in self.generations() if m.id == backup), None)
        if found is None:
            self._damaged([one for one in self.unread() if one.id == backup])
            raise errors.Damaged(path=self.directory(backup), reason="its manifest is missing")
        return found

    def require_unbroken(self, target: str, after: int, until: int, lineage: str) -> None:
        """Every generation after+1..until is there and has the disk in this lineage.  Errors: LineageBroken."""
        history.require_unbroken(self.generations(), target, after, until, lineage, self.lost())

    def lost(self) -> str:
        """The paths of `unread`, for a sentence."""
        return ", ".join(one.path for one in self.unread())

    def next_generation(self) -> int:
        """A number that no generation has, nor one of those that cannot be read."""
        generations = self.generations()
        return (generations[-1].generation if generations else 0) + 1 + len(self.unplaced())

    def newest_backup(self, manifest: Manifest, target: str) -> Optional[Manifest]:
        """The newest generation up to `manifest` that holds data of a disk in its lineage."""
        return history.newest_backup(self.generations(), manifest, target)


def _folder(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False
