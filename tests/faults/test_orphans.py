"""What a killed prune had running may live on for a moment, with a layer open: nobody reads or changes it till then."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, Iterator, List, Sequence

import pytest

import libvirt_cbt
from libvirt_cbt import errors
from tests.faults import tracer
from tests.nbd.conftest import MIB, served
from tests.nbd.histories import History
from tests.unit import repository_samples as samples

# A qemu-nbd that outlives its parent, as one does that is killed on a busy host.
ORPHAN = """#!/bin/sh
case "$*" in *merge-*) echo $$ > {folder}/orphan; exec setpriv --pdeathsig clear -- {real} "$@";; esac
exec {real} "$@"
"""


@pytest.fixture
def history(rng: random.Random) -> Iterator[History]:
    with tempfile.TemporaryDirectory(prefix="orphan-") as folder:
        made = History(folder, MIB + 512)
        for _ in range(3):
            made.write(rng)
            made.generation()
        yield made


class Orphaned:
    """A prune that was killed while a writer of its layers runs, which goes on until `end`."""

    def __init__(self, history: History) -> None:
        self.history = history
        tools = os.path.join(history.folder, "bin")
        os.mkdir(tools)
        script = Path(tools, "qemu-nbd")
        script.write_text(ORPHAN.format(folder=history.folder, real=shutil.which("qemu-nbd")))
        script.chmod(0o755)
        self.environment: Dict[str, str] = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "LIBVIRT_CBT_RUN_DIR": os.path.join(history.folder, "run"),
        }

    def arguments(self, *command: str) -> List[str]:
        return ["-c", "test:///default", "-r", self.history.repository.path, *command]

    def kill(self, prune: List[str]) -> None:
        """Once it writes to the layer."""

        def at(point: tracer.Point, _what: str, pid: int) -> None:
            if point.kind == "nbd" and self.pid():
                os.kill(pid, signal.SIGKILL)

        ended = tracer.run(self.arguments("prune", samples.UUID, *prune), self.environment, at)
        assert ended.code == -signal.SIGKILL, ended
        assert os.path.exists(f"/proc/{self.pid()}")

    def pid(self) -> int:
        try:
            return int(Path(self.history.folder, "orphan").read_text() or 0)
        except FileNotFoundError:
            return 0

    def end(self) -> None:
        os.kill(self.pid(), signal.SIGKILL)

    def begin(self, *command: str) -> subprocess.Popen[bytes]:
        argv = [os.path.join(os.path.dirname(sys.executable), "libvirt-cbt"), *self.arguments(*command)]
        return subprocess.Popen(argv, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.fault(37, 44)
@pytest.mark.parametrize("commands", [("verify", "restore"), ("prune",)])
def test_whoever_comes_next_waits_for_the_writer_of_a_killed_prune(history: History, commands: Sequence[str]) -> None:
    orphaned = Orphaned(history)
    orphaned.kill(["--remove", "2"])
    more = {"verify": (), "restore": ("--output", os.path.join(history.folder, "out")), "prune": ("--remove", "2")}
    try:
        begun = [orphaned.begin(command, samples.UUID, *more[command]) for command in commands]
        # They would be through long before, if they did not wait; on a slower host nothing is proved.
        time.sleep(2)
        assert [one.poll() for one in begun] == [None for _ in begun]
    finally:
        orphaned.end()
    for one in begun:
        _, complaints = one.communicate(timeout=60)
        assert one.returncode == 0, complaints.decode()
    history.prune(remove=["2"] if len(history.backups()) == 3 else (), keep_last=9)
    history.prove()


@pytest.mark.fault(41)
def test_a_layer_that_another_program_writes_to_is_in_use_and_not_damaged(history: History) -> None:
    newest = history.backups()[-1].id
    socket = os.path.join(history.folder, "foreign.sock")
    argv = ["qemu-nbd", "-t", "-f", "qcow2", "-k", socket, history.layer(newest)]
    with served(argv, socket), history.session() as session:
        with pytest.raises(errors.LayerInUse, match=newest):
            libvirt_cbt.verify(session, samples.UUID)
        for salvage in (False, True):
            with pytest.raises(errors.LayerInUse, match=newest):
                libvirt_cbt.restore(session, samples.UUID, os.path.join(history.folder, "out"), salvage=salvage)
        with pytest.raises(errors.LayerInUse, match=newest):
            libvirt_cbt.prune(session, samples.UUID, remove=["2"])
    history.prune(remove=["2"])
    history.prove()
