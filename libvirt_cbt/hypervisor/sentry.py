"""The guard's post on a far host: it looks at the scratch files' room from beside them, and acts when we are cut off.

A shell there (`far.sh`, guard) tells how much room is left.  Where the host has virsh, the shell ends the job itself when
the room runs out, thaws a guest that stays frozen, and does both when nothing has been heard from here for a while.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, List, Optional, Tuple

from libvirt_cbt import errors, names
from libvirt_cbt.hypervisor import site, ssh

if TYPE_CHECKING:
    from libvirt_cbt.hypervisor.faraway import Ssh

BEAT_SECONDS: Final = 15.0  # the far end gives us up after four times that
HEAR_SECONDS: Final = 1.0
PAUSES: Final = (0.5, 10.0)  # seconds between two tries to come back
THAW_LATER: Final = 2.0  # seconds after the guard here, which thaws with more care


class Sentry(site.Lookout):
    """One shell on the far host, and another when the connection was lost.  Errors of the first: HostLost and kin."""

    def __init__(self, where: Ssh, uuid: names.DomainUuid) -> None:
        self._site, self._uuid = where, uuid
        self._watched: Optional[Tuple[str, str, str]] = None
        self._thaw_at: Optional[float] = None
        self._released = False
        self._changing = threading.Lock()
        self._link: Optional[ssh.Ssh] = self._connected()
        self._thread = threading.Thread(target=self._listen, name="sentry", daemon=True)
        self._thread.start()

    def _connected(self) -> ssh.Ssh:
        link = self._site.another()
        try:
            link.ask("guard", self._uuid, self._site.local_uri)
            if self._thaw_at is not None:
                link.tell("freeze", f"{max(0.0, self._thaw_at - time.monotonic()):.3f}")
            if self._watched:
                link.tell("watch", *self._watched)
        except BaseException:
            link.close()
            raise
        return link

    def freeze(self, seconds: float) -> None:
        with self._changing:
            self._thaw_at = time.monotonic() + seconds + THAW_LATER
            self._tell("freeze", f"{seconds + THAW_LATER:.3f}")

    def thawed(self) -> None:
        with self._changing:
            self._thaw_at = None
            self._tell("thawed")

    def watch(self, socket: str, directory: str, reserve: int) -> None:
        with self._changing:
            self._watched = (socket, directory, str(reserve))
            self._tell("watch", *self._watched)

    def release(self) -> None:
        with self._changing:
            self._released = True
            self._tell("release")
        self._thread.join(ssh.STOP_SECONDS)

    def _tell(self, *words: str) -> None:
        if self._link:
            try:
                self._link.tell(*words)
            except ssh.Lost:
                pass  # told again when it is back

    def _listen(self) -> None:
        pause, beat = PAUSES[0], time.monotonic()
        while not self._released:
            link = self._link
            try:
                if link is None:
                    time.sleep(pause)
                    pause = min(2 * pause, PAUSES[1])
                    self._return()
                    continue
                self._heard(link.hear(HEAR_SECONDS))
                pause = PAUSES[0]
                if time.monotonic() - beat > BEAT_SECONDS:
                    beat = time.monotonic()
                    link.tell("beat")
            except ssh.Lost:
                with self._changing:
                    self._link = None
                if link:
                    link.close()
            except errors.CbtError:
                continue  # not reachable yet

    def _return(self) -> None:
        with self._changing:
            if not self._released:
                self._link = self._connected()

    def _heard(self, words: Optional[List[str]]) -> None:
        if not words or len(words) != 2 or words[0] not in ("free", "full"):
            return
        self.free = ssh.number(words[1:])  # what is none ends this connection: its host is not to be believed
        if words[0] == "full":
            self.full = self.free
