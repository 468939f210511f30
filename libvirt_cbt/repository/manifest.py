"""The JSON documents of a repository as checked models.

They come from disk and are not trusted: strict types, no unknown fields, and a
seal, the BLAKE3 of all other fields, so that a flipped bit is noticed.
"""

from __future__ import annotations

import json
import os
import re
from json.encoder import encode_basestring_ascii
from typing import Annotated, Any, Dict, Final, List, Literal, Optional, Type, TypeVar

import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from libvirt_cbt import durable, errors, names

FORMAT: Final = 1
MAX_BYTES: Final = 16 * 1024 * 1024
_CANONICAL: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)

Hex16 = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Uuid = Annotated[str, Field(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
TargetName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_:-]{0,31}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_:.-]{0,63}$")]
CheckpointName = Annotated[str, Field(pattern=r"^cbt-[0-9a-f]{16}$")]
Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1, lt=2**53)]

Phase = Literal["planned", "freezing", "running", "open", "committing"]

M = TypeVar("M", bound="Sealed")


class Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Sealed(Model):
    """A document that carries the digest of itself."""

    format: int = FORMAT

    def dump(self) -> bytes:
        fields = self.model_dump(mode="json")
        return _written(fields, _seal(fields))

    @classmethod
    def load(cls: Type[M], path: str) -> M:
        """Errors: Damaged naming the file; RepositoryVersion for another format; OSError when it cannot be read."""
        try:
            data = durable.read(path, MAX_BYTES)
            fields = json.loads(data)
            if not isinstance(fields, dict):
                raise ValueError("it is no JSON object")
            digest = fields.pop("digest", None)
            # The digest is of the values; the bytes are compared too, so that a flip that means the same is seen.
            if digest == _seal(fields) and data == _written(fields, digest):
                if fields.get("format") != FORMAT:
                    raise errors.RepositoryVersion(
                        repository=os.path.dirname(path), found=fields.get("format"), known=FORMAT
                    )
                return cls.model_validate(fields)
        except ValidationError as e:
            first = e.errors(include_url=False)[0]
            reason = f"{'.'.join(str(x) for x in first['loc'])}: {first['msg']}"
        except (ValueError, RecursionError) as e:
            reason = str(e)
        else:
            reason = "its digest does not match its content"
        raise errors.Damaged(path=path, reason=reason)


def _written(fields: Dict[str, Any], digest: str) -> bytes:
    """One field on a line, the digest last."""
    lines = [f"{encode_basestring_ascii(key)}: {_value(value)}" for key, value in (*fields.items(), ("digest", digest))]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _value(value: Any) -> str:
    """As `json.dumps` has it, which is slow to begin: of a thousand manifests it would be a third of the time."""
    if type(value) is str:
        return encode_basestring_ascii(value)
    return "null" if value is None else str(value) if type(value) is int else json.dumps(value)


def _seal(fields: Dict[str, Any]) -> str:
    return blake3.blake3(_CANONICAL.encode(fields).encode()).hexdigest()


class DomainName(Model):
    uuid: Uuid
    name: str = Field(max_length=1024)


class Quiesce(Model):
    requested: Literal["auto", "agent", "none"]
    result: Literal["frozen", "failed", "none"]
    frozen_ms: Optional[float]


class Source(Model):
    """`inode` is "device:inode" of the image itself, where it was local."""

    type: str = Field(max_length=64)
    path: str = Field(max_length=8192)
    format: str = Field(max_length=64)
    inode: Optional[str] = Field(max_length=64)


class Delta(Model):
    """`digest` is the BLAKE3 of the whole .npy file."""

    digest: Hex64
    extents: Bytes


class ManifestDisk(Model):
    target: TargetName
    mode: Literal["full", "incremental", "mark"]
    reason: Optional[str] = Field(max_length=4096)
    base: Optional[Count]
    parent: Optional[Hex16]
    lineage: Uuid
    capacity: Bytes
    granularity: Optional[Bytes]
    source: Source
    serial: Optional[str] = Field(max_length=1024)
    wwn: Optional[str] = Field(max_length=64)
    delta: Delta
    change_id: str = Field(max_length=128)
    dirty_bytes: Bytes
    data_bytes: Bytes
    zero_bytes: Bytes
    read_bytes: Bytes
    stored_bytes: Bytes


class Unprotected(Model):
    target: TargetName
    reason: str = Field(max_length=4096)


class Manifest(Sealed):
    """One generation; the file never changes once it is published.  `as_of` shows what became of it since."""

    id: Hex16
    repository: Hex16
    domain: DomainName
    generation: Count
    checkpoint: Optional[CheckpointName]
    kind: Literal["full", "incremental", "mixed", "mark"]
    started: str = Field(max_length=40)
    frozen_at: str = Field(max_length=40)
    finished: str = Field(max_length=40)
    host: str = Field(max_length=1024)
    uri: str = Field(max_length=4096)
    tool: str = Field(max_length=64)
    quiesce: Quiesce
    disks: List[ManifestDisk]
    unprotected: List[Unprotected]
    files: Dict[FileName, Hex64]
    warnings: List[str]

    def disk(self, target: str) -> Optional[ManifestDisk]:
        return next((d for d in self.disks if d.target == target), None)

    def as_of(self, layers: Layers) -> Manifest:
        """The generation as it is now: what was taken away since is a mark, and what took its place has its parent."""
        disks = [_disk_as_of(disk, layers) for disk in self.disks]
        if disks == self.disks:
            return self
        modes = {disk.mode for disk in disks} - {"mark"}
        kind = "mark" if not modes else modes.pop() if len(modes) == 1 else "mixed"
        return self.model_copy(update={"disks": disks, "kind": kind})

    def require(self, asked: str) -> ManifestDisk:
        """By target or serial.  Errors: NoSuchDisk."""
        found = names.disk(self.disks, asked)
        if found is None:
            known = ", ".join(d.target for d in self.disks) or "none"
            raise errors.NoSuchDisk(domain=self.domain.name, target=names.printable(asked), known=known)
        return found


def _disk_as_of(disk: ManifestDisk, layers: Layers) -> ManifestDisk:
    if disk.target in layers.removed:
        nothing = {"data_bytes": 0, "zero_bytes": 0, "stored_bytes": 0}
        return disk.model_copy(update={"mode": "mark", "parent": None, **nothing})
    entry = layers.disks.get(disk.target)
    if disk.mode == "mark" or entry is None or entry.parent == disk.parent:
        return disk
    return disk.model_copy(update={"parent": entry.parent, "mode": "incremental" if entry.parent else "full"})


class LayerEntry(Model):
    file: FileName
    parent: Optional[Hex16]
    contents: FileName
    digest: Hex64


class Layers(Sealed):
    """Where the data of a backup lies now; replaced as a whole when layers merge.

    `below` are layers that no longer make this generation a backup: only the backup above reads what it lacks from
    them, until it has taken them over.  `removed` are the disks whose data were taken away: in them it is a mark now.
    """

    backup: Hex16
    disks: Dict[TargetName, LayerEntry]
    below: Dict[TargetName, LayerEntry] = {}
    removed: List[TargetName] = []

    @model_validator(mode="after")
    def _named_by_target(self) -> Layers:
        for target, entry in (*self.disks.items(), *self.below.items()):
            if entry.file != f"{target}.qcow2" or contents_version(target, entry.contents) is None:
                raise ValueError(f"the files of disk {target} have other names than they must")
        if {*self.disks} & {*self.below, *self.removed} or {*self.below} - {*self.removed}:
            raise ValueError("a disk cannot be here and removed")
        return self

    def entry(self, target: str) -> Optional[LayerEntry]:
        """The layer of a disk as a chain reads it: a backup's own, or what only the backup above needs."""
        return self.disks.get(target) or self.below.get(target)


def contents_name(target: str, version: int) -> str:
    """The contents file of a layer; a new version when layers were merged into it."""
    return f"{target}.contents.npy" if version == 1 else f"{target}.contents.{version}.npy"


def contents_version(target: str, name: str) -> Optional[int]:
    """The version in a contents file's name, from 1; None for any other name."""
    if name == f"{target}.contents.npy":
        return 1
    found = re.fullmatch(r"\.contents\.([1-9][0-9]{0,8})\.npy", name[len(target) :]) if name.startswith(target) else None
    return int(found[1]) if found and int(found[1]) > 1 else None


class RepositoryFile(Sealed):
    id: Hex16


class Guard(Model):
    """The guard process of a run: its pid, and its start time in clock ticks since boot."""

    pid: int
    started: int


class Intent(Sealed):
    """What a run may have left outside the repository, written before its first effect.

    `phase` says what comes next; `open` is a fleecing point that was left open on purpose, `committing` one whose data was
    read and whose generation only waits to be published.  `thaw_owed`: the guest may be frozen, or may yet freeze.
    """

    id: Hex16
    repository: Hex16
    domain: DomainName
    host: str = Field(max_length=1024)  # of libvirt
    tool_host: str = Field(max_length=1024)
    boot_id: str = Field(max_length=64)
    uri: str = Field(max_length=4096)
    checkpoint: CheckpointName
    run_dir: str = Field(max_length=4096)
    socket: str = Field(max_length=4096)
    scratch_dir: str = Field(max_length=4096)
    scratch: Dict[TargetName, str]
    images: Dict[TargetName, str] = {}  # of a guest that was off: where the new bitmap may be
    phase: Phase
    pid: int
    guard: Optional[Guard] = None
    thaw_owed: bool = False
    started: str = Field(max_length=40)

    @model_validator(mode="after")
    def _named_by_id(self) -> Intent:
        """What is removed after a crash lies in folders that carry the id: a repository of others names no other file.

        The socket is on the guest's host, in `run_dir` where that is this machine.
        """
        socket_dir = os.path.dirname(self.socket)
        scratch = {t: os.path.join(self.scratch_dir, f"{t}.qcow2") for t in self.scratch}
        ours = (
            self.checkpoint == f"cbt-{self.id}"
            and all(path == os.path.normpath(path) and os.path.basename(path) == self.id for path in (self.run_dir, socket_dir))
            and self.socket == os.path.join(socket_dir, "nbd.sock")
            and self.scratch_dir == os.path.normpath(self.scratch_dir)
            and os.path.basename(self.scratch_dir) == self.checkpoint
            and self.scratch == scratch
        )
        if not ours or not all(os.path.isabs(path) for path in (self.run_dir, self.socket, self.scratch_dir)):
            raise ValueError("its files have other names than they must")
        return self


class PruneIntent(Sealed):
    """What a prune is about to take away, for people and for the next prune, which puts right what this one left."""

    repository: Hex16
    domain: DomainName
    removing: List[Hex16]
    tool_host: str = Field(max_length=1024)
    pid: int
    started: str = Field(max_length=40)
