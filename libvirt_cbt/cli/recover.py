"""`libvirt-cbt recover`"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, List, Optional

import click

import libvirt_cbt
from libvirt_cbt import errors
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results


EXAMPLES = """\b
Examples:
  libvirt-cbt -r /backups recover
  libvirt-cbt -r /backups recover web1
  libvirt-cbt -r /backups recover --noted
"""


@click.command(epilog=EXAMPLES)
@click.argument("domain", required=False)
@click.option("--noted", is_flag=True, help="Only domains that a hook has noted something of; 11 when some have to wait.")
@click.pass_obj
def command(settings: output.Settings, domain: Optional[str], noted: bool) -> None:
    """Put right what a crash left: jobs, checkpoints, scratch, sockets, staging. Safe to repeat.

    Also looks into what the hooks of libvirt and oVirt have noted since (`hooks install`).
    """
    if domain and noted:
        raise click.UsageError("--noted finds the domains itself")
    wanted = [domain] if domain else output.listed(settings, partial(_known, noted))
    waiting: List[int] = []

    def show(found: results.Recover) -> None:
        waiting.append(found.waiting)
        if not settings.json:
            _show(found)

    output.run(settings, [partial(_one, one) for one in wanted], show, always=True)
    if noted and any(waiting):
        raise SystemExit(errors.Busy.code)


def _known(noted: bool, session: Any) -> List[str]:
    from libvirt_cbt.actions import recover

    return [str(uuid) for uuid in recover.known(session, noted=noted)]


def _one(domain: str, session: Any) -> results.Recover:
    return libvirt_cbt.recover(session, domain)


def _show(found: results.Recover) -> None:
    if not found.actions and not found.left:
        output.say(f"{found.domain}: nothing to do")
    for action in found.actions:
        output.say(f"{found.domain}: {action}")
    for left in found.left:
        output.say(f"{found.domain}: left alone: {left}")
