"""`libvirt-cbt run`"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final, List, Optional, Tuple

import click

from libvirt_cbt.cli import logs, output

if TYPE_CHECKING:
    from libvirt_cbt.actions import fleet, policies, results
    from libvirt_cbt.actions.session import Session

EXAMPLES = """\b
Examples:
  libvirt-cbt run
  libvirt-cbt run --dry-run
  libvirt-cbt run web1 db1
  libvirt-cbt --config ./libvirt-cbt.toml --json run --jobs 4
"""
# Neither the working directory nor the way this command was started decide what a domain's own process runs.
PACKAGE: Final = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROGRAM: Final = "import sys; sys.path[0] = sys.argv.pop(1); from libvirt_cbt import cli; cli.main()"


@click.command(epilog=EXAMPLES)
@click.argument("domains", metavar="[DOMAIN]...", nargs=-1)
@click.option("--jobs", metavar="N", type=click.IntRange(min=1), help="Domains at once on each host [2, or the configuration's].")
@click.option("--dry-run", is_flag=True, help="Estimate, change nothing.")
@click.option("--alone", is_flag=True, hidden=True, help="This one domain, in this process.")
@click.pass_obj
def command(settings: output.Settings, domains: Tuple[str, ...], jobs: Optional[int], dry_run: bool, alone: bool) -> None:
    """Back up, thin out and verify, by policy: every domain that the configuration matches, or those named."""
    if alone:
        ended: List[results.Run] = []
        output.run(settings, [lambda s: _alone(settings, s, domains[0], dry_run=dry_run)], ended.append, always=True)
        raise SystemExit(ended[0].code)
    done: List[fleet.Fleet] = []

    def whole(session: Session) -> List[results.Run]:
        done.append(_fleet(settings, session, domains, jobs, dry_run=dry_run))
        if settings.config.textfile and not dry_run:
            from libvirt_cbt.actions import metrics

            metrics.refresh(session, settings.config.textfile)
        return done[0].runs

    output.run(settings, [whole], lambda _: None, after=lambda: done[0].error if done else None)
    raise SystemExit(done[0].code)


def _alone(settings: output.Settings, session: Session, uuid: str, *, dry_run: bool) -> results.Run:
    from libvirt_cbt.actions import policies, run

    (place,) = settings.places()
    (chosen,) = policies.named(policies.chosen(session, settings.config, place), [uuid])
    logs.about(domain=chosen.name, uuid=chosen.uuid, **({"host": place.name} if place.name else {}))
    return run.run(session, chosen, dry_run=dry_run)


def _fleet(
    settings: output.Settings, session: Session, domains: Tuple[str, ...], jobs: Optional[int], *, dry_run: bool
) -> fleet.Fleet:
    from dataclasses import replace

    from libvirt_cbt.actions import fleet

    def argv(chosen: policies.Chosen) -> List[str]:
        config = ["--config", os.path.abspath(settings.config_file)] if settings.config_file else []
        log = ["--log", settings.log] if settings.log else []
        told = ["-v"] if settings.verbose else ["-q"] if settings.quiet else []
        ports = ["--nbd-ports", settings.nbd_ports] if settings.nbd_ports else []
        last = ["--dry-run"] if dry_run else []
        program = [sys.executable, "-c", PROGRAM, PACKAGE]
        return [*program, *config, *log, *ports, "-r", session.path, "--json", *told, "run", "--alone", chosen.uuid, *last]

    def show(made: results.Run) -> None:
        if not settings.json or logs.structured():
            _show(made)

    places = [replace(place, jobs=jobs or place.jobs) for place in settings.places()]
    how = fleet.How(lambda place: settings.session(place=place), argv, show, dry_run=dry_run)
    return fleet.fleet(session, settings.config, places, domains, how)


def _show(made: results.Run) -> None:
    said: List[str] = []
    if made.backup:
        held = output.size(sum(disk.stored_bytes for disk in made.backup.disks))
        verb = "would be" if made.backup.dry_run else "is"
        said.append(f"generation {made.backup.generation} {verb} {held}")
        said += [f"warning: {warning}" for warning in made.backup.warnings]
    if made.prune and made.prune.removed:
        said.append(f"{'would remove' if made.prune.dry_run else 'removed'} {len(made.prune.removed)}")
    if made.verify:
        said.append(f"re-read {made.verify.backups}")
    said += [f"{failure.work} failed with {failure.code}" for failure in made.failures]
    where = f" on {made.host}" if made.host else ""
    line = f"{made.domain}{where}: {', '.join(said)}, {made.seconds} s"
    if not logs.structured():
        output.say(line)
        return
    facts = {"domain": made.domain, "uuid": made.uuid, "policy": made.policy, "code": made.code}
    facts.update({"host": made.host} if made.host else {})
    backup = {"backup": made.backup.backup, "generation": made.backup.generation} if made.backup else {}
    logs.tell(line, logs.ERROR if made.failures else logs.INFO, **facts, **backup, seconds=made.seconds)
