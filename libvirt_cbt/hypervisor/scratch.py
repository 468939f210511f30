"""Scratch files and the socket's folder: all that a job needs on disk, made beforehand and removed afterwards.

Every path carries the backup's id, is made fresh (an old scratch would silently
hide the disk: facts of REUSE_EXTERNAL) and is known to the intent before it exists.
"""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Dict, Final, Iterator, List, Mapping, Optional, Tuple

from libvirt_cbt import errors, folders, names, tools, xmldoc
from libvirt_cbt import places as machine

if TYPE_CHECKING:
    from libvirt_cbt.hypervisor.site import Site

SOCKET_PATH_MAX: Final = 107
ROOM_FLOOR: Final = 4 * 1024 * 1024  # a job is not begun with less
RESERVE: Final = 512 * 1024 * 1024  # a job is ended when less is left: a fast guest writes that while it ends
SOCKET: Final = "nbd.sock"
DEFAULT_DIRECTORY: Final = "/var/lib/libvirt/cbt-scratch"


@dataclass(frozen=True)
class Places:
    """Where one job's files lie; nothing exists yet.

    `run_dir` is a folder of this machine.  The socket and the scratch files are on the guest's host: on this machine the
    socket is in `run_dir`.
    """

    run_dir: str
    socket: str
    directory: str  # of the scratch files, ours alone
    scratch: Dict[str, str]  # by target

    @property
    def socket_dir(self) -> str:
        """The folder of the socket, ours alone, on the guest's host."""
        return os.path.dirname(self.socket)


def scratch_root(asked: Optional[str]) -> str:
    """On this machine."""
    if asked:
        return os.path.abspath(asked)
    if os.geteuid() == 0:
        return DEFAULT_DIRECTORY
    data = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.abspath(os.path.join(data, "libvirt-cbt", "scratch"))


def places(site: Site, backup: names.BackupId, targets: List[str], scratch_dir: Optional[str]) -> Places:
    """Errors: ScratchDenied when the socket's path would be too long for the kernel; Usage."""
    run_dir = os.path.join(machine.run_root(), backup)
    socket_dir = os.path.join(site.socket_root(), backup)
    for folder in (run_dir, socket_dir):
        if len(os.fsencode(os.path.join(folder, SOCKET))) > SOCKET_PATH_MAX:
            raise errors.ScratchDenied(
                directory=folder, reason="a socket's path has 107 bytes at most; set LIBVIRT_CBT_RUN_DIR to a shorter one"
            )
    directory = os.path.join(site.scratch_root(scratch_dir), names.checkpoint(backup))
    for path in (socket_dir, directory):
        xmldoc.require_path(path)
    scratch = {t: os.path.join(directory, f"{t}.qcow2") for t in targets}
    return Places(run_dir, os.path.join(socket_dir, SOCKET), directory, scratch)


@dataclass
class Made:
    """What is there now.  `tight`: a warning when the room is less than what a guest could overwrite; `keep`: not removed."""

    tight: Optional[str] = None
    keep: bool = False


@contextmanager
def made(
    site: Site, where: Places, sizes: Mapping[str, int], qemu_ids: Optional[Tuple[int, int]]
) -> Iterator[Made]:
    """Makes folder, scratch files (sparse qcow2 of the disks' sizes) and the socket's folder; removes them at the end.

    QEMU's group may enter and make its socket, nobody else: 0730.  Errors: ScratchDenied, ScratchSpace.
    """
    done = Made()
    try:
        done.tight = _tight(where, sizes, site.make(where, sizes, qemu_ids), site.reaction)
        yield done
    finally:
        if not done.keep:
            site.remove(where)


def make(where: Places, sizes: Mapping[str, int], qemu_ids: Optional[Tuple[int, int]]) -> int:
    """On this machine; bytes that are free then.  Errors: ScratchDenied, QemuOfAnother, ScratchSpace."""
    require_user(qemu_ids)
    directory = os.path.dirname(where.directory)
    try:
        _make_folder(where.run_dir, 0o730, qemu_ids)
        _make_folder(where.directory, 0o710, qemu_ids)
        free = room(where.directory)
        if free < ROOM_FLOOR:
            raise errors.ScratchSpace(directory=directory, free=free, needed=ROOM_FLOOR)
        for path in where.scratch.values():
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
        commands = [
            ["qemu-img", "create", "-q", "-f", "qcow2", path, str(sizes[target])] for target, path in where.scratch.items()
        ]
        with ThreadPoolExecutor(4) as several:  # 20 ms each, nearly all of it the start of the process
            list(several.map(tools.run, commands))
    except OSError as e:
        raise errors.ScratchDenied(directory=directory, reason=e.strerror or str(e)) from None
    return room(where.directory)


def require_user(qemu_ids: Optional[Tuple[int, int]]) -> None:
    """Errors: QemuOfAnother where we are not root and QEMU is somebody else."""
    if qemu_ids and os.geteuid() not in (0, qemu_ids[0]):
        raise errors.QemuOfAnother(qemu=qemu_ids[0], user=os.geteuid())


def make_run_dir(path: str) -> None:
    """A folder of this machine for sockets that only we use.  Errors: HypervisorError."""
    try:
        _make_folder(path, 0o700, None)
    except OSError as e:
        reason = f"cannot make a folder for sockets in {os.path.dirname(path)}: {e.strerror}"
        raise errors.HypervisorError(reason=reason) from None


def _make_folder(path: str, shared: int, qemu_ids: Optional[Tuple[int, int]]) -> None:
    folders.root(os.path.dirname(path))
    os.mkdir(path, 0o700)
    if qemu_ids and os.geteuid() == 0:
        os.chown(path, 0, qemu_ids[1])
        os.chmod(path, shared)


def _tight(where: Places, sizes: Mapping[str, int], free: int, reaction: float) -> Optional[str]:
    if not _scarce(sizes, free):
        return None
    slowed = speed(sizes, free, reaction)
    return (
        f"{os.path.dirname(where.directory)} has {free >> 20} MiB free: should the guest overwrite more than "
        f"{(free - reserve(free)) >> 20} MiB during the copy, the backup is ended"
        + (f"; its writes are slowed to {slowed >> 20} MiB a second until then" if slowed else "")
    )


def speed(sizes: Mapping[str, int], free: int, reaction: float) -> int:
    """Bytes a second that may go to the scratch files, so that a job can be ended in time; 0 where nothing is scarce.

    `reaction` is the site's.
    """
    kept = reserve(free)
    return int(kept / reaction) if _scarce(sizes, free) and kept < RESERVE else 0


def _scarce(sizes: Mapping[str, int], free: int) -> bool:
    """Whether the guest could overwrite more than there is room for."""
    return free < sum(sizes.values()) + reserve(free)


def reserve(free: int) -> int:
    """Bytes that must stay free during a job which begins with `free`."""
    return min(RESERVE, free // 4 * 3)


def room(directory: str) -> int:
    """Bytes that a normal user may still write where `directory` is."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def remove(where: Places) -> List[str]:
    """Removes what is there on this machine of one job's files, and only files of the expected kind; the paths that went."""
    gone = [path for path in where.scratch.values() if _unlink(path, stat.S_ISREG)]
    return gone + remove_folder(where.directory) + remove_run_dir(where.run_dir)


def remove_run_dir(path: str) -> List[str]:
    # The folder carries our id: every socket in it is ours, those of the layers' writers too.
    return [one for one in _content(path) if _unlink(one, stat.S_ISSOCK)] + remove_folder(path)


def remove_folder(path: str) -> List[str]:
    try:
        os.rmdir(path)
    except OSError:
        return []  # not there, or it holds something that is not ours
    return [path]


def _content(directory: str) -> List[str]:
    try:
        return [entry.path for entry in os.scandir(directory)]
    except OSError:
        return []


def _unlink(path: str, kind: object) -> bool:
    try:
        if not kind(os.lstat(path).st_mode):  # type: ignore[operator]
            return False
        os.unlink(path)
    except OSError:
        return False
    return True
