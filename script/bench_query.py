"""How fast a stored delta is asked for: a synthetic repository, one JSON line of figures.

A disk of 1 TiB whose first generation is half allocated, then 30 generations of 1 % scattered 64 KiB writes each.
`figures` does it all and cleans up; each question runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict

import numpy as np

import libvirt_cbt.actions.changed
from libvirt_cbt import extents, names
from libvirt_cbt.repository import manifest, staging, store

TIB = 1 << 40
BLOCK = 65536
GENERATIONS = 30
SHARE = 0.01
PAGE = 1000
UUID = names.DomainUuid("0123abcd-0123-4567-89ab-0123456789ab")
LINEAGE = "11111111-2222-3333-4444-555555555555"
TIME = "2026-01-02T03:04:05.678Z"
QUESTIONS = {"one": ("15", "16"), "all": ("1", "latest"), "everything": ("*", "latest")}


def build(path: str, *, capacity: int = TIB, generations: int = GENERATIONS, share: float = SHARE) -> int:
    """Makes the repository; gives the bytes of all deltas."""
    kept = store.Repository.init(path).domain(UUID)
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
            size += _publish(kept, generation, rows, capacity)
    return size


def _publish(kept: store.DomainStore, generation: int, rows: extents.Extents, capacity: int) -> int:
    identity = names.new_backup_id()
    domain = manifest.DomainName(uuid=kept.uuid, name="synthetic")
    intent = manifest.Intent(
        id=identity, repository=kept.repository.id, domain=domain, host="h", tool_host="h", boot_id="b", uri="u",
        checkpoint=names.checkpoint(identity), run_dir="/r", socket="/r/s", scratch_dir="/s", scratch={},
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


def ask(path: str, since: str, until: str) -> Dict[str, Any]:
    """The first page, one from the middle, and the whole answer of one question, in this process."""
    parts = {"first_page": {"max_results": PAGE}, "middle_page": {"max_results": PAGE, "start_offset": TIB // 3}}
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


def _timed(*command: str) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - begun, 3)


def figures() -> Dict[str, Any]:
    """Builds, asks every question, measures the command line, cleans up."""
    with tempfile.TemporaryDirectory(prefix="cbt-bench-") as folder:
        path = os.path.join(folder, "repo")
        found: Dict[str, Any] = {"delta_bytes": build(path)}
        for name, (since, until) in QUESTIONS.items():
            asked = [sys.executable, os.path.abspath(__file__), path, since, until]
            found[name] = json.loads(subprocess.run(asked, check=True, stdout=subprocess.PIPE).stdout)
        tool = (sys.executable, "-c", "from libvirt_cbt import cli; cli.main()", "-r", path)
        query = ("changed", "synthetic", "vda", "--since", "1")
        found["process"] = {
            "version_seconds": _timed(*tool, "--version"),
            "first_page_seconds": _timed(*tool, "--json", *query, "--max-results", str(PAGE)),
            "whole_seconds": _timed(*tool, "--json", *query),
            "whole_csi_seconds": _timed(*tool, *query, "--format", "csi"),
        }
        return found


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(ask(*sys.argv[1:])))
    else:
        print(json.dumps(figures()))
