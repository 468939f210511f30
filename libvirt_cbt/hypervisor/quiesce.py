"""Freezes a guest's file systems around the one moment that matters, and thaws them in every outcome.

libvirt has no freeze inside the transaction of backup and checkpoint, so the
tool brackets it.  https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainFSFreeze
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable, Final, List, Optional, TypeVar

import libvirt

from libvirt_cbt import errors, names
from libvirt_cbt.hypervisor import connection
from libvirt_cbt.hypervisor.domain import Domain

T = TypeVar("T")

AGENT_SECONDS: Final = 5  # a freeze without this limit blocks until the agent wakes or leaves
BUDGET_SECONDS: Final = 8.0  # Windows VSS lets writes go again after 10
_DEFAULT_TIMEOUT: Final = libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK


@dataclass(frozen=True)
class Quiesced:
    """What became of the freeze: `result` is frozen, failed or none; `reason` says why it is not frozen."""

    requested: str
    result: str
    frozen_ms: Optional[float]
    reason: Optional[str]


class Quiesce:
    """One freeze and its thaw.  `around` runs the transaction between them and tells what became of it."""

    def __init__(self, host: connection.Host, dom: Domain, requested: str) -> None:
        self._host, self._domain, self._requested = host, dom, requested

    def around(self, transaction: Callable[[], T]) -> tuple[T, Quiesced]:
        """Errors: NotConsistent with `agent` when the guest cannot be frozen; those of the transaction."""
        unable = self._unable()
        if self._requested == "agent" and unable:
            raise self._refused(unable)
        if self._requested == "none" or unable:
            return transaction(), Quiesced(self._requested, "none", None, unable)
        dom = self._host.lookup(self._domain.uuid)
        _set_timeout(dom, AGENT_SECONDS)
        reason: Optional[str] = None
        frozen = thawed = 0
        begun = time.monotonic()
        try:
            try:
                frozen = dom.fsFreeze()
            except libvirt.libvirtError as e:
                reason = connection.message(e)
                if self._requested == "agent":
                    raise self._refused(reason) from None
            result = transaction()
        finally:
            # After a failed freeze too: an agent that was merely slow freezes when it wakes.
            thawed, complaint = self._thaw(dom)
            _set_timeout(dom, _DEFAULT_TIMEOUT)
        seconds = time.monotonic() - begun
        reason = reason or complaint or _judge(frozen, thawed, seconds)
        if reason and self._requested == "agent":
            raise self._refused(reason)
        state = "failed" if reason else "frozen"
        return result, Quiesced(self._requested, state, round(seconds * 1000, 1), reason)

    def _unable(self) -> Optional[str]:
        if self._requested == "none":
            return None
        if self._domain.state != libvirt.VIR_DOMAIN_RUNNING:
            return f"the guest is {self._domain.state_name}"
        if self._domain.agent == "absent":
            return "it has no guest agent channel (org.qemu.guest_agent.0)"
        if self._domain.agent != "connected":
            return "no guest agent answers; install and start qemu-guest-agent in the guest"
        return None

    def _refused(self, reason: str) -> errors.NotConsistent:
        return errors.NotConsistent(domain=names.printable(self._domain.name), reason=reason)

    @staticmethod
    def _thaw(dom: object) -> tuple[int, Optional[str]]:
        try:
            return dom.fsThaw(), None  # type: ignore[attr-defined]
        except libvirt.libvirtError as e:
            return 0, f"the thaw failed: {connection.message(e)}"


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
    """Thaws a guest that a run which died may have left frozen; what was done, for people."""
    dom = host.lookup(uuid)
    _set_timeout(dom, AGENT_SECONDS)
    try:
        count = dom.fsThaw()
    except libvirt.libvirtError:
        return []  # off, or without an agent: nothing is frozen by us
    finally:
        _set_timeout(dom, _DEFAULT_TIMEOUT)
    return [f"thawed {count} file systems"] if count else []
