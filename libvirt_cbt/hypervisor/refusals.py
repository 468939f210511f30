"""What ssh, TLS and libvirt say of a host that cannot be reached, as an error that names the way out."""

from __future__ import annotations

from typing import Final, Sequence, Tuple, Type

from libvirt_cbt import errors, names, tls
from libvirt_cbt.hypervisor import address

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

UNVERIFIED: Final = "Failed to verify peer's certificate"
OURS: Final = "`virt-pki-validate` looks at the certificates of this machine, docs/remote.md says how they are made"
THEIRS: Final = "its administrator must have a new one made (docs/remote.md)"
# What libvirt's client says where there is TLS; the reason is its own sentence where there is none here.
BY_TLS: Final[Tuple[Tuple[str, Answer], ...]] = (
    ("Our own certificate", (errors.HostRefused, "", OURS)),
    ("client certificate", (errors.HostRefused, "", OURS)),
    ("TLS confirmation", (errors.HostRefused, "it does not accept our certificate, or we have none", OURS)),
    ("Cannot read CA certificate", (errors.HostUnproved, "", OURS)),
    ("ertificate", (errors.HostUnproved, "", THEIRS)),
)


def explained(host: str, complaint: str, known: Sequence[Tuple[str, Answer]] = KNOWN) -> errors.NoHypervisor:
    """The error for what was said by the client that could not reach a host."""
    lines = complaint.strip().splitlines() or ["it was closed"]
    said = names.printable(lines[-1].strip(), 300)
    for words, (kind, reason, way_out) in known:
        if words in complaint:
            return kind(host=host, reason=reason or said, way_out=way_out.format(host=errors.argument(host)))
    return errors.HostLost(host=host, reason=said)


def of(where: address.Address, complaint: str) -> errors.NoHypervisor:
    """The same for what libvirt's client said."""
    if where.transport != "tls":
        return explained(where.host, complaint)
    if UNVERIFIED in complaint:
        why = tls.complaint(where.host, where.port or tls.LIBVIRT_PORT, where.parameters.get("pkipath"))
        complaint = f"its certificate is not good: {why}" if why else complaint
    return explained(where.host, complaint, BY_TLS)
