"""The man pages: what mandoc says of them, and that nothing is missing."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final, List, Tuple, Type

import click
import pytest

from libvirt_cbt import cli, config
from libvirt_cbt.cli import manual_config, manual_pages, manual_words, roff

ROOT: Final = Path(__file__).resolve().parents[2]


def shown(source: str) -> str:
    """What is read, without the escapes."""
    text = re.sub(r"\\f[BR]|\\&", "", source)
    for letter, escape in roff.ESCAPES.items():
        text = text.replace(escape, letter)
    return text


def test_mandoc_has_nothing_against_them(tmp_path: Path) -> None:
    mandoc = shutil.which("mandoc")
    if not mandoc:
        pytest.skip("mandoc is not installed")
    assert cli.exit_code(["manual", "--directory", str(tmp_path)]) == 0
    pages = sorted(map(str, tmp_path.glob("man*/*")))
    assert len(pages) == len(cli.COMMANDS) + 2
    done = subprocess.run([mandoc, "-Tlint", "-Wwarning", *pages], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
    done = subprocess.run([mandoc, "-Tutf8", *pages], capture_output=True, text=True, check=True, timeout=120)
    assert "libvirt-cbt restore [OPTIONS] DOMAIN" in re.sub(".\b", "", done.stdout)
    assert cli.exit_code(["manual", "--directory", str(tmp_path)]) == 0  # once more, after an upgrade
    foreign = tmp_path / "man1" / "libvirt-cbt.1"
    foreign.write_text("another's", encoding="utf-8")
    assert cli.exit_code(["manual", "--directory", str(tmp_path)]) == 15
    assert foreign.read_text(encoding="utf-8") == "another's"


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_option_of_a_command_is_in_its_page(name: str) -> None:
    command = importlib.import_module(f"libvirt_cbt.cli.{name}").command
    page = shown(manual_pages.page(f"libvirt-cbt-{name}"))
    for one in (command, *(command.commands.values() if isinstance(command, click.Group) else ())):
        for param in one.params:
            if isinstance(param, click.Option):
                hidden = param.hidden
                assert all((re.search(rf"^(-\w, )?{opt}\b", page, re.MULTILINE) is None) == hidden for opt in param.opts[-1:])
    assert command.epilog.rstrip().split("\n")[-1].strip() in page


def test_a_page_can_be_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert cli.exit_code(["manual", "libvirt-cbt-run"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith(".TH LIBVIRT\\-CBT\\-RUN 1 1970-01-02 ")
    for words in (["manual", "no-such-page"], ["manual", "libvirt-cbt", "--directory", "/x"], ["--json", "manual"]):
        assert cli.exit_code(words) == 2


def test_codes_are_those_of_the_documents() -> None:
    rows = re.findall(r"^\| ([0-9N+]+) \| ([^|]+) \|", (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows) == manual_words.CODES


def test_every_variable_that_is_read_is_named() -> None:
    read = set()
    for path in (ROOT / "libvirt_cbt").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        read |= set(re.findall(r'(?:envvar=|environ\.get\(|environ\[|setdefault\()"(LIBVIRT_\w+)"', text))
    assert read == set(manual_words.ENVIRONMENT)


def test_every_key_of_the_configuration_is_in_its_page() -> None:
    page = manual_pages.page("libvirt-cbt.toml")
    models: List[Type[config.Model]] = [config.File, config.Rules, config.Policy, config.Host, config.Check]
    tables = {"check", "defaults", "host", "policy"}
    for model in models:
        for key in set(model.model_fields) - tables:
            assert re.search(rf"^\\fB{key}\\fR \(.+\)$", page, re.MULTILINE), key
    assert {name for name in config.File.model_fields if not dict(kinds(config.File)).get(name)} == tables


def kinds(model: Type[config.Model]) -> List[Tuple[str, str]]:
    return [(key, kind) for key, kind, _ in manual_config.keys(model)]


def test_kinds_and_defaults_are_in_words() -> None:
    found = {key: (kind, text) for key, kind, text in manual_config.keys(config.Rules)}
    assert found["quiesce"][0] == '"auto", "agent", "none"'
    assert [found[key][0] for key in ("disks", "bandwidth", "wait", "full_every", "max_chain", "keep_daily", "scratch_dir")] == [
        "list of strings", "size", "duration", "duration", "number", "number", "string"
    ]  # fmt: skip
    for key, default in (("warning_age", "26h"), ("warning_verified", "90d"), ("verify", "1"), ("heal", "false")):
        assert found[key][1].endswith(f"[{default}]")


def test_the_example_is_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "libvirt-cbt.toml"
    path.write_text(manual_words.EXAMPLE, encoding="utf-8")
    loaded = config.load([str(path)], given=True)
    assert list(loaded.policy) == ["scratch", "databases", "others"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (".profile and 'x'", ["\\&.profile and 'x'"]),
        ("'x' is", ["\\&'x' is"]),
        ("give --at or `-r a-b`", ["give \\fB\\-\\-at\\fR or \\fB\\-r a\\-b\\fR"]),
        ("copy-and-paste \\n", ["copy-and-paste \\en"]),
        ("a -- b - c", ["a -- b - c"]),
    ],
)
def test_text_is_text(text: str, wanted: List[str]) -> None:
    assert roff.prose(text) == wanted


def test_what_is_typed_stays_what_it_is() -> None:
    assert roff.verbatim([".x", "", "a 'b' \\c ~/d"]) == [".nf", "\\&.x", "\\&", "a \\(aqb\\(aq \\ec \\(ti/d", ".fi"]
