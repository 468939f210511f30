"""A guest with an OS, an ext4 file system and an agent: its backup is frozen, sound, and boots."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, Callable

from tests.guests import daemon, system
from tests.libvirt.tool import Tool


def test_a_frozen_backup_passes_e2fsck_and_boots_to_an_answering_agent(
    libvirtd: daemon.Daemon, system_guest: Callable[..., system.SystemGuest], tmp_path: Path
) -> None:
    tool = Tool(libvirtd, str(tmp_path / "repository"))
    guest = system_guest(files={"vda": {"hello": b"world"}})
    made = tool.run("backup", guest.name, "--quiesce", "agent").result
    assert made["quiesce"]["result"] == "frozen"
    assert made["quiesce"]["frozen_ms"] < 8000
    assert not guest.frozen()
    data = os.urandom(20_000)
    guest.write_file("/disks/vda/new", data)
    made = tool.run("backup", guest.name).result
    assert (made["disks"][0]["mode"], made["quiesce"]["result"], made["warnings"]) == ("incremental", "frozen", [])
    guest.shut_down()

    output = str(tmp_path / "out")
    tool.run("restore", guest.name, "--output", output)
    image = os.path.join(output, "vda.raw")
    _sound(image)
    ours: Any = os.path.join(libvirtd.images, "restored.raw")
    os.replace(image, ours) if os.stat(image).st_dev == os.stat(libvirtd.images).st_dev else _move(image, ours)
    os.chown(ours, *libvirtd.qemu_ids)
    again = system_guest("again", images={"vda": (ours, "raw")})
    assert again.read_file("/disks/vda/hello") == b"world"
    assert again.read_file("/disks/vda/new") == data


def _move(source: str, destination: str) -> None:
    subprocess.run(["mv", "--", source, destination], check=True)


def _sound(image: str) -> None:
    """A frozen file system has nothing to repair; its journal is clean, too."""
    done = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
