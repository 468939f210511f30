"""`libvirt-cbt recover`"""

from __future__ import annotations

from typing import TYPE_CHECKING, List, Optional

import click

import libvirt_cbt
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results


@click.command(epilog="\b\nExample:\n  libvirt-cbt -r /backups recover web1")
@click.argument("domain", required=False)
@click.pass_obj
def command(settings: output.Settings, domain: Optional[str]) -> None:
    """Put right what a crash left: jobs, checkpoints, scratch, sockets, staging. Safe to repeat."""

    def job(session: libvirt_cbt.Session) -> List[results.Recover]:
        wanted = [domain] if domain else session.repository().uuids()
        return [libvirt_cbt.recover(session, one) for one in wanted]

    output.run(settings, [job], _show)


def _show(found: results.Recover) -> None:
    if not found.actions and not found.left:
        print(f"{found.domain}: nothing to do")
    for action in found.actions:
        print(f"{found.domain}: {action}")
    for left in found.left:
        print(f"{found.domain}: left alone: {left}")
