"""Where this machine keeps what lives shorter than a backup, and the configuration."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from typing import Final, Iterator, List, Optional

from libvirt_cbt import errors, folders, processes

CONFIG: Final = "libvirt-cbt.toml"
TEMPORARY: Final = "read-"  # what folders begin with that end with the process: of restore, verify and their like


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


@contextmanager
def temporary(root: Optional[str] = None) -> Iterator[str]:
    """A directory of our own for sockets, mode 0700, in the folder of sockets; gone at the end.

    Those of processes that were killed are removed on the way.  Errors: HypervisorError.
    """
    root = root or run_root()
    try:
        folders.root(root)
        sweep(root)
        path = tempfile.mkdtemp(prefix=f"{TEMPORARY}{processes.tag()}.", dir=root)
    except OSError as e:
        raise errors.HypervisorError(reason=f"cannot make a folder for sockets in {root}: {e.strerror}") from None
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def sweep(root: str) -> List[str]:
    """Removes the temporary folders of processes that were killed; which."""
    gone = []
    for entry in list(os.scandir(root)) if os.path.isdir(root) else []:
        name = entry.name.partition(".")[0]
        ended = name.startswith(TEMPORARY) and processes.ended(name[len(TEMPORARY) :])
        if ended and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
            gone.append(entry.path)
    return gone
