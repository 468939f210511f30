"""The systemd units that work off what hooks have noted: a path unit, and the service that it starts.

https://www.freedesktop.org/software/systemd/man/systemd.path.html
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib import resources
from typing import Dict, Final, List, Optional, Sequence

from libvirt_cbt import names
from libvirt_cbt.actions.session import Session

FOLDER: Final = "/etc/systemd/system"
BOOTED: Final = "/run/systemd/system"  # sd_booted(3)


def folder(asked: Optional[str]) -> Optional[str]:
    """Where units go: where it was asked for ("" is nowhere), else where systemd looks for them, if systemd runs."""
    if asked is not None:
        return os.path.abspath(asked) if asked else None
    return FOLDER if os.path.isdir(BOOTED) else None


def name(repository: str) -> str:
    """Of both units, without the suffix."""
    return f"libvirt-cbt-noted-{repository[:8]}"


def texts(session: Session, place: str) -> Dict[str, str]:
    """The content of each unit by its file's name; `place` is the spool of the session's repository."""
    repository = session.repository()
    uri = ["-c", names.without_password(session.uri)] if session.uri else []
    command = [*_command(), *uri, "-r", repository.path, "-q", "recover", "--noted"]
    values = {
        "@REPOSITORY@": repository.path.replace("%", "%%"),
        "@SPOOL@": place.replace("%", "%%"),
        "@COMMAND@": _line(command),
        "@ENVIRONMENT@": _line([f"LIBVIRT_CBT_SPOOL_DIR={os.path.dirname(place)}"]),
    }
    found = {}
    for suffix in ("path", "service"):
        text = (resources.files("libvirt_cbt.hooks") / "files" / f"noted.{suffix}").read_text(encoding="utf-8")
        for key, value in values.items():
            text = text.replace(key, value)
        found[f"{name(repository.id)}.{suffix}"] = text
    return found


def _command() -> List[str]:
    """How this tool is called, by absolute path."""
    called = os.path.abspath(sys.argv[0])
    if os.path.basename(called) == "libvirt-cbt" and os.access(called, os.X_OK):
        return [called]
    found = shutil.which("libvirt-cbt")
    return [os.path.abspath(found)] if found else [sys.executable, "-c", "from libvirt_cbt import cli; cli.main()"]


def _line(words: Sequence[str]) -> str:
    """Words as systemd splits them again (systemd.syntax, "Quoting"; systemd.unit, "Specifiers")."""
    escaped = (word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$") for word in words)
    return " ".join(f'"{word}"' for word in escaped)
