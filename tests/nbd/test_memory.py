"""Memory does not follow the size of the disk, nor how finely it is cut up."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.nbd.conftest import MIB, nbdkit, run, served

TIB = 1 << 40

PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from libvirt_cbt import extents
from libvirt_cbt.nbdio import copy, lanes, server

path, export, size, bitmap = sys.argv[1:5]
found = [0, 0]

def delta(rows):
    found[0] += len(rows)
    found[1] += extents.total(rows)

one = copy.Pull(
    target="vda", source=server.Endpoint(path, export), capacity=int(size), bitmap=bitmap or None, copy=copy.NOTHING,
    expected=0, sink=None, also=lambda low, high: extents.empty(), delta=delta, contents=lambda rows: None,
)
copy.pull([one], lanes.Options(), progress=lambda *_: None, stop=lambda: None)
peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
print(*found, int(peak.split()[1]) * 1024)
"""


def measure(path: str, export: str, size: int, bitmap: str = "") -> tuple[int, int, int]:
    """Extents of the delta, their bytes, and the peak of resident memory of a process that does nothing else."""
    argv = [sys.executable, "-c", PROGRAM, path, export, str(size), bitmap and f"qemu:dirty-bitmap:{bitmap}"]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=120)
    count, total, peak = map(int, done.stdout.split())
    return count, total, peak


def test_a_sparse_disk_of_a_tebibyte(folder: str) -> None:
    peaks = []
    for size in (1 << 30, TIB):
        disk, path = f"{folder}/disk-{size}.qcow2", f"{folder}/{size}.sock"
        run("qemu-img", "create", "-q", "-f", "qcow2", disk, str(size))
        run("qemu-img", "bitmap", "--add", "-f", "qcow2", "-g", "65536", disk, "b")
        writes = [x for n in range(8) for x in ("-c", f"write -P 1 {n * (size // 8)} 128k")]
        run("qemu-io", "-f", "qcow2", *writes, "-c", f"write -z {size - 200 * 65536} 6400k", disk)
        with served(["qemu-nbd", "-r", "-t", "-e", "2", "-B", "b", "-f", "qcow2", "-k", path, disk], path):
            count, total, peak = measure(path, "", size, "b")
        assert (count, total) == (8 + 1, 8 * 131072 + 100 * 65536)
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 8 * MIB


@pytest.mark.fault(30, 50)
def test_a_million_fragments(folder: str) -> None:
    """Ten bytes of memory for each would show; so would the Python objects of more than one reply."""
    size = 1 << 36
    with nbdkit(folder, "memory", "size=1M") as plain:
        _, _, small = measure(plain.socket, "", MIB)
    extent = f"{folder}/extents"
    with open(extent, "w", encoding="ascii") as file:
        file.writelines(f"{n * 131072} 65536 hole,zero\n{n * 131072 + 65536} 65536\n" for n in range(500_000))
    with nbdkit(folder, "memory", f"size={size}", "--filter=extentlist", f"extentlist={extent}") as source:
        count, total, peak = measure(source.socket, "", size)
    assert (count, total) == (500_000, 500_000 * 65536)
    assert peak < small + 48 * MIB
