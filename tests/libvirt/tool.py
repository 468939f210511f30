"""The command as a user runs it, on the private libvirtd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from tests.guests import daemon, plain

COMMAND = os.path.join(os.path.dirname(sys.executable), "libvirt-cbt")


@dataclass(frozen=True)
class Ended:
    code: int
    document: Dict[str, Any]
    stderr: str

    @property
    def result(self) -> Any:
        assert self.code == 0, f"exit code {self.code}: {self.stderr}"
        return self.document["results"][0]


class Tool:
    """`libvirt-cbt` with one repository; `--json` always, so that a result is at hand."""

    def __init__(self, host: daemon.Daemon, repository: str) -> None:
        self.host, self.repository = host, repository
        self.run("init")

    @property
    def hooks(self) -> str:
        """Where its scripts are."""
        return f"{self.repository}.hooks.d"

    def argv(self, command: str, *arguments: str) -> List[str]:
        scratch = ["--scratch-dir", self.host.scratch] if command in ("backup", "mark", "start") else []
        return [COMMAND, "-r", self.repository, "--json", command, *arguments, *scratch]

    def environment(self) -> Dict[str, str]:
        return {**os.environ, **self.host.environment(), "LIBVIRT_CBT_HOOKS_DIR": self.hooks}

    def script(self, phase: str, name: str, text: str) -> Path:
        """An administrator's script, of shell, for a phase of later runs."""
        path = Path(self.hooks, phase, name)
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    def run(self, command: str, *arguments: str, repository: Optional[str] = None) -> Ended:
        argv = self.argv(command, *arguments)
        if repository:
            argv[2] = repository
        done = subprocess.run(
            argv,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Ended(done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr)

    def start(self, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.argv(command, *arguments),
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def backup(self, guest: plain.PlainGuest, *arguments: str) -> Any:
        """A backup that succeeds."""
        return self.run("backup", guest.name, *arguments).result

    def restored(self, guest: plain.PlainGuest, at: str, folder: str) -> Dict[str, bytes]:
        """What a restore wrote, by target."""
        output = os.path.join(folder, f"restored-{at}-{time.monotonic_ns()}")
        found = self.run("restore", guest.name, "--at", at, "--output", output).result
        return {file["target"]: _content(file["path"]) for file in found["files"]}

    def nothing_left(self, guest: plain.PlainGuest, checkpoints: int = 1) -> None:
        """No job, no scratch, no socket, no staging, and so many checkpoints of ours."""
        uuid = guest.uuid
        assert os.listdir(self.host.scratch) == []
        assert os.listdir(self.host.run_dir) == []
        assert os.listdir(os.path.join(self.repository, uuid, "staging")) == []
        if guest.running:
            assert not guest.has_job
            names = [c.getName() for c in guest.domain.listAllCheckpoints()]
            assert len([n for n in names if n.startswith("cbt-")]) == checkpoints, names


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def guards(uuid: str) -> List[int]:
    """Pids of the guard processes of a domain."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if uuid.encode() in words and any(b"guardian" in w for w in words):
            found.append(int(pid))
    return found


def models(guest: plain.PlainGuest) -> Dict[str, bytes]:
    return {target: bytes(disk.model) for target, disk in guest.disks.items()}


def same(found: Dict[str, bytes], wanted: Dict[str, bytes]) -> None:
    for target, content in found.items():
        difference = plain.first_difference(content, wanted[target])
        assert difference is None, f"{target} differs from the model at byte {difference}"
