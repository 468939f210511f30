"""A domain as its live XML describes it: which disks there are and which of them can be protected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, List, Mapping, Optional, Tuple

import libvirt
from lxml import etree

from libvirt_cbt import errors, names, xmldoc
from libvirt_cbt.hypervisor import connection, site

STATES: Final = ("in no state", "running", "blocked", "paused", "shutting down", "shut off", "crashed", "suspended")
LOCAL: Final = ("file", "block", "volume")  # what has a path on the host
CRASHED: Final = "crashed"
REVERTED: Final = "reverted"
_FATES: Final = {
    (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_CRASHED): CRASHED,
    (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT): REVERTED,
    (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_FROM_SNAPSHOT): REVERTED,
    (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_FROM_SNAPSHOT): REVERTED,
}
AGENT_CHANNEL: Final = "org.qemu.guest_agent.0"


@dataclass(frozen=True)
class Disk:
    """One disk; `unprotected` says why it cannot be backed up, `untracked` why it cannot hold a bitmap."""

    target: str
    source_type: str  # file, block, volume, network
    source: str  # path, or a description of what has none
    format: str
    capacity: int  # bytes
    inodes: Tuple[str, ...]  # "dev:inode" of the image and its backing files, where they are files of its host
    serial: Optional[str]
    wwn: Optional[str]
    encrypted: bool
    unprotected: Optional[str]
    untracked: Optional[str]
    header: bytes = b""  # the first bytes of the image, where they can be read


@dataclass(frozen=True)
class Domain:
    """A domain at one moment; `xml` is without secrets."""

    name: str
    uuid: names.DomainUuid
    state: int
    persistent: bool
    disks: Tuple[Disk, ...]
    agent: str  # connected, disconnected, absent
    qemu_ids: Optional[Tuple[int, int]]  # user and group of its QEMU, where libvirt gave it others than ours
    xml: str

    @property
    def running(self) -> bool:
        return self.state in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED, libvirt.VIR_DOMAIN_PAUSED)

    @property
    def state_name(self) -> str:
        return STATES[self.state] if self.state < len(STATES) else "in an unknown state"

    def disk(self, asked: str) -> Disk:
        """By target or serial.  Errors: NoSuchDisk."""
        found = names.disk(self.disks, asked)
        if found is None:
            known = ", ".join(d.target for d in self.disks) or "none"
            raise errors.NoSuchDisk(domain=names.printable(self.name), target=names.printable(asked), known=known)
        return found


def read(host: connection.Host, uuid: names.DomainUuid) -> Domain:
    """The domain as it is now.  Errors: NoSuchDomain, HypervisorError."""
    dom = host.lookup(uuid)
    with host.translated(uuid):
        xml = dom.XMLDesc(0)
        state = dom.state()[0]
        root = xmldoc.parse(xml, f"the XML of domain {uuid}")
        disks: List[Disk] = []
        seen = host.site.look(sorted({path for row in root.iterfind("devices/disk") for path in _paths(host, row)}))
        for row in root.iterfind("devices/disk"):
            disk = _disk(host, dom, row, seen)
            if disk:
                disks.append(disk)
        persistent = bool(dom.isPersistent())
    return Domain(
        name=xmldoc.text(root, "name") or str(uuid),
        uuid=uuid,
        state=state,
        persistent=persistent,
        disks=tuple(disks),
        agent=_agent(root),
        qemu_ids=_qemu_ids(root),
        xml=xml,
    )


def targets(host: connection.Host, uuid: names.DomainUuid) -> List[str]:
    """The targets of all disks, from the XML alone: no job of somebody else's holds that up."""
    with host.translated(uuid):
        root = xmldoc.parse(host.lookup(uuid).XMLDesc(0), f"the XML of domain {uuid}")
    return [row.get("dev", "") for row in root.iterfind("devices/disk/target")]


def alive(host: connection.Host, uuid: names.DomainUuid) -> bool:
    """Whether the guest still runs; a host that does not answer counts as yes."""
    try:
        state = host.retry(lambda conn: conn.lookupByUUIDString(uuid).state()[0])
    except libvirt.libvirtError as e:
        return bool(e.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN)
    return state in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED, libvirt.VIR_DOMAIN_PAUSED)


def fate(host: connection.Host, uuid: names.DomainUuid) -> Optional[str]:
    """What libvirt remembers of how the guest came to be as it is: CRASHED, REVERTED (to a snapshot), or None.

    It forgets with the next start, stop or pause.  Errors: NoSuchDomain, HypervisorError.
    """
    dom = host.lookup(uuid)
    with host.translated(uuid):
        return _FATES.get(tuple(dom.state()))


def allocation(host: connection.Host, uuid: names.DomainUuid, target: str) -> int:
    """Bytes that a disk's image occupies: what a full backup reads at most."""
    with host.translated(uuid):
        return int(host.lookup(uuid).blockInfo(target)[1])


def _agent(root: etree._Element) -> str:
    for channel in root.iterfind("devices/channel/target"):
        if channel.get("name") == AGENT_CHANNEL:
            return channel.get("state") or "disconnected"
    return "absent"


def _qemu_ids(root: etree._Element) -> Optional[Tuple[int, int]]:
    """From <seclabel model='dac'><label>+64055:+109</label>: libvirt tells whom QEMU runs as."""
    for label in root.iterfind("seclabel"):
        if label.get("model") == "dac":
            ids = xmldoc.owner(xmldoc.text(label, "label"))
            if ids:
                return ids
    return None


def _disk(
    host: connection.Host, dom: object, row: etree._Element, seen: Mapping[str, site.Seen]
) -> Optional[Disk]:
    target_row = row.find("target")
    if target_row is None:
        return None
    target = names.target(target_row.get("dev", ""))
    source_type, source = _source(host, row)
    driver = row.find("driver")
    fmt = "raw" if driver is None else driver.get("type", "raw")
    unprotected = _unprotected(row, source)
    capacity = 0
    if not unprotected:
        try:
            capacity = int(dom.blockInfo(target)[0])  # type: ignore[attr-defined]
        except libvirt.libvirtError as e:
            unprotected = f"its size cannot be read: {connection.message(e)}"
        if not unprotected and not capacity:
            unprotected = "it is empty"
    image = seen.get(source) if source_type in LOCAL else None
    header = image.header if image else b""
    found = [seen[path].inode for path in _paths(host, row) if path in seen]
    return Disk(
        target=target,
        source_type=source_type,
        source=source,
        format=fmt,
        capacity=capacity,
        inodes=tuple(inode for inode in found if inode),
        serial=xmldoc.text(row, "serial") or None,
        wwn=xmldoc.text(row, "wwn") or None,
        encrypted=row.find(".//encryption") is not None,  # also of a backing file only
        unprotected=unprotected,
        untracked=None if unprotected else _untracked(fmt, header),
        header=header,
    )


def _source(host: connection.Host, row: etree._Element) -> Tuple[str, str]:
    kind = row.get("type", "file")
    source = row.find("source")
    if source is None:
        return kind, ""
    if kind == "volume":
        pool, volume = source.get("pool", ""), source.get("volume", "")
        return kind, host.volume_path(pool, volume) or f"{pool}/{volume}"
    if kind == "network":
        return kind, f"{source.get('protocol', '')}:{_hosts(source)}{source.get('name', '')}"
    return kind, source.get("file") or source.get("dev") or source.get("dir") or source.get("path") or ""


def _hosts(source: etree._Element) -> str:
    """Where a network disk is: the same name on two servers is two disks."""
    hosts = [h.get("socket") or f"{h.get('name', '')}:{h.get('port', '')}" for h in source.iterfind("host")]
    return f"//{','.join(hosts)}/" if hosts else ""


def _unprotected(row: etree._Element, source: str) -> Optional[str]:
    device = row.get("device", "disk")
    if device != "disk":
        return f"it is a {device}"
    if row.find("readonly") is not None:
        return "it is read-only"
    if row.find("shareable") is not None:
        return "it is shareable: other guests may write to it"
    if row.find("transient") is not None:
        return "it is transient: its changes are thrown away"
    if row.get("type") not in ("file", "block", "volume", "network"):
        return f"its source type '{row.get('type')}' cannot be exported"
    if not source:
        return "it has no source"
    return None


def _untracked(fmt: str, header: bytes) -> Optional[str]:
    """Only qcow2 version 3 keeps bitmaps; a header that this user may not read is taken for one that does."""
    if fmt != "qcow2":
        return f"a {fmt} image cannot hold a bitmap"
    if header[:4] == b"QFI\xfb" and int.from_bytes(header[4:8], "big") < 3:
        return "a qcow2 image of version 2 cannot hold a bitmap (`qemu-img amend -o compat=1.1` with the guest off)"
    return None


def _paths(host: connection.Host, row: etree._Element) -> List[str]:
    """The image and its backing files, where they are files of the host."""
    kind, source = _source(host, row)
    if kind not in LOCAL:
        return []
    below = [s.get("file") or s.get("dev") or "" for s in row.iterfind(".//backingStore/source")]
    return [path for path in (source, *below) if path]
