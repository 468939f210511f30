"""`run` over real guests: policies, what fails beside what does not, and how it is ended."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest

from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import COMMAND, Ended, Tool, guards, models, same

Make = Callable[..., PlainGuest]


class Runs:
    """The tool with a configuration."""

    def __init__(self, host: daemon.Daemon, folder: Path) -> None:
        self.tool = Tool(host, str(folder / "repository"))
        self.file = folder / "libvirt-cbt.toml"
        self.head = f'repository = "{self.tool.repository}"\nscratch_dir = "{host.scratch}"\n'

    def configure(self, text: str) -> None:
        self.file.write_text(self.head + text, encoding="utf-8")

    def argv(self, *words: str) -> List[str]:
        return [COMMAND, "--config", str(self.file), *words]

    def run(self, *words: str) -> Ended:
        done = subprocess.run(
            self.argv("--json", "run", *words), env=self.tool.environment(), capture_output=True, text=True,
            timeout=300, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return Ended(done.returncode, json.loads(done.stdout), done.stderr)


    def check(self, *words: str) -> Tuple[int, str]:
        """Exit code, and the text before the figures."""
        argv = self.argv("check", *words)
        done = subprocess.run(argv, env=self.tool.environment(), capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout.splitlines()[0].split(" | ")[0]


@pytest.fixture
def runs(libvirtd: daemon.Daemon, tmp_path: Path) -> Runs:
    return Runs(libvirtd, tmp_path)


def by_name(ended: Ended) -> Dict[str, Any]:
    return {one["domain"]: one for one in ended.document["results"]}


def test_every_domain_that_a_policy_matches(runs: Runs, plain_guest: Make, rng: random.Random, tmp_path: Path) -> None:
    web = plain_guest(Disk("vda", 4 * MIB), Disk("vdb", 2 * MIB), name="web1")
    off = plain_guest(Disk("vda", 2 * MIB), name="web-off")
    for name in ("tmp-1", "other"):
        plain_guest(Disk("vda", MIB), name=name, start=False)
    off.random_writes(rng, "vda", 4)
    off.destroy()
    runs.configure("""
        jobs = 3
        [policy.none]
        match = ["tmp-*"]
        skip = true
        [policy.web]
        match = ["web*"]
        exclude_disks = ["vdb", "vdz"]
        keep_last = 1
        verify = 5
    """)
    planned = runs.run("--dry-run")
    assert (planned.code, sorted(by_name(planned))) == (0, ["web-off", "web1"])
    assert runs.tool.run("list").document["results"] == []
    for generation in (1, 2):
        web.random_writes(rng, "vda", 6)
        ended = runs.run()
        assert ended.code == 0, ended.stderr
        found = by_name(ended)
        assert list(found) == ["web-off", "web1"]
        for one in found.values():
            assert (one["policy"], one["code"], one["failures"]) == ("web", 0, [])
            assert one["backup"]["generation"] == generation
            assert [len(one["prune"]["removed"]), one["verify"]["damage"]] == [generation - 1, []]
            assert one["verify"]["backups"] == 1
        assert [d["mode"] for d in found["web1"]["backup"]["disks"] if d["target"] == "vdb"] == ["mark"]
    same(runs.tool.restored(web, "latest", str(tmp_path)), models(web))
    same(runs.tool.restored(off, "latest", str(tmp_path)), models(off))
    left_out = runs.run("web1", "other")
    assert (left_out.code, left_out.document["error"]["kind"]) == (2, "Usage")
    assert "no policy matches it" in left_out.stderr
    assert by_name(left_out)["web1"]["code"] == 0  # the others are done


def test_what_fails_stands_in_nobodys_way(runs: Runs, plain_guest: Make, rng: random.Random, tmp_path: Path) -> None:
    held = plain_guest(Disk("vda", 2 * MIB), name="a-held")
    good = plain_guest(Disk("vda", 2 * MIB), name="b-good")
    runs.configure('[policy.all]\nmatch = ["*"]\nverify = 0\n')
    assert runs.run().code == 0
    good.random_writes(rng, "vda", 4)
    lock = os.open(os.path.join(runs.tool.repository, held.uuid, "lock"), os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    ended = runs.run()
    os.close(lock)
    assert (ended.code, ended.document["error"]["kind"]) == (11, "RepositoryBusy")
    assert (ended.document["error"]["domain"], ended.document["error"]["work"]) == ("a-held", "backup")
    assert "libvirt-cbt: a-held: backup: domain 'a-held' is locked" in ended.stderr
    found = by_name(ended)
    assert [f["code"] for f in found["a-held"]["failures"]] == [11]
    assert found["b-good"]["backup"]["generation"] == 2
    same(runs.tool.restored(good, "latest", str(tmp_path)), models(good))
    runs.configure('[policy.all]\nmatch = ["*"]\nverify = 0\nwait = "60s"\nstrict = true\n')
    assert runs.run().code == 3  # these guests have no agent, which is a warning


def test_two_runs_do_not_overlap_and_a_signal_ends_one_in_order(
    runs: Runs, plain_guest: Make, rng: random.Random, tmp_path: Path
) -> None:
    guests = [plain_guest(Disk("vda", 8 * MIB), name=f"slow{n}") for n in (1, 2, 3)]
    for guest in guests:
        guest.write_bytes("vda", 0, rng.randbytes(8 * MIB))
    runs.configure('jobs = 2\n[policy.all]\nmatch = ["slow*"]\nverify = 0\nbandwidth = "64K"\n')
    first = subprocess.Popen(
        runs.argv("--json", "run"), env=runs.tool.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while sum(bool(guards(guest.uuid)) for guest in guests) < 2:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.1)
    second = runs.run()
    assert (second.code, second.document["error"]["kind"]) == (11, "RunBusy")
    assert str(first.pid) in second.stderr
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 143, err
    ended = json.loads(out)
    assert ended["error"]["kind"] == "Interrupted"
    assert [one["domain"] for one in ended["results"]] == ["slow1", "slow2"]  # the third had not begun
    assert {one["code"] for one in ended["results"]} == {143}
    assert runs.tool.run("list").document["results"] == []
    runs.configure('[policy.all]\nmatch = ["slow*"]\nverify = 0\n')
    assert runs.run().code == 0
    for guest in guests:
        same(runs.tool.restored(guest, "latest", str(tmp_path)), models(guest))
        runs.tool.nothing_left(guest)


def test_a_host_that_does_not_answer_is_one_failure_of_several(runs: Runs, plain_guest: Make) -> None:
    guest = plain_guest(Disk("vda", MIB), name="here")
    gone = "qemu:///system?socket=/nonexistent/libvirt-sock"
    here = f'[host.here]\nconnect = "{runs.tool.host.uri}"\n'
    runs.configure(f'[host.gone]\nconnect = "{gone}"\n{here}[policy.all]\nmatch = ["*"]\nhosts = ["h*", "g*"]\nverify = 0\n')
    environment = {k: v for k, v in runs.tool.environment().items() if k != "LIBVIRT_DEFAULT_URI"}
    done = subprocess.run(
        runs.argv("--json", "run"), env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    document = json.loads(done.stdout)
    assert (done.returncode, document["error"]["kind"]) == (20, "NoHypervisor")
    assert "host gone: cannot reach libvirt" in done.stderr
    (one,) = document["results"]
    assert (one["domain"], one["host"], one["code"]) == (guest.name, "here", 0)


def test_monitoring_misses_what_was_never_backed_up(runs: Runs, plain_guest: Make, tmp_path: Path) -> None:
    plain_guest(Disk("vda", MIB), name="kept", start=False)
    textfile = tmp_path / "libvirt_cbt.prom"
    runs.head += f'textfile = "{textfile}"\n[check]\nwarning_free = 0\ncritical_free = 0\n'
    runs.configure('[policy.all]\nmatch = ["kept", "new"]\n')
    assert runs.run().code == 0
    assert 'libvirt_cbt_backups{domain="kept"' in textfile.read_text()
    assert runs.check() == (0, "LIBVIRT-CBT OK: 1 domains, the newest backup of each at most 0.0 h old")
    plain_guest(Disk("vda", MIB), name="new", start=False)
    assert runs.check() == (2, "LIBVIRT-CBT CRITICAL: new: it was never backed up")
    assert runs.check("--offline")[0] == 0  # the repository alone cannot know


def test_config_shows_what_holds(runs: Runs, plain_guest: Make) -> None:
    plain_guest(Disk("vda", MIB), name="web1", start=False)
    runs.configure('[policy.web]\nmatch = ["web*"]\nshut_off = false\nkeep_daily = 7\n')
    argv = runs.argv("--json", "config")
    shown = json.loads(subprocess.check_output(argv, env=runs.tool.environment(), text=True))["results"]
    assert shown[0]["files"] == [str(runs.file)]
    (web,) = [one for one in shown[1:] if one["domain"] == "web1"]
    assert (web["policy"], web["skipped"], web["rules"]["keep_daily"]) == ("web", "it is off", 7)
    text = subprocess.check_output(runs.argv("config", "web1"), env=runs.tool.environment(), text=True)
    assert "web1: policy web, left out: it is off" in text and "keep_daily = 7" in text
