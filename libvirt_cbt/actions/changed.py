"""Which blocks of a disk changed between two generations; the guest may be off and its checkpoints long gone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Generator, Iterator, List, Optional, Union

from libvirt_cbt import errors, extents, points
from libvirt_cbt.actions.session import Session
from libvirt_cbt.repository import changes, union

GUARANTEE: Final = "superset by granularity"


class Pages(Iterator[extents.Extents]):
    """The answer, once, as arrays of a few thousand rows with fields offset u8, length u8, state u1, generation u8.

    Bytes; state as in libvirt_cbt.extents (DATA, ZERO); ordered, disjoint, no array empty.  Errors: Damaged.
    """

    def __init__(self, session: Session, span: changes.Span, start: int, most: Optional[int]) -> None:
        # Not a method: its frame would hold this object, and files would stay open until a cycle is collected.
        self._ended: List[Optional[int]] = []
        self._rows = _read(session, span, start, most, self._ended)

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


def _read(
    session: Session, span: changes.Span, start: int, most: Optional[int], ended: List[Optional[int]]
) -> Generator[extents.Extents, None, None]:
    left, end = most, start
    for page in union.union(span.sources, start, span.disk.capacity):
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


@dataclass(frozen=True)
class Changed:
    """An answer and the facts it holds for; iterating gives `pages`.

    `since` None is everything.  `capacity` and `granularity` in bytes (None: not known), `change_id` names `until` for
    the next question.  `guarantee`: no changed block is missing; an extent may cover more by less than `granularity`.
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
    until: Union[str, int] = "latest",
    start_offset: int = 0,
    max_results: Optional[int] = None,
) -> Changed:
    """The blocks of a disk written after generation `since`, up to `until`; libvirt is not asked.

    Both are a generation, a backup id or a change id; `since` may be "*", for all that is allocated at `until`.  The
    answer begins at byte `start_offset`, inside an extent if it must, and has at most `max_results` extents.
    Errors: NotInRepository, NoSuchDisk; Usage for `since` after `until` and for offsets outside the disk;
    GenerationUnknown, ChangeIdBroken, LineageBroken when the changes are not known; Damaged, also while iterating.
    """
    kept = session.stored(domain_name)
    asked = changes.span(kept, disk, points.since(str(since)), points.until(str(until)))
    capacity = asked.disk.capacity
    if not 0 <= start_offset <= capacity:
        raise errors.Usage(reason=f"offset {start_offset} is not on disk '{disk}', which has {capacity} bytes")
    if max_results is not None and max_results < 1:
        raise errors.Usage(reason=f"at most {max_results} results make no answer; give 1 or more")
    return Changed(
        domain=kept.name,
        uuid=kept.uuid,
        target=asked.disk.target,
        lineage=asked.disk.lineage,
        since=asked.since.generation if asked.since else None,
        until=asked.until.generation,
        change_id=asked.disk.change_id,
        capacity=capacity,
        granularity=asked.granularity,
        guarantee=GUARANTEE,
        pages=Pages(session, asked, start_offset, max_results),
    )
