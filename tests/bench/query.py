"""Rows of questions to stored deltas, in a synthetic repository.

A disk of 1 TiB whose first generation is half allocated, then 30 generations of 1 % scattered 64 KiB writes each.
Each question runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Dict, List

import numpy as np

import libvirt_cbt.actions.changed
from libvirt_cbt import extents, names
from libvirt_cbt.repository import manifest, staging, store
from tests.bench import measuring
from tests.bench.measuring import Effort, Row
from tests.bench.world import World, run

TIB = 1 << 40
BLOCK = 65536
GENERATIONS = 30
SHARE = 0.01
PAGE = 1000
UUID = names.DomainUuid("0123abcd-0123-4567-89ab-0123456789ab")
LINEAGE = "11111111-2222-3333-4444-555555555555"
TIME = "2026-01-02T03:04:05.678Z"
QUESTIONS = {"one": ("15", "16"), "all": ("1", "latest"), "everything": ("*", "latest")}


def build(
    path: str,
    *,
    capacity: int = TIB,
    generations: int = GENERATIONS,
    share: float = SHARE,
    uuid: names.DomainUuid = UUID,
    name: str = "synthetic",
) -> int:
    """Makes the repository, of so many generations and the first; gives the bytes of all deltas."""
    kept = store.Repository.init(path).domain(uuid)
    rng = np.random.default_rng(1)
    blocks = capacity // BLOCK
    size = 0
    with kept.lock():
        for generation in range(1, generations + 2):
            if generation == 1:
                rows = extents.make(np.arange(0, capacity, 1 << 30), 1 << 29, extents.DATA)
            else:
                chosen = np.sort(rng.choice(blocks, int(blocks * share), replace=False))
                states = rng.choice([extents.DATA, extents.ZERO], len(chosen), p=[0.9, 0.1])
                rows = extents.coalesce(extents.make(chosen * BLOCK, BLOCK, states))
            size += _publish(kept, name, generation, rows, capacity)
    return size


def _publish(kept: store.DomainStore, name: str, generation: int, rows: extents.Extents, capacity: int) -> int:
    identity = names.new_backup_id()
    domain = manifest.DomainName(uuid=kept.uuid, name=name)
    intent = manifest.Intent(
        id=identity, repository=kept.repository.id, domain=domain, host="h", tool_host="h", boot_id="b", uri="u",
        checkpoint=names.checkpoint(identity), scratch={},
        run_dir=f"/r/{identity}", socket=f"/r/{identity}/nbd.sock", scratch_dir=f"/s/{names.checkpoint(identity)}",
        phase="planned", pid=1, started=TIME,
    )  # fmt: skip
    with staging.begun(kept, intent) as stage:
        writer = stage.deltas("vda")
        writer.append(rows)
        digest, count = writer.finish()
        disk = manifest.ManifestDisk(
            target="vda", mode="mark", reason=None, base=generation - 1 or None, parent=None, lineage=LINEAGE,
            capacity=capacity, granularity=BLOCK, serial=None, wwn=None,
            source=manifest.Source(type="file", path="/vda.qcow2", format="qcow2", inode=None),
            delta=manifest.Delta(digest=digest, extents=count),
            change_id=names.change_id(LINEAGE, generation, identity), dirty_bytes=extents.total(rows),
            data_bytes=0, zero_bytes=0, read_bytes=0, stored_bytes=0,
        )  # fmt: skip
        made = manifest.Manifest(
            id=identity, repository=kept.repository.id, domain=domain, generation=generation,
            checkpoint=intent.checkpoint, kind="mark", started=TIME, frozen_at=TIME, finished=TIME, host="h", uri="u",
            tool="0", quiesce=manifest.Quiesce(requested="none", result="none", frozen_ms=None), disks=[disk],
            unprotected=[], files={}, warnings=[],
        )  # fmt: skip
        size = os.path.getsize(writer.path)
        stage.publish(made, manifest.Layers(backup=identity, disks={}))
    return size


def ask(path: str, since: str, until: str, capacity: int) -> Dict[str, Any]:
    """The first page, one from the middle, and the whole answer of one question, in this process."""
    parts: Dict[str, Dict[str, Any]] = {
        "first_page": {"max_results": PAGE},
        "middle_page": {"max_results": PAGE, "start_offset": capacity // 3},
    }
    found: Dict[str, Any] = {}
    with libvirt_cbt.Session(repository=path) as session:
        for name, options in {**parts, "whole": {}}.items():
            begun, busy = time.perf_counter(), time.process_time()
            pages = libvirt_cbt.changed(session, "synthetic", "vda", since=since, until=until, **options)
            found[f"{name}_extents"] = sum(len(page) for page in pages)
            found[f"{name}_seconds"] = round(time.perf_counter() - begun, 4)
            found[f"{name}_cpu_seconds"] = round(time.process_time() - busy, 4)
    return {**found, "peak_bytes": _peak()}


def _peak() -> int:
    """VmHWM of this process; ru_maxrss would be that of the parent where it was larger."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


def query(world: World, effort: Effort) -> List[Row]:
    """The worst of three questions, and of the rounds: first page, whole delta, and memory of the process that asks."""
    path = world.new("query")
    capacity = TIB // 16 if world.quick else TIB
    build(path, capacity=capacity)
    answers: List[Dict[str, Any]] = []
    for _ in range(effort.rounds):
        for since, until in QUESTIONS.values():
            argv = [sys.executable, "-m", "tests.bench.query", path, since, until, str(capacity)]
            answers.append(json.loads(run(*argv, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})))
    what = f"of {GENERATIONS} generations of 1 % of 1 TiB"
    rows = []
    for name, part, target in (("first", "first_page", 0.2), ("middle", "middle_page", 0.2), ("whole", "whole", 2.0)):
        worst = max((found[f"{part}_seconds"], found[f"{part}_cpu_seconds"]) for found in answers)
        values = [found[f"{part}_seconds"] for found in answers]
        cpu = sorted(found[f"{part}_cpu_seconds"] for found in answers)
        facts = {"extents": max(found[f"{part}_extents"] for found in answers), "worst": worst, "most_cpu": cpu[-1]}
        rows.append(measuring.plain(f"query-{name}", f"{part.replace('_', ' ')} {what}", "s", values, target, **facts))
    peaks = [found["peak_bytes"] / measuring.MB for found in answers]
    rows.append(measuring.plain("query-memory", f"peak of the process that asks, {what}", "MB", peaks, 200))
    return rows


if __name__ == "__main__":
    print(json.dumps(ask(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
