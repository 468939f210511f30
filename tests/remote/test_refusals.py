"""A far host that does not prove who it is, or does not let us in: one sentence, and nothing begun or left behind."""

from __future__ import annotations

import os
from typing import Any, Callable, Iterator

import pytest

from tests.guests.far import ADDRESS, Far
from tests.guests.plain import Disk, PlainGuest
from tests.remote.tool import FarTool


@pytest.fixture
def guest(plain_guest: Callable[..., PlainGuest]) -> PlainGuest:
    return plain_guest(Disk("vda"))


@pytest.fixture(scope="module")
def lasting(far_host: Far) -> Iterator[PlainGuest]:
    """For tests that leave it as it is, and see to that."""
    made = PlainGuest(far_host.host, "lasting", [Disk("vda")])
    made.define()
    made.start()
    yield made
    made.remove()


def refused(tool: FarTool, guest: PlainGuest, kind: str, words: str) -> Any:
    """A backup that ends so, with one sentence on stderr."""
    ended = tool.run("backup", guest.name)
    assert (ended.code, ended.document["error"]["kind"]) == (20, kind), ended.stderr
    assert words in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    tool.nothing_left(guest, checkpoints=0)
    return ended


def test_a_host_key_that_changed(far: Far, tool: FarTool, lasting: PlainGuest) -> None:
    far.key("other")
    far.know("other")
    refused(tool, lasting, "HostUnproved", "is not the one that known_hosts has")


@pytest.mark.parametrize("library", ["ssh", "libssh", "libssh2"])
def test_a_host_key_that_nobody_knows(
    far: Far, tool: FarTool, lasting: PlainGuest, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    """And it is not learned on the way."""
    far.know(None)
    known, key = f"{far.ssh}/known_hosts", f"{far.ssh}/id_ed25519"
    if library != "ssh":
        words = f"keyfile={key}&known_hosts={known}&no_tty=1"
        monkeypatch.setattr(far, "uri", f"qemu+{library}://root@{ADDRESS}:{far.port}/system?{words}")
    refused(tool, lasting, "HostUnproved", "is not in known_hosts")
    assert os.path.getsize(known) == 0


def test_what_would_trust_any_host_is_not_taken(
    far: Far, tool: FarTool, lasting: PlainGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    far.know(None)
    for word in ("no_verify=1", "known_hosts_verify=ignore", "known_hosts_verify=auto"):
        monkeypatch.setattr(far, "uri", f"qemu+ssh://far/system?{word}")
        ended = tool.run("backup", lasting.name)
        assert (ended.code, ended.document["error"]["kind"]) == (2, "Usage")
    tool.nothing_left(lasting, checkpoints=0)


def test_a_key_that_the_host_does_not_accept(far: Far, tool: FarTool, lasting: PlainGuest) -> None:
    far.restart(authorized="")
    refused(tool, lasting, "HostRefused", "ssh has no key that it accepts")


def test_a_host_that_is_away(far: Far, tool: FarTool, lasting: PlainGuest) -> None:
    far.stop()
    refused(tool, lasting, "HostLost", "Connection refused")


@pytest.mark.parametrize("setting", ["AllowStreamLocalForwarding", "AllowTcpForwarding"])
def test_a_host_that_forwards_no_sockets(far: Far, tool: FarTool, lasting: PlainGuest, setting: str) -> None:
    """Found out when the job is there already: it is ended, and its checkpoint goes.  OpenSSH wants both for a socket."""
    far.restart(f"{setting} no")
    refused(tool, lasting, "HostRefused", setting)


def test_the_users_own_configuration_holds(far: Far, tool: FarTool, guest: PlainGuest) -> None:
    """Host alias, port and user come from it in every test; here what people have in it for their terminals."""
    far.configure(
        "ControlMaster auto",
        f"ControlPath {far.ssh}/mux-%C",
        "ControlPersist 5",
        "LocalForward 127.0.0.1:1 127.0.0.1:1",
        "RequestTTY force",
        "LogLevel QUIET",
        "ServerAliveInterval 1",
    )
    tool.backup(guest)
    tool.nothing_left(guest)
    far.configure("IdentityFile /nonexistent", "IdentitiesOnly yes")
    refused_ = tool.run("backup", guest.name)
    assert refused_.document["error"]["kind"] == "HostRefused"
    far.know(None)
    far.configure("StrictHostKeyChecking accept-new")  # the user says so, not we
    tool.backup(guest)


def test_a_login_shell_that_talks(far: Far, tool: FarTool, guest: PlainGuest) -> None:
    far.restart("PermitUserEnvironment yes", authorized=f'environment="BASH_ENV={far.folder}/noise" ' + far.authorized)
    with open(os.path.join(far.folder, "noise"), "w", encoding="utf-8") as file:
        file.write("echo >&2 Last login today\n")  # on stdout it would be libvirt's own connection that broke
    tool.backup(guest)
    tool.nothing_left(guest)
