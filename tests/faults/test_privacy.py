"""What a backup shows to others on the host: no secret, no socket, no file, whatever the umask."""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List, Set

import pytest
from lxml import etree

from tests.faults.held import Held, children
from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import COMMAND, Tool, models, same

DISK = 24 * MIB
VNC, LIBVIRT = "vncpaswd", "hunter2hunter2"
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can try it as another user")


class Viewed(PlainGuest):
    """It has a VNC server with a password, on a socket."""

    def xml(self) -> str:
        tree = etree.fromstring(super().xml())
        devices = tree.find("devices")
        assert devices is not None
        graphics = etree.SubElement(devices, "graphics", type="vnc", passwd=VNC)
        etree.SubElement(graphics, "listen", type="socket", socket=f"{self.folder}/vnc.sock")
        return etree.tostring(tree, encoding="unicode")


class Addressed(Tool):
    """Its connection URI has a user with a password."""

    def environment(self) -> Dict[str, str]:
        uri = self.host.uri.replace("qemu:///", f"qemu://operator:{LIBVIRT}@/")
        return {**super().environment(), "LIBVIRT_DEFAULT_URI": uri}


@pytest.fixture
def guest(libvirtd: daemon.Daemon, rng: random.Random) -> Iterator[PlainGuest]:
    with Viewed(libvirtd, "viewed", [Disk("vda", DISK), Disk("vdb", MIB)]) as made:
        os.chmod(made.folder, 0o777 | stat.S_ISVTX)  # QEMU makes its VNC socket there
        made.define()
        made.start()
        made.write_bytes("vda", 0, rng.randbytes(DISK))
        yield made


def command_lines() -> bytes:
    """Of every process that there is now: what any user of the host may read."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes())
    return b"\n".join(found)


def everything(folder: str) -> bytes:
    return b"\n".join(p.read_bytes() for p in Path(folder).rglob("*") if p.is_file())


@pytest.mark.fault(55)
def test_no_secret_is_stored_shown_or_listed(libvirtd: daemon.Daemon, guest: PlainGuest, tmp_path: Path) -> None:
    tool = Addressed(libvirtd, str(tmp_path / "repository"))
    assert VNC in guest.domain.XMLDesc(1), "libvirt tells it to who asks for it"
    seen = []
    argv = [COMMAND, "-r", tool.repository, "-v", "--json", "backup", guest.name, "--scratch-dir", libvirtd.scratch]
    with Held(tool, guest, argv=argv) as held:
        seen.append(command_lines())
        assert guest.uuid.encode() in seen[0] and b"guardian" in seen[0], "the guard is among them"
        # What is there in the middle of it: intent, lock, sockets' folders, scratch files.
        seen += [everything(folder) for folder in (tool.repository, libvirtd.run_dir, libvirtd.scratch)]
        ended = held.ended()
    assert ended.code == 0, ended.stderr
    seen += [str(ended.document).encode(), ended.stderr.encode(), everything(tool.repository)]
    said: List[bytes] = []
    for words in (["list"], ["show", guest.name], ["status"], ["doctor", guest.name], ["report"], ["config"],
                  ["report", "--html", str(tmp_path / "page.html")], ["start", guest.name, "--scratch-dir", libvirtd.scratch], ["stop", guest.name],
                  ["boot", guest.name, "--name", "copy", "--output", libvirtd.scratch, "--wait", "0"],
                  ["boot", "--discard", "copy"], ["restore", guest.name, "--output", str(tmp_path / "out")],
                  ["backup", "nobody"], ["recover"]):  # fmt: skip
        for more in ([], ["--json"]) if words[0] in ("list", "show", "status", "doctor", "config") else (["--json"],):
            argv = [COMMAND, "-r", tool.repository, "-v", *more, *words]
            done = subprocess.run(argv, env=tool.environment(), capture_output=True, check=False, timeout=120)
            assert done.returncode in (0, 10), (words, done.stderr)
            said += [done.stdout, done.stderr]
    assert b"operator@" in b"".join(said), "the user is told, as the way back needs it"
    elsewhere = {**tool.environment(), "LIBVIRT_DEFAULT_URI": f"qemu://operator:{LIBVIRT}@/system?socket=/nowhere"}
    argv = [COMMAND, "-r", tool.repository, "backup", guest.name]
    failed = subprocess.run(argv, env=elsewhere, capture_output=True, check=False, timeout=120)
    assert failed.returncode == 20 and b"operator@" in failed.stderr
    seen += [*said, failed.stderr, (tmp_path / "page.html").read_bytes(), everything(tool.repository)]
    for number, found in enumerate(seen):
        assert VNC.encode() not in found and LIBVIRT.encode() not in found, number


def as_nobody(*argv: str) -> subprocess.CompletedProcess[str]:
    nobody = pwd.getpwnam("nobody")
    drop = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups", "--"]
    return subprocess.run([*drop, *argv], capture_output=True, check=False, text=True, timeout=60)


def refused(uri: str) -> None:
    """An NBD URI that answers us, and nobody else."""
    subprocess.run(["nbdinfo", "--size", uri], capture_output=True, check=True, timeout=60)
    done = as_nobody("nbdinfo", "--size", uri)
    assert done.returncode and "Permission denied" in done.stderr, done.stderr


def listening(*pids: int) -> List[str]:
    """TCP sockets on which these processes and their children listen, as `ss -ltn` shows them."""
    inodes: Set[str] = set()
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        waiting += children(pid)
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    found = []
    for family in ("tcp", "tcp6", "udp", "udp6"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{family}", encoding="ascii") as table:
            rows = [row.split() for row in table.readlines()[1:]]
            found += [row[1] for row in rows if f"socket:[{row[9]}]" in inodes]
    return found


@ROOT_ONLY
@pytest.mark.fault(34)
def test_what_is_served_is_for_its_owner_alone(libvirtd: daemon.Daemon, guest: PlainGuest, tmp_path: Path) -> None:
    """An open fleecing point, a served backup, a booted one: with the socket of each in a folder that all may enter."""
    tool = Tool(libvirtd, str(tmp_path / "repository"))
    tool.backup(guest)
    opened = tool.run("start", guest.name, "--scratch-dir", libvirtd.scratch).result
    refused(opened["disks"][0]["uri"])
    assert listening(guest.pid) == []
    tool.run("stop", guest.name).result  # noqa: B018
    socket = os.path.join(libvirtd.root, "served.sock")
    with subprocess.Popen([*tool.argv("serve", guest.name), "--socket", socket], env=tool.environment(),
                          stdout=subprocess.DEVNULL) as process:  # fmt: skip
        deadline = time.monotonic() + 60
        while not os.path.exists(socket):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        refused(f"nbd+unix:///vda?socket={socket}")
        assert listening(process.pid) == []
        process.terminate()
    tool.run("boot", guest.name, "--name", "booted", "--output", libvirtd.scratch, "--wait", "0").result  # noqa: B018
    [run] = [name for name in os.listdir(libvirtd.run_dir) if name.startswith("boot-")]
    refused(f"nbd+unix:///vda?socket={libvirtd.run_dir}/{run}/layers.sock")
    assert as_nobody("ls", f"{libvirtd.run_dir}/{run}").returncode
    assert as_nobody("ls", f"{libvirtd.scratch}/{run}").returncode
    for target in ("vda", "vdb"):
        assert as_nobody("cat", f"{libvirtd.scratch}/{run}/{target}.qcow2").returncode
    tool.run("boot", "--discard", "booted").result  # noqa: B018
    tool.nothing_left(guest)


def loose(folder: str) -> List[str]:
    """What others may write to, or read."""
    return [
        path
        for place, _, files in os.walk(folder)
        for path in (place, *(os.path.join(place, name) for name in files))
        if os.lstat(path).st_mode & 0o077
    ]


@pytest.mark.fault(47, 54)
@pytest.mark.parametrize("mask", [0o000, 0o777])
def test_any_umask_will_do(libvirtd: daemon.Daemon, guest: PlainGuest, tmp_path: Path, mask: int) -> None:
    """With 0 nothing is for others, with 0777 QEMU still gets to its socket, its scratch files and its overlays."""

    def run(*arguments: str) -> None:
        program = f"import os, sys; os.umask({mask}); from libvirt_cbt import cli; cli.main(sys.argv[1:])"
        argv = [sys.executable, "-c", program, "-r", str(tmp_path / "deep" / "er" / "repository"), *arguments]
        environment = {**os.environ, **libvirtd.environment(), "LIBVIRT_CBT_RUN_DIR": f"{libvirtd.root}/r{mask}/cbt"}
        done = subprocess.run(argv, env=environment, capture_output=True, check=False, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    scratch = ["--scratch-dir", f"{libvirtd.root}/s{mask}/cbt"]
    run("init")
    run("backup", guest.name, *scratch)
    guest.write("vdb", 0, 65536, 7)
    run("backup", guest.name, *scratch)
    run("start", guest.name, *scratch)
    run("stop", guest.name)
    run("boot", guest.name, "--name", "booted", "--output", scratch[1], "--wait", "0")
    run("boot", "--discard", "booted")
    run("restore", guest.name, "--output", str(tmp_path / "out"), "--format", "qcow2")
    run("restore", guest.name, "--output", str(tmp_path / "out"))
    same({t: (tmp_path / "out" / f"{t}.raw").read_bytes() for t in ("vda", "vdb")}, models(guest))
    assert loose(str(tmp_path / "deep" / "er" / "repository")) == []
    assert all(not p.stat().st_mode & 0o077 for p in (tmp_path / "out").iterdir())
    for folder in ("r{}", "r{}/cbt", "s{}", "s{}/cbt"):
        mode = os.stat(os.path.join(libvirtd.root, folder.format(mask))).st_mode
        assert not mode & 0o022 and mode & 0o011 == 0o011, "to be passed through, and no more"
    assert not any((tmp_path / above).stat().st_mode & 0o022 for above in ("deep", "deep/er"))


@ROOT_ONLY
@pytest.mark.fault(54)
@pytest.mark.parametrize("which", ["run", "scratch"])
def test_folders_that_others_hold_are_refused(
    libvirtd: daemon.Daemon, guest: PlainGuest, tmp_path: Path, which: str
) -> None:
    """Whoever made it first, or may rename what is in it, could read what we put there or take its place."""
    tool = Tool(libvirtd, str(tmp_path / "repository"))
    place = os.path.join(libvirtd.root, f"held-{which}")
    os.mkdir(place)
    nobody = pwd.getpwnam("nobody")
    for mode, owner, word in ((0o777, 0, "everybody"), (0o711, nobody.pw_uid, "belongs to user")):
        os.chmod(place, mode)
        os.chown(place, owner, -1)
        environment = {**tool.environment(), **({"LIBVIRT_CBT_RUN_DIR": place} if which == "run" else {})}
        scratch = place if which == "scratch" else libvirtd.scratch
        argv = [COMMAND, "-r", tool.repository, "backup", guest.name, "--scratch-dir", scratch]
        done = subprocess.run(argv, env=environment, capture_output=True, check=False, text=True, timeout=120)
        assert done.returncode in (14, 20) and word in done.stderr, done.stderr
        assert os.listdir(place) == []
    tool.nothing_left(guest, checkpoints=0)
