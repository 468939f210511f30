"""The repository on disk: REPO/<domain-uuid>/backups/<id>/, read as values, written through `staging`."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Callable, ContextManager, Final, Iterator, List, Optional

from libvirt_cbt import durable, errors, extents, folders, names
from libvirt_cbt.repository import access, history, lock, npy, published
from libvirt_cbt.repository.manifest import Intent, RepositoryFile

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
        """Every domain with at least one generation, be it one that cannot be read, ordered by UUID."""
        return [s for s in (self.domain(u) for u in self.uuids()) if s.generations() or s.unread()]

    def uuids(self) -> List[names.DomainUuid]:
        """Every domain that a run was ever begun for, manifests unread."""
        with durable.explained(self.path, self.path):
            return [names.DomainUuid(e) for e in sorted(os.listdir(self.path)) if _canonical(e)]

    def find(self, domain: str) -> DomainStore:
        """By UUID, or by the name in the newest generation.  Errors: NotInRepository; Usage when two have the name."""
        if names.is_uuid(domain):
            kept = self.domain(names.domain_uuid(domain))
            if kept.generations() or kept.unread():
                return kept
        matches = []
        damage: Optional[errors.Damaged] = None
        for one in map(self.domain, self.uuids()):
            try:
                if one.generations() and one.name == domain:
                    matches.append(one)
                elif one.unread() and not one.generations():
                    damage = one.unread()[0].error
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


class DomainStore(published.Published):
    """What the repository holds of one domain."""

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
        seen._unread = self._unread
        return seen

    def lock(self, wait: float = 0, stop: Callable[[], None] = lambda: None) -> ContextManager[None]:
        """The one writer; makes the domain's directories first.  Errors: RepositoryBusy, RepositoryDenied."""
        with durable.explained(self.repository.path, self.path):
            access.require_own(self.repository.path)
            for path in (self.path, os.path.join(self.path, "staging"), os.path.join(self.path, "backups")):
                durable.ensure_directory(path)
            self.reserve()
        self.refresh()
        return lock.exclusive(os.path.join(self.path, "lock"), self.repository.path, self._busy, wait, stop)

    def _busy(self, owner: str) -> errors.RepositoryBusy:
        try:
            name = self.name
        except errors.Damaged:
            name = self.uuid  # `verify` says what is damaged; the lock is only named here
        return errors.RepositoryBusy(domain=name, repository=self.repository.path, owner=owner)

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

    def protected(self, backup: str) -> bool:
        """Whether `protect` was asked for it: no prune takes it away."""
        return os.path.lexists(os.path.join(self.directory(backup), PROTECTED))

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
            self.require_unbroken(target, after, until, lineage)
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
