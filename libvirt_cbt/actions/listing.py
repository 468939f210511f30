"""What a repository holds: `list` over generations, `show` for one of them."""

from __future__ import annotations

from typing import List, Optional

from libvirt_cbt import points
from libvirt_cbt.actions import results, telling
from libvirt_cbt.actions.session import Session
from libvirt_cbt.repository import manifest, store


def generations(session: Session, domain_name: Optional[str] = None) -> List[results.Listing]:
    """Every generation of one domain, or of all; libvirt is not asked.  Errors: NoRepository, NotInRepository, Damaged."""
    kept = [session.stored(domain_name)] if domain_name else [session.stored(d.uuid) for d in session.repository().domains()]
    return [_listing(one, one.generations()) for one in kept]


def show(session: Session, domain_name: str, *, at: str = "latest") -> results.Listing:
    """One generation.  Errors: NotInRepository, NoSuchBackup."""
    kept = session.stored(domain_name)
    return _listing(kept, [kept.resolve(points.at(at))])


def _listing(kept: store.DomainStore, chosen: List[manifest.Manifest]) -> results.Listing:
    return results.Listing(
        domain=kept.name,
        uuid=kept.uuid,
        generations=[_generation(kept, m) for m in chosen],
        unreadable=[results.Unreadable(one.id, one.path, one.reason) for one in kept.unread()],
    )


def _generation(kept: store.DomainStore, made: manifest.Manifest) -> results.Generation:
    return results.Generation(
        generation=made.generation,
        id=made.id,
        kind=made.kind,
        time=made.frozen_at,
        consistent=made.quiesce.result == "frozen",
        disks=[telling.disk(d) for d in made.disks],
        unprotected=telling.unprotected(made.unprotected),
        protected=kept.protected(made.id),
    )
