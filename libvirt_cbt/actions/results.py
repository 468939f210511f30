"""What the verbs return, and what `--json` prints: sizes in bytes, times ISO 8601 UTC, durations in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List, Optional


@dataclass(frozen=True)
class Init:
    repository: str
    id: str


@dataclass(frozen=True)
class Check:
    name: str
    status: str  # ok, warning, failed
    detail: str


@dataclass(frozen=True)
class DoctorDisk:
    target: str
    protected: bool
    tracked: bool
    reason: Optional[str]


@dataclass(frozen=True)
class Doctor:
    domain: Optional[str]
    checks: List[Check]
    disks: List[DoctorDisk]


@dataclass(frozen=True)
class Quiesced:
    requested: str
    result: str
    frozen_ms: Optional[float]


@dataclass(frozen=True)
class BackupDisk:
    """In a dry run the bytes are estimates and change_id is None."""

    target: str
    mode: str  # full, incremental, mark
    reason: Optional[str]
    base: Optional[int]
    parent: Optional[str]
    capacity: int
    dirty_bytes: int
    data_bytes: int
    zero_bytes: int
    read_bytes: int
    stored_bytes: int
    change_id: Optional[str]


@dataclass(frozen=True)
class Unprotected:
    target: str
    reason: str


@dataclass(frozen=True)
class Extent:
    offset: int
    length: int


@dataclass(frozen=True)
class Audited:
    """What an audit compared; of the extents that differ the first hundred.  Unreadable: the chain is damaged there."""

    target: str
    compared_bytes: int
    differing_bytes: int
    unreadable_bytes: int
    extents: List[Extent]


@dataclass(frozen=True)
class Backup:
    domain: str
    uuid: str
    backup: Optional[str]
    generation: int
    checkpoint: Optional[str]
    quiesce: Quiesced
    disks: List[BackupDisk]
    unprotected: List[Unprotected]
    seconds: float
    warnings: List[str]
    dry_run: bool = False
    audit: Optional[List[Audited]] = None


@dataclass(frozen=True)
class Generation:
    generation: int
    id: str
    kind: str
    time: str
    consistent: bool
    disks: List[BackupDisk]
    unprotected: List[Unprotected] = field(default_factory=list)


@dataclass(frozen=True)
class Listing:
    domain: str
    uuid: str
    generations: List[Generation]


@dataclass(frozen=True)
class StatusDisk:
    target: str
    tracked: bool
    reason: Optional[str]
    dirty_bytes: Optional[int]
    chain: int  # layers


@dataclass(frozen=True)
class Status:
    domain: str
    uuid: str
    state: str
    generation: Optional[int]
    backup: Optional[str]
    time: Optional[str]
    age_seconds: Optional[float]
    disks: List[StatusDisk]


@dataclass(frozen=True)
class RestoredFile:
    target: str
    path: str
    bytes: int


@dataclass(frozen=True)
class Restore:
    domain: str
    backup: str
    generation: int
    files: List[RestoredFile]
    unprotected: List[Unprotected]
    seconds: float


@dataclass(frozen=True)
class Damage:
    backup: str
    target: Optional[str]
    offset: Optional[int]
    length: Optional[int]
    reason: str
    dependents: List[str]


@dataclass(frozen=True)
class Verify:
    domain: str
    checked_bytes: int
    backups: int
    damage: List[Damage]
    seconds: float


@dataclass(frozen=True)
class Recover:
    domain: str
    actions: List[str]
    left: List[str]


@dataclass(frozen=True)
class Untrack:
    domain: str
    removed: List[str]


@dataclass(frozen=True)
class MarkDisk:
    target: str
    dirty_bytes: int
    change_id: str


@dataclass(frozen=True)
class Mark:
    domain: str
    uuid: str
    id: str
    generation: int
    disks: List[MarkDisk]
    unprotected: List[Unprotected]
    seconds: float
    warnings: List[str]


@dataclass(frozen=True)
class OpenDisk:
    """`bitmap` is None for a disk of which everything counts as changed; `context` is its name as a meta context."""

    target: str
    uri: str
    export: str
    bitmap: Optional[str]
    context: Optional[str]
    capacity: int
    dirty_bytes: int
    change_id: str


@dataclass(frozen=True)
class Start:
    domain: str
    uuid: str
    id: str
    generation: int
    socket: str
    quiesce: Quiesced
    disks: List[OpenDisk]
    unprotected: List[Unprotected]
    seconds: float
    warnings: List[str]


@dataclass(frozen=True)
class Stop:
    domain: str
    uuid: str
    id: str
    generation: int
    committed: bool


@dataclass(frozen=True)
class HeatRegion:
    """A stretch of the disk: in how many generations it was written, and the last of them (None: in none)."""

    offset: int
    length: int
    written: int
    last: Optional[int]


@dataclass(frozen=True)
class HeatGeneration:
    """`changed_bytes` for each region, in their order."""

    generation: int
    time: str
    changed_bytes: List[int]


@dataclass(frozen=True)
class Heatmap:
    domain: str
    uuid: str
    target: str
    lineage: str
    since: Optional[int]
    until: int
    capacity: int
    granularity: Optional[int]
    regions: List[HeatRegion]
    generations: List[HeatGeneration]


@dataclass(frozen=True)
class ServedDisk:
    """`bitmap` is None without --since; `context` is its name as a meta context; `granularity` in bytes."""

    target: str
    uri: str
    export: str
    bitmap: Optional[str]
    context: Optional[str]
    capacity: int
    granularity: Optional[int]
    dirty_bytes: Optional[int]


@dataclass(frozen=True)
class Serve:
    """`since` is a generation, 0 for everything, None when it was not asked for."""

    domain: str
    uuid: str
    backup: str
    generation: int
    since: Optional[int]
    sockets: List[str]
    disks: List[ServedDisk]
    unprotected: List[Unprotected]
