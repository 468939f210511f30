"""Takes our checkpoints off a domain, so that it can be undefined or reverted; the next backup is full."""

from __future__ import annotations

from libvirt_cbt.actions import offline, recover, results, tracking
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import bitmaps, checkpoints, domain


def untrack(session: Session, domain_name: str) -> results.Untrack:
    """Removes every checkpoint that this repository made; those of others stay.

    Errors: NoSuchDomain, RepositoryBusy; of a guest that is off ImageInUse when another program holds an image, and
    BitmapBelow after an external snapshot.
    """
    host = session.host
    uuid = host.find(domain_name)
    kept = session.repository().domain(uuid)
    with kept.lock():
        recover.reconcile(session, kept)
        tracking.regain(session, kept)  # bitmaps whose checkpoint libvirt has lost would stay otherwise
        names = checkpoints.ours(checkpoints.listed(host, uuid, sizes=False), kept.repository.id)
        dom = domain.read(host, uuid)
        if bitmaps.off(dom):
            offline.require_erasable(host, dom, names)  # all of them or none
        return results.Untrack(domain=dom.name, removed=[n for n in names if recover.removed(host, uuid, n)])
