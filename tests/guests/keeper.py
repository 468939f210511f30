"""A process that keeps one private libvirtd: started by `daemon`, alone, by path; imports nothing of ours.

It is the sub-reaper of all that comes from libvirtd, so ended QEMUs vanish at once (where PID 1 does not reap, libvirt
waits 40 s for each) and none can escape: when its standard input ends, because the tests are done or were killed
however hard, it kills its descendants one by one by pid, removes their folder and leaves.

As root it is run by `unshare --mount`, so the mounts below are seen by it and its children only.

Commands on standard input, one per line, each answered by one line: ``start``, ``term``, ``kill``.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from typing import List, Optional

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
OWN = ("/var/lib/libvirt", "/var/cache/libvirt", "/etc/libvirt", "/var/log/libvirt")

_prctl = ctypes.CDLL(None, use_errno=True).prctl


def mount_own_folders(state: str) -> None:
    """A fresh /run, and our own folders over libvirt's."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", "/run"], check=True)
    for folder in OWN:
        ours = state + folder
        os.makedirs(ours, exist_ok=True)
        os.makedirs(folder, exist_ok=True)
        subprocess.run(["mount", "--bind", ours, folder], check=True)
    if os.path.exists("/dev/kvm"):
        mount_small_dev(os.path.join(state, "dev"))


def mount_small_dev(small: str) -> None:
    """A /dev without kvm.

    Guests of KVM would not run everywhere.  And where root only may open it, libvirt mistrusts what it has just found
    out about QEMU (it probes with CAP_DAC_OVERRIDE, but checks without) and asks again: 6 s for each definition.
    """
    os.mkdir(small)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", small], check=True)
    os.umask(0)
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        os.mknod(os.path.join(small, name), stat.S_IFCHR | 0o666, os.stat(f"/dev/{name}").st_rdev)
    os.umask(0o022)
    for name, place in (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd")):
        os.symlink(place, os.path.join(small, name))
    for name in ("pts", "shm"):
        os.mkdir(os.path.join(small, name))
        subprocess.run(["mount", "--bind", f"/dev/{name}", os.path.join(small, name)], check=True)
    # Not only hidden: libvirt goes through the list of mounts below /dev and expects to reach each.
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        below = [line.split()[1] for line in mounts]
    for point in reversed(below):
        if point == "/dev" or point.startswith("/dev/"):
            subprocess.run(["umount", "--lazy", point], check=True)
    subprocess.run(["mount", "--move", small, "/dev"], check=True)


def descendants() -> List[int]:
    """Our children; orphans of theirs are among them as soon as the parent is gone."""
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as listed:
        return [int(pid) for pid in listed.read().split()]


def reap() -> None:
    """Collects what has ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


class Keeper:
    """libvirtd's parent."""

    def __init__(self, state: str, argv: List[str]) -> None:
        self.argv = argv
        self.log = os.path.join(state, "output.log")
        self.pid: Optional[int] = None

    def start(self) -> str:
        """Starts libvirtd if it is not running; the answer is its pid."""
        if self.pid is None:
            with open(self.log, "ab") as log:
                parent = os.getpid()

                def tied() -> None:
                    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                    if os.getppid() != parent:
                        os._exit(1)

                started = subprocess.Popen(
                    self.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=tied,  # noqa: PLW1509 -- there are no threads here
                    start_new_session=True,
                )
            self.pid = started.pid
            started.returncode = 0  # reaped here, not by Popen
        return str(self.pid)

    def end(self, number: int) -> str:
        """Ends libvirtd (its QEMUs live on) and waits until it is gone."""
        if self.pid is None:
            return "was not running"
        os.kill(self.pid, number)
        deadline = time.monotonic() + 20
        while True:
            try:
                if os.waitpid(self.pid, os.WNOHANG)[0]:
                    break
            except ChildProcessError:
                break
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.01)
        self.pid = None
        return "ended"

    def end_everything(self) -> None:
        """libvirtd first, so that it does not watch its guests die; then every QEMU."""
        self.end(signal.SIGTERM)
        while True:
            left = descendants()
            if not left:
                return
            for pid in left:
                os.kill(pid, signal.SIGKILL)  # ours until it is reaped, so never another's
            reap()
            time.sleep(0.02)


def main() -> None:
    root, mounts, *argv = sys.argv[1:]
    state = os.path.join(root, "state")
    # In case somebody else holds the other end of our standard input.  The handler only makes a note: when the tests
    # are killed both this and the end of standard input arrive, and an exception could hit the clearing up.
    told = Told()
    signal.signal(signal.SIGTERM, told)
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    if mounts == "own":
        mount_own_folders(state)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then ends us
    keeper = Keeper(state, argv)
    try:
        print("ready", flush=True)
        serve(keeper, told)
    finally:
        keeper.end_everything()
        shutil.rmtree(root, ignore_errors=True)


class Told:
    """Whether SIGTERM has come."""

    def __init__(self) -> None:
        self.ended = False

    def __call__(self, *_: object) -> None:
        self.ended = True


def serve(keeper: Keeper, told: Told) -> None:
    """Obeys until standard input or SIGTERM ends it; orphans are reaped by the kernel's word, SIGCHLD."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    pending = b""
    while not told.ended:
        ready, _, _ = select.select([0, read], [], [])  # a signal writes to `read`, so none is slept through
        if read in ready:
            os.read(read, 4096)
            reap_orphans(keeper)
        if 0 not in ready:
            continue
        got = os.read(0, 4096)
        if not got:
            return
        pending += got
        while b"\n" in pending:
            line, pending = pending.split(b"\n", 1)
            command = line.decode()
            if command == "start":
                print(keeper.start(), flush=True)
            else:
                print(keeper.end(signal.SIGKILL if command == "kill" else signal.SIGTERM), flush=True)


def reap_orphans(keeper: Keeper) -> None:
    """Every ended child; when libvirtd is among them it died on its own, and may be started again."""
    try:
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            if pid == keeper.pid:
                keeper.pid = None
    except ChildProcessError:
        return


if __name__ == "__main__":
    main()
