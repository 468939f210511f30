"""`libvirt-cbt status`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import click

import libvirt_cbt
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results


@click.command(epilog="\b\nExamples:\n  libvirt-cbt status\n  libvirt-cbt -r /backups status web1")
@click.argument("domain", required=False)
@click.pass_obj
def command(settings: output.Settings, domain: Optional[str]) -> None:
    """Whether domains are tracked, what has changed since, and how old the newest backup is."""
    output.run(settings, [lambda s: libvirt_cbt.status(s, domain)], _show)


def _show(found: results.Status) -> None:
    newest = f"generation {found.generation}, {found.age_seconds:.0f} s old" if found.generation else "never backed up"
    output.say(f"{found.domain}: {found.state}, {newest}")
    if found.doubt:
        output.say(f"  in doubt: {found.doubt}")
    for sentence in found.unreadable:
        output.say(f"  {sentence}")
    if found.open_point:
        point = found.open_point
        lost = "" if point.alive else ": its job has ended, `stop` gives it up"
        output.say(f"  fleecing point of generation {point.generation} open since {point.since}, socket {point.socket}{lost}")
    rows = [
        (
            f"  {d.target}",
            "tracked" if d.tracked else "not tracked",
            output.size(d.dirty_bytes),
            str(d.chain),
            d.reason or "",
        )
        for d in found.disks
    ]
    output.table(("  disk", "", "changed", "layers", "reason"), rows, right=(2, 3))
