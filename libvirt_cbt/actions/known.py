"""What there is to choose from, for a shell that completes a word: quick, and good enough for a person who looks at it."""

from __future__ import annotations

from contextlib import suppress
from typing import List, Tuple

from libvirt_cbt import errors
from libvirt_cbt.actions.session import Session
from libvirt_cbt.repository import glimpses, manifest


def domains(session: Session, *, live: bool) -> List[str]:
    """Names of the repository's domains, and with `live` of the host's, if that is this machine."""
    found = {one.domain.name for one in _newest(session)}
    if live and _here(session):
        with suppress(errors.CbtError):
            found |= {name for name, _ in session.host.all()}
    return sorted(found)


def disks(session: Session, domain_name: str) -> List[str]:
    """Targets of a domain's disks, as a late generation or else libvirt has them.  Errors: NoSuchDomain and kin."""
    for one in _newest(session):
        if domain_name in (one.domain.name, one.domain.uuid):
            return [disk.target for disk in one.disks]
    if not _here(session):
        return []
    from libvirt_cbt.hypervisor import domain

    return [disk.target for disk in domain.read(session.host, session.host.find(domain_name)).disks]


def points(session: Session, domain_name: str, *, marks: bool) -> List[Tuple[str, str]]:
    """(number, what it is) of a domain's generations, the newest first.  Errors: NotInRepository and kin."""
    uuid = next((one.domain.uuid for one in _newest(session) if one.domain.name == domain_name), domain_name)
    generations = session.stored(uuid).generations()
    return [(str(m.generation), f"{m.kind} {m.frozen_at}") for m in reversed(generations) if marks or m.kind != "mark"]


def _newest(session: Session) -> List[manifest.Manifest]:
    with suppress(errors.CbtError):
        return glimpses.newest(session.repository())
    return []


def _here(session: Session) -> bool:
    """Whether libvirt is of this machine: another one may be slow, or want a password."""
    from libvirt_cbt.hypervisor import address

    return session.uri is None or address.parse(session.uri).here
