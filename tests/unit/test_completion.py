"""TAB in a real bash, zsh and fish, on a terminal; and what is offered where."""

from __future__ import annotations

import importlib
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, Final, Iterator, List

import click
import pytest

from libvirt_cbt import cli, names
from libvirt_cbt.cli import completing
from libvirt_cbt.repository import store
from tests.unit import repository_samples as samples

SECONDS: Final = 60
PROMPT: Final = "R" "EADY>"  # what the shell prints, and not what it is told
OTHER: Final = names.domain_uuid("0123abcd-0123-4567-89ab-0123456789ac")
BEGINS: Final[Dict[str, List[str]]] = {
    "bash": ["PS1='R''EADY>'", "bind 'set enable-bracketed-paste off'", 'eval "$(libvirt-cbt completion bash)"'],
    "zsh": [
        "PS1='R''EADY>'",
        "autoload -Uz compinit; compinit -u",
        "unsetopt prompt_sp",
        "bindkey -e",
        'eval "$(libvirt-cbt completion zsh)"',
    ],
    "fish": ["function fish_prompt; echo -n 'R''EADY>'; end", "set fish_greeting", "libvirt-cbt completion fish | source"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a repository of two domains: one whose name is a command, and one with three generations."""
    home = tmp_path_factory.mktemp("home")
    (home / "bin").mkdir()
    program = home / "bin" / "libvirt-cbt"
    patient = "from libvirt_cbt import cli; from libvirt_cbt.cli import completing; completing.SECONDS = 60; cli.main()"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{patient}' \"$@\"\n")
    program.chmod(0o755)
    repository = store.Repository.init(str(home / "repo"))
    for uuid, name, count in ((samples.UUID, "web1", 3), (OTHER, "web$(touch evil)", 1)):
        kept = repository.domain(uuid)
        with kept.lock():
            for _ in range(count):
                samples.publish(kept, name=name)
    return home


@pytest.fixture
def environment(home: Path) -> Dict[str, str]:
    package = str(Path(cli.__file__).parents[2])
    return {
        "HOME": str(home), "PATH": f"{home / 'bin'}:/usr/bin:/bin", "TERM": "dumb", "LC_ALL": "C.UTF-8", "ZDOTDIR": str(home),
        "PYTHONPATH": package, "LIBVIRT_DEFAULT_URI": "test:///default", "COLUMNS": "500",
    }  # fmt: skip


def offered(environment: Dict[str, str], *words: str) -> List[str]:
    """For the last of the words, as bash asks."""
    asked = {"_LIBVIRT_CBT_COMPLETE": "bash_complete", "COMP_WORDS": "\n".join(["libvirt-cbt", *words]), "COMP_CWORD": str(len(words))}
    done = subprocess.run(
        ["libvirt-cbt"], env={**environment, **asked}, capture_output=True, text=True, check=True, timeout=SECONDS
    )
    assert done.stderr == ""
    return [re.sub("^plain,", "", line) for line in done.stdout.splitlines() if line]


def test_what_is_offered(environment: Dict[str, str], home: Path) -> None:
    repo = ["-r", str(home / "repo")]
    assert offered(environment, "re") == ["restore", "report", "recover"]
    assert offered(environment, "-r", "") == ["dir,"]
    assert offered(environment, "--config", "./x") == ["file,./x"]
    assert offered(environment, *repo, "restore", "") == ["web1"]  # the other's name would be run
    assert offered(environment, "-r", "~/repo", "restore", "w") == ["web1"]
    assert offered(environment, *repo, "backup", "") == ["test", "web1"]
    assert offered(environment, *repo, "changed", "web1", "") == ["vda"]
    assert offered(environment, *repo, "restore", "web1", "--disk", "v") == ["vda"]
    assert offered(environment, *repo, "restore", "web1", "--at", "") == ["3", "2", "1"]
    assert offered(environment, *repo, "changed", "web1", "vda", "--since", "2") == ["2"]
    assert offered(environment, *repo, "hooks", "install", "") == ["libvirt", "vdsm"]
    assert offered(environment, *repo, "systemd", "status", "--directory", "") == ["dir,"]


def test_what_goes_wrong_is_not_told(environment: Dict[str, str], home: Path) -> None:
    for words in (
        ["-r", "/no/such/place", "restore", ""],
        ["-r", "/etc", "restore", ""],
        ["-r", str(home / "repo"), "restore", "nobody", "--at", ""],
        ["-r", str(home / "repo"), "restore", "--at", ""],
        ["--config", "/no/such/file", "restore", ""],
        ["no-such-command", "w"],
        ["-c", "no-such-driver:///", "backup", "te"],
        ["-c", "qemu+ssh://localhost/system", "backup", "te"],
    ):
        assert offered(environment, *words) == [], words


def shell(name: str, home: Path, environment: Dict[str, str]) -> List[str]:
    """How it is started with BEGINS and nothing of the machine's."""
    text = "\n".join([*BEGINS[name], ""])
    (home / ".config" / "fish").mkdir(parents=True, exist_ok=True)
    (home / {"bash": ".bashrc", "zsh": ".zshrc", "fish": ".config/fish/config.fish"}[name]).write_text(text)
    return {"bash": ["bash", "-i"], "zsh": ["zsh", "-d", "-i"], "fish": ["fish", "-i"]}[name]


@pytest.fixture(params=["bash", "zsh", "fish"])
def terminal(request: pytest.FixtureRequest, home: Path, environment: Dict[str, str]) -> Iterator[int]:
    """The shell's, at its prompt."""
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed")
    argv = shell(request.param, home, environment)
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(home)
        os.execvpe(argv[0], argv, environment)
    try:
        until(fd, PROMPT)
        yield fd
    finally:
        os.close(fd)  # the shell is told by SIGHUP
        os.waitpid(pid, 0)


def until(fd: int, pattern: str) -> str:
    """What the terminal shows up to something."""
    seen, deadline = "", time.monotonic() + SECONDS
    while not re.search(pattern, seen):
        assert time.monotonic() < deadline, f"{pattern!r} did not come: {seen!r}"
        if select.select([fd], [], [], 1)[0]:
            seen += os.read(fd, 65536).decode(errors="replace")
    return seen


def completed(fd: int, typed: str) -> str:
    """The line that TAB makes of what was typed."""
    os.write(fd, f"{typed}\t\x01printf '<<%s>>' '".encode())  # then to its beginning, where something harmless is put
    os.write(fd, b"\x05'\r")
    found = until(fd, rf"<<([^>%]*)>>(?s:.)*{PROMPT}")
    shown = re.search("<<([^>%]*)>>", found)
    assert shown
    return shown[1].rstrip(" ")


def test_tab(terminal: int, home: Path) -> None:
    assert completed(terminal, "libvirt-cbt heat") == "libvirt-cbt heatmap"
    repo = f"libvirt-cbt -r {home / 'repo'}"
    assert completed(terminal, f"{repo} restore we") == f"{repo} restore web1"
    assert completed(terminal, f"{repo} changed web1 v") == f"{repo} changed web1 vda"
    assert completed(terminal, f"{repo} restore web1 --sal") == f"{repo} restore web1 --salvage"
    assert completed(terminal, f"libvirt-cbt -r {home}/rep").rstrip("/") == f"libvirt-cbt -r {home}/repo"
    assert not (home / "evil").exists()


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_domain_disk_and_generation_is_offered(name: str) -> None:
    command = importlib.import_module(f"libvirt_cbt.cli.{name}").command
    completing.offer(command)
    for param in command.params:
        wanted = param.name in completing.NAMES or param.metavar in completing.PATHS
        assert isinstance(param.type, completing.Offered) == wanted, param.name
        if isinstance(param, click.Argument) and not wanted:
            assert isinstance(param.type, click.Choice), param.name
