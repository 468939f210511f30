"""Fixtures of all tests: the seed, the private libvirtd, the guests; and what a skip means in CI."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any, Callable, Generator, Iterator, List, Tuple

import pytest

# No test depends on what this machine's configuration says.
os.environ["LIBVIRT_CBT_CONFIG"] = os.devnull

# What is ignored here is ignored by the commands, too, and those that a test signals would go on: nohup ignores SIGHUP, a
# shell SIGINT for what it runs in the background.  A handler is not passed on.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

# Rooms of tests that need real programs: there a skip in CI hides that nothing was tested.
REAL = ("libvirt", "nbd", "faults", "soak", "remote")


def _must_not_skip(nodeid: str) -> bool:
    return os.environ.get("CI", "") not in ("", "0", "false") and nodeid.startswith(tuple(f"tests/{r}" for r in REAL))


def _as_failure(report: Any) -> None:
    if report.skipped and not hasattr(report, "wasxfail") and _must_not_skip(report.nodeid):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, which in CI is a failure: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    report = yield
    _as_failure(report)
    host = getattr(item, "funcargs", {}).get("private_libvirtd")
    if report.failed and host is not None:
        report.sections.append(("libvirtd", host.log_tail()))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: Any) -> Generator[None, Any, Any]:
    report = yield
    _as_failure(report)
    return report


@pytest.fixture
def seed() -> int:
    """The seed of this test, printed (pytest shows it of a failed test); CBT_TEST_SEED repeats a run."""
    chosen = int(os.environ.get("CBT_TEST_SEED") or random.SystemRandom().getrandbits(32))
    print(f"CBT_TEST_SEED={chosen}")
    return chosen


@pytest.fixture
def rng(seed: int) -> random.Random:
    """Random choices that the printed seed repeats."""
    return random.Random(seed)


@pytest.fixture(scope="session")
def private_libvirtd() -> Iterator[Any]:
    """The private libvirtd (tests.guests.daemon.Daemon), one for all tests of a run."""
    try:
        from tests.guests import daemon as daemons
    except ImportError as e:
        pytest.skip(f"{e}; script/bootstrap installs it")
    try:
        started = daemons.Daemon().__enter__()
    except daemons.Unavailable as e:
        pytest.skip(f"no private libvirtd: {e}")
    yield started
    started.close()


@pytest.fixture
def libvirtd(private_libvirtd: Any) -> Any:
    """The same, started again if the test before left it dead."""
    if private_libvirtd.pid is None:
        private_libvirtd.start()
    return private_libvirtd


@pytest.fixture
def tool(libvirtd: Any, tmp_path: Path) -> Any:
    """The command (tests.libvirt.tool.Tool), with a repository of the test's own."""
    from tests.libvirt.tool import Tool

    return Tool(libvirtd, str(tmp_path / "repository"))


@pytest.fixture
def guests(libvirtd: Any) -> Iterator[Callable[[Any], Any]]:
    """Defines and starts guests, and removes them at the end: ``guest = guests(PlainGuest(libvirtd, disks=[...]))``."""
    taken: List[Any] = []

    def take(guest: Any, *, start: bool = True) -> Any:
        taken.append(guest)
        guest.define()
        if start:
            guest.start()
        return guest

    yield take
    for guest in reversed(taken):
        guest.remove()


@pytest.fixture
def plain_guest(libvirtd: Any, guests: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a running guest without an OS: ``guest = plain_guest(Disk("vda", size=...), name="g")``."""
    from tests.guests import plain

    def make(*disks: plain.Disk, name: str = "plain", start: bool = True) -> plain.PlainGuest:
        made: plain.PlainGuest = guests(plain.PlainGuest(libvirtd, name, disks), start=start)
        return made

    return make


@pytest.fixture
def system_guest(libvirtd: Any, guests: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a booted guest with an OS; arguments as of tests.guests.system.SystemGuest."""
    from tests.guests import daemon as daemons
    from tests.guests import system

    def make(name: str = "system", *, start: bool = True, **arguments: Any) -> system.SystemGuest:
        try:
            guest = system.SystemGuest(libvirtd, name, **arguments)
        except daemons.Unavailable as e:
            pytest.skip(str(e))
        made: system.SystemGuest = guests(guest, start=start)
        return made

    return make


@pytest.fixture(scope="module")
def relay_guests() -> Iterator[List[Any]]:
    """The guest of `relay_guest` between the tests of a module: none, or one."""
    kept: List[Any] = []
    yield kept
    for guest in kept:
        guest.remove()


@pytest.fixture
def relay_guest(libvirtd: Any, relay_guests: List[Any]) -> Iterator[Tuple[Any, Any]]:
    """A booted guest with an OS and the FakeAgent (tests.guests.fake_agent) that libvirt takes for its agent.

    The guest of the test before is taken again if it runs on and has neither a job nor a checkpoint.
    """
    from tests.guests import daemon as daemons
    from tests.guests import fake_agent, system

    if relay_guests and not relay_guests[0].untouched():
        relay_guests.pop().remove()
    if not relay_guests:
        try:
            relay_guests.append(system.SystemGuest(libvirtd, "relayed", agent="relay"))
        except daemons.Unavailable as e:
            pytest.skip(str(e))
        relay_guests[0].define()
        relay_guests[0].start()
    guest = relay_guests[0]
    guest.wait_for_agent_state("disconnected")
    with fake_agent.FakeAgent(guest.relay_path) as agent:
        guest.wait_for_agent_state("connected")
        yield guest, agent
