"""Drops from an answer of `changed` what was written with the bytes that were there: two backups, compared.

What the contents of both record as the same (zeroes, or a run of one place and one digest) is not read.  The rest is
read, each run against its digest: bytes that are not proved never make a changed sector look equal.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Dict, Final, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from libvirt_cbt import errors, extents, places
from libvirt_cbt.actions.session import Session
from libvirt_cbt.nbdio import check, server
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import changes, manifest, npy, plan, store, union

UNIT: Final = 512  # bytes compared as one: the least that a guest can write
BATCH: Final = 256  # grains (16 MiB) read of each backup at once
LARGEST_FILE: Final = (1 << 63) - 1

Mask = extents.Mask


def require_backups(kept: store.DomainStore, span: changes.Span) -> None:
    """Errors: Usage when one end of the question holds no data of the disk, so that there is nothing to compare."""
    if span.since is None:
        raise errors.Usage(reason="--exact compares two backups, and --since '*' is none; name the older one")
    for made in (span.since, span.until):
        if span.target not in kept.layers(made.id).disks:
            raise errors.Usage(
                reason=f"--exact compares two backups, and generation {made.generation} holds no data of disk "
                f"'{span.target}'; leave --exact out, or `libvirt-cbt list` shows which are backups"
            )


def differing(
    session: Session, kept: store.DomainStore, span: changes.Span, pages: Iterator[extents.Extents]
) -> Iterator[extents.Extents]:
    """What differs of CHANGE arrays, to the sector; states and generations stay, neighbours that agree are joined.

    Where arrays end makes no difference.  Errors: Damaged naming the layer, NbdError, ToolFailed.
    """
    assert span.since is not None
    with ExitStack() as stack:
        reading = _Layers(session, stack)
        older = _Side(session, kept, span.since, span.target, span.disk.capacity, reading, stack)
        newer = _Side(session, kept, span.until, span.target, span.disk.capacity, reading, stack)
        yield from union.joined(_differing(older, newer, pages, span.disk.capacity), "state", "generation")


def _differing(
    older: _Side, newer: _Side, pages: Iterator[extents.Extents], capacity: int
) -> Iterator[extents.Extents]:
    for low, high, rows in _windows(pages, capacity):
        one, two = older.shown(low, high), newer.shown(low, high)
        touched = extents.Cells(low, high, extents.GRAIN)
        touched.paint(rows, 1)
        grains = np.flatnonzero((touched.values != 0) & ~one.same(two))
        for first in range(0, len(grains), BATCH):
            some = grains[first : first + BATCH]
            wanted = np.zeros(len(touched.values), np.bool_)
            wanted[some] = True
            differs = sectors(older.read(one, wanted, low, some), newer.read(two, wanted, low, some))
            found = overlaps(rows, runs(differs, low, some))
            if len(found):
                yield found


def _windows(pages: Iterator[extents.Extents], capacity: int) -> Iterator[Tuple[int, int, extents.Extents]]:
    """Every window [low, high) of the plan that rows touch, with the rows in it."""
    for page in pages:
        stop = int(extents.ends(page[-1:])[0])
        low = int(page["offset"][0]) // plan.WINDOW * plan.WINDOW
        while low < stop:
            high = min(low + plan.WINDOW, capacity)
            rows = extents.clip(page, low, high)
            if len(rows):
                yield low, high, rows
            later = page["offset"][int(np.searchsorted(extents.ends(page), np.uint64(high), side="right")) :][:1]
            low = max(high, int(later[0]) // plan.WINDOW * plan.WINDOW) if len(later) else stop


class _Layers:
    """The layers of both chains, by one storage daemon that starts when the first of them must be read."""

    def __init__(self, session: Session, stack: ExitStack) -> None:
        self._session, self._stack = session, stack
        self._paths: List[str] = []
        self._endpoints: Dict[str, server.Endpoint] = {}

    def add(self, paths: Sequence[str]) -> None:
        self._paths += [path for path in paths if path not in self._paths]

    def endpoint(self, path: str) -> server.Endpoint:
        if not self._endpoints:
            for one in self._paths:
                if not os.path.isfile(one):
                    raise errors.Damaged(path=one, reason="the layer is missing")
            run_dir = self._stack.enter_context(places.temporary())
            self._endpoints = dict(zip(self._paths, self._stack.enter_context(server.layers(self._paths, run_dir))))
        return self._endpoints[path]


class _Side:
    """One of the two backups: what it shows, and its bytes."""

    def __init__(
        self,
        session: Session,
        kept: store.DomainStore,
        backup: manifest.Manifest,
        target: str,
        capacity: int,
        layers: _Layers,
        stack: ExitStack,
    ) -> None:
        self._session, self._target, self._layers = session, target, layers
        self._chain = kept.chain(backup.id, target)
        layers.add([link.layer for link in self._chain])
        self._readers = [stack.enter_context(npy.Reader(x.contents, extents.CONTENT, x.digest)) for x in self._chain]
        # Written at their places on the disk: what is not written reads as zeroes, which is what the plan leaves out.
        self._memory = os.memfd_create("libvirt-cbt")
        stack.callback(os.close, self._memory)
        self._size = min(-(-capacity // extents.GRAIN) * extents.GRAIN, LARGEST_FILE)
        self._last: Optional[Tuple[int, plan.Shown]] = None

    def shown(self, low: int, high: int) -> plan.Shown:
        if self._last is None or self._last[0] != low:  # the rows of one window may come in several arrays
            self._last = (low, plan.Shown(self._readers, low, high))
        return self._last[1]

    def read(self, shown: plan.Shown, wanted: Mask, low: int, grains: npt.NDArray[np.int64]) -> bytearray:
        """The bytes of the wanted grains (the same, by number) one after another; checked.  Errors: Damaged."""
        wanted_runs = list(shown.runs(wanted))
        data = bytearray(len(grains) * extents.GRAIN)
        if wanted_runs:
            self._fill(wanted_runs)
            for first, count, place in _stretches(grains):
                view = memoryview(data)[place * extents.GRAIN : (place + count) * extents.GRAIN]
                offset = low + first * extents.GRAIN
                while view:  # at the very end of the largest disk the file is shorter, and the rest stays zero
                    got = os.preadv(self._memory, [view], offset)
                    if not got:
                        break
                    view, offset = view[got:], offset + got
        return data

    def _fill(self, stored: List[plan.Run]) -> None:
        used = sorted({run.layer for run in stored})
        number = {layer: place for place, layer in enumerate(used)}

        def damaged(read: check.Read, reason: str) -> None:
            where = f"{reason} at offset {read.offset}, length {read.length}"
            raise errors.Damaged(path=self._chain[used[read.layer]].layer, reason=where)

        os.ftruncate(self._memory, 0)
        os.ftruncate(self._memory, self._size)
        check.check(
            self._target,
            [self._layers.endpoint(self._chain[layer].layer) for layer in used],
            (check.Read(number[r.layer], r.offset, r.length, r.digest, r.keep) for r in stored),
            check.Output("memory", fd=self._memory),
            Options(),
            damaged=damaged,
            progress=lambda _target, _done: None,
            stop=self._session.watch.stop,
        )


def _stretches(grains: npt.NDArray[np.int64]) -> Iterator[Tuple[int, int, int]]:
    """(first, count, place) of numbers that follow one another; `place` counts those before."""
    cuts = np.flatnonzero(np.diff(grains) != 1) + 1
    starts = [0, *cuts.tolist()]
    for begin, end in zip(starts, [*cuts.tolist(), len(grains)]):
        yield int(grains[begin]), end - begin, begin


def sectors(one: bytearray, two: bytearray) -> Mask:
    """Which units of two equally long buffers differ."""
    words = np.frombuffer(one, np.uint64) != np.frombuffer(two, np.uint64)
    found: Mask = words.reshape(-1, UNIT // 8).any(axis=1)
    return found


def runs(differs: Mask, low: int, grains: npt.NDArray[np.int64]) -> extents.Extents:
    """The sectors that differ as ordered, disjoint extents; `grains` are where the sectors lie, from byte `low` on."""
    each = extents.GRAIN // UNIT
    which = np.flatnonzero(differs)
    number = grains[which // each] * each + which % each
    breaks = np.flatnonzero(np.diff(number) != 1) + 1
    first = number[np.append(0, breaks)] if len(number) else number
    last = number[np.append(breaks, len(number)) - 1] if len(number) else number
    return extents.make(first * UNIT + low, (last - first + 1) * UNIT, extents.DATA)


def overlaps(rows: extents.Extents, parts: extents.Extents) -> extents.Extents:
    """What of ordered, disjoint rows lies in ordered, disjoint parts, with the rows' other fields."""
    stop, parts_stop = extents.ends(rows), extents.ends(parts)
    first = np.searchsorted(stop, parts["offset"], side="right")
    counts = np.searchsorted(rows["offset"], parts_stop, side="left") - first
    part = np.repeat(np.arange(len(parts)), counts)
    row = np.arange(len(part)) + np.repeat(first - np.append(0, np.cumsum(counts)[:-1]), counts)
    out: extents.Extents = rows[row]
    out["offset"] = np.maximum(rows["offset"][row], parts["offset"][part])
    out["length"] = np.minimum(stop[row], parts_stop[part]) - out["offset"]
    return out
