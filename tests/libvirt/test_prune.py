"""`prune` as a user runs it, between backups of a real guest."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.test_generations import changed, covers
from tests.libvirt.test_serve import copied, mapped, serving
from tests.libvirt.tool import COMMAND, Tool, models, same


@pytest.fixture
def guest(libvirtd: daemon.Daemon) -> Iterator[PlainGuest]:
    disks = [Disk("vda", 6 * MIB), Disk("vdb", 2 * MIB + 17 * 512, options=("cluster_size=512",))]
    with PlainGuest(libvirtd, "plain", disks) as made:
        made.define()
        made.start()
        yield made


@pytest.fixture
def place() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="prune-") as path:
        yield path


def written(tool: Tool, guest: PlainGuest, rng: random.Random) -> Dict[str, bytes]:
    """What the guest held in one more backup."""
    for target in guest.disks:
        guest.random_writes(rng, target, 6)
    tool.backup(guest)
    return models(guest)


def proved(tool: Tool, guest: PlainGuest, held: Dict[int, Dict[str, bytes]], folder: Path) -> None:
    for generation, content in held.items():
        same(tool.restored(guest, str(generation), str(folder)), content)
    assert tool.run("verify", guest.name).result["damage"] == []


def test_a_guest_is_backed_up_on_over_pruned_chains(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path, place: str
) -> None:
    held = {generation: written(tool, guest, rng) for generation in range(1, 6)}
    plan = tool.run("prune", guest.name, "--remove", "1", "--remove", "3", "--dry-run").result
    assert [one["generation"] for one in plan["removed"]] == [1, 3] and plan["dry_run"]
    found = tool.run("prune", guest.name, "--remove", "1", "--remove", "3").result
    assert [one["generation"] for one in found["removed"]] == [1, 3]
    assert [one["generation"] for one in found["kept"]] == [2, 4, 5]
    kinds = [g["kind"] for g in tool.run("list", guest.name).result["generations"]]
    assert kinds == ["mark", "full", "mark", "incremental", "incremental"]
    left = {generation: held[generation] for generation in (2, 4, 5)}
    proved(tool, guest, left, tmp_path)
    assert tool.run("restore", guest.name, "--at", "3", "--output", f"{place}/no").code == 10
    # The next one is an increment over what is left, and right.
    held[6] = left[6] = written(tool, guest, rng)
    made = tool.run("show", guest.name).result["generations"][0]
    assert {(d["mode"], d["parent"]) for d in made["disks"]} == {("incremental", found["kept"][-1]["id"])}
    proved(tool, guest, left, tmp_path)
    tool.nothing_left(guest)
    # Marks answer: every pair of generations, by `changed` and by `serve`.
    for target in guest.disks:
        for since in range(1, 7):
            for until in range(since, 7):
                answer = changed(tool, guest, target, "--since", str(since), "--until", str(until))
                covers(answer, held[since][target], held[until][target])
        covers(changed(tool, guest, target, "--since", "*"), b"", held[6][target])
    with serving(tool, place, guest.name, "--since", "3", "--at", "5") as served:
        same({t: copied(d, tmp_path) for t, d in served.disks.items()}, held[5])
        assert all(mapped(disk) for disk in served.disks.values())
        # What is served stays; with the rest the command goes on.
        pinned = tool.run("prune", guest.name, "--remove", "4")
        assert (pinned.code, pinned.document["error"]["kind"]) == (11, "ChainPinned")
    assert tool.run("prune", guest.name, "--keep-last", "1", "--forget").result["kept"][0]["generation"] == 6
    proved(tool, guest, {6: held[6]}, tmp_path)
    assert [g["generation"] for g in tool.run("list", guest.name).result["generations"]] == [5, 6]
    covers(changed(tool, guest, "vda", "--since", "*"), b"", held[6]["vda"])
    gone = tool.run("changed", guest.name, "vda", "--since", "3")
    assert (gone.code, gone.document["error"]["kind"]) == (12, "GenerationUnknown")
    proved(tool, guest, {6: held[6], 7: written(tool, guest, rng)}, tmp_path)


def test_its_text_and_what_it_refuses(tool: Tool, guest: PlainGuest, rng: random.Random) -> None:
    for _ in range(3):
        written(tool, guest, rng)

    def said(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [COMMAND, "-r", tool.repository, *arguments]
        return subprocess.run(argv, env=tool.environment(), capture_output=True, text=True, check=False, timeout=60)

    for arguments in [["prune"], ["prune", guest.name], ["prune", "--all", guest.name, "--keep-last", "1"],
                      ["prune", "--all", "--remove", "1"], ["prune", guest.name, "--keep-last", "0"],
                      ["prune", guest.name, "--keep-within", "x"], ["prune", guest.name, "--remove", "3"]]:  # fmt: skip
        assert said(*arguments).returncode == 2, arguments
    assert said("prune", "nobody", "--keep-last", "1").returncode == 10
    assert "is protected" in said("protect", guest.name, "--at", "1").stdout
    assert "(protected)" in said("list", guest.name).stdout
    shown = said("prune", "--all", "--keep-last", "1", "--dry-run").stdout
    assert "would keep 2, would remove 1" in shown and "protected" in shown and "merges with" in shown
    shown = said("prune", "--all", "--keep-last", "1").stdout
    assert "keep 2, remove 1" in shown and "freed" in shown
    assert "no longer protected" in said("unprotect", guest.name, "--at", "1").stdout
    assert json.loads(said("--json", "prune", "--all", "--keep-last", "1").stdout)["results"][0]["removed"]


def test_a_backup_that_runs_keeps_the_prune_out(tool: Tool, guest: PlainGuest, rng: random.Random) -> None:
    written(tool, guest, rng)
    point = tool.run("start", guest.name, "--scratch-dir", tool.host.scratch).result
    # The point is open, nobody holds the lock: a prune may run, and what the point ends in is right.
    written_before: List[Any] = tool.run("prune", guest.name, "--keep-last", "1").result["removed"]
    assert written_before == [] and tool.run("stop", guest.name).result["committed"]
    assert point["generation"] == 2
    running = tool.start("backup", guest.name, "--full")
    try:
        os.kill(running.pid, signal.SIGSTOP)
    finally:
        os.kill(running.pid, signal.SIGCONT)
        running.wait(60)
    assert tool.run("prune", guest.name, "--keep-last", "1").code == 0
