"""`restore` as a user runs it: to files, devices, exports and pipes; and of what is damaged all that is good."""

from __future__ import annotations

import json
import os
import random
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest, first_difference
from tests.libvirt.tool import COMMAND, Ended, Tool, models, same

History = Tuple[Tool, str, List[Tuple[str, Dict[str, bytes]]]]
OLD = b"\xee"


@pytest.fixture(scope="module")
def history(private_libvirtd: daemon.Daemon, tmp_path_factory: pytest.TempPathFactory) -> History:
    """A repository of four backups of a guest that is gone: the tool, its UUID, and (id, models) of each."""
    dice = random.Random(int(os.environ.get("CBT_TEST_SEED") or 7))
    if private_libvirtd.pid is None:
        private_libvirtd.start()
    tool = Tool(private_libvirtd, str(tmp_path_factory.mktemp("kept") / "repository"))
    disks = [Disk("vda", 6 * MIB), Disk("vdb", 3 * MIB + 17 * 512, options=("cluster_size=512",))]
    kept = []
    with PlainGuest(private_libvirtd, "plain", disks) as guest:
        guest.define()
        guest.start()
        # Data that does not compress: a flipped byte is then almost always one of the guest's.
        guest.write_bytes("vda", 0, dice.randbytes(2 * MIB))
        for generation in range(4):
            for target in guest.disks:
                guest.random_writes(dice, target, 10)
            guest.write_bytes("vda", generation * MIB + 65536 // 2, dice.randbytes(3 * 65536))
            made = tool.backup(guest)
            kept.append((made["backup"], models(guest)))
    return tool, guest.uuid, kept


@pytest.fixture
def copied(history: History, tmp_path: Path) -> History:
    """The same in a copy that may be damaged."""
    tool, uuid, kept = history
    folder = str(tmp_path / "copy")
    subprocess.run(["cp", "-a", tool.repository, folder], check=True)
    copy = Tool.__new__(Tool)
    copy.host, copy.repository = tool.host, folder
    return copy, uuid, kept


def restored(tool: Tool, *arguments: str) -> Ended:
    return tool.run("restore", "plain", *arguments)


def good_but_for(content: bytes, model: bytes, damage: List[Any]) -> None:
    """Zeroes in what is listed, the guest's bytes everywhere else."""
    wanted = bytearray(model)
    for one in damage:
        assert one["offset"] + one["length"] <= len(model)
        wanted[one["offset"] : one["offset"] + one["length"]] = bytes(one["length"])
    difference = first_difference(content, bytes(wanted))
    assert difference is None, f"differs at byte {difference}"


def flip(path: str, where: int) -> None:
    with open(path, "r+b") as file:
        file.seek(where)
        byte = file.read(1)[0]
        file.seek(where)
        file.write(bytes([byte ^ 1]))


def _flip_data(place: str, dice: random.Random) -> None:
    # Beyond header and tables.
    flip(f"{place}/vda.qcow2", dice.randrange(5 * 65536, os.path.getsize(f"{place}/vda.qcow2")))


def _delete(place: str, _dice: random.Random) -> None:
    os.unlink(f"{place}/vda.qcow2")


def _truncate(place: str, _dice: random.Random) -> None:
    os.truncate(f"{place}/vda.qcow2", 1000)


def _header(place: str, _dice: random.Random) -> None:
    flip(f"{place}/vda.qcow2", 0)


def _contents(place: str, dice: random.Random) -> None:
    flip(f"{place}/vda.contents.npy", dice.randrange(os.path.getsize(f"{place}/vda.contents.npy")))


def _layers(place: str, dice: random.Random) -> None:
    flip(f"{place}/layers.json", dice.randrange(os.path.getsize(f"{place}/layers.json")))


@pytest.mark.fault(41)
@pytest.mark.parametrize("number", [0, 2, 3])
@pytest.mark.parametrize("harm", [_flip_data, _delete, _truncate, _header, _contents, _layers])
def test_what_is_damaged_is_refused_and_what_is_good_is_salvaged(
    copied: History, tmp_path: Path, rng: random.Random, harm: Callable[[str, random.Random], None], number: int
) -> None:
    tool, uuid, kept = copied
    backup = kept[number][0]
    harm(f"{tool.repository}/{uuid}/backups/{backup}", rng)
    output = tmp_path / "out"
    refused = restored(tool, "--output", str(output))
    if harm is _flip_data and refused.code == 0:
        return  # padding, or hidden by a newer layer
    assert (refused.code, refused.document["error"]["kind"]) == (16, "Damaged")
    assert not output.exists() or os.listdir(output) == [], "no file appears"
    salvaged = restored(tool, "--output", str(output), "--salvage")
    [result] = salvaged.document["results"]
    assert salvaged.code == 16
    assert result["damage"] and all(one["backup"] == backup and one["reason"] for one in result["damage"])
    assert {one["target"] for one in result["damage"]} <= {"vda"} | ({"vdb"} if harm is _layers else set())
    damage: Dict[str, List[Any]] = {"vda": [], "vdb": []}
    for one in result["damage"]:
        damage[one["target"]].append(one)
    for target, model in kept[3][1].items():
        good_but_for((output / f"{target}.raw").read_bytes(), model, damage[target])
    if harm is not _layers and number:
        assert sum(one["length"] for one in damage["vda"]) < 5 * MIB, "the rest is good"
    # The same over what is old, by NBD.
    with nbdkit(tmp_path, 6 * MIB) as uri:
        again = restored(tool, "--to", f"vda={uri}", "--salvage")
        assert again.code == 16
        good_but_for(exported(uri, tmp_path), kept[3][1]["vda"], damage["vda"])
    # Older backups do not suffer from newer ones.
    for at, (identity, held) in enumerate(kept[:number]):
        found = restored(tool, "--at", identity, "--output", str(tmp_path / f"older{at}")).result
        same({f["target"]: Path(f["path"]).read_bytes() for f in found["files"]}, held)


def test_salvage_of_what_is_good(history: History, tmp_path: Path) -> None:
    tool, _, kept = history
    found = restored(tool, "--output", str(tmp_path / "out"), "--salvage").result
    assert found["damage"] == []
    same({f["target"]: Path(f["path"]).read_bytes() for f in found["files"]}, kept[-1][1])


def test_one_damaged_disk_and_no_file_of_any(copied: History, tmp_path: Path) -> None:
    tool, uuid, kept = copied
    os.unlink(f"{tool.repository}/{uuid}/backups/{kept[0][0]}/vdb.qcow2")
    assert restored(tool, "--output", str(tmp_path / "out")).code == 16
    assert os.listdir(tmp_path / "out") == []


@contextmanager
def nbdkit(folder: Path, size: int, *arguments: str) -> Iterator[str]:
    """An export full of OLD, as a URI."""
    with open(folder / "old", "wb") as file:
        file.write(OLD * size)
    path = str(folder / "s")
    argv = ["nbdkit", "-f", "-U", path, *arguments, "file", str(folder / "old")]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
        try:
            while not os.path.exists(path):
                assert process.poll() is None
            yield f"nbd+unix:///?socket={path}"
        finally:
            process.terminate()
            process.wait(60)
            if os.path.exists(path):
                os.unlink(path)


def exported(uri: str, folder: Path) -> bytes:
    out = folder / "exported"
    subprocess.run(["nbdcopy", uri, str(out)], check=True)
    data = out.read_bytes()
    out.unlink()
    return data


@pytest.mark.parametrize("filters", [[], ["--filter=nozero"]])
def test_into_an_export(history: History, tmp_path: Path, filters: List[str]) -> None:
    tool, _, kept = history
    for identity, model in kept:
        with nbdkit(tmp_path, 6 * MIB + 4096, *filters) as uri:
            found = restored(tool, "--at", identity, "--to", f"vda={uri}").result
            assert [(f["target"], f["path"]) for f in found["files"]] == [("vda", uri)]
            content = exported(uri, tmp_path)
            same({"vda": content[: 6 * MIB]}, model)
            assert content[6 * MIB :] == OLD * 4096


@pytest.mark.fault(60)
def test_exports_that_will_not_do(history: History, tmp_path: Path) -> None:
    tool, _, _kept = history
    with nbdkit(tmp_path, 6 * MIB - 512) as uri:
        ended = restored(tool, "--to", f"vda={uri}")
        assert (ended.code, ended.document["error"]["kind"]) == (15, "OutputFailed")
        assert exported(uri, tmp_path) == OLD * (6 * MIB - 512)
    with nbdkit(tmp_path, 6 * MIB, "-r") as uri:
        assert restored(tool, "--to", f"vda={uri}").code == 15
    assert restored(tool, "--to", f"vda=nbd+unix:///?socket={tmp_path}/nobody").code == 15
    for uri in ("nbd://host/x", "nbds://host/x", "nbd+unix://h/x?socket=/s", "nbd+unix:///x", "http://x", "relative",
                "nbd+unix:///x?socket=/s&tls-certificates=/d", "nbd+unix:///x?socket=s", "nbd+vsock:///x"):  # fmt: skip
        assert restored(tool, "--to", f"vda={uri}").code == 2, uri


@contextmanager
def loop(folder: Path, size: int) -> Iterator[str]:
    """A block device full of OLD."""
    file = folder / f"loop-{size}"
    file.write_bytes(OLD * size)
    argv = ["losetup", "--find", "--show", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop device here: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def test_onto_a_block_device(history: History, tmp_path: Path) -> None:
    tool, _, kept = history
    sizes = {"vda": 6 * MIB, "vdb": 3 * MIB + 17 * 512}
    with loop(tmp_path, sizes["vda"]) as vda, loop(tmp_path, sizes["vdb"] + 512) as vdb:
        for identity, model in kept:
            restored(tool, "--at", identity, "--to", f"vda={vda}", "--to", f"vdb={vdb}").result  # noqa: B018
            found = {"vda": Path(vda).read_bytes(), "vdb": Path(vdb).read_bytes()[: sizes["vdb"]]}
            same(found, model)
        assert Path(vdb).read_bytes()[-512:] == OLD * 512
        # One to a device, the other to a file.
        output = str(tmp_path / "out")
        found = restored(tool, "--to", f"vda={vda}", "--output", output).result
        assert [f["path"] for f in found["files"]] == [vda, f"{output}/vdb.raw"]


@pytest.mark.fault(56)
def test_devices_that_are_in_use_or_too_small(history: History, tmp_path: Path) -> None:
    tool, _, _kept = history
    size = 6 * MIB
    with loop(tmp_path, size) as device:
        before = Path(device).read_bytes()
        holder = os.open(device, os.O_RDWR | os.O_EXCL)
        try:
            ended = restored(tool, "--to", f"vda={device}")
        finally:
            os.close(holder)
        assert (ended.code, ended.document["error"]["kind"]) == (11, "TargetInUse")
        socket = f"{tmp_path}/q"
        argv = ["qemu-nbd", "--persistent", "--format=raw", f"--socket={socket}", device]
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
            while not os.path.exists(socket):
                assert process.poll() is None
            ended = restored(tool, "--to", f"vda={device}")
            process.kill()
        assert (ended.code, ended.document["error"]["kind"]) == (11, "TargetInUse")
        assert Path(device).read_bytes() == before
        mkfs = subprocess.run(["/usr/sbin/mkfs.ext4", "-q", "-F", device], check=False)
        mounted = tmp_path / "mounted"
        mounted.mkdir()
        if mkfs.returncode == 0 and subprocess.run(["mount", device, str(mounted)], check=False).returncode == 0:
            try:
                assert restored(tool, "--to", f"vda={device}").code == 11
            finally:
                subprocess.run(["umount", str(mounted)], check=True)
    with loop(tmp_path, size - 512) as device:
        ended = restored(tool, "--to", f"vda={device}")
        assert (ended.code, Path(device).read_bytes()) == (15, OLD * (size - 512))
    ended = restored(tool, "--to", f"vda={tmp_path}/loop-{size}")
    assert ended.code == 15 and "block device" in ended.stderr


def test_to_standard_output(history: History, tmp_path: Path) -> None:
    tool, _, kept = history
    argv = [COMMAND, "-r", tool.repository, "restore", "plain"]
    for identity, model in kept:
        for target in model:
            words = [*argv, "--at", identity, "--disk", target, "--output", "-"]
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True)
            same({target: done.stdout}, model)
            assert b"restored plain" in done.stderr
    with open(tmp_path / "file", "wb") as file:
        subprocess.run([*argv, "--disk", "vda", "--output", "-"], stdout=file, timeout=60, check=True)
    same({"vda": (tmp_path / "file").read_bytes()}, kept[-1][1])


def test_standard_output_that_does_not_take_it(history: History) -> None:
    tool, _, _kept = history
    argv = [COMMAND, "-r", tool.repository, "restore", "plain", "--disk", "vda", "--output", "-"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.read(100)
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(60) == 15
    assert "standard output: Broken pipe" in said and "Traceback" not in said
    # Nobody reads, and it is told to end.
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.read(100)
        process.terminate()
        assert process.wait(60) == 143
    for wrong in (["--output", "-"], ["--output", "-", "--disk", "vda", "--disk", "vdb"]):
        assert restored(tool, *wrong).code == 2
    done = subprocess.run([*argv[:3], "--json", *argv[3:]], capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == 2  # the document, and not a byte of a disk


def test_what_makes_no_sense(history: History, tmp_path: Path) -> None:
    tool, _, _kept = history
    for wrong in (
        [],
        ["--disk", "vda"],
        ["--start", "--output", str(tmp_path)],
        ["--to", "vda"],
        ["--to", "vda=-", "--to", "vdb=-"],
        ["--in-place", "--output", str(tmp_path)],
        ["--define", "x", "--to", "vda=/dev/x"],
    ):
        assert restored(tool, *wrong).code == 2, wrong
    assert restored(tool, "--to", "vdz=/dev/null").code == 10
    assert os.listdir(tmp_path) == []


@pytest.mark.fault(56, 57)
def test_a_disk_that_looks_like_an_image_and_images_in_use(libvirtd: daemon.Daemon, tmp_path: Path) -> None:
    """A guest may write the header of a qcow2 image that names any file of the host as its backing file."""
    tool = Tool(libvirtd, str(tmp_path / "repository"))
    trap = tmp_path / "trap.qcow2"
    argv = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", str(trap), "4096"]
    subprocess.run(argv, check=True)
    with PlainGuest(libvirtd, "plain", [Disk("vda", MIB, fmt="raw")]) as guest:
        guest.define()
        guest.start()
        guest.write_bytes("vda", 0, trap.read_bytes()[: MIB // 2 // 512 * 512])
        tool.backup(guest)
        for fmt in ("raw", "qcow2"):
            [file] = tool.run("restore", "plain", "--output", str(tmp_path / fmt), "--format", fmt).result["files"]
            raw = tmp_path / f"{fmt}.bytes"
            subprocess.run(["qemu-img", "convert", "-f", fmt, "-O", "raw", file["path"], str(raw)], check=True)
            same({"vda": raw.read_bytes()}, models(guest))
        before = Path(guest.disks["vda"].path).read_bytes()
        ended = tool.run("restore", "plain", "--output", guest.folder)
        assert (ended.code, ended.document["error"]["kind"]) == (15, "TargetExists")
        ended = tool.run("restore", "plain", "--to", f"vda={guest.disks['vda'].path}")
        assert ended.code == 15
        assert Path(guest.disks["vda"].path).read_bytes() == before
        found = tool.run("boot", "plain", "--name", "booted", "--output", libvirtd.scratch).result
        libvirtd.domain("booted").destroy()
        raw = tmp_path / "booted.bytes"
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", found["disks"][0]["overlay"], str(raw)], check=True)
        same({"vda": raw.read_bytes()}, models(guest))
        tool.run("boot", "--discard", "booted").result  # noqa: B018
