"""What a command that does nothing may import: counted by name, as times depend on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Dict, FrozenSet, List, Tuple

import pytest

DEAR = frozenset({"numpy", "libvirt", "nbd", "pydantic", "lxml", "rich", "blake3"})
PROGRAM = """
import sys
from libvirt_cbt import cli
code = cli.exit_code(sys.argv[1:])
print("\\n" + " ".join(sys.modules), file=sys.stderr)
raise SystemExit(code)
"""


def imported(arguments: List[str], **environment: str) -> Tuple[int, str, FrozenSet[str]]:
    """Exit code, what was printed, and the top names of all modules that were imported."""
    argv = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    return done.returncode, done.stdout, frozenset(n.partition(".")[0] for n in done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["backup", "--help"], ["restore", "-h"], ["verify", "-h"]])
def test_what_only_tells_imports_nothing_dear(arguments: List[str]) -> None:
    code, _, found = imported(arguments)
    assert code == 0
    assert not found & DEAR


@pytest.mark.parametrize(("words", "answer"), [("libvirt-cbt ba", "backup"), ("libvirt-cbt backup --quie", "--quiesce")])
def test_completion_imports_nothing_dear(words: str, answer: str) -> None:
    told = {"_LIBVIRT_CBT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    _, text, found = imported([], **told)
    assert answer in text
    assert not found & DEAR


def test_the_test_sees_what_is_imported() -> None:
    argv = ["-r", "/nonexistent", "list"]
    _, _, found = imported(argv)
    assert {"numpy", "pydantic"} <= found
    assert "rich" not in found


def test_numpy_starts_no_threads_and_pydantic_looks_for_no_plugins() -> None:
    code = "from libvirt_cbt import cli; cli.exit_code(['-r', '/nonexistent', 'list']); import threading, os; "
    code += "print(len(os.listdir('/proc/self/task')), os.environ['PYDANTIC_DISABLE_PLUGINS'])"
    clean: Dict[str, str] = {k: v for k, v in os.environ.items() if not k.startswith(("OPENBLAS", "PYDANTIC"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean)
    assert done.stdout.split()[-2:] == ["1", "__all__"]


def test_of_the_results_only_those_are_made_that_are_used() -> None:
    code = "import sys; from libvirt_cbt.actions import results; results.Backup; "
    code += "print(sorted(n.rpartition('.')[2] for n in sys.modules if n.startswith('libvirt_cbt.actions.results.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['generations']"


def test_every_result_is_where_it_is_looked_for() -> None:
    from libvirt_cbt.actions import results

    assert {type(getattr(results, name)) for name in results.__all__} == {type}
    assert not hasattr(results, "generation")
