"""Real servers, and disks whose every byte is known.

A `Disk` is a qcow2 image with a persistent bitmap, written by qemu-io, beside
the bytes it must read as.  A `Chain` backs it up into layers and restores them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import pytest

from libvirt_cbt import extents, machines
from libvirt_cbt.nbdio import check, copy, lanes, qcow2, server

MIB = 1 << 20
NOISE = random.Random(1).randbytes(MIB)  # does not compress
Bytes = Union[bytes, bytearray]
TOOLS = ("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon", "nbdkit")


@pytest.fixture(autouse=True, scope="session")
def _tools() -> None:
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing and not os.environ.get("CI"):
        pytest.skip(f"not installed: {', '.join(missing)}")
    assert not missing


@pytest.fixture
def folder() -> Iterator[str]:
    """A short path: a socket's has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="nbd-") as path:
        yield path


def run(*argv: str) -> str:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def json_node(path: str) -> str:
    return "json:" + json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": path}})


def nothing(*_: Any) -> None:
    pass


def none_also(_low: int, _high: int) -> extents.Extents:
    return extents.empty()


@contextlib.contextmanager
def served(argv: Sequence[str], path: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that listens on `path`; ended by its own process id, also when it is stopped."""
    process = subprocess.Popen([*argv], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None, f"{argv} ended"
            assert time.monotonic() < deadline
            if machines.greets(path, 1):  # a socket listens before the image is open, and locked
                break
            time.sleep(0.005)
        yield process
    finally:
        deadline = time.monotonic() + 30
        while process.poll() is None:
            assert time.monotonic() < deadline, f"{argv} does not end"
            process.send_signal(signal.SIGCONT)
            process.terminate()  # again and again: qemu-nbd ignores one that comes before its main loop
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)


@contextlib.contextmanager
def nbdkit(folder: str, *argv: str) -> Iterator[server.Endpoint]:
    path = os.path.join(folder, f"nbdkit-{len(os.listdir(folder))}.sock")
    with served(["nbdkit", "--foreground", "--newstyle", "--unix", path, *argv], path):
        yield server.Endpoint(path, "")


class Disk:
    def __init__(self, folder: str, size: int, *, cluster: int = 65536, granularity: Optional[int] = None) -> None:
        self.folder, self.size, self.cluster, self.granularity = folder, size, cluster, granularity
        self.path = os.path.join(folder, f"disk-{len(os.listdir(folder))}.qcow2")
        self.model = bytearray(size)
        self.bitmap: Optional[str] = None
        self._number = 0
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", self.path, str(size))

    def fill(self, content: bytes) -> None:
        """Begins with this content, unallocated wherever 512 bytes are zero."""
        raw = self.path + ".raw"
        Path(raw).write_bytes(content)
        argv = ["qemu-img", "convert", "-S", "512", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={self.cluster}"]
        run(*argv, raw, self.path)
        os.unlink(raw)
        self.model = bytearray(content)

    def next_bitmap(self) -> None:
        """A generation has been taken: from here on a new bitmap counts."""
        old, self._number = self.bitmap, self._number + 1
        self.bitmap = f"b{self._number}"
        grain = ["-g", str(self.granularity)] if self.granularity else []
        run("qemu-img", "bitmap", "-f", "qcow2", "--add", *grain, self.path, self.bitmap)
        if old:
            run("qemu-img", "bitmap", "-f", "qcow2", "--remove", self.path, old)

    def write(self, *writes: Tuple[str, int, int, int]) -> None:
        """(kind, offset, length, byte) each; kinds: write, noise (random bytes), zero, unmap (zero, may deallocate), discard."""
        noise = os.path.join(self.folder, "noise")
        Path(noise).write_bytes(NOISE)
        options = {"write": "write -P {b}", "noise": f"write -s {noise}", "zero": "write -z", "unmap": "write -z -u"}
        lines = [f"{options.get(kind, kind).format(b=b)} {offset} {length}" for kind, offset, length, b in writes]
        argv = [x for line in lines for x in ("-c", line)]
        run("qemu-io", "-d", "unmap", "-f", "qcow2", *argv, self.path)
        for kind, offset, length, byte in writes:
            low, high = offset, offset + length
            if kind == "discard":  # qcow2 drops whole clusters only
                low = -(-low // self.cluster) * self.cluster
                high = high if high == self.size else high // self.cluster * self.cluster
            if kind == "noise":
                self.model[low:high] = (NOISE * (1 + length // len(NOISE)))[:length]
            else:
                self.model[low:high] = bytes([byte if kind == "write" else 0]) * max(high - low, 0)

    def check_model(self) -> None:
        raw = self.path + ".raw"
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", self.path, raw)
        assert_same(Path(raw).read_bytes(), self.model, "the image itself")
        os.unlink(raw)

    @contextlib.contextmanager
    def export(self) -> Iterator[server.Endpoint]:
        """As a fleecing point shows it: read-only, with the bitmap."""
        path = os.path.join(self.folder, f"source-{len(os.listdir(self.folder))}.sock")
        bitmap = ["-B", self.bitmap] if self.bitmap else []
        argv = ["qemu-nbd", "-r", "-t", "-e", "8", "-x", "disk", *bitmap, "-f", "qcow2", "-k", path, self.path]
        with served(argv, path):
            yield server.Endpoint(path, "disk")


@dataclass(frozen=True)
class Layer:
    path: str
    contents: extents.Extents
    delta: extents.Extents
    pulled: copy.Pulled
    model: bytes


class Chain:
    """Layers of one disk, oldest first."""

    def __init__(self, folder: str, options: Optional[lanes.Options] = None, *, compress: bool = True) -> None:
        self.folder, self.options, self.compress = folder, options or lanes.Options(), compress
        self.layers: List[Layer] = []

    def backup(
        self,
        source: server.Endpoint,
        model: Bytes,
        bitmap: Optional[str],
        *,
        also: Any = none_also,
        extra_dirty: Any = none_also,
        stop: Any = nothing,
        progress: Any = nothing,
    ) -> Layer:
        size, parent = len(model), self.layers[-1].path if self.layers else None
        path = os.path.join(self.folder, f"layer{len(self.layers)}.qcow2")
        qcow2.create_layer(path, size, backing=parent and os.path.basename(parent), compress=self.compress)
        deltas: List[extents.Extents] = [extents.empty()]
        rows: List[extents.Extents] = [np.empty(0, extents.CONTENT)]
        with server.sink(path, self.folder, compress=self.compress) as endpoints:
            one = copy.Pull(
                target="vda",
                source=source,
                capacity=size,
                bitmap=bitmap and f"qemu:dirty-bitmap:{bitmap}",
                copy=copy.DIRTY if parent else copy.ALL,
                expected=size,
                sink=copy.Sink(endpoints, path, bool(parent)),
                also=also,
                delta=deltas.append,
                contents=rows.append,
                extra_dirty=extra_dirty,
            )
            [pulled] = copy.pull([one], self.options, progress=progress, stop=stop)
        qcow2.finish_layer(path, size)
        layer = Layer(path, np.concatenate(rows), np.concatenate(deltas), pulled, bytes(model))
        self.layers.append(layer)
        judge(layer)
        return layer

    def reads(self, newest: int) -> Iterator[check.Read]:
        """What shows of every layer, found the slow and plain way: one number for each grain of the disk."""
        chain = self.layers[newest::-1]
        size = len(chain[0].model)
        shown: Dict[int, Tuple[int, int]] = {}
        for number, layer in enumerate(chain):
            for row, (offset, length, state, _) in enumerate(layer.contents.tolist()):
                for grain in range(offset // extents.GRAIN, -(-(offset + length) // extents.GRAIN)):
                    shown.setdefault(grain, (number, row if state == extents.DATA else -1))
        for number, layer in enumerate(chain):
            for row, (offset, length, state, _) in enumerate(layer.contents.tolist()):
                grains = range(offset // extents.GRAIN, -(-(offset + length) // extents.GRAIN))
                keep = [g * extents.GRAIN for g in grains if shown[g] == (number, row)]
                if state == extents.DATA and keep:
                    pieces = tuple((o, min(extents.GRAIN, offset + length - o, size - o)) for o in keep)
                    yield check.Read(number, offset, length, layer.contents["digest"][row].tobytes(), pieces)

    def restore(self, newest: int, damaged: Any = None) -> bytes:
        """The bytes of the disk as restored through check(), each layer opened alone."""
        path = os.path.join(self.folder, "restored.raw")
        model = self.layers[newest].model
        damaged = damaged or (lambda read, reason: pytest.fail(f"{read}: {reason}"))
        with server.layers([x.path for x in self.layers[newest::-1]], self.folder) as sources, open(path, "w+b") as out:
            out.truncate(len(model))
            output = check.Output(path, fd=out.fileno())
            check.check(
                "vda",
                sources,
                self.reads(newest),
                output,
                self.options,
                damaged=damaged,
                progress=nothing,
                stop=nothing,
            )
        return Path(path).read_bytes()

    def prove(self) -> None:
        """Every layer is restored, and converted by qemu-img alone, and both are the bytes of its moment."""
        for number, layer in enumerate(self.layers):
            assert_same(self.restore(number), layer.model, f"restore of layer {number}")
            converted = os.path.join(self.folder, "converted.raw")
            run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", layer.path, converted)
            assert_same(Path(converted).read_bytes(), layer.model, f"layer {number} through qemu-img")
            run("qemu-img", "check", "-q", "-f", "qcow2", layer.path)


def judge(layer: Layer) -> None:
    """What holds of every backup's arrays, whatever the disk."""
    model, capacity = layer.model, len(layer.model)
    assert extents.check(layer.delta, capacity) == ""
    assert len(extents.coalesce(layer.delta)) == len(layer.delta), "runs are joined, also across windows"
    for offset, length, state in layer.delta.tolist():
        if state == extents.ZERO:
            assert not any(model[offset : offset + length]), f"the delta says zero at {offset}+{length}"
    plain = extents.make(layer.contents["offset"], layer.contents["length"], layer.contents["state"])
    assert extents.check(plain, capacity) == ""
    import blake3

    for offset, length, state, digest in layer.contents.tolist():
        assert offset % extents.GRAIN == 0
        assert length % extents.GRAIN == 0 or offset + length == capacity
        if state == extents.DATA:
            assert length <= MIB
            assert bytes(digest) == blake3.blake3(model[offset : offset + length]).digest()
        else:
            assert not any(digest)
            assert not any(model[offset : offset + length])
    assert layer.pulled.dirty_bytes == extents.total(layer.delta)
    assert layer.pulled.data_bytes == layer.pulled.read_bytes == extents.total(plain, extents.DATA)
    assert layer.pulled.zero_bytes == extents.total(plain, extents.ZERO)


def assert_same(found: Bytes, wanted: Bytes, what: str) -> None:
    """Names the first difference: pytest's own comparison of megabytes takes minutes."""
    assert len(found) == len(wanted), f"{what}: {len(found)} bytes, {len(wanted)} wanted"
    if found != wanted:
        where = int(np.flatnonzero(np.frombuffer(found, np.uint8) != np.frombuffer(wanted, np.uint8))[0])
        pytest.fail(f"{what}: differs at {where}: {found[where]:#x} where {wanted[where]:#x} was wanted")


def runs(array: extents.Extents) -> List[Tuple[int, int, int]]:
    return [(int(o), int(n), int(s)) for o, n, s in zip(array["offset"], array["length"], array["state"])]
