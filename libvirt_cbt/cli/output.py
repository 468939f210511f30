"""How a command speaks: one JSON document or text for people, one sentence for an error, and an exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Callable, Dict, Final, List, NoReturn, Optional, Sequence, TextIO, Type

from libvirt_cbt import errors, tls

if TYPE_CHECKING:
    from libvirt_cbt.actions.session import Session, Watch
    from libvirt_cbt.config import Config, Place

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Settings:
    """The options that every command has; the configuration is read when it is first asked for."""

    uri: Optional[str]
    repository: Optional[str]
    json: bool
    quiet: bool
    verbose: bool
    config_file: Optional[str] = None
    log: Optional[str] = None
    nbd_ports: Optional[str] = None

    @cached_property
    def config(self) -> Config:
        """Errors: ConfigInvalid."""
        from libvirt_cbt import config, places

        given = self.config_file is not None
        return config.load([os.path.abspath(self.config_file)] if self.config_file else places.config_files(), given=given)

    def log_mode(self) -> str:
        """One of logs.MODES; what is wrong with the configuration must be told somewhere."""
        if self.log:
            return self.log
        try:
            return self.config.log
        except errors.CbtError:
            return "auto"

    def places(self) -> List[Place]:
        """The host of -c or the environment; otherwise those of the configuration.  Errors: ConfigInvalid."""
        places = self.config.places()
        if self.uri is None:
            return places
        from libvirt_cbt.config import Place

        found = [p for p in places if p.uri == self.uri]
        return found or [Place("", self.uri, self.config.jobs, self.config.listening())]

    def session(self, watch: Optional[Watch] = None, *, place: Optional[Place] = None) -> Session:
        """One with what the command line or the environment says, else the configuration.  Errors: ConfigInvalid."""
        from libvirt_cbt.actions.session import Session

        if self.config.hooks_dir:
            os.environ.setdefault("LIBVIRT_CBT_HOOKS_DIR", self.config.hooks_dir)
        if self.uri and not place:
            (place,) = self.places()[:1]
        listening = place.listening if place else self.config.listening()
        return Session(
            self.uri or (place and place.uri) or self.config.connect,
            self.repository or self.config.repository,
            watch,
            scratch_dir=self.config.scratch_dir,
            listening=replace(listening, ports=tls.ports(self.nbd_ports)) if self.nbd_ports else listening,
        )


class Interrupts:
    """Signals set a flag, which the verbs look at between steps; a second one does not skip the cleaning."""

    def __init__(self) -> None:
        self._number = 0
        self._before: Dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in SIGNALS:
            try:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
                    self._before[number] = signal.signal(number, self._caught)
            except ValueError:
                break  # not the main thread: somebody else's program minds the signals
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, _frame: Optional[FrameType]) -> None:
        self._number = self._number or number

    def check(self) -> None:
        if self._number:
            raise errors.Interrupted(number=self._number, signal=signal.Signals(self._number).name)


def run(
    settings: Settings,
    jobs: Sequence[Callable[[Session], Any]],
    show: Callable[[Any], None],
    *,
    always: bool = False,
    after: Callable[[], Optional[errors.CbtError]] = lambda: None,
) -> None:
    """Runs each job in one session; several domains go on after one that failed, and SystemExit tells of the first.

    A job returns one result or a list of them; `show` prints one for people, with `always` it is called for --json too.
    `after` gives an error that was told already.
    """
    from libvirt_cbt.cli import logs, progress

    results: List[Any] = []
    first: Optional[errors.CbtError] = None
    with Interrupts() as interrupts:  # to the last byte that is printed: what was published is told
        with _Reported() as reported:
            shown = settings.quiet or settings.json
            watch: Watch = progress.watch(interrupts.check, quiet=shown, verbose=settings.verbose)
            with settings.session(watch) as session:
                for job in jobs:
                    try:
                        found = _ended(job, session, watch)
                    except errors.CbtError as e:
                        first = first or e
                        logs.error(e)
                        if isinstance(e, errors.Interrupted):
                            break
                    else:
                        for one in found:
                            results.append(one)
                            if always or not settings.json:
                                show(one)
        first = first or reported.error or after()
        if settings.json:
            print(dumped(document(results, first)), flush=True)
    if first:
        raise SystemExit(first.code)


def _ended(job: Callable[[Session], Any], session: Session, watch: Watch) -> List[Any]:
    """What a job returned, the terminal free again before anything is said."""
    from libvirt_cbt.cli import progress

    try:
        found = job(session)
    finally:
        progress.finish(watch)
    return found if isinstance(found, list) else [found]


def listed(settings: Settings, ask: Callable[[Session], Sequence[str]]) -> List[str]:
    """Which domains a command is for, where none is named; one that cannot be done then does not stop the others."""
    try:
        with settings.session() as session:
            return list(ask(session))
    except errors.CbtError as e:
        fail(settings, e)


def fail(settings: Settings, error: errors.CbtError) -> NoReturn:
    """Ends a command that could not begin."""
    from libvirt_cbt.cli import logs

    logs.error(error)
    if settings.json:
        print(dumped(document([], error)))
    raise SystemExit(error.code)


def say(text: str = "", *, end: str = "\n", to: Optional[TextIO] = None) -> None:
    """Prints a line for people.

    Much of it is of others: names of guests, what an agent answered, what a repository holds.  None of it moves a
    terminal's cursor or begins a line of its own.
    """
    from libvirt_cbt import names

    print(names.printable(text, len(text)), end=end, file=to or sys.stdout)


def dumped(found: Any) -> str:
    """A value as JSON, in ASCII: any terminal and any encoding can carry it, paths that are no text, too."""
    return json.dumps(found)


def document(results: Sequence[Any], error: Optional[errors.CbtError]) -> Dict[str, Any]:
    """The one document of --json."""
    found: Dict[str, Any] = {"version": 1, "results": [asdict(r) for r in results]}
    if error:
        found["error"] = error.document()
    return found


class _Bug(errors.CbtError):
    code = 70
    template = "a bug of libvirt-cbt: {reason}; please report it with the traceback above"


class _Reported:
    """What a user can cause outside a verb (a missing binding, no repository) is a sentence; the rest a bug, code 70."""

    def __init__(self) -> None:
        self.error: Optional[errors.CbtError] = None

    def __enter__(self) -> _Reported:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> bool:
        if error is None or not isinstance(error, Exception) or isinstance(error, BrokenPipeError):
            return False
        from libvirt_cbt.cli import logs

        if isinstance(error, errors.CbtError):
            self.error = error
        else:
            traceback.print_exception(kind, error, trace)
            self.error = _Bug(reason=f"{type(error).__name__}: {error}")
        logs.error(self.error)
        return True


def size(count: Optional[float]) -> str:
    """Bytes for people."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Columns as wide as they need to be; those in `right` hold numbers."""
    from libvirt_cbt import names

    lines = [list(headings)] + [[names.printable(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    for line in lines:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))]
        say("  ".join(cells).rstrip())
