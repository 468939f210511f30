"""A host behind TLS: libvirt alone is reached there.  It makes the scratch files, and QEMU exports by TCP with TLS.

Nobody of ours is on that host.  What libvirt does not tell (a file's inode, an image's header) stays unknown, images of
guests that are off are out of reach, and while the network is cut nobody ends a job or thaws a guest.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Callable, Dict, Final, Iterator, List, Mapping, Optional, Sequence, Tuple

import libvirt

from libvirt_cbt import errors, machines, names, places, tls
from libvirt_cbt.hypervisor import documents, pools, scratch, site
from libvirt_cbt.hypervisor.address import Address

if TYPE_CHECKING:
    from libvirt_cbt.hypervisor.connection import Host

PROBE_SECONDS: Final = 2.0
RECONNECT_SECONDS: Final = 30.0
PAUSE: Final = 0.5
CANDIDATES: Final = 3  # ports that are tried for one job; the guest is frozen meanwhile
LOOK_SECONDS: Final = 0.25  # between two looks at the room
HERE: Final = "run it on that host, or with a connection by ssh"


class Tls(site.Site):
    """What is asked goes by the connection of `host`."""

    here = False
    reaction = 2.0
    still = False

    def __init__(self, address: Address, host: Host, listening: tls.Listening) -> None:
        self.name = address.host
        self._address, self._host, self._listening = address, host, listening
        self._stack = ExitStack()
        self._candidates: List[documents.Tcp] = []
        self._server: Optional[documents.Tcp] = None
        self._reached: Optional[site.Reached] = None

    # Places and files

    def begin(self, *, sentry: bool) -> None:
        pass  # there is no connection but libvirt's

    def socket_root(self) -> str:
        return places.run_root()  # there is no socket; its path is the id of the job

    def scratch_root(self, asked: Optional[str]) -> str:
        if asked and not os.path.isabs(asked):
            raise errors.Usage(reason=f"--scratch-dir is a folder of {self.name}: give its whole path, not '{asked}'")
        return os.path.normpath(asked or scratch.DEFAULT_DIRECTORY)

    def make(self, where: scratch.Places, sizes: Mapping[str, int], qemu_ids: Optional[Tuple[int, int]]) -> int:
        if not where.scratch:
            raise self._elsewhere("a backup of a guest that is off")
        self._candidates = self._free_ports(os.path.basename(where.run_dir))
        files = {path: sizes[target] for target, path in where.scratch.items()}
        directory = os.path.dirname(where.directory)
        try:
            free = pools.make(self._host.connected(), where.directory, qemu_ids, scratch.ROOM_FLOOR, files)
        except libvirt.libvirtError as e:
            if self._host.lost(e):
                raise errors.HostLost(host=self.name, reason=_message(e)) from None
            raise errors.ScratchDenied(directory=f"{directory} on {self.name}", reason=_message(e)) from None
        if free < scratch.ROOM_FLOOR:
            raise errors.ScratchSpace(directory=directory, free=free, needed=scratch.ROOM_FLOOR)
        return free

    def remove(self, where: scratch.Places) -> List[str]:
        if not where.scratch:
            return []
        try:
            found = self._host.retry(lambda conn: pools.remove(conn, where.directory, [*where.scratch.values()]))
        except libvirt.libvirtError as e:
            raise errors.HypervisorError(reason=f"{self.name}: {_message(e)}") from None
        return [f"{self.name}:{path}" for path in found]

    def room(self, directory: str) -> int:
        try:
            return self._host.retry(lambda conn: pools.room(conn, directory))
        except libvirt.libvirtError as e:
            if self._host.lost(e):
                raise errors.HostLost(host=self.name, reason=_message(e)) from None
            raise FileNotFoundError(errno.ENOENT, _message(e), directory) from None

    def folder(self, path: str) -> site.Folder:
        raise self._elsewhere(f"a look at {path}")

    def look(self, paths: Sequence[str]) -> Dict[str, site.Seen]:
        return {}

    def read(self, path: str, most: int) -> bytes:
        raise OSError(errno.EREMOTE, f"libvirt on {self.name} does not hand it out by TLS", path)

    def machine(self) -> Optional[machines.Machine]:
        raise self._elsewhere("what is done while a guest is off")

    def _elsewhere(self, what: str) -> errors.Elsewhere:
        return errors.Elsewhere(what=what, host=self.name, way_out=HERE)

    def described(self) -> str:
        low, high = self._listening.ports
        return f"{self.name} by TLS; backups are read from one of its ports {low} to {high}"

    def lookout(self, uuid: names.DomainUuid) -> site.Lookout:
        return Watch(self)

    # The way to a job

    def servers(self, where: scratch.Places) -> Iterator[documents.Tcp]:
        for one in self._candidates:
            self._server = one
            yield one

    def _free_ports(self, identity: str) -> List[documents.Tcp]:
        """Ports on which nobody listens now, so that one may be tried; the guest is not frozen yet.

        Errors: HostLost, PortsTaken.
        """
        given = self._listening.address
        address = given or self._peer()
        low, high = self._listening.ports
        begin = random.SystemRandom().randrange(high - low + 1)
        found = []
        for port in [*range(low + begin, high + 1), *range(low, low + begin)]:
            if given or not _listens(address, port):  # of an address that is not ours to see nothing is known
                found.append(documents.Tcp(address, port, f"{identity}-"))
            if len(found) == CANDIDATES:
                break
        if not found:
            raise errors.PortsTaken(host=self.name, low=low, high=high)
        return found

    def _peer(self) -> str:
        """The address at which libvirt is reached: QEMU listens there, and on no other of its host's."""
        port = self._address.port or tls.LIBVIRT_PORT
        try:
            with socket.create_connection((self.name, port), timeout=tls.CONNECT_SECONDS) as probe:
                return str(probe.getpeername()[0])
        except OSError as e:
            raise errors.HostLost(host=self.name, reason=e.strerror or str(e)) from None

    def reach(self, where: scratch.Places, stop: Callable[[], None] = lambda: None) -> site.Reached:
        if self._server is None:
            return site.Reached(where.socket)  # a point that somebody else has begun
        if self._reached is None:
            folder = tls.linked(self._stack.enter_context(places.temporary()), self._address.parameters.get("pkipath"))
            server = tls.Server(self.name, self._server.port, folder)
            self._reached = site.Reached(where.socket, server, self._server.prefix)
            return self._reached
        self._patiently(self._server, stop)
        return self._reached

    def _patiently(self, server: documents.Tcp, stop: Callable[[], None]) -> None:
        """Until the port is reached again, for as long as a short trouble of the network may last.  Errors: HostLost."""
        deadline = time.monotonic() + RECONNECT_SECONDS
        while True:
            try:
                socket.create_connection((self.name, server.port), timeout=tls.CONNECT_SECONDS).close()
                return
            except OSError as e:
                if time.monotonic() > deadline:
                    raise errors.HostLost(host=self.name, reason=e.strerror or str(e)) from None
            stop()
            time.sleep(PAUSE)

    def leave(self, where: scratch.Places) -> None:
        pass  # nothing of it is here

    def close(self) -> None:
        self._stack.close()
        self._reached = None


class Watch(site.Lookout):
    """Asks libvirt for the room, again and again; what is to be done is done from here."""

    def __init__(self, where: Tls) -> None:
        self._site = where
        self._released = threading.Event()

    def freeze(self, seconds: float) -> None:
        pass  # the guard itself thaws

    def thawed(self) -> None:
        pass

    def watch(self, socket: str, directory: str, reserve: int) -> None:
        self.free = self._site.room(directory)
        threading.Thread(target=self._look, args=(directory,), name="room", daemon=True).start()

    def _look(self, directory: str) -> None:
        while not self._released.wait(LOOK_SECONDS):
            try:
                self.free = self._site.room(directory)
            except (errors.CbtError, libvirt.libvirtError):
                continue  # the host is away
            except FileNotFoundError:
                return  # the pool has gone, and the job with it

    def release(self) -> None:
        self._released.set()


def _listens(address: str, port: int) -> bool:
    """Whether somebody answers there; a port that does not answer at all counts as free, and the copy tells."""
    try:
        socket.create_connection((address, port), timeout=PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def _message(error: libvirt.libvirtError) -> str:
    return names.printable(str(error.get_error_message() or error), 500)
