"""What a report is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional

from libvirt_cbt.actions.results.generations import BackupDisk, Quiesced, Unprotected
from libvirt_cbt.actions.results.readings import Heatmap


@dataclass(frozen=True)
class LastVerify:
    """The last verification of a whole domain; `newest` is the newest generation that it has seen."""

    time: str
    age_seconds: Optional[float]
    newest: int
    backups: int
    checked_bytes: int
    damage: int


@dataclass(frozen=True)
class ReportGeneration:
    """As it is now: `data` tells a backup from a mark; `held_bytes` is what its files take on disk."""

    generation: int
    id: str
    kind: str
    time: str
    seconds: Optional[float]
    data: bool
    protected: bool
    consistent: bool
    quiesce: Quiesced
    dirty_bytes: int
    stored_bytes: int
    held_bytes: int
    disks: List[BackupDisk]
    unprotected: List[Unprotected]
    warnings: List[str]


@dataclass(frozen=True)
class ReportDisk:
    """`since` is the oldest generation from which changes are known; what damage hides is None."""

    target: str
    capacity: int
    lineage: str
    since: Optional[int]
    granularity: Optional[int]
    chain: Optional[int]  # layers
    heatmap: Optional[Heatmap]


@dataclass(frozen=True)
class ReportDay:
    day: str
    backups: int
    marks: int


@dataclass(frozen=True)
class ReportDomain:
    """`oldest`, `newest` and the age are of backups that hold data; `attention` are sentences."""

    domain: str
    uuid: str
    unreadable: Optional[str]
    backups: int
    marks: int
    held_bytes: int
    oldest: Optional[str]
    newest: Optional[str]
    age_seconds: Optional[float]
    usual_gap_seconds: Optional[float]
    verified: Optional[LastVerify]
    attention: List[str]
    disks: List[ReportDisk]
    days: List[ReportDay]
    generations: List[ReportGeneration]


@dataclass(frozen=True)
class Report:
    """`total_bytes` and `free_bytes` are of the file system that the repository lies on."""

    repository: str
    id: str
    time: str
    total_bytes: int
    free_bytes: int
    domains: List[ReportDomain]
