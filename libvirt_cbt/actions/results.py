"""What the verbs return, and what `--json` prints: sizes in bytes, times ISO 8601 UTC, durations in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional


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
