"""What OpenStack calls a domain and its disks, as nova writes it into the domain's XML.

The domain's UUID is the instance's, and a disk's serial the id of its Cinder volume; the name that people gave the
instance is in the metadata.  https://docs.openstack.org/nova/latest/contributor/testing/libvirt-numa.html has samples;
nova/virt/libvirt/config.py (LibvirtConfigGuestMetaNovaInstance) writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Optional

from lxml import etree

from libvirt_cbt import errors, xmldoc

NAMESPACE: Final = "http://openstack.org/xmlns/libvirt/nova/"  # and a version: 1.0, 1.1


@dataclass(frozen=True)
class Instance:
    """`name` is what people call it; it need not be unique.  `project` is a UUID."""

    name: str
    project: Optional[str]


def instance(root: etree._Element) -> Optional[Instance]:
    """Nova's record in the XML of a domain; None for a domain that is not nova's."""
    metadata = root.find("metadata")
    for element in metadata if metadata is not None else ():
        if not isinstance(element.tag, str) or not element.tag.startswith("{" + NAMESPACE):
            continue
        kind = etree.QName(element)
        name = xmldoc.text(element, f"{{{kind.namespace}}}name")
        if kind.localname == "instance" and name:
            project = element.find(f"{{{kind.namespace}}}owner/{{{kind.namespace}}}project")
            return Instance(name, None if project is None else project.get("uuid"))
    return None


def name(xml: str) -> Optional[str]:
    """What people call the instance; None for a domain that is not nova's, or a document that cannot be read."""
    if NAMESPACE not in xml:
        return None
    try:
        found = instance(xmldoc.parse(xml, "the XML of a domain"))
    except errors.HypervisorError:
        return None
    return found.name if found else None
