"""`libvirt-cbt prune`"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, List, Tuple

import click

import libvirt_cbt
from libvirt_cbt import errors
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results

EXAMPLES = """\b
Examples:
  libvirt-cbt -r /backups prune web1 --keep-daily 7 --keep-weekly 5 --dry-run
  libvirt-cbt -r /backups prune --all --keep-within 14d --keep-monthly 12
  libvirt-cbt -r /backups prune web1 --remove 3
"""
NUMBER = click.IntRange(min=1)


@click.command(epilog=EXAMPLES)
@click.argument("domains", metavar="[DOMAIN]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Every domain in the repository.")
@click.option("--keep-last", metavar="N", type=NUMBER, help="Keep the newest N.")
@click.option("--keep-hourly", metavar="N", type=NUMBER, help="Keep the newest of each of N hours that have one.")
@click.option("--keep-daily", metavar="N", type=NUMBER, help="The same for days (UTC).")
@click.option("--keep-weekly", metavar="N", type=NUMBER, help="The same for weeks.")
@click.option("--keep-monthly", metavar="N", type=NUMBER, help="The same for months.")
@click.option("--keep-yearly", metavar="N", type=NUMBER, help="The same for years.")
@click.option("--keep-within", metavar="DURATION", help="Keep all so near to the newest, as 1y5m7d2h.")
@click.option("--remove", metavar="ID", multiple=True, help="Remove this one (number or id); repeatable.")
@click.option("--forget", is_flag=True, help="Drop the generations before the oldest backup, too: no query knows them then.")
@click.option("--dry-run", is_flag=True, help="Say what would go, change nothing.")
@click.pass_obj
def command(settings: output.Settings, /, domains: Tuple[str, ...], every: bool, **options: Any) -> None:
    """Remove the backups that no rule keeps. The newest and the protected ones always stay."""
    if bool(domains) == every:
        raise click.UsageError("name the domains, or give --all")
    if options["remove"] and len(domains) != 1:
        raise click.UsageError("--remove goes with one domain")
    if not any(options[name] for name in options if name != "dry_run"):
        raise click.UsageError("give a rule such as --keep-daily 7, or --remove ID, or --forget")
    skipped: List[results.Skipped] = []

    def show(found: results.Prune) -> None:
        skipped.extend(found.skipped)
        if not settings.json:
            _show(found)

    named = domains or output.listed(settings, lambda s: [kept.uuid for kept in s.repository().domains()])
    jobs = [partial(_one, domain, options) for domain in named]
    output.run(settings, jobs, show, always=True)
    codes = [one.code for one in skipped if one.code != errors.Busy.code]
    if codes:
        raise SystemExit(codes[0])


def _one(domain: str, options: Any, session: Any) -> results.Prune:
    return libvirt_cbt.prune(session, domain, **options)


def _show(found: results.Prune) -> None:
    would = "would " if found.dry_run else ""
    output.say(f"{found.domain}: {would}keep {len(found.kept)}, {would}remove {len(found.removed)}", end="")
    output.say("" if found.dry_run else f", {output.size(found.freed_bytes)} freed, {found.seconds} s")
    rows = [(f"  {one.generation}", one.id, "keep", ", ".join(one.reasons)) for one in found.kept]
    into = {one.backup: one.into for one in found.merged}
    rows += [
        (f"  {one.generation}", one.id, "remove", f"merges with {into[one.id]}" if one.id in into else "")
        for one in found.removed
    ]
    rows.sort(key=lambda row: int(row[0]))
    output.table(("  gen", "backup", "", "why"), rows)
    for forgotten in found.forgotten:
        output.say(f"{would}forget {forgotten}")
    for one in found.skipped:
        output.say(f"not removed: {one.backup}{' disk ' + one.target if one.target else ''}: {one.reason}")
