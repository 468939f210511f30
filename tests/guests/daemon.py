"""A libvirtd of our own, which tests may stop, kill and restart without anybody else noticing.

As root it lives in a mount namespace of its own (/run, /var/lib/libvirt, /etc/libvirt and so on are its alone) and is
reached by ``qemu:///system?socket=...``; otherwise it is a session daemon with its own XDG folders.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict, Final, List, Optional, Tuple

import libvirt

KEEPER: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "keeper.py")
START_SECONDS: Final = 30.0
# What libvirtd found out about QEMU in an earlier run, 5 s to find out again; it checks by itself whether it still holds.
CAPABILITIES: Final = os.path.join(os.path.dirname(KEEPER), "../../.cache/libvirt-capabilities")
# What QEMU runs as in the distributions' builds.
QEMU_USERS: Final = (("libvirt-qemu", "libvirt-qemu"), ("qemu", "qemu"))


class Unavailable(Exception):
    """This machine cannot run a private libvirtd; the reason is for a skip."""


def qemu_ids() -> Tuple[int, int]:
    """User and group of QEMU under this daemon: ours, or the distribution's when we are root."""
    if os.geteuid():
        return os.geteuid(), os.getegid()
    for user, group in QEMU_USERS:
        try:
            return pwd.getpwnam(user).pw_uid, grp.getgrnam(group).gr_gid
        except KeyError:
            continue
    raise Unavailable("no user libvirt-qemu or qemu")


def program(name: str) -> Optional[str]:
    """Where a daemon is; None where it is not installed."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


class Daemon:
    """One private libvirtd; a context manager that ends it and every QEMU of it by pid.

    Everything lies under `root`, a short path in /tmp which both sides see: `images` (for disks), `run` (the tool's
    LIBVIRT_CBT_RUN_DIR), `scratch` (the tool's --scratch-dir); all three can be passed through by QEMU.
    Errors: Unavailable.
    """

    name, sock = "libvirtd", "libvirt-sock"

    def __init__(self) -> None:
        found = program(self.name)
        if not found:
            raise Unavailable(f"{self.name} is not installed")
        libvirt.registerErrorHandler(lambda *_: None, None)  # they are raised; not printed as well
        self.qemu_ids = qemu_ids()
        self.privileged = os.geteuid() == 0
        self.root = tempfile.mkdtemp(prefix="cbt-", dir="/tmp")
        os.chmod(self.root, 0o711)
        self.images = self._shared("images")
        self.run_dir = self._shared("run")
        self.scratch = self._shared("scratch")
        self.log = os.path.join(self.root, "libvirtd.log")
        self.pid: Optional[int] = None
        self._conn: Any = None
        self._keeper: Optional[subprocess.Popen[str]] = None
        self._argv = [found, "-f", self._configuration(), "-p", os.path.join(self.root, "libvirtd.pid")]

    def _shared(self, name: str) -> str:
        path = os.path.join(self.root, name)
        os.mkdir(path)
        os.chown(path, -1, self.qemu_ids[1])
        os.chmod(path, 0o711)
        return path

    def _configuration(self) -> str:
        state = os.path.join(self.root, "state")
        etc = state + "/etc/libvirt" if self.privileged else os.path.join(self.root, "xdg/config/libvirt")
        sockets = os.path.join(self.root, "sock") if self.privileged else os.path.join(self.root, "xdg/run/libvirt")
        for folder in (state, etc, sockets):
            os.makedirs(folder, mode=0o755)
        self.socket = os.path.join(sockets, self.sock)
        mode = "system" if self.privileged else "session"
        self.uri = f"qemu:///{mode}?socket={self.socket}"
        # No virtlogd to look after; no AppArmor profile that does not know our paths; no cgroups of the host.
        cache = (
            state + "/var/cache/libvirt/qemu" if self.privileged else os.path.join(self.root, "xdg/cache/libvirt/qemu")
        )
        self._capabilities = os.path.join(cache, "capabilities")
        if os.path.isdir(CAPABILITIES):
            shutil.copytree(CAPABILITIES, self._capabilities)
        with open(os.path.join(etc, "qemu.conf"), "w", encoding="utf-8") as conf:
            conf.write('stdio_handler = "file"\nsecurity_driver = "none"\nnamespaces = []\ncgroup_controllers = []\n')
        conf_path = os.path.join(self.root, "libvirtd.conf")
        with open(conf_path, "w", encoding="utf-8") as conf:
            conf.write(f'log_outputs = "3:file:{self.log}"\nlog_level = 3\nauth_unix_rw = "none"\n')
            if self.privileged:
                conf.write(f'unix_sock_dir = "{sockets}"\nunix_sock_rw_perms = "0700"\n')
        return conf_path

    def __enter__(self) -> Daemon:
        try:
            self._start_keeper()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_keeper(self) -> None:
        argv = [sys.executable, "-I", KEEPER, self.root, "own" if self.privileged else "none"]
        if self.privileged:
            argv = ["unshare", "--mount", "--propagation", "private", "--", *argv]
        self._keeper = subprocess.Popen(
            [*argv, *self._argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=self._daemon_environment(),
            cwd="/",
        )
        assert self._keeper.stdout
        if self._keeper.stdout.readline() != "ready\n":
            said = self._keeper.communicate()[1].strip().splitlines()
            raise Unavailable(f"no mount namespace of our own here: {said[-1] if said else 'unshare failed'}")

    def _daemon_environment(self) -> Dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        xdg = os.path.join(self.root, "xdg")
        if self.privileged:
            return {**kept, "HOME": "/root"}
        folders = {"XDG_RUNTIME_DIR": "run", "XDG_CONFIG_HOME": "config", "XDG_CACHE_HOME": "cache"}
        return {**kept, "HOME": xdg, **{name: os.path.join(xdg, folder) for name, folder in folders.items()}}

    def _tell(self, command: str) -> str:
        assert self._keeper
        assert self._keeper.stdin
        assert self._keeper.stdout
        self._keeper.stdin.write(command + "\n")
        answer = self._keeper.stdout.readline().strip()
        assert answer, "the keeper of the private libvirtd has died"
        return answer

    def start(self) -> None:
        """Starts libvirtd and waits until it answers."""
        self.pid = int(self._tell("start"))
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self._conn = libvirt.open(self.uri)
            except libvirt.libvirtError as e:
                if time.monotonic() > deadline or not os.path.exists(f"/proc/{self.pid}"):
                    raise Unavailable(f"libvirtd did not come up ({e}):\n{self.log_tail()}") from None
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        """Ends libvirtd as an upgrade does (SIGTERM); its guests go on."""
        self._disconnect()
        self._tell("term")
        self.pid = None

    def kill(self) -> None:
        """kill -9; its guests go on."""
        self._disconnect()
        self._tell("kill")
        self.pid = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def _disconnect(self) -> None:
        if self._conn is not None:
            self._conn.close()
            self._conn = None

    def close(self) -> None:
        """Ends all that was started here and removes the folder; may be called again."""
        self._disconnect()
        self._keep_capabilities()
        if self._keeper:
            assert self._keeper.stdin
            self._keeper.stdin.close()
            self._keeper.wait(60)
            for stream in (self._keeper.stdout, self._keeper.stderr):
                assert stream
                stream.close()
            self._keeper = None
        shutil.rmtree(self.root, ignore_errors=True)

    def _keep_capabilities(self) -> None:
        if not os.path.isdir(self._capabilities):
            return
        try:
            os.makedirs(CAPABILITIES, exist_ok=True)
            for name in os.listdir(self._capabilities):
                kept = os.path.join(CAPABILITIES, name)
                shutil.copyfile(os.path.join(self._capabilities, name), f"{kept}.{os.getpid()}")
                os.replace(f"{kept}.{os.getpid()}", kept)
        except OSError:
            pass  # a checkout that is not ours to write to: the next run is slower

    @property
    def connection(self) -> Any:
        """An open virConnect; a new one after a restart."""
        assert self._conn is not None, "the private libvirtd is stopped"
        return self._conn

    def domain(self, name: str) -> Any:
        """libvirt's domain object on the present connection."""
        return self.connection.lookupByName(name)

    def environment(self) -> Dict[str, str]:
        """What the tool needs to know of this daemon, to be laid over os.environ."""
        return {
            "LIBVIRT_DEFAULT_URI": self.uri,
            "LIBVIRT_CBT_RUN_DIR": self.run_dir,
            # Not the host's; there are none.
            "LIBVIRT_CBT_HOOKS_DIR": os.path.join(self.root, "hooks.d"),
            "LIBVIRT_CBT_SPOOL_DIR": os.path.join(self.root, "spool"),
            "LIBVIRT_CBT_SWTPM_DIR": self.swtpm,
        }

    def inside(self, path: str) -> str:
        """How a path of the daemon's mount namespace (/run/libvirt/...) is reached from outside."""
        if not self.privileged:
            xdg = os.path.join(self.root, "xdg/run/libvirt")
            return path.replace("/run/libvirt", xdg, 1) if path.startswith("/run/libvirt/") else path
        assert self._keeper
        return f"/proc/{self._keeper.pid}/root{path}"

    def enter(self) -> List[str]:
        """The beginning of a command that runs in the daemon's mount namespace, beside it."""
        assert self._keeper
        return ["nsenter", "--target", str(self._keeper.pid), "--mount", "--"] if self.privileged else []

    def qemu_pid(self, uuid: str) -> int:
        """The pid of a running guest's QEMU; by UUID, as a name may be anything."""
        assert self._keeper
        keeper = self._keeper.pid
        with open(f"/proc/{keeper}/task/{keeper}/children", encoding="ascii") as listed:
            children = listed.read().split()
        for pid in children:
            with open(f"/proc/{pid}/cmdline", "rb") as arguments:
                words = arguments.read().split(b"\0")
            if b"-uuid" in words and words[words.index(b"-uuid") + 1] == uuid.encode():
                return int(pid)
        raise LookupError(f"no QEMU runs the domain {uuid}")

    @property
    def hooks(self) -> str:
        """The folder of the hooks that it calls for its guests; a daemon that had none when it started needs a restart.

        Only of a daemon of root's: the others call those of the host.
        """
        return os.path.join(self.root, "state/etc/libvirt/hooks/qemu.d")

    @property
    def swtpm(self) -> str:
        """The folder of the states of its guests' TPMs."""
        return os.path.join(self.root, "state/var/lib/libvirt/swtpm" if self.privileged else "xdg/config/libvirt/qemu/swtpm")

    def qemu_log(self, name: str) -> str:
        """The path of a guest's log, to which its QEMU prints."""
        folder = "state/var/log/libvirt/qemu" if self.privileged else "xdg/cache/libvirt/qemu/log"
        return os.path.join(self.root, folder, f"{name}.log")

    def log_tail(self, lines: int = 40) -> str:
        """The end of libvirtd's log, for a failed test's report."""
        found: List[str] = []
        for path in (self.log, os.path.join(self.root, "state", "output.log")):
            try:
                with open(path, encoding="utf-8", errors="replace") as log:
                    found += log.read().splitlines()[-lines:]
            except OSError:
                continue
        return "\n".join(found)


class Modular(Daemon):
    """QEMU's own daemon of libvirt's modular ones, which Fedora and RHEL have; Debian builds it and leaves it out."""

    name, sock = "virtqemud", "virtqemud-sock"
