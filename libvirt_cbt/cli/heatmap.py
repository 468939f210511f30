"""`libvirt-cbt heatmap`"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Final, List, Optional, Sequence, Tuple

import click

import libvirt_cbt
from libvirt_cbt import names
from libvirt_cbt.cli import output

if TYPE_CHECKING:
    from libvirt_cbt.actions import results

EXAMPLES: Final = """\b
Examples:
  libvirt-cbt -r /backups heatmap web1 vda
  libvirt-cbt -r /backups heatmap web1 vda --since 10 --until 20 --width 120
  libvirt-cbt -r /backups --json heatmap web1 vda
"""
# (share of a region that was written, character, colour of a terminal with 256 of them)
STEPS: Final = ((0.001, ".", 24), (0.01, ":", 31), (0.05, "-", 37), (0.2, "+", 178), (0.5, "*", 208), (1.0, "#", 196))
OFTEN_COLOURS: Final = (24, 31, 37, 107, 178, 172, 208, 202, 196)
LABEL: Final = 23  # the columns before the map
MOST_LINES: Final = 40  # more generations than these share lines
LEAST_WIDTH: Final = 60


@click.command(epilog=EXAMPLES)
@click.argument("domain")
@click.argument("disk")
@click.option("--since", metavar="P", help="Generation, backup id, change id, or * [default: as far back as is known].")
@click.option("--until", metavar="P", default="latest", show_default=True, help="The same, but for *.")
@click.option("--width", metavar="N", type=click.IntRange(LEAST_WIDTH, 1000), help="Columns [default: the terminal's].")
@click.pass_obj
def command(
    settings: output.Settings, domain: str, disk: str, since: Optional[str], until: str, width: Optional[int]
) -> None:
    """Which regions of a disk change how often: a line for each generation, a column for each region."""
    wide = width or _terminal_width()
    output.run(
        settings,
        [lambda s: libvirt_cbt.heatmap(s, domain, disk, since=since, until=until, regions=wide - LABEL - 2)],
        lambda found: _show(lines(found, coloured=_coloured(), width=wide)),
    )


def _show(made: List[str]) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in made))  # its own colours are escapes, too


def _terminal_width() -> int:
    wide = shutil.get_terminal_size().columns if sys.stdout.isatty() else 80
    return min(max(wide, LEAST_WIDTH), 200)


def _coloured() -> bool:
    """https://no-color.org: any value but an empty one forbids it."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in (None, "", "dumb")


def lines(found: results.Heatmap, *, coloured: bool, width: int = 80) -> List[str]:
    """The map as text, no line longer than `width`; colours repeat what the characters say."""
    count = len(found.generations)
    since = "from the first" if found.since is None else f"after {found.since}"
    column = output.size(found.regions[0].length) if found.regions else "0 B"
    out = textwrap.wrap(
        f"{names.printable(found.domain)} {found.target}: {count} generations, {since} up to {found.until}; "
        f"a column is {column} of {output.size(found.capacity)}",
        width,
    )
    right = output.size(found.capacity)
    axis = f" 0{right.rjust(len(found.regions))}" if len(found.regions) > len(right) else ""
    out.append(f"{'gen':>5} {'time':<16}{axis}")
    grouped = _grouped(found.generations, [region.length for region in found.regions])
    for label, time, shares in grouped:
        out.append(f"{label:>5} {time:<16} |{_drawn([_step(share) for share in shares], coloured)}|")
    often = [_often(region.written, count) for region in found.regions]
    out.append(f"{'often':>22} |{_drawn(often, coloured)}|")
    steps = " ".join(f"{character}={share * 100:g}%" for share, character, _ in STEPS)
    legend = [
        f"Up to this share of a region was written: {steps}, blank none.",
        "often: in how many generations a region was written, 1 in few to 9 in all, blank in none.",
    ]
    if len(grouped) < count:
        legend.append("A line n+ stands for generation n and those before the next line, and shows the most of one.")
    return [*out, *(line for sentence in legend for line in textwrap.wrap(sentence, width))]


def _grouped(
    generations: Sequence[results.HeatGeneration], lengths: Sequence[int]
) -> List[Tuple[str, str, List[float]]]:
    """One line for each generation, or for a few of them in a row, which then shows the most that one has written."""
    each = -(-len(generations) // MOST_LINES) or 1
    out = []
    for first in range(0, len(generations), each):
        group = generations[first : first + each]
        most = [max(column) for column in zip(*(g.changed_bytes for g in group))]
        label = str(group[0].generation) + ("+" if len(group) > 1 else "")
        out.append((label, group[0].time[:16].replace("T", " "), [b / n for b, n in zip(most, lengths)]))
    return out


def _step(share: float) -> Tuple[str, int]:
    if not share:
        return " ", 0
    return next(((character, colour) for limit, character, colour in STEPS if share <= limit), STEPS[-1][1:])


def _often(written: int, count: int) -> Tuple[str, int]:
    if not written:
        return " ", 0
    digit = 1 + (written - 1) * 8 // max(1, count - 1)
    return str(digit), OFTEN_COLOURS[digit - 1]


def _drawn(cells: Sequence[Tuple[str, int]], coloured: bool) -> str:
    if not coloured:
        return "".join(character for character, _ in cells)
    return "".join(f"\x1b[38;5;{colour}m{character}\x1b[0m" if colour else character for character, colour in cells)
