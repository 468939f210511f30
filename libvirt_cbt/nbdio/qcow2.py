"""What qemu-img does for us; formats are always named, never probed."""

from __future__ import annotations

import json
import os
import stat
from typing import Any, Dict, Optional, Sequence

from libvirt_cbt import errors, extents, tools


def rounded(size: int) -> int:
    """The size of a layer while it is written: the compress filter wants whole grains."""
    return -(-size // extents.GRAIN) * extents.GRAIN


def create_layer(path: str, size: int, *, backing: Optional[str], compress: bool) -> None:
    """An empty layer for a disk of `size` bytes; `backing` is written down as it is, not opened."""
    argv = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compat=1.1,compression_type=" + ("zstd" if compress else "zlib"),
    ]
    if backing:
        argv += ["-u", "-b", backing, "-F", "qcow2"]
    on_layer(path, [*argv, path, str(rounded(size))])


def finish_layer(path: str, size: int) -> None:
    """Cuts a written layer to the disk's exact size."""
    if rounded(size) != size:
        # Alone, as it was written: a damaged or missing parent must not end a backup here.
        on_layer(path, ["qemu-img", "resize", "-q", "--shrink", "json:" + json.dumps(alone(path)), str(size)])


def on_layer(path: str, argv: Sequence[str]) -> None:
    """Runs a tool that writes to a layer.  Errors: RepositoryFull, ToolFailed."""
    try:
        tools.run(argv)
    except errors.ToolFailed as e:
        if tools.out_of_room(e):
            raise errors.RepositoryFull(repository=os.path.dirname(path), path=os.path.basename(path)) from None
        raise


def alone(path: str) -> Dict[str, Any]:
    """A layer by itself as a block node.

    It needs no backing file to be written in whole grains or to be read by itself, and a long chain stays shut.
    """
    return {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": path}}


def create_image(fd: int, size: int) -> None:
    """An empty qcow2 image without a backing file in a file that is open for reading and writing."""
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=1.1", tools.descriptor(fd), str(size)]
    tools.run(argv, keep=(fd,))


def create_overlay(path: str, size: int, socket: str, export: str) -> None:
    """An empty qcow2 image over an NBD export of `size` bytes."""
    below = {"driver": "raw", "file": {"driver": "nbd", "server": {"type": "unix", "path": socket}, "export": export}}
    backing = ["-u", "-b", "json:" + json.dumps(below), "-F", "raw"]
    tools.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=1.1", *backing, path, str(size)])


def header(path: str) -> bytes:
    """The first 80 bytes of a layer, which is a file of its own: a link would lead QEMU elsewhere, a pipe hold us up.

    Errors: Damaged.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.read(fd, 80) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
        finally:
            os.close(fd)
    except OSError as e:
        raise errors.Damaged(path=path, reason=e.strerror) from None
    if found[:4] != b"QFI\xfb" or len(found) < 80:
        raise errors.Damaged(path=path, reason="it is no qcow2 image")
    return found


def virtual_size(path: str) -> int:
    """Bytes of the disk that a layer is of.  Errors: Damaged.

    https://www.qemu.org/docs/master/interop/qcow2.html, bytes 24 to 31.
    """
    return int.from_bytes(header(path)[24:32], "big")


def refuse_external_data(path: str) -> None:
    """Refuses a layer whose header sends its data to another file (a repository is not trusted: it could name any).

    Errors: Damaged.  https://www.qemu.org/docs/master/interop/qcow2.html, incompatible features bit 2.
    """
    if int.from_bytes(header(path)[72:80], "big") & 4:
        raise errors.Damaged(path=path, reason="it refers to an external data file, which no layer of ours does")


def granularity(header: bytes) -> Optional[int]:
    """Bytes that one bit of a new bitmap stands for: QEMU's default for the image's cluster size; None when unreadable.

    `header` are the image's first 24 bytes or more.
    bdrv_get_default_bitmap_granularity: the cluster size, at least 4 KiB.
    https://www.qemu.org/docs/master/interop/qcow2.html, bytes 20 to 23.
    """
    bits = int.from_bytes(header[20:24], "big")
    return max(4096, 1 << bits) if header[:4] == b"QFI\xfb" and 9 <= bits <= 21 else None
