"""A stored domain's XML made into a new domain: other disks, another identity, nothing that only the live one had.

The stored document is that of the running guest, as its hardware is what was backed up; what libvirt adds to a running
domain (aliases, host devices' names, chains of backing files) is taken out.  https://libvirt.org/formatdomain.html
"""

from __future__ import annotations

import secrets
import uuid as uuids
from dataclasses import dataclass
from typing import Final, List, Mapping, Optional, Tuple

from lxml import etree

from libvirt_cbt import errors, names, xmldoc
from libvirt_cbt.hypervisor import reach

QEMU_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
NAMESPACE: Final = "https://libvirt-cbt.invalid/boot/1"  # of our own element in <metadata>
AUTOMATIC: Final = ("/channel/target/", "/qemu/channel/", "/libvirt/qemu/")  # sockets that libvirt itself places
OF_QCOW2: Final = ("discard_no_unref",)


@dataclass(frozen=True)
class Image:
    """A disk of the new domain; `backing` is the NBD export (socket, name) below it, as raw."""

    path: str
    format: str
    backing: Optional[Tuple[str, str]] = None


@dataclass(frozen=True)
class Copy:
    """What the new domain is to be.  Without `uuid` it keeps the stored identity; `record` goes into its metadata."""

    name: str
    uuid: Optional[str]
    images: Mapping[str, Image]
    nvram: Optional[str] = None
    tpm: bool = False  # whether the state of its emulated TPM comes along
    links_down: bool = False
    record: Optional[str] = None


def document(text: str, copy: Copy) -> Tuple[str, List[str]]:
    """The XML to define, and what a person should know of it as sentences.  Errors: HypervisorError."""
    root = xmldoc.parse(text, "the stored XML of the domain")
    warnings: List[str] = []
    root.attrib.pop("id", "")
    name = root.find("name")
    if name is None:
        raise errors.HypervisorError(reason="the stored XML of the domain names no domain")
    name.text = copy.name
    _clean(root)
    _disks(root, copy, warnings)
    _firmware(root, copy, warnings)
    if copy.uuid:
        _identity(root, copy.uuid, warnings)
    if copy.links_down:
        for interface in root.iterfind("devices/interface"):
            link = interface.find("link")
            link = etree.SubElement(interface, "link") if link is None else link
            link.set("state", "down")
    own = {image.path for image in copy.images.values()} | {i.backing[0] for i in copy.images.values() if i.backing}
    warnings += reach.warnings(root, own | {copy.nvram or ""})
    if copy.record:
        metadata = root.find("metadata")
        metadata = etree.SubElement(root, "metadata") if metadata is None else metadata
        etree.SubElement(metadata, f"{{{NAMESPACE}}}boot", nsmap={"cbt": NAMESPACE}).text = copy.record
    return xmldoc.serialize(root), warnings


def nvram(text: str) -> Optional[str]:
    """The file with the UEFI variables, None when the domain has none or it is no local file.  Errors: HypervisorError."""
    root = xmldoc.parse(text, "the XML of the domain")
    row = root.find("os/nvram")
    if row is None:
        return None
    source = row.find("source")
    return (source.get("file", "") if source is not None else (row.text or "").strip()) or None


def emulated_tpm(text: str) -> bool:
    """Whether there is a TPM whose state libvirt keeps on the host."""
    root = xmldoc.parse(text, "the XML of the domain")
    return any(row.get("type") == "emulator" for row in root.iterfind("devices/tpm/backend"))


def record(text: str) -> Optional[str]:
    """What `document` put into a domain's metadata; None for a domain that was not made so."""
    found = xmldoc.parse(text, "the XML of the domain").find(f"metadata/{{{NAMESPACE}}}boot")
    return None if found is None else (found.text or "")


def _remove(row: etree._Element) -> None:
    parent = row.getparent()
    if parent is not None:
        parent.remove(row)


def _drop(parent: etree._Element, *paths: str) -> None:
    for path in paths:
        for row in parent.findall(path):
            _remove(row)


def _clean(root: etree._Element) -> None:
    """What only the running domain had."""
    for label in root.findall("seclabel"):
        if label.get("type", "dynamic") == "dynamic":
            _remove(label)
    for alias in list(root.iter("alias")):
        if not alias.get("name", "").startswith("ua-"):
            _remove(alias)
    for interface in root.iterfind("devices/interface"):
        source, target = interface.find("source"), interface.find("target")
        if source is not None:
            source.attrib.pop("portid", "")
            if source.get("network"):
                source.attrib.pop("bridge", "")
        if target is not None and target.get("dev", "").startswith(("vnet", "macvtap", "macvlan", "vif")):
            _remove(target)
    for kind in ("serial", "console", "parallel", "channel"):
        for row in root.iterfind(f"devices/{kind}"):
            _clean_character_device(row)
    for graphics in root.iterfind("devices/graphics"):
        if graphics.get("autoport") == "yes":
            for name in ("port", "tlsPort"):
                graphics.attrib.pop(name, "")
        for row in (graphics, *graphics.iterfind("listen")):
            if any(part in row.get("socket", "") for part in AUTOMATIC):
                del row.attrib["socket"]
    for cid in root.iterfind("devices/vsock/cid"):
        if cid.get("auto") == "yes":
            cid.attrib.pop("address", "")


def _clean_character_device(row: etree._Element) -> None:
    row.attrib.pop("tty", "")
    source = row.find("source")
    if source is None:
        return
    placed = row.get("type") == "unix" and any(part in source.get("path", "") for part in AUTOMATIC)
    if row.get("type") == "pty" or placed:
        _remove(source)


def _disks(root: etree._Element, copy: Copy, warnings: List[str]) -> None:
    for row in root.findall("devices/disk"):
        target_row = row.find("target")
        target = "" if target_row is None else target_row.get("dev", "")
        image = copy.images.get(target)
        if image:
            _replace(row, image, warnings, target)
        elif row.get("device") in ("cdrom", "floppy"):
            _drop(row, "source", "backingStore", "mirror", "encryption", "auth")
            row.set("type", "file")
        else:
            _remove(row)
            warnings.append(f"disk {names.printable(target)} is not among the restored ones and was left out")


def _replace(row: etree._Element, image: Image, warnings: List[str], target: str) -> None:
    if row.find("encryption") is not None or row.find("source/encryption") is not None:
        warnings.append(f"disk {target} was encrypted by the host; what was restored of it is not")
    _drop(row, "source", "backingStore", "mirror", "encryption", "auth", "transient")
    for name in ("rawio", "sgio", "snapshot"):
        row.attrib.pop(name, "")
    row.set("type", "file")
    driver = row.find("driver")
    if driver is None:
        driver = etree.Element("driver")
        row.insert(0, driver)
    driver.set("name", "qemu")
    driver.set("type", image.format)
    if image.format != "qcow2":
        _drop(driver, "metadata_cache")
        for name in OF_QCOW2:
            driver.attrib.pop(name, "")
    if image.backing:
        # Its backing file is no file: these need one that the host can open without its cache.
        for name in ("cache", "io"):
            driver.attrib.pop(name, "")
    at = list(row).index(driver) + 1
    row.insert(at, etree.Element("source", file=image.path))
    if image.backing:
        row.insert(at + 1, _backing(*image.backing))


def _backing(socket: str, export: str) -> etree._Element:
    below = etree.Element("backingStore", type="network")
    etree.SubElement(below, "format", type="raw")
    source = etree.SubElement(below, "source", protocol="nbd", name=export)
    etree.SubElement(source, "host", transport="unix", socket=socket)
    etree.SubElement(below, "backingStore")
    return below


def _firmware(root: etree._Element, copy: Copy, warnings: List[str]) -> None:
    row = root.find("os/nvram")
    if row is not None:
        _drop(row, "source")
        row.attrib.pop("type", "")
        row.text = copy.nvram
        if copy.nvram is None:
            warnings.append("this backup has no UEFI variables; the firmware begins with those of its template")
            if not row.get("template"):
                _remove(row)
    emulated = any(backend.get("type") == "emulator" for backend in root.iterfind("devices/tpm/backend"))
    if emulated and not copy.tpm:
        warnings.append(
            "the state of the emulated TPM does not come along, it begins empty: what was sealed with it needs its recovery key"
        )


def _identity(root: etree._Element, uuid: str, warnings: List[str]) -> None:
    """What two domains on one host must not share."""
    row = root.find("uuid")
    row = etree.SubElement(root, "uuid") if row is None else row
    row.text = uuid
    for entry in root.iterfind("sysinfo/system/entry"):
        if entry.get("name") == "uuid":
            entry.text = uuid
    for genid in root.iterfind("genid"):
        genid.text = None  # libvirt makes one: the guest is told that it is a copy
    for interface in root.iterfind("devices/interface"):
        mac = interface.find("mac")
        mac = etree.SubElement(interface, "mac") if mac is None else mac
        mac.attrib.clear()
        mac.set("address", _mac())
    for cid in root.iterfind("devices/vsock/cid"):
        cid.attrib.clear()
        cid.set("auto", "yes")
    for graphics in root.iterfind("devices/graphics"):
        if graphics.get("port") and graphics.get("autoport") != "yes":
            graphics.set("autoport", "yes")
            for name in ("port", "tlsPort", "websocket"):
                graphics.attrib.pop(name, "")
    _leave(root, warnings)


def _leave(root: etree._Element, warnings: List[str]) -> None:
    """Takes out what belongs to the original: its devices of the host, the files and sockets that it writes to."""
    gone: List[str] = []
    # The stored label and emulator are those of another QEMU, which may have been allowed more than a copy should be.
    _drop(root, "seclabel", "devices/emulator")
    for path, what in (
        ("devices/filesystem", "shared folder"),
        ("devices/shmem", "shared memory"),
        ("devices/input[@type='evdev']", "input device of the host"),
        ("devices/input[@type='passthrough']", "input device of the host"),
        ("devices/tpm/backend[@type='passthrough']/..", "TPM of the host"),
        ("devices/hostdev", "host device"),
        ("devices/interface[@type='hostdev']", "passed-through network device"),
        ("devices/memory[@model='nvdimm']", "NVDIMM"),
        ("devices/redirdev[@type='tcp']", "redirected device"),
        (f"{{{QEMU_NAMESPACE}}}commandline", "qemu:commandline"),
    ):
        for row in root.findall(path):
            _remove(row)
            gone.append(what)
    for kind in ("serial", "console", "parallel", "channel"):
        for row in root.findall(f"devices/{kind}"):
            _drop(row, "log")
            if row.get("type") in ("pty", "spicevmc", "spiceport", "qemu-vdagent", "dbus", "null", "vc", "stdio"):
                continue
            if row.get("type") == "unix" and row.find("source") is None:
                continue  # libvirt places it
            agent = row.find("target[@name='org.qemu.guest_agent.0']")
            if kind == "channel" and agent is None:
                _remove(row)
                gone.append(kind)
                continue
            _drop(row, "source", "protocol")
            row.set("type", "unix" if agent is not None else "null")
            if agent is None:
                warnings.append(f"the {kind} device leads nowhere now: its file or socket belongs to the original")
    if gone:
        warnings.append(f"left out, as the original may have it: {', '.join(sorted(set(gone)))}")


def _mac() -> str:
    """Under QEMU's prefix, as libvirt makes them."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))


def new_uuid() -> str:
    return str(uuids.uuid4())
