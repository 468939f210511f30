"""One target under atheris, in a process of its own: libFuzzer ends it.

    python -m tests.fuzz.one TARGET (raw | shaped) FOUND LIBFUZZER-ARGUMENT...

Raw inputs are the bytes of the corpus, changed where that reached new code; shaped ones are made by hypothesis of such
bytes.  What was too much for the target is written to FOUND.  https://github.com/google/atheris
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any, List

import atheris

with atheris.instrument_imports(include=["libvirt_cbt"]):
    from tests.fuzz import targets

from hypothesis import HealthCheck, given, settings

from tests.fuzz import shapes


def main(argv: List[str]) -> None:
    name, mode, found, *arguments = argv
    target = targets.TARGETS[name]

    def judged(data: bytes) -> None:
        try:
            target(data)
        except BaseException:
            path = os.path.join(found, f"{name}-{hashlib.sha256(data).hexdigest()[:12]}")
            with open(path, "wb") as file:
                file.write(data)
            raise

    run = judged
    if mode == "shaped":
        quiet = settings(deadline=None, database=None, suppress_health_check=[*HealthCheck])
        made: Any = quiet(given(shapes.shapes()[name])(judged))
        run = made.hypothesis.fuzz_one_input
    atheris.Setup([sys.argv[0], *arguments], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
