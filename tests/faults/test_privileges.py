"""Row 61 of the faults: how little the tool needs.  docs/security.md says the same for people."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable, Final, Iterator, List, Optional

import pytest

from tests.guests import daemon
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Ended, Tool, models, same

PARTS: Final = (".venv", "libvirt_cbt", "pyproject.toml", "setup.cfg", "tests", "xml_templates")  # that a test needs
ROOT: Final = Path(__file__).resolve().parents[2]
AS_ROOT: Final = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else, or less")
# Of the capabilities of root: scratch files are given to QEMU's user, and its socket is entered that only QEMU's group may.
CAPABILITIES: Final = "-all,+chown,+dac_override"
# All essential verbs, of a guest whose name is as hostile as names get; and what is served.
ESSENTIALS: Final = (
    "tests/faults/test_names.py::test_a_name_is_only_a_name[hostile]",
    "tests/libvirt/test_serve.py::test_without_since_and_with_one_disk",
)


@pytest.fixture
def user() -> Iterator[List[str]]:
    """The beginning of a command that runs as `nobody`, without a capability, in a folder that is nobody's own."""
    nobody = pwd.getpwnam("nobody")
    home = tempfile.mkdtemp(prefix="cbt-", dir="/tmp")
    os.chown(home, nobody.pw_uid, nobody.pw_gid)
    drop = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups", "--inh-caps=-all"]
    argv = [*drop, "--bounding-set=-all", "--no-new-privs", "--", "env", f"HOME={home}", f"TMPDIR={home}"]
    try:
        yield [*_readable(argv, home), *argv]
    finally:
        shutil.rmtree(home)


def _readable(user: List[str], folder: str) -> List[str]:
    """Where `user` may not read this checkout (root's home, an umask of 077): a mount namespace in which a copy lies over it."""
    seen = subprocess.run(
        [*user, "find", *(str(ROOT / part) for part in PARTS), "-name", "__pycache__", "-prune", "-o", "!", "-readable", "-print"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    if seen.returncode == 0 and not seen.stdout:
        return []
    above = ["/", *(str(p) for p in reversed(ROOT.parents) if str(p) != "/"), str(ROOT)]
    closed = next((p for p in above if not os.stat(p).st_mode & 0o001), str(ROOT))
    copy = (
        'mount --bind "$1" "$3" && mount -t tmpfs -o mode=0755 tmpfs "$2" && mkdir -p "$1" && '
        f'(cd -- "$3" && cp -a {" ".join(PARTS)} "$1") && '
        'umount "$3" && chmod -R a+rX "$1" && shift 3 && exec "$@"'
    )
    return ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", copy, "sh", str(ROOT), closed, folder]


@AS_ROOT
@pytest.mark.fault(61)
def test_an_ordinary_user_backs_up_guests_of_a_session(user: List[str], seed: int) -> None:
    """With a libvirtd of the user's own these tests are the same for nobody as for root."""
    environment = {k: v for k, v in os.environ.items() if k != "CI" and not k.startswith(("XDG_", "PYTEST_"))}
    argv = [*user, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"{ROOT}/{one}" for one in ESSENTIALS)]
    done = subprocess.run(
        argv, cwd="/", env={**environment, "CBT_TEST_SEED": str(seed)}, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0 and f"{len(ESSENTIALS)} passed" in done.stdout, done.stdout + done.stderr


class Reduced(Tool):
    """Root, with no more capabilities than it needs."""

    def argv(self, command: str, *arguments: str) -> List[str]:
        reduced = ["setpriv", f"--bounding-set={CAPABILITIES}", "--inh-caps=-all", "--no-new-privs", "--"]
        return [*reduced, *super().argv(command, *arguments)]

    def run(self, command: str, *arguments: str, repository: Optional[str] = None) -> Ended:
        assert repository is None, "its place in argv is another one here"
        return super().run(command, *arguments)


@AS_ROOT
@pytest.mark.fault(61)
def test_root_with_two_capabilities(
    libvirtd: daemon.Daemon, plain_guest: Callable[..., PlainGuest], tmp_path: Path
) -> None:
    """As a service may be confined (CapabilityBoundingSet of systemd.exec)."""
    guest = plain_guest(Disk("vda", MIB))
    tool = Reduced(libvirtd, str(tmp_path / "repository"))
    checks = tool.run("doctor", guest.name, "--scratch-dir", libvirtd.scratch).result["checks"]
    assert not [check for check in checks if check["status"] == "failed"]
    tool.backup(guest)
    guest.write("vda", 0, 65536, 7)
    assert tool.backup(guest)["disks"][0]["mode"] == "incremental"
    for words in (("start", guest.name), ("stop", guest.name), ("verify",), ("recover",),
                  ("boot", guest.name, "--name", "booted", "--output", libvirtd.scratch, "--wait", "0"),
                  ("boot", "--discard", "booted"), ("prune", guest.name, "--keep-last", "1")):  # fmt: skip
        assert tool.run(*words).code == 0, words
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
    tool.nothing_left(guest)


@AS_ROOT
def test_a_user_whose_files_qemu_cannot_open_is_told_so(
    libvirtd: daemon.Daemon, plain_guest: Callable[..., PlainGuest], user: List[str], tmp_path: Path
) -> None:
    """Whoever is in the group libvirt reaches the system's daemon, whose QEMU is another user than both."""
    guest = plain_guest(Disk("vda", MIB))
    home = user[-2][len("HOME=") :]
    environment = {**libvirtd.environment(), "LIBVIRT_CBT_RUN_DIR": f"{home}/run"}
    argv = [*user, *(f"{k}={v}" for k, v in environment.items()), sys.executable, "-c", "from libvirt_cbt import cli; cli.main()"]
    argv += ["-r", f"{home}/repository", "--json"]
    os.chmod(libvirtd.socket, 0o777)
    try:
        for words, code in ((["init"], 0), (["doctor", guest.name], 0), (["backup", guest.name], 14)):
            done = subprocess.run([*argv, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
            assert done.returncode == code, done.stderr
            assert words[0] == "init" or "qemu:///session" in done.stdout
    finally:
        os.chmod(libvirtd.socket, 0o700)
    assert guest.domain.listAllCheckpoints() == [] and not {"run", ".cache"} & {*os.listdir(home)}
