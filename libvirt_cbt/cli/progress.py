"""Progress on a terminal: bytes, rate and time left per disk; nothing where stderr is no terminal."""

from __future__ import annotations

import sys
from typing import Any, Callable, Dict, Optional

from libvirt_cbt.actions.session import Watch
from libvirt_cbt.cli import logs


class _Quiet(Watch):
    def __init__(self, check: Callable[[], None], *, notes: bool) -> None:
        self._check, self._notes = check, notes

    def stop(self) -> None:
        self._check()

    def note(self, sentence: str) -> None:
        if self._notes:
            logs.tell(sentence)

    def failed(self, sentence: str, /, **facts: Any) -> None:
        logs.tell(sentence, logs.ERROR, **facts)


class _Bars(_Quiet):
    def __init__(self, check: Callable[[], None], *, notes: bool) -> None:
        super().__init__(check, notes=notes)
        self._bars: Optional[Any] = None
        self._tasks: Dict[str, Any] = {}

    def progress(self, target: str, done: int, total: int) -> None:
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        if target not in self._tasks:
            self._tasks[target] = self._bars.add_task(target, total=total or None)
        self._bars.update(self._tasks[target], completed=done, total=total or None)

    def finish(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._tasks = {}


def _bars() -> Any:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=4,
    )


def watch(check: Callable[[], None], *, quiet: bool, verbose: bool) -> Watch:
    if quiet or not sys.stderr.isatty():
        return _Quiet(check, notes=verbose or not quiet)
    return _Bars(check, notes=True)


def finish(watch: Watch) -> None:
    """Takes the bars off the terminal."""
    if isinstance(watch, _Bars):
        watch.finish()
