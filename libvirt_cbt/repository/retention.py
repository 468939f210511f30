"""Which backups stay: pure policy, no files.

The rules are those of restic and Proxmox, by name and meaning: `last` keeps the newest N; `hourly` to `yearly` keep the
newest backup of each of the newest N hours (days, ISO weeks, months, years; all UTC) that have one; `within` keeps all
that are not older than a duration before the newest.  A backup stays when any rule keeps it.
https://restic.readthedocs.io/en/stable/060_forget.html

What is newer is decided by the generation's number, never by a clock.  A clock that jumped once must not take backups
away, so a time is believed only when it agrees with its neighbours: see `trusted`.
"""

from __future__ import annotations

import calendar
import re
from bisect import bisect_right
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Callable, Dict, Final, List, Optional, Sequence, Tuple

from libvirt_cbt import errors


@dataclass(frozen=True)
class Duration:
    """As restic writes it: 1y5m7d2h."""

    years: int = 0
    months: int = 0
    days: int = 0
    hours: int = 0

    def before(self, moment: datetime) -> datetime:
        """By the calendar: a month before the 31st is the last day of the month before."""
        months = moment.year * 12 + moment.month - 1 - (self.years * 12 + self.months)
        try:
            year, month = divmod(months, 12)
            day = min(moment.day, calendar.monthrange(year, month + 1)[1])
            return moment.replace(year=year, month=month + 1, day=day) - timedelta(days=self.days, hours=self.hours)
        except (OverflowError, ValueError, calendar.IllegalMonthError):
            return datetime.min.replace(tzinfo=moment.tzinfo)


def duration(text: str) -> Duration:
    """Errors: Usage."""
    found = re.fullmatch(r"(?:(\d{1,6})y)?(?:(\d{1,6})m)?(?:(\d{1,6})d)?(?:(\d{1,6})h)?", text, re.ASCII)
    if not found or not text:
        raise errors.Usage(reason=f"'{text}' is no duration such as 1y5m7d2h (years, months, days, hours)")
    return Duration(*(int(x or 0) for x in found.groups()))


@dataclass(frozen=True)
class Rules:
    """How many to keep of each, from 1; None: no such rule."""

    last: Optional[int] = None
    hourly: Optional[int] = None
    daily: Optional[int] = None
    weekly: Optional[int] = None
    monthly: Optional[int] = None
    yearly: Optional[int] = None
    within: Optional[Duration] = None

    def __post_init__(self) -> None:
        for name in ("last", *PERIODS):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise errors.Usage(reason=f"--keep-{name} is at least 1, not {number}")

    @property
    def any(self) -> bool:
        return self != Rules()


@dataclass(frozen=True)
class Candidate:
    """One backup; `stays` says why it stays whatever the rules are, or is empty."""

    id: str
    generation: int
    time: datetime
    stays: str = ""


@dataclass(frozen=True)
class Decision:
    """Both ascending by generation; `reasons` by id for what is kept."""

    kept: Tuple[Candidate, ...]
    removed: Tuple[Candidate, ...]
    reasons: Dict[str, Tuple[str, ...]] = field(default_factory=dict)


PERIODS: Final[Dict[str, Callable[[datetime], Tuple[int, ...]]]] = {
    "hourly": lambda t: (t.year, t.month, t.day, t.hour),
    "daily": lambda t: (t.year, t.month, t.day),
    "weekly": lambda t: tuple(t.isocalendar())[:2],
    "monthly": lambda t: (t.year, t.month),
    "yearly": lambda t: (t.year,),
}


def decide(candidates: Sequence[Candidate], rules: Rules, now: datetime, remove: Sequence[str] = ()) -> Decision:
    """What stays of the backups that there are.  The newest always stays, and what `stays` for a reason of its own.

    Without a rule all stay but those in `remove` (ids).  Errors: Usage for an id in `remove` that always stays.
    """
    ordered = sorted(candidates, key=lambda c: c.generation)
    reasons: Dict[str, List[str]] = {c.id: [c.stays] if c.stays else [] for c in ordered}
    if ordered:
        reasons[ordered[-1].id].insert(0, "the newest")
    for candidate in ordered:
        if candidate.id in remove and reasons[candidate.id]:
            why = " and ".join(reasons[candidate.id])
            raise errors.Usage(reason=f"backup {candidate.id} is {why}: it is never removed")
    for one, why in _kept(ordered, rules, now) if rules.any else [(c, "no rule") for c in ordered]:
        reasons[one.id].append(why)
    kept = [c for c in ordered if reasons[c.id] and c.id not in remove]
    return Decision(
        kept=tuple(kept),
        removed=tuple(c for c in ordered if c not in kept),
        reasons={c.id: tuple(reasons[c.id]) for c in kept},
    )


def _kept(ordered: Sequence[Candidate], rules: Rules, now: datetime) -> List[Tuple[Candidate, str]]:
    times = trusted([c.time for c in ordered], now)
    newest_first = list(zip(reversed(ordered), reversed(times)))
    found = [(c, "last") for c, _ in newest_first[: rules.last or 0]]
    for name, period in PERIODS.items():
        left, before = getattr(rules, name) or 0, None
        for candidate, time in newest_first:
            if left and period(time) != before:
                left, before = left - 1, period(time)
                found.append((candidate, name))
    if rules.within and newest_first:
        newest = next((time for candidate, time in newest_first if candidate.time == time), now)  # that is believed
        oldest = rules.within.before(min(newest, now))
        found += [(c, "within") for c, time in newest_first if time >= oldest]
    return found


def trusted(times: Sequence[datetime], now: datetime) -> List[datetime]:
    """Times that do not fall, for backups in the order in which they were made.

    Believed are as many as possible that rise (the longest such subsequence), of those that are not in the future; when
    most are in the future it is this clock that is wrong, and it is not asked.  Any other backup was made before its
    next newer neighbour, and counts as made then: one wrong stamp, far ahead or far back, takes no other backup's place.
    """
    past = [number for number, time in enumerate(times) if time <= now]
    if 2 * len(past) <= len(times):
        past, now = list(range(len(times))), max(times, default=now)
    believed = set(_rising([(times[number], number) for number in past]))
    out: List[datetime] = []
    newer = now
    for number in range(len(times) - 1, -1, -1):
        newer = times[number] if number in believed else newer
        out.append(newer)
    return out[::-1]


def _rising(times: Sequence[Tuple[datetime, int]]) -> List[int]:
    """The numbers of a longest subsequence that does not fall (patience sorting)."""
    tops: List[datetime] = []
    piles: List[int] = []
    below: Dict[int, Optional[int]] = {}
    for time, number in times:
        place = bisect_right(tops, time)
        below[number] = piles[place - 1] if place else None
        tops[place : place + 1] = [time]
        piles[place : place + 1] = [number]
    found: List[int] = []
    at = piles[-1] if piles else None
    while at is not None:
        found.append(at)
        at = below[at]
    return found[::-1]
