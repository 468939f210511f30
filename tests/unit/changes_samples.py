"""Repositories whose deltas are made by a model that knows every sector."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple

from libvirt_cbt import extents, names
from libvirt_cbt.repository import manifest, staging, store
from tests.unit import repository_samples as samples

SECTOR = 512
Row = Tuple[int, int, int]


def publish(
    kept: store.DomainStore,
    rows: List[Row],
    capacity: int,
    *,
    lineage: str = samples.LINEAGE,
    first: bool = False,
    target: str = "vda",
    reason: Optional[str] = None,
    contents: Optional[List[Row]] = None,
    granularity: Optional[int] = 65536,
) -> manifest.Manifest:
    """One more generation with a delta, and with a layer where `contents` are given; `first` of its lineage."""
    history = kept.generations()
    generation = history[-1].generation + 1 if history else 1
    wanted = samples.intent(kept)
    with staging.begun(kept, wanted) as stage:
        delta = stage.deltas(target)
        delta.append(extents.make([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]))
        digest, count = delta.finish()
        entries: Dict[str, manifest.LayerEntry] = {}
        if contents is not None:
            writer = stage.contents(target)
            writer.append(samples.content(contents))
            with open(stage.layer(target), "wb") as file:
                file.write(b"layer")
            entries[target] = manifest.LayerEntry(
                file=f"{target}.qcow2", parent=None, contents=f"{target}.contents.npy", digest=writer.finish()[0]
            )
        one = samples.disk(wanted.id, generation, manifest.Delta(digest=digest, extents=count), None, lineage)
        changes = {
            "target": target,
            "base": None if first else generation - 1,
            "capacity": capacity,
            "reason": reason,
            "granularity": granularity,
            "mode": "mark" if contents is None else "full",
        }
        one = one.model_copy(update=changes)
        made = samples.record(kept, wanted, generation, one)
        stage.publish(made, manifest.Layers(backup=wanted.id, disks=entries))
    return made


@dataclass
class Model:
    """What each delta says of each sector (0: nothing); the last sector may be short."""

    deltas: List[List[int]] = field(default_factory=list)
    capacities: List[int] = field(default_factory=list)

    def answer(self, since: int, until: int) -> List[Tuple[int, int]]:
        """(state, generation) of every sector at generation `until`; (0, 0) when it did not change."""
        out = [(0, 0)] * -(-self.capacities[until - 1] // SECTOR)
        for generation in range(since + 1, until + 1):
            for sector, state in enumerate(self.deltas[generation - 1]):
                if state:
                    out[sector] = (state, generation)
        return out

    def rows(self, since: int, until: int, start: int = 0) -> List[Tuple[int, int, int, int]]:
        """The answer as joined (offset, length, state, generation) from byte `start` on."""
        out: List[Tuple[int, int, int, int]] = []
        for sector, (state, generation) in enumerate(self.answer(since, until)):
            if not state:
                continue
            # What was the last sector when it was written ended with the disk of then.
            low = max(sector * SECTOR, start)
            high = min((sector + 1) * SECTOR, self.capacities[generation - 1])
            if low >= high:
                continue
            if out and out[-1][0] + out[-1][1] == low and out[-1][2:] == (state, generation):
                out[-1] = (out[-1][0], out[-1][1] + high - low, state, generation)
            else:
                out.append((low, high - low, state, generation))
        return out


def random_delta(rng: random.Random, capacity: int, grain: int) -> List[int]:
    """States by sector, written in whole grains; zeroes may be finer."""
    sectors = -(-capacity // SECTOR)
    delta = [0] * sectors
    for _ in range(rng.randrange(8)):
        step = grain // SECTOR
        first = rng.randrange(sectors) // step * step
        last = min(first + rng.randrange(1, 12) * step, sectors)
        for sector in range(first, last):
            delta[sector] = extents.DATA
        for sector in range(first + rng.randrange(step), last, rng.randrange(1, 3 * step)):
            if rng.random() < 0.5:
                delta[sector] = extents.ZERO
    return delta


def as_rows(delta: List[int], capacity: int) -> List[Row]:
    model = Model([delta], [capacity])
    return [(offset, length, state) for offset, length, state, _ in model.rows(0, 1)]


def random_repository(kept: store.DomainStore, rng: random.Random, generations: int, grain: int) -> Model:
    """Publishes `generations` generations of a disk that grows now and then."""
    model = Model()
    capacity = rng.randrange(1, 64) * grain + rng.choice([0, 0, 512, 100])
    for number in range(generations):
        delta = random_delta(rng, capacity, grain)
        model.deltas.append(delta)
        model.capacities.append(capacity)
        publish(kept, as_rows(delta, capacity), capacity, first=not number, granularity=grain)
        if rng.random() < 0.3:
            capacity += rng.choice([512, grain, 5 * grain])
    return model


def new_lineage() -> str:
    return names.new_lineage()
