"""`libvirt-cbt report`"""

from __future__ import annotations

from typing import TYPE_CHECKING, List, Optional

import click

import libvirt_cbt
from libvirt_cbt import errors, names
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results

EXAMPLES = """\b
Examples:
  libvirt-cbt -r /backups report
  libvirt-cbt -r /backups report --html /var/www/backups.html
  libvirt-cbt -r /backups --json report web1
"""


@click.command(epilog=EXAMPLES)
@click.argument("domain", required=False)
@click.option("--html", "path", metavar="FILE", help="Write one page that stands alone; an older report is replaced.")
@click.option("--force", is_flag=True, help="Replace FILE whatever it is.")
@click.pass_obj
def command(settings: output.Settings, domain: Optional[str], path: Optional[str], force: bool) -> None:
    """What is kept, how old it is, when it was verified. Exits 16 when some of it cannot be read."""
    if force and not path:
        raise click.UsageError("--force goes with --html")
    unreadable: List[str] = []

    def show(found: results.Report) -> None:
        unreadable.extend(d.uuid for d in found.domains if d.unreadable)
        if not settings.json and (path is None or not settings.quiet):
            _show(found, path)

    def job(session: libvirt_cbt.Session) -> results.Report:
        from libvirt_cbt.actions import report_file
        from libvirt_cbt.cli import report_page

        place = report_file.checked(path, session.path, force=force) if path else None
        found = libvirt_cbt.report(session, domain)
        if place:
            report_file.replace(place, report_page.page(found))
        return found

    output.run(settings, [job], show, always=True)
    if unreadable:
        raise SystemExit(errors.Damaged.code)


def _show(found: results.Report, path: Optional[str]) -> None:
    if path:
        count = sum(bool(d.attention) for d in found.domains)
        output.say(f"{names.printable(path)}: {len(found.domains)} reported, {count} to look at")
        return
    rows = [
        (
            d.domain,
            d.newest or "none",
            str(d.backups),
            str(d.marks),
            output.size(d.held_bytes),
            d.verified.time if d.verified else "never",
        )
        for d in found.domains
    ]
    output.table(("domain", "newest", "backups", "marks", "on disk", "verified"), rows, right=(2, 3, 4))
    for d in found.domains:
        for sentence in d.attention:
            output.say(f"{names.printable(d.domain)}: {names.printable(sentence, 600)}")
