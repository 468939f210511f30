"""Work of others on the same guest: named, never waited for unasked, never ended.  Rows 7 and 8 of the faults.

libvirt tells no age of block jobs (virDomainGetBlockJobInfo has type, bandwidth, cur and end), so a block copy is named
with its disk only; backups and saves are named with their age.  A migration is the same to libvirt as a save, an outgoing
migration of QEMU's: here into a pipe that nobody reads.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, List

import libvirt
import pytest

from libvirt_cbt.repository import manifest
from tests import patience
from tests.faults.held import Held
from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Ended, Tool, models, same

DISK = 24 * MIB
AT_ONCE = 15  # seconds: libvirt waits 30 for the lock of a domain that is busy


@pytest.fixture
def guest(plain_guest: Callable[..., PlainGuest]) -> PlainGuest:
    return plain_guest(Disk("vda", DISK), name="shared")


def _place(guest: PlainGuest) -> str:
    """A folder in which QEMU, another user, may make files."""
    place = os.path.join(guest.folder, "theirs")
    os.mkdir(place)
    os.chmod(place, 0o777)
    return place


def _type(guest: PlainGuest) -> int:
    return guest.job_type()


def _until(happened: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


# What others may be doing.  Each block ends it.


@contextmanager
def pull(guest: PlainGuest) -> Iterator[str]:
    place = _place(guest)
    guest.domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{place}/nbd.sock'/><disks>"
        f"<disk name='vda' type='file'><scratch file='{place}/vda.scratch'/></disk></disks></domainbackup>",
        None,
    )
    yield "a backup"
    assert _type(guest) != libvirt.VIR_DOMAIN_JOB_NONE, "their job was ended"
    guest.domain.abortJob()
    _until(lambda: _type(guest) == libvirt.VIR_DOMAIN_JOB_NONE, "their job does not end")


@contextmanager
def copy(guest: PlainGuest) -> Iterator[str]:
    place = _place(guest)
    guest.domain.blockCopy(
        "vda",
        f"<disk type='file'><source file='{place}/vda.copy'/><driver type='qcow2'/></disk>",
        {"bandwidth": 65536},
        libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB,
    )
    yield "a block copy on disk vda"
    assert guest.domain.blockJobInfo("vda", 0), "their job was ended"
    guest.domain.blockJobAbort("vda", 0)


Others = Callable[[PlainGuest], Any]


@pytest.mark.fault(8)
@pytest.mark.parametrize("theirs", [pull, copy])
def test_work_of_others_is_named_at_once_and_left_alone(
    tool: Tool, guest: PlainGuest, rng: random.Random, theirs: Others
) -> None:
    guest.write_bytes("vda", 0, rng.randbytes(DISK))
    with theirs(guest) as what:
        time.sleep(1.1)
        watch = patience.Stopwatch()
        busy = tool.run("backup", guest.name)
        assert watch.seconds() < AT_ONCE
        assert (busy.code, busy.document["error"]["kind"]) == (11, "DomainBusy"), busy
        assert f"is busy with {what}" in busy.stderr
        assert " on disk " in what or re.search(r" since [0-9]+ s", busy.stderr), busy.stderr
        watch = patience.Stopwatch()
        assert tool.run("backup", guest.name, "--wait", "0.5").code == 11
        assert watch.seconds() < AT_ONCE
        _nothing_of_ours(tool, guest)
    assert tool.run("backup", guest.name, "--disk", "vda").code == 0


class Large(PlainGuest):
    """A guest whose save never fits into the pipes and the 1 MiB of the program with which libvirt writes it.

    Of memory that nobody has touched QEMU saves 9 bytes per page: 4.5 MiB.  Of a guest of 32 MiB all fits, or all but the
    state of its devices: the save is over for QEMU, or keeps QEMU's main loop, and either is another test.
    """

    memory_mib = 2048


@pytest.mark.fault(8)
def test_a_save_of_others_is_named_at_once_and_goes_on(tool: Tool, guests: Callable[[Any], Any]) -> None:
    guest = guests(Large(tool.host, "shared", [Disk("vda", MIB)]))
    pipe = os.path.join(_place(guest), "pipe")
    os.mkfifo(pipe)
    os.chmod(pipe, 0o666)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    pid, ended = guest.pid, threading.Event()
    # On a connection of its own.  libvirt lets the thread that waits for the longest call send those of all others, too, and
    # before 10.0 does not always wake it for one (src/rpc/virnetclient.c, virNetClientIO): that one then waits as long.
    theirs = libvirt.open(tool.host.uri)

    def run() -> None:
        with contextlib.closing(theirs), contextlib.suppress(libvirt.libvirtError):  # its QEMU is killed
            theirs.lookupByName(guest.name).save(pipe)
        ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        _until(lambda: _type(guest) != libvirt.VIR_DOMAIN_JOB_NONE, "it did not begin")
        watch = patience.Stopwatch()
        busy = tool.run("backup", guest.name)
        assert watch.seconds() < AT_ONCE
        assert (busy.code, busy.document["error"]["kind"]) == (11, "DomainBusy"), busy
        assert "is busy with a save since " in busy.stderr
        assert not ended.is_set()
        assert _type(guest) in (libvirt.VIR_DOMAIN_JOB_BOUNDED, libvirt.VIR_DOMAIN_JOB_UNBOUNDED)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.close(reader)
        thread.join(30)
    assert ended.is_set()


@pytest.mark.fault(8)
@pytest.mark.fault(28)
def test_a_qemu_that_does_not_answer_is_said_in_seconds(tool: Tool, guest: PlainGuest) -> None:
    pid = guest.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        watch = patience.Stopwatch()
        ended = tool.run("backup", guest.name, "--wait", "60")
        assert watch.seconds() < AT_ONCE
    finally:
        os.kill(pid, signal.SIGCONT)
    assert ended.code == 20, ended
    assert "does not answer" in ended.stderr
    assert tool.run("backup", guest.name).code == 0


def _nothing_of_ours(tool: Tool, guest: PlainGuest) -> None:
    assert os.listdir(tool.host.scratch) == os.listdir(tool.host.run_dir) == []
    assert os.listdir(os.path.join(tool.repository, guest.uuid, "staging")) == []


@pytest.mark.fault(8)
@pytest.mark.parametrize("theirs", [pull, copy])
def test_with_wait_it_goes_on_when_they_have_ended(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path, theirs: Others
) -> None:
    guest.write_bytes("vda", 0, rng.randbytes(DISK))
    with theirs(guest):
        process = tool.start("backup", guest.name, "--wait", "60")
        time.sleep(1.5)
        assert process.poll() is None
    assert process.wait(120) == 0
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    tool.nothing_left(guest)


@pytest.mark.fault(8)
@pytest.mark.fault(25)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_waiting(tool: Tool, guest: PlainGuest, number: signal.Signals) -> None:
    with pull(guest):
        process = tool.start("backup", guest.name, "--wait", "60")
        patience.until_caught(process.pid)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    assert _type(guest) == libvirt.VIR_DOMAIN_JOB_NONE


# Another repository of ours, and another host


@pytest.fixture
def other(libvirtd: daemon.Daemon, tmp_path: Path) -> Tool:
    return Tool(libvirtd, str(tmp_path / "other"))


@pytest.mark.fault(7)
def test_what_another_repository_has_begun_or_left_is_not_touched(
    tool: Tool, other: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    guest.write_bytes("vda", 0, rng.randbytes(DISK))
    other.backup(guest)
    with Held(tool, guest) as held:
        _only_named(other, guest)
        assert held.ended().code == 0
    guest.write_bytes("vda", 0, rng.randbytes(DISK))
    with Held(tool, guest) as held:
        held.kill(guardian=True)
    _only_named(other, guest)
    assert len(guest.domain.listAllCheckpoints()) == 3  # one of each, and the one that was left
    assert any(action.startswith("ended backup job") for action in tool.run("recover", guest.name).result["actions"])
    for one in (tool, other):
        assert one.backup(guest)["disks"][0]["mode"] == "incremental"
        same(one.restored(guest, "latest", str(tmp_path)), models(guest))
    tool.nothing_left(guest, checkpoints=2)


def _only_named(tool: Tool, guest: PlainGuest) -> Ended:
    before = [c.getName() for c in guest.domain.listAllCheckpoints()]
    done = tool.run("recover", guest.name).result
    assert (_of_runs(done["actions"]), done["left"]) == ([], [])
    busy = tool.run("backup", guest.name)
    assert (busy.code, busy.document["error"]["kind"]) == (11, "DomainBusy"), busy
    assert _type(guest) != libvirt.VIR_DOMAIN_JOB_NONE
    assert [c.getName() for c in guest.domain.listAllCheckpoints()] == before
    return busy


def _of_runs(actions: List[str]) -> List[str]:
    """Without the folders of dead servers' sockets, which belong to no run and no repository."""
    return [action for action in actions if "/read-" not in action]


@pytest.mark.fault(7)
@pytest.mark.parametrize("field", ["host", "tool_host"])
def test_what_a_run_of_another_host_has_left_is_said_and_left(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path, field: str
) -> None:
    tool.backup(guest)
    guest.write_bytes("vda", 0, rng.randbytes(DISK))
    with Held(tool, guest) as held:
        held.kill(guardian=True)
    (path,) = Path(tool.repository, guest.uuid, "staging").glob("*/intent.json")
    intent = manifest.Intent.load(str(path))
    path.write_bytes(intent.model_copy(update={field: "elsewhere"}).dump())
    checkpoints = [c.getName() for c in guest.domain.listAllCheckpoints()]
    done = tool.run("recover", guest.name).result
    assert _of_runs(done["actions"]) == []
    assert len(done["left"]) == 1
    assert intent.id in done["left"][0]
    assert "elsewhere" in done["left"][0]
    assert tool.run("backup", guest.name).code == 11
    assert _type(guest) != libvirt.VIR_DOMAIN_JOB_NONE
    assert [c.getName() for c in guest.domain.listAllCheckpoints()] == checkpoints
    path.write_bytes(intent.dump())
    assert tool.backup(guest)["disks"][0]["mode"] == "incremental"
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    tool.nothing_left(guest)
