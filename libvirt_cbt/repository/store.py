"""The repository on disk: REPO/<domain-uuid>/backups/<id>/, read as values, written through `staging`."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Callable, ContextManager, Final, Iterator, List, Optional

from libvirt_cbt import durable, errors, extents, folders, names, points
from libvirt_cbt.repository import access, history, lock, npy
from libvirt_cbt.repository.manifest import Intent, Layers, Manifest, RepositoryFile

FILE: Final = "repository.json"
PROTECTED: Final = "protected"  # an empty file: making it needs no room
RESERVE: Final = "reserve"
RESERVE_BYTES: Final = 1 << 20  # given back by a prune on a full disk: what frees space must write a little first
UNFINISHED: Final = f"{FILE}.new"  # all that an `init` which was killed leaves


class Repository:
    """An opened repository; cheap, nothing is held open."""

    def __init__(self, path: str, identity: str) -> None:
        self.path, self.id = path, identity

    @staticmethod
    def init(path: str) -> Repository:
        """Makes a repository in a new or empty directory.  Errors: RepositoryError, RepositoryForeign, RepositoryDenied."""
        with durable.explained(path, path):
            access.require_sheltered(path)
            if os.path.lexists(path):
                if not os.path.isdir(path):
                    raise errors.RepositoryForeign(repository=path)
                content = os.listdir(path)
                if FILE in content:
                    raise errors.RepositoryError(reason=f"{path} is a repository already; use it as it is")
                if set(content) - {UNFINISHED}:
                    raise errors.RepositoryForeign(repository=path)
                os.chmod(path, durable.DIRECTORY_MODE)
            else:
                folders.make(os.path.dirname(os.path.abspath(path)), 0o755)
                durable.make_directory(path)
            identity = secrets.token_hex(8)
            durable.replace(os.path.join(path, FILE), RepositoryFile(id=identity).dump())
        return Repository(path, identity)

    @staticmethod
    def open(path: str) -> Repository:
        """Errors: NoRepository, RepositoryForeign, RepositoryDenied, RepositoryVersion, Damaged."""
        with durable.explained(path, path):
            try:
                status = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                raise errors.NoRepository(repository=path) from None
            if not stat.S_ISDIR(status.st_mode):
                raise errors.NoRepository(repository=path)
            file = os.path.join(path, FILE)
            # Asked first: whoever mistyped -r must not be told to chmod a directory that is none of ours.
            if not os.path.lexists(file):
                if set(os.listdir(path)) - {UNFINISHED}:
                    raise errors.RepositoryForeign(repository=path)
                raise errors.NoRepository(repository=path)
            if status.st_mode & 0o077:
                mode = stat.S_IMODE(status.st_mode)
                raise errors.RepositoryDenied(
                    repository=path, reason=f"others may enter it (mode {mode:04o}); run `chmod 700 {errors.argument(path)}`"
                )
            if status.st_uid not in (os.geteuid(), 0) and os.geteuid() != 0:
                raise errors.RepositoryDenied(repository=path, reason=f"it belongs to user {status.st_uid}")
            access.require_sheltered(path)
            return Repository(path, RepositoryFile.load(file).id)

    def domain(self, uuid: names.DomainUuid) -> DomainStore:
        return DomainStore(self, uuid)

    def has(self, uuid: names.DomainUuid) -> bool:
        return os.path.isdir(os.path.join(self.path, uuid))

    def domains(self) -> List[DomainStore]:
        """Every domain with at least one generation, ordered by UUID."""
        return [s for s in (self.domain(u) for u in self.uuids()) if s.generations()]

    def uuids(self) -> List[names.DomainUuid]:
        """Every domain that a run was ever begun for, manifests unread."""
        with durable.explained(self.path, self.path):
            return [names.DomainUuid(e) for e in sorted(os.listdir(self.path)) if _canonical(e)]

    def find(self, domain: str) -> DomainStore:
        """By UUID, or by the name in the newest generation.  Errors: NotInRepository; Usage when two have the name."""
        if names.is_uuid(domain):
            kept = self.domain(names.domain_uuid(domain))
            if kept.generations():
                return kept
        matches = []
        damage: Optional[errors.Damaged] = None
        for one in map(self.domain, self.uuids()):
            try:
                if one.generations() and one.name == domain:
                    matches.append(one)
            except errors.Damaged as e:
                damage = e  # of another domain perhaps: it must not stand in this one's way
        if len(matches) > 1:
            raise errors.Usage(
                reason=f"several domains were called '{names.printable(domain)}': "
                + ", ".join(s.uuid for s in matches)
                + "; give a UUID"
            )
        if not matches and damage:
            raise damage
        if not matches:
            raise errors.NotInRepository(domain=names.printable(domain), repository=self.path)
        return matches[0]


def _canonical(entry: str) -> bool:
    return names.is_uuid(entry) and names.domain_uuid(entry) == entry


@dataclass(frozen=True)
class Link:
    """One layer of a chain."""

    backup: names.BackupId
    layer: str
    contents: str
    digest: str  # of the contents file


@dataclass(frozen=True)
class Leftover:
    """A staging directory of a run that ended badly; `intent` is None when it cannot be read."""

    path: str
    id: str
    intent: Optional[Intent]


class DomainStore:
    """What the repository holds of one domain."""

    def __init__(self, repository: Repository, uuid: names.DomainUuid) -> None:
        self.repository, self.uuid = repository, uuid
        self.path = os.path.join(repository.path, uuid)
        self._generations: Optional[List[Manifest]] = None
        self._open: Optional[names.BackupId] = None

    @property
    def name(self) -> str:
        """As of the newest generation."""
        generations = self.generations()
        return generations[-1].domain.name if generations else self.uuid

    def directory(self, backup: str) -> str:
        return os.path.join(self.path, "staging" if backup == self._open else "backups", backup)

    def open_point(self) -> Optional[Intent]:
        """The intent of the fleecing point that was left open, if there is one."""
        intents = [leftover.intent for leftover in self.leftovers()]
        return next((intent for intent in intents if intent and intent.phase in ("open", "committing")), None)

    def with_open_point(self) -> DomainStore:
        """The same domain with the generation of its open fleecing point as the newest; itself when none is open."""
        intent = self.open_point()
        if intent is None:
            return self
        seen = DomainStore(self.repository, self.uuid)
        seen._open = names.BackupId(intent.id)
        seen._generations = [*self.generations(), seen._load(seen._open)]
        return seen

    def lock(self, wait: float = 0, stop: Callable[[], None] = lambda: None) -> ContextManager[None]:
        """The one writer; makes the domain's directories first.  Errors: RepositoryBusy, RepositoryDenied."""
        with durable.explained(self.repository.path, self.path):
            access.require_own(self.repository.path)
            for path in (self.path, os.path.join(self.path, "staging"), os.path.join(self.path, "backups")):
                durable.ensure_directory(path)
            self.reserve()
        try:
            name = self.name
        except errors.Damaged:
            name = self.uuid  # `verify` says what is damaged; the lock is only named here
        self._generations = None
        return lock.exclusive(os.path.join(self.path, "lock"), self.repository.path, name, wait, stop)

    def reserve(self) -> None:
        """Keeps a little room for a prune on a full disk; without any there is none."""
        path = os.path.join(self.path, RESERVE)
        try:
            if os.path.lexists(path) and os.lstat(path).st_size >= RESERVE_BYTES:
                return
            fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, durable.FILE_MODE)
            try:
                os.posix_fallocate(fd, 0, RESERVE_BYTES)
            finally:
                os.close(fd)
        except OSError:
            pass  # the disk is full, or not ours to write: what is done next will say so

    def give_back(self) -> None:
        """Lets go of the reserve.  Errors: RepositoryError and kin."""
        path = os.path.join(self.path, RESERVE)
        with durable.explained(self.repository.path, path):
            if os.path.lexists(path):
                os.unlink(path)

    def generations(self) -> List[Manifest]:
        """Every published generation as it is now, ascending; what was taken away is a mark.

        Errors: Damaged naming the manifest; RepositoryDenied.
        """
        if self._generations is None:
            found = [self._current(i) for i in self.ids()]
            self._generations = sorted((m for m in found if m), key=lambda m: m.generation)
        return self._generations

    def refresh(self) -> None:
        """Reads the generations anew when they are next asked for."""
        self._generations = None

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

    def protected(self, backup: str) -> bool:
        """Whether `protect` was asked for it: no prune takes it away."""
        return os.path.lexists(os.path.join(self.directory(backup), PROTECTED))

    def ids(self) -> List[names.BackupId]:
        """The ids of what is published, in no order, their manifests unread."""
        with durable.explained(self.repository.path, self.path):
            try:
                durable.require_directory(self.path)
                durable.require_directory(os.path.join(self.path, "backups"))
                return [names.backup_id(e) for e in os.listdir(os.path.join(self.path, "backups"))]
            except FileNotFoundError:
                return []
            except errors.Usage as e:
                raise errors.Damaged(path=os.path.join(self.path, "backups"), reason=str(e)) from None

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

        ChangeIdBroken for a change id whose number stands for another moment here.
        """
        generations = self.generations()
        if isinstance(point, points.Latest):
            found = generations[-1:]
        elif isinstance(point, points.Generation):
            found = [m for m in generations if m.generation == point.number]
        elif isinstance(point, points.Id):
            found = [m for m in generations if m.id.startswith(point.prefix)]
        elif isinstance(point, points.ChangeId):
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

    def require(self, backup: str) -> Manifest:
        """The manifest of a published backup.  Errors: Damaged when there is none: a layer names it as its parent."""
        found = next((m for m in self.generations() if m.id == backup), None)
        if found is None:
            raise errors.Damaged(path=self.directory(backup), reason="its manifest is missing")
        return found

    def next_generation(self) -> int:
        generations = self.generations()
        return generations[-1].generation + 1 if generations else 1

    def newest_backup(self, manifest: Manifest, target: str) -> Optional[Manifest]:
        """The newest generation up to `manifest` that holds data of a disk in its lineage."""
        return history.newest_backup(self.generations(), manifest, target)

    def chain(self, backup: str, target: str) -> List[Link]:
        """A backup's layers of one disk, newest first down to the full.  Errors: Damaged when a link is missing."""
        links: List[Link] = []
        at: Optional[str] = backup
        while at is not None:
            if any(link.backup == at for link in links):
                raise errors.Damaged(path=self.directory(at), reason="its chain runs in a circle")
            layers = self.layers(at)
            entry = layers.entry(target) if links else layers.disks.get(target)
            if entry is None:
                raise errors.Damaged(path=self.directory(at), reason=f"it holds no data of disk {target}")
            place = self.directory(at)
            durable.require_regular(os.path.join(place, entry.file))
            links.append(
                Link(
                    names.BackupId(at),
                    os.path.join(place, entry.file),
                    os.path.join(place, entry.contents),
                    entry.digest,
                )
            )
            at = entry.parent
        return links

    @contextmanager
    def deltas(self, target: str, after: int, until: int, *, lineage: Optional[str] = None) -> Iterator[history.Deltas]:
        """The deltas of generations after+1..until as readers, oldest first.

        With `lineage` each of them must be there and have the disk in that lineage: only then is the union all that
        was written.  Errors: Damaged; LineageBroken.
        """
        if lineage is not None:
            history.require_unbroken(self.generations(), target, after, until, lineage)
        with ExitStack() as stack:
            readers: List[npy.Reader] = []
            for manifest in self.generations():
                disk = manifest.disk(target)
                if after < manifest.generation <= until and disk:
                    path = os.path.join(self.directory(manifest.id), f"{target}.delta.npy")
                    readers.append(stack.enter_context(npy.Reader(path, extents.EXTENT, disk.delta.digest)))
            yield history.Deltas(readers)

    def leftovers(self) -> List[Leftover]:
        """What runs that died have left in staging; to be asked under the lock only."""
        found: List[Leftover] = []
        staging = os.path.join(self.path, "staging")
        with durable.explained(self.repository.path, staging):
            entries = sorted(os.listdir(staging)) if os.path.isdir(staging) else []
        for entry in entries:
            path = os.path.join(staging, entry)
            try:
                durable.require_directory(path)
                intent: Optional[Intent] = Intent.load(os.path.join(path, "intent.json"))
                if intent and (intent.id != entry or intent.repository != self.repository.id):
                    intent = None
            except (errors.CbtError, OSError):
                intent = None
            found.append(Leftover(path, entry, intent))
        return found

    def settle(self) -> bool:
        """Removes the intent from the newest generation, where a crash right after the rename left it; whether it had.

        The rename came after everything else was cleaned up, so that intent says nothing any more.
        """
        newest = self.generations()[-1:]
        path = os.path.join(self.directory(newest[0].id), "intent.json") if newest else ""
        if not newest or not os.path.lexists(path):
            return False
        with durable.explained(self.repository.path, path):
            os.unlink(path)
            durable.sync_directory(os.path.dirname(path))
        return True

    def discard(self, leftover: Leftover) -> None:
        """Removes a staging directory."""
        with durable.explained(self.repository.path, leftover.path):
            durable.remove_directory(leftover.path, last="intent.json")


def layer_backing(parent: Optional[str], target: str) -> Optional[str]:
    """The backing file string of a layer: right from staging and from backups."""
    return None if parent is None else f"../../backups/{parent}/{target}.qcow2"
