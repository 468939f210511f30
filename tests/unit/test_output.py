"""What others chose (names of guests, answers of agents, a hostile repository) on our terminal, in our JSON and hints."""

from __future__ import annotations

import ast
import importlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libvirt_cbt import cli, errors
from libvirt_cbt.cli import output
from libvirt_cbt.repository import store
from tests.unit import repository_samples as samples

CLI = Path(cli.__file__).parent
# Sequences that clear a screen, set a title, go back to the line's beginning, turn the text round; one in 8-bit form.
HOSTILE = "web\x1b[2J\x1b]0;x\x07\r\n\x9b31m\u202e1"
ANY_TEXT = st.text(st.characters(), max_size=60)  # surrogates too: a path that is no UTF-8


@pytest.fixture
def repository(tmp_path: Path) -> str:
    kept = store.Repository.init(str(tmp_path / "repo")).domain(samples.UUID)
    with kept.lock():
        samples.publish(kept, name=HOSTILE)
    return kept.repository.path


@pytest.mark.fault(55)
@pytest.mark.parametrize(
    "command",
    [["list"], ["show", samples.UUID], ["recover"], ["changed", samples.UUID, "vda", "--since", "*"], ["verify"],
     ["heatmap", samples.UUID, "vda"], ["report"], ["protect", samples.UUID], ["unprotect", samples.UUID],
     ["show", samples.UUID, "--at", "9"], ["changed", samples.UUID, "vdz", "--since", "1"],
     ["prune", samples.UUID, "--keep-last", "1"], ["list", HOSTILE.replace("\0", "")]],
)  # fmt: skip
@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_of_others_moves_the_terminal(
    repository: str, capfd: pytest.CaptureFixture[str], command: List[str], as_json: bool
) -> None:
    argv = ["-r", repository, "-c", "test:///nowhere", *(["--json"] if as_json else []), *command]
    assert cli.exit_code(argv) != 70
    out, err = capfd.readouterr()
    assert out or err
    for line in [*out.split("\n"), *err.split("\n")]:
        assert line.isprintable(), ascii(line)
    if as_json:
        assert out.isascii()
        assert json.loads(out)["version"] == 1


def test_only_one_function_prints() -> None:
    """`say` escapes; documents are ASCII.  Whoever prints otherwise prints nothing of others."""
    allowed = {"output.py", "__init__.py"}
    for path in sorted(CLI.glob("*.py")):
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        printed = [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        assert not printed or path.name in allowed, f"{path.name}: {printed}"


@given(ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_a_line_stays_one_line(text: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    output.say(text, to=stream)
    stream.flush()
    written = stream.buffer.getvalue().decode()
    assert written.endswith("\n") and written[:-1].isprintable()
    assert json.loads(output.dumped({"x": text})) == {"x": text}


@pytest.mark.fault(59)
@given(ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_a_command_in_a_sentence_names_the_guest_and_runs_nothing_else(text: str) -> None:
    """People copy these lines into a root shell, and a guest's name may be `$(reboot)` or `--discard`."""
    words = shlex.split(errors.argument(text))
    assert words == (["--", text] if text.startswith("-") else [text])
    sentence = str(errors.NoPointOpen(domain=text))
    assert sentence.endswith(f"; `libvirt-cbt start {errors.argument(text)}` opens one")


@pytest.mark.fault(59)
def test_every_name_in_a_command_is_quoted() -> None:
    """Between backticks a sentence has a command: what is filled in there is `{name!q}`, or an id of ours."""
    ours = ("uuid", "dom.uuid", "where", "errors.argument(", "errors.quoted(")
    found: List[str] = []
    for path in sorted(CLI.parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name == "errors.py":
                found += _unquoted(node.value)
            elif isinstance(node, ast.JoinedStr):
                found += _unquoted("".join(_shown(part) for part in node.values))
    assert found and not [field for field in found if not field.startswith(ours)]


def _shown(part: ast.expr) -> str:
    if isinstance(part, ast.FormattedValue):
        return "{" + ast.unparse(part.value) + "}"
    return str(part.value) if isinstance(part, ast.Constant) else ""


def _unquoted(sentence: str) -> List[str]:
    pieces = sentence.split("`")[1::2]
    fields = [field for piece in pieces for field in piece.split("{")[1:]]
    return [field.split("}")[0] for field in fields if not field.split("}")[0].endswith("!q")]


def test_a_name_that_the_encoding_lacks(tmp_path: Path) -> None:
    """LC_ALL=de_DE.ISO-8859-1 and a Japanese name, or a path that is no text."""
    kept = store.Repository.init(str(tmp_path / "repo")).domain(samples.UUID)
    with kept.lock():
        samples.publish(kept, name="\u65e5\u672c")
    for more in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", "from libvirt_cbt import cli; cli.main()", *more, "-r", kept.repository.path, "list"],
            env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=True,
        )  # fmt: skip
        assert b"65e5" in done.stdout


def test_ctrl_c_before_the_verb_has_its_document_and_its_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert cli.exit_code(["--json", "list"]) == 130
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["kind"] == "Interrupted"
    assert "SIGINT" in err and len(err.strip().splitlines()) == 1
