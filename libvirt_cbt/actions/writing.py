"""One disk of a backup written somewhere, every stored byte against its digest."""

from __future__ import annotations

import dataclasses
import heapq
from contextlib import ExitStack
from typing import Iterable, Iterator, List, Optional, Sequence, Tuple, cast

from libvirt_cbt import errors, places
from libvirt_cbt.actions import results, salvaging
from libvirt_cbt.actions.session import Session
from libvirt_cbt.nbdio import check, server
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import manifest, npy, plan, store

ZEROES = 64 << 20  # bytes that are zeroed by one request


def write(
    session: Session,
    kept: store.DomainStore,
    generation: manifest.Manifest,
    disk: manifest.ManifestDisk,
    output: check.Output,
    options: Options,
    *,
    ordered: bool = False,
    salvaged: Optional[List[results.Lost]] = None,
) -> None:
    """Everything that `disk` held goes to `output`; zeroes are written only where that holds something old.

    With a list as `salvaged` damaged runs are added to it and become zeroes.  `ordered`: the pieces come by ascending
    offset, one at a time.  Errors: Damaged naming the layer, NbdError, OutputFailed.
    """

    def damaged(read: check.Read, reason: str) -> None:
        layer = good[read.layer]
        if salvaged is None:
            where = f"{reason} at offset {read.offset}, length {read.length}"
            raise errors.Damaged(path=layer.path, reason=where)
        lost.extend(results.Lost(disk.target, o, n, layer.backup, reason) for o, n in read.keep)

    lost: List[results.Lost] = []
    with ExitStack() as stack:
        everything = salvaging.layers(stack, kept, generation, disk, salvage=salvaged is not None)
        session.watch.stop()
        # What newer layers hide is not read: a little less than this.
        expected = min(disk.capacity, sum(layer.data_bytes for layer in everything))
        run_dir = stack.enter_context(places.temporary())
        good = [layer for layer in everything if layer.broken is None]
        endpoints = stack.enter_context(server.layers([layer.path for layer in good], run_dir)) if good else []
        number = {layer.backup: at for at, layer in enumerate(good)}
        readers = cast("Sequence[npy.Reader]", [layer.contents for layer in everything])
        runs: Iterable[plan.Run] = plan.restore(readers, disk.capacity)

        def reads() -> Iterator[check.Read]:
            for run in _with_gaps(runs, disk.capacity) if output.old else _in_order(runs) if ordered else runs:
                session.watch.stop()
                if run.layer == check.ZEROES:
                    yield check.Read(check.ZEROES, run.offset, run.length, b"", run.keep)
                    continue
                layer = everything[run.layer]
                if layer.broken is None:
                    yield check.Read(number[layer.backup], run.offset, run.length, run.digest, run.keep)
                    continue
                lost.extend(results.Lost(disk.target, o, n, layer.backup, layer.broken) for o, n in run.keep)
                if output.old:
                    yield check.Read(check.ZEROES, run.offset, run.length, b"", run.keep)

        check.check(
            disk.target,
            endpoints,
            reads(),
            output,
            Options(requests=1, stall_seconds=options.stall_seconds) if ordered else options,
            damaged=damaged,
            progress=lambda target, done: session.watch.progress(target, done, max(expected, done)),
            stop=session.watch.stop,
        )
    if salvaged is not None:
        salvaged += _joined(lost)


def _joined(found: List[results.Lost]) -> List[results.Lost]:
    """In order; neighbours of one cause are one."""
    joined: List[results.Lost] = []
    for one in sorted(found, key=lambda lost: lost.offset):
        last = joined[-1] if joined else None
        if last and last.offset + last.length == one.offset and (last.backup, last.reason) == (one.backup, one.reason):
            joined[-1] = dataclasses.replace(last, length=last.length + one.length)
        else:
            joined.append(one)
    return joined


def _in_order(runs: Iterable[plan.Run]) -> Iterator[plan.Run]:
    """Each piece by itself, ascending.  Runs come by the offset of their first piece, and a run is 1 MiB at most, so
    few wait here; one that newer data splits is read once for each of its pieces.
    """
    waiting: List[Tuple[int, int, plan.Run]] = []
    for count, run in enumerate(runs):
        for offset, length in run.keep:
            heapq.heappush(waiting, (offset, count, dataclasses.replace(run, keep=((offset, length),))))
        while waiting and waiting[0][0] <= run.keep[0][0]:
            yield heapq.heappop(waiting)[2]
    while waiting:
        yield heapq.heappop(waiting)[2]


def _with_gaps(runs: Iterable[plan.Run], capacity: int) -> Iterator[plan.Run]:
    """The pieces in order, and what lies between them as runs of zeroes."""
    at = 0
    for run in _in_order(runs):
        [(offset, length)] = run.keep
        yield from _zeroes(at, offset)
        yield run
        at = offset + length
    yield from _zeroes(at, capacity)


def _zeroes(low: int, high: int) -> Iterator[plan.Run]:
    for offset in range(low, high, ZEROES):
        length = min(ZEROES, high - offset)
        yield plan.Run(check.ZEROES, offset, length, b"", ((offset, length),))
