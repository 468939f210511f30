"""What policies, timers, hooks and monitoring return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from libvirt_cbt.actions.results.generations import Backup
from libvirt_cbt.actions.results.readings import Verify
from libvirt_cbt.actions.results.upkeep import Prune


@dataclass(frozen=True)
class ConfigFiles:
    """The configuration files that were read, and all that they say."""

    files: List[str]
    repository: str
    values: Dict[str, Any]


@dataclass(frozen=True)
class Configured:
    """Which policy holds for a domain, its rules, and why `run` leaves it out (None: it does not)."""

    domain: str
    uuid: str
    host: str
    policy: Optional[str]
    skipped: Optional[str]
    rules: Dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """Of a `run`: which of its verbs failed (backup, prune, verify), with the error's code, kind and sentence."""

    work: str
    code: int
    kind: str
    message: str


@dataclass(frozen=True)
class Run:
    """What was done for one domain; `code` is that of the first failure, 3 for warnings under a strict policy."""

    domain: str
    uuid: str
    host: str
    policy: Optional[str]
    code: int
    backup: Optional[Backup]
    prune: Optional[Prune]
    verify: Optional[Verify]
    failures: List[Failure]
    seconds: float


@dataclass(frozen=True)
class HooksInstalled:
    """`next` are sentences: what is still to be done."""

    kind: str
    files: List[str]
    spool: str
    next: List[str]


@dataclass(frozen=True)
class HooksRemoved:
    kind: str
    removed: List[str]
    next: List[str]


@dataclass(frozen=True)
class Hook:
    """`kind` is libvirt, vdsm, entry point or script; `state` ok, warning or absent; `events` wait to be looked into."""

    kind: str
    state: str
    detail: str
    files: List[str]
    events: int = 0


@dataclass(frozen=True)
class TimerInstalled:
    """`timer` is the unit to be enabled; `next` are sentences: what is still to be done."""

    timer: str
    files: List[str]
    next: List[str]


@dataclass(frozen=True)
class TimerRemoved:
    """As TimerInstalled; `files` are those that are gone."""

    timer: str
    files: List[str]
    next: List[str]


@dataclass(frozen=True)
class Timer:
    """`state` is ok, warning or absent."""

    timer: str
    state: str
    detail: str
    files: List[str]


@dataclass(frozen=True)
class PastFailure:
    """After it nothing of its kind (backup, audit, prune, verify) went well."""

    work: str
    code: int
    kind: str
    message: str
    time: str


@dataclass(frozen=True)
class DomainHealth:
    """The newest backup that holds data; `unread_seconds` is how long some stored backup was not re-read at most, and
    `unreadable` are sentences about damaged manifests.
    """

    domain: str
    uuid: str
    generation: Optional[int]
    time: Optional[str]
    age_seconds: Optional[float]
    seconds: Optional[float]
    consistent: Optional[bool]
    backups: int
    marks: int
    dirty_bytes: Optional[int]
    stored_bytes: Optional[int]
    unread_seconds: Optional[float]
    damage: int
    failing: List[PastFailure]
    unreadable: List[str]


@dataclass(frozen=True)
class LastRun:
    """How a `run` over some hosts ended; `failed` domains of `domains`, and the hosts that did not answer."""

    hosts: List[str]
    started: str
    ended: str
    code: int
    domains: int
    failed: int
    host_failures: List[str]


@dataclass(frozen=True)
class Problem:
    """`state` is warning, unknown or critical; `domain` None: of the repository or a host."""

    state: str
    domain: Optional[str]
    sentence: str


@dataclass(frozen=True)
class Threshold:
    """A figure with its limits, as monitoring wants them; `unit` s, % or nothing; `low`: alarms are below the limits."""

    name: str
    value: float
    unit: str
    warning: Optional[float]
    critical: Optional[float]
    low: bool = False


@dataclass(frozen=True)
class Checked:
    """`code` is that of monitoring plugins: 0 ok, 1 warning, 2 critical, 3 unknown; the worst problem decides."""

    state: str
    code: int
    domains: List[DomainHealth]
    problems: List[Problem]
    figures: List[Threshold]
    runs: List[LastRun]
    total_bytes: Optional[int]
    free_bytes: Optional[int]


@dataclass(frozen=True)
class Metrics:
    """`text` is in Prometheus' format; `domains` a count."""

    domains: int
    text: str
