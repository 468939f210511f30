"""A quick look at a repository, on which nothing hangs: one manifest of each domain."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import List

from libvirt_cbt import durable, errors
from libvirt_cbt.repository import manifest, store


def newest(repository: store.Repository) -> List[manifest.Manifest]:
    """A late generation of every domain that has one, as a rule its newest; what cannot be read is left out.

    Errors: RepositoryDenied and kin.
    """
    found = []
    for uuid in repository.uuids():
        kept = repository.domain(uuid)
        with suppress(errors.CbtError, OSError):
            for place in sorted(map(kept.directory, kept.ids()), key=os.path.getmtime)[-1:]:
                durable.require_directory(place)
                found.append(manifest.Manifest.load(os.path.join(place, "manifest.json")))
    return found
