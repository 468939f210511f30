"""Where this machine keeps what lives shorter than a backup."""

from __future__ import annotations

import os
import tempfile


def run_root() -> str:
    """The folder of sockets: /run/libvirt-cbt for root, the user's runtime directory otherwise."""
    asked = os.environ.get("LIBVIRT_CBT_RUN_DIR")
    if asked:
        return os.path.abspath(asked)
    if os.geteuid() == 0:
        return "/run/libvirt-cbt"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(runtime, "libvirt-cbt") if runtime else f"{tempfile.gettempdir()}/libvirt-cbt-{os.geteuid()}"
