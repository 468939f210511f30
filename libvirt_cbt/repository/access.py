"""Whose a repository is: nobody else may put another folder in its place, and only its owner writes to it."""

from __future__ import annotations

import os

from libvirt_cbt import errors, folders


def require_sheltered(path: str) -> None:
    """Errors: RepositoryDenied where others could exchange the repository; OSError."""
    reason = folders.exposed(os.path.abspath(path))
    if reason:
        raise errors.RepositoryDenied(repository=path, reason=reason)


def require_own(path: str) -> None:
    """Root may read what a user keeps.  What it wrote there would lie under names that the user can exchange meanwhile,
    and would be in the way of the user's own runs.

    Errors: RepositoryDenied; OSError.
    """
    reason = folders.foreign(os.path.abspath(path))
    if reason:
        raise errors.RepositoryDenied(repository=path, reason=f"{reason}; run this as that user")
