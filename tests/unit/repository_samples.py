"""Small real repositories for the tests of the room."""

from __future__ import annotations

import hashlib
from typing import Dict, List, Optional, Tuple

import blake3
import numpy as np

from libvirt_cbt import extents, names
from libvirt_cbt.repository import manifest, staging, store

UUID = names.DomainUuid("0123abcd-0123-4567-89ab-0123456789ab")
LINEAGE = "11111111-2222-3333-4444-555555555555"
SIZE = 4 * extents.GRAIN
TIME = "2026-01-02T03:04:05.678Z"

Row = Tuple[int, int, int]


def intent(kept: store.DomainStore, name: str = "vm") -> manifest.Intent:
    identity = names.new_backup_id()
    return manifest.Intent(
        id=identity,
        repository=kept.repository.id,
        domain=manifest.DomainName(uuid=kept.uuid, name=name),
        host="h",
        tool_host="h",
        boot_id="b",
        uri="qemu:///system",
        checkpoint=names.checkpoint(identity),
        run_dir=f"/run/cbt/{identity}",
        socket=f"/run/cbt/{identity}/nbd.sock",
        scratch_dir=f"/var/cbt/cbt-{identity}",
        scratch={"vda": f"/var/cbt/cbt-{identity}/vda.qcow2"},
        phase="planned",
        pid=1,
        started=TIME,
    )


def disk(
    identity: str, generation: int, delta: manifest.Delta, parent: Optional[str], lineage: str
) -> manifest.ManifestDisk:
    return manifest.ManifestDisk(
        target="vda",
        mode="incremental" if parent else "full",
        reason=None,
        base=generation - 1 or None,
        parent=parent,
        lineage=lineage,
        capacity=SIZE,
        granularity=65536,
        source=manifest.Source(type="file", path="/é.qcow2", format="qcow2", inode="1:2"),
        serial=None,
        wwn=None,
        delta=delta,
        change_id=names.change_id(lineage, generation, identity),
        dirty_bytes=0,
        data_bytes=0,
        zero_bytes=0,
        read_bytes=0,
        stored_bytes=0,
    )


def record(
    kept: store.DomainStore, wanted: manifest.Intent, generation: int, one: manifest.ManifestDisk
) -> manifest.Manifest:
    return manifest.Manifest(
        id=wanted.id,
        repository=kept.repository.id,
        domain=wanted.domain,
        generation=generation,
        checkpoint=wanted.checkpoint,
        kind="incremental" if one.parent else "full",
        started=TIME,
        frozen_at=TIME,
        finished=TIME,
        host="h",
        uri="qemu:///system",
        tool="0",
        quiesce=manifest.Quiesce(requested="none", result="none", frozen_ms=77.5),
        disks=[one],
        unprotected=[],
        files={},
        warnings=["wärnung \u00e9"],
    )


def content(rows: List[Row], seed: int = 0) -> extents.Extents:
    """CONTENT rows, with a digest that is a function of the row."""
    out = np.zeros(len(rows), extents.CONTENT)
    for i, (offset, length, state) in enumerate(rows):
        digest = blake3.blake3(f"{seed} {offset}".encode()).digest() if state == extents.DATA else bytes(32)
        out[i] = (offset, length, state, np.frombuffer(digest, np.uint8))
    return out


def publish(
    kept: store.DomainStore,
    *,
    rows: Optional[List[Row]] = None,
    lineage: str = LINEAGE,
    name: str = "vm",
    parent: Optional[str] = "newest",
) -> manifest.Manifest:
    """One more generation, with a layer that is no qcow2 but a few bytes."""
    history = kept.generations()
    generation = kept.next_generation()
    below = (history[-1].id if history else None) if parent == "newest" else parent
    wanted = intent(kept, name)
    rows = rows if rows is not None else [(0, extents.GRAIN, extents.DATA)]
    with staging.begun(kept, wanted) as stage:
        delta = stage.deltas("vda")
        delta.append(extents.make([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]))
        digest, count = delta.finish()
        contents = stage.contents("vda")
        contents.append(content(rows, generation))
        with open(stage.layer("vda"), "wb") as file:
            file.write(hashlib.sha256(wanted.id.encode()).digest())
        entry = manifest.LayerEntry(
            file="vda.qcow2", parent=below, contents="vda.contents.npy", digest=contents.finish()[0]
        )
        one = disk(wanted.id, generation, manifest.Delta(digest=digest, extents=count), below, lineage)
        made = record(kept, wanted, generation, one)
        layers: Dict[str, manifest.LayerEntry] = {"vda": entry}
        stage.publish(made, manifest.Layers(backup=wanted.id, disks=layers))
    return made
