"""`libvirt-cbt stop`"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import libvirt_cbt
from libvirt_cbt.cli import logs, output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results

EXAMPLES = """\b
Examples:
  libvirt-cbt -r /backups stop web1
  libvirt-cbt -r /backups stop web1 --discard
"""


@click.command(epilog=EXAMPLES)
@click.argument("domain")
@click.option("--discard", is_flag=True, help="Give the generation up; its changes are in the next one.")
@click.pass_obj
def command(settings: output.Settings, domain: str, discard: bool) -> None:
    """Close the fleecing point that `start` opened, and commit its generation."""
    output.run(settings, [lambda s: libvirt_cbt.stop(s, domain, discard=discard)], _show)


def _show(made: results.Stop) -> None:
    for warning in made.warnings:
        logs.warning(warning, domain=made.domain)
    output.say(f"{'committed' if made.committed else 'gave up'} generation {made.generation} of {made.domain}, id {made.id}")
