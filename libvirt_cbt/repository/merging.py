"""What one layer has that the layer above it lacks: whose runs go where when the two become one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final, Iterator, List, Tuple

import numpy as np

from libvirt_cbt import durable, extents
from libvirt_cbt.repository import manifest, npy
from libvirt_cbt.repository.store import DomainStore

INTENT: Final = "prune.json"
REMOVED: Final = "removed"
AT_ONCE: Final = 4096  # rows
WINDOW: Final = 1 << 30  # bytes of the disk planned at once: memory stays flat however many runs there are


@dataclass(frozen=True)
class Part:
    """A run with the (offset, length) pieces of it, inside one window, that the upper layer lacks."""

    offset: int
    length: int
    state: int
    digest: bytes
    pieces: Tuple[Tuple[int, int], ...]

    @property
    def whole(self) -> bool:
        return self.pieces == ((self.offset, self.length),)


@dataclass(frozen=True)
class Window:
    """One stretch of the disk: what the upper layer lacks of the lower, and the rows of either that begin there.

    `untouched` are rows of the lower, wholly inside, of which the upper has nothing; `parts` the rest of them.
    """

    untouched: extents.Extents
    parts: List[Part]
    upper: extents.Extents
    lower: extents.Extents

    def united(self) -> extents.Extents:
        """The rows of two layers that have nothing in common, as those of one that has none below: data only."""
        rows = np.concatenate([self.lower, self.upper])
        rows = rows[rows["state"] == extents.DATA]
        ordered: extents.Extents = rows[np.argsort(rows["offset"], kind="stable")]
        return ordered


def windows(lower: npy.Reader, upper: npy.Reader, capacity: int) -> Iterator[Window]:
    """The whole disk in ascending order.  A run that crosses an edge is in both windows, with pieces of its own in each.

    `capacity` in bytes, of the upper.  Errors: Damaged when a contents file is out of order.
    """
    for low in range(0, capacity, WINDOW):
        high = min(low + WINDOW, capacity)
        below, above = (reader.window(low, high) for reader in (lower, upper))
        # By whole rows: of a large full nearly all are untouched.
        first = np.searchsorted(extents.ends(above), below["offset"], side="right")
        last = np.searchsorted(above["offset"], extents.ends(below), side="left")
        apart = (first >= last) & (below["offset"] >= low) & (extents.ends(below) <= high)
        parts = _parts(below[~apart], above, low, high)
        yield Window(below[apart], parts, above[above["offset"] >= low], below[below["offset"] >= low])


def _parts(below: extents.Extents, above: extents.Extents, low: int, high: int) -> List[Part]:
    cells = extents.Cells(low, high, extents.GRAIN)
    inside = extents.clip(below, low, high)
    cells.paint(inside, np.arange(1, len(inside) + 1, dtype=np.int32))
    cells.paint(extents.clip(above, low, high), 0)
    pieces: dict[int, List[Tuple[int, int]]] = {}
    for first, last, number in cells.runs():
        row = below[number - 1]
        offset = low + first * extents.GRAIN
        # The last run of a disk that has grown since ends inside a grain.
        end = min(low + last * extents.GRAIN, int(row["offset"]) + int(row["length"]), high)
        pieces.setdefault(number, []).append((offset, end - offset))
    return [
        Part(
            int(below[number - 1]["offset"]),
            int(below[number - 1]["length"]),
            int(below[number - 1]["state"]),
            below[number - 1]["digest"].tobytes(),
            tuple(found),
        )
        for number, found in pieces.items()
    ]


def as_parts(rows: extents.Extents) -> List[Part]:
    """Whole rows, each to be carried over as it is."""
    return [
        Part(offset, length, state, bytes(digest), ((offset, length),)) for offset, length, state, digest in rows.tolist()
    ]


def slices(contents: npy.Reader) -> Iterator[extents.Extents]:
    """All rows of a contents file, some at a time."""
    for first in range(0, contents.rows, AT_ONCE):
        yield contents.slice(first, min(first + AT_ONCE, contents.rows))


def without(contents: npy.Reader, size: int) -> Iterator[List[Part]]:
    """What of `size` bytes a layer's contents do not name, as zeroes, in whole grains."""
    for low in range(0, size, WINDOW):
        high = min(low + WINDOW, size)
        cells = extents.Cells(low, high, extents.GRAIN)
        cells.values[:] = extents.ZERO
        cells.paint(extents.clip(contents.window(low, high), low, high), 0)
        yield as_parts(_rows_of(cells.extents(high)))


def _rows_of(found: extents.Extents) -> extents.Extents:
    rows = np.zeros(len(found), extents.CONTENT)
    for name in ("offset", "length", "state"):
        rows[name] = found[name]
    return rows


# The steps on files.  Each is durable when it returns; whoever calls holds the domain's lock and has the backups pinned.


def place(kept: DomainStore, backup: str, layers: manifest.Layers) -> None:
    """Replaces a backup's layers.json.  Errors: RepositoryFull and kin."""
    path = os.path.join(kept.directory(backup), "layers.json")
    with durable.explained(kept.repository.path, path):
        durable.replace(path, layers.dump())
    kept.refresh()


def contents(kept: DomainStore, backup: str, target: str, above: str) -> npy.Writer:
    """A new contents file of a layer, of the version after `above` (a contents file's name)."""
    version = (manifest.contents_version(target, above) or 1) + 1
    path = os.path.join(kept.directory(backup), manifest.contents_name(target, version))
    with durable.explained(kept.repository.path, path):
        if os.path.lexists(path):
            os.unlink(path)  # of a merge that was ended
        return npy.Writer(path, extents.CONTENT)


def take_place(kept: DomainStore, lower: str, upper: str, target: str) -> None:
    """The file of the lower layer becomes that of the upper; both names lead to it from here on."""
    source, place = (os.path.join(kept.directory(b), f"{target}.qcow2") for b in (lower, upper))
    with durable.explained(kept.repository.path, place):
        durable.sync_file(source)
        if os.path.lexists(f"{place}.new"):
            os.unlink(f"{place}.new")
        os.link(source, f"{place}.new")
        os.rename(f"{place}.new", place)
        durable.sync_directory(os.path.dirname(place))


def tidy(kept: DomainStore, backup: str) -> List[str]:
    """Removes the files of layers that layers.json no longer names, and what an ended prune left; their names."""
    layers = kept.layers(backup)
    entries = {**layers.disks, **layers.below}
    named = {name for entry in entries.values() for name in (entry.file, entry.contents)}
    folder = kept.directory(backup)
    with durable.explained(kept.repository.path, folder):
        gone = [name for name in sorted(os.listdir(folder)) if name not in named and _of_a_layer(name)]
        for name in gone:
            os.unlink(os.path.join(folder, name))
        if gone:
            durable.sync_directory(folder)
    return gone


def _of_a_layer(name: str) -> bool:
    target, _, rest = name.partition(".")
    return rest in ("qcow2", "qcow2.new") or name == "layers.json.new" or manifest.contents_version(target, name) is not None


def forget(kept: DomainStore, backup: str) -> None:
    """Removes a generation with its deltas: gone from the list by one rename, then from the disk."""
    trash = os.path.join(kept.path, REMOVED)
    with durable.explained(kept.repository.path, trash):
        durable.ensure_directory(trash)
        durable.publish(kept.directory(backup), os.path.join(trash, backup))
        kept.refresh()
        durable.remove_directory(os.path.join(trash, backup))


def empty_trash(kept: DomainStore) -> None:
    """Removes what a prune that was killed had forgotten by half."""
    trash = os.path.join(kept.path, REMOVED)
    with durable.explained(kept.repository.path, trash):
        if not os.path.lexists(trash):
            return
        durable.require_directory(trash)  # what a link leads to is none of ours
        for entry in os.listdir(trash):
            durable.remove_directory(os.path.join(trash, entry))


def begin(kept: DomainStore, intent: manifest.PruneIntent) -> None:
    """Writes down what is about to go."""
    path = os.path.join(kept.path, INTENT)
    with durable.explained(kept.repository.path, path):
        durable.replace(path, intent.dump())


def begun(kept: DomainStore) -> bool:
    """Whether an earlier prune did not come to its end."""
    return os.path.lexists(os.path.join(kept.path, INTENT))


def end(kept: DomainStore) -> None:
    """Nothing is in flight any more."""
    path = os.path.join(kept.path, INTENT)
    with durable.explained(kept.repository.path, path):
        for name in (path, f"{path}.new"):
            if os.path.lexists(name):
                os.unlink(name)
        durable.sync_directory(kept.path)
