"""Each format against its published shape, and the command that prints them."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest

from libvirt_cbt import cli, errors, extents
from libvirt_cbt.cli import formats
from libvirt_cbt.repository import store, union
from tests.unit import changes_samples as samples
from tests.unit import repository_samples

GRAIN = 65536
CAPACITY = 16 * GRAIN + 512
Run = Callable[..., Tuple[int, str, str]]
# (offset, length) of all that changed since generation 1, joined
RUNS = [(0, GRAIN), (5 * GRAIN, 2 * GRAIN), (16 * GRAIN, 512)]


@pytest.fixture
def kept(tmp_path: Path) -> store.DomainStore:
    one = store.Repository.init(str(tmp_path / "repo")).domain(repository_samples.UUID)
    with one.lock():
        return one


@pytest.fixture
def small(kept: store.DomainStore) -> store.DomainStore:
    """Three generations; the second and the third overlap, with zeroes."""
    samples.publish(kept, [(0, 2 * GRAIN, extents.DATA)], CAPACITY, first=True)
    samples.publish(
        kept, [(0, GRAIN, extents.DATA), (5 * GRAIN, GRAIN, extents.ZERO), (6 * GRAIN, GRAIN, extents.DATA)], CAPACITY
    )
    samples.publish(kept, [(0, 4096, extents.ZERO), (16 * GRAIN, 512, extents.DATA)], CAPACITY)
    return kept


@pytest.fixture
def run(kept: store.DomainStore, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*argv: str) -> Tuple[int, str, str]:
        before = capsys.readouterr().out
        code = cli.exit_code(["-c", "nowhere:///", "-r", kept.repository.path, *argv])
        out, err = capsys.readouterr()
        print(before, end="")  # the seed, for a test that fails
        return code, out, err

    return command


def asked(run: Run, *options: str, since: str = "1") -> Any:
    code, out, err = run("changed", "vm", "vda", "--since", since, *options)
    assert (code, err) == (0, "")
    return json.loads(out)


def test_json(small: store.DomainStore, run: Run) -> None:
    document = asked(run, "--format", "json")
    assert run("--json", "changed", "vm", "vda", "--since", "1")[1] == json.dumps(document) + "\n"
    (found,) = document.pop("results")
    assert document == {"version": 1}
    want: List[Dict[str, Any]] = [
        {"offset": 0, "length": 4096, "state": "zero", "generation": 3},
        {"offset": 4096, "length": GRAIN - 4096, "state": "data", "generation": 2},
        {"offset": 5 * GRAIN, "length": GRAIN, "state": "zero", "generation": 2},
        {"offset": 6 * GRAIN, "length": GRAIN, "state": "data", "generation": 2},
        {"offset": 16 * GRAIN, "length": 512, "state": "data", "generation": 3},
    ]
    assert found.pop("extents") == want
    assert found.pop("change_id").startswith("cbt1:")
    assert found == {
        "domain": "vm", "uuid": small.uuid, "target": "vda", "lineage": repository_samples.LINEAGE, "since": 1,
        "until": 3, "capacity": CAPACITY, "granularity": GRAIN, "guarantee": "superset by granularity",
        "next_offset": None,
    }  # fmt: skip
    paged: List[Any] = []
    offset: Any = 0
    while offset is not None:
        (page,) = asked(run, "--format", "json", "--start-offset", str(offset), "--max-results", "2")["results"]
        paged += page["extents"]
        offset = page["next_offset"]
    assert paged == want


def test_csi_variable_length(small: store.DomainStore, run: Run) -> None:
    """GetMetadataDeltaResponse of csi.proto."""
    assert asked(run, "--format", "csi") == {
        "block_metadata_type": "VARIABLE_LENGTH",
        "volume_capacity_bytes": CAPACITY,
        "block_metadata": [{"byte_offset": o, "size_bytes": n} for o, n in RUNS],
    }


def test_csi_allocated(small: store.DomainStore, run: Run) -> None:
    """GetMetadataAllocatedResponse has the same fields."""
    found = asked(run, "--format", "csi", since="*")
    assert found["block_metadata"][0] == {"byte_offset": 0, "size_bytes": 2 * GRAIN}
    assert asked(run, "--format", "csi", "--until", "1", since="1")["block_metadata"] == []


def test_csi_fixed_length(small: store.DomainStore, run: Run) -> None:
    size = 2 * GRAIN
    found = asked(run, "--format", "csi", "--block-size", str(size))
    assert found["block_metadata_type"] == "FIXED_LENGTH"
    blocks = [(0, size), (2 * size, size), (3 * size, size), (8 * size, 512)]  # the last ends with the volume
    assert found["block_metadata"] == [{"byte_offset": o, "size_bytes": n} for o, n in blocks]
    # An offset is rounded down to the block: csi.proto allows it, and so a stream can be gone on with anywhere.
    after = asked(run, "--format", "csi", "--block-size", str(size), "--start-offset", str(2 * size + 5))
    assert after["block_metadata"] == found["block_metadata"][1:]


def test_vmware(small: store.DomainStore, run: Run) -> None:
    """DiskChangeInfo: the disk from startOffset on, `length` bytes of it, is told of whole."""
    areas = [{"start": o, "length": n} for o, n in RUNS]
    assert asked(run, "--format", "vmware") == {"startOffset": 0, "length": CAPACITY, "changedArea": areas}
    first = asked(run, "--format", "vmware", "--max-results", "2")
    assert first == {"startOffset": 0, "length": 7 * GRAIN, "changedArea": areas[:2]}
    rest = asked(run, "--format", "vmware", "--start-offset", str(first["length"]))
    assert rest == {"startOffset": 7 * GRAIN, "length": CAPACITY - 7 * GRAIN, "changedArea": areas[2:]}
    exactly = asked(run, "--format", "vmware", "--max-results", "3")
    assert exactly["length"] == CAPACITY
    end = asked(run, "--format", "vmware", "--start-offset", str(CAPACITY))
    assert end == {"startOffset": CAPACITY, "length": 0, "changedArea": []}


def test_nbdinfo(small: store.DomainStore, run: Run) -> None:
    found = asked(run, "--format", "nbdinfo")
    assert [(e["offset"], e["length"]) for e in found if e["type"]] == RUNS
    at = 0
    for entry in found:
        assert entry["description"] == ("dirty" if entry["type"] else "clean")
        assert entry["offset"] == at and entry["length"] > 0
        at += entry["length"]
    assert at == CAPACITY
    (clean,) = asked(run, "--format", "nbdinfo", "--start-offset", str(8 * GRAIN), "--max-results", "1")
    assert clean == {"offset": 8 * GRAIN, "length": 8 * GRAIN, "type": 0, "description": "clean"}
    assert asked(run, "--format", "nbdinfo", "--start-offset", str(CAPACITY)) == []


@pytest.mark.skipif(not all(map(shutil.which, ("nbdinfo", "qemu-nbd", "qemu-io", "qemu-img"))), reason="needs the tools")
def test_nbdinfo_is_what_nbdinfo_prints(small: store.DomainStore, run: Run, tmp_path: Path) -> None:
    """The same delta in a real dirty bitmap, byte for byte the same text."""
    image = str(tmp_path / "a.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(CAPACITY)], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", "-g", "64k", image, "b"], check=True)
    writes = [x for offset, length in RUNS for x in ("-c", f"write -q {offset} {length}")]
    subprocess.run(["qemu-io", *writes, image], check=True)
    server = ["[", "qemu-nbd", "-r", "-f", "qcow2", "-B", "b", image, "]"]
    printed = subprocess.run(
        ["nbdinfo", "--map=qemu:dirty-bitmap:b", "--json", "--", *server], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert run("changed", "vm", "vda", "--since", "1", "--format", "nbdinfo")[1] == printed


@pytest.mark.parametrize("at_once", [1, 3, formats.AT_ONCE])
def test_every_format_tells_of_the_same_bytes(
    kept: store.DomainStore, run: Run, rng: random.Random, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """And pages of any size, each resumed as its own shape says, say the same as no pages."""
    monkeypatch.setattr(formats, "AT_ONCE", at_once)
    if at_once == 1:
        monkeypatch.setattr(union, "WINDOW", 8192)
    model = samples.random_repository(kept, rng, 4, 4096)
    capacity = model.capacities[-1]
    want: List[List[int]] = []
    for offset, length, _, _ in model.rows(1, 4):
        if want and want[-1][0] + want[-1][1] == offset:
            want[-1][1] += length
        else:
            want.append([offset, length])
    size = rng.choice([512, 4096, 8192 + 512])
    touched = sorted({b for o, n in want for b in range(o // size, -(-(o + n) // size))})
    blocks = [[b * size, min(size, capacity - b * size)] for b in touched]
    for most in (1, 2, 7, 10000):
        for fmt, entries in (("csi", want), ("fixed", blocks), ("vmware", want), ("nbdinfo", want)):
            found: List[List[int]] = []
            offset = 0
            while offset < capacity:
                options = ["--format", "csi" if fmt == "fixed" else fmt]
                options += ["--block-size", str(size)] if fmt == "fixed" else []
                page = asked(run, *options, "--start-offset", str(offset), "--max-results", str(most))
                if fmt == "vmware":
                    found += [[a["start"], a["length"]] for a in page["changedArea"]]
                    offset += page["length"]
                elif fmt == "nbdinfo":
                    found += [[e["offset"], e["length"]] for e in page if e["type"]]
                    offset = page[-1]["offset"] + page[-1]["length"]
                else:
                    rows = [[e["byte_offset"], e["size_bytes"]] for e in page["block_metadata"]]
                    found += rows
                    offset = sum(rows[-1]) if len(rows) == most else capacity
            assert found == entries, fmt


def test_runs_of_different_pages_share_a_block(
    kept: store.DomainStore, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(union, "WINDOW", 4096)
    samples.publish(kept, [], GRAIN, first=True)
    samples.publish(kept, [(n * 4096, 512, extents.DATA) for n in range(8)], GRAIN)
    found = asked(run, "--format", "csi", "--block-size", "16384")["block_metadata"]
    assert found == [{"byte_offset": n * 16384, "size_bytes": 16384} for n in range(2)]


def test_a_long_run_in_small_blocks(kept: store.DomainStore, run: Run) -> None:
    samples.publish(kept, [], 1 << 40, first=True)
    samples.publish(kept, [(0, 1 << 40, extents.DATA)], 1 << 40)
    found = asked(run, "--format", "csi", "--block-size", "4096", "--max-results", "100000")["block_metadata"]
    assert found == [{"byte_offset": n * 4096, "size_bytes": 4096} for n in range(100000)]


@pytest.mark.parametrize(
    "options",
    [
        ["--start-offset", "-1"],
        ["--start-offset", str(CAPACITY + 1)],
        ["--start-offset", str(CAPACITY + 1), "--format", "csi", "--block-size", str(1 << 20)],
        ["--start-offset", "9" * 30],
        ["--start-offset", "x"],
        ["--max-results", "0"],
        ["--max-results", "-5", "--format", "csi"],
        ["--block-size", "4096"],
        ["--block-size", "100", "--format", "csi"],
        ["--block-size", "0", "--format", "csi"],
        ["--block-size", "-512", "--format", "csi"],
        ["--format", "xml"],
        ["--until", "*"],
        ["--until", "no such"],
        ["--since", "3", "--until", "2"],
    ],
)
def test_what_makes_no_sense_is_exit_2(small: store.DomainStore, run: Run, options: List[str]) -> None:
    code, out, err = run("changed", "vm", "vda", *([] if "--since" in options else ["--since", "1"]), *options)
    assert (code, out) == (2, "")
    assert err and "Traceback" not in err


@pytest.mark.parametrize("fmt", ["csi", "vmware", "nbdinfo"])
def test_other_formats_go_without_json(small: store.DomainStore, run: Run, fmt: str) -> None:
    code, out, _ = run("--json", "changed", "vm", "vda", "--since", "1", "--format", fmt)
    assert code == 2
    assert json.loads(out)["error"]["kind"] == "Usage"


@pytest.mark.parametrize("fmt", ["json", "csi", "vmware", "nbdinfo", None])
def test_a_break_is_an_error_in_every_format(small: store.DomainStore, run: Run, fmt: Any) -> None:
    new = samples.new_lineage()
    samples.publish(small, [], CAPACITY, first=True, lineage=new, reason="the disk shrank")
    code, out, err = run("changed", "vm", "vda", "--since", "1", *(["--format", fmt] if fmt else []))
    assert code == 12
    assert len(err.splitlines()) == 1 and "the disk shrank" in err
    if fmt != "json":
        assert out == ""
        return
    document = json.loads(out)
    assert document["results"] == []
    error = document["error"]
    assert (error["code"], error["kind"]) == (12, "LineageBroken")
    assert (error["since_lineage"], error["until_lineage"]) == (repository_samples.LINEAGE, new)
    assert error["broken_by"] == "the disk shrank"


@pytest.mark.parametrize(("argv", "code"), [(("other", "vda"), 10), (("vm", "vdb"), 10), (("vm", "../x"), 10)])
def test_what_is_not_there(small: store.DomainStore, run: Run, argv: Tuple[str, str], code: int) -> None:
    found, out, err = run("--json", "changed", *argv, "--since", "1")
    assert found == code == json.loads(out)["error"]["code"]
    assert len(err.splitlines()) == 1


def test_a_document_that_ends_early_is_one_all_the_same(
    small: store.DomainStore, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was printed before the damage is right, and says where to go on."""
    real = union._windows

    def half(*args: Any) -> Any:
        yield next(real(*args))[:2]
        raise errors.Damaged(path="x", reason="it was cut short")

    monkeypatch.setattr(union, "_windows", half)
    code, out, err = run("--json", "changed", "vm", "vda", "--since", "1")
    assert code == 16 and "cut short" in err
    document = json.loads(out)
    (found,) = document["results"]
    assert [e["offset"] for e in found["extents"]] == [0]
    assert found["next_offset"] == 4096
    assert document["error"]["kind"] == "Damaged"


def test_the_table_for_people(small: store.DomainStore, run: Run) -> None:
    code, out, _ = run("changed", "vm", "vda", "--since", "*", "--max-results", "2")
    assert code == 0
    lines = out.splitlines()
    assert lines[3].split() == ["0", "4096", "zero", "3"]
    assert lines[-1] == f"2 extents, 64.0 KiB; go on with --start-offset {GRAIN}"
    assert max(map(len, lines[2:])) <= 80


def test_nothing_is_left_open(small: store.DomainStore, run: Run) -> None:
    before = os.listdir("/proc/self/fd")
    for fmt in ("csi", "vmware", "nbdinfo", "json"):
        asked(run, "--format", fmt, "--max-results", "1")
    assert os.listdir("/proc/self/fd") == before
