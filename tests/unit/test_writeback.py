"""What is written is begun to be written out, whoever wrote it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any, List

import pytest

from libvirt_cbt.nbdio import writeback


def ended(behind: writeback.WriteBack) -> None:
    behind.close()
    if behind._thread:
        behind._thread.join(30)
        assert not behind._thread.is_alive()


def descriptors(path: Path) -> List[str]:
    return [n for n in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{n}") == str(path)]


def test_the_kernel_is_told_after_every_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: List[Any] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: told.append((os.readlink(f"/proc/self/fd/{fd}"), *rest)))
    path = tmp_path / "layer"
    path.touch()
    with path.open("r+b", buffering=0) as file:
        behind = writeback.WriteBack(file.fileno())
    for number in range(5):
        behind.wrote(writeback.STEP // 2)
        deadline = time.monotonic() + 30
        while len(told) < (number + 1) // 2 and time.monotonic() < deadline:
            time.sleep(0.001)
    ended(behind)
    assert told == [(str(path), 0, 0, os.POSIX_FADV_DONTNEED)] * 2
    assert descriptors(path) == []


def test_nothing_of_a_file_is_lost(tmp_path: Path) -> None:
    path, data = tmp_path / "layer", os.urandom(1 << 20)
    path.touch()
    with path.open("r+b", buffering=0) as file:
        behind = writeback.WriteBack(file.fileno())
        for number in range(2 * writeback.STEP >> 20):
            os.pwrite(file.fileno(), data, number << 20)
            behind.wrote(len(data))
        ended(behind)
    assert path.read_bytes() == data * (2 * writeback.STEP >> 20)


def test_a_disk_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The loop that writes goes on, and so notices that nothing comes back from its server."""
    hangs, told = threading.Event(), []

    def advise(*_: int) -> None:
        told.append(1)
        assert hangs.wait(30)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    path = tmp_path / "layer"
    path.touch()
    with path.open("r+b", buffering=0) as file:
        behind = writeback.WriteBack(file.fileno())
    for _ in range(100):
        behind.wrote(writeback.STEP)
    behind.close()
    hangs.set()
    ended(behind)
    assert len(told) <= 2


def test_advice_that_is_refused_is_no_failure(tmp_path: Path) -> None:
    read, write = os.pipe()  # ESPIPE
    behind = writeback.WriteBack(write)
    behind.wrote(writeback.STEP)
    ended(behind)
    os.close(read)
    os.close(write)
