"""Writes a backup's disks as images that stand alone, or to where they are wanted.

Neither libvirt nor the domain is needed, unless a domain is to be made of them.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Collection, ContextManager, Iterator, List, Mapping, Optional

from libvirt_cbt import errors, folders, places, points, processes, tools
from libvirt_cbt.actions import reading, results, telling, writing
from libvirt_cbt.actions.session import Session
from libvirt_cbt.nbdio import check, qcow2, server, targets
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import manifest, pins, store

if TYPE_CHECKING:
    from libvirt_cbt.actions import defining


def restore(
    session: Session,
    domain_name: str,
    output: Optional[str] = None,
    *,
    at: str = "latest",
    disks: Collection[str] = (),
    fmt: str = "raw",
    to: Optional[Mapping[str, str]] = None,
    salvage: bool = False,
    define: Optional[str] = None,
    start: bool = False,
    same_identity: bool = False,
    options: Optional[Options] = None,
) -> results.Restore:
    """Writes `output`/<target>.<fmt> for every disk of the generation that has data, or for `disks`.

    Every byte is read against its digest, and the images get their names when all of them are whole.  `fmt` is raw or
    qcow2.  `to` names other places by target: a block device, nbd+unix:///EXPORT?socket=PATH, or "-" for standard
    output, which one disk may have; what was there is overwritten.  Without `output` only those disks are restored.
    With `salvage` damage is no error: it is left as zeroes and listed in the result.  `define` makes a domain of that
    name from the images, which with `start` is started; it has another UUID and MAC addresses unless `same_identity`.
    Errors: NotInRepository, NoSuchBackup, NoSuchDisk, TargetExists, Damaged, OutputFailed; with `define` IdentityTaken,
    HypervisorError.
    """
    begun = time.monotonic()
    to = dict(to or {})
    output = os.path.abspath(output) if output else None
    _require_sense(output, disks, fmt, to, define=define, start=start, same_identity=same_identity)
    kept = session.stored(domain_name)
    generation = reading.with_data(kept, points.at(at))
    to = {generation.require(disk).target: place for disk, place in to.items()}
    wanted = reading.chosen(kept, generation, [*disks, *to] if disks or not output else ())
    for target in to:
        reading.chosen(kept, generation, [target])
    paths = {d.target: os.path.join(output, f"{d.target}.{fmt}") for d in wanted if output and d.target not in to}
    domain = _defining(session, kept, generation, define, wanted, same_identity=same_identity) if define else None
    if output:
        _prepare(output, list(paths.values()))
    if domain:
        domain.require_free(output or "")
    lost: Optional[List[results.Lost]] = [] if salvage else None
    with ExitStack() as stack:
        stack.enter_context(pins.reading(kept, generation.id, [d.target for d in wanted], session.watch.stop))
        parts = {target: stack.enter_context(_part(path)) for target, path in paths.items()}
        for disk in wanted:
            with _output(session, disk, to.get(disk.target), parts.get(disk.target, -1), fmt) as where:
                writing.write(
                    session, kept, generation, disk, where, options or Options(),
                    ordered=where.put is not None, salvaged=lost,
                )  # fmt: skip
    files = [
        results.RestoredFile(d.target, to.get(d.target) or paths[d.target], d.capacity) for d in wanted
    ]
    made, warnings = domain.finish(files, output or "", fmt, start=start) if domain else (None, [])
    return results.Restore(
        domain=kept.name,
        backup=generation.id,
        generation=generation.generation,
        files=files,
        unprotected=telling.unprotected(generation.unprotected),
        seconds=round(time.monotonic() - begun, 3),
        damage=lost or [],
        defined=made,
        warnings=warnings,
    )


def _require_sense(
    output: Optional[str],
    disks: Collection[str],
    fmt: str,
    to: Mapping[str, str],
    *,
    define: Optional[str],
    start: bool,
    same_identity: bool,
) -> None:
    """Errors: Usage."""
    if fmt not in ("raw", "qcow2"):
        raise errors.Usage(reason=f"the format is raw or qcow2, not '{fmt}'")
    if not output and not to:
        raise errors.Usage(reason="say where to: --output DIR, or --to DISK=PLACE")
    if disks and not output:
        raise errors.Usage(reason="--disk goes with --output DIR; --to DISK=PLACE names the disk itself")
    if [targets.parse(place) for place in to.values()].count("stdout") > 1:
        raise errors.Usage(reason="standard output takes one disk")
    if (start or same_identity) and not define:
        raise errors.Usage(reason="--start and --same-identity go with --define NAME")
    if define and (to or not output):
        raise errors.Usage(reason="--define makes a domain of the images in --output DIR, and of nothing else")


def _defining(
    session: Session,
    kept: store.DomainStore,
    generation: manifest.Manifest,
    name: str,
    wanted: List[manifest.ManifestDisk],
    *,
    same_identity: bool,
) -> defining.Defining:
    from libvirt_cbt.actions import defining  # restoring needs no libvirt

    return defining.Defining(session, kept, generation, name, wanted, same_identity=same_identity)


def _prepare(output: str, paths: List[str]) -> None:
    try:
        reason = folders.exposed(output)
        if reason:
            raise errors.OutputFailed(path=output, reason=reason)
        folders.make(output, 0o755, exact=False)
    except OSError as e:
        raise errors.OutputFailed(path=output, reason=e.strerror) from None
    for path in paths:
        if os.path.lexists(path):
            raise errors.TargetExists(path=path)


@contextmanager
def _part(path: str) -> Iterator[int]:
    """A new file beside `path` that gets its name at the end, durably; removed when anything fails.

    It is known by its descriptor alone: whoever owns the folder may exchange names in it, not what is written to.
    """
    part = f"{path}.part-{processes.tag()}"
    try:
        _sweep(path)
        fd = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise errors.OutputFailed(path=part, reason=e.strerror) from None
    try:
        yield fd
        os.fsync(fd)
        try:
            # Unlike a rename it fails when somebody made the file meanwhile.  Only with a dir_fd, which an absolute path
            # ignores, does Python ask the kernel to follow the descriptor to its file: linkat(2), AT_SYMLINK_FOLLOW.
            os.link(tools.descriptor(fd), path, src_dir_fd=fd)
        except FileExistsError:
            raise errors.TargetExists(path=path) from None
    except OSError as e:
        raise errors.OutputFailed(path=path, reason=e.strerror) from None
    finally:
        os.close(fd)
        with suppress(FileNotFoundError):
            os.unlink(part)


def _sweep(path: str) -> None:
    """Removes what restores to the same place left there when they were killed."""
    folder, name = os.path.split(path)
    for entry in list(os.scandir(folder or ".")):
        prefix, _, tag = entry.name.partition(".part-")
        if prefix == name and processes.ended(tag) and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)


def _output(
    session: Session, disk: manifest.ManifestDisk, place: Optional[str], part: int, fmt: str
) -> ContextManager[check.Output]:
    if not place:
        return image(part, fmt, disk.capacity)
    kind = targets.parse(place)
    if kind == "stdout":
        sys.stdout.flush()
        return targets.stream(sys.stdout.fileno(), disk.capacity, session.watch.stop)
    if kind == "nbd":
        return targets.nbd(place, disk.capacity, session.watch.stop)
    return targets.device(place, disk.capacity)


@contextmanager
def image(fd: int, fmt: str, capacity: int) -> Iterator[check.Output]:
    """An empty file, open for reading and writing, as an image of `capacity` bytes."""
    path = os.readlink(tools.descriptor(fd))  # for messages
    if fmt == "raw":
        os.truncate(fd, capacity)
        yield check.Output(path, fd=fd)
        return
    qcow2.create_image(fd, capacity)
    with places.temporary() as run_dir, server.image(fd, run_dir) as endpoint:
        yield check.Output(path, endpoint=endpoint)
