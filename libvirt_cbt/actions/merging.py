"""Takes one disk of one backup away: its layer becomes one with the layer above, or goes if there is none.

Each function is a write order: after every step of it each other backup shows the bytes it showed before, through this
tool and through qemu-img, so a crash loses nothing, and doing it again from the beginning ends it.
docs/architecture.md has the tables.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Dict, Final, Iterator, List, Optional, Tuple

import numpy as np

from libvirt_cbt import durable, errors, extents, places
from libvirt_cbt.actions.session import Session
from libvirt_cbt.nbdio import merge, server
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import manifest, merging, npy, pins, store

SLACK: Final = 1 << 17  # bytes that a merge writes besides runs
LEAST: Final = 1 << 18  # bytes of data that one step carries over at least
NO_ROWS: Final = np.empty(0, extents.CONTENT)


@dataclass(frozen=True)
class Disk:
    """One disk of one domain's backups, under the domain's lock."""

    session: Session
    kept: store.DomainStore
    target: str
    options: Options

    def entry(self, backup: str) -> manifest.LayerEntry:
        found = self.kept.layers(backup).entry(self.target)
        if found is None:
            raise errors.Damaged(path=self.kept.directory(backup), reason=f"it holds no data of disk {self.target}")
        return found

    def path(self, backup: str, name: str = "") -> str:
        return os.path.join(self.kept.directory(backup), name or f"{self.target}.qcow2")

    def children(self, backup: str) -> List[str]:
        """Whose layer lies right on this backup's: a backup, or one that is no backup any more and on its way out."""
        found = []
        for one in self.kept.members():
            entry = self.kept.layers(one).entry(self.target)
            if entry and entry.parent == backup:
                found.append(one)
        return found

    def on_its_way(self, backup: str) -> bool:
        """Whether it was begun to be taken away: then it holds only what the one above it lacks."""
        return self.target in self.kept.layers(backup).below

    def place(self, layers: manifest.Layers) -> None:
        """Replaces layers.json; on a full disk with the room that was kept for it."""
        try:
            merging.place(self.kept, layers.backup, layers)
        except errors.RepositoryFull:
            self.kept.give_back()
            merging.place(self.kept, layers.backup, layers)

    def capacity(self, backup: str) -> int:
        return self.kept.require(backup).require(self.target).capacity

    @contextmanager
    def contents(self, backup: str) -> Iterator[npy.Reader]:
        entry = self.entry(backup)
        with npy.Reader(self.path(backup, entry.contents), extents.CONTENT, entry.digest) as reader:
            yield reader

    @contextmanager
    def written(self, backup: str) -> Iterator[npy.Writer]:
        """The next version of a contents file; it goes again when anything fails."""
        writer = merging.contents(self.kept, backup, self.target, self.entry(backup).contents)
        try:
            yield writer
        except BaseException:
            writer.close()
            os.unlink(writer.path)
            raise

    def damaged(self, backup: str) -> Callable[[merge.Move, str], None]:
        def found(one: merge.Move, reason: str) -> None:
            where = f"{reason} at offset {one.offset}, length {one.length}, so its runs cannot be taken over"
            raise errors.Damaged(path=self.path(backup), reason=where)

        return found


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
        if not _room_for(disk, _to_carry(disk, lower, upper)):
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
    limit = None if _room_for(disk, _to_carry(disk, lower, upper)) else free(kept.path) - SLACK
    if limit is not None and limit < LEAST:
        raise _no_room(disk, lower, _to_carry(disk, lower, upper))
    with ExitStack() as stack:
        below, above = (stack.enter_context(disk.contents(b)) for b in (lower, upper))
        lacking = _Lacking(below, above, capacity, limit)
        rows = stack.enter_context(disk.written(upper))
        try:
            moved = _move(disk, lower, layer, lacking.batches(), rows.append, capacity)
        finally:
            merge.cut(layer, capacity)
        digest, _ = rows.finish()
        now: Dict[str, Any] = {"contents": os.path.basename(rows.path), "digest": digest}
        if lacking.whole:
            now["parent"] = parent = disk.entry(lower).parent
            merge.rebase(layer, store.layer_backing(parent, target) or "")
        durable.sync_file(layer)
        layers = kept.layers(upper)
        disk.place(layers.model_copy(update={"disks": {**layers.disks, target: _changed(layers.disks[target], now)}}))
    merging.tidy(kept, upper)
    return moved.data_bytes, lacking.whole


def _make_room(disk: Disk, lower: str, upper: str) -> None:
    """Gives back what the lower has and the upper hides.  The lower is no backup from here on."""
    _hide(disk, lower, upper, disk.capacity(upper))
    with disk.contents(lower) as left:
        size = merge.virtual_size(disk.path(lower))
        nothing = merging.without(left, size)
        _move(disk, lower, disk.path(lower), (merge.Batch(_moves(p), NO_ROWS) for p in nothing), _ignored, size, bare=True)
        merge.cut(disk.path(lower), size)


class _Lacking:
    """All that the upper lacks of the lower, or of its data the first `limit` bytes; `whole` says which it was."""

    def __init__(self, below: npy.Reader, above: npy.Reader, capacity: int, limit: Optional[int]) -> None:
        self._windows = merging.windows(below, above, capacity)
        self._left = limit
        self.whole = True

    def batches(self) -> Iterator[merge.Batch]:
        for window in self._windows:
            parts = sorted([*merging.as_parts(window.untouched), *window.parts], key=lambda p: p.offset)
            yield merge.Batch(_moves([p for p in parts if self._taken(p)]), window.upper)

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
            needed = on_disk(disk.path(upper))
            if not _room_for(disk, needed):
                _make_room(disk, lower, upper)
            if not _room_for(disk, needed):
                raise _no_room(disk, lower, needed)
        if not disk.on_its_way(lower) or _hidden(disk, lower, upper, capacity):
            _hide(disk, lower, upper, capacity)
        with ExitStack() as stack:
            rest, above = (stack.enter_context(disk.contents(b)) for b in (lower, upper))
            rows = stack.enter_context(disk.written(upper))
            if not _one(layer, disk.path(upper)):
                moved = _move(disk, upper, layer, _as_they_are(above), _ignored, capacity, bare=True)
                merge.cut(layer, capacity)
            for window in merging.windows(rest, above, capacity):
                rows.append(window.united())
            digest, _ = rows.finish()
            merging.take_place(kept, lower, upper, target)
            now = {"parent": None, "contents": os.path.basename(rows.path), "digest": digest}
            layers = kept.layers(upper)
            disk.place(layers.model_copy(update={"disks": {**layers.disks, target: _changed(layers.disks[target], now)}}))
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
        batches = (merge.Batch(_moves(w.parts), w.untouched) for w in merging.windows(below, above, capacity))
        _move(disk, lower, None, batches, rows.append, capacity)
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


def _move(
    disk: Disk,
    source: str,
    layer: Optional[str],
    batches: Iterator[merge.Batch],
    stored: Callable[[extents.Extents], None],
    capacity: int,
    *,
    bare: bool = False,
) -> merge.Moved:
    """Reads one backup's layer alone, and writes another, which is in whole grains meanwhile."""
    watch, total = disk.session.watch, on_disk(disk.path(source))
    with ExitStack() as stack:
        run_dir = stack.enter_context(places.temporary())
        sink = None
        if layer:
            merge.grow(layer, capacity)
            sink = stack.enter_context(merge.output(layer, run_dir))
        if sink and layer == disk.path(source):  # zeroes only: nothing is read
            endpoint = sink.endpoint
        else:
            [endpoint] = stack.enter_context(server.layers([disk.path(source)], run_dir))
        return merge.move(
            disk.target,
            endpoint,
            sink,
            batches,
            disk.options,
            stored=stored,
            damaged=disk.damaged(source),
            progress=lambda done: watch.progress(disk.target, done, max(done, total)),
            stop=watch.stop,
            bare=bare,
        )


def _moves(parts: List[merging.Part]) -> List[merge.Move]:
    return [merge.Move(p.offset, p.length, p.state, p.digest, p.pieces) for p in parts]


def _as_they_are(contents: npy.Reader) -> Iterator[merge.Batch]:
    for rows in merging.slices(contents):
        yield merge.Batch(_moves(merging.as_parts(rows)), NO_ROWS)


def _changed(entry: manifest.LayerEntry, update: Dict[str, Any]) -> manifest.LayerEntry:
    return entry.model_copy(update=update)


def on_disk(path: str) -> int:
    """Bytes that a layer takes on disk.  Errors: Damaged when it is missing."""
    with durable.readable(path, path):
        return os.stat(path).st_blocks * 512


def _one(layer: str, other: str) -> bool:
    """Whether two layers are one file.  Errors: Damaged."""
    with durable.readable(layer, layer):
        return os.path.samefile(layer, other)


def _ignored(_: extents.Extents) -> None:
    """Rows that are known already."""


def _to_carry(disk: Disk, lower: str, upper: str) -> int:
    """About the bytes that the lower's runs will take in the upper: their share of the lower's size on disk."""
    lacking = every = 0
    with disk.contents(lower) as below, disk.contents(upper) as above:
        for window in merging.windows(below, above, disk.capacity(upper)):
            pieces = [n for part in window.parts if part.state == extents.DATA for _, n in part.pieces]
            lacking += extents.total(window.untouched, extents.DATA) + sum(pieces)
        for rows in merging.slices(below):
            every += extents.total(rows, extents.DATA)
    return on_disk(disk.path(lower)) * lacking // every if every else 0


def _room_for(disk: Disk, needed: int) -> bool:
    """Whether a merge, which writes before it frees, has the room; the reserve counts when it must."""
    if free(disk.kept.path) < needed + SLACK:
        disk.kept.give_back()
    return free(disk.kept.path) >= needed + SLACK


def _no_room(disk: Disk, backup: str, needed: int) -> errors.CbtError:
    left = free(disk.kept.path)
    return errors.NoRoomToMerge(
        repository=disk.kept.repository.path, free=left, backup=backup, needed=needed + SLACK, target=disk.target
    )


def free(path: str) -> int:
    """Bytes that the file system has left for us."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
