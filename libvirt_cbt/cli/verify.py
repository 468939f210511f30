"""`libvirt-cbt verify`"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, List, Optional

import click

import libvirt_cbt
from libvirt_cbt import errors
from libvirt_cbt.cli import copying, output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results


@click.command(epilog="\b\nExamples:\n  libvirt-cbt -r /backups verify\n  libvirt-cbt -r /backups verify web1 --at 3")
@click.argument("domain", required=False)
@click.option("--at", metavar="P", help="Only this generation and what it depends on.")
@click.option(
    "--sample", metavar="N", type=click.IntRange(min=0),
    help="Only the newest backup, and N others that were not re-read for longest.",
)
@copying.options
@click.pass_obj
def command(
    settings: output.Settings, /, domain: Optional[str], at: Optional[str], sample: Optional[int], **options: Any
) -> None:
    """Re-read and re-hash what is stored. Exits 16 when something is damaged."""
    if at and not domain:
        raise click.UsageError("--at goes with a domain")
    if at and sample is not None:
        raise click.UsageError("--sample chooses the backups itself: it goes without --at")
    damage: List[Any] = []

    def show(found: results.Verify) -> None:
        damage.extend(found.damage)
        if not settings.json:
            _show(found)

    def one(name: str, session: libvirt_cbt.Session) -> results.Verify:
        return libvirt_cbt.verify(session, name, at=at, sample=sample, options=copying.taken(dict(options), reading=True))

    wanted = [domain] if domain else output.listed(settings, lambda s: s.repository().uuids())
    output.run(settings, [partial(one, name) for name in wanted], show, always=True)
    if damage:
        raise SystemExit(errors.Damaged.code)


def _show(found: results.Verify) -> None:
    output.say(
        f"{found.domain}: {found.backups} generations, {output.size(found.checked_bytes)} read, {found.seconds} s: ",
        end="",
    )
    output.say(f"{len(found.damage)} damaged" if found.damage else "all good")
    for one in found.damage:
        where = f" disk {one.target}" if one.target else ""
        where += f" offset {one.offset} length {one.length}" if one.offset is not None else ""
        output.say(f"  backup {one.backup}{where}: {one.reason}")
        if one.dependents:
            output.say(f"    needed by: {', '.join(one.dependents)}")
