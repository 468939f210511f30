"""A domain that runs at once from a backup: fresh overlays over its layers, which a server of ours shows read-only.

The repository is for its owner alone, so QEMU never opens a layer: it reads them by NBD, from a storage daemon that goes
on when the tool has ended.  What is made, in this order, and what finds it again after a crash:

    RUN/boot-<id>/boot.json    the record; every `boot` and `boot --discard` takes away what a killed `boot` left
    RUN/boot-<id>/layers.sock  the server; whoever listens there is it
    FOLDER/boot-<id>/          the overlays, and the UEFI variables
    the domain                 with the same record in its <metadata>: known after a reboot, when RUN is empty
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from typing import Final, List, Optional, Tuple

from libvirt_cbt import durable, errors, folders, names, places, points, processes, xmldoc
from libvirt_cbt.actions import defining as stored
from libvirt_cbt.actions import reading, results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import defining, made, scratch
from libvirt_cbt.nbdio import qcow2, serving, standing
from libvirt_cbt.repository import manifest, pins, store

PREFIX: Final = "boot-"
RECORD: Final = "boot.json"


@dataclass(frozen=True)
class _Record:
    """All that a booted domain consists of besides itself; `tool` made it, and is at it until `ready`."""

    id: str
    name: str
    uuid: str
    repository: str
    backup: str
    folder: str
    run_dir: str
    tool: str
    ready: bool = False

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def load(text: str) -> Optional[_Record]:
        """None for what is no record of ours: paths are made of the id, or not believed."""
        try:
            found = _Record(**json.loads(text))
            names.backup_id(found.id)
            ends = (os.path.basename(found.folder), os.path.basename(found.run_dir))
        except (ValueError, TypeError, RecursionError, errors.Usage):
            return None
        absolute = os.path.isabs(found.folder) and os.path.isabs(found.run_dir)
        return found if absolute and ends == (PREFIX + found.id, PREFIX + found.id) else None


def boot(
    session: Session,
    domain_name: str,
    name: str,
    *,
    at: str = "latest",
    output: Optional[str] = None,
    start_network: bool = False,
    wait: float = 120.0,
) -> results.Boot:
    """Starts a domain called `name` from a backup and waits up to `wait` seconds for its agent.

    It writes to overlays in a folder of its own under `output` (default: where scratch files go); the backup stays as
    it is.  Its network links are down unless `start_network`.  No digest is compared: `verify` comes first where that
    matters.
    Errors: NotInRepository, NoSuchBackup, IdentityTaken, Damaged, OutputFailed, HypervisorError; nothing stays then.
    """
    begun = time.monotonic()
    kept = session.stored(domain_name)
    generation = reading.with_data(kept, points.at(at))
    disks = reading.chosen(kept, generation, ())
    session.host.site.require_here("a boot from a backup")
    made.require_free(session.host, name, None)
    _sweep(session)
    identity = names.new_backup_id()
    record = _Record(
        id=identity,
        name=name,
        uuid=defining.new_uuid(),
        repository=kept.repository.id,
        backup=generation.id,
        folder=os.path.join(scratch.scratch_root(output), PREFIX + identity),
        run_dir=os.path.join(places.run_root(), PREFIX + identity),
        tool=processes.tag(),
    )
    for path in (record.folder, record.run_dir):
        xmldoc.require_path(path)
    try:
        with pins.reading(kept, generation.id, [disk.target for disk in disks], session.watch.stop):
            xml, warnings = _made(session, kept, generation, disks, record, start_network=start_network)
        uuid = made.define(session.host, xml)
        made.start(session.host, uuid)
        running = time.monotonic() - begun
        agent = _agent(session, uuid, xml, wait, warnings)
        _write(replace(record, ready=True))
    except BaseException:
        _remove(session, record)
        raise
    return results.Boot(
        domain=kept.name,
        backup=generation.id,
        generation=generation.generation,
        name=name,
        uuid=uuid,
        folder=record.folder,
        disks=[results.BootedDisk(d.target, _overlay(record, d.target), d.capacity) for d in disks],
        seconds=round(running, 3),
        agent_seconds=agent,
        warnings=[*warnings, *processes.outlived("the server that the guest reads from")],
    )


def discard(session: Session, name: str) -> results.Discard:
    """Ends a domain that `boot` made and removes all of it: definition, overlays, server.

    Errors: NoSuchBoot for a domain that was made otherwise; HypervisorError.
    """
    session.host.site.require_here("a boot from a backup")
    _sweep(session)
    records = {record.id: record for record in _records() if record.name == name}
    try:
        found = defining.record(made.inactive_xml(session.host, session.host.find(name)))
    except errors.NoSuchDomain:
        found = None
    known = _Record.load(found) if found is not None else None
    if known:
        records[known.id] = known
    if not records:
        raise errors.NoSuchBoot(name=names.printable(name))
    return results.Discard(name, [line for record in records.values() for line in _remove(session, record)])


def _made(
    session: Session,
    kept: store.DomainStore,
    generation: manifest.Manifest,
    disks: List[manifest.ManifestDisk],
    record: _Record,
    *,
    start_network: bool,
) -> Tuple[str, List[str]]:
    """Record, server and overlays; the document to define, and warnings."""
    text = stored.xml(kept, generation)
    variables = stored.stored(kept, generation, stored.NVRAM)
    user, group = made.qemu_ids(session.host) or (None, None)
    exports = [_export(kept, generation, disk) for disk in disks]
    try:
        _begin(record, group)
        folders.root(os.path.dirname(record.folder))
        os.mkdir(record.folder)
        os.chmod(record.folder, 0o711)  # noqa: S103 -- QEMU's user enters it
        nvram = os.path.join(record.folder, "VARS.fd") if variables is not None else None
        if nvram and variables is not None:
            durable.write_new(nvram, variables)
        socket = standing.start(exports, record.run_dir, group)
        images = {}
        for disk in disks:
            path = _overlay(record, disk.target)
            qcow2.create_overlay(path, disk.capacity, socket, disk.target)
            images[disk.target] = defining.Image(path, "qcow2", (socket, disk.target))
        for path in filter(None, [nvram, *(image.path for image in images.values())]):
            os.chmod(path, 0o600)
            os.chown(path, -1 if user is None else user, -1 if group is None else group)
    except OSError as e:
        raise errors.OutputFailed(path=e.filename or record.folder, reason=e.strerror) from None
    copy = defining.Copy(record.name, record.uuid, images, nvram, links_down=not start_network, record=record.dump())
    return defining.document(text, copy)


def _export(kept: store.DomainStore, generation: manifest.Manifest, disk: manifest.ManifestDisk) -> serving.Export:
    layers = [link.layer for link in kept.chain(generation.id, disk.target)]
    for layer in layers:
        if not os.path.isfile(layer):
            raise errors.Damaged(path=layer, reason="the layer is missing")
    return serving.Export(disk.target, layers, disk.capacity)


def _overlay(record: _Record, target: str) -> str:
    return os.path.join(record.folder, f"{target}.qcow2")


def _agent(
    session: Session, uuid: names.DomainUuid, xml: str, wait: float, warnings: List[str]
) -> Optional[float]:
    if wait <= 0 or not made.has_agent(xml):
        return None
    seconds = made.wait_for_agent(session.host, uuid, wait, session.watch.stop)
    if seconds is None:
        warnings.append(f"its guest agent did not answer within {wait:.0f} s")
    return None if seconds is None else round(seconds, 3)


def _begin(record: _Record, group: Optional[int]) -> None:
    """The folder of record and socket, which QEMU's group may enter; it has its name once the record is in it."""
    with places.temporary(os.path.dirname(record.run_dir)) as unnamed:
        durable.write_new(os.path.join(unnamed, RECORD), record.dump().encode())
        os.chmod(unnamed, 0o710)  # noqa: S103 -- for that group
        os.chown(unnamed, -1, -1 if group is None else group)
        os.rename(unnamed, record.run_dir)


def _write(record: _Record) -> None:
    durable.replace(os.path.join(record.run_dir, RECORD), record.dump().encode())


def _records() -> List[_Record]:
    """What is known in this boot of the machine."""
    root = places.run_root()
    found = []
    for entry in sorted(os.listdir(root)) if os.path.isdir(root) else []:
        if entry.startswith(PREFIX):
            try:
                record = _Record.load(durable.read(os.path.join(root, entry, RECORD), 1 << 20).decode())
            except (OSError, ValueError):
                record = None
            if record and record.run_dir == os.path.join(root, entry):
                found.append(record)
    return found


def _sweep(session: Session) -> None:
    """Takes away what a `boot` that was killed has left."""
    places.sweep(places.run_root())
    for record in _records():
        if not record.ready and processes.ended(record.tool):
            for line in _remove(session, record):
                session.watch.note(f"of a boot of {names.printable(record.name)} that was killed: {line}")


def _remove(session: Session, record: _Record) -> List[str]:
    """The domain first: QEMU must not lose its disks under it; the record last."""
    done: List[str] = []
    uuid = names.domain_uuid(record.uuid)
    try:
        known = _Record.load(defining.record(made.inactive_xml(session.host, uuid)) or "")
        if known and known.id == record.id:
            done += made.remove(session.host, uuid)
    except errors.NoSuchDomain:
        pass  # never defined, or undefined by hand
    for path in filter(_ours, (record.run_dir, record.folder)):
        done += standing.end(path)
        shutil.rmtree(path, ignore_errors=True)
        done.append(f"removed {path}")
    return done


def _ours(path: str) -> bool:
    """Whether a folder is there and nobody else has laid it out: records come from domains, too, and who may define one
    could name a folder of his own, with a link to another program's socket in it.
    """
    try:
        return os.path.isdir(path) and not os.path.islink(path) and folders.foreign(path) is None
    except OSError:
        return False
