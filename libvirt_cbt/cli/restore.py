"""`libvirt-cbt restore`"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Dict, List, Optional, TextIO, Tuple

import click

import libvirt_cbt
from libvirt_cbt import errors
from libvirt_cbt.cli import copying, output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results

EXAMPLES = """\b
Examples:
  libvirt-cbt -r /backups restore web1 --output /tmp/web1
  libvirt-cbt -r /backups restore web1 --at 3 --disk vda --format qcow2 --output /tmp/web1
  libvirt-cbt -r /backups restore web1 --disk vda --output - | zstd > vda.raw.zst
  libvirt-cbt -r /backups restore web1 --to vda=/dev/vg0/web1
  libvirt-cbt -r /backups restore web1 --output /var/lib/libvirt/images/web2 --define web2 --start
  libvirt-cbt -r /backups restore web1 --in-place
"""


@click.command(epilog=EXAMPLES)
@click.argument("domain")
@click.option("--at", metavar="P", default="latest", show_default=True, help="Generation, backup id or latest.")
@click.option("-o", "--output", "directory", metavar="DIR",
              help="Where the images go: DIR/vda.raw ...; - with one --disk is standard output.")  # fmt: skip
@click.option("--to", "places", metavar="T=PLACE", multiple=True,
              help="Overwrite a block device, or an NBD export (nbd+unix:///NAME?socket=PATH), with disk T; repeatable.")  # fmt: skip
@click.option("--disk", "disks", metavar="T", multiple=True, help="Only this disk; repeatable.")
@click.option("--format", "fmt", type=click.Choice(["raw", "qcow2"]), default="raw", show_default=True)
@click.option("--salvage", is_flag=True,
              help="Leave what is damaged as zeroes, list it and exit with 16, instead of writing nothing.")  # fmt: skip
@click.option("--define", metavar="NAME", help="Make a domain of the images, with a UUID and MAC addresses of its own.")
@click.option("--start", is_flag=True, help="Start it.")
@click.option("--same-identity", is_flag=True, help="Keep UUID and MAC addresses: only when the original is gone.")
@click.option("--in-place", is_flag=True,
              help="Replace the images of the domain itself, which must be shut off; the next backup is full.")  # fmt: skip
@copying.options
@click.pass_obj
def command(
    settings: output.Settings,
    /,
    domain: str,
    directory: Optional[str],
    places: Tuple[str, ...],
    disks: Tuple[str, ...],
    in_place: bool,
    **arguments: Any,
) -> None:
    """Write a backup's disks as images that stand alone, each byte checked on the way."""
    to = _places(places)
    if directory == "-":
        if len(disks) != 1 or to:
            raise click.UsageError("--output - takes one disk: name it with --disk")
        to, disks, directory = {disks[0]: "-"}, (), None
    if "-" in to.values() and settings.json:
        raise click.UsageError("standard output takes either the disk or the document of --json")
    damage: List[Any] = []
    # Standard output may be a disk.
    stream = sys.stderr if "-" in to.values() else sys.stdout

    def job(session: libvirt_cbt.Session) -> results.Restore:
        bounds = copying.taken(arguments)
        if in_place:
            if directory or to or any(arguments[name] for name in ("define", "start", "same_identity", "salvage")):
                raise errors.Usage(reason="--in-place goes with --at and --disk alone")
            return libvirt_cbt.restore_in_place(session, domain, at=arguments["at"], disks=disks, options=bounds)
        return libvirt_cbt.restore(session, domain, directory, disks=disks, to=to, options=bounds, **arguments)

    def show(found: results.Restore) -> None:
        damage.extend(found.damage)
        if not settings.json:
            _show(found, stream)

    output.run(settings, [job], show, always=True)
    if damage:
        raise SystemExit(errors.Damaged.code)


def _places(given: Tuple[str, ...]) -> Dict[str, str]:
    found: Dict[str, str] = {}
    for text in given:
        target, equals, place = text.partition("=")
        if not equals or not place or target in found:
            raise click.UsageError("--to is DISK=PLACE, each disk once: --to vda=/dev/vg0/web1")
        found[target] = place
    return found


def _show(found: results.Restore, stream: TextIO) -> None:
    def say(line: str) -> None:
        output.say(line, to=stream)

    say(f"restored {found.domain} generation {found.generation}, backup {found.backup}, {found.seconds} s")
    for file in found.files:
        say(f"{file.path}  {output.size(file.bytes)}")
    for left_out in found.unprotected:
        say(f"not in this backup: {left_out.target}: {left_out.reason}")
    if found.defined:
        state = "started" if found.defined.started else "defined"
        say(f"{state} domain {found.defined.name}, UUID {found.defined.uuid}")
    for warning in found.warnings:
        say(f"warning: {warning}")
    for one in found.damage:
        where = f"disk {one.target} offset {one.offset} length {one.length}"
        say(f"zeroes instead of damaged data: {where}, backup {one.backup}: {one.reason}")
