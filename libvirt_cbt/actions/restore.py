"""Writes a backup's disks as images that stand alone; needs neither libvirt nor the domain."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager
from typing import Collection, Iterator, List, Optional

from libvirt_cbt import errors, extents, places, points, processes
from libvirt_cbt.actions import reading, recording, results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.nbdio import check, qcow2, server
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import manifest, npy, plan, store


def restore(
    session: Session,
    domain_name: str,
    output: str,
    *,
    at: str = "latest",
    disks: Collection[str] = (),
    fmt: str = "raw",
    options: Optional[Options] = None,
) -> results.Restore:
    """Writes `output`/<target>.<fmt> for every disk of the generation that has data, or for `disks`.

    Every byte is read against its digest, and an image gets its name only when it is whole.  `fmt` is raw or qcow2.
    Errors: NotInRepository, NoSuchBackup, NoSuchDisk, TargetExists, Damaged, OutputFailed.
    """
    begun = time.monotonic()
    if fmt not in ("raw", "qcow2"):
        raise errors.Usage(reason=f"the format is raw or qcow2, not '{fmt}'")
    kept = session.stored(domain_name)
    generation = reading.with_data(kept, points.at(at))
    wanted = [(d, os.path.join(output, f"{d.target}.{fmt}")) for d in reading.chosen(kept, generation, disks)]
    _prepare(output, [path for _, path in wanted])
    files = []
    for disk, path in wanted:
        with _part(path) as part:
            _restore_disk(session, kept, generation, disk, part, fmt, options or Options())
        files.append(results.RestoredFile(disk.target, path, disk.capacity))
    return results.Restore(
        domain=kept.name,
        backup=generation.id,
        generation=generation.generation,
        files=files,
        unprotected=recording.unprotected_result(generation.unprotected),
        seconds=round(time.monotonic() - begun, 3),
    )


def _prepare(output: str, paths: List[str]) -> None:
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as e:
        raise errors.OutputFailed(path=output, reason=e.strerror) from None
    for path in paths:
        if os.path.lexists(path):
            raise errors.TargetExists(path=path)


@contextmanager
def _part(path: str) -> Iterator[str]:
    """A new file beside `path` that gets its name at the end, durably; removed when anything fails."""
    part = f"{path}.part-{processes.tag()}"
    try:
        _sweep(path)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
    except OSError as e:
        raise errors.OutputFailed(path=part, reason=e.strerror) from None
    try:
        yield part
        fd = os.open(part, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        try:
            os.link(part, path)  # unlike rename it fails when somebody made the file meanwhile
        except FileExistsError:
            raise errors.TargetExists(path=path) from None
    except OSError as e:
        raise errors.OutputFailed(path=path, reason=e.strerror) from None
    finally:
        os.unlink(part)


def _sweep(path: str) -> None:
    """Removes what restores to the same place left there when they were killed."""
    folder, name = os.path.split(path)
    for entry in list(os.scandir(folder or ".")):
        prefix, _, tag = entry.name.partition(".part-")
        if prefix == name and processes.ended(tag) and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)


def _restore_disk(
    session: Session,
    kept: store.DomainStore,
    generation: manifest.Manifest,
    disk: manifest.ManifestDisk,
    part: str,
    fmt: str,
    options: Options,
) -> None:
    chain = kept.chain(generation.id, disk.target)

    def damaged(read: check.Read, reason: str) -> None:
        where = f"{reason} at offset {read.offset}, length {read.length}"
        raise errors.Damaged(path=chain[read.layer].layer, reason=where)

    # What newer layers hide is not read: a little less than this.
    expected = min(disk.capacity, sum(kept.require(link.backup).require(disk.target).data_bytes for link in chain))
    with ExitStack() as stack:
        readers = [stack.enter_context(npy.Reader(link.contents, extents.CONTENT, link.digest)) for link in chain]
        for link in chain:
            if not os.path.isfile(link.layer):
                raise errors.Damaged(path=link.layer, reason="the layer is missing")
        run_dir = stack.enter_context(server.run_dir(places.run_root()))
        endpoints = stack.enter_context(_layers([link.layer for link in chain], run_dir))
        output = stack.enter_context(_output(part, fmt, disk.capacity, run_dir))
        check.check(
            disk.target,
            endpoints,
            (check.Read(r.layer, r.offset, r.length, r.digest, r.keep) for r in plan.restore(readers, disk.capacity)),
            output,
            options,
            damaged=damaged,
            progress=lambda target, done: session.watch.progress(target, done, max(expected, done)),
            stop=session.watch.stop,
        )


@contextmanager
def _layers(paths: List[str], run_dir: str) -> Iterator[List[server.Endpoint]]:
    """The layers of a chain; a storage daemon that cannot open one means that it is damaged."""
    with ExitStack() as stack:
        try:
            endpoints = stack.enter_context(server.layers(paths, run_dir))
        except errors.ToolFailed as e:
            server.require_open(paths)
            raise e from None
        yield endpoints


@contextmanager
def _output(part: str, fmt: str, capacity: int, run_dir: str) -> Iterator[check.Output]:
    if fmt == "raw":
        with open(part, "r+b", buffering=0) as file:
            os.truncate(file.fileno(), capacity)
            yield check.Output(part, fd=file.fileno())
        return
    qcow2.create_image(part, capacity)
    with server.image(part, "qcow2", run_dir) as endpoint:
        yield check.Output(part, endpoint=endpoint)
