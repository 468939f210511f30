"""`boot`: a guest with an OS runs from its backup within seconds, and nothing is left of it afterwards."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import libvirt
import pytest
from lxml import etree

from libvirt_cbt.nbdio import standing
from tests.guests import daemon, system
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Tool, models, same


@pytest.fixture
def tool(libvirtd: daemon.Daemon, tmp_path: Path) -> Iterator[Tool]:
    made = Tool(libvirtd, str(tmp_path / "repository"))
    yield made
    for name in ("booted", "second"):
        made.run("boot", "--discard", name)
    assert servers(libvirtd) == []


def boot(tool: Tool, *arguments: str) -> Any:
    return tool.run("boot", *arguments, "--output", tool.host.scratch)


def servers(host: daemon.Daemon) -> List[int]:
    """Storage daemons whose socket is in the tests' own run folder."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{entry}/cmdline").read_bytes()
        except OSError:
            continue
        if b"qemu-storage-daemon" in line.split(b"\0")[0] and f"{host.run_dir}/boot-".encode() in line:
            found.append(int(entry))
    return found


def nothing_left(tool: Tool, name: str) -> None:
    assert os.listdir(tool.host.run_dir) == []
    assert os.listdir(tool.host.scratch) == []
    assert servers(tool.host) == []
    with pytest.raises(libvirt.libvirtError):
        tool.host.domain(name)


def files(folder: str) -> Dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file() and path.name != "lock"}


def test_an_agent_answers_and_a_file_from_before_the_backup_is_there(
    tool: Tool, libvirtd: daemon.Daemon, system_guest: Callable[..., system.SystemGuest]
) -> None:
    guest = system_guest(files={"vda": {"hello": b"world"}})
    guest.write_file("/disks/vda/before", b"written before")
    tool.run("backup", guest.name, "--quiesce", "agent").result  # noqa: B018
    guest.write_file("/disks/vda/second", b"in the increment")
    tool.run("backup", guest.name).result  # noqa: B018
    guest.write_file("/disks/vda/after", b"too late")
    before = files(tool.repository)
    found = boot(tool, guest.name, "--name", "booted").result
    print(f"seconds to the start {found['seconds']}, to the answering agent {found['agent_seconds']}")
    assert found["agent_seconds"] > 0 and guest.running, "beside the original"
    copy: Any = system.SystemGuest.__new__(system.SystemGuest)
    copy.host, copy.name, copy.console = libvirtd, "booted", guest.console
    assert copy.read_file("/disks/vda/before") == b"written before"
    assert copy.read_file("/disks/vda/second") == b"in the increment"
    assert "after" not in copy.shell("ls /disks/vda")
    copy.write_file("/disks/vda/mine", b"x" * 20_000)
    assert copy.read_file("/disks/vda/mine") == b"x" * 20_000
    assert files(tool.repository) == before, "the backup is as it was"
    done = tool.run("boot", "--discard", "booted").result
    assert len(done["removed"]) == 5
    nothing_left(tool, "booted")
    assert guest.read_file("/disks/vda/after") == b"too late"


@pytest.fixture
def guest(libvirtd: daemon.Daemon) -> Iterator[PlainGuest]:
    class Networked(PlainGuest):
        def xml(self) -> str:
            root = etree.fromstring(super().xml())
            devices = root.find("devices")
            assert devices is not None
            interface = etree.SubElement(devices, "interface", type="user")
            etree.SubElement(interface, "mac", address="52:54:00:11:22:33")
            return etree.tostring(root, encoding="unicode")

    with Networked(libvirtd, "plain", [Disk("vda", 4 * MIB), Disk("vdb", MIB + 512, fmt="raw")]) as made:
        made.define()
        made.start()
        yield made


def test_its_disks_network_and_secrecy(tool: Tool, guest: PlainGuest, libvirtd: daemon.Daemon) -> None:
    guest.write("vda", MIB, 65536, 0x5A)
    guest.write("vdb", 0, 1024, 0x7B)
    tool.backup(guest)
    held = models(guest)
    guest.write("vda", 2 * MIB, 65536, 0x66)
    tool.backup(guest)
    found = boot(tool, "plain", "--at", "1", "--name", "booted").result
    xml = etree.fromstring(libvirtd.domain("booted").XMLDesc())
    assert xml.find("devices/interface/link").get("state") == "down"  # type: ignore[union-attr]
    assert xml.find("devices/interface/mac").get("address") != "52:54:00:11:22:33"  # type: ignore[union-attr]
    assert found["agent_seconds"] is None
    # What it reads is pinned for as long as the server runs.
    with open(f"{tool.repository}/{guest.uuid}/backups/{found['backup']}/manifest.json", "rb") as held_by_it:
        with pytest.raises(BlockingIOError):
            fcntl.flock(held_by_it, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # Only QEMU's group gets at the layers.
    [run] = [entry for entry in os.scandir(libvirtd.run_dir) if entry.name.startswith("boot-")]
    assert run.stat().st_mode & 0o007 == 0 and run.stat().st_gid == libvirtd.qemu_ids[1]
    assert os.stat(f"{run.path}/layers.sock").st_mode & 0o007 == 0
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "nbdinfo"]
    uri = f"nbd+unix:///vda?socket={run.path}/layers.sock"
    assert subprocess.run([*nobody, uri], capture_output=True, check=False).returncode != 0
    # It is another one's backup: twice, and each with overlays of its own.
    boot(tool, "plain", "--name", "second", "--start-network").result  # noqa: B018
    second = etree.fromstring(libvirtd.domain("second").XMLDesc())
    assert second.find("devices/interface/link") is None
    taken = boot(tool, "plain", "--name", "second")
    assert (taken.code, taken.document["error"]["kind"]) == (11, "IdentityTaken")
    libvirtd.domain("booted").destroy()
    content = {}
    for disk in found["disks"]:
        raw = f"{found['folder']}/{disk['target']}.raw"
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk["overlay"], raw], check=True)
        content[disk["target"]] = Path(raw).read_bytes()
    same(content, held)
    tool.run("boot", "--discard", "second").result  # noqa: B018
    libvirtd.domain("booted").create()  # it may be started again
    tool.run("boot", "--discard", "booted").result  # noqa: B018
    nothing_left(tool, "booted")
    with open(f"{tool.repository}/{guest.uuid}/backups/{found['backup']}/manifest.json", "rb") as free:
        fcntl.flock(free, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for name in ("booted", "plain", "nobody"):
        ended = tool.run("boot", "--discard", name)
        assert (ended.code, ended.document["error"]["kind"]) == (10, "NoSuchBoot")
    assert guest.running


def test_what_cannot_be_booted_leaves_nothing(tool: Tool, guest: PlainGuest) -> None:
    backup = tool.backup(guest)["backup"]
    layer = f"{tool.repository}/{guest.uuid}/backups/{backup}/vdb.qcow2"
    saved = Path(layer).read_bytes()
    for harm in (b"", saved[:100], b"x" + saved[1:]):
        Path(layer).write_bytes(harm)
        ended = boot(tool, "plain", "--name", "booted")
        assert ended.code == 16, ended.stderr
        nothing_left(tool, "booted")
    for wrong in ([], ["plain"], ["plain", "--name", "x", "--discard", "y"]):
        assert tool.run("boot", *wrong).code == 2
    assert boot(tool, "plain", "--name", "a/b").code == 2
    assert boot(tool, "nobody", "--name", "booted").code == 10


@pytest.mark.parametrize("delay", [0.4, 1.0, 1.6])
def test_killed_and_swept(tool: Tool, guest: PlainGuest, delay: float) -> None:
    tool.backup(guest)
    process = tool.start("boot", "plain", "--name", "booted", "--output", tool.host.scratch)
    deadline = time.monotonic() + 30
    while not os.listdir(tool.host.run_dir) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(delay - 0.4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # a server that was just being started
    ended = tool.run("boot", "--discard", "booted")
    assert ended.code in (0, 10), ended.stderr
    nothing_left(tool, "booted")


def test_after_a_reboot(tool: Tool, guest: PlainGuest, libvirtd: daemon.Daemon) -> None:
    """/run is empty, the server has gone, the domain is off."""
    tool.backup(guest)
    boot(tool, "plain", "--name", "booted").result  # noqa: B018
    libvirtd.domain("booted").destroy()
    [run] = os.listdir(libvirtd.run_dir)
    standing.end(f"{libvirtd.run_dir}/{run}")
    subprocess.run(["rm", "-r", f"{libvirtd.run_dir}/{run}"], check=True)
    with pytest.raises(libvirt.libvirtError):
        libvirtd.domain("booted").create()
    tool.run("boot", "--discard", "booted").result  # noqa: B018
    nothing_left(tool, "booted")
