"""What a repository must hold, known without it: bytes and writes of each generation, and where tracking had to break.

A `Chronicle` is told of all that happens to the guest's disks.  A `Moment` is taken before each run that may publish a
generation; if one appears, it holds that moment's bytes, and what happened since the one before is its delta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Final, List, Mapping, Optional, Set, Tuple

import numpy as np

SECTOR: Final = 512
# Whether tracking has to go on over what happened, has to break, or may do either.
SAME, NEW, EITHER = "same", "new", "either"
MENDED: Final = "mended"  # an event: what broke may be whole again


class Complaint(Exception):
    """Something that must not be; `kind` is the sentence without what differs from run to run."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


def require(holds: object, kind: str, detail: object = "") -> None:
    """Errors: Complaint."""
    if not holds:
        raise Complaint(kind, str(detail))


class Written:
    """Sectors of one disk that were written since some moment; `sure` must be told of, `possible` may be, too."""

    def __init__(self) -> None:
        self.sure = np.zeros(0, bool)
        self.possible = np.zeros(0, bool)

    def add(self, offset: int, length: int, low: int, high: int) -> None:
        """A request for `length` bytes at `offset` that changed [low, high) of them."""
        end = -(-(offset + length) // SECTOR)
        self.reach(end)
        self.possible[offset // SECTOR : end] = True
        self.sure[low // SECTOR : -(-high // SECTOR)] = True

    def reach(self, sectors: int) -> None:
        """Disks grow."""
        if len(self.sure) < sectors:
            self.sure = np.pad(self.sure, (0, sectors - len(self.sure)))
            self.possible = np.pad(self.possible, (0, sectors - len(self.possible)))

    def join(self, other: Written) -> None:
        self.reach(len(other.sure))
        self.sure[: len(other.sure)] |= other.sure
        self.possible[: len(other.possible)] |= other.possible


def united(several: List[Written]) -> Written:
    found = Written()
    for one in several:
        found.join(one)
    return found


@dataclass(frozen=True)
class View:
    """One disk at some moment: `key` stays the same wherever it is plugged in; `tracked` if it can hold a bitmap.

    `images`: its own and those below it, from the top.
    """

    key: str
    held: bytes
    tracked: bool
    images: Tuple[str, ...]


class Stretch:
    """What happened to each disk, by key, between two moments."""

    def __init__(self) -> None:
        self.written: Dict[str, Written] = {}
        self.events: Dict[str, List[str]] = {}  # of tracking: NEW, EITHER or MENDED, in their order
        self.shrunk: Set[str] = set()

    def write(self, key: str, offset: int, length: int, low: int, high: int) -> None:
        self.written.setdefault(key, Written()).add(offset, length, low, high)

    def event(self, key: str, what: str) -> None:
        self.events.setdefault(key, []).append(what)

    def then(self, later: Stretch) -> Stretch:
        """Both, one after the other."""
        both = Stretch()
        for one in (self, later):
            for key, written in one.written.items():
                both.written.setdefault(key, Written()).join(written)
            for key, events in one.events.items():
                both.events.setdefault(key, []).extend(events)
            both.shrunk |= one.shrunk
        return both

    def tracking(self, key: str) -> str:
        state = SAME
        for event in self.events.get(key, []):
            if event == MENDED:
                state = EITHER if state == NEW else state
            elif state != NEW:
                state = event
        return state


@dataclass(frozen=True)
class Moment:
    """The guest's disks by target at one moment; `place` is that moment in its chronicle."""

    disks: Dict[str, View]
    place: int


@dataclass(frozen=True)
class Point:
    """A fleecing point that was opened; in doubt when a run was killed that opened or closed it."""

    moment: Moment
    id: str
    doubtful: bool = False


@dataclass
class Made:
    """A published generation.  `layered`: the disks whose bytes it holds; `lineage` as the tool told it."""

    number: int
    id: str
    disks: Dict[str, View]
    written: Dict[str, Written]
    lineage: Dict[str, str]
    layered: Set[str]
    protected: bool = False


class Chronicle:
    """All that one repository knows of one guest, and what has happened since its newest generation."""

    def __init__(self, name: str, repository: str) -> None:
        self.name, self.repository = name, repository
        self.made: List[Made] = []
        self.point: Optional[Point] = None
        self.firsts: Dict[str, str] = {}  # of each lineage the generation that it began with
        self.killed = False  # a run was, and none has put things right since
        self.strays = 0  # checkpoints at most that the repository does not know, since an older copy was put back
        self._stretches = [Stretch()]
        self._place = 0  # of the first of them

    # What happens to the guest

    def write(self, key: str, offset: int, length: int, low: int, high: int) -> None:
        self._stretches[-1].write(key, offset, length, low, high)

    def broke(self, key: str, how: str = NEW) -> None:
        self._stretches[-1].event(key, how)

    def shrank(self, key: str, size: int) -> None:
        """Tracking ends when it is smaller than in the newest generation, which a killed run may have made unseen."""
        known = self.made[-1].disks.values() if self.made else ()
        smaller = any(view.key == key and size < len(view.held) for view in known)
        self.broke(key, NEW if smaller else EITHER)
        self._stretches[-1].shrunk.add(key)

    def may_grow(self, key: str) -> bool:
        """One that shrank and grew back between two generations is beyond what any bitmap tells, as the documents say."""
        return all(key not in stretch.shrunk for stretch in self._stretches)

    def moment(self, disks: Mapping[str, View]) -> Moment:
        """Now: a run that begins may make it a generation."""
        self._stretches.append(Stretch())
        return Moment(dict(disks), self._place + len(self._stretches) - 1)

    def until(self, moment: Moment) -> Stretch:
        """What happened between the newest generation and a moment."""
        found = Stretch()
        for stretch in self._stretches[: moment.place - self._place]:
            found = found.then(stretch)
        return found

    # What the tool does

    def publish(self, moment: Moment, row: Mapping[str, Any]) -> Made:
        """A generation of that moment has appeared; `row` is how the tool lists it."""
        newest = self.made[-1] if self.made else None
        before = self.until(moment)
        lineage = {d["target"]: lineage_of(d["change_id"]) for d in row["disks"]}
        require(set(lineage) <= set(moment.disks), "a generation has a disk that the guest has not", row)
        require(row["generation"] == (newest.number + 1 if newest else 1), "a generation has the wrong number", row)
        for disk in row["disks"]:
            view = moment.disks[disk["target"]]
            self._tracked(view, before.tracking(view.key), newest, disk, lineage[disk["target"]])
        made = Made(
            number=row["generation"],
            id=row["id"],
            disks={target: moment.disks[target] for target in lineage},
            written={target: before.written.get(moment.disks[target].key, Written()) for target in lineage},
            lineage=lineage,
            layered=layered(row),
        )
        for one in lineage.values():
            self.firsts.setdefault(one, made.id)
        self.made.append(made)
        self._stretches = self._stretches[moment.place - self._place :]
        self._place = moment.place
        return made

    def _tracked(
        self, view: View, expected: str, newest: Optional[Made], disk: Mapping[str, Any], lineage: str
    ) -> None:
        """Errors: Complaint when tracking goes on, or does not, against what is `expected`."""
        was = newest.disks.get(disk["target"]) if newest else None
        before = newest.lineage.get(disk["target"]) if newest else None
        if was is None or not view.tracked or was.key != view.key:
            expected = NEW
        elif expected == SAME and not self._seen(view, disk["target"], before):
            expected = EITHER  # may it be a copy of another disk?
        shown = f"{self.name} {disk}"
        if lineage == before:
            require(expected != NEW, "tracking goes on although it broke", shown)
            return
        require(expected != SAME, "a new lineage for no good reason", shown)
        require(lineage not in {one for made in self.made for one in made.lineage.values()}, "a lineage again", shown)
        require(disk["reason"], "a new lineage without a reason", shown)

    def _seen(self, view: View, target: str, lineage: Optional[str]) -> bool:
        """Whether a generation of the lineage had this image, or one that lies below it now."""
        before = [made.disks[target] for made in self.made if made.lineage.get(target) == lineage]
        return any(one.images[0] in view.images for one in before)

    def find(self, number: int) -> Optional[Made]:
        return next((made for made in self.made if made.number == number), None)


def lineage_of(change_id: str) -> str:
    return change_id.split(":", 1)[1].split("/", 1)[0]


def layered(row: Mapping[str, Any]) -> Set[str]:
    """The disks whose bytes a listed generation holds."""
    return {disk["target"] for disk in row["disks"] if disk["mode"] != "mark"}
