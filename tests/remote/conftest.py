"""A far host for the tests of this room, and the command beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest


@pytest.fixture(scope="session")
def far_host(private_libvirtd: Any) -> Iterator[Any]:
    """The private libvirtd behind an sshd (tests.guests.far.Far), one for all tests of a run."""
    from tests.guests import daemon, far

    try:
        with far.Far(private_libvirtd) as started:
            yield started
    except daemon.Unavailable as e:
        pytest.skip(f"no far host: {e}")


@pytest.fixture
def far(far_host: Any, libvirtd: Any) -> Iterator[Any]:
    """The same, as at its beginning."""
    yield far_host
    far_host.clear()
    far_host.restart()


@pytest.fixture
def tool(far: Any, tmp_path: Path) -> Any:
    """`libvirt-cbt` on the near side, with a new repository."""
    from tests.remote.tool import FarTool

    return FarTool(far, str(tmp_path / "repository"))


@pytest.fixture(scope="module")
def tls_far_host() -> Iterator[Any]:
    """A private libvirtd that listens with TLS (tests.guests.tls.TlsFar), one for all tests of a module."""
    from tests.guests import daemon, tls

    try:
        with tls.TlsDaemon() as host, tls.TlsFar(host) as started:
            yield started
    except daemon.Unavailable as e:
        pytest.skip(f"no far host: {e}")


@pytest.fixture
def tls_far(tls_far_host: Any) -> Iterator[Any]:
    """The same, as at its beginning."""
    if tls_far_host.host.pid is None:
        tls_far_host.host.start()
    yield tls_far_host
    tls_far_host.clear()
    tls_far_host.sweep()


@pytest.fixture
def tls_tool(tls_far: Any, tmp_path: Path) -> Any:
    """`libvirt-cbt` on the near side, with a new repository."""
    from tests.remote.tool import FarTool

    return FarTool(tls_far, str(tmp_path / "repository"))


@pytest.fixture
def tls_guest(tls_far: Any) -> Iterator[Callable[..., Any]]:
    """Makes a running guest without an OS: ``guest = tls_guest(Disk("vda"))``."""
    from tests.guests import plain

    made: List[Any] = []

    def make(*disks: plain.Disk, name: str = "plain") -> plain.PlainGuest:
        guest = plain.PlainGuest(tls_far.host, name, disks)
        made.append(guest)
        guest.define()
        guest.start()
        return guest

    yield make
    for guest in reversed(made):
        guest.remove()
