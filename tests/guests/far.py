"""The private libvirtd as another machine: an OpenSSH server beside it, and a near side that sees none of its files.

Both sides are this machine, so a path would do on either.  The server runs in libvirtd's mount namespace, with its own
/run and /var/lib/libvirt.  What is run on the near side has a namespace, too: where libvirtd's folder was there are
decoys, other files of the same names.  Whoever mistakes near for far reads those.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from typing import Dict, Final, List, Optional

from tests.guests import daemon

_OWN: Final = ".".join(str(random.SystemRandom().randint(1, 254)) for _ in range(2))
ADDRESS: Final = f"127.1.{_OWN}"  # of this test run's hosts alone, so that no other one takes a port meanwhile
WIRE: Final = f"127.2.{_OWN}"  # where a test puts a wire that it can cut ...
BEHIND: Final = "far.example"  # ... and the near side's name for what is behind it
START_SECONDS: Final = 30.0
# Mounts inside a namespace of its own, source and target, until --.
NEAR: Final = 'while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit; shift 2; done; shift; exec "$@"'
FAR: Final = 'mkdir -p /run/sshd /run/libvirt && ln -sfn "$1" /run/libvirt/libvirt-sock && shift && exec "$@"'


class Sides:
    """The two sides of a private libvirtd; `home` is the near user's.  Errors: daemon.Unavailable."""

    name: str
    uri: str

    def __init__(self, host: daemon.Daemon) -> None:
        if os.geteuid():
            raise daemon.Unavailable("the two sides of a host need mount namespaces, and those root")
        self.host = host
        self.folder = tempfile.mkdtemp(prefix="cbt-far-", dir="/tmp")
        self.home = self._new("home")
        self.run_dir = self._new("run")
        self._decoys = self._new("decoys")
        self.mounts: Dict[str, str] = {}  # further ones of the near side: target, and source
        self._hosts = self._write("hosts", f"{ADDRESS} localhost {socket.gethostname()}\n{WIRE} {BEHIND}\n")

    def _new(self, name: str) -> str:
        path = os.path.join(self.folder, name)
        os.mkdir(path, 0o700)
        return path

    def _read(self, name: str) -> str:
        with open(os.path.join(self.folder, name), encoding="utf-8") as file:
            return file.read()

    def _write(self, name: str, text: str) -> str:
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path

    def near(self, argv: List[str]) -> List[str]:
        """A command on the near side."""
        passwd = self._write("passwd", f"root:x:0:0:root:{self.home}:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")
        mounts = {"/etc/passwd": passwd, "/etc/hosts": self._hosts, self.host.root: self._decoys, **self.mounts}
        pairs = [word for target, source in mounts.items() for word in (source, target)]
        return ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", NEAR, "sh", *pairs, "--", *argv]

    def environment(self) -> Dict[str, str]:
        """Of such a command."""
        known = {name: value for name, value in os.environ.items() if not name.startswith(("SSH_", "LIBVIRT_", "XDG_"))}
        return {**known, "HOME": self.home, "LIBVIRT_DEFAULT_URI": self.uri, "LIBVIRT_CBT_RUN_DIR": self.run_dir}

    def decoy(self, path: str, content: bytes) -> None:
        """What the near side sees at a path of the far side's."""
        assert path.startswith(self.host.root + "/")
        near = self._decoys + path[len(self.host.root) :]
        os.makedirs(os.path.dirname(near), exist_ok=True)
        with open(near, "wb") as file:
            file.write(content)

    def decoys(self) -> Dict[str, bytes]:
        """All of them, by the path at which the near side sees them."""
        found = {}
        for folder, _, names in os.walk(self._decoys):
            for name in names:
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    found[self.host.root + path[len(self._decoys) :]] = file.read()
        return found

    def clear(self) -> None:
        """No decoy is left."""
        self.mounts = {}
        shutil.rmtree(self._decoys)
        os.mkdir(self._decoys, 0o700)

    def left(self) -> List[str]:
        """What a tool has left behind, on either side."""
        found = [os.path.join(self.run_dir, name) for name in os.listdir(self.run_dir)]
        for folder in ("/run/libvirt-cbt", "/var/lib/libvirt/cbt-scratch"):
            inside = self.host.inside(folder)
            if os.path.isdir(inside):
                found += [f"far:{folder}/{name}" for name in os.listdir(inside)]
        return found


class Far(Sides):
    """An sshd on loopback, with host key, user key and configuration of its own; a context manager.

    In the near user's home is .ssh/config; the host is called `far` there.  Errors: daemon.Unavailable.
    """

    def __init__(self, host: daemon.Daemon) -> None:
        sshd = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if not sshd:
            raise daemon.Unavailable("sshd is not installed")
        super().__init__(host)
        self._sshd = sshd
        self.ssh = self._new("home/.ssh")
        self.name = "far"
        self.uri = "qemu+ssh://far/system"
        self.port = free_ports()
        self.key("host")
        self.key("home/.ssh/id_ed25519")
        self.options: List[str] = []  # of the server, further ones
        self.authorized = self._read("home/.ssh/id_ed25519.pub")
        self._process: Optional[subprocess.Popen[bytes]] = None
        self.configure()
        self.know()

    def __enter__(self) -> Far:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def clear(self) -> None:
        """All is as at the beginning."""
        super().clear()
        self.configure()
        self.know()

    def key(self, name: str) -> str:
        """A new key without a passphrase; its path."""
        path = os.path.join(self.folder, name)
        for old in (path, path + ".pub"):
            if os.path.exists(old):
                os.unlink(old)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, stdin=subprocess.DEVNULL)
        return path

    def configure(self, *lines: str) -> None:
        """The near user's ~/.ssh/config, with further lines for this host."""
        known = ["Host far", f"HostName {ADDRESS}", f"Port {self.port}", "User root", *lines]
        self._write("home/.ssh/config", "\n  ".join(known) + "\n")

    def know(self, key: Optional[str] = "host") -> None:
        """What the near user's known_hosts has of this host: this key, or none."""
        text = f"[{ADDRESS}]:{self.port} {self._read(f'{key}.pub')}" if key else ""
        self._write("home/.ssh/known_hosts", text)

    # The server

    def start(self) -> None:
        self._write("authorized_keys", self.authorized)
        settings = [
            f"Port {self.port}",
            f"ListenAddress {ADDRESS}",
            f"HostKey {self.folder}/host",
            f"AuthorizedKeysFile {self.folder}/authorized_keys",
            "PidFile none",
            "UsePAM no",
            "StrictModes no",  # the folder is in /tmp
            "PasswordAuthentication no",
            "MaxStartups 100",
            *self.options,
        ]
        configuration = self._write("sshd_config", "\n".join(settings) + "\n")
        inside = ["sh", "-c", FAR, "sh", self.host.socket, self._sshd, "-D", "-e", "-f", configuration]
        tied = ["setpriv", "--pdeathsig", "KILL", "--"]  # to this process: one that is killed leaves nobody who listens
        with open(os.path.join(self.folder, "log"), "ab") as log:
            self._process = subprocess.Popen(
                [*tied, *self.host.enter(), *inside], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection((ADDRESS, self.port), timeout=5).close()
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise daemon.Unavailable(f"sshd did not come up:\n{self.log()}") from None
                time.sleep(0.02)
            else:
                return

    def stop(self, *, cut: bool = False) -> None:
        """Nobody listens any more; connections that are open go on, unless they are `cut`, too."""
        if self._process:
            open_ones = self.sessions() if cut else []
            self._process.terminate()
            self._process.wait(30)
            self._process = None
            _kill(open_ones)

    def restart(self, *options: str, authorized: Optional[str] = None) -> None:
        """With these further options; None for the key that the near user has."""
        self.stop()
        self.options = [*options]
        self.authorized = authorized if authorized is not None else self._read("home/.ssh/id_ed25519.pub")
        self.start()

    def log(self) -> str:
        try:
            return self._read("log")[-4000:]
        except OSError as e:
            return str(e)

    def sessions(self) -> List[int]:
        """Pids of the server's processes for connections that are open; from OpenSSH 9.8 on each has a child that holds it."""
        assert self._process
        found = _children(self._process.pid)
        return [*found, *(child for pid in found for child in _children(pid) if _name(child).startswith("sshd"))]

    def cut(self) -> None:
        """Every connection, as a firewall or a host that falls over does."""
        _kill(self.sessions())


def _kill(pids: List[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _children(pid: int) -> List[int]:
    found = []
    with suppress(OSError):  # it has ended
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as listed:
                found += [int(child) for child in listed.read().split()]
    return found


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="ascii", errors="replace") as name:
            return name.read()
    except OSError:  # it has ended
        return ""


def free_ports(count: int = 1) -> int:
    """The first of so many in a row, below those that the kernel hands out by itself."""
    while True:
        low = random.SystemRandom().randint(10000, 30000)
        if all(_free(ADDRESS, low + n) and _free(WIRE, low + n) for n in range(count)):
            return low


def _free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True
