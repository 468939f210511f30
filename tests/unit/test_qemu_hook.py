"""libvirt's hook: whatever happens it prints nothing, ends with 0, and is quick; a guest's start depends on it."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import time
from importlib import resources
from pathlib import Path
from typing import Any, Callable, Dict, Final, List, Optional

import pytest

from libvirt_cbt import spool

UUID: Final = "0123abcd-0123-4567-89ab-0123456789ab"
XML: Final = f"<domain type='kvm' id='7'>\n  <name>web &lt;uuid&gt;</name>\n  <uuid>{UUID}</uuid>\n</domain>\n".encode()
STARTED: Final = ("web", "started", "begin", "-")


@pytest.fixture
def noted(tmp_path: Path) -> Path:
    folder = tmp_path / "new"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def hook(tmp_path: Path, noted: Path) -> Callable[..., None]:
    """Calls the hook, which always says nothing and ends with 0."""
    text = (resources.files("libvirt_cbt.hooks") / "files" / "qemu").read_text()
    path = tmp_path / "hook"
    path.write_text(text.replace('SPOOL = ""', f"SPOOL = {str(noted)!r}"))
    path.chmod(0o755)

    def call(*arguments: str, xml: bytes = XML, **options: Any) -> None:
        given: Dict[str, Any] = {"input": xml, "env": {"PATH": "/usr/bin:/bin", "HOME": "/", "LC_ALL": "C"}, **options}
        done = subprocess.run([str(path), *arguments], capture_output=True, check=False, timeout=60, **given)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

    return call


def files(folder: Path) -> List[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (STARTED, "started"),
        (("web", "release", "end", "-"), "stopped"),
        (("web", "release", "end", "shutdown"), "stopped"),
        (("web", "release", "end", "crashed"), "crashed"),
        (("web", "release", "end", "from snapshot"), "reverted"),
        (("-rf $(touch x) `y`", "started", "begin", "-", "more"), "started"),
        (("web", "prepare", "begin", "-"), None),
        (("web", "start", "begin", "-"), None),
        (("web", "stopped", "end", "-"), None),
        (("web", "reconnect", "begin", "-"), None),
        (("web", "migrate", "begin", "-"), None),
        (("web", "restore", "begin", "-"), None),
        (("web", "something new", "begin", "-"), None),
        (("web", "started"), None),
        (("web",), None),
        ((), None),
    ],
)
def test_what_it_notes(hook: Callable[..., None], noted: Path, arguments: List[str], kind: Optional[str]) -> None:
    hook(*arguments)
    assert files(noted) == ([f"{UUID}.{kind}"] if kind else [])
    for path in noted.iterdir():
        assert path.stat().st_size == 0 and stat.S_IMODE(path.stat().st_mode) == 0o600
        assert spool.EVENT.fullmatch(path.name)


@pytest.mark.parametrize(
    "xml",
    [
        b"",
        b"<domain",
        b"\0" * 100_000,
        b"<uuid>",
        b"<uuid>../../../../../../../../etc/passwdxxxxxx</uuid>",
        f"<uuid>{UUID.upper()}</uuid>".encode(),
        f"<uuid>{UUID[:-1]}\xff</uuid>".encode("latin-1"),
        f"<uuid>{UUID}x</uuid>".encode(),
        XML.replace(b"-", b""),
    ],
)
def test_broken_xml_is_nothing_to_note(hook: Callable[..., None], noted: Path, xml: bytes) -> None:
    hook(*STARTED, xml=xml)
    assert files(noted) == []


def test_of_huge_xml_it_reads_no_more_than_the_beginning(hook: Callable[..., None], noted: Path) -> None:
    hook(*STARTED, xml=XML + b"<!-- much -->" * 2_000_000)
    assert files(noted) == [f"{UUID}.started"]
    hook("web", "migrate", "begin", "-", xml=XML + b"<!-- much -->" * 2_000_000)


def test_the_same_event_again_is_newer(hook: Callable[..., None], noted: Path) -> None:
    hook(*STARTED)
    event = noted / f"{UUID}.started"
    os.utime(event, (1, 1))
    hook(*STARTED)
    assert files(noted) == [event.name]
    assert time.time() - event.stat().st_mtime < 3600


def test_the_spool_is_bounded(hook: Callable[..., None], noted: Path) -> None:
    for number in range(1000):
        (noted / f"{number:08x}-0000-0000-0000-000000000000.started").touch()
    (noted / f"{0:08x}-0000-0000-0000-000000000000.started").rename(noted / f"{UUID}.started")
    os.utime(noted / f"{UUID}.started", (1, 1))
    hook(*STARTED)
    assert (noted / f"{UUID}.started").stat().st_mtime > 1
    assert len(files(noted)) == 1000
    hook("web", "release", "end", "-")
    hook("web", "release", "end", "crashed")
    assert len(files(noted)) == 1001 and "overflow" in files(noted)


def test_standard_streams_may_be_closed(tmp_path: Path, hook: Callable[..., None], noted: Path) -> None:
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        argv = ["/bin/sh", "-c", f'"$0" web started begin - {closed}', str(tmp_path / "hook")]
        assert subprocess.run(argv, check=False, input=XML).returncode == 0
    assert files(noted) in ([], [f"{UUID}.started"])


def test_a_spool_that_cannot_be_written_to(hook: Callable[..., None], noted: Path, tmp_path: Path) -> None:
    noted.rmdir()
    hook(*STARTED)
    noted.write_text("a file")
    hook(*STARTED)
    noted.unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    noted.symlink_to(elsewhere)
    hook(*STARTED)
    assert files(elsewhere) == []
    noted.unlink()
    noted.mkdir()
    os.mkfifo(noted / f"{UUID}.started")
    (noted / f"{UUID}.stopped").symlink_to(elsewhere / "target")
    (noted / f"{UUID}.crashed").mkdir()
    for last in ("started", "release"):
        for reason in ("-", "crashed"):
            hook("web", last, "end", reason)
    assert files(elsewhere) == []


def _mounted(noted: Path, *options: str) -> None:
    if os.geteuid():
        pytest.skip("only root can mount")
    argv = ["mount", "-t", "tmpfs", *options, "tmpfs", str(noted)]
    if subprocess.run(argv, check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")


def test_a_read_only_spool_and_one_without_room(hook: Callable[..., None], noted: Path) -> None:
    _mounted(noted, "-o", "ro")
    try:
        hook(*STARTED)
        assert files(noted) == []
    finally:
        subprocess.run(["umount", str(noted)], check=True)
    _mounted(noted, "-o", "size=4k,nr_inodes=3")
    try:
        (noted / "full").write_bytes(bytes(4096))
        hook(*STARTED)  # its file is empty: a full disk has room for it
        assert files(noted) == [f"{UUID}.started", "full"]
        hook("web", "release", "end", "-")  # but not without an inode
        assert files(noted) == [f"{UUID}.started", "full"]
    finally:
        subprocess.run(["umount", str(noted)], check=True)


def test_without_python_it_still_ends_with_0(tmp_path: Path, noted: Path, hook: Callable[..., None]) -> None:
    path = tmp_path / "hook"
    path.write_text(path.read_text().replace("/usr/bin/python3", "/nowhere/python3"))
    hook(*STARTED)
    path.write_text(path.read_text().replace("/nowhere/python3", "/bin/false"))
    hook(*STARTED)
    assert files(noted) == []


def test_it_is_quick(hook: Callable[..., None], noted: Path) -> None:
    """Under 50 ms: what it costs, as the time that passes depends on whatever else the machine does."""
    spent = []
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        hook(*STARTED)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.05, spent


def test_it_imports_the_standard_library_alone(tmp_path: Path, hook: Callable[..., None]) -> None:
    text = (tmp_path / "hook").read_text()
    assert [line for line in text.splitlines() if line.startswith(("import", "from"))] == ["import os", "import sys"]
