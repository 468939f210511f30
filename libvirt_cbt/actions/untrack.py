"""Takes our checkpoints off a domain, so that it can be undefined or reverted; the next backup is full."""

from __future__ import annotations

from libvirt_cbt import errors
from libvirt_cbt.actions import recover, results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import checkpoints, domain


def untrack(session: Session, domain_name: str) -> results.Untrack:
    """Removes every checkpoint that this repository made; those of others stay.

    Errors: NoSuchDomain, NotRunning (libvirt removes bitmaps of running guests only), RepositoryBusy.
    """
    host = session.host
    uuid = host.find(domain_name)
    kept = session.repository().domain(uuid)
    with kept.lock():
        recover.reconcile(session, kept)
        dom = domain.read(host, uuid)
        names = checkpoints.ours(checkpoints.listed(host, uuid), kept.repository.id)
        if names and not dom.running:
            raise errors.NotRunning(domain=dom.name, state=dom.state_name)
        return results.Untrack(domain=dom.name, removed=[n for n in names if checkpoints.delete(host, uuid, n)])
