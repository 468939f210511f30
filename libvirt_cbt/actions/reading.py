"""What every reader of a backup begins with: which generation, and which of its disks have data."""

from __future__ import annotations

from typing import Collection, List

from libvirt_cbt import errors, names, points
from libvirt_cbt.repository import manifest, store


def with_data(kept: store.DomainStore, point: points.Point) -> manifest.Manifest:
    """The generation at a point; `latest` is the newest that holds data.  Errors: NoSuchBackup, also for a mark; Damaged."""
    if isinstance(point, points.Latest):
        kept.require_newest()
        for candidate in reversed(kept.generations()):
            if candidate.kind != "mark":
                return candidate
    found = kept.resolve(point)
    if found.kind == "mark":
        raise _without_data(kept, f"{point} (it is a mark)")
    return found


def chosen(
    kept: store.DomainStore, generation: manifest.Manifest, targets: Collection[str]
) -> List[manifest.ManifestDisk]:
    """The disks of a generation that are named by target or serial, each once; without any, all that it has data of.

    Errors: NoSuchDisk; NoSuchBackup for a disk that is a mark in it.
    """
    named = {disk.target: disk for disk in map(generation.require, targets)}
    asked = list(named.values())
    for disk in asked:
        if disk.mode == "mark":
            raise _without_data(kept, f"{generation.generation} of disk {disk.target}")
    return asked or [disk for disk in generation.disks if disk.mode != "mark"]


def _without_data(kept: store.DomainStore, point: str) -> errors.NoSuchBackup:
    return errors.NoSuchBackup(domain=names.printable(kept.name), point=point, repository=kept.repository.path)
