"""`libvirt-cbt start`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import libvirt_cbt
from libvirt_cbt.cli import logs, output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results

EXAMPLES = """\b
Examples:
  libvirt-cbt -r /backups start web1
  nbdinfo --map=qemu:dirty-bitmap:cbt-vda 'nbd+unix:///vda?socket=...'
  libvirt-cbt -r /backups changed web1 vda --since 3 --until 7
  libvirt-cbt -r /backups stop web1
"""


@click.command(epilog=EXAMPLES)
@click.argument("domain")
@click.option("--quiesce", type=click.Choice(["auto", "agent", "none"]), default="auto", show_default=True,
              help="Freeze the guest by its agent around the moment.")  # fmt: skip
@click.option("--scratch-dir", metavar="D", help="Where QEMU keeps what the guest overwrites meanwhile.")
@click.option("--allow-plaintext", is_flag=True, help="Also of disks that QEMU encrypts: scratch files are not.")
@click.option("--wait", metavar="SECONDS", type=click.FloatRange(0), default=0.0, help="For another job to end.")
@click.pass_obj
def command(settings: output.Settings, /, domain: str, **options: Any) -> None:
    """Open a fleecing point at a new generation for other software to read over NBD, until `stop`."""
    output.run(settings, [lambda s: libvirt_cbt.start(s, domain, **options)], _show)


def _show(made: results.Start) -> None:
    output.say(f"opened {made.domain}: generation {made.generation}, id {made.id}, {made.seconds} s")
    rows = [(d.target, d.uri, d.context or "(everything)", output.size(d.dirty_bytes)) for d in made.disks]
    output.table(("disk", "uri", "meta context", "changed"), rows, right=(3,))
    for warning in made.warnings:
        logs.warning(warning, domain=made.domain)
