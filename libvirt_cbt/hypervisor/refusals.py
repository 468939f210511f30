"""What ssh, TLS and libvirt say of a host that cannot be reached, as an error that names the way out."""

from __future__ import annotations

from typing import Final, Tuple, Type

from libvirt_cbt import errors, names

COMPARE: Final = "ask its administrator for the key's fingerprint, compare it, then run "
CHANGED: Final = (
    errors.HostUnproved,
    "its ssh key is not the one that known_hosts has",
    COMPARE + "`ssh-keygen -R {host}` and `ssh {host}` once",
)
UNKNOWN: Final = (errors.HostUnproved, "its ssh key is not in known_hosts", COMPARE + "`ssh {host}` once")
DENIED: Final = (
    errors.HostRefused,
    "ssh has no key that it accepts",
    "`ssh -o BatchMode=yes {host} true` must work for this user; docs/remote.md says what the far user needs",
)
Answer = Tuple[Type[errors.NoHypervisor], str, str]  # the error, its reason, and the way out for a host's name
# What OpenSSH, libssh and libssh2 (by way of libvirt) say, the first that is in a complaint holds.
KNOWN: Final[Tuple[Tuple[str, Answer], ...]] = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", CHANGED),
    ("SSH HOST KEY VERIFICATION FAILED", CHANGED),
    ("Host key verification failed", UNKNOWN),
    ("verify the session host key", UNKNOWN),
    ("Permission denied (", DENIED),
    ("authentication failed: ", DENIED),
)


def explained(host: str, complaint: str) -> errors.NoHypervisor:
    """The error for what was said by the client that could not reach a host."""
    for words, (kind, reason, way_out) in KNOWN:
        if words in complaint:
            return kind(host=host, reason=reason, way_out=way_out.format(host=errors.argument(host)))
    lines = complaint.strip().splitlines() or ["it was closed"]
    return errors.HostLost(host=host, reason=names.printable(lines[-1].strip(), 300))
