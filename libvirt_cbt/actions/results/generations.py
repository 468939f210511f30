"""What makes, lists and opens generations returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List, Optional


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
class Healed:
    """A layer that was damaged.  What the guest holds of it is in the new backup; mended: it is whole itself, too, or `left`
    says why not.  Lost: bytes of it that the newest backup before showed.
    """

    target: str
    backup: str
    lost_bytes: int
    reason: str
    mended: bool
    left: Optional[str]


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
    healed: List[Healed] = field(default_factory=list)


@dataclass(frozen=True)
class Generation:
    generation: int
    id: str
    kind: str
    time: str
    consistent: bool
    disks: List[BackupDisk]
    unprotected: List[Unprotected] = field(default_factory=list)
    protected: bool = False  # from prune


@dataclass(frozen=True)
class Unreadable:
    """A generation whose manifest is damaged: which one it is its directory's name alone tells."""

    id: Optional[str]
    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    domain: str
    uuid: str
    generations: List[Generation]
    unreadable: List[Unreadable] = field(default_factory=list)


@dataclass(frozen=True)
class StatusDisk:
    target: str
    tracked: bool
    reason: Optional[str]
    dirty_bytes: Optional[int]
    chain: int  # layers


@dataclass(frozen=True)
class OpenPoint:
    """A fleecing point that `start` opened; not `alive`: its job has ended, and `stop` gives it up."""

    id: str
    generation: int
    since: str
    socket: str
    alive: bool


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
    open_point: Optional[OpenPoint] = None
    doubt: Optional[str] = None  # a sentence, after a crash or a revert
    unreadable: List[str] = field(default_factory=list)  # sentences about damaged manifests


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
    warnings: List[str] = field(default_factory=list)
