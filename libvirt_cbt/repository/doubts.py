"""What happened to a guest that its bitmaps may not tell of: REPO/<domain-uuid>/doubts.json, until it is settled."""

from __future__ import annotations

import os
from typing import Collection, Final, List, Optional

from pydantic import Field

from libvirt_cbt import durable, errors
from libvirt_cbt.repository.manifest import Hex16, Sealed, TargetName, Uuid
from libvirt_cbt.repository.store import DomainStore

FILE: Final = "doubts.json"


class Doubts(Sealed):
    """`suspect` disks have neither been audited nor copied in full since `crashed`; at `reverted` (both are times) the
    guest was put back to a snapshot, when `after` was the newest generation.
    """

    repository: Hex16
    domain: Uuid
    crashed: Optional[str] = Field(None, max_length=40)
    suspect: List[TargetName] = Field(default_factory=list)
    reverted: Optional[str] = Field(None, max_length=40)
    after: Optional[Hex16] = None


def read(kept: DomainStore) -> Doubts:
    """None of them where there is no note; of a note that is damaged nothing is known, so every disk is suspect.

    Errors: RepositoryDenied and kin.
    """
    path = os.path.join(kept.path, FILE)
    with durable.explained(kept.repository.path, path):
        try:
            found = Doubts.load(path)
            if (found.repository, found.domain) == (kept.repository.id, kept.uuid):
                return found
        except FileNotFoundError:
            return _none(kept)
        except errors.Damaged:
            pass
    return _none(kept).model_copy(update={"crashed": "a time that is not known", "suspect": _targets(kept)})


def reverted(kept: DomainStore) -> Optional[str]:
    """When the guest was put back to a snapshot after its newest generation; None when it was not."""
    found = read(kept)
    newest = kept.generations()[-1:]
    return found.reverted if newest and found.after == newest[0].id else None


def crashed(kept: DomainStore, time: str) -> bool:
    """Notes that the guest's QEMU died; False when nothing is stored that could be in doubt, or it is noted already."""
    found = read(kept)
    if not kept.generations() or found.crashed == time:
        return False
    _write(kept, found.model_copy(update={"crashed": time, "suspect": _targets(kept)}))
    return True


def put_back(kept: DomainStore, time: str) -> bool:
    """Notes that the guest was put back to a snapshot; as `crashed`."""
    found, newest = read(kept), kept.generations()[-1:]
    if not newest or found.after == newest[0].id:
        return False
    _write(kept, found.model_copy(update={"reverted": time, "after": newest[0].id}))
    return True


def settle(kept: DomainStore, targets: Collection[str]) -> None:
    """These disks were compared or copied as a whole; what lies before the newest generation is no doubt any more."""
    if not os.path.lexists(os.path.join(kept.path, FILE)):
        return
    found = read(kept)
    left = [target for target in found.suspect if target not in targets]
    pending = found.after if reverted(kept) else None
    if left or pending:
        changes = {"suspect": left, "crashed": found.crashed if left else None}
        changes.update({} if pending else {"reverted": None, "after": None})
        _write(kept, found.model_copy(update=changes))
        return
    path = os.path.join(kept.path, FILE)
    with durable.explained(kept.repository.path, path):
        os.unlink(path)
        durable.sync_directory(kept.path)


def _none(kept: DomainStore) -> Doubts:
    return Doubts(repository=kept.repository.id, domain=kept.uuid)


def _targets(kept: DomainStore) -> List[str]:
    return [disk.target for made in kept.generations()[-1:] for disk in made.disks]


def _write(kept: DomainStore, doubts: Doubts) -> None:
    path = os.path.join(kept.path, FILE)
    with durable.explained(kept.repository.path, path):
        durable.replace(path, doubts.dump())
