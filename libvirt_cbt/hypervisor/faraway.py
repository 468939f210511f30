"""A host behind ssh: its files are looked at, made and removed by a shell there, its sockets come here."""

from __future__ import annotations

import base64
import errno
import os
import time
from contextlib import ExitStack, contextmanager
from typing import Callable, Dict, Final, Iterator, List, Mapping, Optional, Sequence, Tuple, TypeVar

from libvirt_cbt import errors, machines, names, places
from libvirt_cbt.hypervisor import farimages, refusals, scratch, sentry, site, ssh
from libvirt_cbt.hypervisor.address import Address

T = TypeVar("T")

RECONNECT_SECONDS: Final = 30.0
GREET_SECONDS: Final = 30.0
PAUSE: Final = 0.5
FORWARD: Final = (
    "its sshd_config needs AllowStreamLocalForwarding and AllowTcpForwarding, and the user access to QEMU's sockets "
    "(docs/remote.md)"
)
MAKE_SECONDS: Final = 300.0


class Ssh(site.Site):
    """Connected when it is first asked something, and again when the connection was lost."""

    here = False
    reaction = 2.0

    def __init__(self, address: Address) -> None:
        self.name = address.host
        self.local_uri = address.local
        self._address = address
        self._stack = ExitStack()
        self._folder: Optional[str] = None
        self._link: Optional[ssh.Ssh] = None
        self._hailed = False  # whether that one has said what it is
        self._spare: Optional[ssh.Ssh] = None
        self._roots: Tuple[str, str] = ("", "")
        self._tools: List[str] = []
        self._reaching: Optional[scratch.Places] = None

    # The connection

    def begin(self, *, sentry: bool) -> None:
        try:
            self._link = self._client()
            self._spare = self._client(apart=True) if sentry else None
        except ssh.Lost:
            pass  # who asks first tries again, and says it

    def _client(self, *, apart: bool = False) -> ssh.Ssh:
        """Errors: ssh.Lost."""
        if apart:
            return ssh.Ssh(self._address, self._stack.enter_context(places.temporary()))
        if self._folder is None:
            self._folder = self._stack.enter_context(places.temporary())
        return ssh.Ssh(self._address, self._folder)

    def linked(self) -> ssh.Ssh:
        """The connection, a new one if there is none.  Errors: HostUnproved, HostRefused, HostLost."""
        if self._link is not None and not self._link.alive:
            self._drop()
        try:
            if self._link is None:
                self._link = self._client()
            if not self._hailed:
                self._link.begin()
                self._hello(self._link)
                self._hailed = True
        except ssh.Lost as e:
            self._drop()
            raise refusals.explained(self.name, str(e)) from None
        return self._link

    def _hello(self, link: ssh.Ssh) -> None:
        version, *words = link.ask("hello") or [""]
        if version != "1" or len(words) < 2:
            shown = names.printable(version, 20)
            raise errors.HostRefused(host=self.name, reason=f"its far end speaks version {shown}, not 1", way_out="update it")
        self._roots, self._tools = (ssh.text(words[0]), ssh.text(words[1])), words[2:]

    def _drop(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link, self._hailed = None, False

    def asked(
        self, *words: str, seconds: float = ssh.ANSWER_SECONDS, once: bool = False, most: int = ssh.MOST_ANSWER
    ) -> List[str]:
        """The answer to a request, which is repeated on a new connection unless it may be done `once` only.

        Errors: ssh.Refused; HostLost and kin.
        """
        try:
            return self.linked().ask(*words, seconds=seconds, most=most)
        except ssh.Lost as e:
            self._drop()
            if once:
                raise refusals.explained(self.name, str(e)) from None
        try:
            return self.linked().ask(*words, seconds=seconds, most=most)
        except ssh.Lost as e:
            self._drop()
            raise refusals.explained(self.name, str(e)) from None

    def another(self) -> ssh.Ssh:
        """A second connection, for what takes one up; to be closed by who asked.  Errors: HostLost and kin."""
        self.linked()
        found, self._spare = self._spare, None
        try:
            if found is not None and not found.alive:
                found.close()
                found = None
            found = found or self._client(apart=True)
            found.begin()
            return found
        except ssh.Lost as e:
            raise refusals.explained(self.name, str(e)) from None

    def close(self) -> None:
        self._drop()
        if self._spare is not None:
            self._spare.close()
            self._spare = None
        self._stack.close()
        self._folder = None

    # Places and files

    def socket_root(self) -> str:
        self.linked()
        return self._roots[0]

    def scratch_root(self, asked: Optional[str]) -> str:
        if asked and not os.path.isabs(asked):
            raise errors.Usage(reason=f"--scratch-dir is a folder of {self.name}: give its whole path, not '{asked}'")
        self.linked()
        return os.path.normpath(asked) if asked else self._roots[1]

    def make(self, where: scratch.Places, sizes: Mapping[str, int], qemu_ids: Optional[Tuple[int, int]]) -> int:
        scratch.make_run_dir(where.run_dir)
        self._require("qemu-img", "base64")
        group = str(qemu_ids[1]) if qemu_ids else "-"
        files = [word for target, path in where.scratch.items() for word in (str(sizes[target]), path)]
        words = ["make", where.socket_dir, where.directory if files else "-", group, str(scratch.ROOM_FLOOR), *files]
        directory = os.path.dirname(where.directory)
        try:
            with self._understood():
                return ssh.number(self.asked(*words, seconds=MAKE_SECONDS, once=True))
        except ssh.Refused as e:
            if e.kind == "space":
                raise errors.ScratchSpace(directory=directory, free=int(str(e)), needed=scratch.ROOM_FLOOR) from None
            raise errors.ScratchDenied(directory=f"{directory} on {self.name}", reason=str(e)) from None

    def described(self) -> str:
        self.linked()
        self._require("qemu-img", "base64", "timeout")
        lacks = "" if "virsh" in self._tools else "; without virsh there nobody ends a job or thaws when we are cut off"
        return f"{self.name} by ssh, with {', '.join(self._tools)}{lacks}"

    def _require(self, *tools: str) -> None:
        for tool in tools:
            if tool not in self._tools:
                raise errors.HostRefused(
                    host=self.name, reason=f"it has no {tool}", way_out="install it there, it comes with QEMU or coreutils"
                )

    def remove(self, where: scratch.Places) -> List[str]:
        gone = scratch.remove_run_dir(where.run_dir)
        try:
            found = self.asked("remove", where.socket_dir, where.directory, *where.scratch.values())
        except ssh.Refused as e:
            raise errors.HypervisorError(reason=f"{self.name}: {e}") from None
        with self._understood():
            return gone + [f"{self.name}:{ssh.text(word)}" for word in found]

    def room(self, directory: str) -> int:
        try:
            with self._understood():
                return ssh.number(self.asked("room", directory))
        except ssh.Refused as e:
            raise FileNotFoundError(errno.ENOENT, str(e), directory) from None

    def folder(self, path: str) -> site.Folder:
        with self._understood():
            name, mode, writable = self._told("folder", path)
            return site.Folder(ssh.text(name), int(mode[:8], 8), writable == "yes")

    def look(self, paths: Sequence[str]) -> Dict[str, site.Seen]:
        known = [path for path in paths if path and "\n" not in path]
        words = self._told("look", *known) if known else []
        found = {}
        for path, inode, kind, header in zip(known, words[::3], words[1::3], words[2::3]):
            if kind != "-":
                with self._understood():
                    head = ssh.binary(header)[: site.HEADER] if header != "-" else b""
                found[path] = site.Seen(inode[:64] if inode != "-" else None, kind, head)
        return found

    def read(self, path: str, most: int) -> bytes:
        try:
            found = self.asked("read", path, str(most), most=2 * most + ssh.MOST_ANSWER)
        except ssh.Refused as e:
            raise OSError(errno.EIO, str(e), path) from None
        with self._understood():
            size, data = ssh.number(found), base64.b64decode("".join(found[1:]))
        if len(data) != size or size > most:
            raise ValueError(f"{len(data)} bytes of {size} could be read")
        return data

    def _told(self, *words: str) -> List[str]:
        try:
            return self.asked(*words)
        except ssh.Refused as e:
            raise errors.HypervisorError(reason=f"{self.name}: {e}") from None

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Errors: HypervisorError where the answer is none: another far end than ours, or a host that means us no good."""
        try:
            yield
        except (ssh.Lost, ValueError) as e:
            raise errors.HypervisorError(reason=f"{self.name}: its answer is none: {names.printable(str(e))}") from None

    def machine(self) -> Optional[machines.Machine]:
        return farimages.Images(self)

    def lookout(self, uuid: names.DomainUuid) -> site.Lookout:
        self.linked()
        self._require("timeout")
        return sentry.Sentry(self, uuid)

    # The way to a job

    def reach(self, where: scratch.Places, stop: Callable[[], None] = lambda: None) -> site.Reached:
        near = os.path.join(where.run_dir, scratch.SOCKET)
        if self._reaching != where or self._link is None or not self._link.alive:
            self._patiently(lambda: self._forward(near, where.socket), stop)
            self._reaching = where
        return site.Reached(near)

    def _forward(self, near: str, far: str) -> None:
        link = self.linked()
        try:
            os.unlink(near)  # of a connection that was lost
        except FileNotFoundError:
            pass
        try:
            link.forward(near, far)
            # A server that forwards nothing says so only when somebody connects.
            if not machines.greets(near, GREET_SECONDS) and link.alive:
                raise errors.HostRefused(host=self.name, reason=f"ssh does not reach the socket {far} there", way_out=FORWARD)
        except ssh.Refused as e:
            raise errors.HostRefused(host=self.name, reason=f"ssh forwards no socket ({e})", way_out=FORWARD) from None
        except ssh.Lost as e:
            self._drop()
            raise refusals.explained(self.name, str(e)) from None

    def _patiently(self, call: Callable[[], T], stop: Callable[[], None]) -> T:
        """For as long as a short trouble of the network may last, once there was a way."""
        deadline = time.monotonic() + (RECONNECT_SECONDS if self._reaching else 0.0)
        while True:
            try:
                return call()
            except errors.HostLost:
                if time.monotonic() > deadline:
                    raise
            stop()
            time.sleep(PAUSE)

    def leave(self, where: scratch.Places) -> None:
        near = os.path.join(where.run_dir, scratch.SOCKET)
        if self._reaching == where and self._link is not None:
            try:
                self._link.cancel(near, where.socket)
            except (ssh.Lost, ssh.Refused):
                pass  # it has gone with its connection
            try:
                os.unlink(near)
            except FileNotFoundError:
                pass
        self._reaching = None
