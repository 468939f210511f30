"""Which blocks of a disk changed between two generations; the guest may be off and its checkpoints long gone."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Callable, Final, Generator, Iterator, List, Optional, Tuple, Union

from libvirt_cbt import errors, extents, names, points
from libvirt_cbt.actions.session import Session
from libvirt_cbt.repository import changes, store, union

GUARANTEE: Final = "superset by granularity"
EXACT: Final = "exact to the sector"

Compare = Callable[[Iterator[extents.Extents]], Iterator[extents.Extents]]


class Pages(Iterator[extents.Extents]):
    """The answer, once, as arrays of a few thousand rows with fields offset u8, length u8, state u1, generation u8.

    Bytes; state as in libvirt_cbt.extents (DATA, ZERO); ordered, disjoint, no array empty.  Errors: Damaged;
    GenerationUnknown when `until` was taken away before the first.
    """

    def __init__(
        self,
        session: Session,
        kept: store.DomainStore,
        span: changes.Span,
        start: int,
        most: Optional[int],
        compare: Optional[Compare],
    ) -> None:
        # Not a method: its frame would hold this object, and files would stay open until a cycle is collected.
        self._ended: List[Optional[int]] = []
        self._rows = _read(session, _rows(kept, span, start, compare), start, most, self._ended)

    def __next__(self) -> extents.Extents:
        return next(self._rows)

    def close(self) -> None:
        """Lets go of the files before the end."""
        self._rows.close()

    @property
    def next_offset(self) -> Optional[int]:
        """Where to go on, once all pages were taken: `start_offset` of the next call; None when nothing is left."""
        if not self._ended:
            raise ValueError("next_offset is known when the last page was taken")
        return self._ended[0]


def _rows(
    kept: store.DomainStore, span: changes.Span, start: int, compare: Optional[Compare]
) -> Generator[extents.Extents, None, None]:
    pages = union.union(span.sources, start, span.disk.capacity)
    try:
        yield from compare(pages) if compare else pages
    except errors.Damaged:
        if os.path.isdir(kept.directory(span.until.id)):
            raise
        reason = "it was closed or removed meanwhile; ask again"
        raise _unknown(kept, str(span.until.generation), reason) from None


def _read(
    session: Session,
    pages: Generator[extents.Extents, None, None],
    start: int,
    most: Optional[int],
    ended: List[Optional[int]],
) -> Generator[extents.Extents, None, None]:
    left, end = most, start
    with closing(pages):
        for page in pages:
            session.watch.stop()
            rows = page if left is None else page[:left]
            if len(rows):
                end = int(extents.ends(rows[-1:])[0])
                yield rows
            if left is not None:
                left -= len(rows)
                if len(rows) < len(page):
                    ended.append(end)
                    return
    ended.append(None)


def _unknown(kept: store.DomainStore, point: str, reason: str) -> errors.GenerationUnknown:
    return errors.GenerationUnknown(
        domain=names.printable(kept.name), point=point, repository=kept.repository.path, reason=reason
    )


@dataclass(frozen=True)
class Changed:
    """An answer and the facts it holds for; iterating gives `pages`.

    `since` None is everything.  `capacity` and `granularity` in bytes (None: not known), `change_id` names `until` for
    the next question.  `guarantee`: no changed block is missing; an extent may cover more by less than `granularity`.
    It is another of an exact answer: a sector (512 bytes, its `granularity`) is in it if a byte of it differs.
    An extent's `generation` is the one that wrote it last; of everything, when first generations were forgotten, the
    last of those stands for all of them.
    """

    domain: str
    uuid: str
    target: str
    lineage: str
    since: Optional[int]
    until: int
    change_id: str
    capacity: int
    granularity: Optional[int]
    guarantee: str
    pages: Pages = field(repr=False, compare=False)

    def __iter__(self) -> Iterator[extents.Extents]:
        return self.pages


def changed(
    session: Session,
    domain_name: str,
    disk: str,
    *,
    since: Union[str, int],
    until: Union[str, int, None] = None,
    start_offset: int = 0,
    max_results: Optional[int] = None,
    live: bool = False,
    exact: bool = False,
    scratch_dir: Optional[str] = None,
    allow_plaintext: bool = False,
) -> Changed:
    """The blocks of a disk written after generation `since`, up to `until` (None: the newest); libvirt is not asked.

    Both are a generation, a backup id or a change id; `since` may be "*", for all that is allocated at `until`, and
    `until` the generation of an open fleecing point.  The answer begins at byte `start_offset`, inside an extent if it
    must, and has at most `max_results` extents.  With `live` a mark is made first, and is `until` (go on from there by
    its number); `scratch_dir` and `allow_plaintext` are the mark's.  With `exact` both are backups, whose contents are compared: what was
    written with the bytes that were there is left out.
    Errors: NotInRepository, NoSuchDisk; Usage for `since` after `until`, for offsets outside the disk and for what
    cannot be compared; GenerationUnknown, ChangeIdBroken, LineageBroken when the changes are not known; Damaged, also
    while iterating; those of `mark`.
    """
    first = points.since(str(since))
    _require_sense(until, start_offset, max_results, live=live, exact=exact, marking=scratch_dir is not None or allow_plaintext)
    if live:
        kept, last = _marked(session, domain_name, disk, first, scratch_dir, allow_plaintext=allow_plaintext)
    else:
        last = points.Latest() if until is None else points.until(str(until))
        kept = _seen(session.stored(domain_name), last)
    kept.require_some(domain_name)
    asked = changes.span(kept, disk, first, last)
    capacity = asked.disk.capacity
    if not 0 <= start_offset <= capacity:
        raise errors.Usage(reason=f"offset {start_offset} is not on disk '{disk}', which has {capacity} bytes")
    granularity, compare = asked.granularity, None
    if exact:
        from libvirt_cbt.actions import exact as comparing  # other questions need no libnbd

        comparing.require_backups(kept, asked)
        granularity, compare = comparing.UNIT, partial(comparing.differing, session, kept, asked)
    return Changed(
        domain=kept.name,
        uuid=kept.uuid,
        target=asked.disk.target,
        lineage=asked.disk.lineage,
        since=asked.since.generation if asked.since else None,
        until=asked.until.generation,
        change_id=asked.disk.change_id,
        capacity=capacity,
        granularity=granularity,
        guarantee=EXACT if exact else GUARANTEE,
        pages=Pages(session, kept, asked, start_offset, max_results, compare),
    )


def _require_sense(
    until: Union[str, int, None],
    start: int,
    most: Optional[int],
    *,
    live: bool,
    exact: bool,
    marking: bool,
) -> None:
    """Before anything is marked.  Errors: Usage."""
    reason = ""
    if live and until is not None:
        reason = "--live answers up to the mark that it makes; leave --until out"
    elif live and exact:
        reason = "--exact compares two backups, and --live ends at a mark; run a backup and ask until that"
    elif marking and not live:
        reason = "--scratch-dir and --allow-plaintext are for the mark that --live makes; give it, too, or neither"
    elif start < 0:
        reason = f"offset {start} is not on the disk; offsets begin at 0"
    elif most is not None and most < 1:
        reason = f"at most {most} results make no answer; give 1 or more"
    if reason:
        raise errors.Usage(reason=reason)


def _seen(kept: store.DomainStore, until: points.Point) -> store.DomainStore:
    """With the open fleecing point, if there is one and `until` may name it."""
    if isinstance(until, points.Latest):
        return kept
    try:
        return kept.with_open_point()
    except errors.Damaged:
        # Published or given up while it was read, and then nothing is damaged?
        again = kept.repository.domain(kept.uuid)
        if again.open_point():
            raise
        return again


def _marked(
    session: Session,
    domain_name: str,
    disk: str,
    since: points.Point,
    scratch_dir: Optional[str],
    *,
    allow_plaintext: bool,
) -> Tuple[store.DomainStore, points.Point]:
    from libvirt_cbt.actions.mark import mark  # a question to the repository alone needs no libvirt

    uuid = session.host.find(domain_name)
    if not isinstance(since, points.Beginning):
        # What cannot be answered now cannot be either after a mark: it is not made then.
        kept = session.repository().domain(uuid)
        kept.require_some(domain_name)
        changes.span(kept, disk, since, points.Latest())
    made = mark(session, uuid, scratch_dir=scratch_dir, allow_plaintext=allow_plaintext)
    for warning in made.warnings:
        session.watch.note(warning)
    return session.repository().domain(uuid), points.Generation(made.generation)
