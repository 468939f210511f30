"""The test guests themselves: the models hold, and the private libvirtd survives what tests do to it."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from concurrent import futures
from typing import Any, Callable, Dict, Tuple

import libvirt
import pytest

from tests import patience
from tests.guests import daemon as daemons
from tests.guests import fake_agent, plain, system

PlainFactory = Callable[..., plain.PlainGuest]
SystemFactory = Callable[..., system.SystemGuest]
Relayed = Tuple[system.SystemGuest, fake_agent.FakeAgent]
KIB = 1024


def test_random_writes_of_every_kind_read_back_as_the_model_says(plain_guest: PlainFactory, rng: random.Random) -> None:
    guest = plain_guest(
        plain.Disk("vda", size=4 * plain.MIB),
        plain.Disk("vdb", size=1 * plain.MIB + 512, options=("cluster_size=512",)),
        plain.Disk("vdc", size=1 * plain.MIB, fmt="raw"),
        plain.Disk("vdd", size=1 * plain.MIB, discard="ignore"),
    )
    for target in guest.disks:
        guest.random_writes(rng, target, 60, discards=True)
    guest.check()
    guest.destroy()
    guest.check()


@pytest.mark.parametrize("disk", [{}, {"options": ("cluster_size=2M",)}, {"fmt": "raw"}, {"discard": "ignore"}])
def test_discarded_ranges_read_as_modelled(plain_guest: PlainFactory, rng: random.Random, disk: Any) -> None:
    size = 4 * plain.MIB + 3 * 512
    guest = plain_guest(plain.Disk("vda", size=size, **disk))
    full = rng.getrandbits(8 * size).to_bytes(size, "little")
    for offset, length in (
        (512, 512),
        (4 * KIB, 4 * KIB),
        (64 * KIB, 64 * KIB),
        (64 * KIB - 512, 128 * KIB + 512),
        (2 * plain.MIB - 512, 2 * plain.MIB + 1024),
        (size - 64 * KIB - 512, 64 * KIB + 512),
    ):
        guest.write_bytes("vda", 0, full)
        guest.discard("vda", offset, length)
        guest.check()


def test_a_write_that_qemu_refuses_is_an_error(plain_guest: PlainFactory) -> None:
    guest = plain_guest(plain.Disk("vda", size=plain.MIB))
    with pytest.raises(plain.WriteFailed):
        guest.write("vda", 2 * plain.MIB, 512, 1)
    guest.check()


def test_guests_outlive_restart_and_kill_of_the_daemon(libvirtd: daemons.Daemon, plain_guest: PlainFactory) -> None:
    guest = plain_guest(name='-rf $(x) <&"> ü')
    guest.write("vda", 0, 4096, 0x11)
    pid = guest.pid
    libvirtd.restart()
    guest.write("vda", 4096, 4096, 0x22)
    libvirtd.kill()
    libvirtd.start()
    guest.write("vda", 512, 512, 0x33)
    assert guest.pid == pid
    guest.check()
    guest.kill()
    assert not guest.running
    guest.start()
    assert guest.running


def test_a_guest_grows_and_gets_another_disk(plain_guest: PlainFactory) -> None:
    guest = plain_guest(plain.Disk("vda", size=plain.MIB))
    guest.write("vda", plain.MIB - 512, 512, 0x55)
    guest.grow("vda", 2 * plain.MIB + 512)
    guest.write("vda", 2 * plain.MIB, 512, 0x66)
    guest.attach(plain.Disk("vdb", size=plain.MIB))
    guest.write("vdb", 0, 512, 0x77)
    guest.check()
    guest.destroy()
    guest.detach("vdb")
    guest.start()
    assert "vdb" not in guest.domain.XMLDesc()


def test_nothing_is_left_when_the_tests_are_killed() -> None:
    script = (
        "import os, signal\nfrom tests.guests import daemon, plain\n"
        "host = daemon.Daemon().__enter__()\nguest = plain.PlainGuest(host)\nguest.define()\nguest.start()\n"
        "print(host.root, host.pid, guest.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=_root(), check=False)
    if "Unavailable" in ended.stderr:
        pytest.skip(ended.stderr.strip().splitlines()[-1])
    root, *pids = ended.stdout.split()
    assert len(pids) == 2, ended.stderr
    gone = [root, *(f"/proc/{pid}" for pid in pids)]
    deadline = time.monotonic() + 60  # libvirtd has 20 s to end in order
    while any(os.path.exists(path) for path in gone):
        assert time.monotonic() < deadline, [path for path in gone if os.path.exists(path)]
        time.sleep(0.02)


def _root() -> str:
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def test_the_guest_with_an_os_freezes_thaws_and_boots_again_from_its_images(system_guest: SystemFactory) -> None:
    began = time.monotonic()
    guest = system_guest(files={"vda": {"hello": b"world"}, "vdb": {}})
    print(f"booted in {time.monotonic() - began:.1f} s")
    assert guest.read_file("/disks/vda/hello") == b"world"
    data = os.urandom(300_000)  # more than one message to the agent
    guest.write_file("/disks/vdb/new", data)
    assert guest.read_file("/disks/vdb/new") == data
    with pytest.raises(system.ExecFailed, match="No such file"):
        guest.read_file("/disks/vda/nothing")

    assert guest.domain.fsFreeze() == 2
    assert guest.frozen()
    assert guest.domain.fsThaw() == 2
    assert not guest.frozen()

    guest.shut_down()
    guest.wait_until_off()
    again = system_guest("again", images={"vda": guest.images["vdb"]})
    assert again.read_file("/disks/vda/new") == data


def _code(call: Callable[[], Any]) -> int:
    """The code of the libvirtError."""
    with pytest.raises(libvirt.libvirtError) as raised:
        call()
    return int(raised.value.get_error_code())


# What it says of an agent that does not answer, and of one that says no; newer releases have a code of their own for each.
NEWER = hasattr(libvirt, "VIR_ERR_AGENT_COMMAND_TIMEOUT")
UNRESPONSIVE = (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, *([libvirt.VIR_ERR_AGENT_COMMAND_TIMEOUT] if NEWER else []))
FAILED = (libvirt.VIR_ERR_INTERNAL_ERROR, *([libvirt.VIR_ERR_AGENT_COMMAND_FAILED] if NEWER else []))


def _anew(guest: system.SystemGuest, agent: fake_agent.FakeAgent) -> None:
    """As if the agent's service had been started again."""
    agent.behave(fake_agent.GOOD)
    agent.leave()
    guest.wait_for_agent_state("disconnected")
    agent.come_back()
    guest.wait_for_agent_state("connected")


def _until_libvirt_has_the_agent_again(guest: system.SystemGuest) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            guest.domain.fsThaw()
        except libvirt.libvirtError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return


def test_a_good_fake_agent_outlives_restarts_of_the_daemon_and_its_own(relay_guest: Relayed) -> None:
    guest, agent = relay_guest
    for attempt in range(1, 5):
        assert guest.domain.fsFreeze() == 2
        assert agent.frozen
        assert _code(guest.domain.fsFreeze) in FAILED
        assert guest.domain.fsThaw() == 2
        assert (agent.freezes, agent.thaws, len(agent.intervals)) == (attempt, attempt, attempt)
        if attempt == 1:
            guest.host.restart()
            _until_libvirt_has_the_agent_again(guest)
        elif attempt == 2:
            guest.host.kill()
            guest.host.start()
            _until_libvirt_has_the_agent_again(guest)
        else:
            _anew(guest, agent)
    agent.leave()
    guest.wait_for_agent_state("disconnected")
    assert _code(guest.domain.fsFreeze) in UNRESPONSIVE
    assert all(since < until for since, until in agent.intervals)


def test_a_silent_agent_is_given_up_after_the_timeout(relay_guest: Relayed) -> None:
    guest, agent = relay_guest
    guest.domain.agentSetResponseTimeout(1, 0)
    # libvirt greets only once per connection, and after a timeout; without an answer it sends nothing else.
    agent.behave(fake_agent.SILENT, to=fake_agent.EVERYTHING)
    watch = patience.Stopwatch()
    assert _code(guest.domain.fsFreeze) in UNRESPONSIVE
    assert watch.wall() > 0.9 and watch.seconds() < 5
    agent.behave(fake_agent.GOOD)
    assert guest.domain.fsThaw() == 0
    assert not agent.count(fake_agent.FREEZE)
    agent.behave(fake_agent.SILENT)
    assert _code(guest.domain.fsFreeze) in UNRESPONSIVE
    assert agent.count(fake_agent.FREEZE) == 1
    assert (agent.freezes, agent.frozen) == (0, False)


def test_a_deaf_agent_that_wakes_freezes_late_and_the_next_thaw_helps(relay_guest: Relayed) -> None:
    guest, agent = relay_guest
    guest.domain.agentSetResponseTimeout(1, 0)
    agent.behave(fake_agent.DEAF)
    assert _code(guest.domain.fsFreeze) in UNRESPONSIVE
    assert _code(guest.domain.fsThaw) in UNRESPONSIVE
    assert (agent.freezes, agent.count(fake_agent.THAW)) == (0, 0)
    agent.behave(fake_agent.GOOD)
    agent.wait(lambda agent: agent.frozen)
    time.sleep(0.3)
    assert agent.frozen  # and nobody would thaw it: libvirt never sent the thaw
    assert guest.domain.fsThaw() == 2
    assert (agent.freezes, agent.thaws, agent.frozen) == (1, 1, False)


@pytest.mark.parametrize("how", [fake_agent.SLOW, fake_agent.LATE])
def test_a_slow_agent_is_waited_for_within_the_timeout(relay_guest: Relayed, how: str) -> None:
    guest, agent = relay_guest
    guest.domain.agentSetResponseTimeout(10, 0)
    agent.behave(how, to=[fake_agent.FREEZE], seconds=1.5)
    began = time.monotonic()
    assert guest.domain.fsFreeze() == 2
    assert time.monotonic() - began > 1.4
    assert guest.domain.fsThaw() == 2
    ((since, until),) = agent.intervals
    assert (until - since > 1.4) == (how == fake_agent.SLOW)

    guest.domain.agentSetResponseTimeout(1, 0)
    agent.behave(how, to=[fake_agent.FREEZE], seconds=3)
    assert _code(guest.domain.fsFreeze) in UNRESPONSIVE
    assert agent.frozen == (how == fake_agent.SLOW)
    assert _code(guest.domain.fsThaw) in UNRESPONSIVE
    agent.wait(lambda agent: agent.freezes == 2)
    guest.domain.agentSetResponseTimeout(10, 0)
    assert guest.domain.fsThaw() == 2
    assert (agent.thaws, agent.frozen) == (2, False)


def test_a_lying_agent_is_believed_by_libvirt(relay_guest: Relayed) -> None:
    guest, agent = relay_guest
    agent.behave(fake_agent.MISCOUNTS)
    assert (guest.domain.fsFreeze(), guest.domain.fsThaw()) == (2, 1)
    agent.behave(fake_agent.DENIES)
    with pytest.raises(libvirt.libvirtError, match=re.escape(fake_agent.HOSTILE_WORDS)):
        guest.domain.fsFreeze()
    assert agent.frozen
    assert _code(guest.domain.fsThaw) in FAILED
    assert (agent.freezes, agent.thaws, agent.frozen) == (2, 2, False)


@pytest.mark.parametrize(
    "behaviour",
    [
        {"how": fake_agent.NONSENSE},
        {"how": fake_agent.NONSENSE, "rubbish": fake_agent.POISON},
        {"how": fake_agent.ENDLESS, "size": 1 << 40},
    ],
    ids=["nonsense", "poison", "endless"],
)
def test_one_bad_line_and_libvirt_cannot_thaw_before_it_connects_anew(
    relay_guest: Relayed, behaviour: Dict[str, Any]
) -> None:
    guest, agent = relay_guest
    pid = guest.host.pid
    assert pid
    guest.domain.agentSetResponseTimeout(30 if behaviour["how"] == fake_agent.ENDLESS else 1, 0)
    assert guest.domain.fsFreeze() == 2
    before = _peak_memory(pid)
    agent.behave(to=[fake_agent.THAW], **behaviour)
    began = time.monotonic()
    with pytest.raises((libvirt.libvirtError, SystemError)):
        guest.domain.fsThaw()
    print(f"an error after {time.monotonic() - began:.1f} s, {_peak_memory(pid) - before} KiB more for libvirtd")
    assert _peak_memory(pid) - before < 128 * KIB
    guest.domain.agentSetResponseTimeout(1, 0)
    agent.behave(fake_agent.GOOD)
    for _ in range(3):
        assert _code(guest.domain.fsThaw) in UNRESPONSIVE
    assert (guest.running, guest.agent_state, agent.frozen) == (True, "connected", True)

    if behaviour["how"] == fake_agent.NONSENSE or (NEWER and behaviour["how"] == fake_agent.ENDLESS):
        guest.host.restart()
        _until_libvirt_has_the_agent_again(guest)
    else:
        _anew(guest, agent)
        assert guest.domain.fsThaw() == 2
    assert (agent.freezes, agent.thaws, agent.frozen) == (1, 1, False)


def _peak_memory(pid: int) -> int:
    """KiB since it was last asked."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        (peak,) = [line.split()[1] for line in status if line.startswith("VmHWM:")]
    with open(f"/proc/{pid}/clear_refs", "w", encoding="ascii") as refs:
        refs.write("5")
    return int(peak)


def test_a_thaw_waits_for_the_freeze_of_another_connection(relay_guest: Relayed) -> None:
    guest, agent = relay_guest
    guest.domain.agentSetResponseTimeout(2, 0)
    agent.behave(fake_agent.DEAF)
    other = libvirt.open(guest.host.uri)
    try:
        with futures.ThreadPoolExecutor() as pool:
            freeze = pool.submit(guest.domain.fsFreeze)
            agent.wait(lambda agent: agent.count(fake_agent.FREEZE) == 1)
            thaw = pool.submit(other.lookupByName(guest.name).fsThaw)
            assert _code(freeze.result) in UNRESPONSIVE
            agent.behave(fake_agent.GOOD)  # within the thaw's own 2 s: it greets, and then thaws
            assert thaw.result() == 2
    finally:
        other.close()
    assert (agent.freezes, agent.thaws, agent.frozen) == (1, 1, False)


def test_a_paused_guest_stays_frozen(relay_guest: Relayed) -> None:
    guest, agent = relay_guest
    assert guest.domain.fsFreeze() == 2
    guest.domain.suspend()
    assert _code(guest.domain.fsThaw) == libvirt.VIR_ERR_OPERATION_INVALID
    guest.domain.resume()
    assert agent.frozen
    assert guest.domain.fsThaw() == 2
