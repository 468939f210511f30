"""An administrator's scripts at each phase of a run, and what their exit codes do to it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any, Callable, Dict, List

from libvirt_cbt import scripts
from tests.guests import plain
from tests.libvirt.tool import Tool, models, same

RECORD = 'cat > "{folder}/$(date +%s%N).$LIBVIRT_CBT_PHASE"; env -0 > "{folder}/env.$LIBVIRT_CBT_PHASE"'


class Recorded:
    """Scripts in every phase that write down what they were told."""

    def __init__(self, tool: Tool, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        for phase in scripts.PHASES:
            tool.script(phase, "10_record", RECORD.format(folder=folder))

    def taken(self) -> List[Dict[str, Any]]:
        """What was told since this was last asked, in order."""
        files = sorted(path for path in self.folder.iterdir() if not path.name.startswith("env"))
        found = [json.loads(path.read_text()) for path in files]
        for path in files:
            path.unlink()
        return found

    def phases(self) -> List[str]:
        return [told["phase"] for told in self.taken()]

    def environment(self, phase: str) -> Dict[str, str]:
        pairs = (self.folder / f"env.{phase}").read_text().rstrip("\0").split("\0")
        return dict(pair.split("=", 1) for pair in pairs)


def test_each_phase_in_its_order_and_what_its_scripts_are_told(
    tool: Tool, plain_guest: Callable[..., plain.PlainGuest], tmp_path: Path, rng: random.Random
) -> None:
    guest = plain_guest(plain.Disk("vda"), plain.Disk("vdb", serial="volume-7"), name="a 'b' $(c)")
    recorded = Recorded(tool, tmp_path / "told")
    made = tool.backup(guest)
    told = {one["phase"]: one for one in recorded.taken()}
    # It has no agent: nothing was frozen, and both ends of the bracket are there all the same.
    assert list(told) == ["preflight", "pre-freeze", "post-thaw", "ready", "disk-done", "committed"]
    for one in told.values():
        assert (one["version"], one["verb"], one["backup"], one["generation"]) == (1, "backup", made["backup"], 1)
        assert one["domain"] == {"name": guest.name, "uuid": guest.uuid, "instance": None}
        assert one["repository"] == tool.repository
    assert [(d["target"], d["serial"], d["mode"]) for d in told["preflight"]["disks"]] == [
        ("vda", None, "full"),
        ("vdb", "volume-7", "full"),
    ]
    assert set(told["ready"]["exports"]) == {"vda", "vdb"}
    assert told["disk-done"]["disk"]["target"] == "vdb"
    assert told["committed"]["result"]["disks"] == made["disks"]
    known = recorded.environment("disk-done")
    for name, value in {
        "PHASE": "disk-done",
        "VERB": "backup",
        "DOMAIN": guest.name,
        "UUID": guest.uuid,
        "BACKUP": made["backup"],
        "GENERATION": "1",
        "DISK": "vdb",
        "REPO": tool.repository,
    }.items():
        assert known[f"LIBVIRT_CBT_{name}"] == value
    assert known["LIBVIRT_DEFAULT_URI"] == told["ready"]["uri"] == tool.host.uri
    # A mark, an open point, a new lineage.
    scratch = ("--scratch-dir", tool.host.scratch)
    tool.run("mark", guest.name, *scratch).result  # noqa: B018
    assert recorded.phases() == ["preflight", "pre-freeze", "post-thaw", "ready", *["disk-done"] * 2, "committed"]
    tool.run("start", guest.name, *scratch).result  # noqa: B018
    assert recorded.phases() == ["preflight", "pre-freeze", "post-thaw", "ready"]
    tool.run("stop", guest.name).result  # noqa: B018
    assert recorded.phases() == ["committed"]
    tool.run("untrack", guest.name).result  # noqa: B018
    tool.backup(guest)
    *_, reset, committed = recorded.taken()
    assert (reset["phase"], committed["phase"]) == ("lineage-reset", "committed")
    assert [(r["target"], "no longer has checkpoint" in r["reason"]) for r in reset["resets"]] == [("vda", True), ("vdb", True)]
    # A guest that is off, and a dry run.
    guest.random_writes(rng, "vda", 3)
    guest.destroy()
    tool.run("backup", guest.name, "--dry-run").result  # noqa: B018
    assert recorded.phases() == []
    assert not tool.backup(guest)["warnings"][1:]
    assert recorded.phases() == ["preflight", "ready", *["disk-done"] * 2, "committed"]
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


def test_what_fails_is_told(tool: Tool, plain_guest: Callable[..., plain.PlainGuest], tmp_path: Path) -> None:
    guest = plain_guest(plain.Disk("vda"), name="told")
    recorded = Recorded(tool, tmp_path / "told")
    assert tool.run("backup", "no-such-guest").code == 10
    (one,) = recorded.taken()
    assert (one["phase"], one["domain"]["name"], one["error"]["kind"]) == ("failed", "no-such-guest", "NoSuchDomain")
    assert recorded.environment("failed")["LIBVIRT_CBT_ERROR"].startswith("no domain 'no-such-guest'")
    assert tool.run("backup", guest.name, "--compress", "lzma").code == 2
    assert recorded.taken() == []  # the command line made no sense: nothing was tried


def test_a_script_stops_the_run_and_nothing_is_left(
    tool: Tool, plain_guest: Callable[..., plain.PlainGuest], tmp_path: Path
) -> None:
    guest = plain_guest(plain.Disk("vda"), name="stopped")
    guest.write("vda", 0, 65536, 0x11)
    recorded = Recorded(tool, tmp_path / "told")
    for phase in ("preflight", "pre-freeze", "post-thaw", "ready", "disk-done"):
        no = tool.script(phase, "05_no", "echo 'not before six' >&2; exit 2")
        ended = tool.run("backup", guest.name)
        assert ended.code == 18, phase
        error = ended.document["error"]
        assert (error["kind"], error["phase"], error["script"]) == ("HookStopped", phase, str(no))
        assert error["reason"] == "not before six"
        tool.nothing_left(guest, checkpoints=0)
        told = recorded.phases()
        assert told[-1] == "failed"
        assert ("post-thaw" in told) == (phase in ("pre-freeze", "ready", "disk-done"))
        no.unlink()
    assert tool.backup(guest)["generation"] == 1
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


def test_what_goes_wrong_otherwise_is_a_warning(
    tool: Tool, plain_guest: Callable[..., plain.PlainGuest], tmp_path: Path
) -> None:
    guest = plain_guest(plain.Disk("vda"), name="warned")
    paths = [
        tool.script("preflight", "10_fails", "echo 'no\033[31m disk'; exit 1"),
        tool.script("ready", "10_odd", "exit 42"),
        tool.script("committed", "10_late", "echo too late; exit 2"),
        tool.script("committed", "20_inside", f'COMMAND mark "$LIBVIRT_CBT_UUID" --scratch-dir {tool.host.scratch}'),
        tool.script("disk-done", "10_open", "touch ran"),
    ]
    paths[-1].chmod(0o777)
    paths[3].write_text(paths[3].read_text().replace("COMMAND", tool.argv("")[0]))
    made = tool.backup(guest)
    assert made["warnings"] == [
        f"{paths[4]} is not run: it may be written by others (mode 0777); run `chmod go-w` on it",
        f"preflight: {paths[0]} failed: no\\x1b[31m disk",
        f"ready: {paths[1]} failed with exit code 42",
        "crash-consistent only: it has no guest agent channel (org.qemu.guest_agent.0)",
        f"committed: {paths[2]} failed with exit code 2: too late",
    ]
    shown = tool.run("show", guest.name, "--at", "1").result
    assert [g["generation"] for g in tool.run("list", guest.name).result["generations"]] == [1]
    paths[2].unlink()  # a 2 keeps the others from running
    assert tool.backup(guest)["generation"] == 2
    # The script in `committed` has made a mark, with this repository and connection; under it no scripts have run.
    assert [g["generation"] for g in tool.run("list", guest.name).result["generations"]] == [1, 2, 3]
    assert "too late" not in json.dumps(shown)
    assert not os.path.exists("/ran")


def test_a_signal_ends_a_script_and_the_run(
    tool: Tool, plain_guest: Callable[..., plain.PlainGuest], tmp_path: Path
) -> None:
    guest = plain_guest(plain.Disk("vda"), name="signalled")
    waits = tool.script("ready", "10_waits", f"touch {tmp_path}/waits; sleep 3600")
    thaw = tool.script("post-thaw", "10_thaw", f"echo thawed >> {tmp_path}/thawed")
    process = tool.start("backup", guest.name)
    while not (tmp_path / "waits").exists():
        assert process.poll() is None
    process.terminate()
    assert process.wait(60) == 143
    tool.nothing_left(guest, checkpoints=0)
    assert (tmp_path / "thawed").read_text() == "thawed\n"
    waits.unlink()
    thaw.unlink()
    assert not tool.backup(guest)["warnings"][1:]
