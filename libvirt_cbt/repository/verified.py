"""When a whole domain was verified last: REPO/<domain-uuid>/verified.json, a note that nothing depends on."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from typing import Final, Optional

from pydantic import Field

from libvirt_cbt import durable, errors
from libvirt_cbt.repository.manifest import Bytes, Count, Hex16, Sealed, Uuid
from libvirt_cbt.repository.store import DomainStore

FILE: Final = "verified.json"


class Verified(Sealed):
    """`newest` is the newest generation that was there, `backups` and `damage` are counts."""

    repository: Hex16
    domain: Uuid
    time: str = Field(max_length=40)
    newest: Count
    backups: Bytes
    checked_bytes: Bytes
    damage: Bytes


def record(kept: DomainStore, *, backups: int, checked_bytes: int, damage: int) -> Optional[str]:
    """Notes a verification that has just ended; returns why it could not, for a repository may be read-only."""
    if not kept.generations():
        return None
    made = Verified(
        repository=kept.repository.id,
        domain=kept.uuid,
        time=datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        newest=kept.generations()[-1].generation,
        backups=backups,
        checked_bytes=checked_bytes,
        damage=damage,
    )
    path = os.path.join(kept.path, FILE)
    try:
        durable.replace(path, made.dump())
    except OSError as e:
        return f"{path}: {e.strerror}; this verification is not noted for `report`"
    return None


def last(kept: DomainStore) -> Optional[Verified]:
    """The last verification of the whole domain, None when there was none.

    Errors: Damaged, also for a note of another repository or domain; RepositoryDenied.
    """
    path = os.path.join(kept.path, FILE)
    with durable.explained(kept.repository.path, path):
        try:
            found = Verified.load(path)
        except FileNotFoundError:
            return None
    if (found.repository, found.domain) != (kept.repository.id, kept.uuid):
        raise errors.Damaged(path=path, reason="it belongs to another domain or repository")
    return found
