"""`libvirt-cbt mark`"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Tuple

import click

import libvirt_cbt
from libvirt_cbt.cli import logs, output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results

EXAMPLES = """\b
Examples:
  libvirt-cbt -r /backups mark web1
  libvirt-cbt -r /backups changed web1 vda --since 3
"""


@click.command(epilog=EXAMPLES)
@click.argument("domains", metavar="DOMAIN...", nargs=-1, required=True)
@click.option("--quiesce", type=click.Choice(["auto", "agent", "none"]), default="none", show_default=True,
              help="Freeze the guest by its agent around the moment.")  # fmt: skip
@click.option("--scratch-dir", metavar="D", help="Where QEMU keeps what the guest overwrites meanwhile.")
@click.option("--allow-plaintext", is_flag=True, help="Also of disks that QEMU encrypts: scratch files are not.")
@click.option("--wait", metavar="SECONDS", type=click.FloatRange(0), default=0.0, help="For another job to end.")
@click.pass_obj
def command(settings: output.Settings, /, domains: Tuple[str, ...], **options: Any) -> None:
    """Record a write generation without copying data: later, `changed` tells what was written since."""
    output.run(settings, [partial(_one, domain, options) for domain in domains], _show)


def _one(domain: str, options: Any, session: Any) -> results.Mark:
    return libvirt_cbt.mark(session, domain, **options)


def _show(made: results.Mark) -> None:
    output.say(f"marked {made.domain}: generation {made.generation}, id {made.id}, {made.seconds} s")
    rows = [(d.target, output.size(d.dirty_bytes), d.change_id) for d in made.disks]
    output.table(("disk", "changed", "change id"), rows, right=(1,))
    for warning in made.warnings:
        logs.warning(warning, domain=made.domain)
