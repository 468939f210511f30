"""systemd's units: what they are called, where they go, and what is in them.

One pair, a path unit and its service, works off what hooks have noted; the other, a timer and its service, is for `run`.

https://www.freedesktop.org/software/systemd/man/systemd.unit.html
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib import resources
from typing import Dict, Final, List, Optional, Sequence

from libvirt_cbt import errors, names
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
    command = [*program(), *uri, "-r", repository.path, "-q", "recover", "--noted"]
    values = {
        "@REPOSITORY@": plain(repository.path),
        "@SPOOL@": plain(place),
        "@COMMAND@": command_line(command),
        "@ENVIRONMENT@": words([f"LIBVIRT_CBT_SPOOL_DIR={os.path.dirname(place)}"]),
    }
    return {f"{name(repository.id)}.{suffix}": filled(f"noted.{suffix}", values) for suffix in ("path", "service")}


def template(file: str) -> str:
    return (resources.files("libvirt_cbt.hooks") / "files" / file).read_text(encoding="utf-8")


def filled(file: str, values: Dict[str, str]) -> str:
    """A template with each key replaced, in one pass: a value may look like a key."""
    return re.sub("|".join(values), lambda found: values[found[0]], template(file))


def program() -> List[str]:
    """How this tool is called, by absolute path."""
    called = os.path.abspath(sys.argv[0])
    if os.path.basename(called) == "libvirt-cbt" and os.access(called, os.X_OK):
        return [called]
    found = shutil.which("libvirt-cbt")
    return [os.path.abspath(found)] if found else [sys.executable, "-c", "from libvirt_cbt import cli; cli.main()"]


def plain(text: str) -> str:
    """As the rest of a line.  Errors: Usage for what would not stay on it."""
    if not all(letter.isprintable() for letter in text):
        raise errors.Usage(reason=f"'{names.printable(text)}' cannot be in a unit of systemd")
    return text.replace("%", "%%")


def words(texts: Sequence[str]) -> str:
    """As systemd splits them again (systemd.syntax, "Quoting"; systemd.unit, "Specifiers").  Errors: as of plain."""
    escaped = (plain(text).replace("\\", "\\\\").replace('"', '\\"') for text in texts)
    return " ".join(f'"{text}"' for text in escaped)


def command_line(argv: Sequence[str]) -> str:
    """A program and its arguments, in which a dollar is special, too (systemd.service, "Command lines").  Errors: as of plain."""
    return " ".join([words(argv[:1]), words(argv[1:]).replace("$", "$$")])
