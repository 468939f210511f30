"""Takes one disk of one backup away: its layer becomes one with the layer above, or goes if there is none.

Each function is a write order: after every step of it each other backup shows the bytes it showed before, through this
tool and through qemu-img, so a crash loses nothing, and doing it again from the beginning ends it.
docs/architecture.md has the tables.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any, Dict, Iterator, Optional, Tuple

from libvirt_cbt import durable, extents
from libvirt_cbt.actions import carrying
from libvirt_cbt.actions.carrying import Disk
from libvirt_cbt.nbdio import merge, reshape
from libvirt_cbt.repository import manifest, merging, npy, pins, store


def drop(disk: Disk, backup: str) -> None:
    """A layer that no other is on: named no more, then removed.  Errors: ChainPinned."""
    with pins.changing(disk.kept, [backup]):
        _let_go(disk, backup)


def _let_go(disk: Disk, backup: str) -> None:
    layers = disk.kept.layers(backup)
    removed = [*layers.removed, *([] if disk.target in layers.removed else [disk.target])]
    left = {t: e for t, e in layers.disks.items() if t != disk.target}
    below = {t: e for t, e in layers.below.items() if t != disk.target}
    disk.place(layers.model_copy(update={"disks": left, "below": below, "removed": removed}))
    merging.tidy(disk.kept, backup)


def into_child(disk: Disk, lower: str, upper: str) -> int:
    """Merges a layer from the middle into the one above it, whose runs it leaves as they are; bytes written.

    Where there is no room for all of it at once it goes in steps, each of which frees what it wrote.
    Errors: ChainPinned, NoRoomToMerge, Damaged, RepositoryFull and kin, NbdError.
    """
    kept, written, whole = disk.kept, 0, False
    with pins.changing(kept, [lower, upper]):
        if not carrying.room_for(disk, carrying.to_carry(disk, lower, upper)):
            _make_room(disk, lower, upper)
        while not whole:
            carried, whole = _carry(disk, lower, upper)
            written += carried
            if not whole:
                _make_room(disk, lower, upper)
        if disk.children(lower) == []:
            _let_go(disk, lower)
    disk.session.watch.note(f"disk {disk.target} of backup {lower} went into {upper}")
    return written


def _carry(disk: Disk, lower: str, upper: str) -> Tuple[int, bool]:
    """One step of it: bytes written, and whether that was all, so that the upper has left the lower."""
    kept, target, layer = disk.kept, disk.target, disk.path(upper)
    capacity = disk.capacity(upper)
    limit = (
        None
        if carrying.room_for(disk, carrying.to_carry(disk, lower, upper))
        else carrying.free(kept.path) - carrying.SLACK
    )
    if limit is not None and limit < carrying.LEAST:
        raise carrying.no_room(disk, lower, carrying.to_carry(disk, lower, upper))
    with ExitStack() as stack:
        below, above = (stack.enter_context(disk.contents(b)) for b in (lower, upper))
        lacking = _Lacking(below, above, capacity, limit)
        rows = stack.enter_context(disk.written(upper))
        try:
            moved = carrying.move(disk, lower, layer, lacking.batches(), rows.append, capacity)
        finally:
            reshape.cut(layer, capacity)
        digest, _ = rows.finish()
        now: Dict[str, Any] = {"contents": os.path.basename(rows.path), "digest": digest}
        if lacking.whole:
            now["parent"] = parent = disk.entry(lower).parent
            reshape.rebase(layer, store.layer_backing(parent, target) or "")
        durable.sync_file(layer)
        layers = kept.layers(upper)
        disk.place(layers.model_copy(update={"disks": {**layers.disks, target: _changed(layers.disks[target], now)}}))
    merging.tidy(kept, upper)
    return moved.data_bytes, lacking.whole


def _make_room(disk: Disk, lower: str, upper: str) -> None:
    """Gives back what the lower has and the upper hides.  The lower is no backup from here on."""
    _hide(disk, lower, upper, disk.capacity(upper))
    with disk.contents(lower) as left:
        size = reshape.virtual_size(disk.path(lower))
        carrying.move(disk, lower, disk.path(lower), _nothing(left, size), carrying.ignored, size, bare=True)
        reshape.cut(disk.path(lower), size)


def _nothing(left: npy.Reader, size: int) -> Iterator[merge.Batch]:
    """Zeroes over all that a layer holds beside its contents."""
    return (merge.Batch(carrying.moves(p), carrying.NO_ROWS) for p in merging.without(left, size))


class _Lacking:
    """All that the upper lacks of the lower, or of its data the first `limit` bytes; `whole` says which it was."""

    def __init__(self, below: npy.Reader, above: npy.Reader, capacity: int, limit: Optional[int]) -> None:
        self._windows = merging.windows(below, above, capacity)
        self._left = limit
        self.whole = True

    def batches(self) -> Iterator[merge.Batch]:
        for window in self._windows:
            parts = sorted([*merging.as_parts(window.untouched), *window.parts], key=lambda p: p.offset)
            yield merge.Batch(carrying.moves([p for p in parts if self._taken(p)]), window.upper)

    def _taken(self, part: merging.Part) -> bool:
        if self._left is not None and self.whole:
            self._left -= sum(length for _, length in part.pieces) if part.state == extents.DATA else 0
            self.whole = self._left >= 0
        return self.whole


def into_oldest(disk: Disk, lower: str, upper: str) -> int:
    """The oldest layer takes over what the one above it has, and then its place; bytes written.

    From the second step on the lower is no backup any more: it holds only what the upper lacks.  Errors: as above.
    """
    kept, target, session = disk.kept, disk.target, disk.session
    capacity, layer = disk.capacity(upper), disk.path(lower)
    with pins.changing(kept, [lower, upper]):
        moved = merge.Moved(0, 0, 0, 0)
        if not _one(layer, disk.path(upper)):
            needed = carrying.on_disk(disk.path(upper))
            if not carrying.room_for(disk, needed):
                _make_room(disk, lower, upper)
            if not carrying.room_for(disk, needed):
                raise carrying.no_room(disk, lower, needed)
        if fresh := not disk.on_its_way(lower) or _hidden(disk, lower, upper, capacity):
            _hide(disk, lower, upper, capacity)
        with ExitStack() as stack:
            rest, above = (stack.enter_context(disk.contents(b)) for b in (lower, upper))
            rows = stack.enter_context(disk.written(upper))
            if not _one(layer, disk.path(upper)):
                # All that is hidden goes before anything is written: by turns QEMU would write its tables at each turn.
                # What an earlier try has written stays.
                hidden = _nothing(rest, capacity) if fresh else ()
                every = carrying.as_they_are(above)
                moved = carrying.move(disk, upper, layer, every, carrying.ignored, capacity, bare=True, first=hidden)
                reshape.cut(layer, capacity)
            for window in merging.windows(rest, above, capacity):
                rows.append(window.united())
            digest, _ = rows.finish()
            merging.take_place(kept, lower, upper, target)
            now = {"parent": None, "contents": os.path.basename(rows.path), "digest": digest}
            layers = kept.layers(upper)
            disk.place(
                layers.model_copy(update={"disks": {**layers.disks, target: _changed(layers.disks[target], now)}})
            )
        merging.tidy(kept, upper)
        _let_go(disk, lower)
    session.watch.note(f"disk {target} of backup {lower}, the oldest, became that of {upper}")
    return moved.data_bytes


def _hidden(disk: Disk, lower: str, upper: str, capacity: int) -> bool:
    """Whether the upper has anything of the lower: what lay between them may have gone into the upper since."""
    every = shown = 0
    with disk.contents(lower) as below, disk.contents(upper) as above:
        for rows in merging.slices(below):
            every += extents.total(rows, extents.DATA) + extents.total(rows, extents.ZERO)
        for window in merging.windows(below, above, capacity):
            shown += extents.total(window.untouched, extents.DATA) + extents.total(window.untouched, extents.ZERO)
            shown += sum(length for part in window.parts for _, length in part.pieces)
    return shown < every


def _hide(disk: Disk, lower: str, upper: str, capacity: int) -> None:
    """The lower's contents shrink to what the upper lacks, and with them the lower is no backup any more."""
    with disk.contents(lower) as below, disk.contents(upper) as above, disk.written(lower) as rows:
        batches = (merge.Batch(carrying.moves(w.parts), w.untouched) for w in merging.windows(below, above, capacity))
        carrying.move(disk, lower, None, batches, rows.append, capacity)
        digest, _ = rows.finish()
    layers = disk.kept.layers(lower)
    now = {"contents": os.path.basename(rows.path), "digest": digest}
    update = {
        "disks": {t: e for t, e in layers.disks.items() if t != disk.target},
        "below": {**layers.below, disk.target: _changed(disk.entry(lower), now)},
        "removed": [*layers.removed, *([] if disk.target in layers.removed else [disk.target])],
    }
    disk.place(layers.model_copy(update=update))
    merging.tidy(disk.kept, lower)


def _changed(entry: manifest.LayerEntry, update: Dict[str, Any]) -> manifest.LayerEntry:
    return entry.model_copy(update=update)


def _one(layer: str, other: str) -> bool:
    """Whether two layers are one file.  Errors: Damaged."""
    with durable.readable(layer, layer):
        return os.path.samefile(layer, other)
