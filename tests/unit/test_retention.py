"""Retention is pure: whatever the backups and the rules, it keeps what a rule keeps, and no wrong clock fools it."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any, Dict, List, Optional, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libvirt_cbt import errors
from libvirt_cbt.repository import retention
from libvirt_cbt.repository.retention import Candidate, Duration, Rules

NOW = datetime(2026, 3, 31, 12, 30, tzinfo=timezone.utc)
NAMES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


def candidates(times: Sequence[datetime], stays: Sequence[int] = ()) -> List[Candidate]:
    return [Candidate(f"{n:016x}", n, time, "protected" if n in stays else "") for n, time in enumerate(times, 1)]


def numbers(found: Sequence[Candidate]) -> List[int]:
    return [c.generation for c in found]


def kept(times: Sequence[datetime], now: datetime = NOW, **rules: Any) -> List[int]:
    return numbers(retention.decide(candidates(times), Rules(**rules), now).kept)


minutes = st.lists(st.integers(0, 3 * 365 * 24 * 60), min_size=1, max_size=60).map(sorted)
ascending = minutes.map(lambda ages: [NOW - timedelta(minutes=age) for age in reversed(ages)])
durations = st.builds(Duration, st.integers(0, 2), st.integers(0, 14), st.integers(0, 40), st.integers(0, 50))
some_rules = st.fixed_dictionaries(
    {}, optional={**{name: st.integers(1, 12) for name in NAMES}, "within": durations}
).filter(bool)


def plainly(times: Sequence[datetime], rules: Dict[str, Any]) -> List[int]:
    """The rules said again, the slow way: for each period the newest of it, for the newest N periods."""
    labels = {
        "hourly": "%Y%m%d%H", "daily": "%Y%m%d", "weekly": "%G%V", "monthly": "%Y%m", "yearly": "%Y",
    }  # fmt: skip
    found = {len(times)} | {len(times) - n for n in range(rules.get("last", 0)) if n < len(times)}
    for name, label in labels.items():
        newest = {time.strftime(label): number for number, time in enumerate(times, 1)}
        found |= set(sorted(newest.values())[::-1][: rules.get(name, 0)])
    if "within" in rules:
        oldest = rules["within"].before(times[-1])
        found |= {number for number, time in enumerate(times, 1) if time >= oldest}
    return sorted(found)


@settings(deadline=None)
@given(ascending, some_rules)
def test_what_stays_is_what_the_rules_say(times: List[datetime], rules: Dict[str, Any]) -> None:
    assert kept(times, **rules) == plainly(times, rules)


@settings(deadline=None)
@given(ascending, some_rules)
def test_twice_is_once(times: List[datetime], rules: Dict[str, Any]) -> None:
    first = retention.decide(candidates(times), Rules(**rules), NOW)
    again = retention.decide(first.kept, Rules(**rules), NOW)
    assert (again.kept, again.removed) == (first.kept, ())


@settings(deadline=None)
@given(ascending, some_rules, some_rules)
def test_more_rules_keep_more(times: List[datetime], rules: Dict[str, Any], more: Dict[str, Any]) -> None:
    larger = {**rules, **{name: value for name, value in more.items() if name not in rules}}
    larger.update({name: larger[name] + more.get(name, 0) for name in NAMES if name in rules})
    assert set(kept(times, **rules)) <= set(kept(times, **larger))


@settings(deadline=None)
@given(ascending, some_rules, st.sets(st.integers(1, 60)), st.sets(st.integers(1, 60)))
def test_everything_is_kept_or_removed_and_what_stays_stays(
    times: List[datetime], rules: Dict[str, Any], stays: set[int], asked: set[int]
) -> None:
    every = candidates(times, sorted(stays))
    free = [c.id for c in every[:-1] if c.generation in asked and not c.stays]
    found = retention.decide(every, Rules(**rules), NOW, free)
    assert sorted(numbers(found.kept) + numbers(found.removed)) == numbers(every)
    assert {c.id for c in every if c.stays} | {every[-1].id} <= {c.id for c in found.kept}
    assert set(free) <= {c.id for c in found.removed}
    assert all(found.reasons[c.id] for c in found.kept) and set(found.reasons) == {c.id for c in found.kept}
    # The order that they come in says nothing.
    assert retention.decide(every[::-1], Rules(**rules), NOW, free) == found


@settings(deadline=None)
@given(st.lists(st.datetimes(timezones=st.just(timezone.utc)), min_size=1, max_size=40), some_rules, st.datetimes(timezones=st.just(timezone.utc)))
def test_any_times_at_all(times: List[datetime], rules: Dict[str, Any], now: datetime) -> None:
    assert kept(times, now, **rules)[-1] == len(times)
    trusted = retention.trusted(times, now)
    assert trusted == sorted(trusted) and len(trusted) == len(times)


def test_without_rules_only_what_is_named_goes() -> None:
    every = candidates([NOW - timedelta(days=n) for n in range(4, 0, -1)])
    found = retention.decide(every, Rules(), NOW, [every[1].id])
    assert numbers(found.removed) == [2]
    assert retention.decide([], Rules(last=1), NOW) == retention.Decision((), ())


@pytest.mark.parametrize("number", [1, 3])
def test_what_always_stays_cannot_be_removed(number: int) -> None:
    every = candidates([NOW - timedelta(days=n) for n in range(3, 0, -1)], [1])
    with pytest.raises(errors.Usage, match="protected" if number == 1 else "newest"):
        retention.decide(every, Rules(), NOW, [every[number - 1].id])


# Row 45: clocks

DAYS = [NOW - timedelta(days=n, minutes=5) for n in range(20, -1, -1)]
FUTURE, PAST = NOW + timedelta(days=36525), datetime(1970, 1, 1, tzinfo=timezone.utc)


@pytest.mark.fault(45)
@pytest.mark.parametrize("stamp", [FUTURE, PAST])
@pytest.mark.parametrize("at", [0, 1, 10, 19, 20])
@pytest.mark.parametrize("rules", [{"within": Duration(days=7)}, {"daily": 7}, {"hourly": 5, "weekly": 3}])
def test_one_wrong_stamp_takes_no_other_backup_away(stamp: datetime, at: int, rules: Dict[str, Any]) -> None:
    wrong = [*DAYS[:at], stamp, *DAYS[at + 1 :]]
    right, fooled = kept(DAYS, **rules), kept(wrong, **rules)
    assert set(right) - {at + 1} <= set(fooled)
    assert len(fooled) <= len(right) + 1


@pytest.mark.fault(45)
@pytest.mark.parametrize("now", [FUTURE, PAST])
def test_a_wrong_clock_at_the_prune(now: datetime) -> None:
    for rules in ({"within": Duration(days=7)}, {"daily": 7}):
        assert set(kept(DAYS, **rules)) <= set(kept(DAYS, now, **rules))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1y5m7d2h", Duration(1, 5, 7, 2)),
        ("14d", Duration(days=14)),
        ("2h", Duration(hours=2)),
        ("1m", Duration(months=1)),
        ("", None),
        ("d", None),
        ("7", None),
        ("7d1y", None),
        ("-7d", None),
        ("7 d", None),
        ("٣d", None),
    ],
)
def test_durations(text: str, wanted: Optional[Duration]) -> None:
    if wanted is None:
        with pytest.raises(errors.Usage):
            retention.duration(text)
    else:
        assert retention.duration(text) == wanted


def test_a_duration_goes_by_the_calendar() -> None:
    assert Duration(months=1).before(NOW) == NOW.replace(month=2, day=28)
    assert Duration(years=2, months=1).before(NOW) == datetime(2024, 2, 29, 12, 30, tzinfo=timezone.utc)
    assert Duration(days=1, hours=13).before(NOW) == NOW.replace(day=29, hour=23)
    assert Duration(years=999999).before(NOW).year == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_keeps_at_least_one(name: str) -> None:
    with pytest.raises(errors.Usage, match=name):
        retention.decide([], Rules(**{name: 0}), NOW)  # type: ignore[arg-type]
