"""The generations of a domain on a page: as a timeline, as a table, and as heat maps of its disks."""

from __future__ import annotations

from typing import Final, List, Sequence, TypeVar

from lxml import etree

from libvirt_cbt.actions import results
from libvirt_cbt.cli import output
from libvirt_cbt.cli.report_drawings import FEWEST, STEPS, Child, bars, listed, logarithmic, steps, table, tag

T = TypeVar("T")

COLUMNS: Final = 90  # of a timeline; more generations than these share columns
KINDS: Final = {"full": 1.0, "mixed": 0.75, "incremental": 0.5, "mark": 0.2}
SAYS: Final = 3  # warnings of one generation that are shown


def timeline(generations: Sequence[results.ReportGeneration]) -> List[etree._Element]:
    """Bars from the oldest to the newest: kind, sizes, milliseconds, warnings."""
    each = -(-len(generations) // COLUMNS) or 1
    groups = [generations[n : n + each] for n in range(0, len(generations), each)]
    written = [max(g.dirty_bytes for g in group) for group in groups]
    stored = [max(g.stored_bytes for g in group) for group in groups]
    frozen = [max(g.quiesce.frozen_ms or 0.0 for g in group) for group in groups]
    warned = [any(g.warnings for g in group) for group in groups]
    longest = max(frozen, default=0.0) or 1.0
    kinds = [max(KINDS.get(g.kind, 0.5) for g in group) for group in groups]
    count = sum(bool(g.warnings) for g in generations)
    lines = [
        _line(
            "kind", bars(kinds, "Kind of each generation", "kind"), f"{sum(g.kind == 'full' for g in generations)} full"
        ),
        _line("written", bars(logarithmic(written), "Bytes written"), output.size(max(written, default=0))),
        _line("stored", bars(logarithmic(stored), "Bytes stored"), output.size(max(stored, default=0))),
        _line("frozen", bars([f / longest for f in frozen], "Milliseconds frozen", "ice"), f"{max(frozen):.0f} ms"),
        _line("warnings", bars([float(w) for w in warned], "Generations with warnings", "fault"), str(count)),
    ]
    share = f" A column stands for up to {each} generations and shows the most of one." if each > 1 else ""
    caption = (
        "From the oldest to the newest; at the right the largest. Kind: a tall bar is a full backup, a half one an "
        f"increment, a low one a mark. Bytes are drawn by magnitude.{share}"
    )
    first, last = _when(generations[0]), _when(generations[-1])
    ends = tag("div", tag("span", first), tag("span", last), class_="ends")
    if len(groups) < FEWEST:  # the last bar is not at the right
        ends = tag("div", first if len(generations) == 1 else f"{first} to {last}", class_="ends")
    return [tag("h3", "Timeline"), _drawn(caption, lines, tag("tr", tag("td"), tag("td", ends), tag("td")))]


def _line(label: str, drawing: etree._Element, value: str) -> etree._Element:
    return tag("tr", tag("th", label, scope="row"), tag("td", drawing), tag("td", value, class_="number"))


def _drawn(caption: str, lines: Sequence[etree._Element], *below: etree._Element) -> etree._Element:
    columns = tag("colgroup", tag("col", class_="label"), tag("col"), tag("col", class_="value"))
    return tag(
        "table",
        tag("caption", tag("span", caption)),
        columns,
        tag("tbody", *lines),
        tag("tfoot", *below),
        class_="drawn",
    )


def _when(generation: results.ReportGeneration) -> str:
    return f"{generation.generation}: {generation.time[:10]}"


def heat(disk: results.ReportDisk, most: int) -> List[etree._Element]:
    """Where a disk was written in which generation: a line for each, or for a few of them."""
    title = tag("h3", f"Where {disk.target} was written")
    found = disk.heatmap
    if found is None:
        return [title, tag("p", "Not known: see above.")]
    if not found.generations:
        return [title, tag("p", "Shown from the second generation of its lineage on.")]
    lengths = [region.length for region in found.regions]
    each = -(-len(found.generations) // most)
    first = len(found.generations) % each or each  # the short group is the oldest
    cuts = [0, *range(first, len(found.generations) + 1, each)]
    lines = []
    for begin, end in reversed(list(zip(cuts, cuts[1:]))):
        group = found.generations[begin:end]
        shares = [max(column) / n for column, n in zip(zip(*(g.changed_bytes for g in group)), lengths)]
        total = max(sum(g.changed_bytes) for g in group)
        label = str(group[-1].generation) if len(group) == 1 else f"{group[0].generation}-{group[-1].generation}"
        lines.append(_line(label, steps(shares, f"Written in generation {label}"), output.size(total)))
    count = len(found.generations)
    often = bars(
        [r.written / count for r in found.regions], "In how many generations each region was written", fewest=1
    )
    share = " A line of several generations shows the most of one." if each > 1 else ""
    ends = tag("div", tag("span", "0"), tag("span", output.size(found.capacity)), class_="ends")
    caption = (
        f"Write generations, the newest first; a cell is {output.size(lengths[0] if lengths else 0)} of the disk, at the "
        f"right what was written.{share} Last line: how often, of {count} generations."
    )
    foot = [_line("how often", often, ""), tag("tr", tag("td"), tag("td", ends), tag("td"))]
    return [title, _drawn(caption, lines, *foot), _legend()]


def _legend() -> etree._Element:
    items = [
        tag("li", steps([limit], f"Step {n}"), f"up to {limit * 100:g} %" if limit < 1 else "more")
        for n, limit in enumerate(STEPS, 1)
    ]
    return tag("ul", tag("li", "Written of a cell:"), *items, class_="legend")


def listing(generations: Sequence[results.ReportGeneration], most: int) -> List[etree._Element]:
    """The newest first: half of the lines are the newest, the rest is spread over those before."""
    shown = thinned(generations, most)
    rows: List[List[Child]] = [
        [
            str(g.generation),
            g.time[:16].replace("T", " "),
            f"{g.kind}, protected" if g.protected else g.kind,
            output.size(g.dirty_bytes),
            output.size(g.stored_bytes),
            output.size(g.held_bytes),
            f"{g.quiesce.frozen_ms:.0f} ms" if g.quiesce.frozen_ms is not None else "-",
            "yes" if g.consistent else "no",
            _says(g),
        ]
        for g in shown
    ]
    caption = f"{len(generations)} generations, the newest first; times in UTC"
    if len(shown) < len(generations):
        caption = f"{len(shown)} of {len(generations)} generations, the newest first (libvirt-cbt list shows all); times in UTC"
    headings = ("gen", "time", "kind", "written", "stored", "on disk now", "frozen", "consistent", "remarks")
    made = table(caption, headings, rows, numbers=(3, 4, 5, 6), words=(8,), name="Generations")
    return [tag("h3", "Generations"), made]


def thinned(generations: Sequence[T], most: int) -> List[T]:
    """At most `most` of them, from the last to the first."""
    rows = list(reversed(generations))
    if len(rows) <= most:
        return rows
    near, rest = rows[: most // 2], rows[most // 2 :]
    wanted = most - len(near)
    return near + [rest[(n * (len(rest) - 1)) // max(1, wanted - 1)] for n in range(wanted)]


def _says(generation: results.ReportGeneration) -> Child:
    reasons = [f"{d.target} {d.mode}: {d.reason}" for d in generation.disks if d.reason]
    left_out = [f"{u.target} left out: {u.reason}" for u in generation.unprotected]
    said = [*generation.warnings, *reasons, *left_out]
    if len(said) > SAYS:
        said = [*said[:SAYS], f"and {len(said) - SAYS} more"]
    return listed([sentence[:300] for sentence in said]) if said else None
