"""What the documents promise is what the code has."""

from __future__ import annotations

import inspect
from pathlib import Path

from libvirt_cbt import cli, errors

ROOT = Path(__file__).parents[2]


def test_every_error_class_is_in_the_table_of_exit_codes() -> None:
    table = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.CbtError) and kind is not errors.CbtError:
            code = "128+N" if name == "Interrupted" else str(kind.code)
            assert f"| {name} | {code} |" in table


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in cli.COMMANDS:
        assert f"`{command}" in readme
