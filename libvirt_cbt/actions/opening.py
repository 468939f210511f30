"""The fleecing point of a domain in whatever state it is: a job of the running guest, or the images of one that is off."""

from __future__ import annotations

from typing import ContextManager, List

from libvirt_cbt.actions import events, fleecing, offline, phases, recover, tracking
from libvirt_cbt.actions.fleecing import Fleece, Plan, Request
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import bitmaps, domain, job
from libvirt_cbt.repository import store


def prepared(session: Session, kept: store.DomainStore, domain_name: str, wait: float) -> List[str]:
    """Under the lock, before planning: leftovers are cleaned up, nobody works on the domain, its tracking is whole.

    `wait` is in seconds.  Warnings for the result.  Errors: PointOpen, DomainBusy, those of tracking.regain.
    """
    recover.reconcile(session, kept)
    job.wait_idle(session.host, kept.uuid, domain_name, wait, session.watch.stop)
    events.heard(session, kept)
    damaged = [f"{one.error}; a new generation counts from the newest that can be read" for one in kept.unread()]
    return damaged + tracking.regain(session, kept)


def planned(session: Session, kept: store.DomainStore, request: Request) -> Plan:
    """Errors: NotRunning for a domain that neither runs nor is off; those of fleecing.planned, offline.planned."""
    dom = domain.read(session.host, kept.uuid)
    request = request.of(dom)
    if bitmaps.off(dom):
        return offline.planned(session, kept, dom, request)
    return fleecing.planned(session, kept, fleecing.require_running(dom), request)


def opened(session: Session, kept: store.DomainStore, plan: Plan, hooks: phases.Phases) -> ContextManager[Fleece]:
    """Errors: those of fleecing.opened, offline.opened."""
    if bitmaps.off(plan.dom):
        return offline.opened(session, kept, plan)
    return fleecing.opened(session, kept, plan, hooks)
