"""Puts right what a run that died has left: in libvirt, on disk and in the repository; safe to repeat.

Only what an intent of this repository proves to be ours is touched, on the host the intent names.
"""

from __future__ import annotations

import os
import socket
from typing import List, Tuple

from libvirt_cbt import errors, names
from libvirt_cbt.actions import results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import checkpoints, domain, job, quiesce, scratch
from libvirt_cbt.repository import manifest, store


def recover(session: Session, domain_name: str) -> results.Recover:
    """Cleans up after dead runs of one domain.  Errors: NotInRepository, RepositoryBusy, NoHypervisor."""
    kept = session.stored(domain_name)
    with kept.lock():
        done, left = reconcile(session, kept)
        done += retire(session, kept)
        return results.Recover(domain=kept.name, actions=done, left=left)


def reconcile(session: Session, kept: store.DomainStore) -> Tuple[List[str], List[str]]:
    """What was done, and what had to be left with the reason; called under the lock, so every intent's run is dead."""
    done: List[str] = []
    left: List[str] = []
    for leftover in kept.leftovers():
        intent = leftover.intent
        if intent is None and set(os.listdir(leftover.path)) - {"intent.json", "intent.json.new"}:
            left.append(
                f"staging {leftover.id} has an unreadable intent; look for checkpoint cbt-{leftover.id} in libvirt"
            )
            continue
        if intent is None:
            # Its first write is the intent, so a run that came no further has touched nothing outside.
            kept.discard(leftover)
            done.append(f"removed staging {leftover.id}")
            continue
        if intent.host != session.host.hostname or intent.tool_host != socket.gethostname():
            left.append(f"staging {leftover.id} belongs to a run on {intent.tool_host}; run recover there")
            continue
        try:
            done += _undo(session, intent)
        except errors.CbtError as e:
            left.append(f"staging {leftover.id}: {e}")
            continue
        kept.discard(leftover)
        done.append(f"removed staging {leftover.id}")
    for sentence in (*done, *left):
        session.watch.note(f"recovered: {sentence}" if sentence in done else sentence)
    return done, left


def _undo(session: Session, intent: manifest.Intent) -> List[str]:
    host = session.host
    uuid = names.DomainUuid(intent.domain.uuid)
    done: List[str] = []
    try:
        if intent.phase == "freezing":
            done += quiesce.thaw(host, uuid)
        if job.end(host, uuid, intent.socket):
            done.append(f"ended backup job {intent.id}")
        if checkpoints.delete(host, uuid, intent.checkpoint):
            done.append(f"removed checkpoint {intent.checkpoint}")
    except errors.NoSuchDomain:
        pass  # undefined meanwhile, and its checkpoints with it
    places = scratch.Places(intent.run_dir, intent.socket, intent.scratch_dir, dict(intent.scratch))
    return done + [f"removed {path}" for path in scratch.remove(places)]


def retire(session: Session, kept: store.DomainStore) -> List[str]:
    """Removes the checkpoints of all published generations but the newest; one of ours stays."""
    generations = kept.generations()
    host = session.host
    if not generations:
        return []
    published = {m.checkpoint for m in generations[:-1]}
    try:
        if not domain.alive(host, kept.uuid):
            return []  # libvirt removes bitmaps of running guests only
        found = checkpoints.listed(host, kept.uuid)
        gone = [n for n in checkpoints.ours(found, kept.repository.id) if n in published]
        return [f"removed checkpoint {n}" for n in gone if checkpoints.delete(host, kept.uuid, n)]
    except errors.CbtError as e:
        session.watch.note(f"an older checkpoint stays until the next run: {e}")
        return []


def boot_id() -> str:
    """Which boot of this machine it is."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "unknown"
