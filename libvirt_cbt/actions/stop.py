"""Closes the fleecing point that `start` opened: its generation is committed, or given up without a trace."""

from __future__ import annotations

from dataclasses import replace

from libvirt_cbt import errors, names
from libvirt_cbt.actions import phases, recover, results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import domain, job
from libvirt_cbt.repository import manifest, staging, store


def stop(session: Session, domain_name: str, *, discard: bool = False) -> results.Stop:
    """Commits the open generation; with `discard` it never was, and its changes are in the next one.

    Errors: NoPointOpen; PointLost when the job ended before, for then what was read cannot be trusted: the point is
    given up; MadeElsewhere.
    """
    with phases.around(session, "stop", domain_name) as hooks:
        kept = session.live(domain_name)
        with kept.lock(stop=session.watch.stop):
            intent = kept.open_point()
            if intent is None:
                raise errors.NoPointOpen(domain=names.printable(kept.name))
            recover.require_here(session, intent)
            number = kept.next_generation()
            if discard:
                recover.give_up(session, kept, intent)
            else:
                _commit(session, kept, intent)
                recover.retire(session, kept)
        result = results.Stop(kept.name, kept.uuid, intent.id, number, committed=not discard)
        if discard:
            return result
        return replace(result, warnings=hooks.committed(kept, kept.require(intent.id), result))


def _commit(session: Session, kept: store.DomainStore, intent: manifest.Intent) -> None:
    host = session.host
    if intent.phase != "committing":
        if not job.exporting(host, kept.uuid, intent.socket):
            alive = domain.alive(host, kept.uuid)
            recover.give_up(session, kept, intent)
            raise errors.PointLost(
                domain=names.printable(kept.name),
                reason="its scratch files ran out of room or somebody ended its job"
                if alive
                else "the guest was switched off or its QEMU died",
            )
        # Whoever read it is done: from here on it does not matter who ends the job, nor when.
        staging.Staging(kept, intent).advance("committing")
    recover.committed(session, kept, intent)
