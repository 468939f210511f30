"""`libvirt-cbt backup`"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, List, Tuple

import click

import libvirt_cbt
from libvirt_cbt.cli import copying, logs, output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results

EXAMPLES = """\b
Examples:
  libvirt-cbt -r /backups backup web1
  libvirt-cbt -r /backups backup --all --quiesce agent
  libvirt-cbt -r /backups backup web1 --exclude vdb --dry-run
"""


@click.command(epilog=EXAMPLES)
@click.argument("domains", metavar="[DOMAIN]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Every running domain.")
@click.option("--full", is_flag=True, help="Copy everything; tracking goes on.")
@click.option("--disk", "disks", metavar="T", multiple=True, help="Only this disk (target, such as vda); repeatable.")
@click.option("--exclude", metavar="T", multiple=True, help="Not this disk; repeatable.")
@click.option("--require-all", is_flag=True, help="Fail (2) if any other disk cannot be backed up.")
@click.option(
    "--quiesce",
    type=click.Choice(["auto", "agent", "none"]),
    default="auto",
    show_default=True,
    help="Freeze the guest by its agent: if it can be, or fail (17), or not at all.",
)
@click.option("--scratch-dir", metavar="D", help="Where QEMU keeps what the guest overwrites during the copy.")
@click.option("--compress", type=click.Choice(["zstd", "none"]), default="zstd", show_default=True)
@click.option("--strict", is_flag=True, help="Exit 3 when there were warnings.")
@click.option("--wait", metavar="SECONDS", type=click.FloatRange(0), default=0.0, help="For another job to end.")
@click.option(
    "--max-duration", metavar="SECONDS", type=click.FloatRange(min=0, min_open=True), help="End the job (14) after that."
)
@click.option(
    "--max-chain",
    metavar="N",
    type=click.IntRange(1, 150),
    default=60,
    show_default=True,
    help="Copy everything, and begin a new chain, when one has so many layers.",
)
@click.option("--audit", is_flag=True, help="Read whole disks and compare them with the backups (16 if they differ).")
@click.option("--heal", is_flag=True, help="Store again what of the backups is damaged, and what an audit finds.")
@click.option("--allow-plaintext", is_flag=True, help="Store disks that QEMU encrypts, too: in plaintext.")
@click.option("--dry-run", is_flag=True, help="Estimate, change nothing.")
@copying.options
@click.pass_obj
def command(settings: output.Settings, /, domains: Tuple[str, ...], every: bool, strict: bool, **options: Any) -> None:
    """Back up domains: each disk by its changed blocks, or in full with the reason."""
    if bool(domains) == every:
        raise click.UsageError("name the domains, or give --all")
    warned: List[bool] = []

    def show(made: results.Backup) -> None:
        warned.append(bool(made.warnings))
        if not settings.json:
            _show(made)

    jobs = [partial(_one, domain, options) for domain in domains]
    if every:
        from libvirt_cbt.actions import running

        jobs = [partial(_one, domain, options) for domain in output.listed(settings, running.running)]
    output.run(settings, jobs, show, always=True)
    if strict and any(warned):
        raise SystemExit(3)


def _one(domain: str, options: Any, session: Any) -> results.Backup:
    arguments = dict(options)
    return libvirt_cbt.backup(session, domain, options=copying.taken(arguments), **arguments)


def _show(made: results.Backup) -> None:
    what = "would back up" if made.dry_run else "backed up"
    how = {"frozen": f"frozen {made.quiesce.frozen_ms} ms", "failed": "not consistent"}.get(made.quiesce.result, "")
    output.say(
        f"{what} {made.domain}: generation {made.generation}" + (f", backup {made.backup}" if made.backup else ""),
        end="",
    )
    output.say(f", {made.seconds} s" + (f", {how}" if how else "") if not made.dry_run else "")
    rows = [
        (d.target, d.mode, output.size(d.capacity), output.size(d.dirty_bytes), output.size(d.data_bytes),
         output.size(d.zero_bytes), output.size(d.stored_bytes), d.reason or "")
        for d in made.disks
    ]  # fmt: skip
    output.table(
        ("disk", "mode", "capacity", "changed", "data", "zero", "stored", "reason"), rows, right=(2, 3, 4, 5, 6)
    )
    for audit in made.audit or []:
        output.say(f"audited {audit.target}: {output.size(audit.compared_bytes)} compared, {audit.differing_bytes} bytes differ")
    for left_out in made.unprotected:
        output.say(f"not protected: {left_out.target}: {left_out.reason}")
    for warning in made.warnings:
        logs.warning(warning, domain=made.domain)
