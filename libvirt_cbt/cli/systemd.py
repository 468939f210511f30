"""`libvirt-cbt systemd`"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, List, Optional, Union

import click

from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results

EXAMPLES = """\b
Examples:
  libvirt-cbt systemd install
  libvirt-cbt systemd install --calendar 'Mon..Fri 22:30'
  libvirt-cbt systemd status
  libvirt-cbt -r /backups systemd remove
"""

directory_option = click.option("--directory", metavar="D", help="Of the units [/etc/systemd/system, where systemd runs].")


@click.group(epilog=EXAMPLES)
def command() -> None:
    """A timer and a service of systemd's for `run`; docs/automation.md has all of it."""


@command.command(epilog=EXAMPLES)
@directory_option
@click.option("--calendar", metavar="WHEN", help="When it runs, as systemd.time(7) has it [*-*-* 02:00:00].")
@click.pass_obj
def install(settings: output.Settings, directory: Optional[str], calendar: Optional[str]) -> None:
    """Install both for this repository. Safe to repeat; do it again after an upgrade, and when -c or --config change."""
    environment = dict(os.environ)

    def call(session: Any) -> results.TimerInstalled:
        from libvirt_cbt.hooks import timers

        return timers.install(session, _options(settings), environment, directory=directory, calendar=calendar or timers.DAILY)

    output.run(settings, [call], _show_changed)


@command.command(epilog=EXAMPLES)
@directory_option
@click.pass_obj
def remove(settings: output.Settings, directory: Optional[str]) -> None:
    """Take both away."""

    def call(session: Any) -> results.TimerRemoved:
        from libvirt_cbt.hooks import timers

        return timers.remove(session, directory=directory)

    output.run(settings, [call], _show_changed)


@command.command(epilog=EXAMPLES)
@directory_option
@click.pass_obj
def status(settings: output.Settings, directory: Optional[str]) -> None:
    """Whether they are there, of this release, and enabled."""

    def call(session: Any) -> results.Timer:
        from libvirt_cbt.hooks import timers

        return timers.status(session, directory=directory)

    output.run(settings, [call], _show)


def _options(settings: output.Settings) -> List[str]:
    """What `run` must be told of the options before this command; everybody may read a unit."""
    from libvirt_cbt import names

    uri = ["-c", names.without_password(settings.uri)] if settings.uri else []
    config = ["--config", os.path.abspath(settings.config_file)] if settings.config_file else []
    log = ["--log", settings.log] if settings.log else []
    return [*uri, *config, *log]


def _show_changed(made: Union[results.TimerInstalled, results.TimerRemoved]) -> None:
    from libvirt_cbt.actions import results

    verb = "wrote" if isinstance(made, results.TimerInstalled) else "removed"
    for path in made.files or ["nothing"]:
        output.say(f"{verb} {path}")
    for sentence in made.next:
        output.say(f"now {sentence}")


def _show(found: results.Timer) -> None:
    output.say(f"{found.timer}: {found.state}: {found.detail}")
    for path in found.files:
        output.say(f"  {path}")
