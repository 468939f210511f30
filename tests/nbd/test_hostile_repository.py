"""A repository that an enemy wrote: every seal in it is right, for a seal is no signature.

What is read, written or removed because of it lies in the repository, in the output that was asked for, and in folders
that carry our own random ids; whatever else is an error with a name.  `TREASURE` stands for /etc/shadow.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import stat
import struct
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import pytest

import libvirt_cbt
from libvirt_cbt import errors, places
from libvirt_cbt.actions import restore as restoring
from libvirt_cbt.nbdio import server
from libvirt_cbt.repository import manifest
from tests.nbd.conftest import MIB, assert_same, run
from tests.nbd.histories import History
from tests.unit import repository_samples as samples

TREASURE = b"root:$6$the treasure of this host$:1::::::\n" * 2048
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make things of others")
NOBODY = 65534
Verb = Callable[[libvirt_cbt.Session, str], Any]


def _restored(session: libvirt_cbt.Session, output: str) -> Any:
    return libvirt_cbt.restore(session, samples.UUID, output)


def _as_qcow2(session: libvirt_cbt.Session, output: str) -> Any:
    return libvirt_cbt.restore(session, samples.UUID, output, fmt="qcow2")


def _salvaged(session: libvirt_cbt.Session, output: str) -> Any:
    return libvirt_cbt.restore(session, samples.UUID, output, salvage=True)


def _served(session: libvirt_cbt.Session, output: str) -> Any:
    os.makedirs(output, exist_ok=True)
    with libvirt_cbt.serve(session, samples.UUID, os.path.join(output, "s"), since="*") as served:
        for disk in served.result.disks:
            run("nbdcopy", disk.uri, os.path.join(output, f"{disk.target}.raw"))
        return served.result


def _verified(session: libvirt_cbt.Session, _output: str) -> Any:
    return libvirt_cbt.verify(session, samples.UUID)


def _changed(session: libvirt_cbt.Session, _output: str) -> Any:
    return [e.tolist() for e in libvirt_cbt.changed(session, samples.UUID, "vda", since="*")]


def _pruned(session: libvirt_cbt.Session, _output: str) -> Any:
    return libvirt_cbt.prune(session, samples.UUID, keep_last=1)


def _listed(session: libvirt_cbt.Session, _output: str) -> Any:
    return libvirt_cbt.generations(session, None)


VERBS: Tuple[Verb, ...] = (_listed, _restored, _as_qcow2, _salvaged, _served, _verified, _changed, _pruned)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> History:
    """A full and an increment of one disk."""
    history = History(str(tmp_path_factory.mktemp("made")), MIB)
    rng = random.Random(5)
    for _ in range(2):
        history.write(rng)
        history.generation()
    return history


@pytest.fixture
def history(made: History, folder: str) -> History:
    """A copy to be ill-treated, beside a treasure."""
    copy = os.path.join(folder, "repository")
    shutil.copytree(made.repository.path, copy)
    os.chmod(copy, 0o700)
    one = object.__new__(History)
    one.__dict__.update(made.__dict__)
    one.repository = type(made.repository).open(copy)
    one.kept = one.repository.domain(samples.UUID)
    one.proofs = folder
    return one


@pytest.fixture
def treasure(folder: str) -> Iterator[str]:
    """A file of the host's, which nobody reads out, writes to or removes."""
    path = os.path.join(folder, "treasure")
    Path(path).write_bytes(TREASURE)
    before = os.lstat(path)
    yield path
    after = os.lstat(path)
    assert Path(path).read_bytes() == TREASURE
    assert (after.st_mode, after.st_uid, after.st_nlink, after.st_ino) == (
        before.st_mode, before.st_uid, before.st_nlink, before.st_ino,
    )  # fmt: skip


def forge(path: str, change: Callable[[Dict[str, Any]], None]) -> None:
    """Changes a sealed document and seals it again."""
    fields = json.loads(Path(path).read_bytes())
    del fields["digest"]
    change(fields)
    os.unlink(path)
    Path(path).write_bytes(manifest._written(fields, manifest._seal(fields)))


def nothing_leaks(history: History, tmp: str, verbs: Sequence[Verb] = VERBS) -> List[str]:
    """Runs every verb; the kinds of their errors, "" for none.  Nothing of the treasure is in what they wrote."""
    kinds = []
    with history.session() as session:
        for verb in verbs:
            before = sorted(os.listdir(tmp))
            name = f"output{len(before)}"
            output = os.path.join(tmp, name)
            try:
                verb(session, output)
                kinds.append("")
            except errors.CbtError as e:
                kinds.append(e.kind)
            assert set(os.listdir(tmp)) - set(before) <= {name}, "nothing beside the output"
            for place, _, files in os.walk(output):
                for name in files:
                    path = os.path.join(place, name)
                    if not stat.S_ISSOCK(os.lstat(path).st_mode):
                        assert b"treasure" not in Path(path).read_bytes(), f"{verb.__name__}: {path}"
            session._repository = None
    return kinds


def test_a_good_one_passes(history: History, folder: str) -> None:
    """Else what follows would prove nothing."""
    assert set(nothing_leaks(history, folder)) == {""}


# Names (row 53)

UPWARDS = "../../../../treasure"


def _strings(value: Any, path: Tuple[Any, ...] = ()) -> Iterator[Tuple[Any, ...]]:
    """Where the strings of a document are, keys too (as a path that ends in None)."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield (*path, key, None)
            yield from _strings(one, (*path, key))
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from _strings(one, (*path, number))
    elif isinstance(value, str):
        yield path


def _put(fields: Any, path: Tuple[Any, ...], text: str) -> None:
    if path[-1] is None:
        at = fields
        for step in path[:-2]:
            at = at[step]
        at[text] = at.pop(path[-2])
        return
    for step in path[:-1]:
        fields = fields[step]
    fields[path[-1]] = text


@pytest.mark.fault(53)
@pytest.mark.parametrize("name", ["manifest.json", "layers.json"])
@pytest.mark.parametrize(
    "hostile", [UPWARDS, "/treasure", "treasure", "..", "-rf", "a\nb", "\x00", "vda.qcow2/../../x"]
)
def test_names_lead_nowhere(
    history: History, folder: str, treasure: str, name: str, hostile: str, rng: random.Random
) -> None:
    """Each text of a document in turn becomes a path; most are refused, and those that may be any text do no harm."""
    backup = history.kept.generations()[-1].id
    path = os.path.join(history.kept.directory(backup), name)
    good = Path(path).read_bytes()
    places = [place for place in _strings(json.loads(good)) if place[0] != "digest"]
    assert len(places) > 10
    text = treasure if hostile == "/treasure" else hostile
    for place in rng.sample(places, 6):
        forge(path, lambda fields, place=place: _put(fields, place, text))  # type: ignore[misc]
        kinds = nothing_leaks(history, folder, rng.sample(VERBS[:-1], 2))
        assert set(kinds) <= {
            "",
            "Damaged",
            "NoSuchBackup",
            "NoSuchDisk",
            "BeginningUnknown",
            "LineageBroken",
            "NotInRepository",
            "RepositoryVersion",
        }, (
            place,
            kinds,
        )
        os.unlink(path)
        Path(path).write_bytes(good)


@pytest.mark.fault(53)
def test_an_intent_cannot_name_what_recover_removes(history: History, folder: str, treasure: str) -> None:
    """`recover` removes the files and ends the processes of a run that died: those that carry its id, no others."""
    uri = "test:///default"
    with history.session() as session:
        host = session.host.hostname
    victim = os.path.join(folder, "victim")
    hostile: List[Dict[str, Any]] = [
        {"scratch": {"vda": treasure}},
        {"scratch": {"../../treasure": treasure}},
        {"scratch_dir": folder, "scratch": {"vda": treasure}},
        {"run_dir": victim, "socket": f"{victim}/nbd.sock"},
        {"socket": treasure},
        {"run_dir": "{run}/../../victim"},
        {"checkpoint": "cbt-0000000000000000"},
    ]
    for number, changes in enumerate(hostile):
        wanted = samples.intent(history.kept)
        stage = os.path.join(history.kept.path, "staging", wanted.id)
        os.mkdir(stage, 0o700)
        os.makedirs(victim, exist_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{victim}/other.sock")
        fields = {**json.loads(wanted.dump()), "host": host, "tool_host": socket.gethostname(), "uri": uri}
        del fields["digest"]
        for key, value in changes.items():
            fields[key] = value.replace("{run}", fields["run_dir"]) if isinstance(value, str) else value
        Path(stage, "intent.json").write_bytes(manifest._written(fields, manifest._seal(fields)))
        with history.session() as session:
            libvirt_cbt.recover(session, samples.UUID)
        assert os.listdir(victim) == ["other.sock"], number
        assert Path(treasure).exists(), changes
        shutil.rmtree(stage, ignore_errors=True)
        os.unlink(f"{victim}/other.sock")


# Links (row 54)


@pytest.mark.fault(54)
@pytest.mark.parametrize("where", ["staging/{id}", "removed", "removed/{id}", "staging", "backups/{id}"])
def test_what_a_link_leads_to_is_never_removed(history: History, folder: str, where: str) -> None:
    """A copy of a repository brings its links with it, and directories of ours are removed with all that is in them."""
    victim = os.path.join(folder, "victim")
    identity = "0123456789abcdef"
    inside = os.path.join(victim, identity) if where in ("removed", "staging") else victim
    os.makedirs(inside)
    for name in ("intent.json", "a", "vda.qcow2"):
        Path(inside, name).write_text("of others")
    link = os.path.join(history.kept.path, where.format(id=identity))
    os.makedirs(os.path.dirname(link), exist_ok=True)
    if os.path.isdir(link):
        os.rmdir(link)
    os.symlink(victim, link)
    with history.session() as session:
        for verb in (lambda: libvirt_cbt.recover(session, samples.UUID), lambda: _pruned(session, "")):
            try:
                verb()
            except errors.CbtError as e:
                assert e.code in (15, 16), e  # noqa: PT017
    assert sorted(os.listdir(inside)) == ["a", "intent.json", "vda.qcow2"]
    assert {Path(inside, name).read_text() for name in os.listdir(inside)} == {"of others"}


@pytest.mark.fault(54)
@pytest.mark.parametrize(
    "name", ["vda.qcow2", "vda.contents.npy", "vda.delta.npy", "manifest.json", "layers.json", "protected"]
)
@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_no_link_or_pipe_in_the_place_of_a_file(
    history: History, folder: str, treasure: str, name: str, kind: str
) -> None:
    path = os.path.join(history.kept.directory(history.kept.generations()[0].id), name)
    if os.path.lexists(path):
        os.unlink(path)
    if kind == "link":
        os.symlink(treasure, path)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        os.mkdir(path)
    kinds = nothing_leaks(history, folder)
    if name == "manifest.json":  # the others are proved without it
        with history.session() as session:
            assert name in libvirt_cbt.verify(session, samples.UUID).damage[0].reason
    else:
        assert name == "protected" or "Damaged" in kinds


@pytest.mark.fault(54)
@pytest.mark.parametrize("number", [0, 1])
def test_a_layer_that_is_a_link_to_the_image_of_a_guest(history: History, folder: str, treasure: str, number: int) -> None:
    """A prune writes into layers: the image of another guest, under a layer's name, would be its victim."""
    victim = os.path.join(folder, "guest.qcow2")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", treasure, victim)
    before = Path(victim).read_bytes()
    path = history.layer(history.kept.generations()[number].id)
    os.unlink(path)
    os.symlink(victim, path)
    assert "Damaged" in nothing_leaks(history, folder)
    assert_same(Path(victim).read_bytes(), before, "the image of a guest")


# Images (row 57)


def _header(path: str, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def _backing(path: str, treasure: str) -> None:
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", treasure, "-F", "raw", path)


def _json_backing(path: str, treasure: str) -> None:
    _backing(path, "json:" + json.dumps({"driver": "raw", "file": {"driver": "file", "filename": treasure}}))


def _data_file(path: str, treasure: str) -> None:
    os.unlink(path)
    shutil.copyfile(treasure, f"{treasure}.copy")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={treasure}.copy,data_file_raw=on", path, str(MIB))
    os.unlink(f"{treasure}.copy")
    # The extension's text, in place: the enemy's host had no treasure.
    data = Path(path).read_bytes()
    Path(path).write_bytes(data.replace(f"{treasure}.copy".encode(), treasure.encode().ljust(len(treasure) + 5, b"/")))


def _raw(path: str, treasure: str) -> None:
    """A raw file is no layer, and nothing is probed."""
    shutil.copyfile(treasure, path)


def _vmdk(path: str, treasure: str) -> None:
    """A text that QEMU takes for a list of other files, if it is asked to guess."""
    extent = f'RW 2048 FLAT "{treasure}" 0\n'
    Path(path).write_text(
        f'# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="monolithicFlat"\n{extent}'
    )


def _endless(path: str, _treasure: str) -> None:
    """A size of eight exabytes, and tables to match."""
    _header(path, 24, struct.pack(">Q", (1 << 63) - 512))


def _encrypted(path: str, _treasure: str) -> None:
    _header(path, 32, struct.pack(">I", 2))


def _far_table(path: str, _treasure: str) -> None:
    _header(path, 36, struct.pack(">IQ", 0x7FFFFFFF, 1 << 62))


@pytest.mark.fault(57)
@pytest.mark.parametrize("newest", [True, False])
@pytest.mark.parametrize("harm", [_backing, _json_backing, _data_file, _raw, _vmdk, _endless, _encrypted, _far_table])
def test_a_layer_opens_no_other_file(
    history: History, folder: str, treasure: str, harm: Callable[[str, str], None], newest: bool
) -> None:
    generations = history.kept.generations()
    backup = generations[-1 if newest else 0].id
    harm(history.kept.directory(backup) + "/vda.qcow2", treasure)
    kinds = nothing_leaks(history, folder)
    if harm in (_backing, _json_backing):
        # A header's backing file is not asked: the chain is as layers.json says, and the backup is as good as ever.
        assert set(kinds) == {""}
        return
    assert "Damaged" in kinds
    assert set(kinds) <= {"", "Damaged", "ToolFailed", "ChainPinned", "RepositoryError"}, kinds


# Where restored disks go (rows 54, 56, 59)


@ROOT_ONLY
@pytest.mark.fault(54, 56)
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_folder_whose_owner_exchanges_the_file_under_us(
    history: History, folder: str, treasure: str, monkeypatch: pytest.MonkeyPatch, fmt: str
) -> None:
    """Root restores into the folder of a user, who puts a link to the treasure in the place of the half-written image."""
    output = os.path.join(folder, "home")
    os.mkdir(output)
    os.chown(output, NOBODY, NOBODY)
    whole = restoring.image

    def exchanged(fd: int, fmt: str, capacity: int) -> Any:
        [part] = os.listdir(output)
        os.rename(os.path.join(output, part), os.path.join(folder, "taken"))
        os.symlink(treasure, os.path.join(output, part))
        return whole(fd, fmt, capacity)

    monkeypatch.setattr(restoring, "image", exchanged)
    with history.session() as session:
        libvirt_cbt.restore(session, samples.UUID, output, fmt=fmt)
    assert os.listdir(output) == [f"vda.{fmt}"]
    path = os.path.join(output, f"vda.{fmt}")
    assert not os.path.islink(path) and stat.S_IMODE(os.stat(path).st_mode) == 0o600
    raw = os.path.join(folder, "raw")
    run("qemu-img", "convert", "-f", fmt, "-O", "raw", path, raw)
    assert_same(Path(raw).read_bytes(), history.models[history.backups()[-1].id]["vda"], "what was restored")


@pytest.mark.fault(54)
def test_a_folder_that_all_may_write_to(history: History, folder: str) -> None:
    output = os.path.join(folder, "open")
    os.mkdir(output)
    os.chmod(output, 0o777)
    with history.session() as session:
        for verb in (_restored, _as_qcow2, _served):
            for place in (output, os.path.join(output, "below")):
                with pytest.raises(errors.OutputFailed, match="everybody"):
                    verb(session, place)
        assert not os.path.exists(os.path.join(output, "below", "vda.raw"))
        os.chmod(output, 0o1777)
        _restored(session, output)


@ROOT_ONLY
@pytest.mark.fault(54)
def test_root_reads_what_a_user_keeps_and_writes_nothing_there(history: History, folder: str) -> None:
    for place, _, files in os.walk(history.repository.path):
        for path in (place, *(os.path.join(place, name) for name in files)):
            os.chown(path, NOBODY, NOBODY)
    with history.session() as session:
        _restored(session, os.path.join(folder, "output"))
        _verified(session, "")
        for verb in (lambda: _pruned(session, ""), lambda: libvirt_cbt.recover(session, samples.UUID)):
            with pytest.raises(errors.RepositoryDenied, match="user 65534"):
                verb()


@pytest.mark.fault(56)
def test_no_other_name_of_an_image_makes_it_a_device(history: History, folder: str) -> None:
    """By a descriptor's name, a hard link or a link: what is no block device is not overwritten."""
    path = os.path.join(folder, "image")
    Path(path).write_bytes(b"x" * MIB)
    os.link(path, f"{path}.hard")
    os.symlink(path, f"{path}.soft")
    with history.session() as session, open(path, "r+b") as file:
        names = [path, f"{path}.hard", f"{path}.soft", f"/proc/self/fd/{file.fileno()}", f"/dev/fd/{file.fileno()}",
                 "/dev/null", "/dev/zero", folder, "/proc/self/mem"]  # fmt: skip
        for name in names:
            with pytest.raises(errors.OutputFailed, match="no block device"):
                libvirt_cbt.restore(session, samples.UUID, to={"vda": name})
        for name in ("vda.raw", "vda.qcow2"):
            os.link(path, os.path.join(folder, name))
            with pytest.raises(errors.TargetExists):
                libvirt_cbt.restore(session, samples.UUID, folder, fmt=name[4:])
    assert Path(path).read_bytes() == b"x" * MIB


@pytest.mark.fault(59)
@pytest.mark.parametrize(
    "output", ["-o", "--help", "$(touch pwned)", "`touch pwned`", "a;touch pwned", "nbd:x", "json:{}", "a\nb"]
)
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_folder_by_any_name(
    history: History, folder: str, monkeypatch: pytest.MonkeyPatch, output: str, fmt: str
) -> None:
    """Neither a shell nor an option of qemu-img nor a protocol of QEMU's."""
    monkeypatch.chdir(folder)
    with history.session() as session:
        [file] = libvirt_cbt.restore(session, samples.UUID, output, fmt=fmt).files
        assert file.path == os.path.join(os.path.realpath(folder), output, f"vda.{fmt}")
        with libvirt_cbt.serve(session, samples.UUID, os.path.join(output, "s,server=on")):
            pass
    assert sorted(os.listdir(output)) == [f"vda.{fmt}"]
    assert "pwned" not in os.listdir(folder)


# Modes, whatever the umask (docs/security.md)


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_files_and_sockets_are_for_us_alone(folder: str, mask: int, rng: random.Random) -> None:
    before = os.umask(mask)
    try:
        history = History(folder, MIB)
        history.write(rng)
        history.generation()
        run_root = os.path.join(folder, "run", "cbt")
        with places.temporary(run_root) as run_dir:
            layers = [history.layer(m.id) for m in history.kept.repository.domain(samples.UUID).generations()]
            with server.layers(layers[:1], run_dir):
                assert _loose(run_dir) == []
        with history.session() as session:
            _restored(session, os.path.join(folder, "out"))
            with libvirt_cbt.serve(session, samples.UUID, os.path.join(folder, "s")):
                assert stat.S_IMODE(os.stat(os.path.join(folder, "s")).st_mode) == 0o600
    finally:
        os.umask(before)
    assert _loose(history.repository.path) == []
    assert stat.S_IMODE(os.stat(os.path.join(folder, "out", "vda.raw")).st_mode) == 0o600
    assert not os.stat(run_root).st_mode & 0o066


def _loose(root: str) -> List[str]:
    """As `find ROOT -perm /077`."""
    found = []
    for place, _, files in os.walk(root):
        found += [path for path in (place, *(os.path.join(place, n) for n in files)) if os.lstat(path).st_mode & 0o077]
    return found
