"""The row of memory: the peak of every process of ours, by name, in whatever needs most."""

from __future__ import annotations

from typing import Dict, List

from tests.bench import measuring
from tests.bench.backups import BLOCK, GIB, big
from tests.bench.measuring import MB, Effort, Row
from tests.bench.readers import chain
from tests.bench.world import MIB, World


def memory(world: World, _effort: Effort) -> List[Row]:
    """Each process by itself; the guest's own QEMU is not ours."""
    found: Dict[str, Dict[str, int]] = {}

    def look(label: str, repository: str, command: str, *arguments: str) -> None:
        found[label] = measuring.peaks(world.argv(repository, command, *arguments), world.environment)

    guest = big(world)
    repository = world.init("memory")
    look("full", repository, "backup", guest.name)
    look("verify", repository, "verify", guest.name)
    world.forget(guest)
    small, many = chain(world)
    look("restore of 30 layers", many, "restore", small.name, "--output", world.new("restored"))

    size = (1 if world.quick else 64) * 1024 * GIB
    guest = world.guest("sparse-64-TiB", {"vda": (size, 0)})
    repository = world.init("memory")
    world.forget(guest)
    world.ours(repository, "backup", guest.name)
    guest.write("vda", [n * (size // 64) for n in range(64)], MIB)
    look("increment of 64 TiB", repository, "backup", guest.name)
    blocks = 256 if world.quick else 4096
    guest.write("vda", [n * 2 * BLOCK for n in range(blocks)], BLOCK)
    look("increment of fragments", repository, "backup", guest.name)
    look("mark", repository, "mark", guest.name)

    names = sorted({name for peaks in found.values() for name in peaks})
    rows = []
    for name in names:
        values = [peaks[name] / MB for peaks in found.values() if name in peaks]
        detail = {label: round(peaks[name] / MB, 1) for label, peaks in found.items() if name in peaks}
        rows.append(measuring.plain(f"memory-{name}", f"peak of {name}", "MB", values, 150, **detail))
    return rows
