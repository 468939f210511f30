"""`libvirt-cbt boot`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import click

import libvirt_cbt
from libvirt_cbt import errors
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results

EXAMPLES = """\b
Examples:
  libvirt-cbt -r /backups boot web1 --name web1-test
  libvirt-cbt -r /backups boot web1 --at 3 --name web1-old --start-network
  libvirt-cbt -r /backups boot --discard web1-test
"""


@click.command(epilog=EXAMPLES)
@click.argument("domain", required=False)
@click.option("--at", metavar="P", default="latest", show_default=True, help="Generation, backup id or latest.")
@click.option("--name", metavar="NAME", help="Of the new domain.")
@click.option("-o", "--output", "directory", metavar="DIR",
              help="What it writes goes into a new folder in DIR [/var/lib/libvirt/cbt-scratch].")  # fmt: skip
@click.option("--start-network", is_flag=True, help="With its network links up; they are down otherwise.")
@click.option("--wait", metavar="SECONDS", type=click.FloatRange(min=0), default=120.0, show_default=True,
              help="For the guest agent to answer.")  # fmt: skip
@click.option("--discard", metavar="NAME", help="End such a domain and remove all of it, what it wrote too.")
@click.pass_obj
def command(
    settings: output.Settings,
    domain: Optional[str],
    at: str,
    name: Optional[str],
    directory: Optional[str],
    start_network: bool,
    wait: float,
    discard: Optional[str],
) -> None:
    """Run a domain at once from a backup, which stays as it is, until `boot --discard NAME`.

    A storage daemon of ours shows it the layers; it goes on when this command has ended.  Do not end it, nor delete the
    repository, while the domain runs.  After a reboot of the host the domain cannot start again: discard it.
    """
    if discard:
        if domain or name:
            raise click.UsageError("--discard NAME stands alone")
        output.run(settings, [lambda s: libvirt_cbt.discard(s, discard)], _show_discarded)
        return
    if not domain or not name:
        raise click.UsageError("give DOMAIN and --name NAME, or --discard NAME")
    run = {"at": at, "output": directory, "start_network": start_network, "wait": wait}
    output.run(settings, [lambda s: libvirt_cbt.boot(s, domain, name, **run)], _show)  # type: ignore[arg-type]


def _show(found: results.Boot) -> None:
    output.say(f"{found.name} runs from {found.domain} generation {found.generation}, UUID {found.uuid}, {found.seconds} s")
    if found.agent_seconds is not None:
        output.say(f"its agent answered {found.agent_seconds} s after the start")
    for disk in found.disks:
        output.say(f"{disk.target}  {output.size(disk.capacity)}  writes to {disk.overlay}")
    for warning in found.warnings:
        output.say(f"warning: {warning}")
    output.say(f"`libvirt-cbt boot --discard {errors.quoted(found.name)}` removes it")


def _show_discarded(found: results.Discard) -> None:
    for line in found.removed:
        output.say(f"{found.name}: {line}")
