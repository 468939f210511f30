"""What the documents promise is what the code has."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Dict, Final, Set, Type

import click
import pytest

import libvirt_cbt
from libvirt_cbt import cli, config, errors, scripts
from libvirt_cbt.actions import metrics
from libvirt_cbt.cli import manual_words
from libvirt_cbt.hooks import installing

ROOT: Final = Path(__file__).resolve().parents[2]
README: Final = ROOT / "README.md"
AUTOMATION: Final = ROOT / "docs" / "automation.md"
REMOTE: Final = ROOT / "docs" / "remote.md"
EXIT_CODES: Final = ROOT / "docs" / "exit-codes.md"


def options(command: click.Command) -> Set[str]:
    """Of a command, or of all commands of a group."""
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return {name for one in (command, *below) for parameter in one.params for name in parameter.opts}


def kinds() -> Dict[str, Type[errors.CbtError]]:
    found = inspect.getmembers(errors, inspect.isclass)
    return {name: kind for name, kind in found if issubclass(kind, errors.CbtError) and kind is not errors.CbtError}


@pytest.mark.parametrize("name", sorted(kinds()))
def test_every_error_is_in_the_table_of_exit_codes(name: str) -> None:
    kind = kinds()[name]
    code = "128+N" if kind is errors.Interrupted else str(kind.code)
    message = re.sub(r"\{(\w+)[^}]*\}", r"{\1}", kind.template)
    assert f"| {name} | {code} | {message} |" in EXIT_CODES.read_text(encoding="utf-8")


def test_every_code_is_explained() -> None:
    text = EXIT_CODES.read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| ([0-9]+) \|", text, re.MULTILINE))
    codes = {kind.code for kind in kinds().values()} | {errors.CbtError.code}
    assert {str(code) for code in codes} <= explained


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_is_in_the_readme(command: str) -> None:
    assert re.search(rf"^\| `{command}\b", README.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_readme_shows_no_command_or_option_that_is_not_there() -> None:
    text = README.read_text(encoding="utf-8")
    shown = set(re.findall(r"libvirt-cbt (?:-r \S+ )?([a-z]+)", text))
    assert shown <= set(cli.COMMANDS)
    for command, row in re.findall(r"^\| `([a-z]+)(.*)$", text, re.MULTILINE):
        known = options(importlib.import_module(f"libvirt_cbt.cli.{command}").command)
        assert set(re.findall(r"--[a-z-]+", row)) <= known


def test_automation_shows_what_is_there(tmp_path: Path) -> None:
    text = AUTOMATION.read_text(encoding="utf-8")
    assert set(re.findall(r"^ {4}libvirt-cbt (?:-\S+ )*([a-z]+)", text, re.MULTILINE)) <= set(cli.COMMANDS)
    assert {f"`{name}`" for name in metrics.GAUGES} <= set(re.findall(r"^\| (`\w+`) \|", text, re.MULTILINE))
    assert set(re.findall(r"libvirt_cbt_(\w+)", re.sub("(?s)^.*?```yaml", "", text))) <= set(metrics.GAUGES)
    configurations = re.findall("```toml\n(.*?)```", text, re.DOTALL)
    assert configurations[0] == manual_words.EXAMPLE
    configurations += re.findall("```toml\n(.*?)```", REMOTE.read_text(encoding="utf-8"), re.DOTALL)
    for number, one in enumerate(configurations):
        path = tmp_path / f"{number}.toml"
        path.write_text(one, encoding="utf-8")
        config.load([str(path)], given=True)


def test_the_document_of_hooks_shows_what_is_there() -> None:
    text = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    shown = re.findall(r"^ {4}libvirt-cbt ((?:-\S+ \S+ )*)([a-z]+)(.*)$", text, re.MULTILINE)
    assert len(shown) >= 6
    for _, name, rest in shown:
        command = importlib.import_module(f"libvirt_cbt.cli.{name}").command
        assert set(re.findall(r"--[a-z-]+", rest)) <= options(command)
    assert set(re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE)) == set(scripts.PHASES)
    for event in installing.EVENTS:
        assert event in text


def test_every_error_of_remote_hosts_is_one() -> None:
    shown = re.findall(r"^\|[^|]+\| ([A-Z]\w+(?:, [A-Z]\w+)*) \|", REMOTE.read_text(encoding="utf-8"), re.MULTILINE)
    assert shown and {name for names in shown for name in names.split(", ")} <= set(kinds())


def test_every_verb_of_the_readme_is_a_function() -> None:
    verbs = re.findall(r"libvirt_cbt\.([a-z]+)\(", README.read_text(encoding="utf-8"))
    assert verbs and all(callable(getattr(libvirt_cbt, verb)) for verb in verbs)


def test_every_document_that_the_readme_names_is_there() -> None:
    for name in re.findall(r"(?:docs|script|libvirt_cbt)/[\w/.-]*\w", README.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name
