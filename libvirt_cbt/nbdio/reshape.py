"""What changes of a layer besides its runs: its size, the backing file that its header names, clusters that leaked."""

from __future__ import annotations

from typing import Sequence

from libvirt_cbt import errors, tools
from libvirt_cbt.nbdio import qcow2, server


def grow(layer: str, size: int) -> None:
    """Makes a layer as large as the backup whose place it takes, in whole grains, so that it can be written."""
    _resize(layer, qcow2.rounded(size))


def cut(layer: str, size: int) -> None:
    """Gives a layer its exact size back."""
    if virtual_size(layer) != size:
        _resize(layer, size)


def _resize(layer: str, size: int) -> None:
    now = virtual_size(layer)
    if now != size:
        shrink = ["--shrink"] if size < now else []
        _changed(layer, ["qemu-img", "resize", "-q", *shrink, server.alone(layer), str(size)])


def virtual_size(layer: str) -> int:
    """Bytes, from the header.  Errors: Damaged.  https://www.qemu.org/docs/master/interop/qcow2.html, bytes 24 to 31."""
    qcow2.refuse_external_data(layer)
    return qcow2.virtual_size(layer)


def rebase(layer: str, backing: str) -> None:
    """Names another backing file in a layer's header; nothing is read or copied.

    Errors: Damaged, LayerInUse, RepositoryFull, ToolFailed.
    """
    qcow2.refuse_external_data(layer)
    _changed(layer, ["qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2", layer])


def _changed(layer: str, argv: Sequence[str]) -> None:
    """Errors: Damaged, LayerInUse, RepositoryFull, ToolFailed."""
    try:
        qcow2.on_layer(layer, argv)
    except errors.ToolFailed:
        server.require_open([layer])
        raise


def mend_leaks(layer: str) -> None:
    """Gives back clusters that a writer which was killed had taken and not used."""
    try:
        qcow2.refuse_external_data(layer)
        tools.run(["qemu-img", "check", "-q", "-r", "leaks", server.alone(layer)])
    except (errors.ToolFailed, errors.Damaged):
        pass  # room only; `verify` judges what is stored
