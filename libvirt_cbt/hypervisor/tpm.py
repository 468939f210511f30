"""Where libvirt keeps the state of an emulated TPM: a folder named after the domain, of which its XML does not tell.

swtpm writes the state to a file beside it and renames that, so a reader has one whole state or the one before.
qemu_conf.c, virQEMUDriverConfigNew; https://github.com/stefanberger/swtpm, swtpm_nvstore_dir.c
"""

from __future__ import annotations

import os
from typing import Final, Optional, Tuple

from libvirt_cbt import xmldoc
from libvirt_cbt.hypervisor import address

SYSTEM: Final = "/var/lib/libvirt/swtpm"
MOST: Final = 1 << 20  # bytes of a state; those of swtpm have some ten thousand
FILES: Final = {"1.2": ("tpm1.2", "tpm-00.permall"), "2.0": ("tpm2", "tpm2-00.permall")}  # folder and file by version


def state(uri: str, text: str, uuid: str) -> Optional[str]:
    """The file with the state of a domain's emulated TPM; None when the domain, by its XML, has none that is kept so.

    `uri` is the connection's.  Errors: HypervisorError.
    """
    found = _kept(text)
    return os.path.join(_root(uri), uuid, *found) if found else None


def _kept(text: str) -> Optional[Tuple[str, str]]:
    root = xmldoc.parse(text, "the XML of the domain")
    for backend in root.iterfind("devices/tpm/backend[@type='emulator']"):
        if backend.find("source") is None:  # else it lies where whoever wrote that wants it
            return FILES.get(backend.get("version", "2.0"))
    return None


def _root(uri: str) -> str:
    """LIBVIRT_CBT_SWTPM_DIR is for a libvirt that was built for other folders."""
    asked = os.environ.get("LIBVIRT_CBT_SWTPM_DIR")
    if asked:
        return os.path.abspath(asked)
    where = address.parse(uri)
    if where.here and where.local.startswith("qemu:///session"):
        own = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        return os.path.join(own, "libvirt/qemu/swtpm")
    if where.here and where.local.startswith("qemu:///embed") and where.parameters.get("root"):
        return os.path.join(where.parameters["root"], "lib/libvirt/swtpm")
    return SYSTEM
