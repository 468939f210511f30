"""One pull-mode backup job: begun in the same transaction as its checkpoint, ended exactly once.

https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainBackupBegin
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, Final, Iterable, Optional

import libvirt

from libvirt_cbt import errors, names
from libvirt_cbt.hypervisor import checkpoints, connection, documents, domain

OPERATIONS: Final[Dict[int, str]] = {
    1: "a start",
    2: "a save",
    3: "a restore",
    4: "an incoming migration",
    5: "an outgoing migration",
    6: "a snapshot",
    7: "a snapshot revert",
    8: "a dump",
    9: "a backup",
}
BLOCK_JOBS: Final[Dict[int, str]] = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_PULL: "a block pull",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY: "a block copy",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT: "a block commit",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT: "a block commit",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_BACKUP: "a backup",
}
ANSWER_SECONDS: Final = 5.0  # of a QEMU about its jobs; milliseconds, unless it was stopped or is stuck
# No such domain, no backup job, not running.
NO_JOB: Final = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_NO_DOMAIN_BACKUP, libvirt.VIR_ERR_OPERATION_INVALID)
TAKEN: Final = "Address already in use"  # in QEMU's own words
END_SECONDS: Final = 60.0
ENDING: Final = "backup job data missing"  # in libvirt's
ENDING_SECONDS: Final = 2.0
# Keeps a guest that powers itself off until the job has ended.  Older bindings lack it, older daemons refuse it.
PRESERVE: Final = int(getattr(libvirt, "VIR_DOMAIN_BACKUP_BEGIN_PRESERVE_SHUTDOWN_DOMAIN", 0))
PRESERVE_SINCE: Final = 11_010_000  # libvirt 11.10.0
ABORT_SECONDS: Final = 15.0  # a QEMU that was stopped never answers


@dataclass(frozen=True)
class Running:
    """Somebody's job on a domain; `socket` is where it exports, for a backup over a unix socket."""

    what: str
    seconds: Optional[float]
    socket: Optional[str]


def running(host: connection.Host, uuid: names.DomainUuid) -> Optional[Running]:
    """The job that keeps a domain busy; asked so that nobody waits 30 s for libvirt's own lock.

    Errors: HypervisorError when there is no answer (libvirt itself would wait without end for a QEMU that was stopped).
    """
    try:
        return connection.within(ANSWER_SECONDS, lambda: _running(host, uuid))
    except TimeoutError:
        raise errors.HypervisorError(
            reason=f"the QEMU of domain {uuid} does not answer; look whether it was stopped or its storage hangs"
        ) from None


def _running(host: connection.Host, uuid: names.DomainUuid) -> Optional[Running]:
    dom = host.lookup(uuid)
    with host.translated(uuid):
        if not dom.isActive():
            return None
        try:
            stats = _statistics(dom)
        except libvirt.libvirtError as e:
            # Where a guest is on its way to libvirt has no statistics of that, and refuses to give any.
            if e.get_error_code() != libvirt.VIR_ERR_OPERATION_UNSUPPORTED:
                raise
            return Running(OPERATIONS[4], None, None)
    if stats.get("type", 0) == libvirt.VIR_DOMAIN_JOB_NONE:
        return _block_job(host, uuid)
    elapsed = stats.get("time_elapsed")
    socket = None
    if stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP:
        try:
            socket = documents.running_job(dom.backupGetXMLDesc(0)).socket or None
        except (libvirt.libvirtError, errors.HypervisorError):
            socket = None  # it ended while we looked
    what = OPERATIONS.get(stats.get("operation", 0), "another job")
    return Running(what, None if elapsed is None else elapsed / 1000, socket)


def _statistics(dom: Any) -> Dict[str, Any]:
    """libvirt's, asked again while a backup is on its way out: what they are made of goes before the job does."""
    deadline = time.monotonic() + ENDING_SECONDS
    while True:
        try:
            return dict(dom.jobStats())
        except libvirt.libvirtError as e:
            if ENDING not in str(e) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _block_job(host: connection.Host, uuid: names.DomainUuid) -> Optional[Running]:
    dom = host.lookup(uuid)
    asked = False
    for target in domain.targets(host, uuid):
        try:
            info = dom.blockJobInfo(target, 0)
            # So far libvirt has answered from memory.  A QEMU that was stopped is found out here, within a time limit,
            # and not by a later call that has none.
            asked = asked or bool(dom.blockInfo(target))
        except libvirt.libvirtError:
            continue
        if info:
            return Running(f"{BLOCK_JOBS.get(info.get('type', 0), 'a block job')} on disk {target}", None, None)
    return None


def wait_idle(
    host: connection.Host, uuid: names.DomainUuid, name: str, seconds: float, stop: Callable[[], None] = lambda: None
) -> None:
    """Returns when the domain has no job.  Errors: DomainBusy when it still has one after `seconds`; what `stop` raises."""
    deadline = time.monotonic() + seconds
    while True:
        job = running(host, uuid)
        if job is None:
            return
        if time.monotonic() >= deadline:
            since = "" if job.seconds is None else f" since {job.seconds:.0f} s"
            raise errors.DomainBusy(domain=names.printable(name), job=job.what, since=since)
        stop()
        time.sleep(min(0.2, max(0.01, deadline - time.monotonic())))


def begin(
    host: connection.Host, uuid: names.DomainUuid, backups: Iterable[str], checkpoint: Optional[str], name: str
) -> None:
    """Begins the job and creates checkpoint `name` in one transaction; after an error neither is left.

    The scratch files exist already (REUSE_EXTERNAL).  `backups` are the same job on several addresses: where somebody
    listens already the next one is tried.  Errors: HypervisorError with libvirt's reason.
    """
    taken: Optional[errors.CbtError] = None
    for backup in backups:
        try:
            _begin(host, uuid, backup, checkpoint, name)
            return
        except errors.HypervisorError as e:
            if TAKEN not in str(e):
                raise
            taken = e
    raise taken or errors.HypervisorError(reason="there is no address to export on")


def _begin(host: connection.Host, uuid: names.DomainUuid, backup: str, checkpoint: Optional[str], name: str) -> None:
    dom = host.lookup(uuid)
    try:
        dom.backupBegin(backup, checkpoint, _flags(host))
    except libvirt.libvirtError as e:
        first = host.translate(e, uuid)
        # When the export step fails the job is gone but the checkpoint stays behind.
        try:
            if checkpoint:
                checkpoints.delete(host, uuid, name)
        except errors.CbtError:
            pass  # the first error is the one to tell; the intent lets the next run clean up
        raise first from None


def _flags(host: connection.Host) -> int:
    preserve = PRESERVE and host.retry(lambda conn: int(conn.getLibVersion())) >= PRESERVE_SINCE
    return int(libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL) | (PRESERVE if preserve else 0)


def exports(host: connection.Host, uuid: names.DomainUuid) -> documents.RunningJob:
    """What the running job exports."""
    dom = host.lookup(uuid)
    with host.translated(uuid):
        return documents.running_job(dom.backupGetXMLDesc(0))


def end(host: connection.Host, uuid: names.DomainUuid, socket: str) -> bool:
    """Ends the job that exports on `socket`, and only that one; True when there was one.

    Errors: HypervisorError when it does not go away.
    """
    if not exporting(host, uuid, socket):
        return False
    deadline = time.monotonic() + END_SECONDS
    while True:
        failure: Optional[str] = None
        try:
            # Not to be repeated on a new connection without another look at whose job it is.
            dom = host.retry(lambda conn: host.known(conn, uuid))
            connection.within(ABORT_SECONDS, dom.abortJob)
        except libvirt.libvirtError as e:
            # Ended by itself meanwhile (a guest that was switched off), or a lost connection: looked at again below.
            failure = connection.message(e)
        except TimeoutError:
            raise errors.HypervisorError(
                reason=f"the QEMU of domain {uuid} does not answer and its backup job goes on; "
                f"`libvirt-cbt recover {uuid}` ends it once it does"
            ) from None
        for pause in (0.001, 0.002, 0.004, 0.008, *[0.02] * 20):
            if not exporting(host, uuid, socket):
                return True
            time.sleep(pause)
        if time.monotonic() > deadline:
            raise errors.HypervisorError(
                reason=f"the backup job on domain {uuid} does not end ({failure or 'no reason given'}); "
                f"`libvirt-cbt recover {uuid}` ends it once the domain answers"
            )


def exporting(host: connection.Host, uuid: names.DomainUuid, socket: str) -> bool:
    """Whether the domain's backup job is the one of `socket`: a path with our random id is the proof that it is ours."""
    try:
        text = host.retry(lambda conn: host.known(conn, uuid).backupGetXMLDesc(0))
    except libvirt.libvirtError as e:
        if e.get_error_code() in NO_JOB:
            return False
        raise host.translate(e, uuid) from None  # whatever else it is proves nothing
    return documents.running_job(text).proves(socket)


def scratch_used(host: connection.Host, uuid: names.DomainUuid) -> int:
    """Bytes that libvirt says the job's scratch files hold; hangs while QEMU is stopped."""
    return int(host.lookup(uuid).jobStats().get("disk_temp_used", 0))
