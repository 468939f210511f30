"""The command `script/soak`."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections import Counter
from typing import Final, List, Sequence

from tests.soak import play
from tests.soak.play import Outcome, Step
from tests.soak.rules import RULES

STEPS: Final = 120  # of an era: then comes a new guest with new repositories, so that a failure is never far from a beginning


class Soak:
    """One run of the command."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.begun = time.monotonic()
        self.rules: Counter[str] = Counter()
        self.facts: Counter[str] = Counter()

    def say(self, line: str) -> None:
        passed = int(time.monotonic() - self.begun)
        print(f"{passed // 60:3}:{passed % 60:02} {line}", flush=True)

    def run(self) -> int:
        """The exit code."""
        asked = self.asked
        if asked.steps:
            name = os.path.basename(asked.steps).removesuffix(".json").removeprefix("soak-")
            return self._era(name, play.load(asked.steps), float("inf")) or self.tell()
        until = self.begun + 60 * asked.minutes
        era = asked.era
        while time.monotonic() < until:
            self.say(f"era {era} of seed {asked.seed}")
            if self._era(f"{asked.seed}-{era}", play.drawn(f"{asked.seed} {era}", STEPS, asked.rule), until):
                return 1
            era += 1
        return self.tell()

    def _era(self, name: str, steps: List[Step], until: float) -> int:
        outcome = play.play(steps, self.say, until)
        self.rules.update(outcome.counts)
        self.facts.update(outcome.facts)
        if outcome.failed is None:
            return 0
        print(outcome.trace, flush=True)
        self._lost(name, steps[: outcome.failed + 1], outcome)
        return 1

    def _lost(self, name: str, steps: Sequence[Step], outcome: Outcome) -> None:
        path = os.path.join(self.asked.folder, f"soak-{name}.json")
        play.save(path, steps, seed=self.asked.seed, complaint=outcome.complaint)
        print(f"LOSS: {outcome.complaint}\nseed {self.asked.seed}; again: script/soak --steps {path}", flush=True)
        if not self.asked.shrink:
            return
        shrinker = play.Shrinker(outcome.kind, self.say, time.monotonic() + 60 * self.asked.shrink)
        found = shrinker.shortest(steps)
        path = path.replace(".json", "-short.json")
        play.save(path, found, seed=self.asked.seed, complaint=outcome.complaint)
        print(f"LOSS: {outcome.complaint}\nseed {self.asked.seed}; the shortest sequence found has {len(found)} steps:")
        for step in found:
            print(f"  {step}")
        print(f"again: script/soak --steps {path}", flush=True)

    def tell(self) -> int:
        """What was done and judged, when all is well."""
        self.say("rules: " + ", ".join(f"{name} {self.rules[name]}" for name in sorted(RULES)))
        self.say("judged: " + ", ".join(f"{name} {count}" for name, count in sorted(self.facts.items())))
        self.say(f"steps {sum(self.rules.values())}, losses 0")
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="script/soak", description="Does whatever may happen; nothing may be lost.")
    parser.add_argument("--minutes", type=float, default=2.0, metavar="N", help="how long, and then a last check [2]")
    parser.add_argument("--seed", type=int, metavar="S", help="of all choices; printed")
    parser.add_argument("--era", type=int, default=1, metavar="E", help="begin with this era of the seed [1]")
    parser.add_argument("--steps", metavar="FILE", help="play the steps of a file that an earlier run wrote")
    parser.add_argument("--rule", action="append", default=[], choices=sorted(RULES), help="draw from these rules only")
    parser.add_argument(
        "--shrink", type=float, nargs="?", const=30.0, default=10.0, metavar="MINUTES",
        help="after a loss look so long for a shorter sequence; 0: not at all [10; without a number 30]",
    )  # fmt: skip
    parser.add_argument("--folder", default=".cache/soak", help="where files of steps go [.cache/soak]")
    asked = parser.parse_args()
    if asked.seed is None:
        asked.seed = random.SystemRandom().getrandbits(32)
    os.makedirs(asked.folder, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started
    print(f"seed {asked.seed}", flush=True)
    return Soak(asked).run()


if __name__ == "__main__":
    sys.exit(main())
