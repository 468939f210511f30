"""`libvirt-cbt untrack`"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import libvirt_cbt
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results


@click.command(epilog="\b\nExample:\n  libvirt-cbt -r /backups untrack web1")
@click.argument("domain")
@click.pass_obj
def command(settings: output.Settings, domain: str) -> None:
    """Take our checkpoints off a domain, so that it can be undefined or reverted. The next backup is full."""
    output.run(settings, [lambda s: libvirt_cbt.untrack(s, domain)], _show)


def _show(found: results.Untrack) -> None:
    output.say(f"{found.domain}: removed {', '.join(found.removed) or 'nothing, there was no checkpoint of ours'}")
