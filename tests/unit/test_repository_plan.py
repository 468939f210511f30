"""Streamed arrays and the plan of a restore, against whole-array and one-byte-per-grain models."""

from __future__ import annotations

import io
import os
import random
from contextlib import ExitStack
from typing import Any, Iterator, List

import blake3
import numpy as np
import pytest

from libvirt_cbt import errors, extents
from libvirt_cbt.repository import npy, plan
from tests.unit.repository_samples import Row, content

G = extents.GRAIN


@pytest.fixture
def rnd() -> random.Random:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return random.Random(seed)


def written(path: str, rows: extents.Extents, dtype: np.dtype[Any] = extents.CONTENT) -> str:
    writer = npy.Writer(path, dtype)
    middle = len(rows) // 3
    writer.append(rows[:middle])
    writer.append(rows[middle:])
    digest, count = writer.finish()
    assert count == len(rows)
    return digest


def rows_of(rnd: random.Random, count: int) -> List[Row]:
    at, out = 0, []
    for _ in range(count):
        at += rnd.randrange(3) * 100
        length = rnd.randrange(1, 400)
        out.append((at, length, rnd.choice([extents.DATA, extents.ZERO])))
        at += length
    return out


def test_numpy_itself_reads_it(tmp_path: Any) -> None:
    path = str(tmp_path / "a.npy")
    rows = content([(0, 5, extents.DATA), (9, 5, extents.ZERO)])
    digest = written(path, rows)
    assert (np.load(path, allow_pickle=False) == rows).all()
    with open(path, "rb") as file:
        assert blake3.blake3(file.read()).hexdigest() == digest
    assert os.stat(path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize("step", [1, 3, 7, 64, 65536])
def test_window_is_the_whole_array_cut(tmp_path: Any, rnd: random.Random, monkeypatch: Any, step: int) -> None:
    """Slices of `step` rows, so that searches and reads cross their borders."""
    monkeypatch.setattr(npy, "SLICE", step)
    for number, count in enumerate([0, 1, 2, 5, 64, 200]):
        columns = np.array(rows_of(rnd, count), np.uint64).reshape(-1, 3).T
        rows = extents.make(*columns)
        path = str(tmp_path / f"{number}.npy")
        digest = written(path, rows, extents.EXTENT)
        size = int(extents.ends(rows)[-1]) if count else 100
        with npy.Reader(path, extents.EXTENT, digest) as reader:
            for window in [1, 7, 100, 1000, size + 5]:
                for low in range(0, size + 5, max(window, size // 30 + 1)):
                    want = rows[(extents.ends(rows) > low) & (rows["offset"] < low + window)]
                    assert (reader.window(low, low + window) == want).all()
                    assert len(reader.window(low, low + window)) == len(want)


def test_writer_refuses_disorder(tmp_path: Any) -> None:
    writer = npy.Writer(str(tmp_path / "a.npy"), extents.EXTENT)
    writer.append(extents.make([10], [10], [1]))
    with pytest.raises(ValueError, match="order"):
        writer.append(extents.make([19], [1], [1]))
    with pytest.raises(TypeError):
        writer.append(content([(30, 1, 1)]))
    writer.close()


def hostile() -> Iterator[bytes]:
    rows = content([(0, 5, extents.DATA)])
    for other in (rows["offset"], rows[["offset", "length"]].copy(), np.zeros((1, 1), extents.CONTENT)):
        out = io.BytesIO()
        np.save(out, other)
        yield out.getvalue()
    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}], object), allow_pickle=True)
    yield out.getvalue()
    good = npy._header(extents.CONTENT, 1) + rows.tobytes()
    yield npy._header(extents.CONTENT, 10**18) + rows.tobytes()
    yield good[:-1]
    yield good + b"x"
    yield good[:100]
    yield b""
    yield good.replace(b"|u1", b"|O1", 1)


@pytest.mark.parametrize("data", list(hostile()), ids=lambda data: f"{len(data)}-bytes")
def test_reader_refuses_hostile_headers_even_with_their_digest(tmp_path: Any, data: bytes) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(data)
    with pytest.raises(errors.Damaged) as caught:
        npy.Reader(str(path), extents.CONTENT, blake3.blake3(data).hexdigest())
    assert "a.npy" in str(caught.value)


def test_reader_notices_every_flipped_byte(tmp_path: Any) -> None:
    path = tmp_path / "a.npy"
    digest = written(str(path), content([(0, 5, extents.DATA), (9, 5, extents.ZERO)]))
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        with pytest.raises(errors.Damaged):
            npy.Reader(str(path), extents.CONTENT, digest)


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "missing"])
def test_reader_refuses_what_is_no_file(tmp_path: Any, kind: str) -> None:
    path, other = str(tmp_path / "a.npy"), str(tmp_path / "b.npy")
    digest = written(other, content([]))
    if kind == "link":
        os.symlink(other, path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        os.mkdir(path)
    with pytest.raises(errors.Damaged):
        npy.Reader(path, extents.CONTENT, digest)


def layer(rnd: random.Random, capacity: int) -> List[Row]:
    out: List[Row] = []
    at = 0
    while at < capacity:
        length = min(rnd.choice([1, 1, 2, 4, 16]) * G, capacity - at)
        state = rnd.choice([0, 0, extents.DATA, extents.DATA, extents.ZERO])
        if state == extents.ZERO:
            length = min(length * rnd.choice([1, 8]), capacity - at)
        if state:
            out.append((at, length, state))
        at += length
    return out


@pytest.mark.parametrize("window", [1 << 30, 5 * G, 16 * G])
def test_plan_of_a_random_chain(tmp_path: Any, rnd: random.Random, monkeypatch: Any, window: int) -> None:
    """Every layer writes its number; what the plan writes must be what the newest layer there says."""
    monkeypatch.setattr(plan, "WINDOW", window)
    for trial in range(8):
        capacity = rnd.randrange(1, 40) * G + rnd.choice([0, 512, 4096])
        sizes = [capacity]  # newest first; a disk may have grown, from any size
        for _ in range(rnd.randrange(5)):
            older = sizes[-1] - rnd.choice([0, 0, 512, G + 512])
            sizes.append(max(512, older))
        layers = [layer(rnd, size) for size in sizes]
        grain = 512
        want = np.zeros(-(-capacity // grain), np.int64)
        for number, rows in reversed(list(enumerate(layers, 1))):
            for offset, length, state in rows:
                want[offset // grain : -(-(offset + length) // grain)] = number if state == extents.DATA else 0
        got = np.zeros_like(want)
        with ExitStack() as stack:
            readers = []
            for number, rows in enumerate(layers):
                path = str(tmp_path / f"{window}-{trial}-{number}.npy")
                digest = written(path, content(rows, number))
                readers.append(stack.enter_context(npy.Reader(path, extents.CONTENT, digest)))
            for run in plan.restore(readers, capacity):
                assert (run.offset, run.length, extents.DATA) in layers[run.layer]
                assert run.digest == blake3.blake3(f"{run.layer} {run.offset}".encode()).digest()
                assert run.keep
                for offset, length in run.keep:
                    assert run.offset <= offset < offset + length <= run.offset + run.length
                    cells = slice(offset // grain, -(-(offset + length) // grain))
                    assert not got[cells].any(), "written twice"
                    got[cells] = run.layer + 1
        assert (got == want).all()


def test_everything_of_one_layer(tmp_path: Any) -> None:
    rows: List[Row] = [(0, G, extents.DATA), (G, 9 * G, extents.ZERO), (12 * G, 512, extents.DATA)]
    path = str(tmp_path / "a.npy")
    with npy.Reader(path, extents.CONTENT, written(path, content(rows))) as reader:
        found = [(r.layer, r.offset, r.length, r.keep) for r in plan.everything(reader, 3)]
    assert found == [(3, 0, G, ()), (3, 12 * G, 512, ())]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(0, 65536, 1), (512, 512, 1)], "overlap or are out of order"),
        ([(65536, 65536, 1), (0, 65536, 1)], "overlap or are out of order"),
        ([(0, 0, 1)], "empty"),
        ([(0, 65536, 3)], "unknown state"),
        ([(2**63, 2**63, 1)], "beyond the disk"),
        ([(32768, 65536, 1)], "begin on a grain"),
    ],
)
@pytest.mark.parametrize("step", [1, 65536])
def test_rows_that_are_none_are_damage_though_their_digest_is_right(
    tmp_path: Any, monkeypatch: Any, rows: List[Any], reason: str, step: int
) -> None:
    """Who can write to a repository makes digests, too; a run that begins inside a grain would be restored elsewhere."""
    monkeypatch.setattr(npy, "SLICE", step)
    path = str(tmp_path / "a.npy")
    whole = npy._header(extents.CONTENT, len(rows)) + content(rows).tobytes()
    with open(path, "wb") as file:
        file.write(whole)
    with npy.Reader(path, extents.CONTENT, blake3.blake3(whole).hexdigest()) as reader:
        with pytest.raises(errors.Damaged, match=reason):
            reader.window(0, 1 << 30)
        with pytest.raises(errors.Damaged, match=reason):
            list(plan.restore([reader], 1 << 20))
        with pytest.raises(errors.Damaged, match=reason):
            list(plan.everything(reader, 0))
