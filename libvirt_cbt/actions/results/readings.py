"""What reads backups returns: restore, boot, serve, verify, heatmap."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List, Optional

from libvirt_cbt.actions.results.generations import Unprotected


@dataclass(frozen=True)
class RestoredFile:
    target: str
    path: str
    bytes: int


@dataclass(frozen=True)
class Lost:
    """A stretch of a restored disk that was left as zeroes, and the backup whose layer is damaged there."""

    target: str
    offset: int
    length: int
    backup: str
    reason: str


@dataclass(frozen=True)
class Defined:
    name: str
    uuid: str
    started: bool
    nvram: Optional[str]


@dataclass(frozen=True)
class Restore:
    """`damage` is empty unless damaged data was to be salvaged; `defined` is the domain that was made of the images."""

    domain: str
    backup: str
    generation: int
    files: List[RestoredFile]
    unprotected: List[Unprotected]
    seconds: float
    damage: List[Lost] = field(default_factory=list)
    defined: Optional[Defined] = None
    warnings: List[str] = field(default_factory=list)


@dataclass(frozen=True)
class BootedDisk:
    target: str
    overlay: str
    capacity: int


@dataclass(frozen=True)
class Boot:
    """`seconds` until it ran; `agent_seconds` until its agent answered, None when it did not or none was waited for."""

    domain: str
    backup: str
    generation: int
    name: str
    uuid: str
    folder: str
    disks: List[BootedDisk]
    seconds: float
    agent_seconds: Optional[float]
    warnings: List[str]


@dataclass(frozen=True)
class Discard:
    name: str
    removed: List[str]


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
