"""Where messages go: a line for people on stderr, JSON lines there, or the journal with fields.

A message is a sentence and facts; whose facts they are (the domain, above all) is said once, by `about`.
"""

from __future__ import annotations

import re
import sys
from datetime import datetime, timezone
from typing import Any, Callable, Dict, Final, Optional

from libvirt_cbt import errors, names
from libvirt_cbt.cli import output

MODES: Final = ("auto", "stderr", "json", "journald")
ERROR, WARNING, INFO = 3, 4, 6  # of syslog
LEVELS: Final = {ERROR: "error", WARNING: "warning", INFO: "info"}
MOST: Final = 20  # facts of a message


class _Log:
    """The one of this process, as there is one stderr."""

    def __init__(self) -> None:
        self.about: Dict[str, Any] = {}
        self.wanted: Callable[[], str] = str  # "": nobody has said anything yet
        self.mode: Optional[str] = None


_log = _Log()


def configure(wanted: Callable[[], str]) -> None:
    """`wanted` gives the mode when the first message comes: until then no configuration is read."""
    _log.about, _log.wanted, _log.mode = {}, wanted, None


def about(**facts: Any) -> None:
    """Facts of every message from now on."""
    _log.about.update(facts)


def error(found: errors.CbtError) -> None:
    tell(str(found), ERROR, **{**found.facts, "kind": found.kind, "code": found.code})


def warning(sentence: str, **facts: Any) -> None:
    tell(sentence, WARNING, **facts)


def tell(sentence: str, priority: int = INFO, /, **facts: Any) -> None:
    """One message.  Facts that are no numbers or strings stay out of it."""
    from libvirt_cbt import journal

    facts = {name: value for name, value in {**_log.about, **facts}.items() if isinstance(value, (str, int, float))}
    facts = dict(list(facts.items())[:MOST])
    mode = structured()
    if mode == "journald" and journal.send(_fields(sentence, priority, facts)):
        return
    if mode == "json":
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        sys.stderr.write(output.dumped({**facts, "time": time, "level": LEVELS[priority], "message": sentence}) + "\n")
        sys.stderr.flush()
        return
    whose = f"{_log.about['domain']}: " if "domain" in _log.about else ""
    kind = "warning: " if priority == WARNING else ""
    output.say(f"libvirt-cbt: {whose}{kind}{sentence}", to=sys.stderr)


def structured() -> Optional[str]:
    """`json` or `journald`; None for lines of text."""
    from libvirt_cbt import journal

    if _log.mode is None:
        _log.mode = "auto"  # should it be the configuration that is told of
        _log.mode = _log.wanted() or "auto"
    if _log.mode == "auto":
        return "journald" if journal.connected() else None
    return None if _log.mode == "stderr" else _log.mode


def _fields(sentence: str, priority: int, facts: Dict[str, Any]) -> Dict[str, str]:
    fields = {"MESSAGE": names.printable(sentence, len(sentence)), "PRIORITY": str(priority), "SYSLOG_IDENTIFIER": "libvirt-cbt"}
    for name, value in facts.items():
        key = re.sub("[^A-Z0-9_]", "_", name.upper())
        fields[f"LIBVIRT_CBT_{key}"] = str(value)
    return fields
