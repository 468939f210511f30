"""Elements of a page, and the small drawings in it: bars and maps whose height says what their colour says.

Everything that is text goes through `tag`: the serializer escapes it, and `names.printable` takes out what no page may
hold (control characters, turned writing directions).
"""

from __future__ import annotations

import math
from typing import Dict, Final, List, Optional, Sequence, Union

from lxml import etree

from libvirt_cbt import names

Child = Union[str, etree._Element, None]  # noqa: SLF001 (lxml has no other name for it)

LONGEST: Final = 600  # characters of a name or a sentence
TALL: Final = 12  # units of a bar
FEWEST: Final = 24  # columns: a few bars are no wider than these
STEPS: Final = (0.001, 0.01, 0.05, 0.2, 0.5, 1.0)  # up to this share of a region was written


def tag(name: str, /, *children: Child, **attributes: Optional[str]) -> etree._Element:
    """An element; `class_` is class, `data_x` is data-x, None is left out, of children too."""
    element = etree.Element(name)
    for key, value in attributes.items():
        if value is not None:
            element.set(key.rstrip("_").replace("_", "-"), names.printable(value, LONGEST))
    for child in children:
        if child is None:
            continue
        if not isinstance(child, str):
            element.append(child)
            continue
        text = names.printable(child, LONGEST)
        if len(element):
            element[-1].tail = (element[-1].tail or "") + text
        else:
            element.text = (element.text or "") + text
    return element


def bars(heights: Sequence[float], name: str, kind: str = "bar", *, fewest: int = FEWEST) -> etree._Element:
    """One bar for each share of the full height, 0 to 1; what is more than nothing can be seen."""
    path = "".join(
        f"M{x} {TALL}v-{_units(height)}h.8v{_units(height)}z" for x, height in enumerate(heights) if height > 0
    )
    return _drawing(max(fewest, len(heights)), {kind: path}, name, "bars")


def _units(height: float) -> str:
    return f"{max(0.8, min(1.0, height) * TALL):.3g}"


def steps(shares: Sequence[float], name: str) -> etree._Element:
    """One cell for each share: the more, the taller and the darker (on a dark page the lighter)."""
    paths: Dict[str, List[str]] = {}
    for x, share in enumerate(shares):
        if share > 0:
            step = next((n for n, limit in enumerate(STEPS, 1) if share <= limit), len(STEPS))
            paths.setdefault(f"h{step}", []).append(f"M{x} {TALL}v-{2 * step}h1v{2 * step}z")
    return _drawing(len(shares), {kind: "".join(parts) for kind, parts in paths.items()}, name, "row")


def _drawing(width: int, paths: Dict[str, str], name: str, kind: str) -> etree._Element:
    return tag(
        "svg",
        *(tag("path", class_=key, d=None) if not path else _path(key, path) for key, path in sorted(paths.items())),
        viewBox=f"0 0 {width} {TALL}",
        preserveAspectRatio="none",
        class_=kind,
        role="img",
        aria_label=name,
    )


def _path(kind: str, path: str) -> etree._Element:
    element = etree.Element("path")
    element.set("class", kind)
    element.set("d", path)  # ours, and longer than a sentence
    return element


def logarithmic(values: Sequence[int]) -> List[float]:
    """Shares of the largest by magnitude: a full backup is a thousand times an increment."""
    most = math.log2(1 + max(values, default=0) / 65536)
    return [math.log2(1 + value / 65536) / most if most else 0.0 for value in values]


def table(
    caption: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[Child]],
    *,
    name: str,
    numbers: Sequence[int] = (),
    words: Sequence[int] = (),
) -> etree._Element:
    """A table that scrolls by itself where the page is narrow; the first column names its row, `words` may wrap."""
    kinds = ["number" if n in numbers else "words" if n in words else None for n in range(len(headings))]
    head = tag("tr", *(tag("th", heading, scope="col", class_=kind) for heading, kind in zip(headings, kinds)))
    body = tag("tbody")
    for row in rows:
        line = tag("tr", tag("th", row[0], scope="row", class_=kinds[0]))
        for cell, kind in zip(row[1:], kinds[1:]):
            line.append(tag("td", cell, class_=kind))
        body.append(line)
    return scrolled(tag("table", tag("caption", tag("span", caption)), tag("thead", head), body), name)


def scrolled(element: etree._Element, name: str) -> etree._Element:
    return tag("div", element, class_="wide", tabindex="0", role="region", aria_label=name)


def listed(sentences: Sequence[str], kind: Optional[str] = None) -> etree._Element:
    """What a sentence has between backticks is a command."""
    rows = (sentence.split("`") for sentence in sentences)
    return tag("ul", *(tag("li", *(tag("code", x) if at % 2 else x for at, x in enumerate(row))) for row in rows), class_=kind)
