"""How a figure comes about: sides that take turns, medians, and what a process tree needed."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Final, Iterator, List, Mapping, Optional, Sequence

MB: Final = 1_000_000
SAMPLE_SECONDS: Final = 0.01


@dataclass(frozen=True)
class Effort:
    """How often each side runs, and whether the data is small: a look, no figure to keep."""

    rounds: int = 5
    quick: bool = False


@dataclass(frozen=True)
class Sample:
    """Wall clock and CPU seconds, the latter of this process and of the children it waited for."""

    seconds: float
    cpu: float


@dataclass(frozen=True)
class Row:
    """One line of the table; `low` and `high` are the spread, of the rounds one by one.

    `unit` is "x" (a ratio), "s" or "MB".  `target` None: there is none, the figure is for information.
    """

    name: str
    what: str
    against: str
    unit: str
    value: float
    low: float
    high: float
    target: Optional[float]
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    load: float = 0.0  # of the machine, one minute's average at the end

    @property
    def met(self) -> Optional[bool]:
        return None if self.target is None else self.value <= self.target


@contextmanager
def timed(into: List[Sample]) -> Iterator[None]:
    """Appends what the block took."""
    begun, busy = time.perf_counter(), _cpu()
    yield
    into.append(Sample(time.perf_counter() - begun, _cpu() - busy))


def _cpu() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


Side = Callable[[List[Sample]], None]  # prepares, and times with `timed` what counts


def alternate(rounds: int, sides: Mapping[str, Side]) -> Dict[str, List[Sample]]:
    """Every side `rounds` times, by turns, and the order turned round each time: a load that comes and goes hits all."""
    found: Dict[str, List[Sample]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            sides[name](found[name])
    return found


def ratio(
    name: str,
    what: str,
    against: str,
    found: Mapping[str, Sequence[Sample]],
    target: Optional[float],
    *,
    less: Optional[Mapping[str, Sequence[Sample]]] = None,
    **facts: Any,
) -> Row:
    """The medians of the first side by those of the second; `less` is taken off, round by round."""
    (one, ours), (other, theirs) = _seconds(found, less).items()
    each = [a / b for a, b in zip(ours, theirs)]
    cpu = {f"{side}_cpu_seconds": round(statistics.median(s.cpu for s in found[side]), 3) for side in (one, other)}
    value = statistics.median(ours) / statistics.median(theirs)
    return _row(name, what, against, "x", value, each, target, {one: ours, other: theirs}, {**cpu, **facts})


def difference(
    name: str, what: str, against: str, found: Mapping[str, Sequence[Sample]], target: Optional[float], **facts: Any
) -> Row:
    """By how many seconds the first side's median is above the second's."""
    (one, ours), (other, theirs) = _seconds(found, None).items()
    each = [a - b for a, b in zip(ours, theirs)]
    value = statistics.median(ours) - statistics.median(theirs)
    cpu = {f"{side}_cpu_seconds": round(statistics.median(s.cpu for s in found[side]), 3) for side in (one, other)}
    return _row(name, what, against, "s", value, each, target, {one: ours, other: theirs}, {**cpu, **facts})


def plain(name: str, what: str, unit: str, values: Sequence[float], target: Optional[float], **facts: Any) -> Row:
    """A figure by itself: the median of `values`, or their highest where it is a peak ("MB")."""
    value = max(values) if unit == "MB" else statistics.median(values)
    return _row(name, what, "", unit, value, values, target, {"values": values}, facts)


def _row(
    name: str,
    what: str,
    against: str,
    unit: str,
    value: float,
    each: Sequence[float],
    target: Optional[float],
    samples: Mapping[str, Sequence[float]],
    facts: Mapping[str, Any],
) -> Row:
    kept = {side: [round(x, 4) for x in values] for side, values in samples.items()}
    load = round(os.getloadavg()[0], 1)
    return Row(name, what, against, unit, value, min(each), max(each), target, kept, facts, load)


def _seconds(
    found: Mapping[str, Sequence[Sample]], less: Optional[Mapping[str, Sequence[Sample]]]
) -> Dict[str, List[float]]:
    off = less or {}
    return {
        side: [s.seconds - (off[side][n].seconds if side in off else 0.0) for n, s in enumerate(samples)]
        for side, samples in found.items()
    }


def peaks(argv: Sequence[str], env: Mapping[str, str]) -> Dict[str, int]:
    """Runs a command; the peak of resident memory in bytes of it ("python" and so on) and of all below it, by name.

    VmHWM only grows, so a look now and then suffices; what a process took in its last hundredth of a second is missed.
    """
    found: Dict[str, int] = {}
    process = subprocess.Popen([*argv], env={**env}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        for pid in (process.pid, *_below(process.pid)):
            name, peak = _peak(pid)
            if peak:
                found[name] = max(found.get(name, 0), peak)
        time.sleep(SAMPLE_SECONDS)
    assert process.stderr
    complaint = process.stderr.read().decode(errors="replace")
    process.stderr.close()
    if process.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {complaint}")
    return found


def _below(pid: int) -> List[int]:
    found: List[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as listed:
                for child in map(int, listed.read().split()):
                    found += [child, *_below(child)]
    except OSError:
        pass  # it has ended
    return found


def _peak(pid: int) -> tuple[str, int]:
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as status:
            lines = dict(line.split(":", 1) for line in status)
    except OSError:
        return "", 0
    return lines["Name"].strip(), int(lines["VmHWM"].split()[0]) << 10 if "VmHWM" in lines else 0
