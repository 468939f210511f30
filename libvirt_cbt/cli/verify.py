"""`libvirt-cbt verify`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, List, Optional

import click

import libvirt_cbt
from libvirt_cbt import errors
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results


@click.command(epilog="\b\nExamples:\n  libvirt-cbt -r /backups verify\n  libvirt-cbt -r /backups verify web1 --at 3")
@click.argument("domain", required=False)
@click.option("--at", metavar="P", help="Only this generation and what it depends on.")
@click.pass_obj
def command(settings: output.Settings, domain: Optional[str], at: Optional[str]) -> None:
    """Re-read and re-hash what is stored. Exits 16 when something is damaged."""
    if at and not domain:
        raise click.UsageError("--at goes with a domain")
    damage: List[Any] = []

    def show(found: results.Verify) -> None:
        damage.extend(found.damage)
        if not settings.json:
            _show(found)

    def job(session: libvirt_cbt.Session) -> List[results.Verify]:
        wanted = [domain] if domain else [kept.uuid for kept in session.repository().domains()]
        return [libvirt_cbt.verify(session, one, at=at) for one in wanted]

    output.run(settings, [job], show, always=True)
    if damage:
        raise SystemExit(errors.Damaged.code)


def _show(found: results.Verify) -> None:
    print(
        f"{found.domain}: {found.backups} generations, {output.size(found.checked_bytes)} read, {found.seconds} s: ",
        end="",
    )
    print(f"{len(found.damage)} damaged" if found.damage else "all good")
    for one in found.damage:
        where = f" disk {one.target}" if one.target else ""
        where += f" offset {one.offset} length {one.length}" if one.offset is not None else ""
        print(f"  backup {one.backup}{where}: {one.reason}")
        if one.dependents:
            print(f"    needed by: {', '.join(one.dependents)}")
