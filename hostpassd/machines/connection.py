"""One open connection to libvirt: what blocks, and so is called in threads only; libvirt's errors become ours.

The only importer of libvirt. Its callbacks come in one thread of its own, which runs its event loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import libvirt

from hostpassd.errors import (
    AlreadyAssigned,
    HostpassError,
    HypervisorRefused,
    HypervisorUnavailable,
    NoFreePort,
    NoSuchDevice,
    NoSuchMachine,
    NotAssigned,
    NotSupported,
    UnplugPending,
    WholeCardOnly,
)
from hostpassd.machines.domain_xml import is_live, read_claims, read_ports, read_title, with_claim, without_claim
from hostpassd.model.codes import Fact
from hostpassd.model.events import DeviceAdded, DeviceRemoved, Event, RemovalFailed
from hostpassd.model.machine import Claim, Machine, MachineKey, Ports, UsbSource
from hostpassd.model.text import clean

_log = logging.getLogger(__name__)

_KEEPALIVE = (5, 3)  # seconds between pings; pings unanswered before the connection counts as lost (20 s in all)

_STATES = {
    libvirt.VIR_DOMAIN_NOSTATE: "no state",
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_BLOCKED: "idle",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "in shutdown",
    libvirt.VIR_DOMAIN_SHUTOFF: "shut off",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "pmsuspended",
}

_CLOSED = {
    libvirt.VIR_CONNECT_CLOSE_REASON_EOF: "libvirt has closed the connection",
    libvirt.VIR_CONNECT_CLOSE_REASON_KEEPALIVE: "libvirt does not answer",
    libvirt.VIR_CONNECT_CLOSE_REASON_CLIENT: "The connection was closed",
}

_DEVICE_EVENTS: dict[int, Callable[[MachineKey, str], Event]] = {
    libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED: DeviceAdded,
    libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED: DeviceRemoved,
    libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED: RemovalFailed,
}

# How drivers say that they cannot change the stored half in place. The embedded driver has no such call in libvirt 9
# (NO_SUPPORT), and in 11 one that does not take the flag (INVALID_ARG); QEMU cannot detach every kind
# (OPERATION_UNSUPPORTED).
_CANNOT = frozenset(
    {
        libvirt.VIR_ERR_NO_SUPPORT,
        libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
        libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,
        libvirt.VIR_ERR_INVALID_ARG,
    }
)


# Some refusals can be told apart by words only: libvirt gives their codes, OPERATION_FAILED and INTERNAL_ERROR, to much
# else. "cannot hot unplug multifunction PCI device" comes from where qemu_hotplug.c detaches a device, if
# qemuIsMultiFunctionDevice.
_WHOLE_CARD = (
    "A card of several functions in one slot stays with a machine while it runs: shut the machine down and dismiss it "
    "then, or dismiss it with live=false, so that the machine's next start is without it."
)
# "No more available PCI slots" comes from the search for a guest address in libvirt's domain_addr.c.
_NO_PORT = (
    "The machine has no free place for it: give it an empty pcie-root-port for a PCI Express device, "
    "or a pcie-to-pci-bridge with a free slot for a conventional one."
)
# "per-device boot elements cannot be used together with os/boot elements" comes from libvirt's domain_conf.c and
# domain_postparse.c.
_BOOTS_BY_KIND = (
    "The machine boots by a <boot dev='...'/> in its <os>, which libvirt writes where no device has a place in the "
    "boot order: give its own disk a <boot order='...'/> instead, or leave the option boot-order out."
)
# "Device ... is already in the process of unplug" is QEMU's answer to a second device_del, which libvirt passes on.


class Connection:
    """One open connection. Its methods block and raise our own errors; they are for threads.

    HEARD, with a machine's UUID, and CLOSED, with the reason in words, are called in libvirt's own thread. `version`:
    of the libvirt at its other end, 9000000 for 9.0.0.
    """

    def __init__(self, uri: str, heard: Callable[[str, Event | None], None], closed: Callable[[str], None]) -> None:
        self._uri = uri
        self._callbacks: list[int] = []
        self._warned: set[tuple[str, Fact]] = set()
        try:
            self._connection = libvirt.open(uri)
        except libvirt.libvirtError as error:
            raise HypervisorUnavailable(f"libvirt at {uri} cannot be reached: {_words(error)}.") from None
        try:
            self._listen(heard, closed)
            self.version: int = self._connection.getLibVersion()
        except libvirt.libvirtError as error:
            self.close()
            raise HypervisorUnavailable(f"libvirt at {uri} cannot be listened to: {_words(error)}.") from None

    def close(self) -> None:
        """Let go of the connection, on which no other call may be in progress."""
        # A connection closed with callbacks still registered keeps its sockets.
        for callback in self._callbacks:
            with contextlib.suppress(libvirt.libvirtError):
                self._connection.domainEventDeregisterAny(callback)
        with contextlib.suppress(libvirt.libvirtError):
            self._connection.unregisterCloseCallback()
        with contextlib.suppress(libvirt.libvirtError):
            self._connection.close()

    def _listen(self, heard: Callable[[str, Event | None], None], closed: Callable[[str], None]) -> None:
        connection = self._connection
        # First of all: from here on every call ends, even against a libvirtd that freezes.
        # The embedded driver, which cannot freeze, has neither of the two.
        with contextlib.suppress(libvirt.libvirtError):
            connection.setKeepAlive(*_KEEPALIVE)
        with contextlib.suppress(libvirt.libvirtError):
            connection.registerCloseCallback(lambda _connection, reason, _opaque: closed(_reason(reason)), None)

        def lifecycle(_connection: Any, domain: Any, _event: int, _detail: int, _opaque: Any) -> None:
            heard(domain.UUIDString(), None)

        def device(_connection: Any, domain: Any, alias: str, event: Callable[[MachineKey, str], Event]) -> None:
            heard(domain.UUIDString(), event(MachineKey(self._uri, domain.UUIDString()), alias))

        register = connection.domainEventRegisterAny
        self._callbacks.append(register(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, None))
        for number, event in _DEVICE_EVENTS.items():
            self._callbacks.append(register(None, number, device, event))

    # Reading.

    def domains(self) -> list[Any]:
        """libvirt's handles of all machines, for `read_domain`."""
        with self._translated():
            return list(self._connection.listAllDomains())

    def read(self, uuid: str) -> Machine | None:
        """The machine with UUID as it is now, or None if there is none."""
        try:
            return self.read_domain(self._domain(uuid))
        except NoSuchMachine:
            return None

    def uuid_of(self, uuid_or_name: str) -> str:
        """The UUID of the machine with that UUID or name. NoSuchMachine."""
        with contextlib.suppress(libvirt.libvirtError):
            return str(self._connection.lookupByUUIDString(uuid_or_name).UUIDString())
        with self._translated():
            return str(self._connection.lookupByName(uuid_or_name).UUIDString())

    def read_domain(self, domain: Any) -> Machine | None:
        """DOMAIN as it is now. What changes between two of the calls sends an event, and is read again for it."""
        uuid, name = domain.UUIDString(), domain.name()
        try:
            with self._translated():
                state, persistent = domain.state()[0], bool(domain.isPersistent())
                live = domain.XMLDesc() if state != libvirt.VIR_DOMAIN_SHUTOFF else None
                stored = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE) if persistent else None
        except NoSuchMachine:
            return None
        if live is not None and not self._is_live(name, live):
            state, live = libvirt.VIR_DOMAIN_SHUTOFF, None  # it has stopped since: this is its stored half
        claims, warnings = self._read_half(name, live)
        stored_claims, stored_warnings = self._read_half(name, stored)
        return Machine(
            uuid=uuid,
            name=name,
            uri=self._uri,
            state=_STATES.get(state, "no state"),
            persistent=persistent,
            live=claims,
            config=stored_claims,
            ports=read_ports(live) if live is not None else Ports(),
            config_ports=read_ports(stored) if stored is not None else Ports(),
            title=read_title(live or stored or "<domain/>"),
            warnings=tuple(dict.fromkeys((*warnings, *stored_warnings))),
        )

    def _claims(self, name: str, xml: str) -> tuple[Claim, ...]:
        claims, _ = self._read_half(name, xml)
        return claims

    def _read_half(self, name: str, xml: str | None) -> tuple[tuple[Claim, ...], list[Fact]]:
        if xml is None:
            return (), []
        with self._readable(name):
            claims, warnings = read_claims(xml)
        for warning in warnings:
            if (name, warning) not in self._warned:  # once, and not at each reading
                self._warned.add((name, warning))
                _log.warning("Machine %s: %s", clean(name), warning.message)
        return claims, warnings

    def _is_live(self, name: str, xml: str) -> bool:
        with self._readable(name):
            return is_live(xml)

    @contextlib.contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            words = f"libvirt's description of the machine {clean(name)} is unreadable: {error}"
            raise HypervisorRefused(words) from None

    # Changing.

    def attach_live(self, uuid: str, xml: str) -> None:
        with self._translated():
            self._domain(uuid).attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)

    def attach_config(self, uuid: str, xml: str) -> None:
        domain = self._domain(uuid)
        with self._translated():
            if self._has_claim(domain, xml):
                raise AlreadyAssigned(f"The stored configuration of {clean(domain.name())} has the device already.")
            try:
                domain.attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
            except libvirt.libvirtError as error:
                # 55 is also said of a transient machine, and other XML can name the same device.
                if error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID and "already" in _words(error):
                    raise AlreadyAssigned(f"libvirt refused: {_words(error)}.") from None
                if error.get_error_code() not in _CANNOT:
                    raise
                self._redefine(domain, lambda whole: with_claim(whole, xml))

    def detach_live(self, uuid: str, alias: str) -> None:
        domain = self._domain(uuid)
        with self._translated():
            try:
                domain.detachDeviceAlias(alias, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            except libvirt.libvirtError as error:
                # libvirt 9 calls an alias that is not there an internal error, so that its code does not tell.
                if error.get_error_code() in _CANNOT or self._has_alias(domain, alias):
                    raise
                raise NotAssigned(f"The running {clean(domain.name())} has no device {clean(alias)}.") from None

    def detach_config(self, uuid: str, claim: Claim) -> None:
        domain = self._domain(uuid)
        with self._translated():
            stored = self._stored_claims(domain)
            # With another alias it is not what was looked at, but the same device, stored anew by somebody else.
            written = next((c.xml for c in stored if (c.id, c.alias) == (claim.id, claim.alias)), None)
            if written is None:
                return
            if _has_twin(claim, stored):
                self._redefine(domain, lambda whole: without_claim(whole, claim))
                return
            try:
                domain.detachDeviceFlags(written, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
            except libvirt.libvirtError as error:
                if error.get_error_code() in _CANNOT:
                    self._redefine(domain, lambda whole: without_claim(whole, claim))
                elif error.get_error_code() != libvirt.VIR_ERR_DEVICE_MISSING:
                    raise

    def detach_host(self, name: str) -> None:
        with self._translated():
            self._connection.nodeDeviceLookupByName(name).detachFlags(None)

    def reattach_host(self, name: str) -> None:
        with self._translated():
            self._connection.nodeDeviceLookupByName(name).reAttach()

    def wait_for_idle(self, uuid: str) -> bool:
        """Waits, as long as libvirt does, until it works on no change of the machine; whether it is so."""
        domain = self._domain(uuid)
        try:
            # Of the calls that wait for the machine's job lock the one that does nothing; it waits for up to 30 s.
            domain.memoryStats()
        except libvirt.libvirtError as error:
            ours = self._ours(error)
            if isinstance(ours, HypervisorUnavailable | NoSuchMachine):
                raise ours from None
            # Any other answer comes after the wait (the machine does not run), or of a driver that has no such lock.
            return bool(error.get_error_code() != libvirt.VIR_ERR_OPERATION_TIMEOUT)
        return True

    def _domain(self, uuid: str) -> Any:
        with self._translated():
            return self._connection.lookupByUUIDString(uuid)

    def _stored_claims(self, domain: Any) -> tuple[Claim, ...]:
        # A transient machine's "inactive" XML is its live one; and to define it again would make it persistent.
        if not domain.isPersistent():
            raise HypervisorRefused(f"The machine {clean(domain.name())} is transient: it has no stored configuration.")
        return self._claims(domain.name(), domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))

    def _has_alias(self, domain: Any, alias: str) -> bool:
        return alias in {claim.alias for claim in self._claims(domain.name(), domain.XMLDesc())}

    def _has_claim(self, domain: Any, element_xml: str) -> bool:
        wanted, _ = read_claims(with_claim("<domain/>", element_xml))
        return bool({claim.id for claim in wanted} & {claim.id for claim in self._stored_claims(domain)})

    def _redefine(self, domain: Any, change: Callable[[str], str]) -> None:
        whole = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
        self._connection.defineXML(change(whole))

    def _alive(self) -> bool:
        try:
            return bool(self._connection.isAlive())
        except libvirt.libvirtError:
            return False

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """libvirt's errors become ours."""
        try:
            yield
        except libvirt.libvirtError as error:
            raise self._ours(error) from None

    def _ours(self, error: libvirt.libvirtError) -> HostpassError:
        words, code = _words(error), error.get_error_code()
        if not self._alive():
            return HypervisorUnavailable(f"The connection to {self._uri} was lost: {words}; try again when it is back.")
        if code == libvirt.VIR_ERR_NO_DOMAIN:
            return NoSuchMachine(f"libvirt has no such machine: {words}.")
        if code == libvirt.VIR_ERR_NO_NODE_DEVICE:
            return NoSuchDevice(f"libvirt has no such device: {words}.")
        if code == libvirt.VIR_ERR_NO_SUPPORT:
            return NotSupported(f"The hypervisor at {self._uri} cannot do this: {words}.")
        return _refusal(words)


def _refusal(words: str) -> HypervisorRefused:
    """The refusal that libvirt's WORDS stand for: its error codes do not tell these apart from others."""
    told = f"libvirt refused: {words}."
    if "unplug" in words and "multifunction" in words:
        return WholeCardOnly(f"{told} {_WHOLE_CARD}")
    if "unplug" in words:
        return UnplugPending(told)
    if "PCI slots" in words:
        return NoFreePort(f"{told} {_NO_PORT}")
    if "os/boot" in words:
        return HypervisorRefused(f"{told} {_BOOTS_BY_KIND}")
    return HypervisorRefused(told)


def _has_twin(claim: Claim, stored: tuple[Claim, ...]) -> bool:
    """Whether libvirt, asked to detach what makes CLAIM, could take another element of STORED.

    Asked by vendor and product alone it takes the first element with these, also one with a bus and number.
    """
    if not isinstance(claim.source, UsbSource) or claim.source.bus is not None:
        return False
    places = (dataclasses.replace(c.source, bus=None, number=None) for c in stored if isinstance(c.source, UsbSource))
    return list(places).count(claim.source) > 1


def _reason(number: int) -> str:
    """Why libvirt has closed a connection."""
    return _CLOSED.get(number, "The connection to libvirt failed")


def _words(error: libvirt.libvirtError) -> str:
    """What libvirt says, on one line and with no full stop."""
    return clean(str(error.get_error_message() or error), 1000).rstrip(".")


# Threads.


@functools.cache
def start_events() -> None:
    """Start the one thread in which libvirt watches its sockets; before any connection of the process is opened."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # it would write them all to stderr
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_run_events, name="libvirt-events", daemon=True).start()


def _run_events() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as error:
            _log.error("libvirt's event loop failed and is tried again: %s", _words(error))
            time.sleep(1)
