"""docs/security.md promises nothing that no test shows; and what holds of the sources themselves."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Dict, Final, FrozenSet, Iterator, List, Tuple

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "docs" / "security.md"
TEST: Final = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@cache
def defined(path: str) -> FrozenSet[str]:
    """The tests of a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def guarantees(text: str) -> Dict[int, str]:
    """What is said under each number of the part `What holds`."""
    part = text.split("\n## What holds\n", 1)[1].split("\n## ", 1)[0]
    found = re.split(r"^([0-9]+)\. ", part, flags=re.MULTILINE)[1:]
    return {int(number): body.split("\n**", 1)[0] for number, body in zip(found[::2], found[1::2])}


def without_test(text: str) -> List[int]:
    return [number for number, body in guarantees(text).items() if not TEST.search(body)]


def test_every_guarantee_names_its_tests() -> None:
    text = PAGE.read_text(encoding="utf-8")
    numbers = [*guarantees(text)]
    assert numbers == [*range(1, len(numbers) + 1)] and len(numbers) >= 30
    assert without_test(text) == []


def test_every_test_that_is_named_is_there() -> None:
    named: List[Tuple[str, str]] = TEST.findall(PAGE.read_text(encoding="utf-8"))
    assert [f"{path}::{test}" for path, test in named if test not in defined(path)] == []


def test_a_guarantee_without_a_test_is_found() -> None:
    text = "\n## What holds\n\n**A**\n\n1. Yes. `tests/unit/test_a.py::test_x`\n2. No.\n\n**B**\n\n3. `test_y`.\n\n## Else\n4. No."
    assert without_test(text) == [2, 3]
    assert "test_no_shell_is_between" in defined("tests/unit/test_security.py") and "shells" not in defined("tests/unit/test_security.py")


def test_past_holes_name_what_holds_now() -> None:
    text = PAGE.read_text(encoding="utf-8")
    known = guarantees(text)
    rows = text.split("\n## Past holes\n", 1)[1].split("|---|---|---|\n", 1)[1].strip().splitlines()
    for row in rows:
        numbers = re.findall(r"\(([0-9, ]+)\) \|$", row)
        assert numbers and {int(n) for n in numbers[0].split(",")} <= {*known}, row


def shells(source: str) -> Iterator[int]:
    """Lines on which a program would be run by a shell."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            yield from (node.lineno for word in node.keywords if word.arg == "shell")
            if re.search(r"\b(os\.system|os\.popen|getoutput|getstatusoutput|create_subprocess_shell)$", name):
                yield node.lineno


def test_no_shell_is_between() -> None:
    for path in sorted((ROOT / "libvirt_cbt").rglob("*.py")):
        assert list(shells(path.read_text(encoding="utf-8"))) == [], path


def test_a_shell_is_found() -> None:
    assert list(shells("import os, subprocess\nos.system('x')\nsubprocess.run(x, shell=True)\nsubprocess.run(x)")) == [2, 3]
