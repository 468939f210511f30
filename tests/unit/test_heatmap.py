"""The heatmap against the model, and what it looks like on 80 columns."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import List

import pytest

import libvirt_cbt
from libvirt_cbt import cli, errors, extents
from libvirt_cbt.cli import heatmap as shown
from libvirt_cbt.repository import npy, store
from tests.unit import changes_samples as samples
from tests.unit import repository_samples

GRAIN = 65536


@pytest.fixture
def kept(tmp_path: Path) -> store.DomainStore:
    one = store.Repository.init(str(tmp_path / "repo")).domain(repository_samples.UUID)
    with one.lock():
        return one


def opened(kept: store.DomainStore) -> libvirt_cbt.Session:
    return libvirt_cbt.Session(uri="nowhere:///", repository=kept.repository.path)


@pytest.mark.parametrize("regions", [1, 3, 64])
def test_the_numbers(
    kept: store.DomainStore, rng: random.Random, monkeypatch: pytest.MonkeyPatch, regions: int
) -> None:
    monkeypatch.setattr(npy, "SLICE", 3)
    model = samples.random_repository(kept, rng, 5, 4096)
    found = libvirt_cbt.heatmap(opened(kept), "vm", "vda", since="*", regions=regions)
    assert (found.since, found.until, found.capacity) == (None, 5, model.capacities[-1])
    assert len(found.regions) <= regions
    assert sum(r.length for r in found.regions) == found.capacity
    assert [g.generation for g in found.generations] == [1, 2, 3, 4, 5]
    for number, region in enumerate(found.regions):
        assert region.offset == sum(r.length for r in found.regions[:number])
        assert region.offset % GRAIN == 0 and region.length > 0
        written: List[int] = []
        for generation, line in enumerate(found.generations, 1):
            rows = samples.as_rows(model.deltas[generation - 1], model.capacities[generation - 1])
            stop = region.offset + region.length
            want = sum(max(0, min(o + n, stop) - max(o, region.offset)) for o, n, _ in rows)
            assert line.changed_bytes[number] == want
            written += [generation] if want else []
        assert (region.written, region.last) == (len(written), written[-1] if written else None)


def test_it_begins_where_the_known_changes_begin(kept: store.DomainStore) -> None:
    new = samples.new_lineage()
    samples.publish(kept, [(0, GRAIN, 1)], GRAIN, first=True)
    samples.publish(kept, [(0, GRAIN, 1)], GRAIN, first=True, lineage=new)
    for _ in range(2):
        samples.publish(kept, [(0, GRAIN, 1)], GRAIN, lineage=new)
    found = libvirt_cbt.heatmap(opened(kept), "vm", "vda")
    assert (found.since, [g.generation for g in found.generations]) == (2, [3, 4])
    with pytest.raises(errors.LineageBroken):
        libvirt_cbt.heatmap(opened(kept), "vm", "vda", since=1)
    with pytest.raises(errors.NoSuchDisk):
        libvirt_cbt.heatmap(opened(kept), "vm", "vdb")
    with pytest.raises(errors.GenerationUnknown):
        libvirt_cbt.heatmap(opened(kept), "vm", "vda", until=9)
    only = libvirt_cbt.heatmap(opened(kept), "vm", "vda", until=1)
    assert only.generations == [] and only.regions[0].written == 0


def test_a_damaged_delta(kept: store.DomainStore) -> None:
    samples.publish(kept, [], GRAIN, first=True)
    made = samples.publish(kept, [(0, GRAIN, 1)], GRAIN)
    os.truncate(os.path.join(kept.directory(made.id), "vda.delta.npy"), 256)
    with pytest.raises(errors.Damaged):
        libvirt_cbt.heatmap(opened(kept), "vm", "vda")


def test_regions_that_change_often_stand_out(kept: store.DomainStore, capsys: pytest.CaptureFixture[str]) -> None:
    capacity = 100 * GRAIN
    samples.publish(kept, [], capacity, first=True)
    for number in range(9):
        rows = [(0, 512, 1), (50 * GRAIN, 2 * GRAIN, extents.ZERO)] if number % 4 == 0 else [(0, 2 * GRAIN, 1)]
        samples.publish(kept, rows, capacity)
    assert cli.exit_code(["-r", kept.repository.path, "heatmap", "vm", "vda"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out)) <= 80
    assert not any("\x1b" in line for line in out)  # no terminal, no colour
    maps = [line.split("|")[1] for line in out if "|" in line]
    assert len({len(line) for line in maps}) == 1
    assert [line[0] for line in maps] == [":", "#", "#", "#", ":", "#", "#", "#", ":", "9"]
    assert [line[25] for line in maps] == ["#", " ", " ", " ", "#", " ", " ", " ", "#", "3"]
    assert not any(line[10].strip() for line in maps)
    legend = " ".join(out[-4:])
    assert all(f"{character}=" in legend for _, character, _ in shown.STEPS) and "often:" in legend


def test_many_generations_share_lines(kept: store.DomainStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "MOST_LINES", 4)
    for number in range(12):
        samples.publish(kept, [(0, GRAIN, 1)], 2 * GRAIN, first=not number)
    found = libvirt_cbt.heatmap(opened(kept), "vm", "vda")
    for width in (60, 80):
        out = shown.lines(found, coloured=False, width=width)
        assert max(map(len, out)) <= width
        assert [line.split()[0] for line in out if "|" in line] == ["2+", "5+", "8+", "11+", "often"]


def test_colour_is_only_an_addition(kept: store.DomainStore, monkeypatch: pytest.MonkeyPatch) -> None:
    samples.publish(kept, [], 4 * GRAIN, first=True)
    samples.publish(kept, [(0, GRAIN, 1), (2 * GRAIN, 512, 1)], 4 * GRAIN)
    found = libvirt_cbt.heatmap(opened(kept), "vm", "vda")
    plain, coloured = (shown.lines(found, coloured=c) for c in (False, True))
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in coloured] == plain != coloured
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown._coloured()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not shown._coloured()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not shown._coloured()


def test_json_has_the_numbers(kept: store.DomainStore, capsys: pytest.CaptureFixture[str]) -> None:
    samples.publish(kept, [], 4 * GRAIN, first=True)
    samples.publish(kept, [(GRAIN, 512, 1)], 4 * GRAIN)
    assert cli.exit_code(["-r", kept.repository.path, "--json", "heatmap", "vm", "vda"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["results"]
    assert found["generations"] == [{"generation": 2, "time": repository_samples.TIME, "changed_bytes": [0, 512, 0, 0]}]
    assert found["regions"][1] == {"offset": GRAIN, "length": GRAIN, "written": 1, "last": 2}


@pytest.mark.parametrize("options", [["--width", "10"], ["--width", "x"], ["--since", "2", "--until", "1"]])
def test_what_makes_no_sense(kept: store.DomainStore, capsys: pytest.CaptureFixture[str], options: List[str]) -> None:
    for number in range(2):
        samples.publish(kept, [], GRAIN, first=not number)
    assert cli.exit_code(["-r", kept.repository.path, "heatmap", "vm", "vda", *options]) == 2
    out, err = capsys.readouterr()
    assert not out and err
