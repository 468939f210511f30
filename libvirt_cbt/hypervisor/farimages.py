"""What QEMU's programs do with the images of a host behind ssh."""

from __future__ import annotations

import base64
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Iterator, Sequence

from libvirt_cbt import errors, machines
from libvirt_cbt.hypervisor import site, ssh

if TYPE_CHECKING:
    from libvirt_cbt.hypervisor.faraway import Ssh

SOCKET: Final = "still.sock"
PAUSE: Final = 0.05
START_SECONDS: Final = 30.0
INFO_SECONDS: Final = 600.0


class Images(machines.Machine):
    """Those that the far user may open."""

    def __init__(self, where: Ssh) -> None:
        self._site = where

    def kind(self, path: str) -> str:
        return self._seen(path).kind

    def header(self, path: str) -> bytes:
        return self._seen(path).header

    def _seen(self, path: str) -> site.Seen:
        return self._site.look([path]).get(path, site.Seen(None, "", b""))

    def info(self, name: str, *, shared: bool = False) -> str:
        words = self._run("info", "yes" if shared else "no", name)
        try:
            text = base64.b64decode("".join(words)).decode(errors="replace")
        except ValueError:
            raise errors.ToolFailed(tool=f"qemu-img on {self._site.name}", reason="its answer is none") from None
        return text[max(0, text.find("{")) :]  # a warning may stand before it

    def bitmap(self, action: str, name: str, bitmap: str) -> None:
        self._run("bitmap", action, name, bitmap)

    def _run(self, verb: str, *words: str) -> Sequence[str]:
        try:
            return self._site.asked(verb, *words, seconds=INFO_SECONDS, once=verb != "info")
        except ssh.Refused as e:
            raise errors.ToolFailed(tool=f"qemu-img on {self._site.name}", reason=str(e)) from None

    def holder(self, path: str) -> str:
        return f"another program on {self._site.name}"

    @contextmanager
    def serving(self, arguments: Sequence[str], folder: str) -> Iterator[str]:
        near = os.path.join(folder, SOCKET)
        far = os.path.join(self._site.socket_root(), os.path.basename(folder), SOCKET)
        server = ["--nbd-server", f"addr.type=unix,addr.path={far.replace(',', ',,')}"]
        with self._site.another() as link:
            try:
                link.ask("hold", far, *server, *arguments)
                link.forward(near, far)
                deadline = time.monotonic() + START_SECONDS
                # A socket listens before the images are open; the greeting comes when all is.
                while not machines.greets(near, PAUSE) and time.monotonic() < deadline:
                    link.ask("alive")
                    time.sleep(PAUSE)
                yield near
                link.ask("end")
            except ssh.Refused as e:
                raise errors.ToolFailed(tool=f"qemu-storage-daemon on {self._site.name}", reason=str(e)) from None
            except ssh.Lost as e:
                raise errors.ToolFailed(tool=f"ssh to {self._site.name}", reason=str(e)) from None
