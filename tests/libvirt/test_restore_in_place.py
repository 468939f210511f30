"""`restore --in-place`: a shut-off domain put back to an older moment; killed at any step it still has whole images."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List

import libvirt
import pytest

from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Tool, models, same

# Dies at the n-th call, from the commit on, that changes names or makes them durable.
KILLED = """
import os, signal, sys
import libvirt_cbt
from libvirt_cbt.actions import in_place
left = int(sys.argv[3])
def dying(call):
    def wrapped(*args, **kw):
        global left
        if armed:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kw)
    return wrapped
armed = False
for name in ("link", "rename", "unlink", "fsync"):
    setattr(os, name, dying(getattr(os, name)))
commit = in_place._commit
def arming(*args):
    global armed
    armed = True
    return commit(*args)
in_place._commit = arming
with libvirt_cbt.Session(repository=sys.argv[1]) as session:
    libvirt_cbt.restore_in_place(session, sys.argv[2], at="1")
"""


@pytest.fixture
def guest(libvirtd: daemon.Daemon) -> Iterator[PlainGuest]:
    disks = [Disk("vda", 4 * MIB), Disk("vdb", 2 * MIB, fmt="raw"), Disk("vdc", MIB)]
    with PlainGuest(libvirtd, "plain", disks) as made:
        made.define()
        made.start()
        yield made


def contents(guest: PlainGuest) -> Dict[str, bytes]:
    found = {}
    for target, disk in guest.disks.items():
        raw = f"{guest.folder}/{target}.read"
        subprocess.run(["qemu-img", "convert", "-f", disk.fmt, "-O", "raw", disk.path, raw], check=True)
        found[target] = Path(raw).read_bytes()
        os.unlink(raw)
    return found


def entries(guest: PlainGuest) -> List[str]:
    return sorted(os.listdir(guest.folder))


def test_back_to_an_older_moment_and_on(tool: Tool, guest: PlainGuest, rng: random.Random) -> None:
    guest.random_writes(rng, "vda", 8)
    guest.random_writes(rng, "vdb", 8)
    tool.backup(guest)
    held = models(guest)
    guest.random_writes(rng, "vda", 8)
    guest.random_writes(rng, "vdc", 8)
    tool.backup(guest)
    running = tool.run("restore", "plain", "--in-place", "--at", "1")
    assert (running.code, running.document["error"]["kind"]) == (11, "NotShutOff")
    guest.destroy()
    before, owners = entries(guest), {t: os.stat(d.path) for t, d in guest.disks.items()}
    found = tool.run("restore", "plain", "--in-place", "--at", "1").result
    assert [f["path"] for f in found["files"]] == [d.path for d in guest.disks.values()]
    assert found["warnings"] == []
    same(contents(guest), held)
    assert entries(guest) == before
    for target, disk in guest.disks.items():
        now = os.stat(disk.path)
        assert (now.st_uid, now.st_gid, now.st_mode) == (
            owners[target].st_uid, owners[target].st_gid, owners[target].st_mode)  # fmt: skip
        assert now.st_ino != owners[target].st_ino
    assert guest.domain.listAllCheckpoints() == []
    # It starts, and the next backup is full and right.
    for target, disk in guest.disks.items():
        disk.model[:] = held[target]
    guest.start()
    guest.random_writes(rng, "vda", 4)
    made = tool.backup(guest)
    assert {d["mode"] for d in made["disks"]} == {"full"} and all(d["reason"] for d in made["disks"])
    same(tool.restored(guest, "latest", guest.folder), models(guest))
    assert tool.run("changed", "plain", "vda", "--since", "1").code == 12


def test_one_disk_of_several(tool: Tool, guest: PlainGuest, rng: random.Random) -> None:
    guest.random_writes(rng, "vda", 8)
    tool.backup(guest)
    held = models(guest)
    guest.random_writes(rng, "vda", 8)
    guest.random_writes(rng, "vdc", 8)
    guest.destroy()
    tool.run("restore", "plain", "--in-place", "--disk", "vda").result  # noqa: B018
    same(contents(guest), {**models(guest), "vda": held["vda"]})
    info = subprocess.run(["qemu-img", "info", "-f", "qcow2", guest.disks["vdc"].path], capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert "bitmaps" not in info.stdout, "none goes on recording"


@pytest.mark.fault(56)
def test_what_stands_in_the_way(tool: Tool, guest: PlainGuest, tmp_path: Path) -> None:
    backup = tool.backup(guest)["backup"]
    guest.write("vda", 0, 512, 1)
    guest.destroy()
    before, names = contents(guest), entries(guest)
    socket = str(tmp_path / "q")
    argv = ["qemu-nbd", "--persistent", "--format=qcow2", f"--socket={socket}", guest.disks["vda"].path]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
        while not os.path.exists(socket):
            assert process.poll() is None
        ended = tool.run("restore", "plain", "--in-place")
        process.terminate()
    assert (ended.code, ended.document["error"]["kind"]) == (11, "TargetInUse")
    os.unlink(f"{tool.repository}/{guest.uuid}/backups/{backup}/vdb.qcow2")
    assert tool.run("restore", "plain", "--in-place").code == 16
    assert (contents(guest), entries(guest)) == (before, names)
    guest.start()
    guest.domain.managedSave()
    ended = tool.run("restore", "plain", "--in-place", "--disk", "vda")
    assert ended.code == 11 and "managedsave-remove" in ended.stderr
    guest.domain.managedSaveRemove()


@pytest.mark.fault(58)
@pytest.mark.parametrize("share", [pytest.param(8, marks=pytest.mark.slow), 1])
def test_killed_at_any_step(tool: Tool, guest: PlainGuest, rng: random.Random, share: int) -> None:
    guest.random_writes(rng, "vda", 8)
    guest.random_writes(rng, "vdb", 8)
    tool.backup(guest)
    new = models(guest)
    guest.random_writes(rng, "vda", 8)
    guest.random_writes(rng, "vdb", 8)
    tool.backup(guest)
    guest.destroy()
    old = contents(guest)
    saved = {t: Path(d.path).read_bytes() for t, d in guest.disks.items()}
    names = entries(guest)
    steps = list(range(1, 40)) if share > 1 else rng.sample(range(1, 24), 5)
    for step in steps:
        for target, disk in guest.disks.items():
            with open(disk.path, "wb") as file:
                file.write(saved[target])
        argv = [sys.executable, "-c", KILLED, tool.repository, "plain", str(step)]
        ended = subprocess.run(argv, env=tool.environment(), check=False, stdin=subprocess.DEVNULL)
        now = contents(guest)
        for target, content in now.items():
            assert content in (old[target], new[target]), f"{target} after step {step}"
        if ended.returncode == 0:
            same(now, new)
            break
        assert ended.returncode == -signal.SIGKILL
        guest.start()  # whatever it has, it boots
        guest.destroy()
        tool.run("restore", "plain", "--in-place", "--at", "1").result  # noqa: B018
        same(contents(guest), new)
        assert [n for n in entries(guest) if "cbt" in n] == [], step
        assert set(entries(guest)) == set(names)
    else:
        assert share == 1, "the last step was never reached"
    with pytest.raises(libvirt.libvirtError):
        guest.domain.checkpointLookupByName("none")
