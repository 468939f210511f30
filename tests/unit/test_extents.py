"""extents against a model with one byte per unit."""

from __future__ import annotations

import random
from typing import List

import numpy as np
import pytest

from libvirt_cbt import extents

DATA, ZERO = extents.DATA, extents.ZERO


@pytest.fixture
def rnd() -> random.Random:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return random.Random(seed)


def some(rnd: random.Random, size: int, unit: int = 1) -> extents.Extents:
    """Ordered disjoint extents in [0, size), on `unit`; the last may end with a size that is no multiple."""
    cuts = sorted(rnd.sample(range(size // unit + 1), min(rnd.randrange(12), size // unit)))
    points = [c * unit for c in cuts] + ([size] if rnd.random() < 0.3 and (not cuts or cuts[-1] * unit < size) else [])
    rows = [(a, b - a, rnd.choice([DATA, ZERO])) for a, b in zip(points, points[1:]) if rnd.random() < 0.6]
    return extents.make([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])


def model(found: extents.Extents, size: int) -> List[int]:
    out = [0] * size
    for offset, length, state in found.tolist():
        assert length > 0
        assert not any(out[offset : offset + length]), "overlap"
        out[offset : offset + length] = [state] * length
    return out


def test_clip(rnd: random.Random) -> None:
    for _ in range(500):
        x = some(rnd, 100)
        low, high = sorted((rnd.randrange(101), rnd.randrange(101)))
        want = [s if low <= i < high else 0 for i, s in enumerate(model(x, 100))]
        assert model(extents.clip(x, low, high), 100) == want


def test_clip_keeps_every_bit_of_large_offsets() -> None:
    x = extents.make([2**60 + 1], [2], [DATA])
    assert len(extents.clip(x, 2**60 + 3, 2**60 + 9)) == 0
    assert extents.clip(x, 2**60 + 2, 2**60 + 9).tolist() == [(2**60 + 2, 1, DATA)]


def test_coalesce(rnd: random.Random) -> None:
    for _ in range(300):
        x = some(rnd, 60)
        joined = extents.coalesce(x)
        assert model(joined, 60) == model(x, 60)
        for a, b in zip(joined.tolist(), joined.tolist()[1:]):
            assert a[0] + a[1] < b[0] or a[2] != b[2]


def test_split(rnd: random.Random) -> None:
    for _ in range(300):
        x, size = some(rnd, 60), rnd.randrange(1, 20)
        cut = extents.split(x, size)
        assert model(cut, 60) == model(x, 60)
        assert all(n <= size for _, n, s in cut.tolist() if s == DATA)
        assert int((cut["state"] == ZERO).sum()) == int((x["state"] == ZERO).sum())


def test_round_outward(rnd: random.Random) -> None:
    for _ in range(300):
        size, grain = rnd.randrange(1, 100), rnd.choice([1, 4, 16])
        x = some(rnd, size)
        before, want = model(x, size), [0] * size
        for low in range(0, size, grain):
            cell = before[low : low + grain]
            want[low : low + grain] = [DATA if DATA in cell else max(cell)] * len(cell)
        assert model(extents.round_outward(x, grain, size), size) == want


def test_unite_on_whole_cells_is_exact(rnd: random.Random) -> None:
    for _ in range(300):
        grain, size = 4, rnd.randrange(1, 100)
        lists = [some(rnd, size, grain) for _ in range(rnd.randrange(5))]
        want = [0] * size
        for x in lists:
            want = [new or old for new, old in zip(model(x, size), want)]
        assert model(extents.unite(lists, 0, size, grain), size) == want
        low = rnd.randrange(0, size, grain)
        high = min(size, low + grain * rnd.randrange(1, 9))
        window = [s if low <= i < high else 0 for i, s in enumerate(want)]
        assert model(extents.unite(lists, low, high, grain), size) == window


def test_unite_of_anything_never_loses_data(rnd: random.Random) -> None:
    """Off the cells more may be reported than was written, but never less, never data as zero, never outside."""
    for _ in range(500):
        size = 100
        lists = [some(rnd, size) for _ in range(rnd.randrange(5))]
        exact = [0] * size
        for x in lists:
            exact = [new or old for new, old in zip(model(x, size), exact)]
        low, high = sorted((rnd.randrange(101), rnd.randrange(101)))
        got = model(extents.unite(lists, low, high, 4), size)
        for i, (g, e) in enumerate(zip(got, exact)):
            if not low <= i < high:
                assert g == 0
            elif e:
                assert g in {e, DATA}, (i, low, high)


@pytest.mark.parametrize(
    ("rows", "capacity", "word"),
    [
        ([(0, 0, DATA)], 10, "empty"),
        ([(0, 11, DATA)], 10, "beyond"),
        ([(2**64 - 1, 2, DATA)], 10, "beyond"),
        ([(5, 2**64 - 1, DATA)], 10, "beyond"),
        ([(4, 2, DATA), (5, 2, DATA)], 10, "overlap"),
        ([(6, 2, DATA), (0, 2, DATA)], 10, "order"),
        ([(0, 2, 3)], 10, "state"),
        ([(0, 2, 0)], 10, "state"),
    ],
)
def test_check_refuses(rows: List[List[int]], capacity: int, word: str) -> None:
    array = np.array(rows, extents.EXTENT)
    assert word in extents.check(array, capacity)


def test_check_accepts(rnd: random.Random) -> None:
    for _ in range(100):
        assert not extents.check(some(rnd, 60), 60)
    assert extents.total(extents.empty()) == 0
