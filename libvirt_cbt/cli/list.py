"""`libvirt-cbt list`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import click

import libvirt_cbt
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results


@click.command(epilog="\b\nExamples:\n  libvirt-cbt -r /backups list\n  libvirt-cbt -r /backups --json list web1")
@click.argument("domain", required=False)
@click.pass_obj
def command(settings: output.Settings, domain: Optional[str]) -> None:
    """The generations of one domain, or of all, oldest first."""
    output.run(settings, [lambda s: libvirt_cbt.generations(s, domain)], show)


def show(found: results.Listing) -> None:
    output.say(f"{found.domain} ({found.uuid})")
    rows = [
        (
            f"  {g.generation}",
            g.id,
            g.kind + (" (protected)" if g.protected else ""),
            g.time,
            "yes" if g.consistent else "no",
            output.size(sum(d.dirty_bytes for d in g.disks)),
            output.size(sum(d.stored_bytes for d in g.disks)),
            " ".join(d.target for d in g.disks),
        )
        for g in found.generations
    ]
    rows += [("  ?", one.id or "?", "damaged", "", "", "", "", one.reason) for one in found.unreadable]
    output.table(("  gen", "backup", "kind", "time", "frozen", "changed", "stored", "disks"), rows, right=(5, 6))
