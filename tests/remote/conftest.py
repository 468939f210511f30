"""A far host for the tests of this room, and the command beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator

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
