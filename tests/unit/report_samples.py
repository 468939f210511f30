"""Repositories that look like years of use, made without a guest."""

from __future__ import annotations

import random
from datetime import datetime, timedelta, timezone
from typing import Dict, List, Optional, Sequence

from libvirt_cbt import extents, names
from libvirt_cbt.repository import manifest, staging, store
from tests.unit import repository_samples as samples

GIB = 1 << 30
CAPACITY = 40 * GIB


class History:
    """Publishes generations of one domain, each with disks of its own history."""

    def __init__(self, kept: store.DomainStore, rng: random.Random, name: str, disks: Sequence[str] = ("vda",)) -> None:
        self.kept, self.rng, self.name, self.disks = kept, rng, name, disks
        self.lineages = {target: names.new_lineage() for target in disks}
        self.parents: Dict[str, Optional[str]] = dict.fromkeys(disks)
        self.number = 0

    def add(
        self,
        when: datetime,
        *,
        mark: bool = False,
        full: bool = False,
        frozen: Optional[float] = 80.0,
        warnings: Sequence[str] = (),
        unprotected: Sequence[manifest.Unprotected] = (),
        reason: Optional[str] = None,
    ) -> manifest.Manifest:
        self.number += 1
        wanted = samples.intent(self.kept, self.name)
        full = full or self.number == 1
        made: List[manifest.ManifestDisk] = []
        entries: Dict[str, manifest.LayerEntry] = {}
        with staging.begun(self.kept, wanted) as stage:
            for target in self.disks:
                rows = self._rows(full)
                writer = stage.deltas(target)
                writer.append(extents.make([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]))
                digest, count = writer.finish()
                parent = None if full else self.parents[target]
                dirty = sum(r[1] for r in rows)
                one = samples.disk(
                    wanted.id,
                    self.number,
                    manifest.Delta(digest=digest, extents=count),
                    parent,
                    self.lineages[target],
                )
                stored = 0 if mark else int(dirty * self.rng.uniform(0.3, 0.6))
                if not mark:
                    contents = stage.contents(target)
                    contents.append(samples.content(rows[:4]))
                    with open(stage.layer(target), "wb") as file:
                        file.write(bytes([1]) * min(stored >> 12, 1 << 16))
                    entries[target] = manifest.LayerEntry(
                        file=f"{target}.qcow2",
                        parent=parent,
                        contents=f"{target}.contents.npy",
                        digest=contents.finish()[0],
                    )
                    self.parents[target] = wanted.id
                made.append(
                    one.model_copy(
                        update={
                            "target": target,
                            "capacity": CAPACITY,
                            "mode": "mark" if mark else "full" if full else "incremental",
                            "reason": reason,
                            "dirty_bytes": dirty,
                            "data_bytes": dirty,
                            "stored_bytes": stored,
                        }
                    )
                )
            whole = samples.record(self.kept, wanted, self.number, made[0]).model_copy(
                update={
                    "disks": made,
                    "kind": made[0].mode,
                    "frozen_at": _iso(when),
                    "started": _iso(when - timedelta(seconds=1)),
                    "finished": _iso(when + timedelta(seconds=40)),
                    "quiesce": manifest.Quiesce(
                        requested="auto", result="none" if frozen is None else "frozen", frozen_ms=frozen
                    ),
                    "warnings": list(warnings),
                    "unprotected": list(unprotected),
                }
            )
            stage.publish(whole, manifest.Layers(backup=wanted.id, disks=entries))
        return whole

    def _rows(self, full: bool) -> List[samples.Row]:
        """Busy at the front (a journal), in a wandering place, and here and there."""
        if full:
            return [(n * GIB, int(GIB * self.rng.uniform(0.1, 0.9)) >> 16 << 16, extents.DATA) for n in range(24)]
        wander = (self.number * 37) % 560
        cells = {0, 1, 40, *(wander + n for n in range(self.rng.randrange(30)))}
        cells |= {self.rng.randrange(600) for _ in range(6)}
        size = CAPACITY // 640
        return [(cell * size, (self.rng.randrange(size) >> 16 << 16) + 65536, extents.DATA) for cell in sorted(cells)]


def _iso(when: datetime) -> str:
    return when.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
