"""Opens a fleecing point at a new generation and leaves it open, so that any NBD client may read it; `stop` closes it."""

from __future__ import annotations

import time
from typing import Optional

from libvirt_cbt import processes
from libvirt_cbt.actions import exports as exporting
from libvirt_cbt.actions import fleecing, opening, phases, pulling, recording, results, telling
from libvirt_cbt.actions.session import Session
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import manifest


def start(
    session: Session,
    domain_name: str,
    *,
    quiesce: str = "auto",
    scratch_dir: Optional[str] = None,
    wait: float = 0.0,
    allow_plaintext: bool = False,
) -> results.Start:
    """The point stays when this process ends; a guard process ends it before the scratch files' room runs out.

    Its generation is written down but not committed: `changed` knows it by number or id, `latest` does not name it.
    Errors: as of mark; PointOpen when one is open already.
    """
    begun = time.monotonic()
    request = fleecing.Request(mark=True, quiesce=quiesce, scratch_dir=scratch_dir, allow_plaintext=allow_plaintext)
    with phases.around(session, "start", domain_name) as hooks:
        uuid = session.host.find(domain_name)
        kept = session.repository(make=True).domain(uuid)
        with kept.lock(wait, session.watch.stop):
            warnings = opening.prepared(session, kept, domain_name, wait)
            plan = fleecing.planned(session, kept, fleecing.running(session.host, uuid), request)
            hooks.preflight(plan)
            with fleecing.opened(session, kept, plan, hooks) as fleece:
                fleece.warnings += warnings + processes.outlived("the guard of the open point")
                exports = fleece.exported()
                reads = pulling.pulled(session, kept, fleece, Options())
                hooks.ready(fleece)
                fleece.warnings += hooks.complaints()
                made, layers = recording.recorded(fleece, reads)
                fleece.stage.complete(made, layers)
                session.watch.stop()
                fleece.stay()
    return results.Start(
        domain=made.domain.name,
        uuid=made.domain.uuid,
        id=made.id,
        generation=made.generation,
        socket=str(next(iter(exports.values())).server or plan.places.socket),
        quiesce=telling.quiesced(made.quiesce),
        disks=[_disk(d, exports[d.target]) for d in made.disks],
        unprotected=telling.unprotected(made.unprotected),
        seconds=round(time.monotonic() - begun, 3),
        warnings=list(made.warnings),
    )


def _disk(disk: manifest.ManifestDisk, export: exporting.Exported) -> results.OpenDisk:
    return results.OpenDisk(
        target=disk.target,
        uri=export.uri,
        export=export.export,
        bitmap=export.bitmap,
        context=export.context,
        capacity=disk.capacity,
        dirty_bytes=disk.dirty_bytes,
        change_id=disk.change_id,
    )
