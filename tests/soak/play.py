"""Plays steps in a world of their own, tells of each, and finds the shortest sequence that still fails."""

from __future__ import annotations

import faulthandler
import json
import random
import re
import subprocess
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Callable, Final, List, Optional, Sequence

import libvirt

from libvirt_cbt import errors
from tests.guests import plain
from tests.soak import damage_rules, guest_rules, hurt_rules, tool_rules  # noqa: F401 -- they fill the table
from tests.soak.model import Complaint
from tests.soak.rules import RULES
from tests.soak.world import World

HUNG: Final = 600  # seconds; a step that takes longer ends the program with a traceback
FOUND: Final = (
    Complaint, AssertionError, errors.CbtError, libvirt.libvirtError, subprocess.SubprocessError, OSError, plain.WriteFailed,
    LookupError, ValueError,
)  # fmt: skip
Say = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """A rule and the number that all its choices come from."""

    rule: str
    number: int

    def __str__(self) -> str:
        return f"{self.rule}:{self.number}"


LAST: Final = Step("check", 0)


def drawn(seed: object, count: int, names: Sequence[str] = ()) -> List[Step]:
    """The steps of an era; the last one checks everything."""
    rng = random.Random(f"soak {seed}")
    chosen = [RULES[name] for name in sorted(names or RULES)]
    rules = rng.choices(chosen, [rule.weight for rule in chosen], k=count)
    return [*(Step(rule.name, rng.getrandbits(32)) for rule in rules), LAST]


def load(path: str) -> List[Step]:
    with open(path, encoding="utf-8") as file:
        return [Step(str(row["rule"]), int(row["number"])) for row in json.load(file)["steps"]]


def save(path: str, steps: Sequence[Step], **facts: object) -> None:
    """JSON, one step on a line."""
    with open(path, "w", encoding="utf-8") as file:
        rows = ",\n".join(f'  {{"rule": "{one.rule}", "number": {one.number}}}' for one in steps)
        head = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in facts.items())
        file.write(f'{{\n{head}"steps": [\n{rows}\n]\n}}\n')


@dataclass
class Outcome:
    """How an era went; `failed` is the index of the step that did."""

    counts: Counter[str] = field(default_factory=Counter)
    facts: Counter[str] = field(default_factory=Counter)
    failed: Optional[int] = None
    complaint: str = ""
    trace: str = ""

    @property
    def kind(self) -> str:
        """What failed, without what differs from run to run."""
        return re.sub(r"[0-9a-f]{16,}|[0-9]+|/\S+", "#", self.complaint.splitlines()[0].split(": ")[0])[:120]


def play(steps: Sequence[Step], say: Say, until: float = float("inf")) -> Outcome:
    """Plays steps up to the first that fails, or until a time.monotonic(), and then checks everything."""
    outcome = Outcome()
    with World() as world:
        for index, step in enumerate(steps):
            over = time.monotonic() > until
            faulthandler.dump_traceback_later(HUNG, exit=True)
            if not _played(world, LAST if over else step, index, outcome, say) or over:
                break
        faulthandler.cancel_dump_traceback_later()
        outcome.facts.update(world.counts)
    return outcome


def _played(world: World, step: Step, index: int, outcome: Outcome, say: Say) -> bool:
    begun = time.monotonic()
    try:
        said = RULES[step.rule].play(world, random.Random(step.number))
    except FOUND as e:
        outcome.failed, outcome.complaint = index, f"{'' if isinstance(e, Complaint) else type(e).__name__ + ': '}{e}"
        outcome.trace = traceback.format_exc()
        say(f"{index:4} {step.rule:16} FAILED: {outcome.complaint}")
        return False
    if said is not None:
        outcome.counts[step.rule] += 1
        say(f"{index:4} {time.monotonic() - begun:6.2f} s  {step.rule:16} {said}")
    return True


class Shrinker:
    """Takes steps away for as long as the rest still fails in the same way."""

    def __init__(self, kind: str, say: Say, until: float) -> None:
        self.kind, self.say, self.until = kind, say, until

    def fails(self, steps: Sequence[Step]) -> Optional[List[Step]]:
        """The steps up to the one that failed, if it did so in the same way."""
        outcome = play(steps, lambda _: None)
        if outcome.failed is None or outcome.kind != self.kind:
            self.say(f"shrinking: {len(steps)} steps do not fail like that; {outcome.complaint[:100] or 'all is right'}")
            return None
        self.say(f"shrinking: {outcome.failed + 1} steps fail")
        return list(steps[: outcome.failed + 1])

    def shortest(self, steps: Sequence[Step]) -> List[Step]:
        """Delta debugging: halves, quarters, ... single steps are left out, from the end on; never the last one."""
        found = list(steps)
        size = len(found) // 2
        while size and time.monotonic() < self.until:
            at, smaller = len(found) - 1, False
            while at > 0 and time.monotonic() < self.until:
                low = max(0, at - size)
                left = self.fails(found[:low] + found[at:])
                if left is not None:
                    found, smaller = left, True
                at = min(low, len(found) - 1)
            if size > 1 or not smaller:
                size //= 2
        return found
