"""The layers that a disk's bytes come from; to salvage, also of a chain that is no longer whole."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import List, Optional, Protocol

import numpy as np

from libvirt_cbt import errors, extents
from libvirt_cbt.nbdio import qcow2, server
from libvirt_cbt.repository import history, manifest, npy, store


class Contents(Protocol):
    """Which runs a layer holds, asked for by window."""

    path: str

    def window(self, low: int, high: int) -> extents.Extents:
        """Whole rows of CONTENT that touch bytes [low, high)."""


@dataclass(frozen=True)
class Layer:
    """One layer of a chain; `broken` says why nothing of it can be read, or judged once it is."""

    backup: str
    path: str
    contents: Contents
    data_bytes: int
    broken: Optional[str] = None


class _Unknown:
    """What a layer may hold whose contents are lost: all that the deltas since its parent touch, else everything."""

    def __init__(self, path: str, deltas: Optional[history.Deltas], capacity: int) -> None:
        self.path, self._deltas, self._capacity = path, deltas, capacity

    def window(self, low: int, high: int) -> extents.Extents:
        high = min(high, self._capacity)
        if self._deltas is None:
            touched = extents.make([low], [high - low], extents.DATA) if high > low else extents.empty()
        else:
            touched = extents.round_outward(self._deltas.union(low, high), extents.GRAIN, self._capacity)
            touched = extents.clip(touched, low, high)
        found = np.zeros(len(touched), extents.CONTENT)
        found["offset"], found["length"] = touched["offset"], touched["length"]
        found["state"] = extents.DATA  # a zero, too, is unproved
        return found


def layers(
    stack: ExitStack,
    kept: store.DomainStore,
    generation: manifest.Manifest,
    disk: manifest.ManifestDisk,
    *,
    salvage: bool,
) -> List[Layer]:
    """The chain, newest first, its files open until `stack` is left.

    Errors: Damaged for whatever is missing or broken; with `salvage` only for manifests.
    """
    if not salvage:
        return [_whole(stack, kept, link, disk.target) for link in kept.chain(generation.id, disk.target)]
    found: List[Layer] = []
    at: Optional[str] = generation.id
    while at is not None and not any(layer.backup == at for layer in found):
        entry: Optional[manifest.LayerEntry] = None
        why = "layers.json does not name its layer"
        try:
            layers_at = kept.layers(at)
            entry = layers_at.entry(disk.target) if found else layers_at.disks.get(disk.target)
        except errors.Damaged as e:
            why = _reason(e)
        # Without an entry: what was below when it was made.  If that was taken away since, nothing below is known.
        parent = entry.parent if entry else _parent(kept, at, disk.target)
        found.append(_some(stack, kept, at, parent, entry, why, disk))
        at = parent
    return found


def _parent(kept: store.DomainStore, backup: str, target: str) -> Optional[str]:
    made = next((m for m in kept.generations() if m.id == backup), None)
    entry = made.disk(target) if made else None
    return entry.parent if entry else None


def _reason(error: errors.CbtError) -> str:
    return str(error.facts.get("reason", error))


def _whole(stack: ExitStack, kept: store.DomainStore, link: store.Link, target: str) -> Layer:
    contents = stack.enter_context(npy.Reader(link.contents, extents.CONTENT, link.digest))
    if not os.path.isfile(link.layer):
        raise errors.Damaged(path=link.layer, reason="the layer is missing")
    return Layer(link.backup, link.layer, contents, _data_bytes(kept, link.backup, target))


def _data_bytes(kept: store.DomainStore, backup: str, target: str) -> int:
    """For the progress alone: a layer whose manifest is damaged is as good as its contents."""
    made = next((m for m in kept.generations() if m.id == backup), None)
    entry = made.disk(target) if made else None
    return entry.data_bytes if entry else 0


def _some(
    stack: ExitStack,
    kept: store.DomainStore,
    backup: str,
    parent: Optional[str],
    entry: Optional[manifest.LayerEntry],
    why: str,
    disk: manifest.ManifestDisk,
) -> Layer:
    """A layer as far as it is good."""
    place = kept.directory(backup)
    path = os.path.join(place, f"{disk.target}.qcow2")
    contents: Optional[Contents] = None
    if entry:
        try:
            contents = stack.enter_context(
                npy.Reader(os.path.join(place, entry.contents), extents.CONTENT, entry.digest)
            )
        except errors.Damaged as e:
            why = f"{entry.contents}: {_reason(e)}"
    if contents is None:
        return Layer(backup, path, _Unknown(path, _deltas(stack, kept, backup, parent, disk), disk.capacity), 0, why)
    return Layer(backup, path, contents, _data_bytes(kept, backup, disk.target), _unreadable(path))


def _unreadable(path: str) -> Optional[str]:
    try:
        if not os.path.isfile(path):
            return "the layer is missing"
        qcow2.refuse_external_data(path)
        server.require_open([path])
    except (errors.Damaged, errors.ToolFailed) as e:
        return _reason(e)
    return None


def _deltas(
    stack: ExitStack, kept: store.DomainStore, backup: str, parent: Optional[str], disk: manifest.ManifestDisk
) -> Optional[history.Deltas]:
    """What was written between a layer and the one below; None where that is not known: a full, or a gap."""
    try:
        if parent is None:
            return None
        at, below = kept.require(backup), kept.require(parent)
        lineage = at.require(disk.target).lineage
        return stack.enter_context(kept.deltas(disk.target, below.generation, at.generation, lineage=lineage))
    except errors.CbtError:
        return None
