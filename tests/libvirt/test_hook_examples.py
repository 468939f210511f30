"""The examples of docs/hooks.md do what they promise."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Callable, Final, List

import pytest

from tests.guests import daemon, plain, system
from tests.libvirt.tool import Tool

DOCUMENT: Final = Path(__file__).resolve().parents[2] / "docs" / "hooks.md"


def example(beginning: str) -> str:
    """The first block of code that contains `beginning`."""
    blocks: List[str] = re.findall(r"^```\w+\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return next(block for block in blocks if beginning in block)


def install(tool: Tool, phase: str, name: str, text: str) -> Path:
    path = tool.script(phase, name, "")
    path.write_text(text, encoding="utf-8")
    return path


def test_a_program_in_the_guest_before_and_after(
    libvirtd: daemon.Daemon, system_guest: Callable[..., system.SystemGuest], tmp_path: Path
) -> None:
    guest = system_guest()
    tool = Tool(libvirtd, str(tmp_path / "repository"))
    for phase in ("pre-freeze", "post-thaw"):
        install(tool, phase, "10_in_guest", example("/etc/backup/<phase>"))
    assert tool.run("backup", guest.name).result["warnings"] == []  # nothing to run in this guest
    guest.shell("mkdir -p /etc/backup")
    for phase in ("pre-freeze", "post-thaw"):
        guest.write_file(f"/etc/backup/{phase}", f'#!/bin/sh\necho "{phase} $1" >> /disks/vda/told\n'.encode())
        guest.shell(f"chmod +x /etc/backup/{phase}")
    made = tool.run("backup", guest.name).result
    assert (made["warnings"], made["quiesce"]["result"]) == ([], "frozen")
    assert guest.shell("cat /disks/vda/told").split() == ["pre-freeze", made["backup"], "post-thaw", made["backup"]]
    guest.shell("echo 'echo the disk is full >&2; exit 3' >> /etc/backup/pre-freeze")
    ended = tool.run("backup", guest.name)
    assert (ended.code, ended.document["error"]["reason"]) == (18, "the disk is full")
    assert guest.shell("tail -n 2 /disks/vda/told | cut -d ' ' -f 1").split() == ["pre-freeze", "post-thaw"]
    assert not guest.frozen()


def test_a_message_of_a_failure_and_a_verified_backup(
    libvirtd: daemon.Daemon,
    plain_guest: Callable[..., plain.PlainGuest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest = plain_guest(plain.Disk("vda"), name="example")
    tool = Tool(libvirtd, str(tmp_path / "repository"))
    programs = tmp_path / "bin"
    programs.mkdir()
    command = tool.argv("")[0]
    for name, text in {
        "sendmail": f'cat > "{tmp_path}/to-$1"',
        "libvirt-cbt": f'"{command}" "$@" > {tmp_path}/said && echo "$@" > {tmp_path}/verified',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    install(tool, "failed", "10_mail", example("sendmail"))
    install(tool, "committed", "10_verify", example("verify"))
    assert tool.run("backup", "no-such-guest").code == 10
    assert (tmp_path / "to-root").read_text().startswith("Subject: no backup of no-such-guest\n\nno domain 'no-such-guest'")
    made = tool.backup(guest)
    assert (tmp_path / "verified").read_text() == f"-q verify {guest.uuid} --at {made['backup']}\n"
