"""Generations of a guest that is off: in one sequence with those of the running guest, and right after any crash."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Set, Tuple

import libvirt
import libvirt_qemu
import pytest

from tests.faults import tracer
from tests.guests import daemon
from tests.guests.plain import MIB, SECTOR, Disk, PlainGuest
from tests.libvirt.test_generations import _write, changed, covers, touched
from tests.libvirt.tool import Ended, Tool, models, same


@pytest.fixture
def guest(libvirtd: daemon.Daemon) -> Iterator[PlainGuest]:
    disks = [Disk("vda", 4 * MIB), Disk("vdb", MIB + 17 * 512, options=("cluster_size=512",))]
    with PlainGuest(libvirtd, "plain", disks) as made:
        made.define()
        made.start()
        yield made


def write_off(guest: PlainGuest, rng: random.Random, target: str) -> Tuple[int, int]:
    """A write to the image of a guest that is off, as virt-customize would: QEMU's tools record it in the bitmaps."""
    disk = guest.disks[target]
    length = min(disk.size, SECTOR * rng.choice((1, 8, 128, 129, 300)))
    offset = SECTOR * rng.randint(0, (disk.size - length) // SECTOR)
    pattern = rng.choice((None, rng.randint(1, 255)))
    command = f"write -z {offset} {length}" if pattern is None else f"write -P {pattern} {offset} {length}"
    subprocess.run(["qemu-io", "-f", disk.fmt, "-c", command, disk.path], check=True, capture_output=True)
    disk.model[offset : offset + length] = bytes([pattern or 0]) * length
    return offset, length


def write_any(guest: PlainGuest, rng: random.Random, target: str) -> Tuple[int, int]:
    return _write(guest, rng, target) if guest.running else write_off(guest, rng, target)


def run(tool: Tool, verb: str, guest: PlainGuest, *arguments: str) -> Ended:
    scratch = ("--scratch-dir", tool.host.scratch) if verb == "mark" else ()
    return tool.run(verb, guest.name, *arguments, *scratch)


def bitmaps(path: str) -> Set[str]:
    found = json.loads(subprocess.check_output(["qemu-img", "info", "-U", "-f", "qcow2", "--output=json", path]))
    return {b["name"] for b in found["format-specific"]["data"].get("bitmaps", [])}


def tidy(tool: Tool, guest: PlainGuest, checkpoint: str) -> None:
    """Of ours there is the newest checkpoint alone: in libvirt, and in every qcow2 image or in QEMU."""
    tool.nothing_left(guest)
    assert [c.getName() for c in guest.domain.listAllCheckpoints()] == [checkpoint]
    if guest.running:
        said = libvirt_qemu.qemuMonitorCommand(guest.domain, '{"execute":"query-named-block-nodes"}', 0)
        found = {b["name"] for node in json.loads(said)["return"] for b in node.get("dirty-bitmaps", [])}
        assert found == {checkpoint}
        return
    for disk in guest.disks.values():
        if disk.fmt == "qcow2" and "compat=0.10" not in disk.options:
            assert bitmaps(disk.path) == {checkpoint}, disk.target


def modes(made: Any) -> List[str]:
    return [d["mode"] for d in made["disks"]]


def contents(folder: str) -> Dict[str, bytes]:
    return {name: Path(folder, name).read_bytes() for name in sorted(os.listdir(folder))}


def test_generations_of_a_guest_that_runs_and_rests_are_one_sequence(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    held: Dict[int, Dict[str, bytes]] = {}
    written: Dict[int, Dict[str, List[Tuple[int, int]]]] = {}
    backups: List[int] = []
    last = 10
    for generation in range(1, last + 1):
        writes: Dict[str, List[Tuple[int, int]]] = {target: [] for target in guest.disks}
        for switched in (False, True):
            if switched and rng.random() < 0.6:
                guest.destroy() if guest.running else guest.start()
            for target in guest.disks:
                writes[target] += [write_any(guest, rng, target) for _ in range(rng.randint(0, 3))]
        if rng.random() < 0.2:
            guest.host.restart()
        verb = rng.choice(("backup", "mark"))
        made = run(tool, verb, guest).result
        assert made["generation"] == generation
        identity = made["backup"] if verb == "backup" else made["id"]
        tidy(tool, guest, f"cbt-{identity}")
        if verb == "backup":
            expected = "incremental" if backups else "full"
            assert modes(made) == [expected] * 2, [d["reason"] for d in made["disks"]]
            backups.append(generation)
        held[generation], written[generation] = models(guest), writes
    for target in guest.disks:
        for since, until in itertools.combinations_with_replacement(range(1, last + 1), 2):
            answer = changed(tool, guest, target, "--since", str(since), "--until", str(until))
            covers(answer, held[since][target], held[until][target])
            told = {
                s for e in answer["extents"] for s in range(e["offset"] // 512, -(-(e["offset"] + e["length"]) // 512))
            }
            between = [w for g in range(since + 1, until + 1) for w in written[g][target]]
            assert told <= touched(between, answer["granularity"], answer["capacity"]), "more than was written"
        covers(changed(tool, guest, target, "--since", "*"), b"", held[last][target])
    for generation in backups:
        same(tool.restored(guest, str(generation), str(tmp_path)), held[generation])
    assert tool.run("verify", guest.name).result["damage"] == []


def test_where_nothing_was_written_the_delta_is_empty(tool: Tool, guest: PlainGuest, rng: random.Random) -> None:
    for target in guest.disks:
        guest.random_writes(rng, target, 4)
    tool.backup(guest)
    guest.destroy()
    estimate = tool.backup(guest, "--dry-run")
    assert modes(estimate) == ["incremental"] * 2 and "guest is off" in estimate["warnings"][0]
    for verb in ("mark", "backup"):
        made = run(tool, verb, guest).result
        assert [d["dirty_bytes"] for d in made["disks"]] == [0, 0]
        tidy(tool, guest, f"cbt-{made['backup'] if verb == 'backup' else made['id']}")
    for target in guest.disks:
        assert changed(tool, guest, target, "--since", "1")["extents"] == []
    status = tool.run("status", guest.name).result
    assert [(d["tracked"], d["dirty_bytes"]) for d in status["disks"]] == [(True, None)] * 2
    checks = {c["name"]: c["status"] for c in tool.run("doctor", guest.name).result["checks"]}
    assert (checks["state"], checks["images"]) == ("ok", "ok")


def test_the_first_backup_may_be_of_a_guest_that_is_off(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    guest.random_writes(rng, "vda", 5)
    guest.destroy()
    first = tool.backup(guest)
    assert modes(first) == ["full"] * 2
    tidy(tool, guest, first["checkpoint"])
    before = models(guest)
    guest.start()
    guest.random_writes(rng, "vda", 5)
    second = tool.backup(guest)
    assert modes(second) == ["incremental"] * 2
    tidy(tool, guest, second["checkpoint"])
    covers(changed(tool, guest, "vda", "--since", "1"), before["vda"], models(guest)["vda"])
    same(tool.restored(guest, "1", str(tmp_path)), before)
    same(tool.restored(guest, "2", str(tmp_path)), models(guest))


@pytest.mark.parametrize("how", ["killed", "removed", "disabled", "older image"])
def test_a_bitmap_that_cannot_be_counted_on_makes_the_disk_full(
    how: str, tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    disk = guest.disks["vda"]
    guest.destroy()
    older, model = str(tmp_path / "older"), bytes(disk.model)
    shutil.copy(disk.path, older)
    guest.start()
    guest.random_writes(rng, "vda", 5)
    newest = tool.backup(guest)["checkpoint"]
    guest.destroy()
    if how == "killed":
        guest.start()
        guest.random_writes(rng, "vda", 2)
        guest.flush("vda")
        guest.kill()
    elif how == "older image":
        shutil.copyfile(older, disk.path)
        disk.model[:] = model
    else:
        subprocess.run(["qemu-img", "bitmap", f"--{how[:-1]}", "-f", "qcow2", disk.path, newest], check=True)
    if how == "disabled":
        write_off(guest, rng, "vda")
    status = tool.run("status", guest.name).result["disks"][0]
    made = tool.backup(guest)
    first = made["disks"][0]
    reason = {"killed": "was not saved", "disabled": "was disabled"}.get(how)
    assert first["mode"] == "full" and (reason or "missing or broken in") in first["reason"]
    assert not status["tracked"] and (reason or "is not in the image") in status["reason"]
    assert modes(made)[1] == ("full" if how == "killed" else "incremental")
    tidy(tool, guest, made["checkpoint"])
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    refused = tool.run("changed", guest.name, "vda", "--since", "1")
    assert (refused.code, refused.document["error"]["kind"]) == (12, "LineageBroken")
    guest.start()
    guest.random_writes(rng, "vda", 3)
    assert modes(tool.backup(guest)) == ["incremental"] * 2
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


@contextmanager
def opened_by_somebody(path: str, folder: Path, *arguments: str) -> Iterator[int]:
    socket = str(folder / "foreign.sock")
    server = subprocess.Popen(["qemu-nbd", "-t", "-f", "qcow2", "-k", socket, *arguments, path])
    try:
        deadline = time.monotonic() + 30
        while not os.path.exists(socket):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield server.pid
    finally:
        server.terminate()
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.mark.parametrize("arguments", [(), ("-r",)])
def test_an_image_in_use_is_busy_and_left_alone(
    arguments: Tuple[str, ...], tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    guest.random_writes(rng, "vdb", 5)
    checkpoint = tool.backup(guest)["checkpoint"]
    guest.destroy()
    write_off(guest, rng, "vda")
    path = guest.disks["vdb"].path
    with opened_by_somebody(path, tmp_path, *arguments) as pid:
        busy = tool.run("backup", guest.name)
        assert (busy.code, busy.document["error"]["kind"]) == (11, "ImageInUse")
        facts = busy.document["error"]
        assert (facts["target"], facts["path"], facts["holder"]) == ("vdb", path, f"qemu-nbd (process {pid})")
        tidy(tool, guest, checkpoint)
    made = tool.backup(guest)
    assert modes(made) == ["incremental"] * 2
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


def first_do(tmp_path: Path, program: str, command: str) -> Dict[str, str]:
    """An environment in which a program of QEMU's runs a command, once, before it begins."""
    folder = tmp_path / "first"
    folder.mkdir()
    wrapper, real, marker = folder / program, shutil.which(program), folder / "done"
    wrapper.write_text(f'#!/bin/sh\n[ -e {marker} ] || {{ : >{marker}; {command} >&2; }}\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("how", ["runs", "killed", "off again"])
def test_a_guest_that_is_started_between_bitmap_and_reading(
    how: str,
    tool: Tool,
    guest: PlainGuest,
    rng: random.Random,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest.random_writes(rng, "vda", 5)
    checkpoint = tool.backup(guest)["checkpoint"]
    guest.destroy()
    virsh = f"virsh -q -c '{tool.host.uri}'"
    write = f"qemu-monitor-command {guest.name} --hmp 'qemu-io -d /machine/peripheral/ua-vda/virtio-backend \"write -P 7 64k 64k\"'"
    # Whole lines (-ww): a worker of pytest-xdist has COLUMNS from the readline that pytest loads, and ps goes by that.
    found = f"ps -ww -eo pid,args | awk '/[q]emu-system.*{guest.uuid}/ {{print $1}}'"
    then = {
        "runs": "",
        "killed": f"; until p=$({found}); kill -9 $p; do sleep 0.1; done; while kill -0 $p 2>/dev/null; do sleep 0.1; done",
        "off again": f"; {virsh} destroy {guest.name}",
    }[how]
    extra = first_do(
        tmp_path, "qemu-storage-daemon", f"unset LD_LIBRARY_PATH; {virsh} start {guest.name}; {virsh} {write}{then}"
    )
    for key, value in extra.items():
        monkeypatch.setenv(key, value)
    ended = tool.run("backup", guest.name)
    monkeypatch.undo()
    guest.disks["vda"].model[65536:131072] = b"\7" * 65536
    if how == "off again":
        # What was written in between is read, and counted twice.
        assert modes(ended.result) == ["incremental"] * 2
        same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
        tidy(tool, guest, ended.result["checkpoint"])
        guest.start()
    elif how == "killed":
        guest.wait_until_off()
        assert ended.code == 20 and "inconsistent" in ended.stderr, ended
        assert len(tool.run("list", guest.name).result["generations"]) == 1
        tool.nothing_left(guest)
        guest.disks["vda"].model[:] = guest.read_back("vda")  # QEMU died without a flush: it may hold the write or not
        assert modes(tool.backup(guest)) == ["full"] * 2
        same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
        guest.start()
    else:
        assert (ended.code, ended.document["error"]["kind"]) == (11, "ImageInUse"), ended
        assert "qemu-system" in ended.stderr
        tidy(tool, guest, checkpoint)
    guest.random_writes(rng, "vda", 3)
    assert modes(tool.backup(guest)) == ["incremental"] * 2
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


def test_a_domain_that_is_edited_between_plan_and_reading(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.random_writes(rng, "vda", 5)
    checkpoint = tool.backup(guest)["checkpoint"]
    guest.destroy()
    command = f"virsh -q -c '{tool.host.uri}' detach-disk {guest.name} vdb --config"
    for key, value in first_do(tmp_path, "qemu-storage-daemon", command).items():
        monkeypatch.setenv(key, value)
    ended = tool.run("backup", guest.name)
    assert (ended.code, ended.document["error"]["kind"]) == (13, "SourceLost"), ended
    assert "another image" in ended.stderr
    tidy(tool, guest, checkpoint)


def test_the_guest_cannot_start_while_it_is_read_and_the_backup_is_right(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    guest.random_writes(rng, "vda", 5)
    guest.destroy()
    refused: List[str] = []

    def at(point: tracer.Point, _what: str, _pid: int) -> None:
        if point == tracer.Point("nbd", 20):
            with pytest.raises(libvirt.libvirtError) as caught:
                guest.start()
            refused.append(str(caught.value))

    ended = tracer.run(tool.argv("backup", guest.name)[1:], tool.environment(), at)
    assert ended.code == 0, ended
    assert "lock" in refused[0]
    tool.nothing_left(guest)
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    guest.start()
    guest.random_writes(rng, "vda", 3)
    assert modes(tool.backup(guest)) == ["incremental"] * 2
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


def test_disks_without_bitmaps_are_full_and_left_out_ones_marks(
    tool: Tool, libvirtd: daemon.Daemon, rng: random.Random, tmp_path: Path
) -> None:
    disks = [
        Disk("vda", MIB),
        Disk("vdb", MIB, fmt="raw"),
        Disk("vdc", MIB, options=("compat=0.10",)),
        Disk("vdd", MIB),
    ]
    with PlainGuest(libvirtd, "kinds", disks) as guest:
        guest.define()
        guest.start()
        for target in guest.disks:
            guest.random_writes(rng, target, 3)
        tool.backup(guest)
        guest.destroy()
        for target in guest.disks:
            write_off(guest, rng, target)
        made = tool.backup(guest, "--exclude", "vdd")
        found = {d["target"]: (d["mode"], d["reason"]) for d in made["disks"]}
        assert found["vda"] == ("incremental", None) and found["vdd"] == ("mark", None)
        assert found["vdb"] == ("full", "a raw image cannot hold a bitmap")
        assert found["vdc"][0] == "full" and "version 2" in found["vdc"][1]
        tidy(tool, guest, made["checkpoint"])
        held = models(guest)
        del held["vdd"]
        same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
        write_off(guest, rng, "vdd")
        marked = run(tool, "mark", guest).result
        assert [d["target"] for d in marked["disks"]] == ["vda", "vdd"]
        guest.start()
        guest.random_writes(rng, "vdd", 2)
        made = tool.backup(guest)
        assert {d["target"]: d["mode"] for d in made["disks"]} == {
            "vda": "incremental",
            "vdb": "full",
            "vdc": "full",
            "vdd": "incremental",
        }
        same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


def _backed(disk: Disk, folder: Path, rng: random.Random, *, recorded: bool) -> None:
    """Puts a raw base with a qcow2 header in it below the disk's image: nobody may look what it is."""
    base = folder / f"{disk.target}.base"
    weapon = folder / "weapon.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", str(weapon), str(disk.size)]
    subprocess.run(argv, check=True)
    content = bytearray(weapon.read_bytes().ljust(disk.size, b"\0"))
    content[MIB // 2 : MIB] = rng.getrandbits(4 * MIB).to_bytes(MIB // 2, "little")
    base.write_bytes(content)
    base.chmod(stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IROTH)
    os.unlink(disk.path)
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", disk.path]
    subprocess.run(argv, check=True)
    if not recorded:
        image = bytearray(Path(disk.path).read_bytes())
        at = image.index(b"\xe2\x79\x2a\xca")  # the header extension with the format's name
        image[at : at + 4] = b"\x11\x11\x11\x11"  # unknown ones are skipped
        Path(disk.path).write_bytes(image)
    disk.model[:] = content


@pytest.mark.parametrize("recorded", [True, False])
def test_backing_files_are_read_as_their_format_is_recorded_or_not_at_all(
    recorded: bool, tool: Tool, libvirtd: daemon.Daemon, rng: random.Random, tmp_path: Path
) -> None:
    with PlainGuest(libvirtd, "backed", [Disk("vda", MIB), Disk("vdb", MIB)]) as guest:
        _backed(guest.disks["vda"], Path(guest.folder), rng, recorded=recorded)
        guest.define()
        if not recorded:
            ended = tool.run("backup", guest.name)
            assert (ended.code, ended.document["error"]["kind"]) == (20, "ImageUnreadable")
            assert "format" in ended.stderr and "--exclude vda" in ended.stderr
            assert bitmaps(guest.disks["vda"].path) == set()
            made = tool.backup(guest, "--exclude", "vda")
            assert [d["target"] for d in made["disks"]] == ["vdb"]
            return
        tool.backup(guest)
        same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
        write_off(guest, rng, "vda")
        assert modes(tool.backup(guest)) == ["incremental"] * 2
        same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
        guest.start()
        guest.random_writes(rng, "vda", 3)
        assert modes(tool.backup(guest)) == ["incremental"] * 2
        same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


def test_after_an_external_snapshot_the_bitmap_is_in_two_images(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    guest.random_writes(rng, "vda", 3)
    tool.backup(guest)
    guest.random_writes(rng, "vda", 3)
    overlay = os.path.join(guest.folder, "overlay.qcow2")
    guest.domain.snapshotCreateXML(
        f"<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{overlay}'/></disk>"
        "<disk name='vdb' snapshot='no'/></disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
    )
    guest.random_writes(rng, "vda", 3)
    guest.destroy()
    made = tool.backup(guest)
    assert modes(made) == ["full", "incremental"] and "two images" in made["disks"][0]["reason"]
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    # The older checkpoint waits: the backing file may be others', too, and a running QEMU knows.
    assert len(guest.domain.listAllCheckpoints()) == 2
    refused = tool.run("untrack", guest.name)
    assert (refused.code, refused.document["error"]["kind"]) == (20, "BitmapBelow")
    assert "start the guest" in refused.stderr and "--exclude" not in refused.stderr
    assert len(guest.domain.listAllCheckpoints()) == 2, "all of them or none, in whichever order libvirt lists them"
    assert [tool.run(*words).code for words in (["mark", guest.name], ["backup", guest.name])] == [0, 0]
    pruned = tool.run("prune", guest.name, "--keep-last", "1", "--forget").result
    assert (len(pruned["removed"]), pruned["forgotten"]) == (2, []), "what proves a checkpoint to be ours stays with it"
    guest.start()
    guest.random_writes(rng, "vda", 3)
    assert modes(tool.backup(guest)) == ["incremental"] * 2
    tool.nothing_left(guest)
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


def test_a_saved_guest_is_backed_up_and_wakes_as_it_was(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    guest.random_writes(rng, "vda", 3)
    tool.backup(guest)
    guest.random_writes(rng, "vda", 3)
    guest.domain.managedSave(0)
    assert not guest.running
    made = tool.backup(guest)
    assert modes(made) == ["incremental"] * 2
    assert "saved" in made["warnings"][0]
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    assert guest.domain.hasManagedSaveImage()
    guest.start()
    guest.random_writes(rng, "vda", 3)
    made = tool.backup(guest)
    assert modes(made) == ["incremental"] * 2
    tidy(tool, guest, made["checkpoint"])
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    guest.check()


def test_agent_is_satisfied_by_an_orderly_end_alone(tool: Tool, guest: PlainGuest) -> None:
    guest.destroy()
    ended = tool.run("backup", guest.name, "--quiesce", "agent")
    assert (ended.code, ended.document["error"]["kind"]) == (17, "NotConsistent")
    assert "switched off" in ended.stderr
    assert tool.backup(guest, "--quiesce", "none")["warnings"] == []
    assert tool.backup(guest)["warnings"] == ["crash-consistent only: the guest was switched off, not shut down"]
    guest.start()
    with suppress(libvirt.libvirtError):  # the answer may be lost
        guest.hmp("quit")  # libvirt is told of a shutdown
    guest.wait_until_off()
    made = tool.backup(guest, "--quiesce", "agent")
    assert (made["quiesce"]["result"], made["warnings"]) == ("none", [])


def test_a_point_is_left_open_of_running_guests_only(tool: Tool, guest: PlainGuest) -> None:
    guest.destroy()
    ended = tool.run("start", guest.name)
    assert (ended.code, ended.document["error"]["kind"]) == (20, "NotRunning")


# Crashes


def _kill(tool: Tool, guest: PlainGuest, here: Callable[[tracer.Point, str], bool], verb: str = "backup") -> None:
    def at(point: tracer.Point, what: str, pid: int) -> None:
        if here(point, what):
            os.kill(pid, signal.SIGKILL)

    argv = tool.argv(verb, guest.name)[1:]
    ended = tracer.run(argv, tool.environment(), at)
    assert ended.code in (0, -signal.SIGKILL), ended


def _repaired(tool: Tool, guest: PlainGuest, rng: random.Random, folder: str, how: str) -> None:
    """The next run is right whether the guest rests or runs: an increment, all of it, and nothing is left."""
    known = len(tool.run("list", guest.name).document.get("results", [{"generations": []}])[0]["generations"])
    if known == 2:
        same(tool.restored(guest, "2", folder), models(guest))
    if how == "on":
        guest.start()
    elif how == "recover":
        assert tool.run("recover", guest.name).result["left"] == []
        tool.nothing_left(guest)
        names = {c.getName() for c in guest.domain.listAllCheckpoints()}
        assert len(names) == 1 and all(bitmaps(d.path) == names for d in guest.disks.values())
    for target in guest.disks:
        write_any(guest, rng, target)
    made = tool.backup(guest)
    assert modes(made) == ["incremental"] * 2, [d["reason"] for d in made["disks"]]
    tidy(tool, guest, made["checkpoint"])
    same(tool.restored(guest, "latest", folder), models(guest))


@pytest.mark.parametrize("how", ["off", "on", "recover"])
def test_a_run_that_is_killed_anywhere_is_put_right(
    how: str, tool: Tool, libvirtd: daemon.Daemon, rng: random.Random, tmp_path: Path
) -> None:
    """A sample of the points at which the tool acts; CBT_OFFLINE_POINTS=all tries each."""
    with PlainGuest(libvirtd, "killed", [Disk("vda", MIB), Disk("vdb", MIB + 512)]) as guest:
        guest.define()
        guest.start()
        guest.random_writes(rng, "vda", 3)
        tool.backup(guest)
        guest.destroy()
        everything = [
            p
            for p, _ in tracer.points(tool.argv("backup", guest.name)[1:], tool.environment())[1]
            if p.kind in ("spawn", "libvirt", "rename", "unlink", "rmdir", "mkdir")
        ]
        asked = os.environ.get("CBT_OFFLINE_POINTS", "6")
        chosen = everything if asked == "all" else rng.sample(everything, int(asked))
        for number, point in enumerate(chosen):
            fresh = Tool(libvirtd, str(tmp_path / f"repository-{number}"))
            for checkpoint in guest.domain.listAllCheckpoints() if guest.running else []:
                checkpoint.delete(0)
            if not guest.running:
                guest.start()
                for checkpoint in guest.domain.listAllCheckpoints():
                    checkpoint.delete(0)
            fresh.backup(guest)
            guest.destroy()
            write_off(guest, rng, "vda")
            print("killed at", point)
            _kill(fresh, guest, lambda here, _, point=point: here == point)  # type: ignore[misc]
            _repaired(fresh, guest, rng, str(tmp_path), how)


def test_what_a_running_guest_s_run_left_is_removed_from_the_images_of_the_resting_one(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    guest.random_writes(rng, "vda", 3)
    first = tool.backup(guest)["checkpoint"]
    guest.random_writes(rng, "vda", 3)
    _kill(tool, guest, lambda point, _: point == tracer.Point("nbd", 12))
    assert len(guest.domain.listAllCheckpoints()) == 2
    guest.destroy()
    assert tool.run("recover", guest.name).result["left"] == []
    tidy(tool, guest, first)
    made = tool.backup(guest)
    assert modes(made) == ["incremental"] * 2
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


def test_a_bitmap_in_an_image_that_has_moved_away_is_left_until_it_can_be_removed(
    tool: Tool, guest: PlainGuest, rng: random.Random, tmp_path: Path
) -> None:
    """The intent names the path: the bitmap goes as soon as nobody has that image open."""
    tool.backup(guest)
    guest.destroy()
    _kill(tool, guest, lambda point, _: point == tracer.Point("spawn", 8))
    detached = guest.disks["vdb"].path
    if len(bitmaps(detached)) != 2:
        pytest.fail("the point has moved: no new bitmap in the image")
    guest.detach("vdb")
    with opened_by_somebody(detached, tmp_path):
        ended = tool.run("recover", guest.name).result
        assert "in use" in ended["left"][0]
    assert tool.run("recover", guest.name).result["left"] == []
    assert len(bitmaps(detached)) == 1  # that of the published generation
    tool.nothing_left(guest)
