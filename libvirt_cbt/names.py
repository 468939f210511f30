"""Untrusted strings become checked types here, once.

Paths are built from these types only: a domain's name is for people, its UUID
and our own random ids are for the file system.
"""

from __future__ import annotations

import re
import secrets
import uuid
from typing import Iterable, NewType, Optional, Protocol, TypeVar

from libvirt_cbt import errors

Target = NewType("Target", str)  # 'vda', as in <target dev='vda'/>
BackupId = NewType("BackupId", str)  # 16 hex digits, random
DomainUuid = NewType("DomainUuid", str)  # canonical form with dashes, lower case
Lineage = NewType("Lineage", str)  # a UUID per disk

CHECKPOINT_PREFIX = "cbt-"

_TARGET = re.compile(r"[A-Za-z][A-Za-z0-9_:-]{0,31}\Z")
_BACKUP_ID = re.compile(r"[0-9a-f]{16}\Z")


def target(text: str) -> Target:
    """A disk's target; RNG type diskTarget of libvirt allows no more than this."""
    if not _TARGET.match(text):
        raise errors.Usage(reason=f"{printable(text)!r} is not a disk target such as 'vda'")
    return Target(text)


def backup_id(text: str) -> BackupId:
    if not _BACKUP_ID.match(text):
        raise errors.Usage(reason=f"{printable(text)!r} is not a backup id (16 hex digits)")
    return BackupId(text)


def new_backup_id() -> BackupId:
    return BackupId(secrets.token_hex(8))


def domain_uuid(text: str) -> DomainUuid:
    try:
        return DomainUuid(str(uuid.UUID(text)))
    except ValueError:
        raise errors.Usage(reason=f"{printable(text)!r} is not a UUID") from None


def is_uuid(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def new_lineage() -> Lineage:
    return Lineage(str(uuid.uuid4()))


def checkpoint(backup: BackupId) -> str:
    """The name of a generation's checkpoint in libvirt."""
    return CHECKPOINT_PREFIX + backup


def change_id(lineage: str, generation: int, backup: str) -> str:
    """`cbt1:<lineage>/<generation>-<first 8 hex of the id>`: a number used twice is noticed by the id."""
    return f"cbt1:{lineage}/{generation}-{backup[:8]}"


class Disk(Protocol):
    """A disk of a domain or in a manifest."""

    @property
    def target(self) -> str: ...

    @property
    def serial(self) -> Optional[str]: ...


D = TypeVar("D", bound=Disk)


def disk(disks: Iterable[D], asked: str) -> Optional[D]:
    """The disk with this target, else the one with this serial (in OpenStack, the id of the volume); None without one.

    Errors: Usage when two disks have the serial.
    """
    rows = list(disks)
    for one in rows:
        if one.target == asked:
            return one
    found = [one for one in rows if one.serial == asked]
    if len(found) > 1:
        raise errors.Usage(
            reason=f"the serial '{printable(asked)}' is that of disks {', '.join(d.target for d in found)}; give a target"
        )
    return found[0] if found else None


def without_password(uri: str) -> str:
    """A URI for a document, a log or an argument list: `user:password@host` has its user only.  RFC 3986, 3.2.1."""
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.-]*://[^/?#@:]*):[^/?#]*@", r"\1@", uri)


def printable(text: str, limit: int = 200) -> str:
    """Untrusted text for a terminal or a log: no control characters, no endless line."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return shown + ("..." if len(text) > limit else "")
