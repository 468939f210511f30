"""`libvirt-cbt protect`"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import libvirt_cbt
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results


@click.command(epilog="\b\nExample:\n  libvirt-cbt -r /backups protect web1 --at 3")
@click.argument("domain")
@click.option("--at", metavar="P", default="latest", show_default=True, help="Generation, backup id or latest.")
@click.pass_obj
def command(settings: output.Settings, domain: str, at: str) -> None:
    """Keep a backup whatever the rules of `prune` say."""
    output.run(settings, [lambda s: libvirt_cbt.protect(s, domain, at=at)], _show)


def _show(found: results.Protection) -> None:
    state = "protected" if found.protected else "no longer protected"
    output.say(f"{found.domain}: generation {found.generation}, backup {found.backup}, is {state}")
