"""Repositories with real layers and no guest: disks of `conftest.Disk`, backed up by the engine, published by the room."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import libvirt_cbt
from libvirt_cbt import names
from libvirt_cbt.nbdio import copy, lanes, qcow2, server
from libvirt_cbt.repository import manifest, staging, store
from tests.nbd.conftest import Disk, assert_same, run
from tests.nbd.test_chains import history as some_writes
from tests.unit import repository_samples as samples

BEGAN = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)


class History:
    """One domain with some disks; `models` has what each generation held, by id and target."""

    def __init__(self, folder: str, *sizes: int, compress: bool = True, cluster: int = 65536) -> None:
        self.folder, self.compress = folder, compress
        self.repository = store.Repository.init(os.path.join(folder, "repository"))
        self.kept = self.repository.domain(samples.UUID)
        place = os.path.join(folder, "disks")
        os.mkdir(place)
        self.disks = {f"vd{'abcd'[n]}": Disk(place, size, cluster=cluster) for n, size in enumerate(sizes)}
        self.models: Dict[str, Dict[str, bytes]] = {}
        self.layered: Dict[str, List[str]] = {}  # which disks a generation had data of
        self.lineages = {target: names.new_lineage() for target in self.disks}
        self.proofs = folder  # where restores go

    def generation(
        self, *, full: bool = False, mark: bool = False, only: Sequence[str] = (), hours: Optional[float] = None
    ) -> str:
        """Takes one at `hours` after BEGAN; its id.  Disks not in `only` are marks in it."""
        kept, wanted = self.repository.domain(samples.UUID), samples.intent(self.kept)
        past = kept.generations()
        with kept.lock(), staging.begun(kept, wanted) as stage, contextlib.ExitStack() as stack:
            made: List[manifest.ManifestDisk] = []
            entries: Dict[str, manifest.LayerEntry] = {}
            for target, disk in self.disks.items():
                quiet = mark or bool(only and target not in only)
                entry, one = self._disk(kept, stage, stack, wanted.id, target, disk, full=full, mark=quiet)
                made.append(one)
                if entry:
                    entries[target] = entry
            kinds = {d.mode for d in made} - {"mark"}
            time = BEGAN + timedelta(hours=len(past) if hours is None else hours)
            record = samples.record(kept, wanted, kept.next_generation(), made[0]).model_copy(
                update={
                    "disks": made,
                    "kind": "mark" if not kinds else kinds.pop() if len(kinds) == 1 else "mixed",
                    "frozen_at": time.isoformat().replace("+00:00", "Z"),
                }
            )
            stage.publish(record, manifest.Layers(backup=wanted.id, disks=entries))
        for disk in self.disks.values():
            disk.next_bitmap()
        self.models[wanted.id] = {target: bytes(disk.model) for target, disk in self.disks.items()}
        self.layered[wanted.id] = sorted(entries)
        return wanted.id

    def _disk(
        self,
        kept: store.DomainStore,
        stage: staging.Staging,
        stack: contextlib.ExitStack,
        identity: str,
        target: str,
        disk: Disk,
        *,
        full: bool,
        mark: bool,
    ) -> Tuple[Optional[manifest.LayerEntry], manifest.ManifestDisk]:
        past = kept.generations()
        generation = past[-1].generation + 1 if past else 1
        below = kept.newest_backup(past[-1], target) if past else None
        parent = below if not full else None
        how = copy.NOTHING if mark else copy.DIRTY if parent else copy.ALL
        deltas = stage.deltas(target)
        base = generation - 1 or None
        sink = rows = None
        if not mark:
            backing = store.layer_backing(parent.id if parent else None, target)
            qcow2.create_layer(stage.layer(target), disk.size, backing=backing, compress=self.compress)
            rows = stage.contents(target)
        after = parent.generation if parent and not mark else base or 0
        with contextlib.ExitStack() as open_:
            if not mark:
                endpoints = open_.enter_context(server.sink(stage.layer(target), self.folder, compress=self.compress))
                sink = copy.Sink(endpoints, stage.layer(target), has_parent=parent is not None)
            earlier = open_.enter_context(kept.deltas(target, after, base or 0))
            pull = copy.Pull(
                target=target,
                source=open_.enter_context(disk.export()),
                capacity=disk.size,
                bitmap=f"qemu:dirty-bitmap:{disk.bitmap}" if disk.bitmap else None,
                copy=how,
                expected=disk.size,
                sink=sink,
                also=earlier.union,
                delta=deltas.append,
                contents=rows.append if rows else lambda _: None,
            )
            [counts] = copy.pull([pull], lanes.Options(), progress=lambda *_: None, stop=lambda: None)
        digest, number = deltas.finish()
        entry = None
        if rows:
            qcow2.finish_layer(stage.layer(target), disk.size)
            entry = manifest.LayerEntry(
                file=f"{target}.qcow2",
                parent=parent.id if parent else None,
                contents=f"{target}.contents.npy",
                digest=rows.finish()[0],
            )
        one = samples.disk(identity, generation, manifest.Delta(digest=digest, extents=number), None, self.lineages[target])
        update = {
            "target": target,
            "mode": "mark" if mark else "incremental" if parent else "full",
            "parent": parent.id if parent and not mark else None,
            "base": base,
            "capacity": disk.size,
            "data_bytes": counts.data_bytes,
            "dirty_bytes": counts.dirty_bytes,
        }
        return entry, one.model_copy(update=update)

    def write(self, rng: random.Random) -> None:
        for disk in self.disks.values():
            disk.write(*some_writes(rng, disk.size, 512))

    def grow(self, target: str, size: int) -> None:
        disk = self.disks[target]
        run("qemu-img", "resize", "-q", "-f", "qcow2", disk.path, str(size))
        disk.model.extend(bytes(size - disk.size))
        disk.size = size

    # What it is judged by

    @contextlib.contextmanager
    def session(self) -> Iterator[libvirt_cbt.Session]:
        with libvirt_cbt.Session("test:///default", self.repository.path) as session:
            yield session

    def prune(self, **rules: Any) -> Any:
        with self.session() as session:
            return libvirt_cbt.prune(session, samples.UUID, **rules)

    def backups(self) -> List[manifest.Manifest]:
        return [m for m in self.repository.domain(samples.UUID).generations() if m.kind != "mark"]

    def layer(self, identity: str, target: str = "vda", name: str = "") -> str:
        return os.path.join(self.kept.directory(identity), name or f"{target}.qcow2")

    def stored(self, identity: str, target: str = "vda") -> int:
        return os.stat(self.layer(identity, target)).st_blocks * 512

    def prove(self, *, settled: bool = True) -> None:
        """Every backup restores to its model, by this tool and by qemu-img, and `verify` is clean.

        `settled`: no prune is on its way, so nothing else is left either.
        """
        kept = self.repository.domain(samples.UUID)
        raw = os.path.join(self.proofs, "proof.raw")
        with self.session() as session:
            verified = libvirt_cbt.verify(session, samples.UUID)
            assert verified.damage == []
            for made in kept.generations():
                for disk in made.disks:
                    if disk.mode == "mark":
                        continue
                    model = self.models[made.id][disk.target]
                    output = os.path.join(self.proofs, "proof")
                    libvirt_cbt.restore(session, samples.UUID, output, at=made.id, disks=[disk.target])
                    path = os.path.join(output, f"{disk.target}.raw")
                    assert_same(Path(path).read_bytes(), model, f"generation {made.generation} {disk.target}")
                    os.unlink(path)
                    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", self.layer(made.id, disk.target), raw)
                    found = Path(raw).read_bytes()
                    if not settled:  # a layer may be in whole grains for a moment
                        assert not any(found[len(model) :]) and len(found) - len(model) < 65536
                        found = found[: len(model)]
                    assert_same(found, model, f"generation {made.generation} {disk.target} through qemu-img")
                    if settled:
                        run("qemu-img", "check", "-q", "-f", "qcow2", self.layer(made.id, disk.target))
        if settled:
            self.nothing_left()

    def nothing_left(self) -> None:
        kept = self.repository.domain(samples.UUID)
        notes = {"removed", "verified.json", "checked.json", "outcomes.json"}
        found = sorted(set(os.listdir(kept.path)) - notes)
        assert found == ["backups", "lock", "reserve", "staging"], found
        assert not os.path.isdir(os.path.join(kept.path, "removed")) or os.listdir(os.path.join(kept.path, "removed")) == []
        for made in kept.generations():
            layers = kept.layers(made.id)
            assert layers.below == {}
            wanted = {"manifest.json", "layers.json", *(f"{d.target}.delta.npy" for d in made.disks)}
            wanted |= {name for e in layers.disks.values() for name in (e.file, e.contents)}
            assert set(os.listdir(kept.directory(made.id))) - {"protected"} == wanted
            for name in wanted:
                assert os.stat(self.layer(made.id, name=name)).st_mode & 0o077 == 0
                assert os.stat(self.layer(made.id, name=name)).st_nlink == 1

    def files(self, identity: str) -> Dict[str, Tuple[int, int, bytes]]:
        """Inode, modification time and content of every file of a backup."""
        folder = self.kept.directory(identity)
        found = {}
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            found[name] = (os.stat(path).st_ino, os.stat(path).st_mtime_ns, Path(path).read_bytes())
        return found


def tmpfs(path: str, size: str) -> contextlib.AbstractContextManager[None]:
    """A small file system of its own at `path`; needs root."""

    @contextlib.contextmanager
    def mounted() -> Iterator[None]:
        os.makedirs(path, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", path], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", path], check=True)

    return mounted()


def dense(rng: random.Random, length: int) -> bytes:
    """Bytes that do not compress."""
    return rng.randbytes(length)


def thin(rng: random.Random, length: int) -> bytes:
    """Text, which compresses to a few percent."""
    lines = (b"%d rows of table %x were written\n" % (rng.randrange(9999), rng.getrandbits(16)) for _ in range(length // 30))
    return b"".join(lines).ljust(length, b"\n")[:length]


def fill(
    history: History,
    rng: random.Random,
    target: str,
    offset: int,
    length: int,
    content: Callable[[random.Random, int], bytes] = dense,
) -> None:
    disk = history.disks[target]
    raw = os.path.join(history.folder, "fill.raw")
    Path(raw).write_bytes(content(rng, length))
    run("qemu-io", "-f", "qcow2", "-c", f"write -q -s {raw} {offset} {length}", disk.path)
    disk.model[offset : offset + length] = Path(raw).read_bytes()


def flood(place: str) -> None:
    """Takes the last byte."""
    with contextlib.suppress(OSError), open(os.path.join(place, "flood"), "wb", buffering=0) as file:
        while True:
            file.write(bytes(65536))
    with contextlib.suppress(OSError), open(os.path.join(place, "drops"), "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)


def drain(place: str) -> None:
    for name in ("flood", "drops"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(place, name))
