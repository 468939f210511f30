"""The one XML parser, and the templates that every generated document begins as.

XML reaches us from libvirt, from a repository and from people; none of it is
trusted.  No DOCTYPE (so no entities), no network, no huge trees.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final, Optional, Tuple

from lxml import etree

from libvirt_cbt import errors, names

MAX_BYTES: Final = 4 * 1024 * 1024


def parse(text: str, what: str) -> etree._Element:
    """The root of a document; `what` names it in the error.  Errors: HypervisorError."""
    data = text.encode("utf-8", "surrogatepass")
    if len(data) > MAX_BYTES:
        raise errors.HypervisorError(reason=f"{what} is longer than {MAX_BYTES} bytes")
    # Before it is parsed: libxml2 2.9 expands parameter entities in a DOCTYPE whatever it is told, a bomb of them for ever.
    if _doctype(text):
        raise errors.HypervisorError(reason=f"{what} carries a DOCTYPE, which libvirt never writes")
    # A parser for each call: lxml parsers are not to be shared between threads.  What was looked at is what it reads: an
    # encoding that the document names does not count.
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, remove_blank_text=True, encoding="utf-8"
    )
    try:
        root = etree.fromstring(data, parser)
    except (etree.XMLSyntaxError, ValueError) as e:
        raise errors.HypervisorError(reason=f"{what} is not well-formed XML: {e}") from None
    document: Any = root.getroottree().docinfo
    if document.doctype:
        raise errors.HypervisorError(reason=f"{what} carries a DOCTYPE, which libvirt never writes")
    return root


def _doctype(text: str) -> bool:
    """Whether there is one: after what may stand before it, and before the root element (XML 1.0, production 22)."""
    at = 1 if text.startswith("\ufeff") else 0
    while True:
        while text[at : at + 1] in (" ", "\t", "\r", "\n"):
            at += 1
        end = "?>" if text.startswith("<?", at) else "-->" if text.startswith("<!--", at) else ""
        if not end:
            return text.startswith("<!", at)
        at = text.find(end, at + len(end) + 1)
        if at < 0:
            return False  # the parser says what is wrong
        at += len(end)


def require_path(path: str) -> None:
    """Errors: Usage for a path that XML, and so libvirt, cannot carry: control characters, or what is no Unicode."""
    try:
        etree.Element("x").text = path
    except ValueError:
        reason = f"libvirt cannot be told of a path with such characters: {names.printable(path)}"
        raise errors.Usage(reason=reason) from None


def serialize(root: etree._Element) -> str:
    text: str = etree.tostring(root, pretty_print=True, encoding="unicode")
    return text


def template(name: str) -> etree._Element:
    """A fresh tree of xml_templates/<name>.xml, its comments taken out."""
    root = parse(_template_text(name), f"template {name}.xml")
    for comment in list(root.iter(etree.Comment)):
        parent = comment.getparent()
        if parent is not None:
            parent.remove(comment)
    return root


@cache
def _template_text(name: str) -> str:
    # In a wheel the folder is inside the package; in a checkout (also an editable install) it is beside it.
    inside = resources.files("libvirt_cbt") / "xml_templates" / f"{name}.xml"
    if inside.is_file():
        return inside.read_text(encoding="utf-8")
    return (Path(__file__).parent.parent / "xml_templates" / f"{name}.xml").read_text(encoding="utf-8")


def find(parent: etree._Element, path: str) -> etree._Element:
    """The element at `path`, which must exist (in a template of ours)."""
    found = parent.find(path)
    if found is None:
        raise LookupError(f"template has no {path}")
    return found


def number(digits: str) -> Optional[int]:
    """What libvirt's schema calls unsignedLong; None for anything else, be it digits of another script."""
    return int(digits) if re.fullmatch(r"[0-9]{1,20}", digits) and int(digits) < 1 << 64 else None


def owner(label: str) -> Optional[Tuple[int, int]]:
    """User and group of a label of model dac, as `+64055:+109`; None where they are named, or no ids."""
    found = re.fullmatch(r"\+?([0-9]{1,10}):\+?([0-9]{1,10})", label)
    ids = (int(found[1]), int(found[2])) if found else None
    return ids if ids and max(ids) < (1 << 32) - 1 else None


def text(parent: etree._Element, path: str) -> str:
    """The text of the element at `path`; empty when either is missing."""
    return (parent.findtext(path) or "").strip()
