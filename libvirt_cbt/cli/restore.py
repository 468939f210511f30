"""`libvirt-cbt restore`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Tuple

import click

import libvirt_cbt
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results

EXAMPLES = """\b
Examples:
  libvirt-cbt -r /backups restore web1 --output /tmp/web1
  libvirt-cbt -r /backups restore web1 --at 3 --disk vda --format qcow2 --output /tmp/web1
"""


@click.command(epilog=EXAMPLES)
@click.argument("domain")
@click.option("--at", metavar="P", default="latest", show_default=True, help="Generation, backup id or latest.")
@click.option("-o", "--output", "directory", metavar="DIR", required=True, help="Where the images go: DIR/vda.raw ...")
@click.option("--disk", "disks", metavar="T", multiple=True, help="Only this disk; repeatable.")
@click.option("--format", "fmt", type=click.Choice(["raw", "qcow2"]), default="raw", show_default=True)
@click.pass_obj
def command(settings: output.Settings, domain: str, at: str, directory: str, disks: Tuple[str, ...], fmt: str) -> None:
    """Write a backup's disks as images that stand alone, each byte checked on the way."""
    output.run(settings, [lambda s: libvirt_cbt.restore(s, domain, directory, at=at, disks=disks, fmt=fmt)], _show)


def _show(found: results.Restore) -> None:
    print(f"restored {found.domain} generation {found.generation}, backup {found.backup}, {found.seconds} s")
    for file in found.files:
        print(f"{file.path}  {output.size(file.bytes)}")
    for left_out in found.unprotected:
        print(f"not in this backup: {left_out.target}: {left_out.reason}")
