"""What a shell is offered where a domain, a disk, a generation or a path is to be typed; click has the rest.

Whatever goes wrong nothing is offered, and nothing is said: somebody is in the middle of a line.
"""

from __future__ import annotations

import os
import re
import threading
from typing import Any, Callable, Dict, Final, List, Optional

import click
from click.shell_completion import CompletionItem

from libvirt_cbt.cli import output

SECONDS: Final = 3.0  # then the shell goes on without
# A shell puts the word into the line as it is, so what it would take apart or run is not offered.
PLAIN: Final = re.compile(r"[A-Za-z0-9_/][A-Za-z0-9_.,@%+/-]*")
# These are for domains of the host; all others for those of the repository.
LIVE: Final = frozenset({"backup", "mark", "start", "stop", "doctor", "run", "config", "check", "status", "untrack"})

Words = List[CompletionItem]


class Offered(click.ParamType):
    """A parameter's type, with words for the shell."""

    def __init__(self, inner: click.ParamType, words: Callable[[click.Context], Words]) -> None:
        self.name, self._inner, self._words = inner.name, inner, words

    def convert(self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]) -> Any:
        return self._inner.convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Words:
        late = threading.Timer(SECONDS, os._exit, (0,))  # libvirt may not answer for long
        late.daemon = True
        late.start()
        try:
            return [word for word in self._words(ctx) if word.value.startswith(incomplete) and PLAIN.fullmatch(word.value)]
        except Exception:  # noqa: BLE001 -- as the docstring says
            return []
        finally:
            late.cancel()


class Path(Offered):
    """The shell itself knows which there are."""

    def __init__(self, inner: click.ParamType, kind: str) -> None:
        super().__init__(inner, lambda _: [])
        self._kind = kind

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Words:
        return [CompletionItem(incomplete, type=self._kind)]


def offer(command: click.Command) -> None:
    """Gives the parameters of a command (and of those below it) their words."""
    for one in command.commands.values() if isinstance(command, click.Group) else ():
        offer(one)
    for param in command.params:
        if isinstance(param.type, (Offered, click.Choice)) or getattr(param, "is_flag", False):
            continue
        if param.metavar in PATHS:
            param.type = Path(param.type, PATHS[param.metavar])
        elif param.name in NAMES:
            param.type = Offered(param.type, NAMES[param.name])


def _domains(ctx: click.Context) -> Words:
    from libvirt_cbt.actions import known

    with _settings(ctx).session() as session:
        return [CompletionItem(name) for name in known.domains(session, live=ctx.info_name in LIVE)]


def _disks(ctx: click.Context) -> Words:
    from libvirt_cbt.actions import known

    with _settings(ctx).session() as session:
        return [CompletionItem(target) for target in known.disks(session, _domain(ctx))]


def _points(ctx: click.Context) -> Words:
    return _generations(ctx, marks=ctx.info_name == "show")


def _generations(ctx: click.Context, *, marks: bool) -> Words:
    from libvirt_cbt.actions import known

    with _settings(ctx).session() as session:
        return [CompletionItem(number, help=what) for number, what in known.points(session, _domain(ctx), marks=marks)]


def _moments(ctx: click.Context) -> Words:
    return _generations(ctx, marks=True)


def _pages(_: click.Context) -> Words:
    from libvirt_cbt.cli import manual_pages

    return [CompletionItem(name) for name in manual_pages.names()]


PATHS: Final = {"D": "dir", "DIR": "dir", "REPO": "dir", "FILE": "file", "PATH": "file"}  # by metavar
NAMES: Final[Dict[str, Callable[[click.Context], Words]]] = {
    "domain": _domains,
    "domains": _domains,
    "disk": _disks,
    "disks": _disks,
    "exclude": _disks,
    "at": _points,
    "remove": _points,
    "since": _moments,
    "until": _moments,
    "page": _pages,
}


def _domain(ctx: click.Context) -> str:
    """The one that stands in the line already; behind an option that wants its value click has not sorted the words."""
    named = ctx.params.get("domain") or ctx.params.get("domains") or ctx.args
    return named if isinstance(named, str) else str(named[0])


def _settings(ctx: click.Context) -> output.Settings:
    """The options before the command, a home directory in them as the shell would have put it."""
    found = dict(ctx.find_root().params)
    found["json"] = found.pop("as_json")
    for name in ("repository", "config_file"):
        found[name] = found[name] and os.path.expanduser(found[name])
    return output.Settings(**found)
