"""A report as one page: no script, no network, every word of it escaped by the serializer.

Its size is bounded: of many generations some share a column or a line, and the more domains, the fewer lines for each.
"""

from __future__ import annotations

from typing import Final, List, Optional

from lxml import etree
from lxml import html as lxml_html

import libvirt_cbt
from libvirt_cbt.actions import report_file, results
from libvirt_cbt.cli import output, report_days, report_generations, report_style
from libvirt_cbt.cli.report_drawings import listed, table, tag

ALL_LINES: Final = 4000  # of all domains together
LINES: Final = (8, 60)  # of one domain: at least, at most
POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"


def page(found: results.Report) -> bytes:
    """The whole document in UTF-8."""
    lines = min(LINES[1], max(LINES[0], ALL_LINES // max(1, len(found.domains))))
    title = "Backups" if len(found.domains) != 1 else f"Backups of {found.domains[0].domain}"
    style = etree.Element("style")
    style.text = report_style.CSS  # ours; html does not escape here
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        etree.fromstring(report_file.MARK[:-1] + b"/>"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        _policy(),
        tag("title", title),
        style,
    )
    body = tag(
        "body", _header(found, title), tag("main", *_overview(found), *(_domain(d, lines) for d in found.domains))
    )
    document = tag("html", head, body, lang="en")
    text: bytes = lxml_html.tostring(document, doctype="<!DOCTYPE html>", encoding="utf-8")
    return text + b"\n"


def _policy() -> etree._Element:
    element = tag("meta", content=POLICY)
    element.set("http-equiv", "Content-Security-Policy")
    return element


def _header(found: results.Report, title: str) -> etree._Element:
    held = sum(domain.held_bytes for domain in found.domains)
    return tag(
        "header",
        tag("h1", title),
        tag(
            "p",
            f"As of {moment(found.time)}. Repository {found.repository} ({found.id}). {output.size(held)} on disk, "
            f"{output.size(found.free_bytes)} of {output.size(found.total_bytes)} free. libvirt-cbt "
            f"{libvirt_cbt.__version__}.",
            class_="soft",
        ),
    )


def _overview(found: results.Report) -> List[etree._Element]:
    if not found.domains:
        return [tag("section", tag("h2", "No backups"), tag("p", "This repository holds nothing yet."))]
    if len(found.domains) == 1:
        return []
    rows = [
        [
            tag("a", domain.domain, href=f"#d-{domain.uuid}"),
            tag("span", f"{len(domain.attention)} to look at", class_="alarm") if domain.attention else "nothing",
            _age(domain.age_seconds),
            str(domain.backups),
            output.size(domain.held_bytes),
            _age(domain.verified.age_seconds) if domain.verified else "never",
        ]
        for domain in found.domains
    ]
    need = sum(bool(domain.attention) for domain in found.domains)
    caption = f"{count(len(found.domains), 'domain')}, {need} of them to look at"
    headings = ("domain", "attention", "newest backup", "backups", "on disk", "verified")
    shown = table(caption, headings, rows, numbers=(3, 4), words=(0,), name="All domains")
    return [tag("section", tag("h2", "All domains"), shown)]


def _domain(domain: results.ReportDomain, lines: int) -> etree._Element:
    section = tag(
        "section",
        tag("h2", domain.domain, id=f"h-{domain.uuid}"),
        tag("p", domain.uuid, class_="soft") if domain.uuid != domain.domain else None,
        id=f"d-{domain.uuid}",
        aria_labelledby=f"h-{domain.uuid}",
    )
    if domain.unreadable:
        section.append(listed(domain.attention, "alarms"))
        return section
    section.append(_facts(domain))
    if domain.attention:
        shown = domain.attention[:20]
        more = [f"and {len(domain.attention) - len(shown)} more"] if len(domain.attention) > len(shown) else []
        section.append(listed([*shown, *more], "alarms"))
    section.extend(report_generations.timeline(domain.generations))
    section.extend(_disks(domain))
    for disk in domain.disks:
        section.extend(report_generations.heat(disk, min(24, max(4, lines // 2))))
    section.extend(report_days.kept(domain))
    section.extend(report_generations.listing(domain.generations, lines))
    return section


def _facts(domain: results.ReportDomain) -> etree._Element:
    last = domain.verified
    facts = [("Newest backup", _age(domain.age_seconds), moment(domain.newest))]
    if domain.usual_gap_seconds:
        facts.append(("Usual gap", duration(domain.usual_gap_seconds), "between the last backups"))
    facts.append(("Backups", str(domain.backups), f"and {count(domain.marks, 'mark')}"))
    facts.append(("Oldest backup", (domain.oldest or "none")[:10], ""))
    facts.append(("On disk", output.size(domain.held_bytes), "all its files now"))
    if last:
        state = f"{last.damage} damaged" if last.damage else "all good"
        facts.append(("Last verified", _age(last.age_seconds), f"{state}, up to generation {last.newest}"))
    else:
        facts.append(("Last verified", "never", ""))
    frozen = [g.quiesce.frozen_ms for g in domain.generations if g.quiesce.frozen_ms is not None]
    consistent = sum(g.consistent for g in domain.generations)
    facts.append(
        (
            "Frozen at most",
            f"{max(frozen):.0f} ms" if frozen else "not frozen",
            f"{consistent} of {len(domain.generations)} generations are consistent",
        )
    )
    bad = "Last verified" if last and last.damage else None
    groups = [
        tag("div", tag("dt", k), tag("dd", v, tag("small", s, class_="alarm" if k == bad else None) if s else None))
        for k, v, s in facts
    ]
    return tag("dl", *groups, class_="facts")


def _disks(domain: results.ReportDomain) -> List[etree._Element]:
    rows = [
        [
            disk.target,
            output.size(disk.capacity),
            "unknown" if disk.chain is None else str(disk.chain),
            "unknown" if disk.since is None else f"generation {disk.since}",
        ]
        for disk in domain.disks
    ]
    newest = domain.generations[-1]
    rows += [[one.target, "-", "-", f"left out: {one.reason[:300]}"] for one in newest.unprotected]
    headings = ("disk", "size", "layers", "changes known since")
    caption = "As of the newest generation; a restore of it reads that many layers"
    parts = [tag("h3", "Disks and chains")]
    if rows:
        parts.append(table(caption, headings, rows, numbers=(1, 2), words=(3,), name=f"Disks of {domain.domain}"))
    else:
        parts.append(tag("p", "The newest generation has no disk."))
    return parts


def moment(time: Optional[str]) -> str:
    """To the minute; what is no time as it stands."""
    return "none" if time is None else f"{time[:16].replace('T', ' ')} UTC" if time[10:11] == "T" else time


def _age(seconds: Optional[float]) -> str:
    if seconds is None:
        return "none"
    return f"{duration(seconds)} ago" if seconds >= 0 else "in the future"


def duration(seconds: float) -> str:
    for limit, length, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
