"""`libvirt-cbt config`"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, List, Tuple, Union

import click

from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results
    from libvirt_cbt.actions.session import Session
    from libvirt_cbt.config import Place

EXAMPLES = """\b
Examples:
  libvirt-cbt config
  libvirt-cbt config --check
  libvirt-cbt --config ./libvirt-cbt.toml config web1
"""


@click.command(epilog=EXAMPLES)
@click.argument("domains", metavar="[DOMAIN]...", nargs=-1)
@click.option("--check", is_flag=True, help="Read the files only; libvirt is not asked.")
@click.pass_obj
def command(settings: output.Settings, domains: Tuple[str, ...], check: bool) -> None:
    """Show what the configuration files say, and which policy holds for which domain."""
    if check and domains:
        raise click.UsageError("--check goes without domains")
    jobs: List[Callable[[Session], Any]] = [lambda session: _files(settings, session)]
    if not check:
        found: List[List[results.Configured]] = []
        jobs += [partial(_domains, settings, place, domains, found) for place in settings.places()]
        jobs.append(lambda _: _unknown(domains, found, len(settings.places())))
    output.run(settings, jobs, partial(_show, full=bool(domains)))


def _files(settings: output.Settings, session: Session) -> results.ConfigFiles:
    from libvirt_cbt.actions import policies

    return policies.files(session, settings.config)


def _domains(
    settings: output.Settings, place: Place, domains: Tuple[str, ...], found: List[List[results.Configured]], _: Session
) -> List[results.Configured]:
    from libvirt_cbt.actions import policies

    with settings.session(place=place) as session:
        found.append(policies.configured(session, settings.config, place, domains))
        return found[-1]


def _unknown(domains: Tuple[str, ...], found: List[List[results.Configured]], hosts: int) -> List[results.Configured]:
    """Whether all that were named are there is known when every host has answered."""
    from libvirt_cbt.actions import policies

    if len(found) == hosts:
        policies.require_known(domains, [name for host in found for one in host for name in (one.domain, one.uuid)])
    return []


def _show(found: Union[results.ConfigFiles, results.Configured], *, full: bool) -> None:
    from libvirt_cbt.actions import results

    if isinstance(found, results.ConfigFiles):
        output.say(f"files: {', '.join(found.files) or 'none'}")
        output.say(f"repository: {found.repository}")
        return
    where = f" on {found.host}" if found.host else ""
    output.say(f"{found.domain}{where}: " + (f"policy {found.policy}" if found.policy else "no policy"), end="")
    output.say(f", left out: {found.skipped}" if found.skipped else "")
    if full:
        for key, value in found.rules.items():
            if value is not None:
                output.say(f"  {key} = {json.dumps(value)}")  # as the file would have it
