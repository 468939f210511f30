"""Makes a repository."""

from __future__ import annotations

from libvirt_cbt.actions import results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.repository import store


def init(session: Session) -> results.Init:
    """Makes the session's repository in a new or empty directory.

    Errors: RepositoryForeign for a directory that holds something else, RepositoryError, RepositoryDenied.
    """
    made = store.Repository.init(session.path)
    return results.Init(repository=made.path, id=made.id)
