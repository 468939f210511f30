"""`script/demo` is the first thing that anybody runs: from this checkout, with hardly an environment."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Dict, Final, Tuple

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
SECONDS: Final = 300  # it takes 12 alone


@pytest.mark.skipif(not Path(ROOT, ".venv", "bootstrap-stamp").exists(), reason="script/bootstrap has not made .venv")
@pytest.mark.skipif(not shutil.which("libvirtd"), reason="needs libvirt's driver for QEMU")
def test_the_demo_restores_what_it_backed_up_and_leaves_nothing(tmp_path: Path) -> None:
    # Its guest, driver and folders are its own.  What is missing is a failure here, not fetched.
    bare = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(tmp_path), "PIP_NO_INDEX": "1"}
    code, said = _run(str(ROOT / "script" / "demo"), bare)
    assert code == 0, said
    rows = [line.split() for line in said.splitlines() if line.endswith("byte for byte")]
    assert [(row[0], row[2], row[3]) for row in rows] == [
        (str(number), disk, "full" if number == 1 else "incremental") for number in (1, 2, 3) for disk in ("vda", "vdb")
    ], said
    assert re.search(r"^6 disks restored, 0 wrong, in [\d.]+ s$", said, re.MULTILINE), said
    [folder] = set(re.findall(r"\S*/cbt-demo-\w+", said.replace("root=", "root= ")))
    assert not os.path.lexists(folder)


def _run(script: str, environment: Dict[str, str]) -> Tuple[int, str]:
    """Its exit code and all it printed; one that hangs is asked to end, so that its guest goes with it."""
    with subprocess.Popen(
        [script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            said, _ = process.communicate(timeout=60)
            pytest.fail(f"the demo did not end in {SECONDS} s: {said}")
    return process.returncode, said
