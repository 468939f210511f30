"""Every target for some minutes; see `script/fuzz`."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final, Set, Tuple

from tests.fuzz import shapes, targets

MOST_FILES: Final = 24  # of one target, beside those with a name
MOST_BYTES: Final = 4096
HASHED: Final = re.compile(r"[0-9a-f]{12}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="script/fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="for each target")
    parser.add_argument("--keep", action="store_true", help="adds to the corpus what reached new code")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(targets.TARGETS))
    asked = parser.parse_args()
    unknown = sorted({*asked.targets} - {*targets.TARGETS})
    if unknown:
        parser.error(f"no such target: {', '.join(unknown)}")
    found = Path(".fuzz")
    found.mkdir(exist_ok=True)
    bad = 0
    for name in asked.targets or targets.TARGETS:
        with tempfile.TemporaryDirectory(prefix="cbt-fuzz-", dir=targets.memory()) as work:
            raw, shaped = Path(work, "raw"), Path(work, "shaped")
            shutil.copytree(shapes.CORPUS / name, raw)
            shaped.mkdir()
            for mode, place in (("raw", raw), ("shaped", shaped)):
                code, runs, covered = fuzzed(name, mode, found, place, asked.minutes * 30)
                print(f"{name} {mode}: {runs} inputs, {covered} edges, {'nothing found' if not code else 'FOUND'}", flush=True)
                bad += bool(code)
            if asked.keep:
                print(f"{name}: {kept(name, raw)} inputs added to the corpus", flush=True)
    return 1 if bad else 0


def fuzzed(name: str, mode: str, found: Path, place: Path, seconds: float) -> Tuple[int, str, str]:
    """Exit code, how many inputs there were, and edges that were reached."""
    longest = "8192" if mode == "raw" else "2048"
    options = [f"-max_total_time={seconds:.0f}", f"-max_len={longest}", "-timeout=20", "-rss_limit_mb=1500", "-print_final_stats=1"]
    argv = [sys.executable, "-m", "tests.fuzz.one", name, mode, str(found), *options]
    argv += [f"-artifact_prefix={found}/{name}-{mode}-", str(place)]
    # Its own files go with ours: libFuzzer ends it without a word to Python.
    environment = {**os.environ, "TMPDIR": str(place.parent)}
    done = subprocess.run(
        argv, check=False, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, env=environment
    )
    (found / f"{name}-{mode}.log").write_text(done.stderr + done.stdout)
    counted = re.findall(r"^#(\d+)\s", done.stderr, re.MULTILINE)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    return done.returncode, counted[-1] if counted else "0", covered[-1] if covered else "0"


def kept(name: str, raw: Path) -> int:
    """Adds the smallest inputs that reach lines which those with a name do not; how many."""
    corpus = shapes.CORPUS / name
    for old in corpus.iterdir():
        if HASHED.fullmatch(old.name):
            old.unlink()
    reached = set().union(*(lines(name, path.read_bytes()) for path in corpus.iterdir()))
    found = {path.read_bytes() for path in raw.iterdir()}
    added = 0
    for data in sorted((one for one in found if len(one) <= MOST_BYTES), key=lambda one: (len(one), one)):
        new = lines(name, data) - reached
        if new and added < MOST_FILES:
            reached |= new
            added += 1
            (corpus / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
    return added


def lines(name: str, data: bytes) -> Set[Tuple[str, int, int]]:
    """The steps from line to line that an input takes in our own code."""
    found: Set[Tuple[str, int, int]] = set()

    def outer(frame: Any, _event: str, _argument: Any) -> Any:
        if "/libvirt_cbt/" not in frame.f_code.co_filename:
            return None
        at = frame.f_lineno

        def inner(frame: Any, event: str, _argument: Any) -> Any:
            nonlocal at
            if event == "line":
                found.add((frame.f_code.co_filename, at, frame.f_lineno))
                at = frame.f_lineno
            return inner

        return inner

    sys.settrace(outer)
    try:
        targets.TARGETS[name](data)
    finally:
        sys.settrace(None)
    return found


if __name__ == "__main__":
    sys.exit(main())
