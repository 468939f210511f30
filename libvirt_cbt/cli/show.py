"""`libvirt-cbt show`"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import libvirt_cbt
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results


@click.command(epilog="\b\nExamples:\n  libvirt-cbt -r /backups show web1\n  libvirt-cbt -r /backups show web1 --at 3")
@click.argument("domain")
@click.option("--at", metavar="P", default="latest", show_default=True, help="Generation, backup id or latest.")
@click.pass_obj
def command(settings: output.Settings, domain: str, at: str) -> None:
    """One generation in full: every disk, its mode and why, its change id."""
    output.run(settings, [lambda s: libvirt_cbt.show(s, domain, at=at)], _show)


def _show(found: results.Listing) -> None:
    for one in found.generations:
        output.say(f"{found.domain} generation {one.generation}, backup {one.id}, {one.kind}, {one.time}")
        output.say("file systems were frozen" if one.consistent else "crash-consistent: file systems were not frozen")
        rows = [
            (d.target, d.mode, str(d.base or "-"), d.parent or "-", output.size(d.capacity), output.size(d.dirty_bytes),
             output.size(d.stored_bytes), d.reason or "")
            for d in one.disks
        ]  # fmt: skip
        output.table(
            ("disk", "mode", "base", "parent", "capacity", "changed", "stored", "reason"), rows, right=(4, 5, 6)
        )
        for disk in one.disks:
            output.say(f"{disk.target}: {disk.change_id}")
        for left_out in one.unprotected:
            output.say(f"not protected: {left_out.target}: {left_out.reason}")
