"""Looks at what usually goes wrong, changes nothing, and says the way out of each."""

from __future__ import annotations

import os
from typing import Callable, List, Optional, Tuple

from libvirt_cbt import errors, names, places, scripts, tools
from libvirt_cbt.actions import fleecing, offline, results, tracking
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import (
    address,
    bitmaps,
    checkpoints,
    connection,
    daemons,
    defining,
    domain,
    job,
    scratch,
    site,
    tpm,
)
from libvirt_cbt.repository import store

OK, WARNING, FAILED = "ok", "warning", "failed"
OLDEST_LIBVIRT = 7_002_000  # per-disk backupmode in one job
OLDEST_QEMU = 5_002_000

Finding = Tuple[str, str]  # status, detail


def doctor(session: Session, domain_name: Optional[str] = None, *, scratch_dir: Optional[str] = None) -> results.Doctor:
    """Checks this machine, the repository and, when given, one domain.  Errors: NoSuchDomain."""
    checks: List[results.Check] = []
    scratch_dir = scratch_dir or session.scratch_dir

    def check(name: str, look: Callable[[], Finding]) -> None:
        try:
            status, detail = look()
        except errors.CbtError as e:
            status, detail = FAILED, str(e)
        checks.append(results.Check(name, status, detail))

    check("tools", _tools)
    check("nbd binding", _binding)
    check("libvirt", lambda: _libvirt(session))
    check("repository", lambda: _repository(session))
    here = site.Here()
    check("socket folder", lambda: _folder(here, places.run_root(), "set LIBVIRT_CBT_RUN_DIR to another one"))
    reached = checks[2].status != FAILED
    where = session.host.site if reached else here
    if not where.here:
        check("far host", lambda: (OK, where.described()))
    if reached or address.parse(session.uri or "").here:
        check("scratch folder", lambda: _folder(where, where.scratch_root(scratch_dir), "name another with --scratch-dir"))
    check("scripts", _scripts)
    disks: List[results.DoctorDisk] = []
    if domain_name and reached:
        dom = domain.read(session.host, session.host.find(domain_name))
        check("state", lambda: _state(dom))
        if bitmaps.off(dom):
            check("images", lambda: _images(session, dom))
        else:
            check("agent", lambda: _agent(dom))
            if where.here:
                check("user", lambda: _user(dom))
        check("jobs", lambda: _jobs(session, dom))
        check("checkpoints", lambda: _checkpoints(session, dom))
        check("scratch room", lambda: _room(where, dom, scratch_dir))
        check("chain", lambda: _chain(session, dom))
        check("disks", lambda: _disks(dom))
        check("firmware", lambda: _firmware(session.host, where, dom))
        for disk in dom.disks:
            reason = disk.unprotected or disk.untracked
            disks.append(results.DoctorDisk(disk.target, disk.unprotected is None, reason is None, reason))
    return results.Doctor(domain=domain_name, checks=checks, disks=disks)


def _tools() -> Finding:
    for tool in ("qemu-img", "qemu-nbd", "qemu-storage-daemon", "setpriv"):
        tools.find(tool)
    return OK, tools.run(["qemu-img", "--version"]).splitlines()[0]


def _binding() -> Finding:
    from libvirt_cbt.nbdio import client

    return OK, f"libnbd {client.version()}"


def _libvirt(session: Session) -> Finding:
    libvirt_version, qemu = session.host.versions()
    shown = f"libvirt {_dotted(libvirt_version)}, QEMU {_dotted(qemu)} at {session.host.uri}"
    where = address.parse(session.host.address)
    if where.here and (answering := daemons.connected(where.parameters.get("socket"))):
        shown += f", {', '.join(answering)}"
    if libvirt_version < OLDEST_LIBVIRT or qemu < OLDEST_QEMU:
        return FAILED, f"{shown}: incremental backup needs libvirt 7.2 and QEMU 5.2 at least; update the host"
    return OK, shown


def _dotted(version: int) -> str:
    return f"{version // 1000000}.{version // 1000 % 1000}.{version % 1000}"


def _repository(session: Session) -> Finding:
    try:
        repository = session.repository()
    except errors.NoRepository as e:
        return WARNING, str(e)
    free = scratch.room(repository.path)
    status = WARNING if free < 1 << 30 else OK
    return status, f"{repository.path}, {len(repository.domains())} domains, {free >> 20} MiB free"


def _folder(where: site.Site, path: str, way_out: str) -> Finding:
    try:
        found = where.folder(path)
    except errors.Elsewhere:
        return OK, f"{path}, which libvirt makes; by TLS nothing is seen of it beforehand"
    if not found.writable:
        return FAILED, f"{found.path} is not writable for this user; {way_out}"
    if found.path == path and found.mode & 0o002 and not found.mode & 0o1000:
        return FAILED, f"{path} is writable for everybody; run `chmod 711 {errors.argument(path)}`, or {way_out}"
    return OK, path


def _scripts() -> Finding:
    found = scripts.find(scripts.directory())
    if found.refused:
        return WARNING, "; ".join(found.refused)
    count = sum(map(len, found.scripts.values()))
    return OK, f"{count} in {found.directory}" if count else "none"


def _state(dom: domain.Domain) -> Finding:
    if bitmaps.off(dom):
        return OK, f"the guest is {dom.state_name}: backups read its images"
    return (OK if dom.running else FAILED), f"the guest is {dom.state_name}" + (
        "" if dom.running else "; wait until it runs or is off"
    )


def _user(dom: domain.Domain) -> Finding:
    scratch.require_user(dom.qemu_ids)
    return OK, f"user {dom.qemu_ids[0]} runs QEMU" if dom.qemu_ids else "we and QEMU are one"


def _images(session: Session, dom: domain.Domain) -> Finding:
    """Of a guest that is off: whether its images can be opened, and go on being tracked."""
    try:
        kept = session.repository().domain(dom.uuid)
    except errors.NoRepository:
        return WARNING, "no backup yet"
    offline.planned(session, kept, dom, fleecing.Request(allow_plaintext=True))
    broken = [f"{target}: {why}" for target, why in offline.unusable(session.host, kept, dom).items()]
    return (WARNING, "; ".join(broken)) if broken else (OK, "free to be read")


def _agent(dom: domain.Domain) -> Finding:
    if dom.agent == "connected":
        return OK, "the guest agent is connected"
    way = "backups are crash-consistent; add an org.qemu.guest_agent.0 channel and run qemu-guest-agent in the guest"
    return WARNING, f"the guest agent is {dom.agent}: {way}"


def _jobs(session: Session, dom: domain.Domain) -> Finding:
    running = job.running(session.host, dom.uuid)
    if running is None:
        return OK, "none"
    return WARNING, f"{running.what} is running; wait for it to end, or look with `virsh domjobinfo {dom.uuid}`"


def _checkpoints(session: Session, dom: domain.Domain) -> Finding:
    found = checkpoints.listed(session.host, dom.uuid)
    mine: List[str] = []
    try:
        repository = session.repository()
        mine = checkpoints.ours(found, repository.id)
        strange = tracking.unknown(repository.domain(dom.uuid), found)
        if strange:
            return WARNING, tracking.stray(strange, dom.uuid)
    except errors.NoRepository:
        pass
    foreign = sorted(set(found) - set(mine))
    if foreign:
        shown = ", ".join(names.printable(n, 40) for n in foreign[:5])
        return WARNING, f"{len(foreign)} of others ({shown}); each costs guest writes a little, they are never touched"
    return OK, f"{len(mine)} of ours"


def _room(where: site.Site, dom: domain.Domain, scratch_dir: Optional[str]) -> Finding:
    try:
        directory = where.folder(where.scratch_root(scratch_dir)).path
    except errors.Elsewhere:
        return OK, "by TLS the room is known only when a backup has begun, which ends before it is used up"
    free = where.room(directory)
    needed = sum(d.capacity for d in dom.disks if not d.unprotected)
    if free < scratch.ROOM_FLOOR:
        return FAILED, f"{directory} has {free} bytes free; free some or name another with --scratch-dir"
    if free < needed:
        return WARNING, f"{directory} has {free >> 20} MiB free; a guest that writes {needed >> 20} MiB fills it"
    return OK, f"{free >> 20} MiB free in {directory}"


def _chain(session: Session, dom: domain.Domain) -> Finding:
    try:
        kept: store.DomainStore = session.repository().domain(dom.uuid)
    except errors.NoRepository:
        return WARNING, "no backup yet"
    generations = kept.generations()
    if kept.unread():
        raise kept.unread()[0].error
    if not generations:
        return WARNING, "no backup yet"
    depth = 0
    for disk in generations[-1].disks:
        backup = kept.newest_backup(generations[-1], disk.target)
        if backup:
            links = kept.chain(names.BackupId(backup.id), disk.target)
            depth = max(depth, len(links))
            for link in links:
                if not os.path.isfile(link.layer):
                    raise errors.Damaged(path=link.layer, reason="the layer is missing")
    return OK, f"generation {generations[-1].generation}, {depth} layers"


def _disks(dom: domain.Domain) -> Finding:
    weak = [f"{d.target}: {d.unprotected or d.untracked}" for d in dom.disks if d.unprotected or d.untracked]
    weak += [f"{d.target}: it is encrypted, a backup needs --allow-plaintext" for d in dom.disks if d.encrypted]
    return (WARNING, "; ".join(weak)) if weak else (OK, f"{len(dom.disks)} disks, all tracked")


def _firmware(host: connection.Host, where: site.Site, dom: domain.Domain) -> Finding:
    if defining.emulated_tpm(dom.xml) and tpm.state(host.uri, dom.xml, dom.uuid) is None:
        return WARNING, "the state of the emulated TPM is in no backup: keep the recovery keys of what is sealed with it"
    path = defining.nvram(dom.xml)
    if path is None:
        return OK, "no UEFI variables"
    seen = where.look([path]).get(path)
    if seen is None or not seen.header:
        return WARNING, f"the UEFI variables in {path} cannot be read, so they are in no backup; run it as root"
    return OK, f"each backup has the UEFI variables of {path}"
