"""Freezes a guest's file systems around the one moment that matters, and thaws them in every outcome.

libvirt has no freeze inside the transaction of backup and checkpoint, so the
tool brackets it, and a guard thaws when the tool cannot.
https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainFSFreeze
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Final, List, Optional, TypeVar

import libvirt

from libvirt_cbt import errors, names
from libvirt_cbt.hypervisor import connection, domain

if TYPE_CHECKING:
    from libvirt_cbt.hypervisor.guard import Guard

T = TypeVar("T")

AGENT_SECONDS: Final = 5  # a freeze without this limit blocks until the agent wakes or leaves
THAW_SECONDS: Final = 2  # with the freeze it stays below the budget
BUDGET_SECONDS: Final = 8.0  # Windows VSS lets writes go again after 10
BEGIN_SECONDS: Final = 2.0  # of them are kept for the transaction itself, which takes a tenth
NURSE_SECONDS: Final = 600.0  # an agent that does not answer is given up then; the next run thaws, too
NURSE_PAUSE: Final = 0.25
# The binding raises SystemError when an agent's complaint is no UTF-8.
AGENT_ERRORS: Final = (libvirt.libvirtError, SystemError)
_DEFAULT_TIMEOUT: Final = libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK


@dataclass(frozen=True)
class Quiesced:
    """What became of the freeze: `result` is frozen, failed or none; `reason` says why it is not frozen.

    `thawed` False: the agent did not answer the thaw, and a freeze in its queue may yet come true.
    """

    requested: str
    result: str
    frozen_ms: Optional[float]
    reason: Optional[str]
    thawed: bool = True


class Quiesce:
    """One freeze and its thaw.  `around` runs the transaction between them and tells what became of it."""

    def __init__(self, host: connection.Host, dom: domain.Domain, requested: str, guard: Guard) -> None:
        self._host, self._domain, self._requested, self._guard = host, dom, requested, guard

    def around(
        self, transaction: Callable[[], T], frozen: Callable[[float], None] = lambda _: None
    ) -> tuple[T, Quiesced]:
        """`frozen` is called when the guest is, with the seconds for which it may at most keep the transaction waiting.

        Errors: NotConsistent with `agent` when the guest cannot be frozen; those of the transaction and of `frozen`.
        """
        unable = unfreezable(self._domain) if self._requested != "none" else None
        if self._requested != "none" and not unable:
            unable = self._guard.freezing(BUDGET_SECONDS)
        if self._requested == "agent" and unable:
            raise self._refused(unable)
        if self._requested == "none" or unable:
            return transaction(), Quiesced(self._requested, "none", None, unable)
        result, freeze, thaw, seconds = self._bracketed(transaction, frozen)
        found = [freeze.complaint, thaw.complaint]
        if thaw.complaint:
            found.append(f"a guard process goes on thawing for {NURSE_SECONDS / 60:.0f} minutes")
        elif not freeze.complaint:
            found.append(_judge(freeze.count, thaw.count, seconds))
        if self._guard.thawed(sure=thaw.complaint is None):
            found.append(f"the thaw watchdog let the guest go on after {BUDGET_SECONDS:.0f} s")
        reason = "; ".join(x for x in found if x) or None
        if reason and self._requested == "agent":
            raise self._refused(reason)
        state = "failed" if reason else "frozen"
        return result, Quiesced(self._requested, state, round(seconds * 1000, 1), reason, thaw.complaint is None)

    def _bracketed(
        self, transaction: Callable[[], T], frozen: Callable[[float], None]
    ) -> tuple[T, _Answer, _Answer, float]:
        dom = self._host.lookup(self._domain.uuid)
        _set_timeout(dom, AGENT_SECONDS)
        thaw = _Answer(0, "the thaw was not tried")
        begun = time.monotonic()
        try:
            freeze = _asked(dom.fsFreeze, "the freeze failed")
            if freeze.complaint and self._requested == "agent":
                raise self._refused(freeze.complaint)
            if freeze.count:
                frozen(max(0.0, BUDGET_SECONDS - BEGIN_SECONDS - (time.monotonic() - begun)))
            result = transaction()
        except BaseException:
            self._guard.thawed(sure=self._thaw(dom).complaint is None)
            raise
        thaw = self._thaw(dom)
        return result, freeze, thaw, time.monotonic() - begun

    @staticmethod
    def _thaw(dom: object) -> _Answer:
        # After a failed freeze too: an agent that was merely slow freezes when it wakes.
        _set_timeout(dom, THAW_SECONDS)
        answer = _asked(dom.fsThaw, "the thaw failed")  # type: ignore[attr-defined]
        _set_timeout(dom, _DEFAULT_TIMEOUT)
        return answer

    def _refused(self, reason: str) -> errors.NotConsistent:
        return errors.NotConsistent(domain=names.printable(self._domain.name), reason=reason)


@dataclass(frozen=True)
class _Answer:
    """What the agent said: how many file systems, or why not."""

    count: int
    complaint: Optional[str]


def _asked(call: Callable[[], int], failed: str) -> _Answer:
    try:
        return _Answer(call(), None)
    except libvirt.libvirtError as e:
        return _Answer(0, f"{failed}: {connection.message(e)}")
    except SystemError:
        return _Answer(0, f"{failed}: the agent answers with bytes that are no text")


def unfreezable(dom: domain.Domain) -> Optional[str]:
    """Why a guest's file systems cannot be frozen at all; None when it may be tried."""
    if dom.state != libvirt.VIR_DOMAIN_RUNNING:
        return f"the guest is {dom.state_name}"
    if dom.agent == "absent":
        return "it has no guest agent channel (org.qemu.guest_agent.0)"
    if dom.agent != "connected":
        return "no guest agent answers; install and start qemu-guest-agent in the guest"
    return None


def _set_timeout(dom: object, seconds: int) -> None:
    try:
        dom.agentSetResponseTimeout(seconds, 0)  # type: ignore[attr-defined]
    except libvirt.libvirtError:
        pass  # an older libvirt, or the guest has gone: the freeze itself will tell


def _judge(frozen: int, thawed: int, seconds: float) -> Optional[str]:
    if not frozen:
        return "the agent froze no file system"
    if frozen != thawed:
        return f"the agent froze {frozen} file systems and thawed {thawed}"
    if seconds > BUDGET_SECONDS:
        return (
            f"the guest was frozen for {seconds:.1f} s, longer than the {BUDGET_SECONDS:.0f} s that guests keep still"
        )
    return None


def thaw(host: connection.Host, uuid: names.DomainUuid) -> List[str]:
    """Thaws a guest that a run which died may have left frozen; what was done, for people.

    Errors: HypervisorError when the agent of a running guest does not answer, so that it may be frozen still.
    """
    dom = host.lookup(uuid)
    _set_timeout(dom, AGENT_SECONDS)
    try:
        count = dom.fsThaw()
    except AGENT_ERRORS as e:
        if not domain.alive(host, uuid):
            return []  # it is off: nothing is frozen any more
        reason = connection.message(e) if isinstance(e, libvirt.libvirtError) else "its agent answers no text"
        raise errors.HypervisorError(
            reason=f"the guest may be frozen and its agent does not thaw it ({reason}); restart the agent or the guest"
        ) from None
    finally:
        _set_timeout(dom, _DEFAULT_TIMEOUT)
    return [f"thawed {count} file systems"] if count else []


def nurse(host: connection.Host, uuid: names.DomainUuid, seconds: float, settle: float) -> None:
    """Thaws until it had an effect; without one for `settle` seconds, as a late freeze may still be on its way.

    An agent that does not answer is asked again for `seconds`: what waits in its queue, a freeze too, comes true when
    it wakes, and it answers in order.
    """
    begun = time.monotonic()
    while True:
        try:
            dom = host.lookup(uuid)
            _set_timeout(dom, AGENT_SECONDS)
            if dom.fsThaw() or time.monotonic() - begun >= settle:
                break
        except (*AGENT_ERRORS, errors.CbtError):
            if not domain.alive(host, uuid):
                return
        if time.monotonic() - begun >= seconds:
            break
        time.sleep(NURSE_PAUSE)
    _set_timeout(dom, _DEFAULT_TIMEOUT)
