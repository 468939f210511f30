"""Guests whose names are paths, options or commands: rows 53 and 59 of the faults, and what of them others can choose."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any, Callable, List, Set

import pytest

from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import COMMAND, Tool, models, same

# An option of ours and of qemu-img's, a substitution, markup, a quote, a colour, text that runs backwards.
HOSTILE = "--discard -o $(touch pwned) `touch pwned` <&\"'> ü\u202e\x9b31m"


def entries(folder: str) -> Set[str]:
    return {os.path.join(place, name) for place, _, files in os.walk(folder) for name in files}


class Named:
    """The command, with the guest's name as the only thing that follows `--`; in a folder of its own."""

    def __init__(self, host: daemon.Daemon, repository: str, folder: Path) -> None:
        self.tool, self.folder, self.printed = Tool(host, repository), folder, ""

    def __call__(self, command: str, name: str, *options: str, code: int = 0) -> None:
        self.words(command, *options, "--", name, code=code)

    def words(self, *words: str, code: int = 0) -> None:
        argv = [COMMAND, "-r", self.tool.repository, *words]
        done = subprocess.run(
            argv, env=self.tool.environment(), cwd=self.folder, capture_output=True, check=False, text=True, timeout=120
        )
        assert done.returncode == code, (argv, done.stderr)
        for line in (done.stdout + done.stderr).split("\n"):
            assert line.isprintable(), ascii(line)
        self.printed += done.stdout + done.stderr


@pytest.mark.fault(53, 59)
@pytest.mark.parametrize("name", [pytest.param("-rf", marks=pytest.mark.slow), HOSTILE], ids=["option", "hostile"])
def test_a_name_is_only_a_name(
    libvirtd: daemon.Daemon, plain_guest: Callable[..., PlainGuest], tmp_path: Path, name: str
) -> None:
    guest = plain_guest(Disk("vda", MIB), name=name)
    here = tmp_path / "here"
    here.mkdir()
    run = Named(libvirtd, str(tmp_path / "repository"), here)
    scratch = ["--scratch-dir", libvirtd.scratch]
    run("doctor", name, *scratch)
    run("backup", name, *scratch)
    guest.write("vda", 65536, 65536, 0x5A)
    run("backup", name, *scratch)
    run("mark", name, *scratch)
    run("start", name, *scratch)
    run("backup", name, *scratch, code=11)  # whose sentence has a command to copy
    run("stop", name)
    for command in ("status", "list", "show", "verify", "report", "recover"):
        run(command, name)
    run("restore", name, "--output", str(tmp_path / "out"))
    same({"vda": (tmp_path / "out" / "vda.raw").read_bytes()}, models(guest))
    run("restore", name, "--output", str(tmp_path / "made"), "--define", "-copy")
    libvirtd.domain("-copy").undefine()
    run("boot", name, "--name", "-booted $(x)", "--output", libvirtd.scratch, "--wait", "0")
    hint = next(
        line[1:].rpartition("`")[0] for line in run.printed.splitlines() if line.startswith("`libvirt-cbt boot")
    )
    words = shlex.split(hint)
    assert words[:2] == ["libvirt-cbt", "boot"]
    run.words("boot", *words[2:])
    run("prune", name, "--keep-last", "1")
    run("untrack", name)
    assert os.listdir(here) == [] and "pwned" not in os.listdir("/")
    assert not any(os.path.basename(path) == "pwned" for path in entries(str(tmp_path)) | entries(libvirtd.root))
    assert os.listdir(os.path.join(run.tool.repository)) != [] and guest.uuid in os.listdir(run.tool.repository)


@pytest.mark.fault(53)
@pytest.mark.usefixtures("libvirtd")  # which skips where there can be none
@pytest.mark.parametrize("name", ["..", "."])
def test_a_guest_called_as_the_folder_above(tmp_path: Path, name: str) -> None:
    """libvirtd removes its own folders over such a guest, so it has a daemon of its own.

    libvirt 9.0 stumbles over its own paths when it is to define one; for a guest that is not kept it has none.
    """
    with daemon.Daemon() as host, PlainGuest(host, name, [Disk("vda", MIB)]) as guest:
        run = Named(host, str(tmp_path / "repository"), tmp_path)
        host.connection.createXML(guest.xml())
        before = outside(tmp_path, host)
        run("backup", name, "--scratch-dir", host.scratch)
        run("restore", name, "--output", str(tmp_path / "out"))
        run("prune", name, "--keep-last", "1")
        after = outside(tmp_path, host)
        assert sorted(os.listdir(run.tool.repository)) == sorted(["repository.json", guest.uuid])
        assert (tmp_path / "out" / "vda.raw").read_bytes() == bytes(MIB)
        assert [p for p in after if p not in before] == [str(tmp_path / "out" / "vda.raw")]


def outside(folder: Path, host: daemon.Daemon) -> List[str]:
    """Files that are there and are neither the repository's nor libvirt's own."""
    kept: List[Any] = [str(folder / "repository"), os.path.join(host.root, "state"), host.images, host.log]
    return sorted(p for p in entries(str(folder)) | entries(host.root) if not p.startswith(tuple(kept)))
