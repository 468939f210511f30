"""Where this machine keeps what lives shorter than a backup, and the configuration."""

from __future__ import annotations

import os
import tempfile
from typing import Final, List

CONFIG: Final = "libvirt-cbt.toml"


def run_root() -> str:
    """The folder of sockets: /run/libvirt-cbt for root, the user's runtime directory otherwise."""
    asked = os.environ.get("LIBVIRT_CBT_RUN_DIR")
    if asked:
        return os.path.abspath(asked)
    if os.geteuid() == 0:
        return "/run/libvirt-cbt"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = os.path.join(runtime, "libvirt-cbt") if runtime else f"{tempfile.gettempdir()}/libvirt-cbt-{os.geteuid()}"
    return os.path.abspath(folder)


def config_files() -> List[str]:
    """The configuration files that are there, the host's and then the user's."""
    own = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return [path for path in (f"/etc/{CONFIG}", os.path.join(own, CONFIG)) if os.path.lexists(path)]
