"""The table of rules: what may happen, how often, and how.

A rule is a function of the world and of random choices of its own.  It gives a line for the log, or None where it makes
no sense just then: so any part of a sequence is a sequence.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Callable, Dict, Optional

from tests.soak.world import World

Play = Callable[[World, random.Random], Optional[str]]


@dataclass(frozen=True)
class Rule:
    """`weight`: how often it is drawn, beside the others."""

    name: str
    weight: int
    play: Play


RULES: Dict[str, Rule] = {}


def rule(weight: int) -> Callable[[Play], Play]:
    """Enters a function into the table, under its name."""

    def entered(play: Play) -> Play:
        RULES[play.__name__] = Rule(play.__name__, weight, play)
        return play

    return entered
