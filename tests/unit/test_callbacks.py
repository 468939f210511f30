"""What libnbd calls only records: an assert in it would abort the process, any other exception would be lost."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final, Iterator, List, Set

import pytest

NBDIO: Final = Path(__file__).resolve().parents[2] / "libvirt_cbt" / "nbdio"
HARMLESS: Final = (ast.Expr, ast.Return, ast.Assign)


def handed_over(tree: ast.AST) -> Set[str]:
    """Names given to libnbd: as `completion=`, or inside the arguments of a call that goes through `_submit`."""
    found: Set[str] = set()
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        found |= {k.value.id for k in call.keywords if k.arg == "completion" and isinstance(k.value, ast.Name)}
        if isinstance(call.func, ast.Attribute) and call.func.attr == "_submit" and len(call.args) > 1:
            found |= {n.id for n in ast.walk(call.args[1]) if isinstance(n, ast.Name)}
    return found


def callbacks(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    names = handed_over(tree)
    yield from (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in names)


def offences(source: str) -> List[str]:
    return [
        f"{function.name}: {ast.dump(step)[:60]}"
        for function in callbacks(ast.parse(source))
        for step in function.body
        if not isinstance(step, HARMLESS) or any(isinstance(n, (ast.Raise, ast.Assert)) for n in ast.walk(step))
    ]


@pytest.mark.fault(32)
def test_callbacks_of_libnbd_only_record() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in NBDIO.glob("*.py")}
    assert [o for source in sources.values() for o in offences(source)] == []
    assert {f.name for f in callbacks(ast.parse(sources["client.py"]))} >= {"completion", "extent"}


def test_the_search_sees_a_raise() -> None:
    bad = "def f(call):\n    def done(e):\n        assert not e\n        return 1\n    call(completion=done)\n"
    assert offences(bad)
