"""Scratch space that runs out, or is slow: the guest's own writes come first.  Rows 20 and 21 of the faults.

The scratch folder is a tmpfs of 8 to 24 MiB that is mounted before the private libvirtd starts, so QEMU sees it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List

import libvirt
import pytest
from lxml import etree

from tests import patience
from tests.faults.events import Events, Gone
from tests.faults.held import Held
from tests.guests import daemon, system
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Tool, models, same

SIZES = (8, 12, 16, 24)  # MiB
ROUNDS = 4  # with each size; with the guest that has an OS they are 20
AMPLE = 256  # MiB
DISK = 20 * MIB


class SmallScratch(daemon.Daemon):
    """A private libvirtd whose scratch folder is a file system of its own."""

    _mounted = False

    def _start_keeper(self) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={AMPLE}m,mode=0711", "cbt-scratch", self.scratch],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise daemon.Unavailable(f"no tmpfs of our own here: {done.stderr.strip()}")
        self._mounted = True
        super()._start_keeper()

    def resize(self, mib: int) -> None:
        """Seen in every mount namespace."""
        subprocess.run(["mount", "-o", f"remount,size={mib}m", self.scratch], check=True)

    def close(self) -> None:
        super().close()
        if self._mounted:
            subprocess.run(["umount", self.scratch], check=True)
            self._mounted = False
        shutil.rmtree(self.root, ignore_errors=True)


@pytest.fixture(scope="module")
def private_libvirtd() -> Iterator[SmallScratch]:
    """In place of the one that all other tests share."""
    if os.geteuid():
        pytest.skip("a small file system of our own can be mounted by root only")
    try:
        started = SmallScratch()
        started.__enter__()
    except daemon.Unavailable as e:
        pytest.skip(str(e))
    yield started
    started.close()


@pytest.fixture
def libvirtd(private_libvirtd: SmallScratch) -> SmallScratch:
    if private_libvirtd.pid is None:
        private_libvirtd.start()
    private_libvirtd.resize(AMPLE)
    return private_libvirtd


@pytest.fixture
def tool(libvirtd: SmallScratch, tmp_path: Path) -> Tool:
    return Tool(libvirtd, str(tmp_path / "repository"))


@pytest.fixture
def guest(plain_guest: Callable[..., PlainGuest]) -> PlainGuest:
    return plain_guest(Disk("vda", DISK), name="tight")


class Meter:
    """The lowest free space of the scratch folder in a block, in bytes, looked at each millisecond."""

    def __init__(self, host: daemon.Daemon) -> None:
        self._folder = host.scratch
        self.lowest: int = self._free()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _free(self) -> int:
        status = os.statvfs(self._folder)
        return status.f_bavail * status.f_frsize

    def _watch(self) -> None:
        while not self._end.wait(0.001):
            self.lowest = min(self.lowest, self._free())

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def _fill(rng: random.Random, guest: PlainGuest) -> None:
    """Data that does not compress, so that the copy has something to do."""
    guest.write_bytes("vda", 0, rng.randbytes(DISK))


def _write_on(rng: random.Random, guest: PlainGuest, until: Callable[[], bool]) -> int:
    """The guest writes over all of its disk, as fast as it can; how many MiB.  Errors: WriteFailed."""
    place, count = rng.randrange(DISK // MIB), 0
    while not until():
        guest.write("vda", place % (DISK // MIB) * MIB, MIB, rng.randint(1, 255))
        place, count = place + 1, count + 1
    return count


def _checkpoints(guest: Any) -> List[str]:
    return [c.getName() for c in guest.domain.listAllCheckpoints()]


def _limits(guest: Any) -> List[str]:
    """The disks whose writes are limited."""
    tree = etree.fromstring(guest.domain.XMLDesc().encode())
    return [str(target.get("dev")) for target in tree.iterfind("devices/disk[iotune]/target")]


@pytest.mark.fault(20)
@pytest.mark.parametrize("mib", SIZES)
def test_no_write_of_a_guest_fails_when_the_scratch_runs_out(
    libvirtd: SmallScratch, tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path, mib: int
) -> None:
    tool.backup(guest)
    before = _checkpoints(guest)
    libvirtd.resize(mib)
    with Events(guest) as events:
        for _ in range(ROUNDS):
            _fill(rng, guest)
            with Meter(libvirtd) as meter, Held(tool, guest) as held, Gone(guest) as gone:
                time.sleep(0.1 * rng.random())
                written = _write_on(rng, guest, gone)
                ended = held.ended()
            print(f"{mib} MiB of scratch, {written} MiB written, lowest {meter.lowest >> 10} KiB free")
            assert (ended.code, ended.document["error"]["kind"]) == (14, "ScratchExhausted"), ended
            assert "the next run is an increment" in ended.stderr
            assert meter.lowest > 0
            assert _checkpoints(guest) == before
            assert guest.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
            tool.nothing_left(guest)
            assert _limits(guest) == []
        assert events.harm() == []
    libvirtd.resize(AMPLE)
    made = tool.backup(guest)
    assert (made["disks"][0]["mode"], made["disks"][0]["base"]) == ("incremental", 1)
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


@pytest.mark.fault(20)
def test_a_guest_with_an_os_writes_on_when_the_scratch_runs_out(
    libvirtd: SmallScratch,
    tool: Tool,
    system_guest: Callable[..., system.SystemGuest],
    rng: random.Random,
) -> None:
    """Some hundred MiB a second, past its own cache: an error would stop the guest, as werror=enospc is the default."""
    files = {"from": rng.randbytes(DISK), "onto": rng.randbytes(DISK)}
    guest = system_guest(files={"vda": files}, size=128 * MIB)
    assert tool.run("backup", guest.name).code == 0
    before = _checkpoints(guest)
    copy = "dd if=/disks/vda/from of=/disks/vda/onto bs=1M oflag=direct conv=notrunc && sync"
    with Events(guest) as events:
        for mib in rng.sample(SIZES, len(SIZES)):
            libvirtd.resize(mib)
            with Meter(libvirtd) as meter, Held(tool, guest, "--full") as held, Gone(guest) as gone:
                guest.shell(copy)
                assert gone.within(60)
                ended = held.ended()
            print(f"{mib} MiB of scratch, lowest {meter.lowest >> 10} KiB free")
            assert ended.code == 14, ended
            assert meter.lowest > 0
            assert guest.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
            assert _checkpoints(guest) == before
        assert events.harm() == []
    assert "error" not in guest.shell("dmesg | grep -i 'i/o error' || true")
    libvirtd.resize(AMPLE)
    made = tool.run("backup", guest.name).result
    assert made["disks"][0]["mode"] == "incremental"


@pytest.mark.fault(20)
def test_the_guard_ends_the_job_of_a_killed_tool_before_the_scratch_is_full(
    libvirtd: SmallScratch, tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    _fill(rng, guest)
    tool.backup(guest)
    _fill(rng, guest)
    libvirtd.resize(16)
    with Meter(libvirtd) as meter, Held(tool, guest) as held:
        _write_on(rng, guest, until=_countdown(rng.randint(1, 3)))
        held.kill()
        _write_on(rng, guest, lambda: not guest.has_job)
        _write_on(rng, guest, until=_countdown(32))
    assert meter.lowest > 0
    _unlimited(guest)
    libvirtd.resize(AMPLE)
    assert tool.backup(guest)["disks"][0]["mode"] == "incremental"
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    tool.nothing_left(guest)


def _unlimited(guest: PlainGuest) -> None:
    """The guard takes its limits away after the job."""
    deadline = time.monotonic() + 30
    while _limits(guest):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.fault(7)
@pytest.mark.fault(20)
def test_the_limits_of_a_run_whose_guard_died_too_are_taken_away_and_those_of_others_stay(
    libvirtd: SmallScratch, tool: Tool, plain_guest: Callable[..., PlainGuest], rng: random.Random
) -> None:
    guest = plain_guest(Disk("vda", DISK), Disk("vdb", MIB), name="limited")
    guest.domain.setBlockIoTune("vdb", {"read_iops_sec": 1000}, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    _fill(rng, guest)
    libvirtd.resize(16)
    with Held(tool, guest) as held:
        assert _limits(guest) == ["vda", "vdb"]
        assert guest.domain.blockIoTune("vda")["write_bytes_sec"] > 0
        assert guest.domain.blockIoTune("vdb")["write_bytes_sec"] == 0
        held.kill(guardian=True)
    assert _limits(guest) == ["vda", "vdb"]
    assert any("limits of vda away" in action for action in tool.run("recover", guest.name).result["actions"])
    assert _limits(guest) == ["vdb"]
    libvirtd.resize(AMPLE)
    with Held(tool, guest):
        assert _limits(guest) == ["vdb"]


def _countdown(number: int) -> Callable[[], bool]:
    left = iter(range(number))
    return lambda: next(left, None) is None


@pytest.mark.fault(4)
@pytest.mark.fault(20)
@pytest.mark.parametrize("hard", [False, True])
def test_the_guard_alone_ends_the_job_after_the_daemon_was_restarted(
    libvirtd: SmallScratch, tool: Tool, guest: PlainGuest, rng: random.Random, hard: bool
) -> None:
    """The tool looks at the room, too: not here."""
    _fill(rng, guest)
    libvirtd.resize(24)
    blind = (
        "import sys; from libvirt_cbt.hypervisor import guard; guard.Guard.check = lambda self: None; "
        "from libvirt_cbt import cli; cli.main(sys.argv[1:])"
    )
    argv = [sys.executable, "-c", blind, *tool.argv("backup", guest.name)[1:]]
    with Meter(libvirtd) as meter, Held(tool, guest, argv=argv) as held:
        (libvirtd.kill if hard else libvirtd.stop)()
        libvirtd.start()
        _write_on(rng, guest, lambda: not guest.has_job)
        ended = held.ended()
    assert (ended.code, ended.document["error"]["kind"]) == (13, "SourceLost"), ended
    assert meter.lowest > 0
    tool.nothing_left(guest, checkpoints=0)


@pytest.mark.fault(20)
def test_the_tool_ends_the_job_when_its_guard_was_killed(
    libvirtd: SmallScratch, tool: Tool, guest: PlainGuest, rng: random.Random
) -> None:
    _fill(rng, guest)
    libvirtd.resize(24)
    with Held(tool, guest) as held:
        os.kill(held.guardian, signal.SIGKILL)
        written = 0
        while guest.has_job:
            if written < 12:  # the guest goes on at an easy pace: the tool looks less often than its guard
                guest.write("vda", written * MIB, MIB, 1)
                written += 1
            time.sleep(0.05)
        ended = held.ended()
    assert (ended.code, ended.document["error"]["kind"]) == (14, "ScratchExhausted"), ended
    tool.nothing_left(guest, checkpoints=0)


@pytest.mark.fault(20)
def test_too_little_room_is_refused_before_any_effect_and_scarce_room_is_warned_of(
    libvirtd: SmallScratch, tool: Tool, guest: PlainGuest
) -> None:
    libvirtd.resize(3)
    with Events(guest) as events:
        refused = tool.run("backup", guest.name)
        assert (refused.code, refused.document["error"]["kind"]) == (14, "ScratchSpace")
        assert "--scratch-dir" in refused.stderr
        assert refused.document["error"]["free"] <= 3 * MIB
        assert events.seen() == []
    tool.nothing_left(guest, checkpoints=0)
    libvirtd.resize(8)
    tight = tool.backup(guest)
    assert any(libvirtd.scratch in w and "the backup is ended" in w for w in tight["warnings"]), tight["warnings"]
    libvirtd.resize(AMPLE)
    ample = tool.backup(guest)
    assert not any(libvirtd.scratch in w for w in ample["warnings"]), ample["warnings"]


@pytest.mark.fault(21)
def test_a_copy_that_takes_too_long_ends_its_job(
    libvirtd: SmallScratch, tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    tool.backup(guest)
    _fill(rng, guest)
    watch = patience.Stopwatch()
    with Held(tool, guest, "--max-duration", "1") as held:  # the repository does not take a byte more
        while guest.has_job:
            assert watch.seconds() < 30, "the job goes on"
            time.sleep(0.05)
        assert watch.wall() > 1
        held.release()
        held.process.wait(60)
        ended = held.ended()
    assert (ended.code, ended.document["error"]["kind"]) == (14, "TookTooLong"), ended
    tool.nothing_left(guest)
    assert tool.backup(guest)["disks"][0]["mode"] == "incremental"
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


class Slow:
    """Every write of QEMU's to a job's scratch files takes so many seconds longer, as on a bad disk; by strace."""

    def __init__(self, guest: PlainGuest, seconds: float) -> None:
        if not shutil.which("strace"):
            pytest.skip("strace is not installed")
        self._pid = guest.pid
        paths = [word for file in self._open(guest) for word in ("-P", file)]
        assert paths, "QEMU has no scratch file open"
        calls = "pwrite64,pwritev,pwritev2"
        delay = f"inject={calls}:delay_enter={round(seconds * 1_000_000)}"
        self._strace = subprocess.Popen(
            ["strace", "-f", "-qq", "-p", str(self._pid), *paths, "-e", f"trace={calls}", "-e", delay],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def _open(guest: PlainGuest) -> List[str]:
        folder = f"/proc/{guest.pid}/fd"
        files = [os.readlink(os.path.join(folder, fd)) for fd in os.listdir(folder)]
        return sorted({file for file in files if file.startswith(guest.host.scratch)})

    def __enter__(self) -> Slow:
        deadline = time.monotonic() + 30
        while not self._attached():
            assert self._strace.poll() is None and time.monotonic() < deadline, "strace does not attach"
            time.sleep(0.005)
        return self

    def _attached(self) -> bool:
        """To each thread: https://man7.org/linux/man-pages/man5/proc_pid_status.5.html."""
        tasks = Path("/proc", str(self._pid), "task")
        try:
            return all("\nTracerPid:\t0\n" not in (task / "status").read_text() for task in tasks.iterdir())
        except OSError:
            return False  # one ended meanwhile

    def __exit__(self, *_: object) -> None:
        self._strace.terminate()
        self._said = self._strace.communicate()[1]

    def writes(self) -> int:
        """How many were slow; when it has ended."""
        return self._said.count("(INJECTED)") + self._said.count("(DELAYED)")


@pytest.mark.fault(21)
def test_slow_scratch_slows_the_guest_for_as_long_as_the_job_may_last_and_no_longer(
    libvirtd: SmallScratch, tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    """What QEMU does with slow scratch is its own affair (the guest waits); ours is that it has an end."""
    tool.backup(guest)
    _fill(rng, guest)
    delay, waits = 0.4, []
    with Events(guest) as events:
        with Held(tool, guest, "--max-duration", "8") as held:
            with Slow(guest, delay) as slow:
                for place in range(150):
                    if not guest.has_job:
                        break
                    begun = time.monotonic()
                    guest.write("vda", place * 128 * 1024, 65536, 0x77)
                    waits.append(time.monotonic() - begun)
            assert not guest.has_job
            ended = held.ended()
        assert slow.writes(), slow._said
        assert (ended.code, ended.document["error"]["kind"]) == (14, "TookTooLong"), ended
        assert max(waits) > delay
        guest.write("vda", 0, 65536, 0x78)
        assert events.harm() == []
    tool.nothing_left(guest)
    assert tool.backup(guest)["disks"][0]["mode"] == "incremental"
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


@pytest.mark.fault(21)
def test_a_repository_that_hangs_does_not_hold_the_job(tool: Tool, guest: PlainGuest, rng: random.Random) -> None:
    """What writes the layers stands still, as on a network file system without its server; the guest is let go first."""
    _fill(rng, guest)
    with Held(tool, guest, "--max-duration", "1") as held:
        deadline = time.monotonic() + 30
        while guest.has_job:
            assert time.monotonic() < deadline, "the guest still waits for the repository"
            time.sleep(0.05)
        assert held.process.poll() is None  # it waits for its writer
        ended = held.ended()
    assert (ended.code, ended.document["error"]["kind"]) == (14, "TookTooLong"), ended
    tool.nothing_left(guest, checkpoints=0)
