"""What happens to a repository that lives for years: many writers, a full disk, copies, media that take nothing back."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest

from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Tool, models, same
from tests.nbd import histories

WRITERS = 10
SECONDS = 120.0  # within which a command has ended, on a busy machine, too

Held = Dict[int, Dict[str, bytes]]


@pytest.fixture
def guest(libvirtd: daemon.Daemon) -> Iterator[PlainGuest]:
    with PlainGuest(libvirtd, "plain", [Disk("vda", 6 * MIB), Disk("vdb", 2 * MIB + 512)]) as made:
        made.define()
        made.start()
        yield made


def written(tool: Tool, guest: PlainGuest, rng: random.Random, held: Held) -> Any:
    """One more backup, after some writes; what the guest held goes into `held`."""
    for target in guest.disks:
        guest.random_writes(rng, target, 4)
    made = tool.backup(guest)
    held[made["generation"]] = models(guest)
    return made


def proved(tool: Tool, guest: PlainGuest, held: Held, folder: Path) -> None:
    for generation, content in held.items():
        same(tool.restored(guest, str(generation), str(folder)), content)
    assert tool.run("verify", guest.name).result["damage"] == []


@pytest.mark.fault(43)
def test_of_ten_writers_one_works_and_the_others_say_busy(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    held: Held = {}
    written(tool, guest, rng, held)
    guest.random_writes(rng, "vda", 4)
    flag = tmp_path / "go on"
    tool.script("ready", "10_wait", f"while [ ! -e '{flag}' ]; do sleep 0.1; done")
    writers = [tool.start("backup", guest.name) for _ in range(WRITERS)]
    try:
        deadline = time.monotonic() + SECONDS
        while sum(one.poll() is not None for one in writers) < WRITERS - 1:
            assert time.monotonic() < deadline, [one.poll() for one in writers]
            time.sleep(0.1)
        assert [one.poll() for one in writers if one.poll() is not None] == [11] * (WRITERS - 1)
        flag.touch()
        assert sorted(one.wait(SECONDS) for one in writers) == [0] + [11] * (WRITERS - 1)
    finally:
        for one in writers:
            one.kill()
            one.wait()
    held[2] = models(guest)
    proved(tool, guest, held, tmp_path)
    tool.nothing_left(guest)


@pytest.mark.fault(40)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
def test_a_full_disk_ends_the_run_and_takes_nothing_away(
    libvirtd: daemon.Daemon, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    place = str(tmp_path / "small")
    held: Held = {}
    with histories.tmpfs(place, "24m"):
        tool = Tool(libvirtd, f"{place}/repository")
        for _ in range(3):
            written(tool, guest, rng, held)
        guest.write_bytes("vda", 0, rng.randbytes(4 * MIB))
        histories.flood(place)
        ended = tool.run("backup", guest.name)
        assert (ended.code, ended.document["error"]["kind"]) == (15, "RepositoryFull"), ended.stderr
        tool.nothing_left(guest)
        proved(tool, guest, held, tmp_path)
        removed = tool.run("prune", guest.name, "--remove", "2").result["removed"]
        assert [one["generation"] for one in removed] == [2]
        del held[2]
        proved(tool, guest, held, tmp_path)
        histories.drain(place)
        # Nothing was missed: the next is an increment, and right.
        made = written(tool, guest, rng, held)
        assert {d["mode"] for d in made["disks"]} == {"incremental"}
        proved(tool, guest, held, tmp_path)


@pytest.mark.fault(42, 48)
def test_a_copy_by_rsync_is_a_repository_and_an_older_one_is_noticed(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    held: Held = {}
    for _ in range(2):
        written(tool, guest, rng, held)
    copy = tmp_path / "elsewhere" / "repository"
    copy.parent.mkdir()
    mirror = ["rsync", "-a", "--delete", f"{tool.repository}/", f"{copy}/"]
    subprocess.run(mirror, check=True)
    other = Tool.__new__(Tool)
    other.host, other.repository = tool.host, str(copy)
    for path in sorted(copy.rglob("*")):  # no order hangs on a file's time
        os.utime(path, (rng.randrange(1 << 30), rng.randrange(1 << 30)), follow_symlinks=False)
    proved(other, guest, held, tmp_path)
    # What goes on in the original does so in its next copy, a prune's changes, too.
    written(tool, guest, rng, held)
    tool.run("prune", guest.name, "--remove", "1").result  # noqa: B018
    del held[1]
    subprocess.run(mirror, check=True)
    proved(other, guest, held, tmp_path)
    # The copy takes the original's place: the next is an increment.
    shutil.rmtree(tool.repository)
    shutil.copytree(copy, tool.repository)
    assert {d["mode"] for d in written(tool, guest, rng, held)["disks"]} == {"incremental"}
    proved(tool, guest, held, tmp_path)
    # Now the copy is older than the guest's checkpoint.  It is right, and what it makes is no increment on the wrong one.
    del held[4]
    made = written(other, guest, rng, held)
    assert {d["mode"] for d in made["disks"]} == {"full"}
    assert "no longer has checkpoint" in made["disks"][0]["reason"]
    proved(other, guest, held, tmp_path)


@pytest.mark.fault(46)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_what_is_published_may_be_on_a_medium_that_takes_nothing_back(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    """Each published backup is read-only below a mount of its own: backups go on, and nobody can take one away."""
    held: Held = {}
    for _ in range(2):
        written(tool, guest, rng, held)
    backups = Path(tool.repository, guest.uuid, "backups")
    before = contents(backups)
    published = sorted(backups.iterdir())

    def guarded(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        mounts = "; ".join(f"mount --bind '{d}' '{d}' && mount -o remount,ro,bind '{d}'" for d in published)
        argv = ["unshare", "-m", "sh", "-ec", f'{mounts}; exec "$@"', "sh", *tool.argv(command, guest.name, *arguments)]
        return subprocess.run(
            argv, env=tool.environment(), capture_output=True, text=True, timeout=SECONDS, check=False
        )

    guest.random_writes(rng, "vda", 4)
    made = guarded("backup")
    assert made.returncode == 0, made.stderr
    held[3] = models(guest)
    assert guarded("verify").returncode == 0
    for refused in (guarded("prune", "--remove", "1"), guarded("protect", "--at", "1")):
        assert refused.returncode == 15, refused.stderr
        assert "Read-only file system" in refused.stderr and "Traceback" not in refused.stderr
    after = contents(backups)
    assert {path: after[path] for path in before} == before
    proved(tool, guest, held, tmp_path)
    # With the right to, what was begun is finished.
    assert [r["generation"] for r in tool.run("prune", guest.name, "--remove", "1").result["removed"]] == [1]
    del held[1]
    proved(tool, guest, held, tmp_path)


def contents(folder: Path) -> Dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
