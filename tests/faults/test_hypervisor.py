"""What may happen to QEMU, libvirt and the tool itself during a backup.  Rows 1 to 7, 22, 28 and 34 to 36 of the faults.

Row 3: where libvirt has VIR_DOMAIN_BACKUP_BEGIN_PRESERVE_SHUTDOWN_DOMAIN (1 << 1, from 11.10.0) a guest that powers
itself off stays until the job has ended; `job.begin` gives it where binding and daemon know it.  libvirt 9.0's binding has no
such name and its daemon answers "unsupported flags (0x2)", as the test with a power-off shows: there the source is lost.

Row 35, AppArmor and SELinux, cannot be provoked where these tests were written: that kernel has neither
(/sys/module/apparmor and /sys/fs/selinux are not there, /sys/kernel/security is empty), and libvirt's capabilities name
no security model but none and dac.  `test_no_profile_confines_qemu_here` is skipped, with that reason, where one is on.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, List, Set

import libvirt
import libvirt_qemu
import pytest
from lxml import etree

import libvirt_cbt
from libvirt_cbt import errors
from libvirt_cbt.hypervisor import guard, job
from tests import patience
from tests.faults.events import Events
from tests.faults.held import Held, children
from tests.guests import daemon, system
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Tool, models, same

DISK = 24 * MIB


@pytest.fixture
def guest(plain_guest: Callable[..., PlainGuest]) -> PlainGuest:
    return plain_guest(Disk("vda", DISK), Disk("vdb", MIB), name="faulty")


def _fill(rng: random.Random, guest: PlainGuest) -> None:
    """Data that does not compress, so that the copy can be held."""
    guest.write_bytes("vda", 0, rng.randbytes(DISK))


def _right(tool: Tool, guest: PlainGuest, tmp_path: Path, mode: str) -> None:
    """The next backup works unaided, is of this mode, and right."""
    guest.write("vdb", 0, 65536, 7)
    assert tool.backup(guest)["disks"][0]["mode"] == mode
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    tool.nothing_left(guest)
    assert tool.run("recover", guest.name).result["actions"] == []


def _generations(tool: Tool, guest: Any) -> int:
    listed = tool.run("list", guest.name)
    return 0 if listed.code == 10 else len(listed.result["generations"])


def _no_job(guest: PlainGuest) -> None:
    """Waits until the guest has no job."""
    watch = patience.Stopwatch()
    while guest.has_job:
        assert watch.seconds() < 60, "the job goes on"
        time.sleep(0.01)


# QEMU


@pytest.mark.fault(1)
def test_after_qemu_was_killed_between_backups_the_next_is_full_and_says_why(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    guest.random_writes(rng, "vda", 6)
    first = tool.backup(guest)
    guest.destroy()  # its bitmap is in the file now, and in use from the start on
    guest.start()
    for target in guest.disks:
        guest.flush(target)
    guest.kill()
    guest.start()
    made = tool.backup(guest)
    assert [d["mode"] for d in made["disks"]] == ["full", "full"]
    reason = "the bitmap of generation 1 is missing or broken in"
    assert all(d["reason"].startswith(reason) for d in made["disks"])
    assert any("vda" in w and reason in w for w in made["warnings"]), made["warnings"]
    assert [c.getName() for c in guest.domain.listAllCheckpoints()] == [made["checkpoint"]]
    assert made["checkpoint"] != first["checkpoint"]
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    _right(tool, guest, tmp_path, "incremental")


@pytest.mark.fault(2)
@pytest.mark.fault(3)
@pytest.mark.parametrize("how", ["killed", "destroyed"])
def test_a_source_that_goes_during_the_copy_is_noticed_at_once(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path, how: str
) -> None:
    tool.backup(guest)
    _fill(rng, guest)
    for target in guest.disks:
        guest.flush(target)
    with Held(tool, guest) as held:
        watch = patience.Stopwatch()
        if how == "killed":
            os.kill(guest.pid, signal.SIGKILL)
        else:
            guest.destroy()
        ended = held.ended()
        assert watch.seconds() < 10
    assert (ended.code, ended.document["error"]["kind"]) == (13, "SourceLost"), ended
    assert "switched off or its QEMU died" in ended.stderr
    assert _generations(tool, guest) == 1
    guest.wait_until_off()
    assert os.listdir(tool.host.scratch) == os.listdir(tool.host.run_dir) == []
    guest.start()
    # libvirt saves the bitmaps when it ends a QEMU in order.
    _right(tool, guest, tmp_path, "full" if how == "killed" else "incremental")


@pytest.mark.fault(3)
@pytest.mark.parametrize("moment", ["begin", "exports"])
def test_a_source_that_goes_as_the_job_begins_is_lost_too(
    tool: Tool, guest: PlainGuest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str
) -> None:
    tool.backup(guest)
    call = getattr(job, moment)

    def destroyed(*arguments: Any) -> Any:
        guest.destroy()
        return call(*arguments)

    for name, value in tool.host.environment().items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as patched, libvirt_cbt.Session(repository=tool.repository) as session:
        patched.setattr(job, moment, destroyed)
        with pytest.raises(errors.SourceLost, match="switched off"):
            libvirt_cbt.backup(session, guest.name, scratch_dir=tool.host.scratch)
    guest.start()
    _right(tool, guest, tmp_path, "incremental")


@pytest.mark.fault(3)
@pytest.mark.fault(22)
def test_a_guest_that_powers_itself_off_during_the_copy(
    tool: Tool, system_guest: Callable[..., system.SystemGuest], rng: random.Random
) -> None:
    """And before: a freeze is no pause, in a full backup and in an increment."""
    guest = system_guest(files={"vda": {"data": rng.randbytes(DISK)}})
    with Events(guest) as events:
        for mode in ("full", "incremental"):
            made = tool.run("backup", guest.name, "--quiesce", "agent").result
            assert (made["disks"][0]["mode"], made["quiesce"]["result"]) == (mode, "frozen")
        assert events.harm() == []
    preserved = bool(job.PRESERVE) and tool.host.connection.getLibVersion() >= job.PRESERVE_SINCE
    with Held(tool, guest, "--full") as held:
        guest.shut_down()
        watch = patience.Stopwatch()
        while guest.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING:
            assert watch.seconds() < 20
            time.sleep(0.02)
        watch = patience.Stopwatch()
        ended = held.ended()
        # 30 s of them are libvirt's own, where the agent's channel closes before QEMU does: its one worker waits so long for
        # a lock that the backup holds (qemuDomainObjBeginJob), before it sees that the guest has gone, and its job with it.
        assert watch.seconds() < 45
    if preserved:
        assert ended.code == 0, ended
    else:
        assert (ended.code, ended.document["error"]["kind"]) == (13, "SourceLost"), ended
        assert "switched off" in ended.stderr
    guest.wait_until_off()
    guest.start()
    if not preserved:
        with pytest.raises(libvirt.libvirtError, match="unsupported flags"):
            guest.domain.backupBegin("<domainbackup mode='pull'><server transport='unix' socket='/x'/></domainbackup>", None, 2)
    assert tool.run("backup", guest.name).result["disks"][0]["mode"] == "incremental"
    tool.nothing_left(guest)  # type: ignore[arg-type]


@pytest.mark.fault(28)
def test_a_qemu_that_stands_still_is_given_up_and_its_job_named(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    _fill(rng, guest)
    tool.backup(guest)
    _fill(rng, guest)
    with Held(tool, guest, "--stall-timeout", "3") as held:
        pid = guest.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            watch = patience.Stopwatch()
            ended = held.ended()
            assert watch.seconds() < 30
        finally:
            os.kill(pid, signal.SIGCONT)
    assert (ended.code, ended.document["error"]["kind"]) == (13, "SourceStalled"), ended
    assert f"`libvirt-cbt recover {guest.name}`" in ended.stderr
    _right(tool, guest, tmp_path, "incremental")


# libvirtd


@pytest.mark.fault(4)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("when", ["during the copy", "before the end"])
def test_a_daemon_that_comes_back_is_no_reason_to_fail(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path, hard: bool, when: str
) -> None:
    _fill(rng, guest)
    with Held(tool, guest) as held:
        (tool.host.kill if hard else tool.host.stop)()
        if when == "before the end":
            held.copied()
            time.sleep(0.3)
        tool.host.start()
        ended = held.ended()
    assert ended.code == 0, ended
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    tool.nothing_left(guest)
    _right(tool, guest, tmp_path, "incremental")


@pytest.mark.fault(4)
def test_a_daemon_that_stays_away_leaves_a_job_that_is_named_and_then_ended(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    """Patience of 30 s is cut to one here, of the tool and not of its guard, which goes on after it and ends the job."""
    tool.backup(guest)
    _fill(rng, guest)
    impatient = (
        "import sys; from libvirt_cbt.hypervisor import connection; connection.RECONNECT_SECONDS = 1.0; "
        "from libvirt_cbt import cli; cli.main(sys.argv[1:])"
    )
    argv = [sys.executable, "-c", impatient, *tool.argv("backup", guest.name)[1:]]
    with Held(tool, guest, argv=argv) as held:
        guardian = held.guardian
        tool.host.kill()
        watch = patience.Stopwatch()
        ended = held.ended()
        assert watch.seconds() < 20  # 30 with all of its patience
    assert (ended.code, ended.document["error"]["kind"]) == (20, "NoHypervisor"), ended
    assert f"may still run, `libvirt-cbt recover {guest.name}`" in ended.stderr
    assert os.path.exists(f"/proc/{guardian}")
    tool.host.start()
    _no_job(guest)
    assert tool.run("recover", guest.name).result["left"] == []
    tool.nothing_left(guest)
    _ended(guardian)
    _right(tool, guest, tmp_path, "incremental")


def _ended(pid: int) -> None:
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{pid}/exe"):
        assert time.monotonic() < deadline, f"process {pid} goes on"
        time.sleep(0.02)


@pytest.mark.fault(4)
def test_a_guard_that_comes_while_the_daemon_is_away_waits_for_it(tool: Tool, guest: PlainGuest) -> None:
    """On a busy host the copy has begun before its guard is connected."""
    tool.host.kill()
    argv = [sys.executable, "-I", "-c", guard.PROGRAM, guard.PACKAGE, guest.uuid]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guardian:
        assert guardian.stdin and guardian.stdout
        guardian.stdin.write(json.dumps({"connect": tool.host.uri}).encode() + b"\n")
        guardian.stdin.flush()
        time.sleep(2)  # its first try
        assert guardian.poll() is None
        tool.host.start()
        assert guardian.stdout.readline() == b'{"is": "ready"}\n'
        guardian.stdin.write(b'{"do": "release"}\n')
        guardian.stdin.close()
        assert guardian.wait(30) == 0


@pytest.mark.fault(5)
def test_a_qemu_that_died_while_the_daemon_was_away_means_a_clean_full(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    tool.backup(guest)
    _fill(rng, guest)
    for target in guest.disks:
        guest.flush(target)
    with Held(tool, guest) as held:
        pid = guest.pid
        tool.host.stop()
        os.kill(pid, signal.SIGKILL)
        held.release()
        time.sleep(0.3)
        tool.host.start()
        ended = held.ended()
    assert (ended.code, ended.document["error"]["kind"]) == (13, "SourceLost"), ended
    guest.wait_until_off()
    guest.start()
    _right(tool, guest, tmp_path, "full")
    pid = guest.pid
    tool.host.stop()
    os.kill(pid, signal.SIGKILL)
    tool.host.start()
    guest.wait_until_off()
    guest.start()
    _right(tool, guest, tmp_path, "full")


# Beginning and ending


def _qmp(guest: PlainGuest, execute: str, **arguments: Any) -> Any:
    command = json.dumps({"execute": execute, "arguments": arguments} if arguments else {"execute": execute})
    answer = json.loads(libvirt_qemu.qemuMonitorCommand(guest.domain, command, 0))
    assert "error" not in answer, answer
    return answer["return"]


@pytest.mark.fault(6)
def test_a_begin_that_fails_after_its_checkpoint_was_made_leaves_none(
    tool: Tool, guest: PlainGuest, tmp_path: Path
) -> None:
    """Exports of the names that libvirt is about to give stand in its way; the checkpoint is made before the exports."""
    tool.backup(guest)
    nodes = [node["node-name"] for node in _qmp(guest, "query-named-block-nodes")]
    disk = next(node for node in nodes if node.endswith("-format"))
    place = os.path.join(guest.folder, "vhost")
    os.mkdir(place)
    os.chmod(place, 0o777)  # QEMU is another user
    taken = [f"libvirt-nbd-libvirt-{number}-format" for number in range(2, 40)]
    for name in taken:
        address = {"type": "unix", "path": os.path.join(place, name[-20:])}
        _qmp(guest, "block-export-add", **{"type": "vhost-user-blk", "id": name, "node-name": disk, "addr": address})
    with Events(guest) as events:
        failed = tool.run("backup", guest.name)
        assert failed.code == 20, failed
        assert "libvirt-nbd-" in failed.stderr, failed
        assert events.harm() == []
    tool.nothing_left(guest)
    for name in taken:
        _qmp(guest, "block-export-del", id=name, mode="hard")
    time.sleep(0.2)
    _right(tool, guest, tmp_path, "incremental")


@pytest.mark.fault(6)
def test_a_begin_that_fails_at_its_server_leaves_nothing(tool: Tool, guest: PlainGuest, tmp_path: Path) -> None:
    place = os.path.join(guest.folder, "server")
    os.mkdir(place)
    os.chmod(place, 0o777)
    guest.hmp(f"nbd_server_start unix:{place}/nbd.sock")
    failed = tool.run("backup", guest.name)
    assert failed.code == 20, failed
    assert "NBD server already running" in failed.stderr, failed
    tool.nothing_left(guest, checkpoints=0)
    guest.hmp("nbd_server_stop")
    _right(tool, guest, tmp_path, "full")


@pytest.mark.fault(7)
def test_the_job_of_a_killed_tool_is_ended_by_its_guard(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    tool.backup(guest)
    _fill(rng, guest)
    with Held(tool, guest) as held:
        guardian = held.guardian
        held.kill()
    _no_job(guest)
    _ended(guardian)
    _right(tool, guest, tmp_path, "incremental")


@pytest.mark.fault(7)
def test_recover_cleans_once_when_the_guard_was_killed_too(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    tool.backup(guest)
    _fill(rng, guest)
    with Held(tool, guest) as held:
        held.kill(guardian=True)
    time.sleep(0.5)
    assert guest.has_job
    done = tool.run("recover", guest.name).result
    assert any(action.startswith("ended backup job") for action in done["actions"])
    assert any(action.startswith("removed checkpoint") for action in done["actions"])
    assert done["left"] == []
    tool.nothing_left(guest)
    assert tool.run("recover", guest.name).result["actions"] == []
    _right(tool, guest, tmp_path, "incremental")


@pytest.mark.fault(36)
def test_many_quick_backups_end_without_harm_to_qemu(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in tool.host.environment().items():
        monkeypatch.setenv(name, value)
    pid = guest.pid
    with libvirt_cbt.Session(tool.host.uri, tool.repository) as session:
        for number in range(25):
            guest.write("vda", number * 65536, 65536, number + 1)
            made = libvirt_cbt.backup(session, guest.name, scratch_dir=tool.host.scratch)
            assert made.disks[0].dirty_bytes == (0 if number == 0 else 65536) or number == 0
    assert guest.pid == pid
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    tool.nothing_left(guest)


# Others on the same machine


@pytest.mark.fault(34)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try it as another user")
def test_nobody_else_reads_an_open_export(tool: Tool, guest: PlainGuest, rng: random.Random) -> None:
    _fill(rng, guest)
    with Held(tool, guest) as held:
        (run,) = (name for name in os.listdir(tool.host.run_dir) if not name.startswith("read-"))
        socket = os.path.join(tool.host.run_dir, run, "nbd.sock")
        read = ["nbdinfo", "--size", f"nbd+unix:///vda?socket={socket}"]
        assert int(subprocess.run(read, capture_output=True, check=True, text=True).stdout) == DISK
        nobody = pwd.getpwnam("nobody")
        drop = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups", "--"]
        refused = subprocess.run([*drop, *read], capture_output=True, check=False, text=True)
        assert refused.returncode != 0
        assert "Permission denied" in refused.stderr
        assert subprocess.run([*drop, "ls", os.path.dirname(socket)], capture_output=True, check=False).returncode
        scratch = os.path.join(tool.host.scratch, f"cbt-{run}")
        assert subprocess.run([*drop, "ls", scratch], capture_output=True, check=False).returncode
        everybody = [guest.pid, tool.host.pid or 0, held.pid, *children(held.pid)]
        assert set().union(*(_sockets(pid) for pid in everybody)) & _listening() == set()
        assert held.ended().code == 0


def _listening() -> Set[str]:
    """The inodes of all TCP sockets that listen."""
    found = set()
    for family in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{family}", encoding="ascii") as table:
            found |= {row.split()[9] for row in table.readlines()[1:] if row.split()[3] == "0A"}
    return found


def _sockets(pid: int) -> Set[str]:
    """The inodes of a process's sockets."""
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


@pytest.mark.fault(35)
def test_no_profile_confines_qemu_here(libvirtd: daemon.Daemon) -> None:
    enabled: List[str] = []
    with contextlib.suppress(FileNotFoundError), open("/sys/module/apparmor/parameters/enabled") as said:
        enabled += [word for word in said.read().split() if word == "Y"]
    enabled += ["selinux"] if os.path.exists("/sys/fs/selinux/enforce") else []
    tree = etree.fromstring(libvirtd.connection.getCapabilities().encode())
    models = {model.text for model in tree.iterfind("host/secmodel/model")}
    if enabled:
        pytest.skip(f"this machine has {enabled}: the private libvirtd does without (security_driver none), test it there")
    assert models <= {"none", "dac"}
