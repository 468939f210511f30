"""A domain whose first run failed: the repository has its folder, and nothing was ever published in it."""

from __future__ import annotations

from pathlib import Path
from typing import List

import pytest

from libvirt_cbt import cli
from libvirt_cbt.repository import store
from tests.unit import repository_samples as samples


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["list", samples.UUID], 0),
        (["show", samples.UUID], 10),
        (["verify"], 0),
        (["verify", samples.UUID], 0),
        (["restore", samples.UUID, "--output", "out"], 10),
        (["serve", samples.UUID, "--socket", "socket"], 10),
        (["heatmap", samples.UUID, "vda"], 10),
        (["protect", samples.UUID, "--at", "1"], 10),
        (["prune", samples.UUID, "--keep-last", "1", "--dry-run"], 0),
        (["prune", samples.UUID, "--keep-last", "1"], 0),
        (["prune", samples.UUID, "--keep-last", "1", "--forget"], 0),
        (["prune", samples.UUID, "--remove", "1"], 10),
        (["report"], 0),
        (["report", samples.UUID], 0),
    ],
    ids=str,
)
def test_every_command_has_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: List[str], code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    repository = store.Repository.init(str(tmp_path / "repository"))
    with repository.domain(samples.UUID).lock():
        pass
    assert cli.exit_code(["-c", "test:///default", "-r", repository.path, *words]) == code
