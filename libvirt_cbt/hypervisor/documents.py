"""The documents given to libvirt, and what is read out of libvirt's answers to them.

Every generated document begins as a file of xml_templates/ and is filled as a
tree; tests hold each against libvirt's own RNG schemas.
Formats: https://libvirt.org/formatbackup.html, https://libvirt.org/formatcheckpoint.html
"""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass
from typing import Dict, Optional, Sequence, Tuple, Union

from lxml import etree

from libvirt_cbt import errors, names, xmldoc


@dataclass(frozen=True)
class JobDisk:
    """One disk of a domain as the job's documents name it; libvirt takes an unnamed disk for one left out."""

    target: str
    scratch: Optional[str]  # None: not in the job
    tracked: bool  # gets a bitmap in the new checkpoint
    incremental: Optional[str] = None  # checkpoint whose bitmap is exported


@dataclass(frozen=True)
class Export:
    """What libvirt says of a running job's disk."""

    export: str
    bitmap: Optional[str]
    index: Optional[int]
    scratch: str


@dataclass(frozen=True)
class Tcp:
    """Where QEMU is to listen by TCP, with TLS; `prefix` begins the names of the exports.

    Nothing of an address proves whose job is behind it, so the prefix has the backup's id.
    """

    address: str
    port: int
    prefix: str


@dataclass(frozen=True)
class RunningJob:
    """`socket` is empty where the exports are by TCP; `address` is then host and port."""

    socket: str
    disks: Dict[str, Export]
    address: str = ""

    def proves(self, socket: str) -> bool:
        """Whether it is the job whose socket, and whose folder of scratch files, have the id in the path `socket`."""
        if self.socket:
            return self.socket == socket
        folder = names.checkpoint(names.BackupId(os.path.basename(os.path.dirname(socket))))
        found = {os.path.basename(os.path.dirname(disk.scratch)) for disk in self.disks.values()}
        return found == {folder}


def backup(server: Union[str, Tcp], disks: Sequence[JobDisk]) -> str:
    """A pull-mode backup document that names every disk of the domain; it exports on a socket, or by TCP with TLS."""
    root = xmldoc.template("backup")
    prefix = _listen(xmldoc.find(root, "server"), server)
    rows = xmldoc.find(root, "disks")
    inside, outside = list(rows)
    for row in (inside, outside):
        rows.remove(row)
    for disk in disks:
        row = deepcopy(inside if disk.scratch else outside)
        row.set("name", disk.target)
        if disk.scratch:
            row.set("exportname", prefix + disk.target)
            xmldoc.find(row, "scratch").set("file", disk.scratch)
            if disk.incremental:
                row.set("backupmode", "incremental")
                row.set("incremental", disk.incremental)
                row.set("exportbitmap", f"cbt-{disk.target}")
            else:
                del row.attrib["exportbitmap"]
        rows.append(row)
    return xmldoc.serialize(root)


def _listen(row: etree._Element, server: Union[str, Tcp]) -> str:
    """Fills in where the job exports; what the names of its exports begin with."""
    if isinstance(server, str):
        row.set("socket", server)
        return ""
    row.attrib.clear()
    for name, value in (("transport", "tcp"), ("tls", "yes"), ("name", server.address), ("port", str(server.port))):
        row.set(name, value)
    return server.prefix


def pool(directory: str, qemu_ids: Optional[Tuple[int, int]]) -> str:
    """A storage pool over the folder `directory`, called as that is; QEMU's group may enter it."""
    root = xmldoc.template("pool")
    xmldoc.find(root, "name").text = os.path.basename(directory)
    xmldoc.find(root, "target/path").text = directory
    permissions = xmldoc.find(root, "target/permissions")
    if qemu_ids:
        xmldoc.find(permissions, "group").text = str(qemu_ids[1])
    else:
        xmldoc.find(permissions, "mode").text = "0700"
        for name in ("owner", "group"):
            permissions.remove(xmldoc.find(permissions, name))
    return xmldoc.serialize(root)


def volume(path: str, size: int) -> str:
    """A sparse qcow2 file of `size` bytes in such a pool."""
    root = xmldoc.template("volume")
    xmldoc.find(root, "name").text = os.path.basename(path)
    xmldoc.find(root, "capacity").text = str(size)
    return xmldoc.serialize(root)


def checkpoint(name: str, description: str, disks: Sequence[JobDisk]) -> str:
    """A checkpoint document that names every disk of the domain."""
    root = xmldoc.template("checkpoint")
    xmldoc.find(root, "name").text = name
    xmldoc.find(root, "description").text = description
    rows = xmldoc.find(root, "disks")
    inside, outside = list(rows)
    for row in (inside, outside):
        rows.remove(row)
    for disk in disks:
        row = deepcopy(inside if disk.tracked else outside)
        row.set("name", disk.target)
        rows.append(row)
    return xmldoc.serialize(root)


def running_job(text: str) -> RunningJob:
    """Socket and exports of a job, read from backupGetXMLDesc.

    After a restart of the daemon libvirt 9.0 leaves exportname out: the disk's own name is its default.
    """
    root = xmldoc.parse(text, "the running backup job")
    server = root.find("server")
    found: Dict[str, Export] = {}
    for row in root.iterfind("disks/disk"):
        if row.get("backup") == "no":
            continue
        target = row.get("name", "")
        scratch = row.find("scratch")
        found[target] = Export(
            export=row.get("exportname") or target,
            bitmap=row.get("exportbitmap"),
            index=xmldoc.number(row.get("index", "")),
            scratch="" if scratch is None else scratch.get("file", ""),
        )
    if server is None:
        return RunningJob("", found)
    address = f"{server.get('name', '')}:{server.get('port', '')}" if server.get("port") else ""
    return RunningJob(server.get("socket", ""), found, address)


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint as libvirt lists it; `disks` maps each tracked target to its dirty bytes, None where the bitmap is broken or missing."""

    name: str
    description: str
    parent: Optional[str]
    created: int  # seconds since the epoch
    disks: Dict[str, Optional[int]]


def checkpoint_info(text: str) -> CheckpointInfo:
    root = xmldoc.parse(text, "a checkpoint of the domain")
    disks: Dict[str, Optional[int]] = {}
    for row in root.iterfind("disks/disk"):
        if row.get("checkpoint") == "bitmap":
            disks[row.get("name", "")] = xmldoc.number(row.get("size", ""))
    return CheckpointInfo(
        name=xmldoc.text(root, "name"),
        description=xmldoc.text(root, "description"),
        parent=xmldoc.text(root, "parent/name") or None,
        created=xmldoc.number(xmldoc.text(root, "creationTime")) or 0,
        disks=disks,
    )


def description(repository: str) -> str:
    """Marks a checkpoint as ours: with it, and an entry in that repository, it may be removed by us."""
    return f"libvirt-cbt repository={repository}"


def repository_of(info: CheckpointInfo) -> Optional[str]:
    """The id of the repository that a checkpoint says it belongs to; None for a checkpoint of somebody else."""
    mark = "libvirt-cbt repository="
    if not info.name.startswith(names.CHECKPOINT_PREFIX) or not info.description.startswith(mark):
        return None
    words = info.description[len(mark) :].split()
    return words[0] if words else None


def require(job: RunningJob, target: str) -> Export:
    try:
        return job.disks[target]
    except KeyError:
        raise errors.HypervisorError(reason=f"the backup job does not export disk '{target}'") from None


def redefinition(info: CheckpointInfo, disks: Sequence[JobDisk]) -> str:
    """A document that gives a checkpoint's metadata back to libvirt (flag REDEFINE), without a parent."""
    root = xmldoc.parse(checkpoint(info.name, info.description, disks), "our own document")
    created = etree.SubElement(root, "creationTime")
    created.text = str(info.created)
    for row in root.iterfind("disks/disk"):
        if row.get("checkpoint") == "bitmap":
            row.set("bitmap", info.name)
    return xmldoc.serialize(root)
