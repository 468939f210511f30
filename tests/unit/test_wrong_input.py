"""Whatever is wrong with what automation is given is one sentence that says the way out, and the right exit code."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Callable, List, Tuple

import pytest

from libvirt_cbt import cli
from libvirt_cbt.repository import runs, store

GONE = "qemu:///system?socket=/nonexistent/libvirt-sock"
URI = "test:///default"  # libvirt's own, in this process; it has one domain, `test`
POLICY = '[policy.all]\nmatch = ["*"]\n'
Told = Tuple[int, str, str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LIBVIRT_CBT_HOOKS_DIR", str(tmp_path / "hooks.d"))
    monkeypatch.delenv("LIBVIRT_CBT_REPO", raising=False)
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    (tmp_path / "other").write_text("kept")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o1777)
    store.Repository.init(str(tmp_path / "repo"))
    return tmp_path


@pytest.fixture
def call(folder: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    """Exit code, stdout and stderr of the command with this configuration (None: /dev/null, "": none at its path)."""

    def called(text: str, *argv: str) -> Told:
        file = folder / "c.toml"
        if text:
            file.write_text(f'repository = "{folder}/repo"\nconnect = "{URI}"\n{text}', encoding="utf-8")
        code = cli.exit_code(["--config", str(file), *(word.replace("FOLDER", str(folder)) for word in argv)])
        out, err = capfd.readouterr()
        return code, out.replace(str(folder), "FOLDER"), err.replace(str(folder), "FOLDER")

    return called


WRONG: List[Tuple[str, List[str], int, str]] = [
    ("", ["run"], 2, "FOLDER/c.toml: No such file or directory"),
    ("", ["config"], 2, "FOLDER/c.toml: No such file or directory"),
    ("[policy.a", ["config"], 2, "FOLDER/c.toml: Expected ']' at the end of a table declaration"),
    ("[policy.a", ["config", "--check"], 2, "FOLDER/c.toml: Expected ']'"),
    ("[policy.a", ["run"], 2, "FOLDER/c.toml: Expected ']'"),
    ("[policy.a", ["metrics"], 2, "FOLDER/c.toml: Expected ']'"),
    ("[policy.a", ["hooks", "status"], 2, "FOLDER/c.toml: Expected ']'"),
    ("[policy.a", ["systemd", "install", "--directory", "FOLDER/u"], 2, "FOLDER/c.toml: Expected ']'"),
    ("job = 2", ["run"], 2, "FOLDER/c.toml: unknown key 'job'; did you mean 'jobs'?"),
    ("jobs = 2", ["run"], 2, "FOLDER/c.toml has no [policy.NAME]: nothing says what is backed up; libvirt-cbt.toml(5)"),
    (POLICY, ["run", "nobody"], 10, "no host has a domain 'nobody'; `libvirt-cbt config` lists them"),
    (POLICY, ["run", "te\x1bst"], 10, "no host has a domain 'te\\x1bst'"),
    (POLICY + "skip = true", ["run", "test"], 2, "domain 'test' is left out: its policy leaves it out"),
    (POLICY, ["run", "--jobs", "0"], 2, "Invalid value for '--jobs': 0 is not in the range x>=1; `libvirt-cbt run --help`"),
    (POLICY, ["-r", "FOLDER/none", "run"], 10, "no repository at FOLDER/none; make one with `libvirt-cbt -r FOLDER/none init`"),
    (POLICY, ["-c", GONE, "run"], 20, f"cannot reach libvirt at {GONE}: "),
    (POLICY, ["config", "test", "nobody"], 10, "no host has a domain 'nobody'; `libvirt-cbt config` lists them"),
    (POLICY, ["-c", GONE, "config", "nobody"], 20, f"cannot reach libvirt at {GONE}: "),
    (POLICY, ["config", "--check", "test"], 2, "--check goes without domains; `libvirt-cbt config --help` shows examples"),
    (POLICY, ["-r", "FOLDER/none", "metrics"], 10, "no repository at FOLDER/none"),
    (POLICY, ["metrics", "--textfile", "FOLDER/none/x.prom"], 15, "cannot write FOLDER/none/x.prom: No such file or directory"),
    (POLICY, ["metrics", "--textfile", "FOLDER/other"], 2, "FOLDER/other is there and holds no metrics of libvirt-cbt;"),
    (POLICY, ["metrics", "--textfile", "FOLDER"], 2, "FOLDER is there and holds no metrics of libvirt-cbt;"),
    (POLICY, ["metrics", "test"], 2, "Got unexpected extra argument (test); `libvirt-cbt metrics --help` shows examples"),
    (POLICY, ["hooks", "install"], 2, "Missing argument 'libvirt|vdsm'. Choose from: libvirt, vdsm; `libvirt-cbt hooks install"),
    (POLICY, ["hooks", "install", "xen"], 2, "Invalid value for 'libvirt|vdsm': 'xen' is not one of 'libvirt', 'vdsm'"),
    (POLICY, ["hooks", "install", "libvirt", "--directory", "FOLDER/other/x"], 10, "there is no FOLDER/other: this host has no libvirt;"),
    (POLICY, ["hooks", "install", "libvirt", "--directory", "FOLDER/h", "--spool-dir", "FOLDER/open"], 15, "cannot write FOLDER/open"),
    (POLICY, ["-r", "FOLDER/none", "hooks", "install", "libvirt"], 10, "no repository at FOLDER/none"),
    (POLICY, ["systemd", "install", "--directory", "FOLDER/other/x"], 15, "cannot write FOLDER/other/x: Not a directory"),
    (POLICY, ["systemd", "instal"], 2, "No such command 'instal'"),
    (POLICY, ["completion"], 2, "Missing argument 'bash|zsh|fish'. Choose from: bash, zsh, fish; `libvirt-cbt completion --help`"),
    (POLICY, ["completion", "tcsh"], 2, "Invalid value for 'bash|zsh|fish': 'tcsh' is not one of 'bash', 'zsh', 'fish'"),
    (POLICY, ["manual", "--directory", "FOLDER/other/x"], 15, "cannot write FOLDER/other/x: Not a directory"),
    (POLICY, ["runn"], 2, "No such command 'runn'"),
]  # fmt: skip


SILENT = ("completion", "manual")  # they print no JSON
CASES = [(*one, as_json) for one in WRONG for as_json in (False, True) if not (as_json and one[1][0] in SILENT)]


@pytest.mark.parametrize(("text", "argv", "code", "said", "as_json"), CASES)
def test_one_sentence_and_the_code(
    call: Callable[..., Told], folder: Path, text: str, argv: List[str], code: int, said: str, as_json: bool
) -> None:
    found, out, err = call(text, *(["--json"] if as_json else []), *argv)
    assert err.startswith(f"libvirt-cbt: {said}") and err.count("\n") == 1, err
    assert found == code
    if as_json:
        document = json.loads(out)
        assert (document["error"]["code"], f"libvirt-cbt: {document['error']['message']}\n") == (code, err)
    assert (folder / "other").read_text() == "kept"
    assert not runs.last(store.Repository.open(str(folder / "repo")))  # no alarm for a slip of the pen


def test_monitoring_hears_of_a_wrong_configuration(call: Callable[..., Told]) -> None:
    for text in ("", "[policy.a", "job = 2"):
        code, out, _ = call(text, "check")
        assert code == 3 and out.startswith("LIBVIRT-CBT UNKNOWN: FOLDER/c.toml: ") and out.count("\n") == 1


def test_a_run_of_all_is_noted_and_one_of_some_is_not(call: Callable[..., Told], folder: Path) -> None:
    repository = store.Repository.open(str(folder / "repo"))
    assert call(POLICY, "run", "test")[0] != 0  # this libvirt makes no backups
    assert runs.last(repository) == []
    code, _, err = call(f'textfile = "{folder}/other"\n{POLICY}', "run")
    assert code != 0 and "FOLDER/other is there and holds no metrics" in err and (folder / "other").read_text() == "kept"
    (noted,) = runs.last(repository)
    assert (noted.hosts, noted.domains, len(noted.failed), noted.host_failures) == ([URI], 1, 1, [])


def test_a_host_that_answered_once_is_missed(call: Callable[..., Told], folder: Path) -> None:
    repository = store.Repository.open(str(folder / "repo"))
    runs.record(repository, [GONE], started=datetime.now(timezone.utc), code=0, domains=1, failed=[], host_failures=[])
    assert call(POLICY, "-c", GONE, "run")[0] == 20
    (noted,) = runs.last(repository)
    assert noted.code == 20 and noted.host_failures[0].code == 20
    code, out, _ = call(POLICY, "check", "--offline", "--warning-free", "0", "--critical-free", "0")
    assert code == 1 and out.startswith("LIBVIRT-CBT WARNING: the last run was not complete: cannot reach libvirt")


def test_what_is_shown_could_stand_in_the_file(call: Callable[..., Told]) -> None:
    code, out, _ = call(POLICY + 'quiesce = "none"\nmax_duration = "2h"\n', "config", "test")
    assert code == 0 and "test: policy all\n" in out
    assert {'  quiesce = "none"', "  max_duration = 7200.0", "  shut_off = true"} <= set(out.splitlines())
    assert "None" not in out




def test_each_failure_has_its_kind_and_code_in_the_log(call: Callable[..., Told]) -> None:
    """So that a journal can be asked for all of one kind, as docs/automation.md shows."""
    lines = [json.loads(line) for line in call(POLICY, "--log", "json", "run")[2].splitlines()]
    (failure, ended) = (line for line in lines if line["level"] == "error")
    assert (failure["domain"], failure["work"], failure["code"]) == ("test", "backup", ended["code"])
    assert failure["kind"].isidentifier() and failure["message"].startswith("backup: ")
    assert (ended["policy"], "host" in ended) == ("all", False) and ended["seconds"] >= 0
    (gone,) = (json.loads(line) for line in call(POLICY, "--log", "json", "-c", GONE, "run")[2].splitlines())
    assert (gone["kind"], gone["code"], gone["uri"]) == ("NoHypervisor", 20, GONE)
