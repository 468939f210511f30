"""That `script/bench` runs, prints its table and writes its document; what it measures is not judged."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import List

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [["version"], ["nothing"], ["verify"], ["query"], ["thousand", "lasting"]])
def test_a_quick_look(rows: List[str], tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    argv = [str(ROOT / "script" / "bench"), *rows, "--quick", "--rounds", "1", "--json", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    assert document["version"] == 1
    for row in document["rows"]:
        assert row["name"] in done.stdout
        assert row["low"] <= row["value"] <= row["high"]
        assert row["samples"]


@pytest.mark.slow
def test_a_row_that_is_not_there_is_refused() -> None:
    done = subprocess.run([str(ROOT / "script" / "bench"), "nosuch"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "nosuch" in done.stderr
