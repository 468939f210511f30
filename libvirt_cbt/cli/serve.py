"""`libvirt-cbt serve`"""

from __future__ import annotations

import dataclasses
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Callable, ContextManager, List, Optional, Tuple

import click

import libvirt_cbt
from libvirt_cbt import errors
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results
    from libvirt_cbt.actions.serve import Served

EXAMPLES = """\b
Examples:
  libvirt-cbt -r /backups serve web1 --at 7 --since 3 --socket /run/web1.sock &
  nbdinfo --map=qemu:dirty-bitmap:since-3 --json 'nbd+unix:///vda?socket=/run/web1.sock'
  nbdcopy 'nbd+unix:///vda?socket=/run/web1.sock' /tmp/vda.raw
"""


@click.command(epilog=EXAMPLES)
@click.argument("domain")
@click.option("--at", metavar="P", default="latest", show_default=True, help="Generation, backup id or latest.")
@click.option("--since", metavar="F", help="What changed since F, a generation, backup id, change id, or * for "
              "everything (then N is 0), as the meta context qemu:dirty-bitmap:since-N.")  # fmt: skip
@click.option("--disk", "disks", metavar="T", multiple=True, help="Only this disk; repeatable.")
@click.option("--socket", metavar="PATH", required=True, help="The unix socket, mode 0600; nothing may be there yet.")
@click.pass_obj
def command(
    settings: output.Settings, domain: str, at: str, since: Optional[str], disks: Tuple[str, ...], socket: str
) -> None:
    """Show a backup over NBD, read-only, one export per disk, until Ctrl-C.

    When all is ready the URIs are printed (with --json the one document), and it goes on serving, for any number of
    clients.  Ctrl-C, SIGTERM and SIGHUP are its proper end: the socket is removed and the exit code is 0; it is 20 if
    the server ends by itself.

    The data is served as it is stored: digests are not checked on the way, run `verify` first where that matters.
    """
    try:
        _serve(settings, lambda session: libvirt_cbt.serve(session, domain, socket, at=at, since=since, disks=disks))
    except errors.Interrupted:
        pass
    except errors.CbtError as e:
        # The one document has been printed.
        output.fail(dataclasses.replace(settings, json=False), e)


def _serve(settings: output.Settings, verb: Callable[[libvirt_cbt.Session], ContextManager[Served]]) -> None:
    stops: List[Callable[[], None]] = []
    opened: List[Served] = []
    # Signals are minded without a gap from here on, also between the document and the first wait.
    with output.Interrupts() as interrupts, ExitStack() as stack:

        def begin(session: libvirt_cbt.Session) -> results.Serve:
            stops.extend([interrupts.check, session.watch.stop])
            opened.append(stack.enter_context(verb(session)))
            return opened[0].result

        def stop() -> None:
            for one in stops:
                one()

        output.run(settings, [begin], _show)
        sys.stdout.flush()
        opened[0].wait(stop)


def _show(found: results.Serve) -> None:
    since = "" if found.since is None else f", changes since generation {found.since}"
    output.say(f"serving {found.domain} generation {found.generation}, backup {found.backup}{since}; Ctrl-C ends it")
    dirty = [output.size(d.dirty_bytes) for d in found.disks]
    rows = [(d.target, d.uri, d.context or "-", size) for d, size in zip(found.disks, dirty)]
    output.table(("disk", "uri", "meta context", "changed"), rows, right=(3,))
    for left_out in found.unprotected:
        output.say(f"not in this backup: {left_out.target}: {left_out.reason}")
