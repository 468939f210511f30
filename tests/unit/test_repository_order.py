"""The order of writing in the commit protocol, as the kernel saw it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List, Tuple

import pytest

from libvirt_cbt.repository import store
from tests.unit import repository_samples as samples

ROOT = str(Path(__file__).parents[2])
CALLS = "fsync,fdatasync,rename,renameat,renameat2,openat,unlink,unlinkat,mkdir,mkdirat"

SCRIPT = """
import sys
from libvirt_cbt import names
from libvirt_cbt.repository import store
from tests.unit import repository_samples as samples
kept = store.Repository.open(sys.argv[1]).domain(samples.UUID)
with kept.lock():
    print(samples.publish(kept).id)
"""

Event = Tuple[str, str]


def traced(kept: store.DomainStore, log: Path, *inject: str) -> subprocess.CompletedProcess[str]:
    if not shutil.which("strace"):
        pytest.skip("strace is not installed: the order of system calls cannot be seen")
    extra = [word for rule in inject for word in ("-e", f"inject={rule}")]
    done = subprocess.run(
        [
            *("strace", "-f", "-y", "-s", "400", "-o", str(log), "-e", f"trace={CALLS}", *extra),
            *(sys.executable, "-c", SCRIPT, kept.repository.path),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if "Operation not permitted" in done.stderr and "ptrace" in done.stderr.lower():
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    return done


def events(log: Path, root: str) -> List[Event]:
    """(call, path below the repository) in order; of a rename the target; failed calls and reading left out."""
    found = []
    for line in log.read_text().splitlines():
        call = re.match(r"\d+\s+(\w+)\((.*)\)\s+= (\d+)", line)
        if not call or root not in line or (call[1] == "openat" and "O_CREAT" not in line):
            continue
        paths = re.findall(re.escape(root) + r'([^">]*)', call[2])
        found.append((call[1], paths[-1].lstrip("/")))
    return found


def test_the_order_of_a_commit(tmp_path: Path) -> None:
    root = str(tmp_path / "repo")
    kept = store.Repository.init(root).domain(samples.UUID)
    log = tmp_path / "log"
    done = traced(kept, log)
    assert done.returncode == 0, done.stderr
    identity = done.stdout.strip()
    stage, final = f"{samples.UUID}/staging/{identity}", f"{samples.UUID}/backups/{identity}"
    seen = events(log, root)

    def at(call: str, path: str) -> int:
        """When it happened last."""
        return max(i for i, event in enumerate(seen) if event == (call, path))

    renames = [i for i, (call, path) in enumerate(seen) if call.startswith("rename")]
    assert [seen[i][1] for i in renames] == [final]
    commit = renames[0]

    # The domain's directories, and the intent with its directory, before anything else of the run.
    for path in ("", samples.UUID, f"{samples.UUID}/staging"):
        assert at("fsync", path) > -1
    first = [i for i, (_, path) in enumerate(seen) if path.startswith(stage + "/")]
    assert seen[first[0]] == ("openat", f"{stage}/intent.json")
    assert seen[first[0] + 1 : first[0] + 3] == [("fsync", f"{stage}/intent.json"), ("fsync", stage)]

    # Every file is synced after it was made, then the directory that names them, then the rename, then its parents.
    files = ["intent.json", "vda.delta.npy", "vda.contents.npy", "vda.qcow2", "layers.json", "manifest.json"]
    for name in files:
        assert at("openat", f"{stage}/{name}") < at("fsync", f"{stage}/{name}") < at("fsync", stage) < commit, name
    assert at("fsync", f"{stage}/manifest.json") > at("fsync", f"{stage}/vda.qcow2")
    after = seen[commit + 1 :]
    assert after[:2] == [("fsync", f"{samples.UUID}/backups"), ("fsync", f"{samples.UUID}/staging")]
    # The intent goes last: until the rename is durable it proves whose the checkpoint is.
    assert [(c, p) for c, p in after[2:] if c.startswith("unlink")] == [("unlink", f"{final}/intent.json")]
    assert not [p for c, p in after if c == "openat"]


@pytest.mark.parametrize("call", ["fsync", "rename", "unlink"])
def test_a_kill_at_every_call(tmp_path: Path, call: str) -> None:
    """After a SIGKILL at the n-th call there is the generation, whole, or none of it; and the next run succeeds."""
    number = 0
    while True:
        number += 1
        root = str(tmp_path / f"{call}-{number}")
        kept = store.Repository.init(root).domain(samples.UUID)
        done = traced(kept, tmp_path / "log", f"{call}:signal=SIGKILL:when={number}")
        if done.returncode == 0:
            break
        assert done.returncode in {-9, 137}, done.stderr
        with kept.lock():
            found = kept.generations()
            for one in found:
                assert kept.chain(one.id, "vda")
                with kept.deltas("vda", 0, one.generation):
                    pass
            left = kept.leftovers()
            if not found and os.path.isdir(os.path.join(kept.path, "staging")):
                for one_left in left:
                    kept.discard(one_left)
            again = samples.publish(kept)
            assert again.generation == len(found) + 1
    assert number > 1, f"{call} was never called"


def test_an_fsync_that_fails_is_not_tried_again(tmp_path: Path) -> None:
    root = str(tmp_path / "repo")
    kept = store.Repository.init(root).domain(samples.UUID)
    log = tmp_path / "log"
    done = traced(kept, log)
    total = sum(1 for call, _ in events(log, root) if call == "fsync")
    for number in range(4, total + 1):
        one = store.Repository.init(str(tmp_path / str(number))).domain(samples.UUID)
        done = traced(one, log, f"fsync:error=EIO:when={number}")
        assert done.returncode != 0
        assert "RepositoryError" in done.stderr, done.stderr
        failed = [line for line in log.read_text().splitlines() if "INJECTED" in line]
        assert len(failed) == 1
        path = re.findall(r"<([^>]*)>", failed[0])[0]
        lines = log.read_text().splitlines()
        later = lines[lines.index(failed[0]) + 1 :]
        # Its file is not synced again (a directory may be: when staging is removed).
        assert os.path.basename(path) not in {"manifest.json", "layers.json", "vda.qcow2"} or not any(
            "fsync(" in line and f"<{path}>" in line for line in later
        )
