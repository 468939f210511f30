"""`libvirt-cbt changed`"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from functools import partial
from typing import TYPE_CHECKING, Callable, Dict, Final, Iterator, List, Optional

import click

import libvirt_cbt
from libvirt_cbt import errors
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions.changed import Changed

EXAMPLES: Final = """\b
Examples:
  libvirt-cbt -r /backups changed web1 vda --since 3
  libvirt-cbt -r /backups --json changed web1 vda --since 3 --until 7 --max-results 1000
  libvirt-cbt -r /backups changed web1 vda --since '*' --format csi --block-size 65536
  libvirt-cbt -r /backups changed web1 vda --since 3 --live
  libvirt-cbt -r /backups changed web1 vda --since 3 --until 7 --exact
"""
HEADER: Final = (
    "domain", "uuid", "target", "lineage", "since", "until", "change_id", "capacity", "granularity", "guarantee",
)  # fmt: skip


@click.command(epilog=EXAMPLES)
@click.argument("domain")
@click.argument("disk")
@click.option("--since", metavar="P", required=True, help="Generation, backup id, change id, or * for everything.")
@click.option("--until", metavar="P", help="The same, but for *; default: the newest.  Or an open fleecing point.")
@click.option("--start-offset", metavar="N", type=int, default=0, help="Begin at this byte of the disk.")
@click.option("--max-results", metavar="N", type=int, help="At most so many; go on from next_offset.")
@click.option("--live", is_flag=True, help="Mark first, and answer until then (go on with --until of the answer).")
@click.option("--scratch-dir", metavar="D", help="With --live: as of mark.")
@click.option("--allow-plaintext", is_flag=True, help="With --live: as of mark.")
@click.option("--exact", is_flag=True, help="Between two backups: compare them, and leave out sectors that are equal.")
@click.option("--format", "fmt", type=click.Choice(["json", "csi", "vmware", "nbdinfo"]), help="Instead of a table.")
@click.option("--block-size", metavar="BYTES", type=int, help="With csi: blocks of this length (FIXED_LENGTH).")
@click.pass_obj
def command(
    settings: output.Settings,
    domain: str,
    disk: str,
    since: str,
    until: Optional[str],
    start_offset: int,
    max_results: Optional[int],
    live: bool,
    scratch_dir: Optional[str],
    allow_plaintext: bool,
    exact: bool,
    fmt: Optional[str],
    block_size: Optional[int],
) -> None:
    """The blocks of a disk that changed between two generations; without --live libvirt is not asked."""
    _check(settings, fmt, max_results, block_size)
    begin = start_offset // block_size * block_size if block_size else start_offset  # CSI: rounded down to the block
    # The other formats count what they print: runs that were joined, or blocks.
    most = max_results if fmt in (None, "json") else None

    def job(session: libvirt_cbt.Session) -> Changed:
        ask = partial(libvirt_cbt.changed, session, domain, disk, since=since, max_results=most, exact=exact)
        marking = partial(ask, scratch_dir=scratch_dir, allow_plaintext=allow_plaintext)
        found = marking(until=until, start_offset=begin, live=live)
        if start_offset <= found.capacity:
            return found
        return ask(until=found.until, start_offset=start_offset)  # which is refused

    if settings.json or fmt == "json":
        _print_document(settings, job, begin)
    elif fmt is None:
        output.run(settings, [job], _show)
    else:
        output.run(settings, [job], lambda found: _print(found, fmt, begin, max_results, block_size))


def _check(settings: output.Settings, fmt: Optional[str], most: Optional[int], block_size: Optional[int]) -> None:
    if settings.json and fmt not in (None, "json"):
        output.fail(settings, errors.Usage(reason=f"--format {fmt} prints that format itself; leave --json out"))
    if most is not None and most < 1:
        output.fail(settings, errors.Usage(reason=f"--max-results {most} makes no answer; give 1 or more"))
    if block_size is not None and (fmt != "csi" or block_size < 512 or block_size % 512):
        reason = "--block-size goes with --format csi" if fmt != "csi" else "--block-size is a multiple of 512"
        output.fail(settings, errors.Usage(reason=reason))


def _print(found: Changed, fmt: str, start: int, most: Optional[int], block_size: Optional[int]) -> None:
    from libvirt_cbt.cli import formats

    with contextlib.closing(found.pages):
        if fmt == "csi":
            _write(formats.csi(found, most, block_size))
        else:
            _write({"vmware": formats.vmware, "nbdinfo": formats.nbdinfo}[fmt](found, start, most))


def _write(pieces: Iterator[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)


class _Document:
    """The one document of --json, printed while it is made: an answer may have millions of extents."""

    def __init__(self, start: int) -> None:
        self._start = start
        self._head = '{"version": 1, "results": ['
        self.error: Optional[Exception] = None

    def guarded(self, job: Callable[[libvirt_cbt.Session], Changed]) -> Callable[[libvirt_cbt.Session], Changed]:
        def asked(session: libvirt_cbt.Session) -> Changed:
            try:
                return job(session)
            except Exception as e:
                self.error = e
                raise

        return asked

    def show(self, found: Changed) -> None:
        from libvirt_cbt.cli import formats

        header: Dict[str, object] = {name: getattr(found, name) for name in HEADER}
        sys.stdout.write(self._head + output.dumped(header)[:-1] + ', "extents": [')
        self._head = ""
        taken = formats.Taken(found.pages, None, self._start, found.capacity)
        resume: Optional[int] = self._start
        try:
            _write(formats.listed(formats.rows(page) for page in taken))
            resume = found.pages.next_offset
        except Exception as e:
            self.error = e
            resume = taken.end  # what was printed is right, and can be gone on from
            raise
        finally:
            sys.stdout.write(f'], "next_offset": {output.dumped(resume)}}}')

    def close(self) -> None:
        tail = ""
        if self.error:
            error = self.error
            if not isinstance(error, errors.CbtError):
                error = errors.CbtError(reason=f"a bug of libvirt-cbt: {error}")
            tail = f', "error": {output.dumped(error.document())}'
        sys.stdout.write(f"{self._head}]{tail}}}\n")


def _print_document(settings: output.Settings, job: Callable[[libvirt_cbt.Session], Changed], start: int) -> None:
    document = _Document(start)
    try:
        output.run(dataclasses.replace(settings, json=False, quiet=True), [document.guarded(job)], document.show)
    finally:
        document.close()


def _show(found: Changed) -> None:
    from libvirt_cbt import extents

    since = "everything allocated" if found.since is None else f"changed since generation {found.since}"
    grain = "granularity not known" if found.granularity is None else f"granularity {output.size(found.granularity)}"
    output.say(f"{found.domain} {found.target}, {output.size(found.capacity)}: {since}, up to generation {found.until}")
    output.say(f"change id {found.change_id}; {found.guarantee} ({grain})")
    output.say(f"{'offset':>19} {'length':>19} state generation")
    count = total = 0
    for page in found.pages:
        lines: List[str] = []
        for offset, length, state, generation in page.tolist():
            lines.append(f"{offset:>19} {length:>19} {extents.STATES[state]:<5} {generation}\n")
        sys.stdout.write("".join(lines))
        count, total = count + len(page), total + int(page["length"].sum())
    output.say(f"{count} extents, {output.size(total)}", end="")
    output.say("" if found.pages.next_offset is None else f"; go on with --start-offset {found.pages.next_offset}")
