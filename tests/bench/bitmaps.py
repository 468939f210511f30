"""Rows of the engine alone: a dirty bitmap with very many extents, read over NBD."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List

import numpy as np

from libvirt_cbt import extents
from libvirt_cbt.nbdio import bitmapfile
from tests.bench import measuring
from tests.bench.backups import BLOCK
from tests.bench.measuring import MB, Effort, Row, Sample
from tests.bench.world import World, server

PAGE = 1 << 16

# A process that does what `mark` does with the delta, and nothing else.
PROGRAM = """
import json, sys, time
from libvirt_cbt import extents
from libvirt_cbt.nbdio import copy, lanes, server
found = [0]
def delta(rows):
    found[0] += len(rows)
one = copy.Pull(
    target="vda", source=server.Endpoint(sys.argv[1], ""), capacity=int(sys.argv[2]),
    bitmap="qemu:dirty-bitmap:many", copy=copy.NOTHING, expected=0, sink=None,
    also=lambda low, high: extents.empty(), delta=delta, contents=lambda rows: None,
)
begun, busy = time.perf_counter(), time.process_time()
copy.pull([one], lanes.Options(), progress=lambda *_: None, stop=lambda: None)
took = time.perf_counter() - begun, time.process_time() - busy
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
print(json.dumps({"extents": found[0], "seconds": took[0], "cpu": took[1], "peak": peak}))
"""


def pages(count: int) -> Iterator[extents.Extents]:
    """Every other block of 64 KiB is dirty."""
    for first in range(0, count, PAGE):
        numbers = np.arange(first, min(first + PAGE, count), dtype=np.uint64)
        yield extents.make(numbers * np.uint64(2 * BLOCK), BLOCK, extents.DATA)


@contextmanager
def served(world: World, count: int) -> Iterator[str]:
    """The socket of a server that offers a bitmap of `count` extents, over an image without data."""
    image, socket = world.new(f"many-{count}.qcow2"), world.new(f"many-{count}.sock")
    bitmapfile.write(image, "many", 2 * BLOCK * count, lambda: pages(count))
    try:
        with server(socket, "qemu-nbd", "-r", "-t", "-e", "2", "-B", "many", "-f", "qcow2", "-k", socket, image):
            yield socket
    finally:
        os.unlink(image)


def many(world: World) -> int:
    return 400_000 if world.quick else 4_000_000


def bitmap_extents(world: World, effort: Effort) -> List[Row]:
    """Seconds of the process that reads; the time per extent beside that of a hundredth."""
    large = many(world)
    small = large // 100
    peaks: Dict[int, List[float]] = {large: [], small: []}
    with served(world, large) as there, served(world, small) as here:

        def side(count: int, socket: str) -> measuring.Side:
            def taken(into: List[Sample]) -> None:
                # A hundredth is over in milliseconds: as often as it takes to be a time at all.
                runs = [_read(count, socket) for _ in range(1 if count == large else 10)]
                peaks[count].append(max(run["peak"] for run in runs) / MB)
                each = sorted(runs, key=lambda run: float(run["seconds"]))[len(runs) // 2]
                into.append(Sample(each["seconds"] / count * 1e6, each["cpu"] / count * 1e6))

            return taken

        sides = {f"{large}": side(large, there), f"{small}": side(small, here)}
        found = measuring.alternate(effort.rounds, sides)
    what = f"dirty bitmap of {large} extents read over NBD"
    seconds = [sample.seconds * large / 1e6 for sample in found[f"{large}"]]
    cpu = sorted(sample.cpu * large / 1e6 for sample in found[f"{large}"])
    return [
        measuring.ratio("extents", what + ", time per extent", f"that of {small}", found, 1.3),
        measuring.plain("extents-seconds", what, "s", seconds, 2.0, cpu_seconds=round(cpu[len(cpu) // 2], 3)),
        measuring.plain("extents-memory", what + ", peak of the reader", "MB", peaks[large], 150),
    ]


def _read(count: int, socket: str) -> Any:
    argv = [sys.executable, "-c", PROGRAM, socket, str(2 * BLOCK * count)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    found = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True, env=environment).stdout)
    assert found["extents"] == count
    return found
