"""The examples of docs/remote.md do what they promise."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Callable, Final, List

import pytest

from libvirt_cbt.hypervisor import ssh
from tests.guests import far as fars
from tests.guests import tls
from tests.guests.plain import Disk, PlainGuest
from tests.libvirt.tool import models, same
from tests.remote.tool import FarTool

DOCUMENT: Final = Path(__file__).resolve().parents[2] / "docs" / "remote.md"
PlainGuests = Callable[..., PlainGuest]


def examples(kind: str = r"\w*") -> List[str]:
    """The blocks of code, in their order."""
    return re.findall(rf"^```{kind}\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def example(beginning: str) -> str:
    """The first block that contains `beginning`, without its first line, which says where it belongs."""
    return next(block for block in examples() if beginning in block).partition("\n")[2]


def test_a_host_that_allows_only_what_is_needed(
    far: fars.Far, tool: FarTool, plain_guest: PlainGuests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sshd, a key that can do nothing else, and the alias under which the near side knows it."""
    guest = plain_guest(Disk("vda"))
    alias = example("Host kvm1").replace("kvm1.example", fars.ADDRESS).replace("Port 22", f"Port {far.port}")
    Path(far.ssh, "config").write_text(alias, encoding="utf-8")
    monkeypatch.setattr(far, "uri", "qemu+ssh://kvm1/system")
    place = tmp_path / "libvirt-cbt-far"
    (line,) = re.findall(r"^    (install .*far\.sh \S+)", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    install = line.replace("/usr/local/sbin/libvirt-cbt-far", str(place))
    subprocess.run(["sh", "-c", install], check=True, cwd=Path(ssh.__file__).parent)
    key = example("restrict,port-forwarding").replace("ssh-ed25519 AAAA... backup", far.authorized)
    key = key.replace("/usr/local/sbin/libvirt-cbt-far", str(place))
    far.restart("AllowTcpForwarding no\nAllowStreamLocalForwarding no\n" + example("Match User").replace("192.0.2.10", "127.0.0.1"), authorized=key)
    checks = {c["name"]: c for c in tool.run("doctor", guest.name).document["results"][0]["checks"]}
    assert checks["far host"]["status"] == "ok"
    guest.write("vda", 0, 65536, 0x5A)
    made = tool.backup(guest)
    same(tool.restored(guest, made["backup"], str(tmp_path)), models(guest))
    tool.nothing_left(guest)
    for command in ("id", "cat /etc/shadow", "sh"):
        done = subprocess.run(
            far.near(["ssh", "-o", "BatchMode=yes", "kvm1", command]),
            env=tool.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, ""), done
        assert "only" in done.stderr


def test_certificates(tls_far: tls.TlsFar, tls_tool: FarTool, tls_guest: PlainGuests, tmp_path: Path) -> None:
    """Made, put in their places, and used by libvirt, QEMU and the tool."""
    host = tls_far.host
    folder = Path(host.root, "docs")
    folder.mkdir(0o711)
    text = "set -e\n" + "\n".join(block for block in examples("sh") if "nft" not in block)
    for word, ours in (
        ("/etc/pki", f"{folder}/pki"),
        ("DNS:kvm1,IP:192.0.2.7", f"DNS:{tls.NAME},IP:{fars.ADDRESS}"),
        ("-g libvirt-qemu", f"-g {host.qemu_ids[1]}"),
    ):
        assert word in text
        text = text.replace(word, ours)
    subprocess.run(["bash", "-c", text], cwd=folder, check=True, capture_output=True)
    pki = folder / "pki"
    host.listen(
        {"key": f"{pki}/libvirt/private/serverkey.pem", "pem": f"{pki}/libvirt/servercert.pem"}, f"{pki}/CA/cacert.pem"
    )
    host.configure(text=example("backup_tls_x509_cert_dir").replace("/etc/pki", str(pki)))
    client = tmp_path / "client"  # the near side does not see the host's folder
    client.mkdir()
    for name in ("CA/cacert.pem", "libvirt/clientcert.pem", "libvirt/private/clientkey.pem"):
        shutil.copyfile(pki / name, client / Path(name).name)
    host.restart()
    try:
        tls_far.uri = tls_far.uri.replace(tls_far.client, str(client))
        guest = tls_guest(Disk("vda"))
        guest.write("vda", 0, 65536, 0x5A)
        made = tls_tool.backup(guest)
        same(tls_tool.restored(guest, made["backup"], str(tmp_path)), models(guest))
        tls_tool.nothing_left(guest)
    finally:
        host.listen(host.pair)
        host.configure()
        host.restart()
