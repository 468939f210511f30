"""`libvirt-cbt hooks`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, List, Optional

import click

from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results

EXAMPLES = """\b
Examples:
  libvirt-cbt -r /backups hooks install libvirt
  libvirt-cbt -r /backups hooks status
  libvirt-cbt -r /backups hooks remove libvirt
"""

kind_argument = click.argument("kind", metavar="libvirt|vdsm", type=click.Choice(["libvirt", "vdsm"]))
directory_option = click.option(
    "--directory", metavar="D", help="Where they are [/etc/libvirt/hooks/qemu.d, /usr/libexec/vdsm/hooks]."
)
unit_option = click.option(
    "--unit-dir", metavar="D", help="Of systemd's units, '' for none [/etc/systemd/system, where systemd runs]."
)


@click.group(epilog=EXAMPLES)
def command() -> None:
    """Have libvirt or oVirt tell this tool when guests start, migrate, stop or crash; docs/hooks.md has all of it."""


@command.command(epilog=EXAMPLES)
@kind_argument
@directory_option
@click.option("--spool-dir", metavar="D", help="Where they note it [/var/lib/libvirt-cbt-spool].")
@unit_option
@click.pass_obj
def install(settings: output.Settings, /, kind: str, **places: Optional[str]) -> None:
    """Install the hooks of one kind for this repository. Safe to repeat; do it again after an upgrade."""
    output.run(settings, [_call("install", kind, places)], _show_installed)


@command.command(epilog=EXAMPLES)
@kind_argument
@directory_option
@unit_option
@click.pass_obj
def remove(settings: output.Settings, /, kind: str, **places: Optional[str]) -> None:
    """Take them away, and what they have noted."""
    output.run(settings, [_call("remove", kind, places)], _show_removed)


@command.command(epilog=EXAMPLES)
@click.option("--libvirt-directory", metavar="D", help="Where libvirt's are.")
@click.option("--vdsm-directory", metavar="D", help="Where vdsm's are.")
@click.pass_obj
def status(settings: output.Settings, libvirt_directory: Optional[str], vdsm_directory: Optional[str]) -> None:
    """Which hooks of every kind there are, and which are not run and why."""

    def ask(session: Any) -> List[results.Hook]:
        from libvirt_cbt.hooks import listing

        return listing.listed(session, {"libvirt": libvirt_directory, "vdsm": vdsm_directory})

    output.run(settings, [ask], _show)


def _call(verb: str, kind: str, places: Any) -> Callable[[Any], Any]:
    def call(session: Any) -> Any:
        from libvirt_cbt.hooks import installing

        return getattr(installing, verb)(session, kind, **places)

    return call


def _show_installed(made: results.HooksInstalled) -> None:
    for path in made.files:
        output.say(f"wrote {path}")
    output.say(f"what they note goes to {made.spool}")
    for sentence in made.next:
        output.say(f"now {sentence}")


def _show_removed(made: results.HooksRemoved) -> None:
    for path in made.removed or ["nothing"]:
        output.say(f"removed {path}")
    for sentence in made.next:
        output.say(f"now {sentence}")


def _show(found: results.Hook) -> None:
    output.say(f"{found.kind}: {found.state}: {found.detail}")
    for path in found.files:
        output.say(f"  {path}")
