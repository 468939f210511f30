"""Puts right what a run that died has left: in libvirt, on disk and in the repository; safe to repeat.

Only what an intent of this repository proves to be ours is touched, on the host the intent names.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Final, List, Tuple

from libvirt_cbt import errors, names, processes
from libvirt_cbt import places as machine
from libvirt_cbt.actions import events, offline, results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import bitmaps, checkpoints, connection, domain, job, pace, quiesce, scratch
from libvirt_cbt.repository import manifest, staging, store

IN_FLIGHT_SECONDS: Final = 1.5  # from what libvirt has been asked to what it shows; on an idle host a tenth


def recover(session: Session, domain_name: str) -> results.Recover:
    """Cleans up after dead runs of one domain, and looks into what hooks have noted of it.

    Errors: NotInRepository, RepositoryBusy, PointOpen, NoHypervisor.
    """
    kept = session.live(domain_name)
    with kept.lock():
        done, left = reconcile(session, kept)
        done += retire(session, kept)
        done += [f"removed {path}" for path in machine.sweep(machine.run_root())]
        seen = events.attend(session, kept)
        return results.Recover(kept.name, done + seen.done, left + seen.left, waiting=seen.waiting)


def known(session: Session, *, noted: bool = False) -> List[names.DomainUuid]:
    """The domains to look at: all of the repository, or with `noted` those that a hook has noted something of."""
    found = events.waiting(session)
    return found if noted else session.repository().uuids()


def reconcile(session: Session, kept: store.DomainStore) -> Tuple[List[str], List[str]]:
    """What was done, and what had to be left with the reason; called under the lock, so every intent's run is dead.

    Errors: PointOpen for a fleecing point that `start` left open and whose job still runs.
    """
    done: List[str] = []
    left: List[str] = []
    for leftover in kept.leftovers():
        try:
            done += _reconciled(session, kept, leftover)
        except _Left as e:
            left.append(f"staging {leftover.id} {e}")
        except errors.PointOpen:
            raise
        except errors.CbtError as e:
            left.append(f"staging {leftover.id}: {e}")
    if kept.settle():
        done.append(f"removed the intent of generation {kept.generations()[-1].generation}")
    for sentence in done:
        session.watch.note(f"recovered: {sentence}")
    for sentence in left:
        session.watch.note(f"left alone: {sentence}")
    return done, left


class _Left(Exception):
    """Why a leftover stays."""


def _reconciled(session: Session, kept: store.DomainStore, leftover: store.Leftover) -> List[str]:
    intent = leftover.intent
    done: List[str] = []
    if intent is not None:
        require_here(session, intent)
        if intent.phase == "committing":
            return committed(session, kept, intent)
        if intent.phase == "open" and job.exporting(session.host, kept.uuid, intent.socket):
            raise errors.PointOpen(domain=names.printable(kept.name), since=intent.started)
        done = _undo(session, intent)
    elif set(os.listdir(leftover.path)) - {"intent.json", "intent.json.new"}:
        raise _Left(f"has an unreadable intent; look for checkpoint cbt-{leftover.id} in libvirt")
    # Without an intent: it is the first thing written, so a run that came no further has touched nothing outside.
    kept.discard(leftover)
    return [*done, f"removed staging {leftover.id}"]


def require_here(session: Session, intent: manifest.Intent) -> None:
    """What an intent says was done is looked for where it was done: elsewhere it would seem to have gone.

    Errors: MadeElsewhere.
    """
    here = (session.host.hostname, socket.gethostname(), session.host.uri)
    if (intent.host, intent.tool_host, intent.uri) != here:
        raise errors.MadeElsewhere(id=intent.id, tool_host=intent.tool_host, host=intent.host, uri=intent.uri)


def committed(session: Session, kept: store.DomainStore, intent: manifest.Intent) -> List[str]:
    """Publishes the generation of an open point whose readers are done.  Errors: HypervisorError; then it waits."""
    job.end(session.host, kept.uuid, intent.socket)
    done = _let_go(session, intent)
    done += [f"removed {path}" for path in session.host.site.remove(places(intent))]
    staging.Staging(kept, intent).commit()
    return [*done, f"committed generation {kept.generations()[-1].generation}"]


def give_up(session: Session, kept: store.DomainStore, intent: manifest.Intent) -> None:
    """Undoes a fleecing point that was left open; what cannot be done now (the guest is off) the next run does."""
    staging.Staging(kept, intent).advance("running")
    try:
        _undo(session, intent)
    except errors.CbtError as e:
        session.watch.note(f"the next run cleans up what is left: {e}")
        return
    for leftover in kept.leftovers():
        if leftover.id == intent.id:
            kept.discard(leftover)


def places(intent: manifest.Intent) -> scratch.Places:
    return scratch.Places(intent.run_dir, intent.socket, intent.scratch_dir, dict(intent.scratch))


def _undo(session: Session, intent: manifest.Intent) -> List[str]:
    host = session.host
    uuid = names.DomainUuid(intent.domain.uuid)
    done: List[str] = []
    try:
        if _ended(session, intent):
            done.append(f"ended backup job {intent.id}")
        if intent.images:
            done += offline.withdraw(host, intent)
        elif removed(host, uuid, intent.checkpoint):
            done.append(f"removed checkpoint {intent.checkpoint}")
        done += _let_go(session, intent)
    except errors.NoSuchDomain:
        done += _end_guard(intent)  # undefined meanwhile, and its checkpoints with it
    return done + [f"removed {path}" for path in host.site.remove(places(intent))]


def _ended(session: Session, intent: manifest.Intent) -> bool:
    """Ends the job; whether there was one.

    A run that was killed while it began the job, with its guard, may have asked libvirt for what shows only now.
    """
    in_flight = intent.phase == "freezing" and not intent.images and intent.boot_id == processes.boot_id()
    deadline = time.monotonic() + (IN_FLIGHT_SECONDS if in_flight else 0)
    while True:
        if job.end(session.host, names.DomainUuid(intent.domain.uuid), intent.socket):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)


def _let_go(session: Session, intent: manifest.Intent) -> List[str]:
    """The guest is as it was: thawed, unlimited, unguarded.  Errors: HypervisorError while it may be frozen.

    A guard is ended only when nothing is left for it to do; a late thaw of its own could hit the next freeze.
    """
    host = session.host
    uuid = names.DomainUuid(intent.domain.uuid)
    slowed = pace.restore(host, uuid, pace.group(intent.socket))
    done = [f"took the limits of {', '.join(slowed)} away"] if slowed else []
    if intent.thaw_owed:
        done += quiesce.thaw(host, uuid)
    return done + _end_guard(intent)


def _end_guard(intent: manifest.Intent) -> List[str]:
    known = intent.guard if intent.boot_id == processes.boot_id() else None
    if known and processes.kill(processes.Process(known.pid, known.started)):
        machine.sweep(machine.run_root())  # its folders of sockets, for which it had no time
        return [f"ended guard process {known.pid}"]
    return []


def retire(session: Session, kept: store.DomainStore) -> List[str]:
    """Removes the checkpoints of all published generations but the newest; one of ours stays."""
    generations = kept.generations()
    host = session.host
    if not generations:
        return []
    published = {m.checkpoint for m in generations[:-1]}
    if not kept.unplaced():
        published |= {names.CHECKPOINT_PREFIX + one.id for one in kept.unread() if one.id}
    try:
        found = checkpoints.listed(host, kept.uuid, sizes=False)
        gone = [n for n in checkpoints.ours(found, kept.repository.id) if n in published]
        return [f"removed checkpoint {n}" for n in gone if removed(host, kept.uuid, n)]
    except errors.CbtError as e:
        session.watch.note(f"an older checkpoint stays until the next run: {e}")
        return []


def removed(host: connection.Host, uuid: names.DomainUuid, checkpoint: str) -> bool:
    """libvirt removes bitmaps of running guests only; from the images of one that is off we do."""
    if not domain.alive(host, uuid):
        dom = domain.read(host, uuid)
        if bitmaps.off(dom):
            return offline.erase(host, dom, checkpoint)
    return checkpoints.delete(host, uuid, checkpoint)
