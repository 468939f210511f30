"""The row of a command that does nothing."""

from __future__ import annotations

import sys
from typing import List

from tests.bench import measuring
from tests.bench.measuring import Effort, Row, Sample, timed
from tests.bench.world import COMMAND, World, run


def version(world: World, effort: Effort) -> List[Row]:
    """How long it takes until a command line is there at all."""

    def side(*argv: str) -> measuring.Side:
        def taken(into: List[Sample]) -> None:
            with timed(into):
                run(*argv)

        return taken

    sides = {"ours": side(COMMAND, "--version"), "python": side(sys.executable, "-c", "pass")}
    found = measuring.alternate(4 * effort.rounds, sides)
    return [measuring.difference("version", "libvirt-cbt --version", "python3 -c pass", found, 0.15)]
