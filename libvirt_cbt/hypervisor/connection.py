"""One connection to libvirt that comes back after the daemon was restarted."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import Any, Callable, Final, Iterator, List, Optional, Tuple, TypeVar

from libvirt_cbt import errors, names, openstack, tls
from libvirt_cbt.hypervisor import address, refusals, site

try:
    import libvirt
except ImportError:  # a virtual environment without the system's packages
    raise errors.ToolMissing(
        tool="libvirt's Python binding",
        package="python3-libvirt (Debian) or python3-libvirt (Fedora), "
        "and make the virtual environment with --system-site-packages",
    ) from None

T = TypeVar("T")

KEEPALIVE: Final = (5, 5)  # a silent daemon is given up after 25 s
LOST: Final = frozenset({libvirt.VIR_ERR_RPC, libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_INVALID_CONN})
RECONNECT_SECONDS: Final = 30.0

_events = threading.Lock()
_events_running = False


def _run_events() -> None:
    """Starts libvirt's event loop once in this process: keepalive and the embedded driver need it."""
    global _events_running  # noqa: PLW0603 -- libvirt's registration is per process, too
    with _events:
        if _events_running:
            return
        libvirt.registerErrorHandler(lambda *_: None, None)  # errors are raised; not printed on top
        libvirt.virEventRegisterDefaultImpl()

        def loop() -> None:
            while True:
                try:
                    libvirt.virEventRunDefaultImpl()
                except libvirt.libvirtError:
                    time.sleep(0.1)

        threading.Thread(target=loop, name="libvirt-events", daemon=True).start()
        _events_running = True


class Host:
    """A libvirt connection; `lookup` and `retry` open it again when the daemon had gone.

    `listening` is for a host by TLS; with `sentry` somebody will look out there.  Errors: NoHypervisor when it cannot be
    reached.
    """

    def __init__(self, uri: Optional[str], listening: Optional[tls.Listening] = None, *, sentry: bool = False) -> None:
        _run_events()
        self._asked = address.asked(uri) if uri else None
        self._added = self._asked[len(uri) :] if uri and self._asked else ""
        self._listening = listening or tls.Listening()
        self._site = site.of(address.parse(uri), self, self._listening) if uri else None
        self._mending = threading.Lock()
        self._patience = RECONNECT_SECONDS
        self._known: Tuple[Any, str, Any] = (None, "", None)
        try:
            if self._site:
                self._site.begin(sentry=sentry)  # a login takes as long as libvirt's own, so both at once
            self._conn: Any = self._connect()
            self._settle(uri)
        except BaseException:
            if self._site:
                self._site.close()
            raise

    def _settle(self, asked: Optional[str]) -> None:
        """What the connection is to."""
        uri = str(self._conn.getURI())
        address.asked(uri)  # what an alias or libvirt's own default stands for is judged, too
        # For a guard of ours, through a pipe; everything else has `uri`.
        self.address: str = uri[: -len(self._added)] if self._added and uri.endswith(self._added) else uri
        self.uri = names.without_password(self.address)
        if self._site and address.parse(self.address) != address.parse(asked or ""):
            self._site.close()
            self._site = None  # an alias stood for another

    def _connect(self) -> Any:
        try:
            conn = libvirt.open(self._asked)
        except libvirt.libvirtError as e:
            raise self._unreachable(e) from None
        if not _embedded(self._asked or ""):  # without a daemon there is nothing to keep alive
            try:
                conn.setKeepAlive(*KEEPALIVE)
            except libvirt.libvirtError:
                pass  # a daemon that is too old for it
        return conn

    def _unreachable(self, error: libvirt.libvirtError) -> errors.NoHypervisor:
        asked = self._asked or "the default URI"
        where = address.parse(asked)
        if not where.here:
            return refusals.of(where, str(error.get_error_message() or error))
        return errors.NoHypervisor(uri=names.without_password(asked), reason=message(error))

    def another(self) -> Host:
        """A connection beside this one, for a thread whose calls must not wait for those of others.

        libvirt has the thread that waits for an answer send what the others ask, too.  Before 10.0 it does not always
        wake that thread for it: then the next keepalive does, 5 s later in one of 15 calls that were measured
        (src/rpc/virnetclient.c, virNetClientIO).  Errors: NoHypervisor.
        """
        return Host(self.address, self._listening)

    def close(self) -> None:
        self._disconnect()
        if self._site:
            self._site.close()

    def _disconnect(self) -> None:
        try:
            self._conn.close()
        except libvirt.libvirtError:
            pass

    @property
    def site(self) -> site.Site:
        """The machine whose files the domains of this connection have."""
        if self._site is None:
            self._site = site.of(address.parse(self.address), self, self._listening)
        return self._site

    @property
    def embedded(self) -> bool:
        """Whether QEMU's driver runs inside this process; nobody else can connect to it then."""
        return _embedded(self.uri)

    @property
    def hostname(self) -> str:
        return str(self.retry(lambda conn: conn.getHostname()))

    def versions(self) -> tuple[int, int]:
        """(libvirt of the daemon, QEMU) as major*1000000 + minor*1000 + release."""
        return self.retry(lambda conn: (int(conn.getLibVersion()), int(conn.getVersion())))

    def connected(self) -> Any:
        """A connection that answers, for what must not be done twice.  Errors: NoHypervisor."""
        self.retry(lambda conn: conn.getLibVersion())
        return self._conn

    def retry(self, call: Callable[[Any], T]) -> T:
        """Runs a call that may be repeated, on a new connection if the old one has broken.

        Errors: NoHypervisor when the daemon does not come back within RECONNECT_SECONDS (they are waited once: after
        that each call tries once, until the daemon is back); libvirtError of the call.
        """
        deadline = time.monotonic() + self._patience
        pause, tried = 0.1, False
        while True:
            broken = self._conn
            try:
                return call(broken)
            except libvirt.libvirtError as e:
                if not self.lost(e) or (tried and time.monotonic() > deadline):
                    raise
            self._reconnect(broken, deadline, pause)
            pause, tried = min(pause * 2, 2), True

    def _reconnect(self, broken: Any, deadline: float, pause: float) -> None:
        with self._mending:
            if self._conn is not broken:
                return  # another thread has done it
            self._disconnect()
            while True:
                time.sleep(pause)
                try:
                    self._conn = self._connect()
                except errors.NoHypervisor:
                    if time.monotonic() > deadline:
                        self._patience = 0.0
                        raise
                else:
                    self._patience = RECONNECT_SECONDS
                    return

    def lookup(self, uuid: names.DomainUuid) -> Any:
        """libvirt's domain object, for this room only."""
        try:
            return self.retry(lambda conn: conn.lookupByUUIDString(uuid))
        except libvirt.libvirtError as e:
            raise self.translate(e, uuid) from None

    def known(self, conn: Any, uuid: names.DomainUuid) -> Any:
        """As lookup on this connection, but libvirt is asked once only: for what must not take long.

        An object of libvirt's is a name; when the domain has gone its calls say so.
        """
        on, of, dom = self._known
        if on is not conn or of != uuid:
            dom = conn.lookupByUUIDString(uuid)
            self._known = (conn, uuid, dom)
        return dom

    def find(self, domain: str) -> names.DomainUuid:
        """The UUID of a domain given by name, UUID or id, tried in the order of virsh, or else OpenStack's instance name.

        Errors: NoSuchDomain; Usage when several instances have that name.
        """

        def tries(conn: Any) -> Any:
            lookups: List[Callable[[], Any]] = [lambda: conn.lookupByName(domain)]
            if domain.isdecimal() and len(domain) < 10:
                lookups.insert(0, lambda: conn.lookupByID(int(domain)))
            if names.is_uuid(domain):
                lookups.insert(0, lambda: conn.lookupByUUIDString(domain))
            for lookup in lookups:
                try:
                    return lookup()
                except libvirt.libvirtError as e:
                    if e.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                        raise
            return self._instance(conn, domain)

        if not domain or "\0" in domain:
            raise errors.NoSuchDomain(domain=names.printable(domain), uri=self.uri)
        with self.translated(domain):
            return names.domain_uuid(self.retry(tries).UUIDString())

    def _instance(self, conn: Any, name: str) -> Any:
        """The one domain that OpenStack calls so."""
        found = [dom for dom in conn.listAllDomains() if _instance_name(dom) == name]
        if len(found) > 1:
            uuids = ", ".join(sorted(dom.UUIDString() for dom in found))
            raise errors.Usage(reason=f"several instances are called '{names.printable(name)}': {uuids}; give a UUID")
        if not found:
            raise errors.NoSuchDomain(domain=names.printable(name), uri=self.uri)
        return found[0]

    def all(self) -> list[tuple[str, names.DomainUuid]]:
        """(name, UUID) of every domain, sorted by name."""
        found = self.retry(lambda conn: conn.listAllDomains())
        return sorted((d.name(), names.domain_uuid(d.UUIDString())) for d in found)

    def volume_path(self, pool: str, volume: str) -> Optional[str]:
        """Where a storage volume lies on the host; None when libvirt does not know."""
        try:
            return str(
                self.retry(lambda conn: conn.storagePoolLookupByName(pool).storageVolLookupByName(volume).path())
            )
        except libvirt.libvirtError:
            return None

    def translate(self, error: libvirt.libvirtError, domain: str) -> errors.CbtError:
        """The typed error for one of libvirt's."""
        code = error.get_error_code()
        if code == libvirt.VIR_ERR_NO_DOMAIN:
            return errors.NoSuchDomain(domain=names.printable(domain), uri=self.uri)
        if self.lost(error):
            return errors.NoHypervisor(uri=self.uri, reason=message(error))
        if code == libvirt.VIR_ERR_OPERATION_TIMEOUT:  # libvirt's own lock, held by somebody's job
            return errors.DomainBusy(domain=names.printable(domain), job="a job that libvirt does not name", since="")
        return errors.HypervisorError(reason=message(error))

    def lost(self, error: libvirt.libvirtError) -> bool:
        """Whether the connection, not the request, is what failed."""
        if error.get_error_code() in LOST:
            return True
        if error.get_error_domain() in (libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE):
            return True
        try:
            return not self._conn.isAlive()
        except libvirt.libvirtError:
            return True

    @contextmanager
    def translated(self, domain: str) -> Iterator[None]:
        try:
            yield
        except libvirt.libvirtError as e:
            raise self.translate(e, domain) from None


def message(error: libvirt.libvirtError) -> str:
    """libvirt's own sentence, safe for a terminal."""
    return names.printable(str(error.get_error_message() or error), 500)


def _instance_name(dom: Any) -> Optional[str]:
    try:
        return openstack.name(dom.XMLDesc(0))
    except libvirt.libvirtError as e:
        if e.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        return None  # undefined while we looked


def within(seconds: float, call: Callable[[], T]) -> T:
    """A call that may never come back, given up after `seconds`.  Errors: TimeoutError; those of the call."""
    outcome: List[Tuple[Optional[T], Optional[BaseException]]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as e:  # noqa: BLE001 -- raised again below, in the thread that asked
            outcome.append((None, e))

    thread = threading.Thread(target=run, name="libvirt-call", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError
    found, error = outcome[0]
    if error:
        raise error
    return found  # type: ignore[return-value]


def _embedded(uri: str) -> bool:
    return ":///embed" in uri
