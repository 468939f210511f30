"""The row of the time a guest stands still."""

from __future__ import annotations

from typing import List

import libvirt

from tests.bench import measuring
from tests.bench.measuring import Effort, Row, Sample, timed
from tests.bench.world import World, prepared
from tests.guests.system import SystemGuest


def frozen(world: World, effort: Effort) -> List[Row]:
    """From before the freeze to after the thaw, by the agent of a guest with an OS."""
    guest: SystemGuest = world.started("frozen", SystemGuest(world.host, "frozen"))
    repository = world.init("frozen")
    world.ours(repository, "backup", guest.name, "--quiesce", "agent")

    def ours(into: List[Sample]) -> None:
        quiesced = world.ours(repository, "backup", guest.name, "--quiesce", "agent")["quiesce"]
        assert quiesced["result"] == "frozen"
        into.append(Sample(quiesced["frozen_ms"] / 1000, 0.0))

    def bare(into: List[Sample]) -> None:
        dom = guest.domain
        sizes = {target: dom.blockInfo(target)[0] for target in guest.images}
        with prepared(world, guest, sizes) as (job, checkpoint, name):
            with timed(into):
                dom.fsFreeze()
                dom.backupBegin(job, checkpoint, libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL)
                dom.fsThaw()
            dom.abortJob()
            while dom.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE:
                pass
            dom.checkpointLookupByName(name).delete(0)

    found = measuring.alternate(max(effort.rounds, 9), {"ours": ours, "bare": bare})
    what = "frozen time of a guest with an agent"
    return [measuring.ratio("frozen", what, "freeze, begin, thaw, scratch made beforehand", found, 1.2)]
