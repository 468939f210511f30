"""One writer for each domain, among real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import List

import pytest

from libvirt_cbt import errors
from libvirt_cbt.repository import lock, store
from tests.unit import repository_samples as samples

ROOT = str(Path(__file__).parents[2])

HOLDER = """
import sys
from libvirt_cbt import errors, names
from libvirt_cbt.repository import store
kept = store.Repository.open(sys.argv[1]).domain(names.domain_uuid(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
try:
    with kept.lock(float(sys.argv[3])):
        print("won", flush=True)
        sys.stdin.readline()
except errors.RepositoryBusy as e:
    print("busy", e, flush=True)
"""


def holder(kept: store.DomainStore, wait: float = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, kept.repository.path, kept.uuid, str(wait)]
    made = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert made.stdout
    assert made.stdout.readline() == "ready\n"
    return made


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline()


def end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.fixture
def kept(tmp_path: Path) -> store.DomainStore:
    return store.Repository.init(str(tmp_path / "repo")).domain(samples.UUID)


@pytest.mark.fault(43)
def test_ten_at_once_and_the_next_after_a_kill(kept: store.DomainStore) -> None:
    processes: List[subprocess.Popen[str]] = [holder(kept) for _ in range(10)]
    try:
        for one in processes:
            tell(one)
        answers = [answer(one) for one in processes]
        assert sorted(a.split()[0] for a in answers) == ["busy"] * 9 + ["won"]
        winner = processes[next(i for i, a in enumerate(answers) if a == "won\n")]
        with pytest.raises(errors.RepositoryBusy, match=f"process {winner.pid} on "), kept.lock():
            pass
        winner.send_signal(signal.SIGKILL)
        winner.wait()
        with kept.lock():
            pass
    finally:
        for one in processes:
            end(one)


def test_waiting_gets_it_when_the_holder_is_killed(kept: store.DomainStore) -> None:
    first, second = holder(kept), holder(kept, wait=30)
    try:
        tell(first)
        assert answer(first) == "won\n"
        tell(second)
        time.sleep(0.3)
        first.kill()
        assert answer(second) == "won\n"
    finally:
        end(first)
        end(second)


CHILD = """
import os, subprocess, sys
from libvirt_cbt import names
from libvirt_cbt.repository import store
with store.Repository.open(sys.argv[1]).domain(names.domain_uuid(sys.argv[2])).lock():
    held = [int(n) for n in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{n}").endswith("/lock")]
    subprocess.Popen(["sleep", sys.argv[3]], pass_fds=held, stdout=subprocess.DEVNULL)
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_what_a_killed_holder_has_started_is_waited_for(
    kept: store.DomainStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its servers may still write, and end with it, but not at once."""
    command = [sys.executable, "-c", CHILD, kept.repository.path, kept.uuid]
    for seconds, patience in (("2", 60.0), ("4", 0.5)):
        monkeypatch.setattr(lock, "ORPHANED_SECONDS", patience)
        with subprocess.Popen(
            [*command, seconds], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        ) as process:
            assert answer(process) == "ready\n"
            with pytest.raises(errors.RepositoryBusy), kept.lock():
                pass
            process.kill()
        if patience > 1:
            with kept.lock():
                pass
        else:
            with pytest.raises(errors.RepositoryBusy), kept.lock():
                pass


def test_stop_ends_the_wait(kept: store.DomainStore) -> None:
    def stop() -> None:
        raise errors.Interrupted(number=15, signal="SIGTERM")

    with kept.lock(), pytest.raises(errors.Interrupted), kept.lock(wait=60, stop=stop):
        pass


def test_a_link_in_the_locks_place(kept: store.DomainStore, tmp_path: Path) -> None:
    with kept.lock():
        pass
    victim = tmp_path / "victim"
    victim.write_text("precious")
    os.unlink(os.path.join(kept.path, "lock"))
    os.symlink(victim, os.path.join(kept.path, "lock"))
    with pytest.raises(errors.RepositoryError), kept.lock():
        pass
    assert victim.read_text() == "precious"


def test_the_owners_name_holds_no_arguments(kept: store.DomainStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/libvirt-cbt", "-cqemu+ssh://me:secret@host/system"])
    with kept.lock():
        text = Path(kept.path, "lock").read_text()
    assert "libvirt-cbt" in text
    assert "secret" not in text
