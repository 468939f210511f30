"""`libvirt-cbt init`"""

from __future__ import annotations

import click

import libvirt_cbt
from libvirt_cbt.cli import output


@click.command(epilog="\b\nExample:\n  libvirt-cbt -r /backups init")
@click.pass_obj
def command(settings: output.Settings) -> None:
    """Make a repository in a new or empty directory."""
    output.run(
        settings, [libvirt_cbt.init], lambda made: output.say(f"repository {made.repository} is ready (id {made.id})")
    )
