"""Every fault that the project promises to survive has its test: rows are named by `@pytest.mark.fault(ROW)`."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Dict, Final, Iterator, List, Set

TESTS: Final = Path(__file__).resolve().parents[1]
ROWS: Final[Set[int]] = {*range(1, 62)}


def marked(source: str) -> Iterator[int]:
    """Numbers given to pytest.mark.fault anywhere in a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "fault":
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, int):
                    yield argument.value


def test_every_row_has_a_test() -> None:
    found: Dict[int, List[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for row in marked(path.read_text(encoding="utf-8")):
            found.setdefault(row, []).append(path.name)
    assert not ROWS - set(found), f"no test of rows {sorted(ROWS - set(found))}"


def test_the_search_sees_marks() -> None:
    assert list(marked("@pytest.mark.fault(3)\ndef test_x(): ...\n@pytest.mark.fault(4, 5)\ndef test_y(): ...")) == [3, 4, 5]
