"""The command on the near side of a far host."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List

from tests.guests import daemon, far, plain
from tests.libvirt import tool


@contextmanager
def small_scratch(host: daemon.Daemon) -> Iterator[Callable[[int], None]]:
    """Makes a host's scratch folder a file system of so many MiB."""
    folder = "/var/lib/libvirt/cbt-scratch"
    enter = host.enter()

    def mount(mib: int) -> None:
        options = ["-t", "tmpfs", "-o", f"size={mib}m,mode=0711", "cbt-scratch", folder]
        subprocess.run([*enter, "mkdir", "-p", folder], check=True)
        subprocess.run([*enter, "mount", *options], check=True)

    yield mount
    while subprocess.run([*enter, "umount", folder], check=False, stderr=subprocess.DEVNULL).returncode == 0:
        pass


class FarTool(tool.Tool):
    """As a user of a backup server runs it, who has `far` in ~/.ssh/config."""

    def __init__(self, host: far.Sides, repository: str) -> None:
        self.far = host
        super().__init__(host.host, repository)

    def argv(self, command: str, *arguments: str) -> List[str]:
        return self.far.near([tool.COMMAND, "-r", self.repository, "--json", command, *arguments])

    def environment(self) -> Dict[str, str]:
        return self.far.environment()

    def run(self, command: str, *arguments: str, repository: Any = None) -> tool.Ended:
        assert repository is None
        return super().run(command, *arguments)

    def nothing_left(self, guest: plain.PlainGuest, checkpoints: int = 1) -> None:
        """No job, no file on either side, no staging, and so many checkpoints of ours."""
        deadline = time.monotonic() + 30
        while self.far.left() and time.monotonic() < deadline:
            time.sleep(0.05)  # the guard ends after the tool
        assert self.far.left() == [], self.far.left()
        staging = os.path.join(self.repository, guest.uuid, "staging")
        assert not os.path.isdir(staging) or os.listdir(staging) == []
        if guest.running:
            assert not guest.has_job
            names = [c.getName() for c in guest.domain.listAllCheckpoints()]
            assert len([n for n in names if n.startswith("cbt-")]) == checkpoints, names
