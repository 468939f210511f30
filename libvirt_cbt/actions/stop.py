"""Closes the fleecing point that `start` opened: its generation is committed, or given up without a trace."""

from __future__ import annotations

from libvirt_cbt import errors, names
from libvirt_cbt.actions import recover, results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import domain, job, pace, scratch
from libvirt_cbt.repository import manifest, staging, store


def stop(session: Session, domain_name: str, *, discard: bool = False) -> results.Stop:
    """Commits the open generation; with `discard` it never was, and its changes are in the next one.

    Errors: NoPointOpen; SourceLost when the job ended meanwhile, for then what was read cannot be trusted: the point is
    given up.
    """
    kept = session.stored(domain_name)
    with kept.lock(stop=session.watch.stop):
        intent = kept.open_point()
        if intent is None:
            raise errors.NoPointOpen(domain=names.printable(kept.name))
        made = kept.with_open_point().generations()[-1]
        if not discard:
            _commit(session, kept, intent)
            recover.retire(session, kept)
        else:
            recover.give_up(session, kept, intent)
    return results.Stop(kept.name, kept.uuid, made.id, made.generation, committed=not discard)


def _commit(session: Session, kept: store.DomainStore, intent: manifest.Intent) -> None:
    host = session.host
    if not job.end(host, kept.uuid, intent.socket):
        alive = domain.alive(host, kept.uuid)
        recover.give_up(session, kept, intent)
        raise errors.SourceLost(
            target="of the fleecing point",
            reason="its scratch files ran out of room or somebody ended its job"
            if alive
            else "the guest was switched off or its QEMU died",
        )
    recover.end_guard(intent)
    pace.restore(host, kept.uuid, pace.group(intent.socket))
    scratch.remove(recover.places(intent))
    staging.Staging(kept, intent).commit()
