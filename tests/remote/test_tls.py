"""A guest on a host behind TLS: nothing of ours runs there, nothing is said in the clear, and both ends prove themselves."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator, List

import libvirt
import pytest

from tests.faults.events import Events, Gone
from tests.faults.held import Held
from tests.guests import far, proxy, tls
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import guards, models, same
from tests.remote.test_cut import IMPATIENT, until
from tests.remote.tool import FarTool, small_scratch

PlainGuests = Callable[..., PlainGuest]
SIZE = 24 * MIB


def test_increments_of_a_guest_behind_tls(
    tls_far: tls.TlsFar, tls_tool: FarTool, tls_guest: PlainGuests, rng: random.Random, tmp_path: Path
) -> None:
    guest = tls_guest(Disk("vda"), Disk("vdb", size=5 * MIB + 512, options=("cluster_size=4k",)))
    for disk in guest.disks.values():
        tls_far.decoy(disk.path, b"not the guest's")
    before = tls_far.decoys()
    for number in range(3):
        for target in guest.disks:
            guest.random_writes(rng, target, 12, discards=True)
        made = tls_tool.backup(guest)
        assert {d["mode"] for d in made["disks"]} == {"incremental" if number else "full"}
        tls_tool.nothing_left(guest)
    same(tls_tool.restored(guest, made["backup"], str(tmp_path)), models(guest))  # of all three
    assert tls_far.decoys() == before
    manifest = json.loads(Path(tls_tool.repository, guest.uuid, "backups", made["backup"], "manifest.json").read_text())
    assert [row["source"]["inode"] for row in manifest["disks"]] == [None, None]


@pytest.fixture
def guest(tls_guest: PlainGuests) -> PlainGuest:
    return tls_guest(Disk("vda"))


@pytest.fixture(scope="module")
def lasting(tls_far_host: tls.TlsFar) -> Iterator[PlainGuest]:
    """For tests that leave it as it is, and see to that."""
    made = PlainGuest(tls_far_host.host, "lasting", [Disk("vda")])
    made.define()
    made.start()
    yield made
    made.remove()


def refused(tool: FarTool, guest: PlainGuest, kind: str, words: str, code: int = 20) -> None:
    """A backup that ends so, with one sentence on stderr."""
    ended = tool.run("backup", guest.name)
    assert (ended.code, ended.document["error"]["kind"]) == (code, kind), ended.stderr
    assert words in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    tool.nothing_left(guest, checkpoints=0)


# Who does not prove himself


def test_a_client_without_a_certificate(tls_far: tls.TlsFar, tls_tool: FarTool, lasting: PlainGuest) -> None:
    tls_far.own(None)
    refused(tls_tool, lasting, "HostRefused", "does not accept our certificate, or we have none")


def test_a_client_whose_certificate_has_expired(tls_far: tls.TlsFar, tls_tool: FarTool, lasting: PlainGuest) -> None:
    tls_far.own(tls_far.host.authority.issue("late", tls.CLIENT, days=-1))
    refused(tls_tool, lasting, "HostRefused", "has expired")


def test_a_client_of_another_authority(tls_far: tls.TlsFar, tls_tool: FarTool, lasting: PlainGuest) -> None:
    tls_far.own(tls_far.host.stranger.issue("backup", tls.CLIENT))
    refused(tls_tool, lasting, "HostRefused", "hasn't got a known issuer")


def test_a_client_that_trusts_another_authority(tls_far: tls.TlsFar, tls_tool: FarTool, lasting: PlainGuest) -> None:
    stranger = tls_far.host.stranger
    tls_far.own(stranger.issue("backup", tls.CLIENT), stranger)
    refused(tls_tool, lasting, "HostUnproved", "unable to get local issuer certificate")


def test_a_client_without_the_authority(tls_far: tls.TlsFar, tls_tool: FarTool, lasting: PlainGuest) -> None:
    os.unlink(os.path.join(tls_far.client, "cacert.pem"))
    refused(tls_tool, lasting, "HostUnproved", "Cannot read CA certificate")


def test_a_libvirt_that_is_not_the_one(tls_far: tls.TlsFar, tls_tool: FarTool, lasting: PlainGuest) -> None:
    host = tls_far.host
    try:
        for extensions, days, words in ((tls.SERVER, -1, "has expired"), (tls.OTHER, 30, "Hostname mismatch")):
            host.listen(host.authority.issue("wrong", extensions, days=days))
            host.restart()
            refused(tls_tool, lasting, "HostUnproved", words)
    finally:
        host.listen(host.pair)
        host.restart()


@pytest.mark.parametrize("wrong", ["name", "authority", "client's authority"])
def test_a_qemu_that_is_not_the_one(tls_far: tls.TlsFar, tls_tool: FarTool, lasting: PlainGuest, wrong: str) -> None:
    """Found out when the job is there already: it is ended, and its checkpoint goes."""
    host = tls_far.host
    if wrong == "name":
        host.qemu(host.authority.issue("wrong", tls.OTHER))
    elif wrong == "authority":
        host.qemu(host.stranger.issue("wrong", tls.SERVER), host.stranger)
    else:
        host.qemu(host.pair)
        with open(os.path.join(host.pki, "qemu/ca-cert.pem"), "w", encoding="ascii") as file:
            file.write(Path(host.stranger.certificate).read_text(encoding="ascii"))
    try:
        if wrong == "client's authority":  # QEMU itself sees that its own certificate is not of that authority
            refused(tls_tool, lasting, "HypervisorError", "certificate")
        else:
            refused(tls_tool, lasting, "HostUnproved", "certificate of its NBD server")
    finally:
        host.qemu(host.pair)


def test_a_qemu_whose_certificate_has_expired(tls_far: tls.TlsFar, tls_tool: FarTool, lasting: PlainGuest) -> None:
    """QEMU sees that itself, and libvirt tells."""
    host = tls_far.host
    host.qemu(host.authority.issue("late", tls.SERVER, days=-1))
    try:
        refused(tls_tool, lasting, "HypervisorError", "has expired")
    finally:
        host.qemu(host.pair)


def test_a_host_that_lets_everybody_read(tls_far: tls.TlsFar, tls_tool: FarTool, lasting: PlainGuest) -> None:
    """By its setting; it is tried, and the backup refused."""
    host = tls_far.host
    host.configure(verify=False)
    host.restart()
    try:
        refused(tls_tool, lasting, "ProofNotAsked", "backup_tls_x509_verify = 1")
    finally:
        host.configure()
        host.restart()


# What goes in the clear


@pytest.mark.parametrize("scheme", ["qemu+tcp", "qemu+ext"])
def test_what_is_in_the_clear_is_not_taken(
    tls_far: tls.TlsFar, tls_tool: FarTool, lasting: PlainGuest, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """The listener is there, and libvirt would let us in."""
    port = tls_far.host.tcp_port
    libvirt.open(f"qemu+tcp://{far.ADDRESS}:{port}/system").close()
    monkeypatch.setattr(tls_far, "uri", f"{scheme}://{tls.NAME}:{port}/system")
    refused(tls_tool, lasting, "Unencrypted", "is not protected on its way", 2)


def test_an_alias_for_what_is_in_the_clear(tls_far: tls.TlsFar, tls_tool: FarTool, lasting: PlainGuest, tmp_path: Path) -> None:
    aliases = tmp_path / "libvirt.conf"
    port = tls_far.host.tcp_port
    aliases.write_text(f'uri_aliases = ["near=qemu+tcp://{tls.NAME}:{port}/system"]\n', encoding="ascii")
    tls_far.mounts = {"/etc/libvirt/libvirt.conf": str(aliases)}
    tls_far.uri = "near"
    refused(tls_tool, lasting, "Unencrypted", "is not protected on its way", 2)


def test_an_export_asks_for_tls_and_a_certificate(tls_far: tls.TlsFar, tls_tool: FarTool, guest: PlainGuest) -> None:
    """While it is there, nobody else is let in: neither in the clear nor without a certificate."""
    guest.write("vda", MIB, 65536, 0x5A)
    started = tls_tool.run("start", guest.name).result
    uri = started["disks"][0]["uri"]
    assert uri == f"nbds://{started['socket']}/{started['id']}-vda"
    assert tls_tool.run("status", guest.name).result["open_point"]["socket"] == f"{far.ADDRESS}:{uri.split(':')[2].split('/')[0]}"
    guest.write("vda", MIB, 65536, 0xEE)
    near = tls_far.near
    plain = subprocess.run(near(["nbdinfo", uri.replace("nbds:", "nbd:")]), capture_output=True, text=True, check=False)
    assert plain.returncode and "Operation not supported" in plain.stderr
    own = Path(tls_far.folder, "libnbd")
    tls_far.host.authority.folder_of(str(own), None, ["ca-cert.pem"])
    nobody = subprocess.run(near(["nbdinfo", f"{uri}?tls-certificates={own}"]), capture_output=True, text=True, check=False)
    assert nobody.returncode and "TLS" in nobody.stderr
    for name, source in (("client-cert.pem", "clientcert.pem"), ("client-key.pem", "clientkey.pem")):
        (own / name).symlink_to(os.path.join(tls_far.client, source))
    read = subprocess.run(near(["nbdcopy", f"{uri}?tls-certificates={own}", "-"]), check=True, capture_output=True).stdout
    assert read[MIB : MIB + 65536] == b"\x5a" * 65536
    assert tls_tool.run("stop", guest.name).result["committed"]
    tls_tool.nothing_left(guest)


# Ports


def test_ports_in_use_are_passed_over(tls_far: tls.TlsFar, tls_tool: FarTool, guest: PlainGuest) -> None:
    low, high = tls_far.ports
    taken = [socket.create_server((far.ADDRESS, port)) for port in range(low, high)]
    try:
        tls_tool.backup(guest)
        tls_tool.nothing_left(guest)
        taken.append(socket.create_server((far.ADDRESS, high)))
        ended = tls_tool.run("backup", guest.name)
        assert (ended.code, ended.document["error"]["kind"]) == (20, "PortsTaken")
        assert "--nbd-ports" in ended.stderr
        tls_tool.nothing_left(guest)
    finally:
        for one in taken:
            one.close()


def test_a_port_that_was_taken_meanwhile(tls_far: tls.TlsFar, tls_tool: FarTool, guest: PlainGuest) -> None:
    """Between the look and QEMU's: the next one is tried in the same moment."""
    code = """
import socket, sys
from libvirt_cbt import cli
from libvirt_cbt.hypervisor import fartls
found = fartls.Tls.servers
def servers(self, where):
    first, *_ = self._candidates
    with socket.create_server((first.address, first.port)):
        yield from found(self, where)
fartls.Tls.servers = servers
cli.main(sys.argv[1:])
"""
    argv = tls_tool.argv("backup", guest.name)
    at = argv.index(next(word for word in argv if word.endswith("libvirt-cbt")))
    done = subprocess.run(
        [*argv[:at], sys.executable, "-c", code, *argv[at + 1 :]],
        env=tls_tool.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tls_tool.nothing_left(guest)


# What is not done by TLS


def test_what_only_files_can_tell(tls_far: tls.TlsFar, tls_tool: FarTool, guest: PlainGuest) -> None:
    tls_tool.backup(guest)
    checks = {c["name"]: c for c in tls_tool.run("doctor", guest.name).document["results"][0]["checks"]}
    assert {name: c["detail"] for name, c in checks.items() if c["status"] == "failed"} == {}
    assert f"{tls.NAME} by TLS" in checks["far host"]["detail"]
    guest.destroy()
    ended = tls_tool.run("backup", guest.name)
    assert (ended.code, ended.document["error"]["kind"]) == (2, "Elsewhere")
    assert "by ssh" in ended.stderr
    assert tls_tool.run("recover", guest.name).code == 0
    tls_tool.nothing_left(guest)


# Cut


@pytest.fixture
def full(rng: random.Random, tls_guest: PlainGuests) -> PlainGuest:
    made = tls_guest(Disk("vda", SIZE), name="full")
    made.write_bytes("vda", 0, rng.randbytes(SIZE))
    return made


@pytest.fixture
def wires(tls_far: tls.TlsFar, monkeypatch: pytest.MonkeyPatch) -> Iterator[List[proxy.Proxy]]:
    """The near side's only way to the host, which it knows by another name and address."""
    low, high = tls_far.ports
    monkeypatch.setattr(tls_far, "uri", tls_far.address(far.BEHIND))
    config = Path(tls_far.folder, "libvirt-cbt.toml")
    host = f'connect = "{tls_far.uri}"\nnbd_address = "{far.ADDRESS}"\nnbd_ports = "{low}-{high}"\n'
    config.write_text(f"[host.far]\n{host}", encoding="utf-8")
    known = tls_far.environment()
    del known["LIBVIRT_CBT_NBD_PORTS"]
    monkeypatch.setattr(tls_far, "environment", lambda: {**known, "LIBVIRT_CBT_CONFIG": str(config)})
    made = tls_far.wires()
    yield made
    for wire in made:
        wire.close()


def test_a_copy_goes_on_after_a_cut(
    tls_tool: FarTool, full: PlainGuest, wires: List[proxy.Proxy], tmp_path: Path
) -> None:
    """By the same job: what the guest writes meanwhile is not in the backup."""
    wanted = models(full)
    with Held(tls_tool, full) as held:
        full.write("vda", 0, MIB, 0xEE)
        for wire in wires:
            wire.cut()
        made = held.ended(120).result
    assert sum(len(wire.handed) for wire in wires[1:]) > 2, "nobody came again"
    same(tls_tool.restored(full, made["backup"], str(tmp_path)), wanted)
    tls_tool.nothing_left(full)
    assert tls_tool.backup(full)["disks"][0]["dirty_bytes"] == MIB


def test_a_host_that_is_gone_for_good(
    tls_far: tls.TlsFar, tls_tool: FarTool, full: PlainGuest, wires: List[proxy.Proxy]
) -> None:
    argv = tls_tool.argv("backup", full.name)
    at = argv.index(next(word for word in argv if word.endswith("libvirt-cbt")))
    with Held(tls_tool, full, argv=[*argv[:at], sys.executable, "-c", IMPATIENT, *argv[at + 1 :]]) as held:
        guardian = held.guardian
        for wire in wires:
            wire.go_away()
        ended = held.ended(120)
        os.kill(guardian, signal.SIGKILL)
    assert (ended.code, ended.document["error"]["kind"]) == (13, "SourceLost"), ended.stderr
    assert "`libvirt-cbt recover full` ends it" in ended.stderr
    again = tls_far.wires()
    try:
        actions = " ".join(tls_tool.run("recover", full.name).result["actions"])
    finally:
        for wire in again:
            wire.close()
    assert "ended backup job" in actions
    assert f"removed {far.BEHIND}:/var/lib/libvirt/cbt-scratch/" in actions
    tls_tool.nothing_left(full, checkpoints=0)


def test_a_copy_goes_on_when_libvirt_is_started_again(
    tls_far: tls.TlsFar, tls_tool: FarTool, full: PlainGuest, tmp_path: Path
) -> None:
    """The job knows neither names nor tool any more; its scratch files prove whose it is."""
    wanted = models(full)
    with Held(tls_tool, full) as held:
        full.write("vda", 0, MIB, 0xEE)
        tls_far.host.kill()
        tls_far.host.start()
        made = held.ended(120).result
    same(tls_tool.restored(full, made["backup"], str(tmp_path)), wanted)
    tls_tool.nothing_left(full)


@pytest.mark.parametrize("guarded", [True, False])
def test_a_killed_tool(tls_tool: FarTool, full: PlainGuest, tmp_path: Path, *, guarded: bool) -> None:
    """The guard ends the job at once, the next run removes what lies about there."""
    with Held(tls_tool, full) as held:
        held.kill(guardian=not guarded)
    if guarded:
        until(lambda: not full.has_job, "nobody ended the job")
    until(lambda: not guards(full.uuid), "the guard stays")
    assert [path for path in tls_tool.far.left() if path.startswith("pool:")]
    made = tls_tool.backup(full)
    assert made["generation"] == 1
    same(tls_tool.restored(full, made["backup"], str(tmp_path)), models(full))
    tls_tool.nothing_left(full)


def test_room_runs_out_there(
    tls_far: tls.TlsFar, tls_tool: FarTool, full: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    """Seen by libvirt's eyes, and the job ended before a write of the guest's fails."""
    tls_tool.backup(full)
    with small_scratch(tls_far.host) as small:
        small(16)
        full.write_bytes("vda", 0, rng.randbytes(SIZE))
        with Events(full) as events, Held(tls_tool, full) as held, Gone(full) as gone:
            place = 0
            while not gone():
                full.write("vda", place % (SIZE // MIB) * MIB, MIB, 1 + place % 255)
                place += 1
            ended = held.ended()
            assert events.harm() == []
        assert (ended.code, ended.document["error"]["kind"]) == (14, "ScratchExhausted"), ended
        assert full.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
        tls_tool.nothing_left(full)
        small(2)
        ended = tls_tool.run("backup", full.name)
        assert (ended.code, ended.document["error"]["kind"]) == (14, "ScratchSpace")
        tls_tool.nothing_left(full)
    made = tls_tool.backup(full)
    assert made["disks"][0]["mode"] == "incremental"
    same(tls_tool.restored(full, made["backup"], str(tmp_path)), models(full))
