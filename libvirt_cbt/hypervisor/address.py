"""Where a connection's libvirt runs, as its URI says it: on this machine or on another one.

A path in a domain's XML is a file of that host.  https://libvirt.org/uri.html
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Mapping, Optional
from urllib.parse import unquote, urlsplit

from libvirt_cbt import errors, names

SSH: Final = ("ssh", "libssh", "libssh2")
PROTECTED: Final = ("unix", "ssh", "tls")
ASKING: Final = "no_tty"  # 0: libvirt's ssh may ask a person
# What would take a host for the one meant without its having proved it.
UNPROVED: Final = (("no_verify", ("0",)), ("known_hosts_verify", ("normal",)))


@dataclass(frozen=True)
class Address:
    """`transport` is unix, ssh, tls, tcp or ext; `host` is empty on this machine; `local` the URI as it reads there."""

    transport: str
    host: str
    user: Optional[str]
    port: Optional[int]
    local: str
    parameters: Mapping[str, str]

    @property
    def here(self) -> bool:
        """Whether the host is this machine.  `qemu+ssh://localhost/system` is not: it may be another container."""
        return self.transport == "unix"


def parse(uri: str) -> Address:
    """A URI as virsh takes it.  Errors: Usage for a port that is no number."""
    parts = urlsplit(uri)
    driver, _, transport = parts.scheme.partition("+")
    host = parts.hostname or ""
    # Without a transport a host's name means TLS: libvirt's own rule.
    transport = "ssh" if transport in SSH else transport or ("tls" if host else "unix")
    try:
        port = parts.port
    except ValueError:
        raise errors.Usage(reason=f"{names.printable(uri)!r} has a port that is no number") from None
    parameters = _parameters(parts.query)
    socket = parameters.get("socket")
    return Address(
        transport=transport,
        host="" if transport == "unix" else host,
        user=unquote(parts.username) if parts.username else None,
        port=port,
        local=f"{driver}://{parts.path}" + (f"?socket={socket}" if socket else ""),
        parameters=MappingProxyType(parameters),
    )


def _parameters(query: str) -> Mapping[str, str]:
    found = {}
    for word in query.replace(";", "&").split("&"):
        name, _, value = word.partition("=")
        if name:
            found[unquote(name)] = unquote(value)
    return found


def asked(uri: str) -> str:
    """The URI that libvirt gets: with ssh nobody is asked for a password or about a host's key.

    A second connection, that of the guard, has no terminal to ask on.  Errors: Unencrypted for a way that is not known to
    be encrypted; Usage for a URI that would not have the host prove who it is.
    """
    found = parse(uri)
    if found.transport not in PROTECTED:
        raise errors.Unencrypted(uri=names.without_password(uri), transport=names.printable(found.transport))
    for name, harmless in UNPROVED:
        if found.parameters.get(name, harmless[0]) not in harmless:
            raise errors.Usage(
                reason=f"{name}={names.printable(found.parameters[name])} in the URI would trust any host that answers; "
                "leave it out: keys and certificates are always checked"
            )
    if found.transport != "ssh" or ASKING in found.parameters or not urlsplit(uri).scheme.endswith("+ssh"):
        return uri
    bare, mark, fragment = uri.partition("#")
    return f"{bare}{'&' if '?' in bare else '?'}{ASKING}=1{mark}{fragment}"
