"""What of this host a domain made from a stored document could still reach.

The document comes from a repository.  Whoever could write there chose it, and a kernel, a shared folder or a label in
it is read, or taken on, by the QEMU of this host.
"""

from __future__ import annotations

from typing import Collection, Final, List

from lxml import etree

from libvirt_cbt import names

# What every host has for every guest.
COMMON: Final = ("/dev/random", "/dev/urandom", "/usr/share/", "/usr/bin/qemu-", "/usr/libexec/qemu-kvm")
MOST: Final = 10


def warnings(root: etree._Element, ours: Collection[str]) -> List[str]:
    """Sentences for a person: every path of the host that is named, but for the files `ours`; and labels that are given."""
    found = [f"{names.printable(path)} ({where})" for where, path in _paths(root) if path not in ours]
    said = []
    if found:
        more = f" and {len(found) - MOST} more" if len(found) > MOST else ""
        said.append(f"it uses what this host has at {', '.join(found[:MOST])}{more}")
    for label in root.iterfind("seclabel"):
        kind = label.get("type", "dynamic")
        if kind != "dynamic":
            given = names.printable((label.findtext("label") or "none").strip())
            said.append(f"its QEMU runs with a {kind} label of {names.printable(label.get('model', 'every'))}: {given}")
    return said


def _paths(root: etree._Element) -> List[tuple[str, str]]:
    """(element, path) in the order of the document, each once."""
    found = []
    for top in root:
        if top.tag in ("metadata", "resource"):
            continue  # what other programs keep there, and a cgroup: neither is a file
        for row in top.iter(etree.Element):
            tag = etree.QName(row).localname
            for value in [*row.attrib.values(), row.text or ""]:
                text = str(value).strip()
                if text.startswith("/") and not text.startswith(COMMON):
                    found.append((tag, text))
    return list(dict.fromkeys(found))
