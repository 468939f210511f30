"""How the backups fare, as Prometheus reads it; the names and what they mean are in docs/automation.md."""

from __future__ import annotations

import os
import secrets
import stat
from typing import Any, Dict, Final, Optional, Tuple

from libvirt_cbt import errors
from libvirt_cbt.actions import health, results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.repository import checked

PREFIX: Final = "libvirt_cbt_"
BEGIN: Final = f"# HELP {PREFIX}".encode()  # of every file that was written here
WORK: Final = ("backup", "audit", "prune", "verify")
DOMAIN: Final = ("domain", "uuid")
# Name, what it is (units: bytes, seconds, times in seconds since 1970), labels.
GAUGES: Final[Dict[str, Tuple[str, Tuple[str, ...]]]] = {
    "backup_last_success_timestamp_seconds": ("When the newest backup was taken", DOMAIN),
    "backup_last_duration_seconds": ("How long the newest backup took", DOMAIN),
    "backup_last_changed_bytes": ("What the guest had written since the one before", DOMAIN),
    "backup_last_stored_bytes": ("What the newest backup took in the repository when it was made", DOMAIN),
    "backup_last_consistent": ("1 if the guest was frozen by its agent for the newest backup", DOMAIN),
    "backup_generation": ("Number of the newest backup's generation", DOMAIN),
    "backups": ("Backups that hold data", DOMAIN),
    "marks": ("Generations without data", DOMAIN),
    "unread_seconds": ("How long some stored backup was not re-read at most", DOMAIN),
    "damaged": ("Stretches of stored backups that were found damaged when they were re-read last", DOMAIN),
    "unreadable": ("1 if some of what the repository holds of the domain cannot be read", DOMAIN),
    "failing": ("1 if after the last failure nothing of its kind went well", (*DOMAIN, "work")),
    "last_failure_timestamp_seconds": ("When that failure was", (*DOMAIN, "work")),
    "last_failure_code": ("Its exit code", (*DOMAIN, "work")),
    "repository_size_bytes": ("Size of the repository's file system", ()),
    "repository_free_bytes": ("What is free of it", ()),
    "run_last_timestamp_seconds": ("When the last run over some hosts ended", ("hosts",)),
    "run_last_code": ("Its exit code", ("hosts",)),
    "run_last_domains": ("Domains that it was for", ("hosts",)),
    "run_last_failed": ("Domains of these that failed", ("hosts",)),
}


def metrics(session: Session) -> results.Metrics:
    """Of every domain that the repository holds; libvirt is not asked, no layer is read.  Errors: NoRepository and kin."""
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()
    gauges = {
        name: prometheus_client.Gauge(PREFIX + name, text, labels, registry=registry)
        for name, (text, labels) in GAUGES.items()
    }
    repository = session.repository()
    total, free = health.space(repository)
    gauges["repository_size_bytes"].set(total)
    gauges["repository_free_bytes"].set(free)
    count = 0
    for uuid in repository.uuids():
        kept = repository.domain(uuid)
        try:
            if kept.ids():
                count += 1
                _domain(gauges, health.domain(kept, health.now()))
        except errors.Damaged:
            gauges["unreadable"].labels(uuid, uuid).set(1)
    for one in health.last_runs(repository):
        _run(gauges, one)
    return results.Metrics(count, prometheus_client.generate_latest(registry).decode())


def _domain(gauges: Dict[str, Any], found: results.DomainHealth) -> None:
    values: Dict[str, Optional[float]] = {
        "backup_last_success_timestamp_seconds": _stamp(found.time),
        "backup_last_duration_seconds": found.seconds,
        "backup_last_changed_bytes": found.dirty_bytes,
        "backup_last_stored_bytes": found.stored_bytes,
        "backup_last_consistent": None if found.consistent is None else int(found.consistent),
        "backup_generation": found.generation,
        "backups": found.backups,
        "marks": found.marks,
        "unread_seconds": found.unread_seconds,
        "damaged": found.damage,
        "unreadable": int(bool(found.unreadable)),
    }
    for name, value in values.items():
        if value is not None:
            gauges[name].labels(found.domain, found.uuid).set(value)
    failing = {failure.work: failure for failure in found.failing}
    for work in WORK:
        gauges["failing"].labels(found.domain, found.uuid, work).set(int(work in failing))
    for work, failure in failing.items():
        gauges["last_failure_code"].labels(found.domain, found.uuid, work).set(failure.code)
        gauges["last_failure_timestamp_seconds"].labels(found.domain, found.uuid, work).set(_stamp(failure.time) or 0)


def _run(gauges: Dict[str, Any], one: results.LastRun) -> None:
    hosts = ",".join(one.hosts)
    gauges["run_last_timestamp_seconds"].labels(hosts).set(_stamp(one.ended) or 0)
    gauges["run_last_code"].labels(hosts).set(one.code)
    gauges["run_last_domains"].labels(hosts).set(one.domains)
    gauges["run_last_failed"].labels(hosts).set(one.failed)


def _stamp(time: Optional[str]) -> Optional[float]:
    found = checked.moment(time) if time else None
    return found.timestamp() if found else None


def refresh(session: Session, path: str) -> None:
    """Writes the file anew after a run; what stands in the way is told, and does not make the run a failure."""
    try:
        write(path, metrics(session).text)
    except errors.CbtError as e:
        session.watch.failed(str(e), kind=e.kind, code=e.code)


def write(path: str, text: str) -> None:
    """The file holds all of the text or all of the one before; everybody may read it.

    It lies in a folder of others, so nothing that is there already is written to, or followed.
    Errors: OutputFailed; Usage for a file of anything else: a path is soon mistyped, and who calls this is root.
    """
    _require_ours(path)
    part = f"{path}.{secrets.token_hex(8)}"  # without .prom: node_exporter reads no half of it
    try:
        fd = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                os.fchmod(fd, 0o644)
                file.write(text)
            os.rename(part, path)
        except OSError:
            os.unlink(part)
            raise
    except OSError as e:
        raise errors.OutputFailed(path=path, reason=e.strerror) from None


def _require_ours(path: str) -> None:
    try:
        if stat.S_ISREG(os.lstat(path).st_mode):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            with os.fdopen(fd, "rb") as file:
                ours = file.read(len(BEGIN)) in (BEGIN, b"")
        else:
            ours = False
    except FileNotFoundError:
        return
    except OSError as e:
        raise errors.OutputFailed(path=path, reason=e.strerror) from None
    if not ours:
        raise errors.Usage(reason=f"{path} is there and holds no metrics of libvirt-cbt; name another file, or remove it first")
