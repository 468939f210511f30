"""What QEMU's programs do with images, on the machine that has the images: this one, or one behind ssh."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from typing import ContextManager, Final, Sequence

GREETING: Final = b"NBDMAGIC"  # the first bytes of every NBD server


class Machine(ABC):
    """Images are named as qemu-img takes them; a guest that runs may have them open, and QEMU's locks hold."""

    @abstractmethod
    def kind(self, path: str) -> str:
        """f for a file, b for a block device, o for another thing, and nothing for a path where nothing is."""

    @abstractmethod
    def header(self, path: str) -> bytes:
        """The first bytes of an image, 32 at most; none where it cannot be read."""

    @abstractmethod
    def info(self, name: str, *, shared: bool = False) -> str:
        """What `qemu-img info` says, in JSON; `shared` looks past the locks.  Errors: ToolFailed."""

    @abstractmethod
    def bitmap(self, action: str, name: str, bitmap: str) -> None:
        """`qemu-img bitmap` with --add or --remove.  Errors: ToolFailed."""

    @abstractmethod
    def holder(self, path: str) -> str:
        """Who has an image open, as far as this user may see."""

    @abstractmethod
    def serving(self, arguments: Sequence[str], folder: str) -> ContextManager[str]:
        """A storage daemon with these arguments and a socket, at which it can be spoken to here, in `folder` here.

        It ends with the context, or with us.  Errors: ToolFailed with its last words.
        """


def greets(path: str, seconds: float) -> bool:
    """Whether an NBD server answers on a socket within `seconds`; one behind ssh that has ended does not."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(seconds)
        try:
            probe.connect(path)
            return probe.recv(len(GREETING)) == GREETING
        except OSError:
            return False  # not there, or slow
