"""Rows of restore and verify."""

from __future__ import annotations

import json
import os
import random
import shutil
from typing import List, Tuple

from libvirt_cbt.nbdio import qcow2
from tests.bench import measuring
from tests.bench.backups import BLOCK, GIB, big
from tests.bench.measuring import Effort, Row, Sample, timed
from tests.bench.world import MIB, Guest, World, run, server

DEPTH = 30
VERIFY = 1.3


def chain(world: World) -> Tuple[Guest, str]:
    """A repository with a full backup of the size of row `full` and 29 increments of scattered writes, made once."""
    size, writes = (128 * MIB, 16) if world.quick else (2 * GIB, 128)
    guest = world.guest("chain", {"vda": (size, size * 3 // 4)})
    path = os.path.join(world.folder, "chain")
    if not os.path.exists(path):
        world.init("chain")
        rng = random.Random(2)
        for _ in range(DEPTH):
            world.ours(path, "backup", guest.name)
            guest.write("vda", [n * 4 * BLOCK for n in rng.sample(range(size // BLOCK // 4), writes)], 4 * BLOCK)
    return guest, path


def layers(world: World, repository: str, guest: Guest) -> List[str]:
    """The files, oldest first."""
    found = world.ours(repository, "list", guest.name)["generations"]
    names = [one["id"] for one in sorted(found, key=lambda one: int(one["generation"]))]
    return [os.path.join(repository, guest.uuid, "backups", name, "vda.qcow2") for name in names]


def restore(world: World, effort: Effort) -> List[Row]:
    """Both to a raw file that is safely on the disk at the end."""
    guest, repository = chain(world)
    newest = layers(world, repository, guest)[-1]

    def ours(into: List[Sample]) -> None:
        output = world.new("restored")
        world.ours(repository, "restore", guest.name, "--output", output, into=into)
        shutil.rmtree(output)

    def convert(into: List[Sample]) -> None:
        output = world.new("converted.raw")
        with timed(into):
            run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", newest, output)
            run("sync", output)
        os.unlink(output)

    found = measuring.alternate(effort.rounds, {"ours": ours, "convert": convert})
    what = f"restore of a chain of {DEPTH} to raw, each byte against its digest"
    return [measuring.ratio("restore", what, "qemu-img convert of the same layer, and sync", found, 1.1)]


def verify(world: World, effort: Effort) -> List[Row]:
    """One large layer, and the chain with its many small ones."""
    guest = big(world)
    one = os.path.join(world.folder, "verified")
    if not os.path.exists(one):
        world.init("verified")
        world.ours(one, "backup", guest.name)
        world.forget(guest)
    small, many = chain(world)
    against = "the same bytes read through qemu-nbd, nothing else"
    rows = []
    for name, what, owner, repository in (
        ("verify", "verify of one full backup", guest, one),
        ("verify-chain", f"verify of {DEPTH} layers, one after the other", small, many),
    ):
        files = layers(world, repository, owner)
        sides = {"ours": _verify(world, repository, owner.name), "reading": _reading(world, files)}
        found = measuring.alternate(effort.rounds, sides)
        rows.append(measuring.ratio(name, what, against, found, VERIFY, layers=len(files)))
    return rows


def _verify(world: World, repository: str, name: str) -> measuring.Side:
    def side(into: List[Sample]) -> None:
        found = world.ours(repository, "verify", name, into=into)
        assert not found["damage"]

    return side


def _reading(world: World, files: List[str]) -> measuring.Side:
    """Reads what each layer itself holds (holes are skipped by nbdcopy) and throws it away."""

    def side(into: List[Sample]) -> None:
        with timed(into):
            for file in files:
                socket = world.new("reading.sock")
                node = "json:" + json.dumps(qcow2.alone(file))
                with server(socket, "qemu-nbd", "-r", "-t", "-e", "8", "-k", socket, node):
                    run("nbdcopy", f"nbd+unix:///?socket={socket}", "null:")

    return side
