"""When each backup was re-read last: REPO/<domain-uuid>/checked.json, a note that nothing depends on.

`verified` says when a whole domain was; this says it of each backup, so that a few of them at a time come round.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Dict, Final, List, Mapping, Optional

from pydantic import Field

from libvirt_cbt import durable, errors
from libvirt_cbt.repository.manifest import Bytes, Hex16, Manifest, Model, Sealed, Uuid
from libvirt_cbt.repository.store import DomainStore

FILE: Final = "checked.json"
NEVER: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)


class Reading(Model):
    """`damage` is a count."""

    time: str = Field(max_length=40)
    damage: Bytes


class Checked(Sealed):
    repository: Hex16
    domain: Uuid
    readings: Dict[Hex16, Reading]


@dataclass(frozen=True)
class State:
    """Of one backup: when it was re-read last (None: never since it was made or changed), and how much was damaged."""

    backup: str
    made: datetime
    time: Optional[datetime]
    damage: int

    @property
    def since(self) -> datetime:
        """From when on nobody has looked."""
        return self.time or self.made


def states(kept: DomainStore) -> List[State]:
    """Every backup that holds data, ascending.  Errors: Damaged for the note, and those of the generations."""
    found = _read(kept)
    return [_state(kept, m, found.get(m.id)) for m in kept.generations() if m.kind != "mark"]


def longest_unread(kept: DomainStore, others: int) -> List[str]:
    """The newest backup, and so many others: those first at which nobody has looked for longest."""
    try:
        ordered = states(kept)
    except errors.Damaged:
        ordered = [State(m.id, NEVER, None, 0) for m in kept.generations() if m.kind != "mark"]
    rest = sorted(ordered[:-1], key=lambda one: one.time or NEVER)
    return [one.backup for one in (*ordered[-1:], *rest[:others])]


def record(kept: DomainStore, damage: Mapping[str, int]) -> Optional[str]:
    """Notes that backups were re-read just now, with the count of what was damaged; why it could not, or None."""
    try:
        readings = _read(kept)
    except errors.CbtError:
        readings = {}
    time = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    readings.update({backup: Reading(time=time, damage=count) for backup, count in damage.items()})
    there = {backup: reading for backup, reading in readings.items() if backup in kept.ids()}
    if not there:
        return None
    path = os.path.join(kept.path, FILE)
    try:
        durable.replace(path, Checked(repository=kept.repository.id, domain=kept.uuid, readings=there).dump())
    except OSError as e:
        return f"{path}: {e.strerror}; what was re-read is not noted"
    return None


def _read(kept: DomainStore) -> Dict[str, Reading]:
    path = os.path.join(kept.path, FILE)
    with durable.explained(kept.repository.path, path):
        try:
            found = Checked.load(path)
        except FileNotFoundError:
            return {}
    if (found.repository, found.domain) != (kept.repository.id, kept.uuid):
        raise errors.Damaged(path=path, reason="it belongs to another domain or repository")
    return dict(found.readings)


def _state(kept: DomainStore, made: Manifest, reading: Optional[Reading]) -> State:
    time = moment(reading.time) if reading else None
    try:
        # A prune that gave it a neighbour's runs wrote this, and somebody's copy of it was not looked at either.
        changed = datetime.fromtimestamp(os.lstat(os.path.join(kept.directory(made.id), "layers.json")).st_mtime, timezone.utc)
    except OSError:
        changed = None
    if time and changed and changed > time:
        time = None
    return State(made.id, moment(made.frozen_at) or NEVER, time, reading.damage if reading else 0)


def moment(text: str) -> Optional[datetime]:
    """A time of the documents; None for what is none."""
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return found.astimezone(timezone.utc) if found.tzinfo else found.replace(tzinfo=timezone.utc)
