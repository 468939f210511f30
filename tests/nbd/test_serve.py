"""A backup shown to others: the bytes, the delta as a dirty bitmap, and a socket that is nobody else's."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import pytest

from libvirt_cbt import errors, extents
from libvirt_cbt.nbdio import bitmapfile, serving
from tests import patience
from tests.nbd.conftest import MIB, Chain, Disk, assert_same, nothing, run

GIB = 1 << 30
Range = Tuple[int, int]


def rows(ranges: Sequence[Range]) -> extents.Extents:
    return extents.make([low for low, _ in ranges], [high - low for low, high in ranges], extents.DATA)


def pages(ranges: Sequence[Range], size: int = 1000) -> bitmapfile.Pages:
    def again() -> Iterator[extents.Extents]:
        for first in range(0, len(ranges), size):
            yield rows(ranges[first : first + size])

    return again


def rounded(ranges: Sequence[Range], grain: int, capacity: int) -> List[Range]:
    """What a bitmap of this granularity says of them, neighbours joined."""
    out: List[Range] = []
    for first, last in ranges:
        low, high = first // grain * grain, min(-(-last // grain) * grain, capacity)
        if out and low <= out[-1][1]:
            out[-1] = (out[-1][0], max(high, out[-1][1]))
        else:
            out.append((low, high))
    return out


def mapped(uri: str, bitmap: str) -> List[Range]:
    """The dirty ranges as nbdinfo shows them."""
    entries = json.loads(run("nbdinfo", f"--map=qemu:dirty-bitmap:{bitmap}", "--json", uri))
    dirty = [(e["offset"], e["offset"] + e["length"]) for e in entries if e["type"] == 1]
    assert all(e["type"] in (0, 1) for e in entries)
    return rounded(dirty, 1, 1 << 62)  # a server may cut a run where it likes


def copied(uri: str, folder: str) -> bytes:
    path = os.path.join(folder, "copied.raw")
    Path(path).unlink(missing_ok=True)
    run("nbdcopy", uri, path)
    return Path(path).read_bytes()


def empty_layer(folder: str, capacity: int) -> str:
    path = os.path.join(folder, f"layer-{len(os.listdir(folder))}.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(capacity))
    return path


def random_ranges(rng: random.Random, capacity: int, unit: int, count: int) -> List[Range]:
    """Ordered, disjoint, possibly touching; ends are multiples of `unit` or the disk's end."""
    marks = sorted(rng.sample(range(-(-capacity // unit) + 1), min(2 * count, capacity // unit)))
    return [(a * unit, min(b * unit, capacity)) for a, b in zip(marks[::2], marks[1::2]) if a * unit < capacity]


# The bitmap.


def test_a_bitmap_says_exactly_what_the_extents_do(folder: str, rng: random.Random) -> None:
    for _ in range(15):
        unit = 512 << rng.randrange(8)
        capacity = 512 * rng.randrange(1, 4 * MIB // 512 + 1) + rng.choice((0, 0, 5 * GIB))
        ranges = random_ranges(rng, capacity, unit, rng.choice((0, 1, 3, 40)))
        ranges += [(capacity - capacity % unit, capacity)] * (capacity % unit > 0 and not ranges)
        layer, where = empty_layer(folder, capacity), os.path.join(folder, "s")
        export = serving.Export("vda", [layer], capacity, "since-3", pages(ranges, rng.randrange(1, 9)))
        with serving.serving([export], where, nothing) as found:
            [shown] = found.shown
            assert mapped(shown.uri, "since-3") == rounded(ranges, 1, capacity)
            assert shown.dirty_bytes == sum(high - low for low, high in ranges)
            assert shown.granularity is not None and 512 <= shown.granularity <= 65536


def test_a_bitmap_is_a_superset_where_it_cannot_be_exact(
    folder: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitmapfile, "MOST_BITS", 64)
    capacity = 8 * MIB + 512
    ranges = random_ranges(rng, capacity, 512, 20)
    export = serving.Export("vda", [empty_layer(folder, capacity)], capacity, "since-3", pages(ranges))
    with serving.serving([export], os.path.join(folder, "s"), nothing) as found:
        assert found.shown[0].granularity == 262144
        assert mapped(found.shown[0].uri, "since-3") == rounded(ranges, 262144, capacity)
        assert found.shown[0].dirty_bytes == sum(b - a for a, b in rounded(ranges, 262144, capacity))


@pytest.mark.parametrize("name", ["a", "since-3", "x" * 500])
@pytest.mark.parametrize("capacity", [512, 65536 * bitmapfile.BITS, 3 * 65536 * bitmapfile.BITS + 512, 1 << 44])
def test_the_image_of_a_bitmap_is_a_sound_qcow2(folder: str, capacity: int, name: str) -> None:
    path = os.path.join(folder, "bitmap")
    ranges = [(0, capacity // 2 + 512)] if capacity > 512 else [(0, 512)]
    grain, _ = bitmapfile.write(path, name, capacity, pages(ranges))
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    found = json.loads(run("qemu-img", "check", "-f", "qcow2", "--output=json", path))
    assert found["check-errors"] == 0 and "leaks" not in found and "corruptions" not in found
    info = json.loads(run("qemu-img", "info", "-f", "qcow2", "--output=json", path))
    assert info["virtual-size"] == capacity and "backing-filename" not in info
    assert info["format-specific"]["data"]["bitmaps"] == [{"flags": [], "name": name, "granularity": grain}]
    with pytest.raises(FileExistsError):
        bitmapfile.write(path, name, capacity, pages(ranges))


def test_a_million_scattered_extents(folder: str, rng: random.Random) -> None:
    capacity, count = 1 << 40, 1_000_000
    blocks = np.sort(np.array(rng.sample(range(capacity // 131072), count), np.uint64)) * np.uint64(131072)

    def delta() -> Iterator[extents.Extents]:
        for part in np.array_split(blocks, 100):
            yield extents.make(part, np.uint64(65536), extents.DATA)

    export = serving.Export("vda", [empty_layer(folder, capacity)], capacity, "since-3", delta)
    watch = patience.Stopwatch()
    with serving.serving([export], os.path.join(folder, "s"), nothing) as found:
        # A request for each would take half a minute; this took 0.1 s.
        assert watch.seconds() < 15
        assert found.shown[0].dirty_bytes == count * 65536
        dirty = mapped(found.shown[0].uri, "since-3")
    assert np.array_equal(np.array([low for low, _ in dirty], np.uint64), blocks)
    assert all(high - low == 65536 for low, high in dirty)


# The bytes.


def history(folder: str, rng: random.Random) -> Tuple[Chain, List[int]]:
    """Four generations of a disk that grows between them; no size is a multiple of 64 KiB."""
    disk, chain, sizes = Disk(folder, 2 * MIB + 512), Chain(folder), []
    disk.write(("write", 0, disk.size, 0xFE))
    for generation in range(4):
        if generation:
            for _ in range(4):
                at = 512 * rng.randrange(disk.size // 512 - 200)
                kind = rng.choice(("write", "zero", "unmap"))
                disk.write((kind, at, 512 * rng.randrange(1, 200), generation))
        with disk.export() as source:
            chain.backup(source, disk.model, disk.bitmap if generation else None)
        sizes.append(disk.size)
        if generation < 3:
            disk.size += rng.choice((0, 512, 3 * 65536 + 1024))
            run("qemu-img", "resize", "-q", "-f", "qcow2", disk.path, str(disk.size))
            disk.model.extend(bytes(disk.size - len(disk.model)))
            disk.next_bitmap()
    return chain, sizes


def test_every_backup_of_a_chain_at_once_reads_as_it_was(folder: str, rng: random.Random) -> None:
    chain, sizes = history(folder, rng)
    paths = [layer.path for layer in chain.layers]
    exports = [
        serving.Export(f"at{n}", paths[n::-1], sizes[n], f"b{n}", pages([(0, 512)])) if n % 2 else
        serving.Export(f"at{n}", paths[n::-1], sizes[n])
        for n in range(4)
    ]  # fmt: skip
    with serving.serving(exports, os.path.join(folder, "s"), nothing) as found:
        for layer, shown in zip(chain.layers, found.shown):
            assert_same(copied(shown.uri, folder), layer.model, shown.export.name)
            raw = os.path.join(folder, "converted.raw")
            run("qemu-img", "convert", "-f", "raw", "-O", "raw", shown.uri, raw)
            assert_same(Path(raw).read_bytes(), layer.model, f"{shown.export.name} through qemu-img")
            info = json.loads(run("nbdinfo", "--json", shown.uri))["exports"][0]
            assert info["is_read_only"] and info["can_multi_conn"] and info["export-size"] == len(layer.model)


def test_names_in_headers_are_not_followed(folder: str) -> None:
    secret = os.path.join(folder, "secret")
    Path(secret).write_bytes(b"s" * 65536)
    layer = os.path.join(folder, "layer.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", layer, "65536")
    with serving.serving([serving.Export("vda", [layer], 65536)], os.path.join(folder, "s"), nothing) as found:
        assert copied(found.shown[0].uri, folder) == bytes(65536)


# What is damaged.


def _bad_magic(path: str) -> None:
    with open(path, "r+b") as file:
        file.write(b"\0\0\0\0")


def _bad_table(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(40)
        file.write(struct.pack(">Q", 12345))  # an L1 table that is not aligned


def _other_size(path: str) -> None:
    run("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", path, str(MIB - 512))


@pytest.mark.parametrize("bitmap", [None, "since-1"])
@pytest.mark.parametrize("damage", [_bad_magic, _bad_table, _other_size, os.unlink])
def test_a_damaged_layer_is_named(folder: str, damage: Any, bitmap: Optional[str]) -> None:
    layers = [empty_layer(folder, MIB) for _ in range(3)]
    damage(layers[0])
    export = serving.Export("vda", layers, MIB, bitmap, pages([(0, 512)]))
    with pytest.raises(errors.Damaged) as raised, serving.serving([export], f"{folder}/s", nothing):
        pass
    assert raised.value.facts["path"] == layers[0]
    assert not [name for name in os.listdir(folder) if not name.startswith("layer")]


# The socket.


@pytest.fixture
def export(folder: str) -> serving.Export:
    return serving.Export("vda", [empty_layer(folder, MIB)], MIB, "since-3", pages([(0, 512)]))


@pytest.fixture
def place(folder: str) -> str:
    """An empty folder."""
    path = os.path.join(folder, "place")
    os.mkdir(path, 0o755)
    return path


def test_the_socket_is_for_its_owner_and_goes(place: str, export: serving.Export) -> None:
    before, umask = os.stat(place), os.umask(0)
    try:
        with serving.serving([export], f"{place}/s", nothing):
            assert os.listdir(place) == ["s"]
            status = os.lstat(f"{place}/s")
            assert stat.S_ISSOCK(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600
            assert status.st_nlink == 1
    finally:
        os.umask(umask)
    assert os.listdir(place) == []
    assert os.stat(place).st_mode == before.st_mode


@pytest.mark.parametrize("kind", ["file", "socket", "link", "folder"])
def test_nothing_is_ever_replaced(place: str, export: serving.Export, kind: str) -> None:
    path = f"{place}/s"
    with socket.socket(socket.AF_UNIX) as other:
        _make(kind, path, other)
        before = os.lstat(path)
        with pytest.raises(errors.OutputFailed, match="exists already") as raised:
            serving.serving([export], path, nothing).__enter__()
        assert raised.value.code == 15
        # The same when it comes while the server starts.
        os.rename(path, f"{place}/aside")
        late = serving.Export("vda", export.layers, MIB, "b", lambda: _appears(f"{place}/aside", path))
        with pytest.raises(errors.OutputFailed, match="exists already"):
            serving.serving([late], path, nothing).__enter__()
        assert os.path.samestat(before, os.lstat(path)) and os.listdir(place) == ["s"]


def _make(kind: str, path: str, other: socket.socket) -> None:
    if kind == "file":
        Path(path).write_bytes(b"mine")
    elif kind == "socket":
        other.bind(path)
    elif kind == "link":
        os.symlink("nowhere", path)
    else:
        os.mkdir(path)


def _appears(source: str, path: str) -> Iterator[extents.Extents]:
    if os.path.lexists(source):
        os.rename(source, path)
    yield rows([(0, 512)])


def test_what_took_the_place_of_the_socket_stays(place: str, export: serving.Export) -> None:
    with serving.serving([export], f"{place}/s", nothing):
        os.unlink(f"{place}/s")
        Path(f"{place}/s").write_bytes(b"mine")
    assert Path(f"{place}/s").read_bytes() == b"mine"


def test_a_path_that_cannot_be_is_a_sentence(place: str, export: serving.Export) -> None:
    folder = os.path.join(place, "x" * 60)
    for path, kind in [
        (f"{place}/{'x' * 100}", errors.Usage),
        (f"{place}/{'x' * (serving.LONGEST_FOLDER - len(place))}/s", errors.Usage),
        (f"{folder}/s", errors.OutputFailed),
    ]:
        with pytest.raises(kind):
            serving.serving([export], path, nothing).__enter__()
    os.mkdir(folder)
    with serving.serving([export], f"{folder}/{'s' * (106 - len(folder))}", nothing) as found:
        assert mapped(found.shown[0].uri, "since-3") == [(0, 512)]
    assert os.listdir(place) == [os.path.basename(folder)] and os.listdir(folder) == []


def test_a_path_of_odd_characters_is_quoted(place: str, export: serving.Export) -> None:
    path = f"{place}/a b,c=?&%é'$(x)"
    with serving.serving([export], path, nothing) as found:
        assert mapped(found.shown[0].uri, "since-3") == [(0, 512)]
    assert os.listdir(place) == []


# The end.


def children(parent: int) -> Dict[int, str]:
    """Name by process id; what runs, not what waits to be buried."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        name, rest = fields[fields.index("(") + 1 : fields.rindex(")")], fields[fields.rindex(")") + 2 :].split()
        if int(rest[1]) == parent and rest[0] != "Z":
            found[int(entry)] = name
    return found


def test_a_server_that_dies_is_noticed(place: str, export: serving.Export) -> None:
    before = children(os.getpid())

    def serve() -> None:
        with serving.serving([export], f"{place}/s", nothing) as found:
            own = children(os.getpid())
            [daemon] = [p for p, name in own.items() if p not in before and name.startswith("qemu-")]
            os.kill(daemon, signal.SIGKILL)
            found.wait(nothing)

    with pytest.raises(errors.ToolFailed, match="ended while") as raised:
        serve()
    assert raised.value.code == 20
    assert os.listdir(place) == []
    assert children(os.getpid()) == before


class Enough(Exception):
    pass


def test_stop_ends_the_wait_and_the_start(place: str, export: serving.Export) -> None:
    def stop() -> None:
        raise Enough

    with pytest.raises(Enough), serving.serving([export], f"{place}/s", nothing) as found:
        found.wait(stop)
    with pytest.raises(Enough):
        serving.serving([export], f"{place}/s", stop).__enter__()
    assert os.listdir(place) == []


PROGRAM = """
import sys, time
from libvirt_cbt import extents
from libvirt_cbt.nbdio import serving
def delta():
    if sys.argv[3] == "starting":
        print("starting", flush=True)
        time.sleep(60)
    yield extents.make([0], [512], extents.DATA)
with serving.serving([serving.Export("vda", [sys.argv[1]], 1 << 20, "b", delta)], sys.argv[2], lambda: None) as found:
    print("ready", flush=True)
    found.wait(lambda: None)
"""


@pytest.mark.parametrize("moment", ["starting", "ready"])
def test_nothing_is_left_of_a_tool_that_was_killed(place: str, export: serving.Export, moment: str) -> None:
    argv = [sys.executable, "-c", PROGRAM, export.layers[0], f"{place}/s", moment]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as tool:
        assert tool.stdout and tool.stdout.readline().strip() == moment
        assert len(os.listdir(place)) == 1
        own = children(tool.pid)
        assert len(own) == (2 if moment == "ready" else 1), own
        tool.kill()
    deadline = time.monotonic() + 30
    while os.listdir(place) or any(os.path.exists(f"/proc/{p}") and _alive(p) for p in own):
        assert time.monotonic() < deadline, (os.listdir(place), own)
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text[text.rindex(")") + 2] != "Z"


def test_what_took_the_socket_s_place_survives_the_kill_too(place: str, export: serving.Export) -> None:
    argv = [sys.executable, "-c", PROGRAM, export.layers[0], f"{place}/s", "ready"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as tool:
        assert tool.stdout and tool.stdout.readline().strip() == "ready"
        own = children(tool.pid)
        os.unlink(f"{place}/s")
        Path(f"{place}/s").write_bytes(b"mine")
        tool.kill()
    while any(_alive(p) for p in own):
        time.sleep(0.02)
    assert Path(f"{place}/s").read_bytes() == b"mine"
