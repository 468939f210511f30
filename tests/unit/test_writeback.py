"""What is written is begun to be written out, whoever wrote it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, List

import pytest

from libvirt_cbt import errors
from libvirt_cbt.nbdio import writeback


def test_the_kernel_is_told_after_every_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: List[Any] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: told.append((os.readlink(f"/proc/self/fd/{fd}"), *rest)))
    path = tmp_path / "layer"
    path.touch()
    with writeback.behind(str(path)) as behind:
        for _ in range(5):
            behind.wrote(writeback.STEP // 2)
    assert told == [(str(path), 0, 0, os.POSIX_FADV_DONTNEED)] * 2


def test_nothing_of_a_file_is_lost(tmp_path: Path) -> None:
    path, data = tmp_path / "layer", os.urandom(1 << 20)
    path.touch()
    with path.open("r+b", buffering=0) as file, writeback.behind(str(path)) as behind:
        for number in range(2 * writeback.STEP >> 20):
            os.pwrite(file.fileno(), data, number << 20)
            behind.wrote(len(data))
    assert path.read_bytes() == data * (2 * writeback.STEP >> 20)


def test_a_file_that_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(errors.RepositoryError, match="vda"), writeback.behind(str(tmp_path / "vda.qcow2")):
        pass
