"""Records a generation without copying data: begin, read each disk's delta, end, publish."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Optional

from libvirt_cbt.actions import fleecing, opening, phases, pulling, recording, recover, results, telling
from libvirt_cbt.actions.session import Session
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import manifest


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
    Errors: NoSuchDomain, DomainBusy, ImageInUse, RepositoryBusy, HookStopped, ScratchSpace, HypervisorError, RepositoryError and
    kin.
    """
    begun = time.monotonic()
    request = fleecing.Request(mark=True, quiesce=quiesce, scratch_dir=scratch_dir, allow_plaintext=allow_plaintext)
    with phases.around(session, "mark", domain_name) as hooks:
        uuid = session.host.find(domain_name)
        kept = session.repository(make=True).domain(uuid)
        with kept.lock(wait, session.watch.stop):
            warnings = opening.prepared(session, kept, domain_name, wait)
            plan = opening.planned(session, kept, request)
            hooks.preflight(plan)
            with opening.opened(session, kept, plan, hooks) as fleece:
                fleece.warnings += warnings
                hooks.ready(fleece)
                reads = pulling.pulled(session, kept, fleece, Options())
                fleece.close()
                hooks.disks_done(reads)
                fleece.warnings += hooks.complaints()
                made, layers = recording.recorded(fleece, reads)
                fleece.stage.publish(made, layers)
            recover.retire(session, kept)
        result = _result(made, round(time.monotonic() - begun, 3))
        return replace(result, warnings=result.warnings + hooks.committed(kept, made, result))


def _result(made: manifest.Manifest, seconds: float) -> results.Mark:
    return results.Mark(
        domain=made.domain.name,
        uuid=made.domain.uuid,
        id=made.id,
        generation=made.generation,
        disks=[results.MarkDisk(d.target, d.dirty_bytes, d.change_id) for d in made.disks],
        unprotected=telling.unprotected(made.unprotected),
        seconds=seconds,
        warnings=list(made.warnings),
    )
