"""`libvirt-cbt recover`"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Optional

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
    wanted = [domain] if domain else output.listed(settings, lambda s: s.repository().uuids())
    output.run(settings, [partial(_one, one) for one in wanted], _show)


def _one(domain: str, session: Any) -> results.Recover:
    return libvirt_cbt.recover(session, domain)


def _show(found: results.Recover) -> None:
    if not found.actions and not found.left:
        output.say(f"{found.domain}: nothing to do")
    for action in found.actions:
        output.say(f"{found.domain}: {action}")
    for left in found.left:
        output.say(f"{found.domain}: left alone: {left}")
