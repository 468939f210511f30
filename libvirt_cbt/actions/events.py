"""Looks into what libvirt's and oVirt's hooks have noted of a domain: tracking is put right early, doubts are written down.

None of it has to happen in time: every backup begins with the same look, and finds lost or broken bitmaps by itself.
"""

from __future__ import annotations

from typing import Collection, Dict, Final, List, NamedTuple, Optional, Sequence

from libvirt_cbt import errors, names, spool
from libvirt_cbt.actions import planning, results, tracking
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import checkpoints, domain, job
from libvirt_cbt.nbdio.copy import DIRTY
from libvirt_cbt.repository import doubts, manifest, store

AUDIT: Final = "`libvirt-cbt backup --audit {}` compares the whole disk"


class Attended(NamedTuple):
    """Sentences about what was done and what has to wait, and how many events are left for later."""

    done: List[str]
    left: List[str]
    waiting: int


def waiting(session: Session) -> List[names.DomainUuid]:
    """The domains of this repository that hooks have noted something of; what they noted of others is dropped."""
    repository = session.repository()
    found: Dict[names.DomainUuid, None] = {}
    for event in _taken(session):
        if event.uuid is None:
            found.update(dict.fromkeys(repository.uuids()))
            event.done()
        elif repository.has(event.uuid):
            found[event.uuid] = None
        else:
            event.done()
    return list(found)


def heard(session: Session, kept: store.DomainStore) -> List[str]:
    """Under the lock, before `tracking.regain`: notes the doubts that events raise, and is done with them; sentences.

    Errors: NoHypervisor.
    """
    events = [event for event in _taken(session) if event.uuid == kept.uuid]
    done = _doubted(session, kept, events)
    for event in events:
        event.done()
    return done


def attend(session: Session, kept: store.DomainStore) -> Attended:
    """Under the lock: whatever was noted of one domain.  A guest with a job (one that migrates, say) has to wait.

    Errors: NoHypervisor, DomainBusy; what was noted is looked into again then.
    """
    events = [event for event in _taken(session) if event.uuid == kept.uuid]
    if not events or not _here(session, kept, events):
        return Attended([], [], 0)
    running = job.running(session.host, kept.uuid)
    if running:
        what = ", ".join(event.kind for event in events)
        return Attended([], [f"the guest is busy with {running.what}: it is looked at later ({what})"], len(events))
    done = _doubted(session, kept, events)
    before = checkpoints.listed(session.host, kept.uuid, sizes=False)
    left = tracking.regain(session, kept)
    done += _regained(session, kept, before)
    for event in events:
        event.done()
    return Attended(done, left, 0)


def _taken(session: Session) -> List[spool.Event]:
    events, complaints = spool.taken(spool.place(session.repository().id))
    for complaint in complaints:
        session.watch.note(complaint)
    return events


def _here(session: Session, kept: store.DomainStore, events: Sequence[spool.Event]) -> bool:
    """Whether libvirt has the domain; one that it does not have was undefined, or has migrated away."""
    try:
        session.host.lookup(kept.uuid)
    except errors.NoSuchDomain:
        for event in events:
            event.done()
        return False
    return True


def _doubted(session: Session, kept: store.DomainStore, events: Sequence[spool.Event]) -> List[str]:
    """Before libvirt 10.5 its hooks are not told why a guest ended; libvirt itself is, until the next start."""
    try:
        fate = domain.fate(session.host, kept.uuid) if events else None
    except errors.NoSuchDomain:
        fate = None
    done = []
    for event in events:
        kind = fate if fate and event.kind in ("started", "stopped") else event.kind
        if kind == domain.CRASHED and event.kind != "started" and doubts.crashed(kept, event.time):
            done.append(f"noted that the guest or its QEMU crashed at {event.time}")
        elif kind == domain.REVERTED and doubts.put_back(kept, event.time):
            done.append(f"noted that the guest was put back to a snapshot at {event.time}")
    for sentence in done:
        session.watch.note(sentence)
    return done


def _regained(session: Session, kept: store.DomainStore, before: Collection[str]) -> List[str]:
    """What the next backup will be like, hours before it is made."""
    newest = kept.generations()[-1:]
    if not newest or not newest[0].checkpoint:
        return []
    found = checkpoints.listed(session.host, kept.uuid)
    name, generation = newest[0].checkpoint, newest[0].generation
    running = domain.alive(session.host, kept.uuid)
    disks = found[name].disks if name in found else {}
    lost = [d.target for d in newest[0].disks if disks.get(d.target) is None] if running else []
    done = []
    if name in found and name not in before:
        done.append(f"gave checkpoint {name} of generation {generation} back to libvirt")
    if lost:
        done.append(f"the bitmaps of generation {generation} are lost ({', '.join(lost)}): the next backup copies all of them")
    return done


def unsure(
    kept: store.DomainStore, plans: Sequence[planning.DiskPlan], audits: Sequence[results.Audited]
) -> List[str]:
    """Warnings about disks of a backup that rest on bitmaps which a crash has left, and were not compared as a whole."""
    found = doubts.read(kept)
    rest = {plan.target for plan in plans if plan.copy == DIRTY} - {one.target for one in audits}
    left = [target for target in found.suspect if target in rest]
    if not left:
        return []
    way = AUDIT.format(errors.argument(kept.name))
    return [f"the guest or its QEMU crashed at {found.crashed}, and disk {', '.join(left)} rests on its bitmaps: {way}"]


def settled(kept: store.DomainStore, made: manifest.Manifest, audits: Sequence[results.Audited]) -> None:
    """Disks that this generation copied as a whole, or was compared with as a whole, are in doubt no more."""
    whole = [disk.target for disk in made.disks if disk.mode == "full"]
    doubts.settle(kept, [*whole, *(one.target for one in audits)])


def doubtful(kept: store.DomainStore) -> Optional[str]:
    """What is in doubt about a domain, for people."""
    found = doubts.read(kept)
    sentences = []
    if found.suspect:
        way = AUDIT.format(errors.argument(kept.name))
        sentences.append(f"the guest or its QEMU crashed at {found.crashed}: {way} ({', '.join(found.suspect)})")
    if doubts.reverted(kept):
        sentences.append(f"the guest was put back to a snapshot at {found.reverted}: the next backup begins new lineages")
    return "; ".join(sentences) or None
