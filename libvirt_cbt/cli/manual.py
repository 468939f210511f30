"""`libvirt-cbt manual`"""

from __future__ import annotations

import os
from typing import Optional

import click

from libvirt_cbt import errors
from libvirt_cbt.cli import output

EXAMPLES = """\b
Examples:
  libvirt-cbt manual libvirt-cbt-run | man -l -
  libvirt-cbt manual --directory /usr/local/share/man
  man libvirt-cbt-run
"""


@click.command(epilog=EXAMPLES)
@click.argument("page", metavar="[PAGE]", required=False)
@click.option("--directory", metavar="D", help="Write all pages into man1 and man5 in there; older ones are replaced.")
@click.pass_obj
def command(settings: output.Settings, page: Optional[str], directory: Optional[str]) -> None:
    """Print a man page [libvirt-cbt], or write all of them: one of each command, and libvirt-cbt.toml(5)."""
    from libvirt_cbt.cli import manual_pages
    from libvirt_cbt.hooks import placed

    if settings.json:
        raise click.UsageError("a man page is no JSON; leave --json out")
    known = manual_pages.names()
    if directory is None:
        if page and page not in known:
            raise click.UsageError(f"there is no page '{page}'; they are {', '.join(known)}")
        click.echo(manual_pages.page(page or manual_pages.MAIN), nl=False)
        return
    if page:
        raise click.UsageError("--directory goes without a page")
    paths = {os.path.join(os.path.abspath(directory), f"man{known[name]}", f"{name}.{known[name]}"): name for name in known}
    try:
        placed.require_free(paths)
        for path, name in paths.items():
            placed.write(path, manual_pages.page(name), 0o644)
    except errors.CbtError as e:
        output.fail(settings, e)
    output.say(f"wrote {len(paths)} pages into {os.path.abspath(directory)}")
