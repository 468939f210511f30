"""What is kept of a domain, day by day for the last weeks and month by month before."""

from __future__ import annotations

from collections import Counter
from datetime import date, timedelta
from typing import Dict, Final, List

from lxml import etree

from libvirt_cbt.actions import results
from libvirt_cbt.cli.report_drawings import table, tag

WEEKS: Final = 8
MONTHS: Final = 60
NAMES: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def kept(domain: results.ReportDomain) -> List[etree._Element]:
    """Counts of the backups that hold data; the weeks end with the newest."""
    title = tag("h3", "What is kept")
    days = {date.fromisoformat(one.day): one.backups for one in domain.days if one.backups}
    if not days:
        return [title, tag("p", "No backup holds data.")]
    last = max(days)
    monday = last - timedelta(days=last.weekday())
    first = max(monday - timedelta(weeks=WEEKS - 1), min(days) - timedelta(days=min(days).weekday()))
    parts = [_weeks(days, first, last)]
    older = {day: count for day, count in days.items() if day < first}
    if older:
        parts.append(_months(older))
    return [title, tag("div", *parts, class_="pair")]


def _weeks(days: Dict[date, int], first: date, last: date) -> etree._Element:
    body = tag("tbody")
    monday = first
    while monday <= last:
        line = tag("tr", tag("th", monday.strftime("%d %b"), scope="row"))
        for day in (monday + timedelta(days=n) for n in range(7)):
            count = days.get(day, 0)
            outside = day > last or day < min(days)
            line.append(tag("td", str(count) if count else "", class_="has" if count else "out" if outside else None))
        body.append(line)
        monday += timedelta(weeks=1)
    head = tag("tr", tag("th", "from", scope="col"), *(tag("th", name, scope="col") for name in NAMES))
    caption = tag("caption", f"Backups per day, up to {last.isoformat()}")
    return tag("table", caption, tag("thead", head), body, class_="month")


def _months(days: Dict[date, int]) -> etree._Element:
    counts: Dict[str, int] = Counter()
    on: Dict[str, int] = Counter()
    for day, count in days.items():
        counts[day.strftime("%Y-%m")] += count
        on[day.strftime("%Y-%m")] += 1
    rows = [[month, str(counts[month]), str(on[month])] for month in sorted(counts, reverse=True)]
    caption = "Older backups by month"
    if len(rows) > MONTHS:
        caption += f"; the last {MONTHS} months of {len(rows)}"
    return table(caption, ("month", "backups", "on days"), rows[:MONTHS], numbers=(1, 2), name="Older backups by month")
