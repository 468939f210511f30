"""Row 7 of the faults, at its narrowest: the tool and its guard are killed while libvirt has the request to begin, and has not begun."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import pytest

from tests.faults.held import children
from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Tool, models, same

BEGIN = """
import os, signal, sys
import libvirt
import libvirt_cbt
repository, name, scratch, daemon = sys.argv[1:]
begin = libvirt.virDomain.backupBegin
def late(self, *words):
    os.kill(int(daemon), signal.SIGSTOP)
    print("begins", flush=True)
    return begin(self, *words)
libvirt.virDomain.backupBegin = late
with libvirt_cbt.Session(repository=repository) as session:
    libvirt_cbt.backup(session, name, scratch_dir=scratch)
"""


@pytest.mark.fault(7)
def test_a_job_that_begins_when_its_run_is_dead(
    libvirtd: daemon.Daemon, plain_guest: Callable[..., PlainGuest], tmp_path: Path, rng: random.Random
) -> None:
    guest = plain_guest(Disk("vda", MIB))
    guest.random_writes(rng, "vda", 3)
    tool = Tool(libvirtd, str(tmp_path / "repository"))
    argv = [sys.executable, "-c", BEGIN, tool.repository, guest.name, libvirtd.scratch, str(libvirtd.pid)]
    with subprocess.Popen(argv, env=tool.environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "begins\n"
        try:
            time.sleep(0.5)  # the request is on its way, and nobody takes it
            for pid in [p for p, words in children(process.pid).items() if "guardian" in words] + [process.pid]:
                os.kill(pid, signal.SIGKILL)
            process.wait()
            recover = tool.start("recover", guest.name)
            time.sleep(1.5)  # it waits for libvirt, too
        finally:
            os.kill(int(libvirtd.pid or 0), signal.SIGCONT)
    assert recover.wait(60) == 0
    tool.nothing_left(guest, checkpoints=0)
    time.sleep(1)
    assert not guest.has_job
    tool.backup(guest)
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
