"""The wheel in an environment of its own, as pipx makes one: nothing of the checkout is there, and all of it works."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from pathlib import Path
from typing import Any, Callable, List

from tests import wheels
from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import models, same


def test_what_is_installed_is_whole(
    libvirtd: daemon.Daemon, plain_guest: Callable[..., PlainGuest], rng: random.Random, tmp_path: Path
) -> None:
    command = str(wheels.install(wheels.build(tmp_path), tmp_path))
    variables = ("LIBVIRT_DEFAULT_URI", "LIBVIRT_CBT_RUN_DIR")
    environment = {name: libvirtd.environment()[name] for name in variables}
    environment.update(PATH="/usr/bin:/bin", HOME=str(tmp_path), LIBVIRT_CBT_REPO=str(tmp_path / "repo"))
    environment["LIBVIRT_CBT_CONFIG"] = str(tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text(f'scratch_dir = "{libvirtd.scratch}"\n[policy.all]\nmatch = ["*"]\n')

    def call(*words: str) -> str:
        done = subprocess.run(
            [command, *words], env=environment, cwd="/", capture_output=True, text=True, timeout=120, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def result(*words: str) -> Any:
        return json.loads(call("--json", *words))["results"][0]

    assert re.fullmatch(r"libvirt-cbt, version \S+\n", call("--version"))
    call("init")
    guest = plain_guest(Disk("vda", 4 * MIB), name="web1")
    checks = {one["name"]: one["status"] for one in result("doctor", "web1")["checks"]}
    assert {"tools", "nbd binding", "libvirt", "repository", "disks"} <= {n for n, status in checks.items() if status == "ok"}
    modes: List[str] = []
    for _ in range(2):
        guest.random_writes(rng, "vda", 4)
        modes += [disk["mode"] for disk in result("run")["backup"]["disks"]]
    assert modes == ["full", "incremental"]
    (file,) = result("restore", "web1", "--output", str(tmp_path / "out"))["files"]
    same({"vda": Path(file["path"]).read_bytes()}, models(guest))
    # What is made of files beside the modules, and calls the command that was installed.
    units = str(tmp_path / "units")
    call("systemd", "install", "--directory", units)
    call("hooks", "install", "libvirt", "--directory", str(tmp_path / "hooks"), "--spool-dir", str(tmp_path / "spool"), "--unit-dir", units)
    started = [line for path in Path(units).glob("*.service") for line in path.read_text().splitlines() if "ExecStart=" in line]
    assert [line.split('"')[1] for line in started] == [command] * 2
    assert str(tmp_path / "spool") in "".join(path.read_text() for path in (tmp_path / "hooks").iterdir())
    assert "libvirt_cbt_backups" in call("metrics") and ".TH LIBVIRT" in call("manual", "libvirt-cbt-run")
    assert "_LIBVIRT_CBT_COMPLETE" in call("completion", "bash")
    python = os.path.join(os.path.dirname(command), "python")
    where = "import libvirt_cbt; print(libvirt_cbt.__file__)"
    found = subprocess.check_output([python, "-c", where], env=environment, cwd="/", text=True)
    assert found.startswith(str(tmp_path / "environment"))
    guest.destroy()
