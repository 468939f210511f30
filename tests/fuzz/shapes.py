"""Inputs that are nearly right, for hypothesis: a seed of the corpus with a few edits, or the words of a language."""

from __future__ import annotations

import json
import struct
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, Callable, Dict, Final, List, Tuple

from hypothesis import strategies as st
from lxml import etree

from tests.fuzz import targets

CORPUS: Final = Path(__file__).with_name("corpus")
Draw = Callable[..., Any]

ODD: Final[Tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**400, 0.5, 1e400, float("nan"), "", ".", "..", "/", "a/../b", "\0",
    "\ud800", "vda", "vda\n", "x" * 5000, "0" * 16, "f" * 64, "\u0663", [], {}, [[]], {"": None}, {"vda": {}}, ["vda"] * 3,
)  # fmt: skip
WORDS: Final = (
    "", "vda", "vdb", "0", "-1", "1", "65536", "9" * 30, "9" * 5000, "\u0663", "file", "block", "network", "volume", "qcow2",
    "raw", "no", "yes", "bitmap", "dac", "+64055:+109", "+0:+99999999999", "0:\u0663", "/", "//", "/x/../y", "../x", "a b",
    "org.qemu.guest_agent.0", "connected", "disk", "cdrom", "emulator", "unix", "dynamic", "static", "none", "x" * 200,
)  # fmt: skip
TAGS: Final = ("disk", "source", "target", "driver", "backingStore", "seclabel", "label", "channel", "name", "uuid", "a", "encryption")
CHANGE_IDS: Final = (
    "cbt1:", "01234567-0123-0123-0123-0123456789ab", "/", "-", "*", "latest", "0", "17", "deadbeef", "0123456789abcdef", "9" * 18,
    "\n", "\u0663", "F",
)  # fmt: skip
TOML: Final = (
    "[", "]", "[[", "]]", "=", ",", "{", "}", "\n", '"', "'''", "#", ".", "policy", "defaults", "host", "check", "x", "match",
    "connect", "jobs", "keep_within", "wait", "warning_age", "bandwidth", "true", "1", "-1", "1e400", "nan", "0x7fffffffffffffff", '"1y5m"',
    '"2d"', '"*"', '"qemu:///system"', "1979-05-27T07:32:00Z", "9" * 400, '"\\uD800"', "a.b.c", '["*"]', "[" * 50, "\u00e9",
)  # fmt: skip
FAR: Final = ("ok", "no", " ", "2f61", "zz", "space", "denied", "1", "-1", "9" * 30, "free", "full", "\x1b[2J", "\u0663", "\r", "text")
EVENTS: Final = (
    str(targets.UUID), ".", "started", "stopped", "crashed", "reverted", "defined", "overflow", "\n", "\t", ":", "..", "/", "A", "\x1b[2J",
)  # fmt: skip


@cache
def seeds(name: str) -> Tuple[bytes, ...]:
    return tuple(path.read_bytes() for path in sorted((CORPUS / name).iterdir()))


def words(known: Tuple[str, ...], most: int) -> st.SearchStrategy[bytes]:
    one = st.sampled_from(known).map(lambda word: word.encode("utf-8", "surrogatepass")) | st.binary(max_size=4)
    return st.lists(one, max_size=most).map(b"".join)


def _places(value: Any) -> List[Tuple[Any, Any]]:
    """Everything inside a JSON value, as (container, key)."""
    found: List[Tuple[Any, Any]] = []
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found += [(value, key), *_places(value[key])]
    return found


@st.composite
def edited_json(draw: Draw, name: str, prefix: int = 0) -> bytes:
    """A seed's document with some values exchanged, removed or added; its first `prefix` bytes stay."""
    seed = draw(st.sampled_from([one for one in seeds(name) if _loads(one[prefix:]) is not None]))
    value = _loads(seed[prefix:])
    for _ in range(draw(st.integers(0, 3))):
        places = _places(value)
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(("odd", "odd", "odd", "gone", "twice")))
        if what == "odd":
            # A copy: the next edit may be inside it, and would change ODD for all that follow, or lead round in a circle.
            container[key] = deepcopy(draw(st.sampled_from(ODD) | st.text(max_size=4) | st.integers()))
        elif what == "gone":
            del container[key]
        elif isinstance(container, list):
            container.append(deepcopy(container[key]))
        else:
            container[draw(st.text(max_size=4))] = deepcopy(container[key])
    return bytes(seed[:prefix] + json.dumps(value).encode("utf-8", "surrogatepass"))


def _loads(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


@st.composite
def edited_xml(draw: Draw, name: str) -> bytes:
    """A seed's document with some attributes, texts and elements exchanged, removed or added."""
    root = etree.fromstring(draw(st.sampled_from([one for one in seeds(name) if _root(one)])))
    for _ in range(draw(st.integers(0, 4))):
        row = draw(st.sampled_from([one for one in root.iter() if isinstance(one.tag, str)]))
        word = draw(st.sampled_from(WORDS))
        what = draw(st.sampled_from(("attribute", "attribute", "text", "gone", "twice", "new", "tag")))
        if what == "attribute":
            row.set(draw(st.sampled_from([*row.attrib, "type", "name", "dev"])), word)
        elif what == "text":
            row.text = word
        elif what == "tag":
            row.tag = draw(st.sampled_from(TAGS))
        elif what == "new":
            etree.SubElement(row, draw(st.sampled_from(TAGS))).text = word
        elif row is not root and what == "gone":
            row.getparent().remove(row)
        elif row is not root:
            row.addnext(etree.fromstring(etree.tostring(row, with_tail=False)))
    return bytes(etree.tostring(root))


def _root(data: bytes) -> bool:
    try:
        etree.fromstring(data)
    except (etree.XMLSyntaxError, ValueError):
        return False
    return True


@st.composite
def rows(draw: Draw) -> bytes:
    """Rows of a delta or contents file, most of them in order."""
    contents, end, out = draw(st.booleans()), 0, b""
    for _ in range(draw(st.integers(0, 12))):
        gap, length = draw(st.sampled_from((0, 0, 512, 65536, -512, 2**62))), draw(st.sampled_from((512, 65536, 1 << 20, 0, 2**63)))
        offset = (end + gap) % 2**64
        out += struct.pack("<QQB", offset, length, draw(st.sampled_from((1, 2, 1, 2, 0, 3)))) + (bytes(32) if contents else b"")
        end = offset + length
    return bytes([1 | contents << 1]) + out


@st.composite
def reply(draw: Draw) -> bytes:
    """A block-status reply whose lengths are mostly sectors."""
    length = st.sampled_from((0, 1, 511, 512, 1024, 4096, 65024, 65535, 2**32 - 1, 2**63, 2**64 - 1))
    pairs = draw(st.lists(st.tuples(length, st.integers(0, 5)), max_size=40))
    head = bytes([draw(st.integers(0, 7)), draw(st.integers(0, 255)), draw(st.sampled_from((0, 1, 128))), draw(st.integers(0, 20))])
    return head + b"".join(struct.pack("<QB", *pair) for pair in pairs)


@cache
def shapes() -> Dict[str, st.SearchStrategy[bytes]]:
    return {
        "sealed": edited_json("sealed", 1) | st.binary(),
        "arrays": rows() | st.binary(),
        "change_id": words(CHANGE_IDS, 8),
        "backup_xml": edited_xml("backup_xml") | st.binary(),
        "checkpoint_xml": edited_xml("checkpoint_xml") | st.binary(),
        "domain_xml": edited_xml("domain_xml") | st.binary(),
        "agent": st.binary(max_size=200),
        "qemu_img": edited_json("qemu_img") | st.binary(),
        "block_status": reply() | st.binary(),
        "far_end": words(FAR, 8),
        "configuration": words(TOML, 30),
        "events": words(EVENTS, 30),
        "records": edited_json("records") | st.binary(),
    }
