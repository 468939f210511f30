"""Keeps the tracking of a guest whole: what libvirt has lost and the images still have comes back.

Bitmaps live in the images, checkpoints in libvirt; either can be lost, or put back from an older copy, without the
other.  Only bitmaps and checkpoints that a published generation of this repository names are touched.
"""

from __future__ import annotations

from datetime import datetime
from typing import Dict, Final, List, Optional, Sequence, Set, Tuple

from libvirt_cbt import errors, names
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import checkpoints, documents, domain
from libvirt_cbt.nbdio import still
from libvirt_cbt.repository import manifest, store

SHOWN: Final = 5  # names in a sentence


def regain(session: Session, kept: store.DomainStore) -> List[str]:
    """Before planning, under the lock: the newest generation's checkpoint is given back to libvirt if it was lost.

    Bitmaps of older generations that came back with an older copy of an image are removed.  What was done is noted;
    returned are warnings for the result.  Where nothing can be put right the disks are copied in full.
    Errors: NoSuchDomain, NoHypervisor.
    """
    history = kept.generations()
    found = checkpoints.listed(session.host, kept.uuid, sizes=False)
    strange = unknown(kept, found)
    warnings = [stray(strange, kept.uuid)] if strange else []
    if not history:
        return warnings
    try:
        if not domain.alive(session.host, kept.uuid):
            _relist(session, kept, found)
        elif history[-1].checkpoint and history[-1].checkpoint not in found:
            # The one before may be there still: a run that was killed between its commit and its end.
            for generation in [m for m in history[-2:] if m.checkpoint not in found][::-1]:
                _redefine(session, kept, generation, newest=generation is history[-1])
        elif len(history) > 1 and any(d.base is None for d in history[-1].disks):
            _sweep(session, kept, found)
    except errors.NoHypervisor:
        raise
    except errors.HypervisorError as e:
        warnings.append(f"the tracking of generation {history[-1].generation} cannot be put right: {e}")
    return warnings


def _redefine(session: Session, kept: store.DomainStore, generation: manifest.Manifest, *, newest: bool) -> None:
    dom = domain.read(session.host, kept.uuid)
    targets = [d.target for d in dom.disks if trackable(d) and generation.disk(d.target)]
    if not generation.checkpoint or not targets:
        return
    sound = _redefined(session, kept, dom, generation, targets)
    if newest and sound:
        session.watch.note(_regained(generation, sound))
    elif sound:
        checkpoints.delete(session.host, kept.uuid, generation.checkpoint)
        session.watch.note(f"removed bitmap {generation.checkpoint} of generation {generation.generation}, which was lost")


def _redefined(
    session: Session, kept: store.DomainStore, dom: domain.Domain, generation: manifest.Manifest, targets: Sequence[str]
) -> List[str]:
    """Those of the targets that have a sound bitmap."""
    created = int(datetime.fromisoformat(generation.frozen_at.replace("Z", "+00:00")).timestamp())
    description = documents.description(kept.repository.id)
    info = documents.CheckpointInfo(str(generation.checkpoint), description, None, created, dict.fromkeys(targets, 0))
    sizes = checkpoints.redefine(session.host, kept.uuid, info, [d.target for d in dom.disks])
    return [t for t in targets if sizes.get(t) is not None]


def _sweep(session: Session, kept: store.DomainStore, found: Dict[str, documents.CheckpointInfo]) -> None:
    """Removes bitmaps that an older copy of an image brought with it: nobody else would, and they record for ever."""
    dom = domain.read(session.host, kept.uuid)
    for generation, targets in _forgotten(session, kept, dom, found):
        if _redefined(session, kept, dom, generation, targets):
            checkpoints.delete(session.host, kept.uuid, str(generation.checkpoint))
        session.watch.note(f"removed the bitmap of generation {generation.generation} from {_disks(targets)}")


def _relist(session: Session, kept: store.DomainStore, found: Dict[str, documents.CheckpointInfo]) -> None:
    """Tells libvirt again of every bitmap that the images of a guest that is off hold.

    The end of the run retires all but the newest, as it does with every checkpoint.
    """
    dom = domain.read(session.host, kept.uuid)
    for generation, targets in _forgotten(session, kept, dom, found):
        _redefined(session, kept, dom, generation, targets)
        if generation is kept.generations()[-1]:
            session.watch.note(_regained(generation, targets))


def _forgotten(
    session: Session, kept: store.DomainStore, dom: domain.Domain, found: Dict[str, documents.CheckpointInfo]
) -> List[Tuple[manifest.Manifest, List[str]]]:
    """Generations whose checkpoint libvirt does not have, and the disks whose images list its bitmap."""
    held = {disk.target: set(bitmaps(session, disk)) for disk in dom.disks}
    lost = [m for m in kept.generations() if m.checkpoint and m.checkpoint not in found]
    rows = [(m, [target for target, listed in held.items() if m.checkpoint in listed]) for m in lost]
    return [(m, targets) for m, targets in rows if targets]


def _regained(generation: manifest.Manifest, targets: Sequence[str]) -> str:
    return (
        f"libvirt had lost checkpoint {generation.checkpoint} of generation {generation.generation}; "
        f"the bitmap of {_disks(targets)} is still there and counts on"
    )


def trackable(disk: domain.Disk) -> bool:
    """Whether the disk can hold a bitmap and is one that we back up."""
    return not disk.unprotected and not disk.untracked


def bitmaps(session: Session, disk: domain.Disk) -> List[str]:
    """Names of the bitmaps that the header of a disk's own image lists; none where it cannot be read.

    Those made since QEMU opened the image are not among them.
    """
    if not trackable(disk) or not disk.inodes:
        return []
    try:
        machine = session.host.site.machine() or still.Here()
        # The guest has the image open: no lock is asked for, and nothing but the header is believed.
        found = still.told(machine.info(still.alone(machine, disk.source, disk.format), shared=True))
        return [bitmap.name for bitmap in found.specific.data.bitmaps]
    except (errors.HypervisorError, errors.Elsewhere, ValueError):
        return []


def unknown(kept: store.DomainStore, found: Dict[str, documents.CheckpointInfo]) -> List[str]:
    """Checkpoints that carry this repository's id but that no generation or unfinished run here names.

    They were made by a newer state of this repository than the one there is now, or by a copy of it.
    """
    # In this order: a run that publishes meanwhile is in one or the other.
    known: Set[Optional[str]] = {names.CHECKPOINT_PREFIX + leftover.id for leftover in kept.leftovers()}
    known |= {names.CHECKPOINT_PREFIX + backup for backup in kept.members()}
    return sorted(name for name in checkpoints.ours(found, kept.repository.id) if name not in known)


def stray(strange: Sequence[str], uuid: str) -> str:
    """The sentence about checkpoints that are `unknown`."""
    shown = ", ".join(strange[:SHOWN]) + (", ..." if len(strange) > SHOWN else "")
    return (
        f"{len(strange)} checkpoints carry this repository's id and are not of its generations ({shown}): an older copy "
        f"of it was put back, or another copy is in use; each costs guest writes a little, `libvirt-cbt untrack {uuid}` "
        "removes them and the next backup is full"
    )


def _disks(targets: Sequence[str]) -> str:
    return ("disk " if len(targets) == 1 else "disks ") + ", ".join(targets)
