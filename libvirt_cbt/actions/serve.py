"""Shows a backup over NBD, read-only, with what changed since an older generation; needs neither libvirt nor the domain."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Callable, Collection, Iterator, Optional, Sequence, Union

from libvirt_cbt import errors, extents, points
from libvirt_cbt.actions import reading, results, telling
from libvirt_cbt.actions.session import Session
from libvirt_cbt.nbdio import serving
from libvirt_cbt.repository import changes, manifest, pins, store, union


class Served:
    """A server that is ready, for as long as the `with` block lasts; `result` says where."""

    def __init__(self, session: Session, result: results.Serve, server: serving.Serving) -> None:
        self.result = result
        self._session, self._server = session, server

    def wait(self, stop: Optional[Callable[[], None]] = None) -> None:
        """Until `stop` (or else the session's watch), asked five times a second, raises.

        Errors: ToolFailed when the server ends by itself.
        """
        self._server.wait(stop or self._session.watch.stop)


@contextmanager
def serve(
    session: Session,
    domain_name: str,
    socket: str,
    *,
    at: Union[str, int] = "latest",
    since: Union[str, int, None] = None,
    disks: Collection[str] = (),
) -> Iterator[Served]:
    """Serves every disk that the generation has data of, or `disks`, on the unix socket `socket`, each as an export
    that is called as its target.  A context manager: the socket, of mode 0600, is there in between, for any number of
    clients.

    With `since` every export has the meta context qemu:dirty-bitmap:since-N, where N is that generation's number: a
    block is dirty if it was written after it, up to `at`.  `since` may be "*" (N is 0) for all that is allocated.
    The layers are read by QEMU as they are, and no digest is compared on the way: `verify` comes first where that
    matters.
    Errors: NotInRepository, NoSuchBackup, NoSuchDisk; Usage for `since` after `at`; GenerationUnknown, ChangeIdBroken,
    LineageBroken when the changes are not known; OutputFailed when the socket cannot be made or the path is taken;
    Damaged, ToolFailed.
    """
    kept = session.stored(domain_name)
    generation = reading.with_data(kept, points.at(str(at)))
    chosen = reading.chosen(kept, generation, disks)
    base = None if since is None else points.since(str(since))
    if base is not None:
        _require_older(kept, base, generation)
    spans = [_span(kept, base, generation, disk) for disk in chosen]
    path = os.path.abspath(socket)
    with pins.reading(kept, generation.id, [disk.target for disk in chosen], session.watch.stop):
        exports = [_export(session, kept, generation, disk, span) for disk, span in zip(chosen, spans)]
        with serving.serving(exports, path, session.watch.stop) as server:
            yield Served(session, _result(kept, generation, spans, path, server), server)


def _span(
    kept: store.DomainStore, since: Optional[points.Point], at: manifest.Manifest, disk: manifest.ManifestDisk
) -> Optional[changes.Span]:
    if since is None:
        return None
    return changes.span(kept, disk.target, since, points.Generation(at.generation))


def _number(span: changes.Span) -> int:
    return span.since.generation if span.since else 0


def _require_older(kept: store.DomainStore, since: points.Point, at: manifest.Manifest) -> None:
    try:
        first = 0 if isinstance(since, points.Beginning) else kept.resolve(since).generation
    except errors.NoSuchBackup:
        return  # changes.span says what is known of it
    if first > at.generation:
        reason = f"--since {first} is after --at {at.generation}; changes are from older to newer"
        raise errors.Usage(reason=reason)


def _export(
    session: Session,
    kept: store.DomainStore,
    generation: manifest.Manifest,
    disk: manifest.ManifestDisk,
    span: Optional[changes.Span],
) -> serving.Export:
    layers = [link.layer for link in kept.chain(generation.id, disk.target)]
    for layer in layers:
        if not os.path.isfile(layer):
            raise errors.Damaged(path=layer, reason="the layer is missing")
    if span is None:
        return serving.Export(disk.target, layers, disk.capacity)
    sources = span.sources

    def delta() -> Iterator[extents.Extents]:
        # A bitmap knows no states: neighbours of any are one.
        for page in union.joined(union.union(sources, 0, disk.capacity)):
            session.watch.stop()
            yield page

    return serving.Export(disk.target, layers, disk.capacity, f"since-{_number(span)}", delta)


def _result(
    kept: store.DomainStore,
    generation: manifest.Manifest,
    spans: Sequence[Optional[changes.Span]],
    path: str,
    server: serving.Serving,
) -> results.Serve:
    disks = [
        results.ServedDisk(
            target=shown.export.name,
            uri=shown.uri,
            export=shown.export.name,
            bitmap=shown.export.bitmap,
            context=shown.export.context,
            capacity=shown.export.capacity,
            granularity=shown.granularity,
            dirty_bytes=shown.dirty_bytes,
        )
        for shown in server.shown
    ]
    return results.Serve(
        domain=kept.name,
        uuid=kept.uuid,
        backup=generation.id,
        generation=generation.generation,
        since=next((_number(span) for span in spans if span), None),
        sockets=[path],
        disks=disks,
        unprotected=telling.unprotected(generation.unprotected),
    )
