"""Exports by TCP with TLS: whether both ends have to prove who they are, and what it means when one cannot."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Callable, Final, Tuple, Type

from libvirt_cbt import errors, names, tls
from libvirt_cbt.nbdio import client
from libvirt_cbt.nbdio.server import Endpoint

DOCS: Final = "docs/remote.md says how certificates are made"
FIREWALL: Final = "its firewall must let this machine through to the ports of --nbd-ports (docs/remote.md)"
Answer = Tuple[Type[errors.NoHypervisor], str, str]  # the error, its reason, and the way out
# What libnbd and GnuTLS say; the first that is in a complaint holds.
KNOWN: Final[Tuple[Tuple[str, Answer], ...]] = (
    (
        "certificate verification",
        (errors.HostUnproved, "the certificate of its NBD server has expired, is of another CA, or is not for this name", DOCS),
    ),
    ("refused TLS", (errors.HostUnproved, "what answers there has no TLS", FIREWALL)),
    ("gnutls", (errors.HostRefused, "its NBD server does not accept our certificate", DOCS)),
)
AWAY: Final = (errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)


def explained(server: tls.Server, reason: str, error: int) -> errors.NoHypervisor:
    """The error for a connection that could not be made."""
    for words, (kind, sentence, way_out) in KNOWN:
        if words in reason:
            return kind(host=server.host, reason=f"{sentence} (port {server.port})", way_out=way_out)
    if error in AWAY:
        reason = f"its NBD server at port {server.port} is not reached ({names.printable(reason, 200)})"
        return errors.HostRefused(host=server.host, reason=reason, way_out=FIREWALL)
    return errors.HostLost(host=server.host, reason=names.printable(reason, 300))


def require(endpoint: Endpoint, stop: Callable[[], None]) -> None:
    """Tries it as somebody who has no certificate.  Errors: ProofNotAsked when the server lets him in; what `stop` raises.

    QEMU's `verify-peer` is the host's setting, and nothing but trying shows it.
    """
    assert endpoint.server
    try:
        client.Connection(replace(endpoint, server=endpoint.server.anonymous()), [], stop).drop()
    except client.Unmade:
        return  # as it should be; what else may be wrong the next connection finds out
    raise errors.ProofNotAsked(host=endpoint.server.host)
