"""What --at, --since and --until take, parsed into one type.

A point is a generation number, a backup id (or the beginning of one), a change
id, `latest`, or (since only) `*`: the beginning of time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Union

from libvirt_cbt import errors, names


@dataclass(frozen=True)
class Latest:
    def __str__(self) -> str:
        return "latest"


@dataclass(frozen=True)
class Generation:
    number: int

    def __str__(self) -> str:
        return str(self.number)


@dataclass(frozen=True)
class Id:
    """A backup id or at least four of its first digits."""

    prefix: str

    def __str__(self) -> str:
        return self.prefix


@dataclass(frozen=True)
class ChangeId:
    lineage: str
    generation: int
    tag: str  # first 8 hex digits of the generation's id

    def __str__(self) -> str:
        return names.change_id(self.lineage, self.generation, self.tag)


@dataclass(frozen=True)
class Beginning:
    def __str__(self) -> str:
        return "*"


Point = Union[Latest, Generation, Id, ChangeId, Beginning]

_CHANGE_ID = re.compile(r"cbt1:([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/([1-9][0-9]{0,17})-([0-9a-f]{8})\Z")
_NUMBER = re.compile(r"[0-9]{1,18}\Z")
_PREFIX = re.compile(r"[0-9a-f]{4,16}\Z")


def at(text: str) -> Point:
    """A generation number, a backup id or `latest`.  Digits alone are a number, unless they are all 16 of an id."""
    if text == "latest":
        return Latest()
    if _NUMBER.match(text) and len(text) < 16:
        return Generation(int(text))
    if _PREFIX.match(text):
        return Id(text)
    raise errors.Usage(
        reason=f"{names.printable(text)!r} is no generation; give its number, a backup id (or its first digits), or 'latest'"
    )


def until(text: str) -> Point:
    """As `at`, or a change id."""
    found = _CHANGE_ID.match(text)
    if found:
        return ChangeId(found[1], int(found[2]), found[3])
    return at(text)


def since(text: str) -> Point:
    """As `until`, or `*` for all that is allocated."""
    return Beginning() if text == "*" else until(text)
