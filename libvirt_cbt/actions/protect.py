"""Takes one backup out of the reach of `prune`, whatever its rules say; `unprotect` gives it back."""

from __future__ import annotations

import os

from libvirt_cbt import durable, errors, names, points
from libvirt_cbt.actions import reading, results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.repository import manifest, store


def protect(session: Session, domain_name: str, *, at: str = "latest") -> results.Protection:
    """No prune takes this backup away until `unprotect`.  Errors: NotInRepository, NoSuchBackup, RepositoryBusy."""
    kept = session.stored(domain_name)
    with kept.lock():
        made = reading.with_data(kept, points.at(at))
        path = _path(kept, made)
        with durable.explained(kept.repository.path, path):
            if not kept.protected(made.id):
                os.close(durable.create(path))
            durable.sync_directory(os.path.dirname(path))
    return results.Protection(kept.name, made.id, made.generation, protected=True)


def unprotect(session: Session, domain_name: str, *, at: str = "latest") -> results.Protection:
    """The rules hold for this backup again.  Errors: NotInRepository, NoSuchBackup, RepositoryBusy."""
    kept = session.stored(domain_name)
    with kept.lock():
        made = kept.resolve(points.at(at))
        path = _path(kept, made)
        if not kept.protected(made.id):
            raise errors.NoSuchBackup(
                domain=names.printable(kept.name), point=f"{at} (it is not protected)", repository=kept.repository.path
            )
        with durable.explained(kept.repository.path, path):
            os.unlink(path)
            durable.sync_directory(os.path.dirname(path))
    return results.Protection(kept.name, made.id, made.generation, protected=False)


def _path(kept: store.DomainStore, made: manifest.Manifest) -> str:
    return os.path.join(kept.directory(made.id), store.PROTECTED)
