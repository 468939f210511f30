"""What else a stored domain and its disks are called: by OpenStack, and by their serials."""

from __future__ import annotations

import os
from typing import List, Optional

from libvirt_cbt import durable, errors, names
from libvirt_cbt.repository.store import DomainStore, Repository


def find(repository: Repository, instance: str) -> DomainStore:
    """The domain whose OpenStack instance is called so.  Errors: NotInRepository; Usage when several are."""
    matches: List[DomainStore] = []
    for kept in map(repository.domain, repository.uuids()):
        try:
            if _instance(kept) == instance:
                matches.append(kept)
        except errors.Damaged:
            continue  # `verify` says what is damaged; another domain may be the one
    if not matches:
        raise errors.NotInRepository(domain=names.printable(instance), repository=repository.path)
    if len(matches) > 1:
        uuids = ", ".join(kept.uuid for kept in matches)
        raise errors.Usage(reason=f"several instances were called '{names.printable(instance)}': {uuids}; give a UUID")
    return matches[0]


def _instance(kept: DomainStore) -> Optional[str]:
    """As of the newest generation."""
    from libvirt_cbt import openstack, xmldoc  # lxml, for what is rarely asked

    generations = kept.generations()
    if not generations or "domain.xml" not in generations[-1].files:
        return None
    try:
        data = durable.read(os.path.join(kept.directory(generations[-1].id), "domain.xml"), xmldoc.MAX_BYTES)
    except (OSError, ValueError):
        return None
    return openstack.name(data.decode(errors="replace"))


def target(kept: DomainStore, asked: str) -> str:
    """The target of a disk given by target, or by the serial that it has in the newest generation with it.

    What no generation has is returned as it is.  Errors: Usage when two disks of that generation have the serial.
    """
    if any(m.disk(asked) for m in kept.generations()):
        return asked
    found = (names.disk(m.disks, asked) for m in reversed(kept.generations()))
    return next((disk.target for disk in found if disk), asked)
