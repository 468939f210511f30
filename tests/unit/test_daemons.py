"""Whose socket it is that we speak to; nothing of ours knows a daemon's name beforehand."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Iterator, List, Optional

import pytest

import libvirt_cbt
from libvirt_cbt.hypervisor import daemons

PACKAGE = Path(libvirt_cbt.__file__).parent
# As libvirt's client would be connected to it.
LISTENS = """
import socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
open("/proc/self/comm", "w").write(sys.argv[2])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    return tmp_path


class Listening:
    """A process called `name` that listens, and our connection to it."""

    def __init__(self, path: str, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LISTENS, path, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(path)

    def close(self) -> None:
        self.connection.close()
        self.process.communicate()


@pytest.mark.parametrize(
    ("path", "name", "given", "shown"),
    [
        ("virtqemud-sock", "virtqemud", None, ["virtqemud (virtqemud-sock)"]),
        ("libvirt-sock", "libvirtd", None, ["libvirtd (libvirt-sock)"]),
        ("libvirt-sock", "virtproxyd", None, ["virtproxyd (libvirt-sock)"]),
        ("virtqemud-sock", "systemd", None, ["virtqemud (virtqemud-sock)"]),  # which listens for it
        ("libvirt-sock-ro", "systemd", None, ["libvirtd or virtproxyd (libvirt-sock-ro)"]),
        ("own.sock", "virtqemud", "own.sock", ["virtqemud (own.sock)"]),
        ("own.sock", "virtqemud", None, []),
    ],
)
@pytest.mark.usefixtures("near")
def test_the_daemon_is_named(path: str, name: str, given: Optional[str], shown: List[str]) -> None:
    before, others = os.listdir("/proc/self/fd"), daemons.connected(given)  # of tests before this one
    server = Listening(path, name)
    try:
        assert Counter(daemons.connected(given)) - Counter(others) == Counter(shown)
    finally:
        server.close()
    assert daemons.connected(given) == others
    assert os.listdir("/proc/self/fd") == before


def sources() -> Iterator[Path]:
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.sh")]:
        if path.name != "daemons.py":
            yield path


def test_no_daemon_is_assumed() -> None:
    """Neither its socket nor its folder, pid file, unit or process: there are a dozen of them, and they are exchanged."""
    known = re.compile(r"libvirtd?-sock|virtqemud-sock|/libvirtd?\.(?:pid|sock)|libvirtd\.(?:pid|service|socket)|pidof|\bpgrep\b")
    assert [f"{path.name}: {found[0]}" for path in sources() if (found := known.search(path.read_text(encoding="utf-8")))] == []
