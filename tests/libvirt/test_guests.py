"""The test guests themselves: the models hold, and the private libvirtd survives what tests do to it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from typing import Any, Callable

import pytest

from tests.guests import daemon as daemons
from tests.guests import plain, system

PlainFactory = Callable[..., plain.PlainGuest]
SystemFactory = Callable[..., system.SystemGuest]
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
    deadline = time.monotonic() + 10
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
