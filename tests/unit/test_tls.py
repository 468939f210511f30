"""Certificates and ports of exports by TCP, and which connections are not taken at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from libvirt_cbt import config, errors, tls
from libvirt_cbt.hypervisor import address, refusals
from libvirt_cbt.nbdio import proof


@pytest.mark.parametrize(("text", "found"), [("10809", (10809, 10809)), ("1-65535", (1, 65535))])
def test_ports(text: str, found: object) -> None:
    assert tls.ports(text) == found


@pytest.mark.parametrize("text", ["", "0", "10-9", "65536", "1-65536", "a", "1-2-3", "-1", " 1", "1\n", "00001"])
def test_what_is_no_range_of_ports(text: str) -> None:
    with pytest.raises(ValueError, match="no range of ports"):
        tls.ports(text)


def test_ports_of_a_host_and_of_all(tmp_path: Path) -> None:
    path = tmp_path / "libvirt-cbt.toml"
    path.write_text(
        'nbd_ports = "2000-2009"\n[host.a]\nconnect = "qemu+tls://a/system"\n'
        '[host.b]\nconnect = "qemu+tls://b/system"\nnbd_ports = "3000"\nnbd_address = "192.0.2.7"\n'
    )
    found = {place.name: place.listening for place in config.load([str(path)], given=True).places()}
    assert found == {"a": tls.Listening((2000, 2009)), "b": tls.Listening((3000, 3000), "192.0.2.7")}
    path.write_text('nbd_ports = "9-1"\n')
    with pytest.raises(errors.ConfigInvalid, match="nbd_ports: '9-1' is no range of ports"):
        config.load([str(path)], given=True)


@pytest.mark.parametrize("own", [False, True])
def test_where_libvirt_looks_for_certificates(own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    folder = tmp_path / ".pki/libvirt"
    folder.mkdir(parents=True)
    (folder / "cacert.pem").touch()
    (folder / "clientcert.pem").touch()
    if own:
        (folder / "clientkey.pem").touch()
    found = list(tls.client_files(None).values())
    pair = [str(folder / "clientcert.pem"), str(folder / "clientkey.pem")] if own else list(tls.SYSTEM[1:])
    assert found == [str(folder / "cacert.pem"), *pair]  # a certificate without its key is of no use
    assert list(tls.client_files("/pki").values()) == ["/pki/cacert.pem", "/pki/clientcert.pem", "/pki/clientkey.pem"]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert list(tls.client_files(None).values()) == list(tls.SYSTEM)


def test_no_key_is_copied(tmp_path: Path) -> None:
    folder = tls.linked(str(tmp_path), "/pki")
    links = {str(path.relative_to(folder)): os.readlink(path) for path in Path(folder).rglob("*") if path.is_symlink()}
    assert links == {
        "ca-cert.pem": "/pki/cacert.pem",
        "client-cert.pem": "/pki/clientcert.pem",
        "client-key.pem": "/pki/clientkey.pem",
        "nobody/ca-cert.pem": "/pki/cacert.pem",
    }
    assert tls.Server("h", 1, folder).anonymous().certificates == f"{folder}/nobody"


@pytest.mark.parametrize("uri", ["qemu+tcp://h/system", "qemu+ext:///system?command=/bin/x", "qemu+unknown://h/system"])
def test_what_is_in_the_clear_is_not_taken(uri: str) -> None:
    with pytest.raises(errors.Unencrypted):
        address.asked(uri)


@pytest.mark.parametrize(
    ("uri", "transport"), [("qemu:///system", "unix"), ("qemu+unix:///system", "unix"), ("test:///default", "unix"),
                           ("qemu://h/system", "tls"), ("qemu+tls://h/system", "tls"), ("qemu+libssh2://h/x", "ssh")]
)  # fmt: skip
def test_transports(uri: str, transport: str) -> None:
    address.asked(uri)
    assert address.parse(uri).transport == transport


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("The client certificate /pki/clientcert.pem has expired", errors.HostRefused),
        ("Our own certificate /pki/c.pem failed validation against /pki/ca.pem: ...", errors.HostRefused),
        ("Unable to read TLS confirmation: Input/output error", errors.HostRefused),
        ("Cannot read CA certificate '/etc/pki/CA/cacert.pem': No such file or directory", errors.HostUnproved),
        ("unable to connect to server at 'h:16514': Connection refused", errors.HostLost),
    ],
)
def test_what_libvirt_says(said: str, kind: type) -> None:
    assert type(refusals.of(address.parse("qemu+tls://h/system"), said)) is kind


@pytest.mark.parametrize(
    ("said", "error", "kind"),
    [
        ("nbd_aio_connect_tcp: gnutls_handshake: Error in the certificate verification. (15/1)", 0, errors.HostUnproved),
        ("handshake: server refused TLS, but handle->tls setting is require (2)", 0, errors.HostUnproved),
        ("gnutls_record_recv: The TLS connection was non-properly terminated.", 0, errors.HostRefused),
        ("connect: h:10809: could not connect to remote host: Connection refused", 111, errors.HostRefused),
        ("recv: Connection reset by peer", 104, errors.HostLost),
    ],
)
def test_what_libnbd_says(said: str, error: int, kind: type) -> None:
    found = proof.explained(tls.Server("h", 10809, "/x"), said, error)
    assert type(found) is kind
    assert found.facts["host"] == "h"
