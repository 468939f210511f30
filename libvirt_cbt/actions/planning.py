"""Decides, per disk and before any freeze, what a new generation does: full, incremental or mark, and why."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Callable, Collection, Dict, Final, List, Optional, Sequence, Tuple

from libvirt_cbt import errors, extents, names
from libvirt_cbt.hypervisor import documents, domain
from libvirt_cbt.nbdio.copy import ALL, DIRTY, NOTHING
from libvirt_cbt.repository import doubts, manifest, store

MAX_CHAIN: Final = 60  # reading slows with depth; facts in design.md
ASKED: Final = "asked for, with --full or by full_every of its policy"
EXCLUDED: Final = "it was excluded by the command line"
LARGEST_CLUSTER: Final = 2 * 1024 * 1024  # of qcow2
MODES: Final = {ALL: "full", DIRTY: "incremental", NOTHING: "mark"}


@dataclass(frozen=True)
class DiskPlan:
    """One disk in a new generation.

    `base` is the generation whose checkpoint the bitmap counts from, None for a disk that begins a lineage; `parent`
    the backup whose layer lies below; `since` the parent's generation: stored deltas after it are copied too.  `was` is
    the disk's size in bytes at the base.
    """

    disk: domain.Disk
    copy: str
    reason: Optional[str]
    lineage: str
    base: Optional[int] = None
    was: Optional[int] = None
    checkpoint: Optional[str] = None
    parent: Optional[names.BackupId] = None
    since: int = 0
    estimate: int = 0  # dirty bytes, for the dry run and the progress

    @property
    def target(self) -> str:
        return self.disk.target

    @property
    def mode(self) -> str:
        return MODES[self.copy]

    @property
    def uncovered(self) -> extents.Extents:
        """Where a disk that has grown may hold what nobody wrote since the base, and so no bitmap tells of.

        A qcow2 image that shrinks inside a cluster keeps the rest of it, and growth shows it again.
        """
        was = self.disk.capacity if self.was is None else self.was
        end = min(-(-was // LARGEST_CLUSTER) * LARGEST_CLUSTER, self.disk.capacity)
        return extents.make([was], [end - was], extents.DATA) if was < end else extents.empty()


Bitmaps = Callable[[domain.Disk], Sequence[str]]  # those that the header of a disk's image lists
Plans = Tuple[List[DiskPlan], List[manifest.Unprotected]]


def plan(
    dom: domain.Domain,
    kept: store.DomainStore,
    checkpoints: Dict[str, documents.CheckpointInfo],
    bitmaps: Bitmaps,
    *,
    full: bool = False,
    only: Collection[str] = (),
    exclude: Collection[str] = (),
    mark: bool = False,
    allow_plaintext: bool = False,
    max_chain: int = MAX_CHAIN,
) -> Plans:
    """Plans of the disks that join the job, and the disks that are not protected with the reason of each.

    `mark`: no disk is copied, and those that cannot hold a bitmap stay out.  A disk that QEMU encrypts joins only with
    `allow_plaintext`.  `bitmaps` is asked only to say more of a disk whose tracking broke.
    Errors: NoSuchDisk for a name in `only` or `exclude` that the domain does not have; WouldBePlaintext; Usage when
    nothing is left.
    """
    for target in (*only, *exclude):
        dom.disk(target)
    history = kept.generations()
    plans: List[DiskPlan] = []
    unprotected: List[manifest.Unprotected] = []
    sealed: List[str] = []
    for disk in dom.disks:
        left_out = disk.target in exclude or bool(only and disk.target not in only)
        if left_out:
            unprotected.append(manifest.Unprotected(target=disk.target, reason=EXCLUDED))
        elif disk.unprotected:
            unprotected.append(manifest.Unprotected(target=disk.target, reason=disk.unprotected))
        elif mark and disk.untracked:
            unprotected.append(manifest.Unprotected(target=disk.target, reason=disk.untracked))
        plaintext = disk.encrypted and not allow_plaintext
        # A tracked disk that is left out still joins as a mark, so that its tracking goes on; but whatever joins has a
        # scratch file, where the old content of what the guest overwrites meanwhile would lie decrypted.
        if disk.unprotected or ((left_out or mark) and disk.untracked) or (left_out and plaintext):
            continue
        if plaintext:
            sealed.append(disk.target)
        else:
            broken = disk.untracked or _broken(disk, history, checkpoints, bitmaps) or _reverted(kept)
            marked = left_out or mark
            plans.append(_disk(disk, kept, history, checkpoints, broken, full=full, mark=marked, max_chain=max_chain))
    if sealed:
        raise errors.WouldBePlaintext(domain=names.printable(dom.name), disks=", ".join(sealed))
    if not plans or (not mark and all(p.copy == NOTHING for p in plans)):
        raise errors.Usage(
            reason=f"no disk of domain '{names.printable(dom.name)}' is left: "
            + "; ".join(f"{u.target}: {u.reason}" for u in unprotected)
        )
    return plans, unprotected


def require_all(dom: domain.Domain, unprotected: List[manifest.Unprotected]) -> None:
    """Errors: DiskUnprotected when a disk is not protected that the command line did not leave out by name.

    A drive without a medium holds nothing that could be missed.
    """
    missed = [u for u in unprotected if u.reason != EXCLUDED and dom.disk(u.target).source]
    if missed:
        shown = "; ".join(f"{u.target}: {u.reason}" for u in missed)
        raise errors.DiskUnprotected(domain=names.printable(dom.name), disks=shown)


def _disk(
    disk: domain.Disk,
    kept: store.DomainStore,
    history: List[manifest.Manifest],
    checkpoints: Dict[str, documents.CheckpointInfo],
    broken: Optional[str],
    *,
    full: bool,
    mark: bool,
    max_chain: int,
) -> DiskPlan:
    if broken:
        first = not any(m.disk(disk.target) for m in history) and not disk.untracked
        reason = "first backup of this disk" if first else broken
        return DiskPlan(disk, NOTHING if mark else ALL, reason, names.new_lineage(), estimate=disk.capacity)
    newest = history[-1]
    entry = newest.require(disk.target)
    dirty = checkpoints[newest.checkpoint or ""].disks[disk.target] or 0
    tracked = DiskPlan(
        disk, NOTHING, None, entry.lineage,
        base=newest.generation, was=entry.capacity, checkpoint=newest.checkpoint, estimate=dirty,
    )  # fmt: skip
    if mark:
        return tracked
    parent = kept.newest_backup(newest, disk.target)
    why_full = ASKED if full else _chain_unfit(kept, parent, newest, disk.target, max_chain)
    if why_full or parent is None:
        return replace(tracked, copy=ALL, reason=why_full, estimate=disk.capacity)
    return replace(tracked, copy=DIRTY, parent=names.BackupId(parent.id), since=parent.generation)


def _broken(
    disk: domain.Disk,
    history: List[manifest.Manifest],
    checkpoints: Dict[str, documents.CheckpointInfo],
    bitmaps: Bitmaps,
) -> Optional[str]:
    """Why the newest generation's bitmap cannot be trusted for this disk, with what was and what is; None when it can.

    The bitmap proves the image: its name is random and no other image has it, but for copies and for the other disks
    of the same domain, which is why a disk that is now where another one was, or may be a copy of it, starts anew.
    """
    if not history:
        return "first backup of this domain"
    newest = history[-1]
    entry = newest.disk(disk.target)
    if entry is None:
        return _absent(disk.target, history)
    if newest.checkpoint is None:
        return f"generation {newest.generation} has no checkpoint: none of its disks could hold a bitmap"
    if newest.checkpoint not in checkpoints:
        return f"libvirt no longer has checkpoint {newest.checkpoint} of generation {newest.generation}, " + (
            f"nor does {_path(disk.source)} hold a usable bitmap of it" + _older_copy(disk, history, bitmaps)
        )
    if checkpoints[newest.checkpoint].disks.get(disk.target) is None:
        before = "" if disk.source == entry.source.path else f" (the disk was {_path(entry.source.path)} then)"
        return f"the bitmap of generation {newest.generation} is missing or broken in {_path(disk.source)}" + (
            before + _older_copy(disk, history, bitmaps)
        )
    if disk.capacity < entry.capacity:
        return f"the disk shrank from {entry.capacity} to {disk.capacity} bytes"
    for was, now, what in ((entry.serial, disk.serial, "serial"), (entry.wwn, disk.wwn, "WWN")):
        if was != now:
            return f"the disk's {what} changed from {was or 'none'} to {now or 'none'}"
    return _another_image(disk, entry, history)


def _reverted(kept: store.DomainStore) -> Optional[str]:
    """What a hook has told, whatever the bitmaps say."""
    time = doubts.reverted(kept)
    return f"the guest was put back to a snapshot at {time}" if time else None


def _absent(target: str, history: List[manifest.Manifest]) -> str:
    newest = history[-1]
    left_out = next((u.reason for u in newest.unprotected if u.target == target), None)
    last = next((m.generation for m in reversed(history) if m.disk(target)), None)
    return f"generation {newest.generation} does not have disk {target}" + (
        (f" ({left_out})" if left_out else "") + (f"; the last that has it is {last}" if last else "")
    )


def _older_copy(disk: domain.Disk, history: List[manifest.Manifest], bitmaps: Bitmaps) -> str:
    held = set(bitmaps(disk))
    for older in reversed(history[:-1]):
        if older.checkpoint in held:
            return f"; it has that of generation {older.generation}: an older copy of the image was put back"
    return ""


def _another_image(disk: domain.Disk, entry: manifest.ManifestDisk, history: List[manifest.Manifest]) -> Optional[str]:
    """Why the image, whose bitmap has the right name, may be that of another disk of this domain, or a copy of it."""
    newest = history[-1]
    others = [other for other in newest.disks if other.target != disk.target]
    for other in others:
        if _same_image(disk, other):
            return f"this image was disk {other.target} in generation {newest.generation}, now it is disk {disk.target}"
    known = [m.disk(disk.target) for m in history]
    if any(e and e.lineage == entry.lineage and _known_image(disk, e) for e in known):
        return None
    for other in others:
        # A copy may have been made larger, never smaller.
        if other.source.format == "qcow2" and other.capacity <= disk.capacity:
            return (
                f"its image is {_path(disk.source)} and was {_path(entry.source.path)} in generation "
                f"{newest.generation}: that it is no copy of disk {other.target} cannot be proved"
            )
    return None


def _same_image(disk: domain.Disk, entry: manifest.ManifestDisk) -> bool:
    """Whether the disk's own image (not a backing file that many may share) is the one recorded as another disk."""
    if entry.source.inode is not None and disk.inodes:
        return entry.source.inode == disk.inodes[0]
    return entry.source.path == disk.source


def _known_image(disk: domain.Disk, entry: manifest.ManifestDisk) -> bool:
    """Whether the disk's image, or what lies below it since a snapshot, is the one recorded."""
    return entry.source.path == disk.source or entry.source.inode in disk.inodes


def _path(path: str) -> str:
    return names.printable(path) or "a source without a path"


def _chain_unfit(
    kept: store.DomainStore, parent: Optional[manifest.Manifest], newest: manifest.Manifest, target: str, max_chain: int
) -> Optional[str]:
    if parent is None:
        return "no earlier backup of this disk holds data"
    try:
        # What marks since the backup below have recorded is copied, too.
        kept.require_unbroken(target, parent.generation, newest.generation, newest.require(target).lineage)
    except errors.LineageBroken as e:
        return f"generation {e.facts['generation']} {e.facts['reason']}"
    try:
        chain = kept.chain(names.BackupId(parent.id), target)
    except errors.Damaged as e:
        return f"the chain below is damaged: {e}"
    if len(chain) >= max_chain:
        return f"the chain has {len(chain)} layers"
    for link in chain:
        if not os.path.exists(link.layer):
            return f"the layer of backup {link.backup} is missing"
    return None
