"""What is fuzzed: one function for each parser, which takes bytes and lets nothing out but the errors that are promised.

What it raises otherwise is a crash.  Where more is known of a result than that it is one, that is asserted, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Callable, Dict, Final, Iterator, List, Optional, Sequence, Tuple, Type

import blake3
import libvirt

from libvirt_cbt import config, errors, extents, names, openstack, points, spool
from libvirt_cbt.actions import boot, in_place
from libvirt_cbt.hypervisor import defining, documents, domain, quiesce, sentry, ssh
from libvirt_cbt.nbdio import blockstatus, still
from libvirt_cbt.repository import (
    checked,
    doubts,
    history,
    manifest,
    npy,
    outcomes,
    plan,
    runs,
    union,
    verified,
)

UUID: Final = names.DomainUuid("0123abcd-0123-4567-89ab-0123456789ab")
SEALED: Final[Tuple[Type[manifest.Sealed], ...]] = (
    manifest.Manifest,
    manifest.Layers,
    manifest.Intent,
    manifest.PruneIntent,
    manifest.RepositoryFile,
    checked.Checked,
    doubts.Doubts,
    outcomes.Outcomes,
    runs.Run,
    verified.Verified,
)
CAPACITY: Final = 1 << 22  # bytes: of a disk whose every byte is looked at


def memory() -> Optional[str]:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


@cache
def folder() -> str:
    """In memory where that can be had; removed at the end of the process."""
    place = tempfile.TemporaryDirectory(prefix="cbt-fuzz-", dir=os.environ.get("TMPDIR") or memory())
    _kept.append(place)
    return place.name


_kept: List[Any] = []


def written(name: str, data: bytes) -> str:
    path = os.path.join(folder(), name)
    Path(path).write_bytes(data)
    return path


@contextlib.contextmanager
def allowed(*kinds: Type[BaseException]) -> Iterator[None]:
    """Errors that are promised; each can be said."""
    caught = ""
    try:
        yield
        return
    except kinds as e:
        caught = str(e)
    assert caught


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


# The repository


def sealed(data: bytes) -> None:
    """A document of a repository, its kind in the first byte; as it is, or (odd) with a seal that is right."""
    if not data:
        return
    kind, content = SEALED[(data[0] >> 1) % len(SEALED)], data[1:]
    if data[0] & 1:
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            return
        if isinstance(fields, dict):
            fields.pop("digest", None)
            content = manifest._written(fields, manifest._seal(fields))
    path = written("document.json", content)
    with allowed(errors.Damaged, errors.RepositoryVersion):
        found = kind.load(path)
        Path(path).write_bytes(found.dump())
        assert kind.load(path) == found
        if isinstance(found, manifest.Manifest):
            for disk in found.disks:
                assert names.target(disk.target) and found.disk(disk.target)
        if isinstance(found, manifest.Intent):
            for place in (found.run_dir, found.scratch_dir, os.path.dirname(found.socket)):
                assert found.id in os.path.basename(place) and place == os.path.normpath(place)
        if isinstance(found, manifest.Layers):
            for entry in (*found.disks.values(), *found.below.values()):
                assert os.path.basename(entry.file) == entry.file and os.path.basename(entry.contents) == entry.contents


def arrays(data: bytes) -> None:
    """A delta or contents file; odd: behind a header that is right.  The digest always is: an enemy makes it anew."""
    if len(data) < 2:
        return
    dtype = (extents.EXTENT, extents.CONTENT)[data[0] >> 1 & 1]
    content = data[1:]
    if data[0] & 1:
        content = npy._header(dtype, len(content) // dtype.itemsize) + content[: len(content) // dtype.itemsize * dtype.itemsize]
    path = written("rows.npy", content)
    digest = blake3.blake3(content).hexdigest()
    with allowed(errors.Damaged), npy.Reader(path, dtype, digest) as reader:
        for low, high in ((0, CAPACITY), (65536, 131072), (0, 1 << 62)):
            rows = reader.window(low, high)
            assert extents.check(rows, 1 << 62) == ""
        found = history.Deltas([reader, reader]).union(0, CAPACITY)
        assert extents.check(found, CAPACITY) == ""
        for run in plan.restore([reader, reader], CAPACITY) if dtype == extents.CONTENT else ():
            assert all(run.offset <= o and o + n <= run.offset + run.length for o, n in run.keep)
    with allowed(errors.Damaged):
        source = union.Source(path, dtype, digest, 5)
        for page in union.union([source, source], 0, CAPACITY):
            plain = extents.make(page["offset"], page["length"], page["state"])
            assert extents.check(plain, CAPACITY) == ""


def change_id(data: bytes) -> None:
    """What --at, --since and --until take."""
    text = text_of(data)
    for parse in (points.at, points.until, points.since):
        with allowed(errors.Usage):
            found = parse(text)
            assert parse(str(found)) == found


# libvirt


def backup_xml(data: bytes) -> None:
    with allowed(errors.HypervisorError):
        found = documents.running_job(text_of(data))
        assert all(one.index is None or 0 <= one.index < 2**64 for one in found.disks.values())


def checkpoint_xml(data: bytes) -> None:
    with allowed(errors.HypervisorError):
        found = documents.checkpoint_info(text_of(data))
        assert 0 <= found.created < 2**64
        assert all(size is None or 0 <= size < 2**64 for size in found.disks.values())
        documents.repository_of(found)


class _Libvirt:
    """As much of a host and a domain as reading one needs; the document is what is looked at."""

    here, name = True, ""

    def __init__(self, xml: str) -> None:
        self.site, self._xml = self, xml

    def lookup(self, _uuid: str) -> Any:
        return self

    @contextlib.contextmanager
    def translated(self, _uuid: str) -> Iterator[None]:
        yield

    def XMLDesc(self, _flags: int) -> str:  # noqa: N802 -- libvirt's name
        return self._xml

    def state(self) -> List[int]:
        return [1, 1]

    def isPersistent(self) -> int:  # noqa: N802 -- libvirt's name
        return 1

    def blockInfo(self, _target: str) -> List[int]:  # noqa: N802 -- libvirt's name
        return [1 << 20, 0, 0]

    def volume_path(self, _pool: str, _volume: str) -> str:
        return ""

    def look(self, paths: Sequence[str]) -> Dict[str, Any]:
        assert all(paths)
        return {}


def domain_xml(data: bytes) -> None:
    """The XML of a domain that runs, and of one that is made from a stored one."""
    xml = text_of(data)
    host: Any = _Libvirt(xml)
    with allowed(errors.HypervisorError, errors.Usage):
        found = domain.read(host, UUID)
        assert all(names.target(disk.target) for disk in found.disks)
        assert found.qemu_ids is None or all(0 <= one < 2**32 - 1 for one in found.qemu_ids)
    with allowed(errors.HypervisorError):
        openstack.name(xml)
    images = {"vda": defining.Image("/new/vda.qcow2", "qcow2", ("/new/s", "vda"))}
    copy = defining.Copy("new", "11111111-2222-3333-4444-555555555555", images, None, links_down=True, record="{}")
    with allowed(errors.HypervisorError, errors.Usage):
        made, _ = defining.document(xml, copy)
        assert defining.record(made) == "{}"
    with allowed(errors.HypervisorError):
        defining.nvram(xml)
        defining.emulated_tpm(xml)


def agent(data: bytes) -> None:
    """What a guest's agent answers: libvirt makes of it a count of file systems, or an error with the agent's words."""
    if len(data) < 3:
        return

    def call() -> int:
        if data[0] % 3 == 0:
            libvirt.virResetLastError()  # of an earlier test: the error would have its words, not the agent's
            raise libvirt.libvirtError(text_of(data[3:]))
        if data[0] % 3 == 1:
            raise SystemError
        return data[1] - 128

    answer = quiesce._asked(call, "the freeze failed")
    assert answer.complaint is None or (answer.complaint.isprintable() and len(answer.complaint) < 10_000)
    verdict = quiesce._judge(answer.count, data[2] - 128, 1.0)
    assert (verdict is None) == (answer.count == data[2] - 128 != 0)


# QEMU's programs, NBD and the far end


def qemu_img(data: bytes) -> None:
    """`qemu-img info`, on this host or another."""

    class Lying(still.Here):
        def info(self, name: str, *, shared: bool = False) -> str:
            return data.decode(errors="replace")

    with allowed(errors.ImageUnreadable):
        for fmt in still.FORMATS:
            found = still.look(Lying(), "vda", os.devnull, fmt)
            assert 0 <= found.capacity < 2**63
            found.unusable("cbt-0123456789abcdef")


def block_status(data: bytes) -> None:
    """A reply of two contexts, either of which may be missing, against a model of single sectors.

    The first byte says which there are, the next ones where and how much was asked; pairs of (length, flags) follow.
    """
    if len(data) < 4:
        return
    sectors, base = 1 + data[1], data[2] * 512
    numbers = [int.from_bytes(data[i : i + 9], "little") for i in range(4, len(data), 9)]
    pairs = [x for n in numbers for x in (n & (2**64 - 1) if data[0] & 4 else (n & 0xFFFF), n >> 64 & 255)]
    half = data[3] * 2
    allocation = pairs[:half] if data[0] & 1 else None
    dirty = pairs[half:] if data[0] & 2 else None
    length = sectors * 512
    found = blockstatus.merge(base, length, allocation, dirty)
    count = len(found.start)
    assert len(found.end) == len(found.zero) == len(found.dirty) == count
    if not count:
        return
    assert found.start[0] == base and int(found.end[-1]) <= base + length
    assert (found.start < found.end).all() and (found.start[1:] == found.end[:-1]).all()
    for n in (0, count // 2, count - 1):
        at = int(found.start[n]) - base
        zero = allocation is not None and bool(_flag(allocation, at) & blockstatus.ZERO)
        marked = not zero if dirty is None else bool(_flag(dirty, at) & blockstatus.DIRTY)
        assert (bool(found.zero[n]), bool(found.dirty[n])) == (zero, marked)
    reach = int(found.end[-1])
    delta = blockstatus.delta(found)
    assert extents.check(delta, reach) == "" and extents.total(delta) == int((found.end - found.start)[found.dirty].sum())
    if base % extents.GRAIN == 0:
        for touched in (None, blockstatus.covered(found, extents.empty())):
            assert extents.check(blockstatus.to_copy(found, touched, reach), reach) == ""


def _flag(flat: Sequence[int], at: int) -> int:
    end = 0
    for length, flags in zip(flat[::2], flat[1::2]):
        end += length
        if at < end:
            return flags
    raise AssertionError("the reply does not reach so far")


def far_end(data: bytes) -> None:
    """A line of the far host."""
    line = data.decode(errors="replace").rstrip("\r")
    with allowed(ssh.Lost, ssh.Refused):
        words = ssh.Ssh._answer(line)
        with allowed(ssh.Lost):
            assert 0 <= ssh.number(words) < 10**19
        for word in words:
            with allowed(ssh.Lost):
                ssh.text(word)
    one = object.__new__(sentry.Sentry)
    with allowed(ssh.Lost):
        one._heard(line.split())


# Files of people and of hooks


def configuration(data: bytes) -> None:
    path = written("libvirt-cbt.toml", data)
    with allowed(errors.ConfigInvalid):
        found = config.load([path], given=True)
        for policy in (None, *found.policy):
            found.rules(policy)
        found.places()
        found.policy_of("", "guest", UUID)


def events(data: bytes) -> None:
    """Names in a hook's spool, separated by newlines; those that end in a tab are folders, in a colon links."""
    directory = os.path.join(folder(), "spool")
    for place in (directory, *(os.path.join(directory, name) for name in (spool.NEW, spool.TAKEN, spool.ASIDE))):
        if not os.path.isdir(place):
            os.mkdir(place, 0o700)
    new = os.path.join(directory, spool.NEW)
    for word in data.split(b"\n")[:20]:
        path = os.path.join(os.fsencode(new), word[:200].replace(b"/", b"_").replace(b"\0", b"_"))
        if os.path.basename(path) in (b"", b".", b"..") or os.path.lexists(path):
            continue
        if word.endswith(b"\t"):
            os.mkdir(path)
        elif word.endswith(b":"):
            os.symlink("/etc/passwd", path)
        else:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            os.utime(path, (0, int.from_bytes(word[:4], "little")))
    found, complaints = spool.taken(directory)
    assert all(line.isprintable() for line in complaints)
    for event in found:
        assert event.uuid is None or names.domain_uuid(event.uuid) == event.uuid
        event.done()
    assert os.listdir(new) == [] or complaints
    _emptied(directory)


def _emptied(directory: str) -> None:
    for place, folders, files in os.walk(os.fsencode(directory), topdown=False):
        for name in files:
            os.unlink(os.path.join(place, name))
        for name in folders:
            path = os.path.join(place, name)
            os.unlink(path) if os.path.islink(path) else os.rmdir(path)


def records(data: bytes) -> None:
    """Notes of ours that lie where others may write: in a domain's metadata, and beside its images."""
    found = boot._Record.load(text_of(data))
    if found:
        assert all(isinstance(value, (str, bool)) for value in dataclasses.astuple(found))
        assert boot._Record.load(found.dump()) == found
    path = written("image" + in_place.JOURNAL, data)
    with allowed(OSError):
        assert in_place._rename(path, UUID, []) == []


TARGETS: Final[Dict[str, Callable[[bytes], None]]] = {
    one.__name__: one
    for one in (
        sealed,
        arrays,
        change_id,
        backup_xml,
        checkpoint_xml,
        domain_xml,
        agent,
        qemu_img,
        block_status,
        far_end,
        configuration,
        events,
        records,
    )
}
