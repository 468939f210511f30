"""Messages with fields: to a journal's socket, as JSON lines, and as text where neither is wanted."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Dict, Iterator

import pytest

from libvirt_cbt import cli, errors, journal
from libvirt_cbt.cli import logs


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    yield
    logs.configure(lambda: "auto")


@pytest.fixture
def receiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket as journald's; whoever sends does not know the difference."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(path)
        bound.settimeout(10)
        monkeypatch.setattr(journal, "SOCKET", path)
        monkeypatch.setattr(journal.send, "__defaults__", (path,))
        yield bound


def parsed(data: bytes) -> Dict[str, str]:
    """The fields of a datagram, by the protocol's description."""
    fields: Dict[str, str] = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", rest[:8])
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        fields[name.decode()] = value.decode()
        data = rest
    return fields


def test_a_message_has_its_facts_as_fields(receiver: socket.socket, capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure(lambda: "journald")
    logs.about(domain="web\n1")
    logs.error(errors.SourceStalled(target="vda", seconds=3.0))
    fields = parsed(receiver.recv(65536))
    assert fields == {
        "MESSAGE": str(errors.SourceStalled(target="vda", seconds=3.0)),
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "libvirt-cbt",
        "LIBVIRT_CBT_DOMAIN": "web\n1",
        "LIBVIRT_CBT_TARGET": "vda",
        "LIBVIRT_CBT_SECONDS": "3.0",
        "LIBVIRT_CBT_KIND": "SourceStalled",
        "LIBVIRT_CBT_CODE": "13",
    }
    logs.warning("so", since=None, many=[1], **{"odd key": 1})
    fields = parsed(receiver.recv(65536))
    assert (fields["PRIORITY"], fields["LIBVIRT_CBT_ODD_KEY"]) == ("4", "1")
    assert not {"LIBVIRT_CBT_SINCE", "LIBVIRT_CBT_MANY"} & set(fields)
    assert capfd.readouterr() == ("", "")


def test_the_command_writes_there(receiver: socket.socket, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_code(["--log", "journald", "-r", "/nonexistent", "list"]) == 10
    fields = parsed(receiver.recv(65536))
    assert (fields["LIBVIRT_CBT_KIND"], fields["LIBVIRT_CBT_REPOSITORY"]) == ("NoRepository", "/nonexistent")
    assert capfd.readouterr() == ("", "")


def test_without_a_journal_it_is_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(journal.send, "__defaults__", (str(tmp_path / "none"),))
    logs.configure(lambda: "journald")
    logs.about(domain="web1")
    logs.warning("be\x1bware")
    assert capfd.readouterr().err == "libvirt-cbt: web1: warning: be\\x1bware\n"


def test_a_journal_that_takes_nothing_holds_nobody_up(receiver: socket.socket) -> None:
    for _ in range(8):  # its queue is longer than what one sender may have under way
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler, suppress(BlockingIOError):
            filler.setblocking(False)
            filler.connect(journal.SOCKET)
            while True:
                filler.send(b"x")
    assert not journal.send({"MESSAGE": "x"})
    assert not journal.send({"MESSAGE": "x" * 10_000_000})


def test_json_lines(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_code(["--log", "json", "--json", "-r", "/nonexistent", "list"]) == 10
    out, err = capfd.readouterr()
    assert json.loads(out)["error"]["kind"] == "NoRepository"
    (line,) = err.splitlines()
    found = json.loads(line)
    assert (found["level"], found["kind"], found["code"]) == ("error", "NoRepository", 10)
    assert found["time"].endswith("Z")


def test_the_configuration_says_where_and_the_command_line_beats_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('log = "json"')
    argv = ["--config", str(file), "-r", "/nonexistent", "list"]
    assert cli.exit_code(argv) == 10
    assert json.loads(capfd.readouterr().err)["code"] == 10
    assert cli.exit_code(["--log", "stderr", *argv]) == 10
    assert capfd.readouterr().err.startswith("libvirt-cbt: no repository")
    monkeypatch.setenv("LIBVIRT_CBT_LOG", "stderr")
    assert cli.exit_code(argv) == 10
    assert capfd.readouterr().err.startswith("libvirt-cbt: no repository")
    monkeypatch.delenv("LIBVIRT_CBT_LOG")
    file.write_text("log = ")  # what is wrong with it is told all the same
    assert cli.exit_code(argv) == 2
    assert capfd.readouterr().err.startswith(f"libvirt-cbt: {file}: ")


def test_the_journal_is_taken_where_stderr_goes_there(tmp_path: Path) -> None:
    """systemd sets JOURNAL_STREAM to the device and inode of the stream; inherited by what writes elsewhere."""
    program = "import sys; from libvirt_cbt import journal; sys.exit(journal.connected())"
    with open(tmp_path / "stream", "wb") as stream:
        status = os.fstat(stream.fileno())
        for value, wanted in ((f"{status.st_dev}:{status.st_ino}", 1), (f"{status.st_dev}:1", 0), ("", 0), ("x", 0)):
            environment = {**os.environ, "JOURNAL_STREAM": value}
            done = subprocess.run([sys.executable, "-c", program], stderr=stream, env=environment, check=False)
            assert done.returncode == wanted
