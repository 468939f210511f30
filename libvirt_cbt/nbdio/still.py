"""The images of a guest that is off: what they are, the bitmaps in them, and a server that keeps them still.

Every driver is named, down to the last backing file: what a guest wrote into its disk never decides how it is read.
QEMU's own locks keep a guest from starting while its images are held, and us out while it runs.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Dict, Final, FrozenSet, Iterator, List, Mapping, Optional, Sequence, Tuple

from pydantic import BaseModel, ConfigDict, Field

from libvirt_cbt import errors, machines, names, tools
from libvirt_cbt.nbdio import server
from libvirt_cbt.nbdio.server import Endpoint

FORMATS: Final = ("raw", "qcow2")
SOCKET: Final = "still.sock"
HEADER: Final = 32
SOMEBODY: Final = "another program"
MAX_DEPTH: Final = 200  # libvirt opens no longer chain
_LOCKED: Final = re.compile(r"another process using the image \[(.*)\]")


@dataclass(frozen=True)
class Image:
    """One image with what lies below it; `bitmaps` are the flags of each persistent bitmap by name."""

    path: str
    format: str
    capacity: int  # bytes
    bitmaps: Mapping[str, FrozenSet[str]]
    backing: Optional[Image]

    def unusable(self, bitmap: str) -> Optional[str]:
        """Why a bitmap does not say all that was written to this image since it was made; None when it does.

        https://www.qemu.org/docs/master/interop/qcow2.html, bitmap directory entry: flags in_use and auto.
        """
        flags = self.bitmaps.get(bitmap)
        if flags is None:
            return "is not in the image"
        if "in-use" in flags:
            return "was not saved: QEMU or its host died while the image was open"
        if "auto" not in flags:
            return "was disabled and has not recorded since"
        # After an external snapshot the changes are in the bitmaps of two images, and a server shows those of one.
        if any(bitmap in below.bitmaps for below in self.below()):
            return "is in two images of the chain; only a running guest shows both"
        return None

    def below(self) -> Iterator[Image]:
        """The backing files, nearest first."""
        at = self.backing
        while at:
            yield at
            at = at.backing


class Here(machines.Machine):
    """This machine."""

    def kind(self, path: str) -> str:
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            return "o" if os.path.lexists(path) else ""
        except OSError:
            return "o"
        return "f" if stat.S_ISREG(mode) else "b" if stat.S_ISBLK(mode) else "o"

    def header(self, path: str) -> bytes:
        try:
            with open(path, "rb", buffering=0) as file:
                return file.read(HEADER)
        except OSError:
            return b""

    def info(self, name: str, *, shared: bool = False) -> str:
        return tools.run(["qemu-img", "info", *(["-U"] if shared else []), "--output=json", name])

    def bitmap(self, action: str, name: str, bitmap: str) -> None:
        tools.run(["qemu-img", "bitmap", action, name, bitmap])

    def holder(self, path: str) -> str:
        try:
            wanted = os.stat(path)
        except OSError:
            return SOMEBODY
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            if int(pid) == os.getpid():
                continue
            try:
                for descriptor in os.scandir(f"/proc/{pid}/fd"):
                    if os.path.samestat(wanted, descriptor.stat()):
                        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as name:
                            return f"{_shown(name.read().strip())} (process {pid})"
            except OSError:
                continue  # it ended, or it is not for us to see
        return SOMEBODY

    @contextmanager
    def serving(self, arguments: Sequence[str], folder: str) -> Iterator[str]:
        where = os.path.join(folder, SOCKET)
        argv = ["qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={where.replace(',', ',,')}"]
        with server.running([*argv, *arguments], where):
            yield where


def look(machine: machines.Machine, target: str, path: str, fmt: str) -> Image:
    """What a disk's image is; `target` is for the errors.  Errors: ImageInUse when it is open for writing, ImageUnreadable."""
    chain: List[Tuple[str, str, _Info]] = []
    at: Optional[Tuple[str, str]] = (path, fmt)
    while at:
        if len(chain) == MAX_DEPTH or any(seen[0] == at[0] for seen in chain):
            raise errors.ImageUnreadable(target=target, reason=f"the backing files of {_shown(path)} do not end")
        found = _info(machine, target, *at)
        chain.append((*at, found))
        at = _backing(machine, target, at[0], found) if at[1] == "qcow2" else None
    image: Optional[Image] = None
    for one, driver, found in reversed(chain):
        image = Image(one, driver, found.capacity, _bitmaps(found), image)
    assert image is not None
    return image


def has(machine: machines.Machine, target: str, path: str, bitmap: str, *, shared: bool = False) -> bool:
    """Whether a qcow2 image has a bitmap; False for a file that is gone.

    `shared` looks past the locks: what a running QEMU has in its own memory is not seen.  Errors: as of `look`.
    """
    return bool(machine.kind(path)) and bitmap in _bitmaps(_info(machine, target, path, "qcow2", shared=shared))


def add(machine: machines.Machine, target: str, path: str, bitmap: str) -> None:
    """Makes a persistent bitmap that records from now on.  Errors: ImageInUse, ToolFailed."""
    _changed(machine, "--add", target, path, bitmap)


def remove(machine: machines.Machine, target: str, path: str, bitmap: str) -> bool:
    """Removes a bitmap, broken ones too; False when the image has none of that name.  Errors: ImageInUse, ToolFailed."""
    # Looked for with the locks respected: a qemu-img that outlived its parent may just be adding it.
    if not has(machine, target, path, bitmap):
        return False
    _changed(machine, "--remove", target, path, bitmap)
    return True


@contextmanager
def held(
    machine: machines.Machine, disks: Mapping[str, Tuple[Image, Optional[str]]], run_dir: str
) -> Iterator[Dict[str, Endpoint]]:
    """Every disk's image read-only over NBD, with one bitmap each where one is named; until the end nobody can write.

    https://www.qemu.org/docs/master/tools/qemu-storage-daemon.html
    Errors: ImageInUse, ToolFailed (also when the bitmap cannot be used, or the server ended by itself).
    """
    arguments: List[str] = []
    for number, (target, (image, bitmap)) in enumerate(disks.items()):
        node = {**_chain(machine, image), "node-name": f"n{number}", "read-only": True}
        export = f"type=nbd,id=e{number},node-name=n{number},name={target}"
        arguments += ["--blockdev", json.dumps(node), "--export", export + (f",bitmaps.0={bitmap}" if bitmap else "")]
    targets = {below.path: target for target, (image, _) in disks.items() for below in (image, *image.below())}
    with ExitStack() as stack:
        try:
            where = stack.enter_context(machine.serving(arguments, run_dir))
        except errors.ToolFailed as e:
            locked = _LOCKED.search(str(e))
            raise (_in_use(machine, targets.get(locked[1], "?"), locked[1]) if locked else e) from None
        yield {target: Endpoint(where, target) for target in disks}


def _chain(machine: machines.Machine, image: Image) -> Dict[str, Any]:
    node = _node(machine, image.path, image.format)
    if image.format == "qcow2":
        node["backing"] = _chain(machine, image.backing) if image.backing else None
    return node


def _node(machine: machines.Machine, path: str, fmt: str) -> Dict[str, Any]:
    driver = "host_device" if machine.kind(path) == "b" else "file"
    return {"driver": fmt, "file": {"driver": driver, "filename": path}}


def alone(machine: machines.Machine, path: str, fmt: str) -> str:
    """An image without what lies below it, as a file name that qemu-img takes."""
    node = _node(machine, path, fmt)
    return "json:" + json.dumps({**node, "backing": None} if fmt == "qcow2" else node)


class _Told(BaseModel):
    """What qemu-img says of an image, as far as it is used; on another host somebody else may be saying it."""

    model_config = ConfigDict(strict=True, frozen=True)


class _Bitmap(_Told):
    name: str
    flags: List[str]


class _Data(_Told):
    bitmaps: List[_Bitmap] = []


class _Specific(_Told):
    data: _Data = _Data()


class _Info(_Told):
    capacity: int = Field(alias="virtual-size", ge=0, lt=2**63)
    written: Optional[str] = Field(None, alias="backing-filename")
    full: Optional[str] = Field(None, alias="full-backing-filename")
    format: Optional[str] = Field(None, alias="backing-filename-format")
    specific: _Specific = Field(_Specific(), alias="format-specific")


def _info(machine: machines.Machine, target: str, path: str, fmt: str, *, shared: bool = False) -> _Info:
    if fmt not in FORMATS:
        raise errors.ImageUnreadable(target=target, reason=f"{_shown(path)} is a {_shown(fmt)} image")
    if not os.path.isabs(path):
        raise errors.ImageUnreadable(target=target, reason=f"{_shown(path) or 'its source'} is not a file of this host")
    if not machine.kind(path):
        raise errors.ImageUnreadable(target=target, reason=f"{_shown(path)}: {os.strerror(errno.ENOENT)}")
    try:
        return told(machine.info(alone(machine, path, fmt), shared=shared))
    except ValueError:
        raise errors.ImageUnreadable(target=target, reason=f"what qemu-img says of {_shown(path)} is no answer") from None
    except errors.ToolFailed as e:
        if _LOCKED.search(str(e)):
            raise _in_use(machine, target, path) from None
        raise errors.ImageUnreadable(target=target, reason=str(e)) from None


def told(text: str) -> _Info:
    """`qemu-img info --output=json`.  Errors: ValueError."""
    return _Info.model_validate_json(text)


def _backing(machine: machines.Machine, target: str, path: str, found: _Info) -> Optional[Tuple[str, str]]:
    written = found.written
    if written is None:
        if _says_backing(machine, path):
            raise errors.ImageUnreadable(target=target, reason=f"qemu-img does not tell the backing file of {_shown(path)}")
        return None
    if found.format is None:
        raise errors.ImageUnreadable(
            target=target,
            reason=f"{_shown(path)} does not record the format of its backing file, and it is not guessed "
            "(`qemu-img rebase -u -b FILE -F FORMAT` records it)",
        )
    full = written if found.full is None else found.full
    # QEMU takes a colon before the first slash for a protocol: nbd://, json:{...}.
    if ":" in written.partition("/")[0] or not os.path.isabs(full):
        raise errors.ImageUnreadable(target=target, reason=f"its backing file {_shown(written)} is no local file")
    return full, found.format


def _says_backing(machine: machines.Machine, path: str) -> bool:
    """Whether a qcow2 header names a backing file, bytes 8 to 15: read without it the image would show zeroes."""
    header = machine.header(path)[:16]
    return header[:4] == b"QFI\xfb" and any(header[8:16])


def _bitmaps(found: _Info) -> Dict[str, FrozenSet[str]]:
    return {one.name: frozenset(one.flags) for one in found.specific.data.bitmaps}


def _changed(machine: machines.Machine, how: str, target: str, path: str, bitmap: str) -> None:
    try:
        machine.bitmap(how, alone(machine, path, "qcow2"), bitmap)
    except errors.ToolFailed as e:
        if _LOCKED.search(str(e)):
            raise _in_use(machine, target, path) from None
        raise


def _in_use(machine: machines.Machine, target: str, path: str) -> errors.ImageInUse:
    return errors.ImageInUse(target=target, path=_shown(path), holder=machine.holder(path))


def _shown(text: str) -> str:
    return names.printable(text, 500)
