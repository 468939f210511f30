"""What looks after a repository, a host and a domain's tracking returns."""

from __future__ import annotations

from dataclasses import dataclass
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
class Recover:
    """`waiting` counts what hooks have noted and could not be looked into yet."""

    domain: str
    actions: List[str]
    left: List[str]
    waiting: int = 0


@dataclass(frozen=True)
class Untrack:
    domain: str
    removed: List[str]


@dataclass(frozen=True)
class Kept:
    """`reasons` are the rules that keep it."""

    generation: int
    id: str
    reasons: List[str]


@dataclass(frozen=True)
class Removed:
    generation: int
    id: str


@dataclass(frozen=True)
class Merged:
    """A removed backup's disk that became one with a newer backup's; bytes of data written, in a dry run at most."""

    target: str
    backup: str
    into: str
    written_bytes: int


@dataclass(frozen=True)
class Skipped:
    """What could not be done, with the error's sentence, kind and exit code; `target` None: a generation to forget."""

    backup: str
    target: Optional[str]
    reason: str
    kind: str
    code: int


@dataclass(frozen=True)
class Prune:
    domain: str
    uuid: str
    kept: List[Kept]
    removed: List[Removed]
    merged: List[Merged]
    forgotten: List[str]
    skipped: List[Skipped]
    freed_bytes: int
    seconds: float
    dry_run: bool = False


@dataclass(frozen=True)
class Protection:
    domain: str
    backup: str
    generation: int
    protected: bool
