"""A backup server that pulls from several hosts over ssh, by one configuration, as docs/automation.md has it."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Callable, Iterator

import pytest

from tests.guests import daemon, far
from tests.guests.plain import Disk, PlainGuest
from tests.libvirt.tool import COMMAND, Ended, models, same
from tests.remote.tool import FarTool

PlainGuests = Callable[..., PlainGuest]


@pytest.fixture
def other(far: far.Far) -> Iterator[far.Far]:
    """A second host: a libvirtd of its own, and an sshd that the near user calls `other`."""
    from tests.guests import far as fars

    with daemon.Daemon() as host, fars.Far(host) as started:
        started.authorized = (Path(far.ssh) / "id_ed25519.pub").read_text(encoding="utf-8")
        started.restart(authorized=started.authorized)
        for name in ("config", "known_hosts"):
            theirs = (Path(started.ssh) / name).read_text(encoding="utf-8").replace("Host far", "Host other")
            with (Path(far.ssh) / name).open("a", encoding="utf-8") as file:
                file.write(theirs)
        yield started


@pytest.mark.slow  # 10 s for each run: every domain's process makes several connections
def test_a_backup_server_pulls_from_two_hosts(
    far: far.Far, other: far.Far, tool: FarTool, plain_guest: PlainGuests, rng: random.Random, tmp_path: Path
) -> None:
    one = plain_guest(Disk("vda"), name="web1")
    two = PlainGuest(other.host, "web1", [Disk("vda")])  # of one name, as it happens
    config = tmp_path / "libvirt-cbt.toml"
    config.write_text(
        f"""
        repository = "{tool.repository}"
        jobs = 1
        jobs_total = 8
        [host.hyper1]
        connect = "qemu+ssh://far/system"
        [host.hyper2]
        connect = "qemu+ssh://other/system"
        [policy.all]
        match = ["*"]
        """,
        encoding="utf-8",
    )
    environment = {name: value for name, value in tool.environment().items() if name != "LIBVIRT_DEFAULT_URI"}

    def run(*words: str) -> Ended:
        argv = far.near([COMMAND, "--config", str(config), "--json", *words])
        done = subprocess.run(
            argv, env=environment, capture_output=True, text=True, timeout=300, check=False, stdin=subprocess.DEVNULL
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Ended(done.returncode, json.loads(done.stdout), done.stderr)

    try:
        two.define()
        two.start()
        for generation in (1, 2):
            for guest in (one, two):
                guest.random_writes(rng, "vda", 6)
            ended = run("run")
            assert ended.code == 0, ended.stderr
            found = {made["host"]: made for made in ended.document["results"]}
            assert [found[host]["uuid"] for host in ("hyper1", "hyper2")] == [one.uuid, two.uuid]
            assert {made["backup"]["generation"] for made in found.values()} == {generation}
        for guest in (one, two):
            output = str(tmp_path / guest.uuid)
            assert run("restore", guest.uuid, "--output", output).code == 0
            same({"vda": (Path(output) / "vda.raw").read_bytes()}, {"vda": models(guest)["vda"]})
        other.stop(cut=True)
        one.random_writes(rng, "vda", 6)
        ended = run("run")  # a host that is away stands in nobody's way
        assert ended.code != 0 and "hyper2" in ended.stderr
        assert [(made["host"], made["code"]) for made in ended.document["results"]] == [("hyper1", 0)]
    finally:
        two.remove()
