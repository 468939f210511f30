"""What merging works with: one disk's layers and their contents, runs carried from one layer to another, and the room for it."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Callable, Final, Iterable, Iterator, List, Optional

import numpy as np

from libvirt_cbt import durable, errors, extents, places
from libvirt_cbt.actions.session import Session
from libvirt_cbt.nbdio import merge, reshape, server
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import manifest, merging, npy, store

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


def move(
    disk: Disk,
    source: str,
    layer: Optional[str],
    batches: Iterator[merge.Batch],
    stored: Callable[[extents.Extents], None],
    capacity: int,
    *,
    bare: bool = False,
    first: Iterable[merge.Batch] = (),
) -> merge.Moved:
    """Reads one backup's layer alone, and writes another, which is in whole grains meanwhile; `first` goes first."""
    watch, total = disk.session.watch, on_disk(disk.path(source))
    with ExitStack() as stack:
        run_dir = stack.enter_context(places.temporary())
        sink = None
        if layer:
            reshape.grow(layer, capacity)
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
            first=first,
        )


def moves(parts: List[merging.Part]) -> List[merge.Move]:
    return [merge.Move(p.offset, p.length, p.state, p.digest, p.pieces) for p in parts]


def as_they_are(contents: npy.Reader) -> Iterator[merge.Batch]:
    for rows in merging.slices(contents):
        yield merge.Batch(moves(merging.as_parts(rows)), NO_ROWS)


def on_disk(path: str) -> int:
    """Bytes that a layer takes on disk.  Errors: Damaged when it is missing."""
    with durable.readable(path, path):
        return os.stat(path).st_blocks * 512


def ignored(_: extents.Extents) -> None:
    """Rows that are known already."""


def to_carry(disk: Disk, lower: str, upper: str) -> int:
    """About the bytes that the lower's runs will take in the upper: their share of the lower's size on disk."""
    lacking = every = 0
    with disk.contents(lower) as below, disk.contents(upper) as above:
        for window in merging.windows(below, above, disk.capacity(upper)):
            pieces = [n for part in window.parts if part.state == extents.DATA for _, n in part.pieces]
            lacking += extents.total(window.untouched, extents.DATA) + sum(pieces)
        for rows in merging.slices(below):
            every += extents.total(rows, extents.DATA)
    return on_disk(disk.path(lower)) * lacking // every if every else 0


def room_for(disk: Disk, needed: int) -> bool:
    """Whether a merge, which writes before it frees, has the room; the reserve counts when it must."""
    if free(disk.kept.path) < needed + SLACK:
        disk.kept.give_back()
    return free(disk.kept.path) >= needed + SLACK


def no_room(disk: Disk, backup: str, needed: int) -> errors.CbtError:
    left = free(disk.kept.path)
    return errors.NoRoomToMerge(
        repository=disk.kept.repository.path, free=left, backup=backup, needed=needed + SLACK, target=disk.target
    )


def free(path: str) -> int:
    """Bytes that the file system has left for us."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
