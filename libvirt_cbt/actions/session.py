"""What the verbs share: one connection to libvirt, one repository, and somebody to tell how it goes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Callable, Final, List, Optional

from libvirt_cbt import errors, names, tls
from libvirt_cbt.repository import aliases, store

if TYPE_CHECKING:
    from libvirt_cbt.hypervisor import connection

DEFAULT_REPOSITORY: Final = "/var/lib/libvirt-cbt"


def default_repository() -> str:
    """/var/lib/libvirt-cbt for root, the user's data directory otherwise."""
    if os.geteuid() == 0:
        return DEFAULT_REPOSITORY
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.path.join(data, "libvirt-cbt")


class Watch:
    """Told of progress and asked whether to stop; the default does neither.

    `progress(target, done, total)` in bytes; `note(sentence)` for the log, `failed(sentence)` for its errors; `stop()` raises to end the run cleanly.
    """

    def progress(self, target: str, done: int, total: int) -> None:
        """A disk has come to byte `done` of `total`."""

    def note(self, sentence: str) -> None:
        """Something worth a line in the log."""

    def failed(self, sentence: str, /, **facts: Any) -> None:
        """Something failed that does not end the run; the facts are an error's, with its kind and code."""

    def stop(self) -> None:
        """Raises errors.Interrupted when the run should end."""


class Session:
    """Opens the connection and the repository when they are first needed; a context manager.

    `uri` as virsh takes it (None: libvirt's default); `repository` a directory (None: LIBVIRT_CBT_REPO, else the
    default path, which the first backup makes); `scratch_dir` where a verb is given none (None: the default folder);
    `listening` where QEMU may listen on a host by TLS.
    """

    def __init__(
        self,
        uri: Optional[str] = None,
        repository: Optional[str] = None,
        watch: Optional[Watch] = None,
        *,
        scratch_dir: Optional[str] = None,
        listening: Optional[tls.Listening] = None,
    ) -> None:
        asked = repository or os.environ.get("LIBVIRT_CBT_REPO")
        self.uri = uri
        self.scratch_dir = scratch_dir
        self.listening = listening
        self.path = os.path.abspath(asked or default_repository())
        self.watch = watch or Watch()
        self._may_make = not asked
        self._host: Optional[connection.Host] = None
        self._repository: Optional[store.Repository] = None
        self._closers: List[Callable[[], None]] = []

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._host:
            self._host.close()
            self._host = None

    @property
    def host(self) -> connection.Host:
        """The connection.  Errors: NoHypervisor."""
        if self._host is None:
            from libvirt_cbt.hypervisor import connection  # restoring needs no libvirt

            self._host = connection.Host(self.uri, self.listening)
        return self._host

    def repository(self, *, make: bool = False) -> store.Repository:
        """The repository; with `make` the default path comes into being.  Errors: NoRepository and kin."""
        if self._repository is None:
            try:
                self._repository = store.Repository.open(self.path)
            except errors.NoRepository:
                if not (make and self._may_make):
                    raise
                self._repository = store.Repository.init(self.path)
        return self._repository

    def live(self, domain: str) -> store.DomainStore:
        """As `stored`, for what concerns the guest itself: libvirt is asked first, as a name may be another's by now."""
        repository = self.repository()
        try:
            uuid = self.host.find(domain)
        except errors.NoSuchDomain:
            return self.stored(domain)
        return self._told(repository.domain(uuid)) if repository.has(uuid) else self.stored(domain)

    def stored(self, domain: str) -> store.DomainStore:
        """What the repository holds of a domain, given by name, UUID, or libvirt's id; libvirt is asked last.

        OpenStack's name of an instance is looked for when nothing else is called so.  The watch is told of what cannot
        be read of it.
        """
        return self._told(self._stored(domain))

    def _told(self, kept: store.DomainStore) -> store.DomainStore:
        for lost in kept.unread():
            self.watch.failed(str(lost.error), kind=lost.error.kind, code=lost.error.code)
        return kept

    def _stored(self, domain: str) -> store.DomainStore:
        repository = self.repository()
        try:
            return repository.find(domain)
        except errors.NotInRepository:
            if names.is_uuid(domain) and repository.has(names.domain_uuid(domain)):
                return repository.domain(names.domain_uuid(domain))
            try:
                uuid = self.host.find(domain)
            except errors.CbtError:
                uuid = None
            if uuid and repository.has(uuid):
                return repository.domain(uuid)
            return aliases.find(repository, domain)
