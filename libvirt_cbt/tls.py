"""Exports by TCP: both ends prove who they are by certificates, those that libvirt's own client has.

https://libvirt.org/kbase/tlscerts.html, https://libguestfs.org/libnbd.3.html (section "Encryption and authentication")
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from typing import Dict, Final, Optional, Tuple

LIBVIRT_PORT: Final = 16514
NBD_PORT: Final = 10809
CONNECT_SECONDS: Final = 10.0
# The client's files: in one folder (`pkipath`, or a user's), and where they are for the whole machine; then libnbd's names.
NAMES: Final = ("cacert.pem", "clientcert.pem", "clientkey.pem")
SYSTEM: Final = ("/etc/pki/CA/cacert.pem", "/etc/pki/libvirt/clientcert.pem", "/etc/pki/libvirt/private/clientkey.pem")
LIBNBD: Final = ("ca-cert.pem", "client-cert.pem", "client-key.pem")
NOBODY: Final = "nobody"  # the folder of one who has no certificate


@dataclass(frozen=True)
class Listening:
    """Where QEMU may listen: ports, the first and the last, and an address of its host's (None: the one that libvirt has)."""

    ports: Tuple[int, int] = (NBD_PORT, NBD_PORT + 63)
    address: Optional[str] = None


@dataclass(frozen=True)
class Server:
    """An NBD server; its certificate must be for `host`.  `certificates` is a folder with files of libnbd's names."""

    host: str
    port: int
    certificates: str

    def anonymous(self) -> Server:
        """The same as somebody sees it who has no certificate."""
        return Server(self.host, self.port, os.path.join(self.certificates, NOBODY))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def ports(text: str) -> Tuple[int, int]:
    """The first and the last of "10809-10872", or one port.  Errors: ValueError."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})(?:-([1-9][0-9]{0,4}))?", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < low <= high < 1 << 16:
        raise ValueError(f"{text!r} is no range of ports such as 10809-10872")
    return low, high


def client_files(pkipath: Optional[str]) -> Dict[str, str]:
    """Where libvirt's client looks for its certificates, by libnbd's names.

    Found in the same order (src/rpc/virnettlscontext.c): a user's own, key and certificate together, then the machine's.
    """
    if pkipath:
        found = [os.path.join(pkipath, name) for name in NAMES]
    else:
        own = [os.path.expanduser(f"~/.pki/libvirt/{name}") for name in NAMES] if os.geteuid() else ["", "", ""]
        authority = own[0] if os.path.exists(own[0]) else SYSTEM[0]
        pair = own[1:] if all(os.path.exists(path) for path in own[1:]) else list(SYSTEM[1:])
        found = [authority, *pair]
    return dict(zip(LIBNBD, map(os.path.abspath, found)))


def complaint(host: str, port: int, pkipath: Optional[str]) -> Optional[str]:
    """Why the certificate of libvirt there is no good, in OpenSSL's words: libvirt's client tells only that it is none.

    None where OpenSSL has nothing against it.
    """
    import ssl

    try:
        context = ssl.create_default_context(cafile=client_files(pkipath)[LIBNBD[0]])
        with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as plain:
            context.wrap_socket(plain, server_hostname=host).close()
    except ssl.SSLCertVerificationError as e:
        return e.verify_message
    except (OSError, ValueError):
        pass  # it has gone meanwhile
    return None


def linked(folder: str, pkipath: Optional[str]) -> str:
    """Links in `folder`, ours alone, under the names that libnbd looks for; no key is copied.  Returns the folder."""
    files = client_files(pkipath)
    nobody = os.path.join(folder, NOBODY)
    os.mkdir(nobody, 0o700)
    for name, path in files.items():
        os.symlink(path, os.path.join(folder, name))
    os.symlink(files[LIBNBD[0]], os.path.join(nobody, LIBNBD[0]))
    return folder
