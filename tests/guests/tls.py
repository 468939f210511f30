"""A private libvirtd that listens with TLS on loopback, as another machine, and certificates for all that take part.

Its QEMU and the near side have theirs from the same authority, as docs/remote.md has it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any, Dict, Final, List, Optional

from tests.guests import daemon, far, proxy

NAME: Final = "localhost"  # on the near side the host has this name
SERVER: Final = f"subjectAltName=DNS:{NAME},IP:{far.ADDRESS},DNS:{far.BEHIND}\nextendedKeyUsage=serverAuth\nkeyUsage=digitalSignature,keyEncipherment\n"
OTHER: Final = "subjectAltName=DNS:elsewhere.example\nextendedKeyUsage=serverAuth\nkeyUsage=digitalSignature,keyEncipherment\n"
CLIENT: Final = "extendedKeyUsage=clientAuth\nkeyUsage=digitalSignature,keyEncipherment\n"
PORTS: Final = 8


class Authority:
    """A certificate authority of its own, in a folder."""

    def __init__(self, folder: str, name: str) -> None:
        self.folder = os.path.join(folder, name)
        os.mkdir(self.folder, 0o711)
        self.key, self.certificate = (os.path.join(self.folder, f"ca.{kind}") for kind in ("key", "pem"))
        request = ["req", "-x509", "-days", "30", "-subj", f"/CN={name}", "-keyout", self.key, "-out", self.certificate]
        _openssl(*request, *NEW, "-addext", "keyUsage=critical,keyCertSign,cRLSign")

    def issue(self, name: str, extensions: str, *, days: int = 30) -> Dict[str, str]:
        """A key and a certificate, which has expired where `days` is negative; their paths."""
        made = {kind: os.path.join(self.folder, f"{name}.{kind}") for kind in ("key", "csr", "pem", "ext")}
        with open(made["ext"], "w", encoding="ascii") as file:
            file.write(extensions)
        _openssl("req", "-subj", f"/CN={name}", "-keyout", made["key"], "-out", made["csr"], *NEW)
        sign = ["-CA", self.certificate, "-CAkey", self.key, "-CAcreateserial", "-extfile", made["ext"]]
        _openssl("x509", "-req", *_lasting(days), "-in", made["csr"], "-out", made["pem"], *sign)
        return made

    def folder_of(self, path: str, made: Optional[Dict[str, str]], names: List[str], *, group: int = -1) -> None:
        """A folder with the authority's certificate, and a pair, under these names; what was there goes."""
        shutil.rmtree(path, ignore_errors=True)
        os.mkdir(path, 0o711)
        for source, name in zip([self.certificate, *([made["pem"], made["key"]] if made else [])], names):
            copy = os.path.join(path, name)
            shutil.copyfile(source, copy)
            os.chmod(copy, 0o640)
            os.chown(copy, -1, group)


NEW: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
LIBVIRT: Final = ["cacert.pem", "clientcert.pem", "clientkey.pem"]
QEMU: Final = ["ca-cert.pem", "server-cert.pem", "server-key.pem"]


def _openssl(*arguments: str) -> str:
    """What it says on stderr."""
    asked = ["openssl", *arguments]
    return subprocess.run(asked, check=True, capture_output=True, stdin=subprocess.DEVNULL, text=True).stderr


def _lasting(days: int) -> List[str]:
    """How OpenSSL is told so; from 3.4 on none ends before it begins, but both times can be given."""
    if days < 0 and "-not_before" in _openssl("x509", "-help"):
        return ["-not_before", "20200101000000Z", "-not_after", "20200102000000Z"]
    return ["-days", str(days)]


class TlsDaemon(daemon.Daemon):
    """A private libvirtd with --listen; `pki` has its certificates, `verify` says whether its QEMU asks for one."""

    def __init__(self) -> None:
        self.tls_port = far.free_ports(2)
        self.tcp_port = self.tls_port + 1
        super().__init__()
        self._argv.append("--listen")

    def __enter__(self) -> TlsDaemon:
        super().__enter__()
        return self

    def _configuration(self) -> str:
        path = super()._configuration()
        self.pki = os.path.join(self.root, "pki")
        os.mkdir(self.pki, 0o711)
        self.authority = Authority(self.pki, "authority")
        self.stranger = Authority(self.pki, "stranger")
        self.pair = self.authority.issue("host", SERVER)
        self.qemu(self.pair)
        self._qemu_conf = os.path.join(self.root, "state/etc/libvirt/qemu.conf")
        with open(self._qemu_conf, encoding="utf-8") as conf:
            self._qemu_lines = conf.read()
        self.configure()
        self._libvirtd_conf = path
        with open(path, encoding="utf-8") as conf:
            self._libvirtd_lines = conf.read()
        self.listen(self.pair)
        return path

    def qemu(self, pair: Dict[str, str], authority: Optional[Authority] = None) -> None:
        """The certificate with which backups are exported, from the next one on."""
        (authority or self.authority).folder_of(os.path.join(self.pki, "qemu"), pair, QEMU, group=self.qemu_ids[1])

    def configure(self, *, verify: bool = True, text: Optional[str] = None) -> None:
        """qemu.conf, from the next start on."""
        ours = f'backup_tls_x509_cert_dir = "{self.pki}/qemu"\nbackup_tls_x509_verify = {int(verify)}\n'
        with open(self._qemu_conf, "w", encoding="utf-8") as conf:
            conf.write(self._qemu_lines + (text or ours))

    def listen(self, pair: Dict[str, str], authority: Optional[str] = None) -> None:
        """libvirtd.conf, from the next start on; a certificate that is of no use is not noticed by itself."""
        lines = [
            "listen_tls = 1", "listen_tcp = 1", 'auth_tcp = "none"', f'listen_addr = "{far.ADDRESS}"',
            f'tls_port = "{self.tls_port}"', f'tcp_port = "{self.tcp_port}"', "tls_no_sanity_certificate = 1",
            f'key_file = "{pair["key"]}"', f'cert_file = "{pair["pem"]}"', f'ca_file = "{authority or self.authority.certificate}"',
        ]  # fmt: skip
        with open(self._libvirtd_conf, "w", encoding="utf-8") as conf:
            conf.write(self._libvirtd_lines + "\n".join(lines) + "\n")


class TlsFar(far.Sides):
    """The near side of such a host, with a certificate of its own; a context manager."""

    host: TlsDaemon

    def __init__(self, host: TlsDaemon) -> None:
        super().__init__(host)
        self.name = NAME
        low = far.free_ports(PORTS)
        self.ports = (low, low + PORTS - 1)
        self._good = host.authority.issue("backup", CLIENT)
        self.client = self.own(self._good)
        self.uri = self.address()

    def __enter__(self) -> TlsFar:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def address(self, name: str = NAME) -> str:
        return f"qemu+tls://{name}:{self.host.tls_port}/system?pkipath={self.client}"

    def own(self, pair: Optional[Dict[str, str]], authority: Optional[Authority] = None) -> str:
        """The near side's certificate, or none; and the authority that it trusts."""
        path = os.path.join(self.folder, "pki")
        (authority or self.host.authority).folder_of(path, pair, LIBVIRT)
        return path

    def clear(self) -> None:
        """All is as at the beginning."""
        super().clear()
        self.own(self._good)
        self.uri = self.address()

    def wires(self) -> List[proxy.Proxy]:
        """Between the near side's name for the host, far.BEHIND, and the host: one for each port."""
        low, high = self.ports
        ports = [self.host.tls_port, *range(low, high + 1)]
        return [proxy.Proxy((far.WIRE, port), (far.ADDRESS, port)) for port in ports]

    def sweep(self) -> None:
        """What a test that failed has left."""
        for pool in self.host.connection.listAllStoragePools():
            for volume in pool.listAllVolumes() if pool.isActive() else []:
                volume.delete()
            if pool.isActive():
                pool.destroy()
            pool.delete()
            pool.undefine()

    def environment(self) -> Dict[str, str]:
        low, high = self.ports
        return {**super().environment(), "LIBVIRT_CBT_NBD_PORTS": f"{low}-{high}"}

    def left(self) -> List[str]:
        """What a tool has left behind, on either side."""
        pools: List[Any] = self.host.connection.listAllStoragePools()
        return super().left() + [f"pool:{pool.name()}" for pool in pools]

