"""Domains that we make: defined, started, and taken away again."""

from __future__ import annotations

import time
from typing import Callable, Final, List, Optional, Tuple

import libvirt
from lxml import etree

from libvirt_cbt import errors, names, xmldoc
from libvirt_cbt.hypervisor import connection

PING_SECONDS: Final = 0.2


def require_free(host: connection.Host, name: str, uuid: Optional[str]) -> None:
    """Errors: IdentityTaken when a domain of the host has the name, or the UUID."""
    if not name or "/" in name or not name.isprintable() or name in (".", ".."):
        raise errors.Usage(reason=f"{names.printable(name)!r} will not do as the name of a domain")
    for other, known in host.all():
        if other == name:
            raise _taken(host, f"the name '{name}'", other, "give another one")
        if uuid and known == uuid:
            raise _taken(host, f"the UUID {uuid}", other, "leave out --same-identity, or undefine that domain first")


def _taken(host: connection.Host, what: str, domain: str, way_out: str) -> errors.IdentityTaken:
    return errors.IdentityTaken(what=what, domain=names.printable(domain), uri=host.uri, way_out=way_out)


def define(host: connection.Host, xml: str) -> names.DomainUuid:
    """Errors: HypervisorError, as when the document breaks libvirt's schema."""

    def call(conn: object) -> str:
        made = conn.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)  # type: ignore[attr-defined]
        return str(made.UUIDString())

    with host.translated("it"):
        return names.domain_uuid(host.retry(call))


def start(host: connection.Host, uuid: names.DomainUuid) -> None:
    with host.translated(uuid):
        host.lookup(uuid).create()


def wait_for_agent(
    host: connection.Host, uuid: names.DomainUuid, seconds: float, stop: Callable[[], None]
) -> Optional[float]:
    """Seconds until the guest's agent told its time; None when it did not within `seconds`, or the guest ended.

    Errors: what `stop` raises.
    """
    dom = host.lookup(uuid)
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        stop()
        try:
            dom.getTime(0)
        except libvirt.libvirtError as e:
            if e.get_error_code() in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
                return None
            time.sleep(PING_SECONDS)
        else:
            return time.monotonic() - begun
    return None


def has_agent(xml: str) -> bool:
    root = xmldoc.parse(xml, "the XML of the domain")
    return root.find("devices/channel/target[@name='org.qemu.guest_agent.0']") is not None


def inactive_xml(host: connection.Host, uuid: names.DomainUuid) -> str:
    """Without secrets, as it is when it is off."""
    with host.translated(uuid):
        return str(host.lookup(uuid).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))


def remove(host: connection.Host, uuid: names.DomainUuid) -> List[str]:
    """Ends and undefines a domain, with all that libvirt keeps of it; what was done."""
    done: List[str] = []
    dom = host.lookup(uuid)
    with host.translated(uuid):
        if dom.isActive():
            dom.destroy()
            done.append("ended the domain")
        flags = (
            libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
            | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
        )
        if dom.isPersistent():
            dom.undefineFlags(flags)
            done.append("undefined the domain")
    return done


def qemu_ids(host: connection.Host) -> Optional[Tuple[int, int]]:
    """User and group that QEMU gets by default, from the capabilities; None when it runs as we do."""
    with host.translated("it"):
        text = host.retry(lambda conn: str(conn.getCapabilities()))
    root: etree._Element = xmldoc.parse(text, "the capabilities of the host")
    for model in root.iterfind("host/secmodel"):
        if xmldoc.text(model, "model") == "dac":
            ids = xmldoc.owner(xmldoc.text(model, "baselabel"))
            if ids:
                return ids
    return None
