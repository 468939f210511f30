"""Which domains run, for `--all`."""

from __future__ import annotations

from typing import List

from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import domain


def running(session: Session) -> List[str]:
    """UUIDs of the running domains, ordered by name.  Errors: NoHypervisor."""
    return [uuid for _, uuid in session.host.all() if domain.alive(session.host, uuid)]
