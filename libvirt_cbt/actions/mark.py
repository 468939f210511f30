"""Records a generation without copying data: begin, read each disk's delta, end, publish."""

from __future__ import annotations

import time
from typing import Optional

from libvirt_cbt.actions import fleecing, opening, pulling, recording, recover, results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.nbdio.lanes import Options


def mark(
    session: Session,
    domain_name: str,
    *,
    quiesce: str = "none",
    scratch_dir: Optional[str] = None,
    wait: float = 0.0,
    allow_plaintext: bool = False,
) -> results.Mark:
    """Makes a domain's next generation, running or off; the next backup still holds all since the last backup.

    `allow_plaintext`: as of backup; of a mark the scratch files of a running guest are in plaintext, nothing else.
    Errors: NoSuchDomain, DomainBusy, ImageInUse, RepositoryBusy, ScratchSpace, HypervisorError, RepositoryError and kin.
    """
    begun = time.monotonic()
    request = fleecing.Request(mark=True, quiesce=quiesce, scratch_dir=scratch_dir, allow_plaintext=allow_plaintext)
    uuid = session.host.find(domain_name)
    kept = session.repository(make=True).domain(uuid)
    with kept.lock(wait, session.watch.stop):
        warnings = opening.prepared(session, kept, domain_name, wait)
        plan = opening.planned(session, kept, request)
        with opening.opened(session, kept, plan) as fleece:
            fleece.warnings += warnings
            reads = pulling.pulled(session, kept, fleece, Options())
            fleece.close()
            made, layers = recording.recorded(fleece, reads)
            fleece.stage.publish(made, layers)
        recover.retire(session, kept)
    return results.Mark(
        domain=made.domain.name,
        uuid=made.domain.uuid,
        id=made.id,
        generation=made.generation,
        disks=[results.MarkDisk(d.target, d.dirty_bytes, d.change_id) for d in made.disks],
        unprotected=recording.unprotected_result(made.unprotected),
        seconds=round(time.monotonic() - begun, 3),
        warnings=list(made.warnings),
    )
