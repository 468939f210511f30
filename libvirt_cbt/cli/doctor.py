"""`libvirt-cbt doctor`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import click

import libvirt_cbt
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results


@click.command(epilog="\b\nExamples:\n  libvirt-cbt doctor\n  libvirt-cbt -r /backups doctor web1")
@click.argument("domain", required=False)
@click.option("--scratch-dir", metavar="DIR", help="Where the scratch files would be.")
@click.pass_obj
def command(settings: output.Settings, domain: Optional[str], scratch_dir: Optional[str]) -> None:
    """Look at what usually goes wrong, and say the way out of each. Changes nothing."""
    output.run(settings, [lambda s: libvirt_cbt.doctor(s, domain, scratch_dir=scratch_dir)], _show)


def _show(found: results.Doctor) -> None:
    output.table(("check", "", "detail"), [(c.name, c.status, c.detail) for c in found.checks])
    if found.disks:
        output.say()
        rows = [(d.target, _verdict(d), d.reason or "") for d in found.disks]
        output.table(("disk", "", "reason"), rows)


def _verdict(disk: results.DoctorDisk) -> str:
    if not disk.protected:
        return "not protected"
    return "tracked" if disk.tracked else "full each time"
