"""The connection to libvirt: its events and answers to our events, our calls to it, and coming back after a loss.

The only importer of libvirt. Every libvirt call blocks, so none is made on the loop; libvirt's callbacks come in a
thread of its own, and hand over to the loop. A call can also hang: libvirt waits without end for a driver that the
kernel cannot unbind, or for a QEMU that is stopped. Nothing can end it but libvirt, so whoever waits for it can stop
waiting, and its thread is one that the end of the process does not wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar

import libvirt

from hostpassd.base.threads import in_thread
from hostpassd.errors import (
    AlreadyAssigned,
    HostpassError,
    HypervisorRefused,
    HypervisorUnavailable,
    NoSuchDevice,
    NoSuchMachine,
    NotAssigned,
    NotSupported,
)
from hostpassd.machines.domain_xml import is_live, read_claims, read_ports, with_claim, without_claim
from hostpassd.model.events import (
    DeviceAdded,
    DeviceRemoved,
    Event,
    HypervisorChanged,
    MachineGone,
    MachineRead,
    MachinesListed,
    RemovalFailed,
)
from hostpassd.model.machine import Claim, Machine, MachineKey, Ports, UsbSource
from hostpassd.model.text import clean

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_KEEPALIVE = (5, 3)  # seconds between pings; pings unanswered before the connection counts as lost (20 s in all)
_OPEN_PATIENCE = 10.0  # seconds; a first open can take 12 where libvirtd probes QEMU, a frozen libvirtd takes for ever
_CLOSE_PATIENCE = 2.0  # seconds
_PAUSES = (0.1, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before each attempt to connect again
_LOCAL_PAUSE = 5.0  # seconds at most for a hypervisor on this host
_NODE_DEVICE_PATIENCE = 5.0  # seconds; libvirt's node devices come later than udev's
_NODE_DEVICE_STEP = 0.1  # seconds
# Seconds for one answer, or one wait for a machine's job lock: libvirt itself gives up after 30.
_PATIENCE = 45.0
# Seconds after which a reading goes on by itself while others are made: as long as libvirt waits for a machine's QEMU,
# it does not describe that machine.
_READING_ALONE = 2.0

# Calls at once: fewer than the 5 requests that libvirtd takes from one client at a time (max_client_requests). At that
# limit it does not read on, answers no keepalive, and the connection would be lost.
_CALLS_AT_ONCE = 4
_CHANGES_AT_ONCE = 3
# Calls that hang: with one more there would hardly be a place for others, and the connection is made afresh.
_HANGING = 2
# Calls that hang on earlier connections: each keeps one of libvirtd's 20 workers, which others need as well.
_LEFT_HANGING = 6

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
    libvirt.VIR_CONNECT_CLOSE_REASON_CLIENT: "the connection was closed",
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


class Hypervisor:
    """One libvirt, by URI: its machines as events to EMIT, which is called on the loop, and changes to them.

    For each machine events come in order: a DeviceAdded, DeviceRemoved or RemovalFailed after the MachineRead that
    shows its effect. While libvirt is away nothing is said of its machines but HypervisorChanged; on its return they
    are all listed again.

    Changes raise HypervisorUnavailable (not connected, or lost during the call: it may have been made or not),
    HypervisorRefused with libvirt's own words, NoSuchMachine, NotSupported; when one returns or libvirt has refused it,
    the machine has been read again and that was emitted.

    Who cancels a change gives it up: libvirt can be at it yet, and `wait_until_returned` waits for that. Too many that
    hang, and a reading that does, have the connection given up and made afresh, so that others get on.
    """

    def __init__(self, uri: str, emit: Callable[[Event], None]) -> None:
        self.uri = uri
        self._emit = emit
        self._link: _Link | None = None
        self._closing: dict[asyncio.Task[None], _Link] = {}  # earlier connections, as long as calls use them
        self._told: HypervisorChanged | None = None
        self._known: dict[str, Machine] = {}
        self._due: dict[str | None, _Due] = {}  # what is to be read, by UUID; None: everything
        self._wanted = asyncio.Event()

    async def run(self) -> None:
        """Connect, keep reading, and connect again after a loss, until cancelled."""
        _start_events()
        attempt = 0
        while True:
            await self._until_few_hang()
            try:
                link = await self._open()
            except HypervisorUnavailable as error:
                self._tell(False, str(error))
            else:
                attempt = 0 if await self._serve(link) else attempt
            await asyncio.sleep(self._pause(attempt))
            attempt += 1

    async def refresh(self) -> None:
        """Read every machine again; returns when that was emitted. HypervisorUnavailable."""
        await self._reread(None)

    async def refresh_machine(self, uuid_or_name: str) -> None:
        """Read one machine again; returns when that was emitted, as MachineGone if libvirt no longer has it.

        NoSuchMachine: neither we nor libvirt know it by that name. HypervisorUnavailable, HypervisorRefused.
        """
        known = (uuid for uuid, machine in self._known.items() if uuid_or_name in (uuid, machine.name))
        await self._reread(next(known, None) or await self._uuid_of(uuid_or_name))

    async def attach_live(self, uuid: str, xml: str) -> None:
        """Attach the element XML to the running machine. Where that takes libvirt seconds, so does this."""
        await self._change(uuid, lambda connection: connection.attach_live(uuid, xml))

    async def attach_stored(self, uuid: str, xml: str) -> None:
        """Add the element XML to the machine's stored configuration. AlreadyAssigned: it has that device."""
        await self._change(uuid, lambda connection: connection.attach_stored(uuid, xml))

    async def detach_live(self, uuid: str, alias: str) -> None:
        """Ask the guest to let the device with ALIAS go; whether it did, DeviceRemoved or RemovalFailed says.

        NotAssigned: the running machine has no such device.
        """
        await self._change(uuid, lambda connection: connection.detach_live(uuid, alias))

    async def detach_stored(self, uuid: str, claim: Claim) -> None:
        """Take what makes CLAIM out of the machine's stored configuration; if it is not in it, all is well."""
        await self._change(uuid, lambda connection: connection.detach_stored(uuid, claim))

    async def detach_host(self, name: str) -> None:
        """Free the PCI function with libvirt's node device NAME from its host driver. NoSuchDevice after 5 s."""
        await self._change_node(name, lambda connection: connection.detach_host(name))

    async def reattach_host(self, name: str) -> None:
        """Give the PCI function with libvirt's node device NAME back to its host driver. NoSuchDevice after 5 s."""
        await self._change_node(name, lambda connection: connection.reattach_host(name))

    async def wait_until_returned(self, names: Collection[str]) -> None:
        """Returns when libvirt is at no change any more that was given up, of these machines and node devices.

        Or when the connection is lost: then only `wait_until_idle` can tell.
        """
        while (link := self._link) and (hanging := [c for c, about in link.hanging.items() if about in names]):
            await link.first(hanging)

    async def wait_until_idle(self, uuid: str) -> None:
        """Returns when libvirt works on no earlier change of the machine any more, and it has been read after that.

        An earlier run of this program, a connection that was lost, or somebody who gave up can have left such a change.
        """
        while not await self._is_idle(uuid):
            pass
        await self._reread(uuid)

    # Connecting and losing.

    def _pause(self, attempt: int) -> float:
        pause = _PAUSES[min(attempt, len(_PAUSES) - 1)]
        return min(pause, _LOCAL_PAUSE) if "///" in self.uri else pause

    async def _until_few_hang(self) -> None:
        while len(calls := [call for link in self._closing.values() for call in link.calls]) >= _LEFT_HANGING:
            self._tell(False, f"{len(calls)} calls of libvirt at {self.uri} do not return; it is tried when one does.")
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)

    async def _open(self) -> _Link:
        link = _Link()
        loop = asyncio.get_running_loop()
        heard = functools.partial(_hand_over, loop, self._heard, link)
        closed = functools.partial(_hand_over, loop, self._closed, link)
        # Against a frozen libvirtd it does not return.
        opening = in_thread(functools.partial(_Connection, self.uri, heard, closed), "libvirt-call")
        await asyncio.wait({opening}, timeout=_OPEN_PATIENCE)
        if not opening.done():
            self._tell(False, f"libvirt at {self.uri} does not answer.")
        link.connection = await opening
        return link

    async def _serve(self, link: _Link) -> bool:
        """Read LINK until it is lost. Whether its machines were listed."""
        self._link = link
        self._touch(None)
        reader = asyncio.create_task(self._keep_reading(link))
        try:
            await asyncio.wait({reader, link.lost}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                reader.result()
        finally:
            self._lose(link, f"The connection to {self.uri} was closed.", tell=False)
            for task in (reader, *link.readings.values()):
                task.cancel()
            closing = asyncio.create_task(link.close())
            self._closing[closing] = link
            closing.add_done_callback(self._closing.pop)
            await asyncio.wait({closing, reader}, timeout=_CLOSE_PATIENCE)
        return link.listed

    def _lose(self, link: _Link, reason: str, tell: bool = True) -> None:
        """LINK is of no more use. Said before anybody who waits on it hears."""
        if self._link is not link:
            return
        self._link = None
        if tell:
            self._tell(False, reason)
        for due in self._due.values():
            due.fail(self._unavailable())
        link.lost.set_result(None)

    def _tell(self, connected: bool, error: str = "") -> None:
        change = HypervisorChanged(self.uri, connected, error)
        if change != self._told:
            self._told = change
            self._emit(change)

    def _unavailable(self) -> HypervisorUnavailable:
        reason = self._told.error if self._told else ""
        return HypervisorUnavailable(reason or f"libvirt at {self.uri} is not connected; try again when it is.")

    # What libvirt's callbacks hand over.

    def _heard(self, link: _Link, uuid: str, event: Event | None) -> None:
        if link is not self._link:
            return  # the list of all machines, on the next connection, stands for it
        due = self._touch(uuid)
        if event:
            due.events.append(event)

    def _closed(self, link: _Link, reason: int) -> None:
        self._lose(link, f"{_CLOSED.get(reason, 'The connection to libvirt failed')} ({self.uri}).")

    # Reading. Of a machine there is one reading at a time, so nothing old can overtake something newer.

    def _touch(self, uuid: str | None) -> _Due:
        """Have a machine (None: all) read; what is already to be read is read once."""
        self._wanted.set()
        return self._due.setdefault(uuid, _Due())

    async def _reread(self, uuid: str | None) -> None:
        if self._link is None:
            raise self._unavailable()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._touch(uuid).waiters.append(waiter)
        await waiter

    async def _keep_reading(self, link: _Link) -> None:
        try:
            while True:
                await self._wanted.wait()
                self._wanted.clear()
                while due := self._next_due(link):
                    await (self._read(link, due[0], due[1]) if due[0] else self._list(link, due[1]))
        except HostpassError as error:
            self._lose(link, str(error))

    def _next_due(self, link: _Link) -> tuple[str | None, _Due] | None:
        """What is to be read now: everything first; no machine of which a reading goes on."""
        free = [None] if None in self._due else [uuid for uuid in self._due if uuid not in link.readings]
        return (free[0], self._due.pop(free[0])) if free else None

    async def _read(self, link: _Link, uuid: str, due: _Due) -> None:
        reading = self._begin_reading(link, uuid, lambda connection: connection.read(uuid))
        reading.add_done_callback(functools.partial(self._take, link, uuid, due))
        await asyncio.wait({reading}, timeout=_READING_ALONE)

    def _begin_reading(
        self, link: _Link, uuid: str, question: Callable[[_Connection], Machine | None]
    ) -> asyncio.Task[Machine | None]:
        reading = asyncio.create_task(self._ask(link, question, uuid))
        link.readings[uuid] = reading
        reading.add_done_callback(functools.partial(self._reading_over, link, uuid))
        return reading

    def _reading_over(self, link: _Link, uuid: str, reading: asyncio.Task[Machine | None]) -> None:
        del link.readings[uuid]
        self._wanted.set()
        if not reading.cancelled():
            reading.exception()  # whoever waits for it can be gone

    def _take(self, link: _Link, uuid: str, due: _Due, reading: asyncio.Task[Machine | None]) -> None:
        """Tells what a READING has found, and the events that were heard before it."""
        if link.lost.done() or reading.cancelled():
            # What libvirt has told holds after its return, too.
            self._touch(uuid).events[:0] = due.events
            due.fail(self._unavailable())
            return
        try:
            self._tell_machine(uuid, reading.result())
        except HostpassError as error:
            _log.error("Machine %s could not be read and is shown as it was: %s", uuid, error)
            due.fail(error)
        for event in due.events:
            self._emit(event)
        due.succeed()

    def _tell_machine(self, uuid: str, machine: Machine | None) -> None:
        if machine is None:
            self._known.pop(uuid, None)
            self._emit(MachineGone(MachineKey(self.uri, uuid)))
        else:
            self._known[uuid] = machine
            self._emit(MachineRead(machine))

    async def _list(self, link: _Link, due: _Due) -> None:
        try:
            domains = {domain.UUIDString(): domain for domain in await self._ask(link, _Connection.domains)}
            found = {uuid: await self._listed(link, uuid, domain) for uuid, domain in domains.items()}
        except HypervisorRefused as error:
            due.fail(error)
            raise
        except (HostpassError, asyncio.CancelledError):
            due.fail(self._unavailable())
            raise
        machines = {uuid: self._known.get(uuid) if late else machine for uuid, (machine, late) in found.items()}
        self._known = {uuid: machine for uuid, machine in machines.items() if machine}
        link.listed = True
        self._tell(True)
        self._emit(MachinesListed(self.uri, tuple(self._known.values())))
        due.succeed()

    async def _listed(self, link: _Link, uuid: str, domain: Any) -> tuple[Machine | None, bool]:
        """The machine; and whether it is to be told as it is known, because its reading has failed or goes on."""
        if uuid in link.readings:
            self._touch(uuid)
            return None, True
        reading = self._begin_reading(link, uuid, lambda connection: connection.read_domain(domain))
        await asyncio.wait({reading}, timeout=_READING_ALONE)
        if not reading.done():
            reading.add_done_callback(functools.partial(self._take, link, uuid, _Due()))
            return None, True
        try:
            return reading.result(), False
        except HypervisorUnavailable:
            raise
        except HostpassError as error:
            _log.error("Machine %s could not be read and is shown as it was, if at all: %s", uuid, error)
            return None, True

    async def _uuid_of(self, uuid_or_name: str) -> str:
        if self._link is None:
            raise self._unavailable()
        return await self._ask(self._link, lambda connection: connection.uuid_of(uuid_or_name), uuid_or_name)

    async def _ask(self, link: _Link, question: Callable[[_Connection], _T], about: str | None = None) -> _T:
        """The answer to QUESTION, which changes nothing.

        Where there is none in time: about one machine HypervisorRefused; else HypervisorUnavailable, as for a loss.
        """
        answer = await self._begin(link, question)
        try:
            async with asyncio.timeout(_PATIENCE):
                await link.first((answer,))
        except TimeoutError:
            words = f"libvirt at {self.uri} has not answered for {_PATIENCE:.0f} seconds."
            if about is not None:
                self._give_up(link, answer, about)
                raise HypervisorRefused(words) from None
            _log.warning("%s", words)
            self._lose(link, words)
        return self._result(link, answer)

    # Changing, and calling.

    async def _call(self, call: Callable[[_Connection], _T], about: str) -> _T:
        """Make CALL, ABOUT a machine or a node device. Cancelled, it hangs as long as libvirt is at it.

        It is not even begun as long as another one about that hangs: libvirt would have it wait.
        """
        await self.wait_until_returned((about,))
        if self._link is None:
            raise self._unavailable()
        link = self._link
        change = await self._begin(link, call, _CHANGES_AT_ONCE)
        link.changes.add(change)
        try:
            await link.first((change,))
        except asyncio.CancelledError:
            self._give_up(link, change, about)
            raise
        return self._result(link, change)

    async def _begin(
        self, link: _Link, call: Callable[[_Connection], _T], changes: int = _CALLS_AT_ONCE
    ) -> asyncio.Future[_T]:
        """CALL, begun when there is a place for it: when fewer than so many CHANGES are made, say."""
        while not link.lost.done() and (len(link.calls) >= _CALLS_AT_ONCE or len(link.changes) >= changes):
            await link.first(link.calls)
        if link.lost.done():
            raise self._unavailable()
        return link.begin(call)

    def _result(self, link: _Link, call: asyncio.Future[_T]) -> _T:
        if not call.done():
            raise self._unavailable()
        try:
            return call.result()
        except HypervisorUnavailable as error:
            self._lose(link, str(error))
            raise

    def _give_up(self, link: _Link, call: asyncio.Future[Any], about: str) -> None:
        if call.done():
            return
        link.hanging[call] = about
        if about in self._known:
            call.add_done_callback(lambda _: self._touch(about))
        if len(link.hanging) > _HANGING:
            reason = f"{len(link.hanging)} calls of libvirt at {self.uri} do not return; it is connected to afresh."
            _log.warning("%s", reason)
            self._lose(link, reason)

    async def _is_idle(self, uuid: str) -> bool:
        """Whether libvirt worked on no change of the machine at the end of a wait for that."""
        await self.wait_until_returned((uuid,))
        if self._link is None:
            raise self._unavailable()
        async with self._link.waiting:
            try:
                async with asyncio.timeout(_PATIENCE):
                    return await self._call(lambda connection: connection.wait_for_idle(uuid), uuid)
            except TimeoutError:
                return False  # it hangs itself

    async def _change(self, uuid: str, change: Callable[[_Connection], None]) -> None:
        try:
            await self._call(change, uuid)
        except HypervisorUnavailable:
            raise
        except HostpassError:
            # Half of it may have happened, and who undoes it looks at what shows.
            with contextlib.suppress(HypervisorRefused):
                await self._reread(uuid)
            raise
        await self._reread(uuid)

    async def _change_node(self, name: str, change: Callable[[_Connection], None]) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _NODE_DEVICE_PATIENCE
        while True:
            try:
                return await self._call(change, name)
            except NoSuchDevice:
                if loop.time() >= deadline:
                    raise
            await asyncio.sleep(_NODE_DEVICE_STEP)


@dataclasses.dataclass(slots=True)
class _Due:
    """What is due once a machine, or all of them, has been read."""

    events: list[Event] = dataclasses.field(default_factory=list)
    waiters: list[asyncio.Future[None]] = dataclasses.field(default_factory=list)

    def succeed(self) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)
        self.waiters.clear()

    def fail(self, error: HostpassError) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_exception(error)
        self.waiters.clear()


class _Link:
    """One connection as the loop sees it: the calls that threads make on it."""

    connection: _Connection

    def __init__(self) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.listed = False
        self.waiting = asyncio.Lock()  # one at a time waits for a machine to be idle: it takes a place meanwhile
        self.calls: set[asyncio.Future[Any]] = set()  # that have not returned
        self.changes: set[asyncio.Future[Any]] = set()  # of these
        self.hanging: dict[asyncio.Future[Any], str] = {}  # of these, whom nobody waits for, and what they are about
        self.readings: dict[str, asyncio.Task[Machine | None]] = {}  # of machines, by UUID

    def begin(self, call: Callable[[_Connection], _T]) -> asyncio.Future[_T]:
        """CALL made in a thread of its own."""
        made = in_thread(functools.partial(call, self.connection), "libvirt-call")
        self.calls.add(made)
        made.add_done_callback(self._returned)
        return made

    async def first(self, calls: Iterable[asyncio.Future[Any]]) -> None:
        """Returns when one of CALLS has returned, or the connection is lost."""
        waited: set[asyncio.Future[Any]] = {*calls, self.lost}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Closes the connection once the calls in progress, which use it, have returned."""
        while self.calls:
            await asyncio.wait(self.calls)
        await in_thread(self.connection.close, "libvirt-call")

    def _returned(self, call: asyncio.Future[Any]) -> None:
        self.calls.discard(call)
        self.changes.discard(call)
        about = self.hanging.pop(call, None)
        error = None if call.cancelled() else call.exception()
        if about is not None:
            _log.warning(
                "A call about %s, from which libvirt did not return for long, has ended: %s", about, error or "done"
            )


class _Connection:
    """One open connection. Its methods block and raise our own errors; they are for threads.

    HEARD, with a machine's UUID, and CLOSED are called in libvirt's own thread.
    """

    def __init__(self, uri: str, heard: Callable[[str, Event | None], None], closed: Callable[[int], None]) -> None:
        self._uri = uri
        self._callbacks: list[int] = []
        self._warned: set[tuple[str, str]] = set()
        try:
            self._connection = libvirt.open(uri)
        except libvirt.libvirtError as error:
            raise HypervisorUnavailable(f"libvirt at {uri} cannot be reached: {_words(error)}.") from None
        try:
            self._listen(heard, closed)
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

    def _listen(self, heard: Callable[[str, Event | None], None], closed: Callable[[int], None]) -> None:
        connection = self._connection
        # First of all: from here on every call ends, even against a libvirtd that freezes.
        # The embedded driver, which cannot freeze, has neither of the two.
        with contextlib.suppress(libvirt.libvirtError):
            connection.setKeepAlive(*_KEEPALIVE)
        with contextlib.suppress(libvirt.libvirtError):
            connection.registerCloseCallback(lambda _connection, reason, _opaque: closed(reason), None)

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
        return Machine(
            uuid=uuid,
            name=name,
            uri=self._uri,
            state=_STATES.get(state, "no state"),
            persistent=persistent,
            live=self._claims(name, live),
            stored=self._claims(name, stored),
            ports=read_ports(live) if live is not None else Ports(),
            stored_ports=read_ports(stored) if stored is not None else Ports(),
        )

    def _claims(self, name: str, xml: str | None) -> tuple[Claim, ...]:
        if xml is None:
            return ()
        with self._readable(name):
            claims, warnings = read_claims(xml)
        for warning in warnings:
            if (name, warning) not in self._warned:  # once, and not at each reading
                self._warned.add((name, warning))
                _log.warning("Machine %s: %s", clean(name), warning)
        return claims

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

    def attach_stored(self, uuid: str, xml: str) -> None:
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

    def detach_stored(self, uuid: str, claim: Claim) -> None:
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
        return HypervisorRefused(f"libvirt refused: {words}.")


def _has_twin(claim: Claim, stored: tuple[Claim, ...]) -> bool:
    """Whether libvirt, asked to detach what makes CLAIM, could take another element of STORED.

    Asked by vendor and product alone it takes the first element with these, also one with a bus and number.
    """
    if not isinstance(claim.source, UsbSource) or claim.source.bus is not None:
        return False
    places = (dataclasses.replace(c.source, bus=None, number=None) for c in stored if isinstance(c.source, UsbSource))
    return list(places).count(claim.source) > 1


def _words(error: libvirt.libvirtError) -> str:
    """What libvirt says, on one line and with no full stop."""
    return clean(str(error.get_error_message() or error), 1000).rstrip(".")


# Threads.


@functools.cache
def _start_events() -> None:
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


def _hand_over(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> None:
    """Have CALL made on LOOP, from any thread; dropped where the loop has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)
