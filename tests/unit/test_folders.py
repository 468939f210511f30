"""Folders that others could exchange under us, and modes that no umask decides."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator

import pytest

from libvirt_cbt import errors, folders, spool
from libvirt_cbt.hooks import placed
from libvirt_cbt.repository import store
from tests.unit.test_repository import as_nobody

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make things of others")
NOBODY = 65534


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """As /tmp: everybody may write, and the sticky bit keeps them from each other's files."""
    made = tmp_path / "shared"
    made.mkdir()
    made.chmod(0o1777)
    return made


@pytest.fixture(params=[0o000, 0o022, 0o077, 0o777], ids=oct)
def _umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_what_is_usual_is_not_exposed(shared: Path) -> None:
    (shared / "ours").mkdir()
    os.symlink(shared / "ours", shared / "link")
    os.symlink("ours/../link", shared / "second")
    for path in (shared, shared / "ours", shared / "link" / "x", shared / "second" / "not" / "there", Path("/"), Path("/proc")):
        assert folders.exposed(str(path)) is None, path


@pytest.mark.fault(54)
def test_a_folder_above_that_everybody_may_write_to(tmp_path: Path) -> None:
    (tmp_path / "open" / "a" / "b").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    os.symlink(tmp_path / "open" / "a", tmp_path / "link")
    os.symlink("link/b/..", tmp_path / "second")
    for path in ("open", "open/a", "open/a/b/c", "link", "link/b", "second/b", "second"):
        reason = folders.exposed(str(tmp_path / path))
        assert reason and f"chmod o-w {tmp_path}/open" in reason, path
    with pytest.raises(PermissionError, match="everybody"):
        folders.root(str(tmp_path / "open" / "new"))
    assert not (tmp_path / "open" / "new").exists()


def test_a_circle_of_links(tmp_path: Path) -> None:
    os.symlink("b", tmp_path / "a")
    os.symlink("a", tmp_path / "b")
    with pytest.raises(OSError, match="Too many levels"):
        folders.exposed(str(tmp_path / "a" / "x"))


@ROOT_ONLY
@pytest.mark.fault(54)
def test_a_link_of_somebody_else(shared: Path) -> None:
    """Where all may make links, one of another user's can lead elsewhere tomorrow."""
    (shared / "ours").mkdir()
    os.symlink(shared / "ours", shared / "link")
    os.lchown(shared / "link", NOBODY, NOBODY)
    assert "user 65534" in str(folders.exposed(str(shared / "link" / "x")))
    shared.chmod(0o755)
    assert folders.exposed(str(shared / "link" / "x")) is None


@ROOT_ONLY
@pytest.mark.fault(54)
def test_a_folder_that_somebody_else_was_quicker_to_make(shared: Path) -> None:
    """`/tmp/libvirt-cbt-1000` has a name that all can guess."""
    place = shared / "libvirt-cbt-0"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    with pytest.raises(PermissionError, match="belongs to user 65534"):
        folders.root(str(place))
    os.chown(place, 0, 0)
    folders.root(str(place))
    for at in (shared, *shared.parents):
        if at.stat().st_uid == 0 and at != Path("/"):
            at.chmod(at.stat().st_mode | 0o055)
    os.chown(place, 1, 1)
    assert as_nobody(lambda: folders.root(str(place))) == "PermissionError"


@pytest.mark.usefixtures("_umask")
def test_modes_whatever_the_umask(tmp_path: Path) -> None:
    folders.root(str(tmp_path / "a" / "b" / "c"))
    folders.root(str(tmp_path / "a" / "b" / "c"))
    store.Repository.init(str(tmp_path / "d" / "e" / "repo"))
    modes = {p: stat.S_IMODE((tmp_path / p).stat().st_mode) for p in ("a", "a/b", "a/b/c", "d", "d/e", "d/e/repo")}
    assert modes == {"a": 0o755, "a/b": 0o755, "a/b/c": 0o711, "d": 0o755, "d/e": 0o755, "d/e/repo": 0o700}


@pytest.mark.usefixtures("_umask")
def test_folders_of_hooks_whatever_the_umask(tmp_path: Path) -> None:
    """What root runs, and what root reads, lies in no folder that others may write to: not above it either."""
    placed.write(str(tmp_path / "a" / "b" / "hook"), "# x", 0o755)
    spool.make(str(tmp_path / "c" / "d" / "spool" / "0123456789abcdef"), spool.NEW)
    modes = {p: stat.S_IMODE((tmp_path / p).stat().st_mode) for p in ("a", "a/b", "a/b/hook", "c", "c/d", "c/d/spool")}
    assert modes == {"a": 0o755, "a/b": 0o755, "a/b/hook": 0o755, "c": 0o755, "c/d": 0o755, "c/d/spool": 0o711}
    below = tmp_path / "c" / "d" / "spool" / "0123456789abcdef"
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in below.iterdir()} == dict.fromkeys(("new", "taken", "aside"), 0o700)


def test_the_command_leaves_itself_what_it_makes(tmp_path: Path) -> None:
    """With an umask of 0777 a user who is not root could not read back his own repository, nor reach his own servers."""
    code = f"import os; os.umask(0o777); from libvirt_cbt import cli; cli.main(['-r', {str(tmp_path / 'r')!r}, 'init'])"
    code = code.replace("cli.main(", "import atexit; atexit.register(lambda: print(oct(os.umask(0)))); cli.main(")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0o77"


def test_never_more_than_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folders.make(str(tmp_path / "a" / "b"), 0o755, exact=False)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / p).stat().st_mode) for p in ("a", "a/b")} == {0o750}


@pytest.mark.fault(54)
@pytest.mark.parametrize("make", [store.Repository.init, store.Repository.open])
def test_no_repository_where_all_may_rename_it(tmp_path: Path, make: Callable[[str], object]) -> None:
    path = tmp_path / "open" / "repo"
    if make is store.Repository.open:
        store.Repository.init(str(path))
    else:
        path.parent.mkdir()
    path.parent.chmod(0o777)
    with pytest.raises(errors.RepositoryDenied, match="chmod o-w"):
        make(str(path))
    path.parent.chmod(0o1777)
    make(str(path))
