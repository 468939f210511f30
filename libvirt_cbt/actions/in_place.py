"""A domain put back to an older moment: its images replaced, with it shut off.

Whatever happens, each disk's path leads to a whole image.  The order, per domain, and what a crash after it leaves:

1. IMAGE.cbt-new of every disk is written, each byte checked, and read again: garbage, removed by the next run.
2. The journal (beside the first image) names them all, durably: from here on the next run finishes.
3. Per disk: IMAGE.cbt-old becomes a second name of the old image, IMAGE.cbt-new is renamed to IMAGE, durably: some
   disks are new, some old; the next run renames the rest.
4. Our checkpoints are dropped; the old images go, the journal last.
"""

from __future__ import annotations

import json
import os
import stat
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Collection, Dict, Final, List, Optional

from libvirt_cbt import durable, errors, places, points, tools
from libvirt_cbt.actions import reading, recover, restore, results, telling, writing
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import checkpoints, domain, shutoff
from libvirt_cbt.nbdio import imagelock, server
from libvirt_cbt.nbdio.lanes import Options
from libvirt_cbt.repository import manifest, store

NEW: Final = ".cbt-new"
OLD: Final = ".cbt-old"
JOURNAL: Final = ".cbt-in-place"


@dataclass(frozen=True)
class _Image:
    """A disk of the domain and what it becomes."""

    disk: manifest.ManifestDisk
    path: str
    format: str


def restore_in_place(
    session: Session,
    domain_name: str,
    *,
    at: str = "latest",
    disks: Collection[str] = (),
    options: Optional[Options] = None,
) -> results.Restore:
    """Puts the disks of a shut-off domain, or `disks`, back to a backup, each in its image's own format.

    Our checkpoints go with the old images, so the next backup is full.  Needs as much room beside each image as the
    new one takes.
    Errors: NoSuchDomain, NotInRepository, NoSuchBackup, NoSuchDisk, RepositoryBusy; NotShutOff, TargetInUse, Usage for
    what cannot be replaced; Damaged, OutputFailed.
    """
    begun = time.monotonic()
    kept = session.stored(domain_name)
    host = session.host
    host.site.require_here("a restore in place")
    with kept.lock():
        recover.reconcile(session, kept)
        generation = reading.with_data(kept, points.at(at))
        dom = domain.read(host, kept.uuid)
        shutoff.require(host, kept.uuid)
        _finish(session, kept, dom)
        images = [_image(dom, disk) for disk in reading.chosen(kept, generation, disks)]
        for image in images:
            _discard_new(image.path)
            with imagelock.held(image.path):
                pass  # told now, and asked again when it counts
        try:
            for image in images:
                _write(session, kept, generation, image, options or Options())
            _commit(session, kept, images)
        except BaseException:
            if not os.path.lexists(images[0].path + JOURNAL):
                for image in images:
                    _discard_new(image.path)
            raise
        warnings = _finish(session, kept, dom)
    return results.Restore(
        domain=kept.name,
        backup=generation.id,
        generation=generation.generation,
        files=[results.RestoredFile(i.disk.target, i.path, i.disk.capacity) for i in images],
        unprotected=telling.unprotected(generation.unprotected),
        seconds=round(time.monotonic() - begun, 3),
        warnings=warnings,
    )


def _image(dom: domain.Domain, disk: manifest.ManifestDisk) -> _Image:
    """Errors: NoSuchDisk; Usage where a new file cannot simply take the place of the old."""
    now = dom.disk(disk.target)
    why = ""
    if now.source_type not in ("file", "volume"):
        why = f"its source is of type {now.source_type}: restore it with --to"
    elif now.format not in ("raw", "qcow2"):
        why = f"its format is {now.format}"
    elif now.encrypted:
        why = "it is encrypted by the host, and the restored image would not be"
    elif not stat.S_ISREG(os.stat(os.path.realpath(now.source)).st_mode if os.path.exists(now.source) else 0):
        why = f"{now.source} is no file on this host"
    if why:
        raise errors.Usage(reason=f"disk {disk.target} cannot be restored in place: {why}")
    return _Image(disk, os.path.realpath(now.source), now.format)


def _discard_new(path: str) -> None:
    try:
        os.unlink(path + NEW)
    except FileNotFoundError:
        pass
    except OSError as e:
        raise errors.OutputFailed(path=path + NEW, reason=e.strerror) from None


def _write(
    session: Session, kept: store.DomainStore, generation: manifest.Manifest, image: _Image, options: Options
) -> None:
    """Step 1: the new image beside the old, with its owner and mode, read again as a whole."""
    new = image.path + NEW
    try:
        # By its descriptor from here on: the folder may be another user's, who can exchange the names in it.
        fd = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with restore.image(fd, image.format, image.disk.capacity) as output:
                writing.write(session, kept, generation, image.disk, output, options)
            _compare(kept, generation, image, fd)
            status = os.stat(image.path)
            os.fchown(fd, status.st_uid, status.st_gid)
            os.fchmod(fd, stat.S_IMODE(status.st_mode) & 0o777)
            os.fsync(fd)
        finally:
            os.close(fd)
        durable.sync_directory(os.path.dirname(new))
    except OSError as e:
        raise errors.OutputFailed(path=new, reason=e.strerror or str(e)) from None


def _compare(kept: store.DomainStore, generation: manifest.Manifest, image: _Image, fd: int) -> None:
    """What was written, read back and held against the chain.  Errors: OutputFailed."""
    layers = [link.layer for link in kept.chain(generation.id, image.disk.target)]
    with places.temporary() as run_dir, server.chain(layers, run_dir) as chain:
        export = {"driver": "nbd", "server": {"type": "unix", "path": chain.socket}, "export": chain.export}
        below = {"driver": "raw", "file": export}
        written = {"driver": image.format, "file": {"driver": "file", "filename": tools.descriptor(fd)}}
        try:
            tools.run(
                ["qemu-img", "compare", "-q", "json:" + json.dumps(written), "json:" + json.dumps(below)],
                timeout=7 * 86400,
                keep=(fd,),
            )
        except errors.ToolFailed as e:
            raise errors.OutputFailed(path=image.path + NEW, reason=f"it reads back differently: {e}") from None


def _commit(session: Session, kept: store.DomainStore, images: List[_Image]) -> None:
    """Steps 2 and 3.  Errors: NotShutOff, TargetInUse when the domain was started meanwhile."""
    with ExitStack() as stack:
        for image in images:
            # Until the names have changed nobody can open the old image for writing.
            stack.enter_context(imagelock.held(image.path))
        shutoff.require(session.host, kept.uuid)
        try:
            journal = {"domain": kept.uuid, "images": [image.path for image in images]}
            durable.replace(images[0].path + JOURNAL, json.dumps(journal).encode())
            _rename(images[0].path + JOURNAL, kept.uuid, [image.path for image in images])
        except OSError as e:
            raise errors.OutputFailed(path=e.filename or images[0].path, reason=e.strerror) from None


def _rename(journal: str, uuid: str, known: Collection[str]) -> List[str]:
    """Step 3, as often as it takes; the images, each of which is one of `known`: others may write to their folders.

    Errors: OSError.
    """
    try:
        found = json.loads(durable.read(journal, 1 << 20))
        images = [str(path) for path in found["images"]]
        if found["domain"] != uuid:
            raise ValueError("another domain's")
        if not {*images} <= {*known}:
            raise ValueError("an image in it is no disk of the domain")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise OSError(0, f"it is no journal of this domain: {e}", journal) from None
    for path in images:
        if os.path.lexists(path + NEW):
            if not os.path.lexists(path + OLD):
                os.link(path, path + OLD)
            os.rename(path + NEW, path)
            durable.sync_directory(os.path.dirname(path))
    return images


def _finish(session: Session, kept: store.DomainStore, dom: domain.Domain) -> List[str]:
    """Steps 3 and 4 of a run that has come to its journal, this one or one that died; warnings."""
    warnings: List[str] = []
    paths = {d.target: os.path.realpath(d.source) for d in dom.disks if d.source_type in ("file", "volume") and d.source}
    for path in paths.values():
        if not os.path.lexists(path + JOURNAL):
            continue
        try:
            with imagelock.held(path):
                done = _rename(path + JOURNAL, kept.uuid, paths.values())
                warnings += _untracked(session, kept, {t: p for t, p in paths.items() if p not in done}, dom)
                for image in done:
                    if os.path.lexists(image + OLD):
                        os.unlink(image + OLD)
                        durable.sync_directory(os.path.dirname(image))
                os.unlink(path + JOURNAL)
                durable.sync_directory(os.path.dirname(path))
        except OSError as e:
            raise errors.OutputFailed(path=e.filename or path, reason=e.strerror) from None
    return warnings


def _untracked(session: Session, kept: store.DomainStore, others: Dict[str, str], dom: domain.Domain) -> List[str]:
    """Drops our checkpoints, and their bitmaps from the images that stay."""
    found = checkpoints.listed(session.host, kept.uuid, sizes=False)
    mine = checkpoints.ours(found, kept.repository.id)
    for name in mine:
        shutoff.forget(session.host, kept.uuid, name)
        for target, path in others.items():
            if dom.disk(target).format == "qcow2" and target in found[name].disks:
                try:
                    tools.run(["qemu-img", "bitmap", "-f", "qcow2", "--remove", path, name])
                except errors.ToolFailed as e:
                    session.watch.note(f"bitmap {name} stays in {path}: {e}")
    foreign = sorted(set(found) - set(mine))
    if not foreign:
        return []
    return [f"checkpoints of others have lost their bitmaps: {', '.join(foreign[:5])}"]
