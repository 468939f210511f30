"""libvirtd, and virtqemud where it is installed: the tool knows neither by name, socket, pid file or unit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Dict, Final, Iterator, Type

import pytest

from tests.faults.held import Held
from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Tool, models, same

KINDS: Final[Dict[str, Type[daemon.Daemon]]] = {
    kind.name: kind for kind in (daemon.Daemon, daemon.Modular) if kind is daemon.Daemon or daemon.program(kind.name)
}


@pytest.fixture(params=KINDS)
def host(request: Any) -> Iterator[daemon.Daemon]:
    if KINDS[request.param] is daemon.Daemon:
        yield request.getfixturevalue("libvirtd")
        return
    with KINDS[request.param]() as started:
        yield started


@pytest.fixture
def guest(host: daemon.Daemon) -> Iterator[PlainGuest]:
    made = PlainGuest(host, "daemons", [Disk("vda", 24 * MIB)])
    made.define()
    made.start()
    yield made
    made.remove()


def test_backup_restore_recover(host: daemon.Daemon, guest: PlainGuest, rng: random.Random, tmp_path: Path) -> None:
    """With increments, the daemon restarted within a copy, a tool that is killed, and the guest put back."""
    tool = Tool(host, str(tmp_path / "repository"))
    checks = {c["name"]: c for c in tool.run("doctor", guest.name).document["results"][0]["checks"]}
    assert checks["libvirt"]["status"] == "ok"
    assert checks["libvirt"]["detail"].endswith(f"{host.name} ({host.socket})")
    guest.write_bytes("vda", 0, rng.randbytes(24 * MIB))
    with Held(tool, guest) as held:
        host.kill()
        host.start()
        first = held.ended(120).result
    wanted = models(guest)
    guest.random_writes(rng, "vda", 12, discards=True)
    with Held(tool, guest, "--full") as held:
        held.kill(guardian=True)
    assert "ended backup job" in " ".join(tool.run("recover", guest.name).result["actions"])
    tool.nothing_left(guest)
    second = tool.backup(guest)
    assert [d["mode"] for d in second["disks"]] == ["incremental"]
    same(tool.restored(guest, second["backup"], str(tmp_path)), models(guest))
    guest.destroy()
    assert tool.run("restore", guest.name, "--at", first["backup"], "--in-place").code == 0
    guest.disks["vda"].model[:] = wanted["vda"]
    guest.start()
    third = tool.backup(guest)
    assert [d["mode"] for d in third["disks"]] == ["full"]
    same(tool.restored(guest, third["backup"], str(tmp_path)), wanted)
    tool.nothing_left(guest)
