"""One libvirt as the event loop sees it: its machines as events, changes to them, and coming back after a loss.

Every call of libvirt blocks, so each is made in a thread (machines/connection.py), and libvirt's callbacks are handed
over to the loop. A call can also hang: libvirt waits without end for a driver that the kernel cannot unbind, or for a
QEMU that is stopped. Only libvirt can end such a call, so whoever waits for it stops waiting, and its thread does not
keep the process from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from hostpassd.base.threads import in_thread
from hostpassd.errors import HostpassError, HypervisorRefused, HypervisorUnavailable, NoSuchDevice
from hostpassd.machines.connection import Connection, start_events
from hostpassd.machines.link import CALLS_AT_ONCE, CHANGES_AT_ONCE, Link
from hostpassd.model.events import Event, HypervisorChanged, MachineGone, MachineRead, MachinesListed
from hostpassd.model.machine import Claim, Machine, MachineKey

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_PAUSES = (0.1, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before each attempt to connect again
_LOCAL_PAUSE = 5.0  # seconds at most for a hypervisor on this host

# Calls that hang: with one more there would hardly be a place for others, and the connection is made afresh.
_HANGING = 2
# Calls that hang on earlier connections: each keeps one of libvirtd's 20 workers, which others need as well.
_LEFT_HANGING = 6


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """For how many seconds the calls of libvirt are waited for."""

    open: float = 10.0  # a first open can take 12 where libvirtd probes QEMU, a frozen libvirtd takes for ever
    close: float = 2.0
    answer: float = 45.0  # for one answer, or one wait for a machine's job lock: libvirt itself gives up after 30
    # After these a reading goes on by itself while others are made: libvirt does not describe a machine as long as it
    # waits for its QEMU.
    reading: float = 2.0
    node_device: float = 5.0  # libvirt's node devices come later than udev's
    node_device_step: float = 0.1


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

    def __init__(self, uri: str, emit: Callable[[Event], None], limits: Limits | None = None) -> None:
        self.uri = uri
        self._limits = limits or Limits()
        self._emit = emit
        self._link: Link | None = None
        self._closing: dict[asyncio.Task[None], Link] = {}  # earlier connections, as long as calls use them
        self._told: HypervisorChanged | None = None
        self._known: dict[str, Machine] = {}
        self._due: dict[str | None, Due] = {}  # what is to be read, by UUID; None: everything
        self._wanted = asyncio.Event()

    async def run(self) -> None:
        """Connect, keep reading, and connect again after a loss, until cancelled."""
        start_events()
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

    async def attach_config(self, uuid: str, xml: str) -> None:
        """Add the element XML to the machine's stored configuration. AlreadyAssigned: it has that device."""
        await self._change(uuid, lambda connection: connection.attach_config(uuid, xml))

    async def detach_live(self, uuid: str, alias: str) -> None:
        """Ask the guest to let the device with ALIAS go; whether it did, DeviceRemoved or RemovalFailed says.

        NotAssigned: the running machine has no such device.
        """
        await self._change(uuid, lambda connection: connection.detach_live(uuid, alias))

    async def detach_config(self, uuid: str, claim: Claim) -> None:
        """Take what makes CLAIM out of the machine's stored configuration; if it is not in it, all is well."""
        await self._change(uuid, lambda connection: connection.detach_config(uuid, claim))

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

    async def _open(self) -> Link:
        link = Link()
        loop = asyncio.get_running_loop()
        heard = functools.partial(_hand_over, loop, self._heard, link)
        closed = functools.partial(_hand_over, loop, self._closed, link)
        # Against a frozen libvirtd it does not return.
        opening = in_thread(functools.partial(Connection, self.uri, heard, closed), "libvirt-call")
        await asyncio.wait({opening}, timeout=self._limits.open)
        if not opening.done():
            self._tell(False, f"libvirt at {self.uri} does not answer.")
        link.connection = await opening
        return link

    async def _serve(self, link: Link) -> bool:
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
            await asyncio.wait({closing, reader}, timeout=self._limits.close)
        return link.listed

    def _lose(self, link: Link, reason: str, tell: bool = True) -> None:
        """Drops a lost connection: HypervisorChanged first, then the waiters fail."""
        if self._link is not link:
            return
        self._link = None
        if tell:
            self._tell(False, reason)
        for due in self._due.values():
            due.fail(self._unavailable())
        link.lost.set_result(None)

    def _tell(self, connected: bool, error: str = "", version: int = 0) -> None:
        change = HypervisorChanged(self.uri, connected, error, version)
        if change != self._told:
            self._told = change
            self._emit(change)

    def _unavailable(self) -> HypervisorUnavailable:
        reason = self._told.error if self._told else ""
        return HypervisorUnavailable(reason or f"libvirt at {self.uri} is not connected; try again when it is.")

    # What libvirt's callbacks hand over.

    def _heard(self, link: Link, uuid: str, event: Event | None) -> None:
        if link is not self._link:
            return  # the list of all machines, on the next connection, stands for it
        due = self._touch(uuid)
        if event:
            due.events.append(event)

    def _closed(self, link: Link, reason: str) -> None:
        self._lose(link, f"{reason} ({self.uri}).")

    # Reading. Of a machine there is one reading at a time, so nothing old can overtake something newer.

    def _touch(self, uuid: str | None) -> Due:
        """Queues a re-read of one machine (None: all); requests are coalesced."""
        self._wanted.set()
        return self._due.setdefault(uuid, Due())

    async def _reread(self, uuid: str | None) -> None:
        if self._link is None:
            raise self._unavailable()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._touch(uuid).waiters.append(waiter)
        await waiter

    async def _keep_reading(self, link: Link) -> None:
        try:
            while True:
                await self._wanted.wait()
                self._wanted.clear()
                while due := self._next_due(link):
                    await (self._read(link, due[0], due[1]) if due[0] else self._list(link, due[1]))
        except HostpassError as error:
            self._lose(link, str(error))

    def _next_due(self, link: Link) -> tuple[str | None, Due] | None:
        """The next queued reading: the whole list first; never a machine that is being read already."""
        free = [None] if None in self._due else [uuid for uuid in self._due if uuid not in link.readings]
        return (free[0], self._due.pop(free[0])) if free else None

    async def _read(self, link: Link, uuid: str, due: Due) -> None:
        reading = self._begin_reading(link, uuid, lambda connection: connection.read(uuid))
        reading.add_done_callback(functools.partial(self._take, link, uuid, due))
        await asyncio.wait({reading}, timeout=self._limits.reading)

    def _begin_reading(
        self, link: Link, uuid: str, question: Callable[[Connection], Machine | None]
    ) -> asyncio.Task[Machine | None]:
        reading = asyncio.create_task(self._ask(link, question, uuid))
        link.readings[uuid] = reading
        reading.add_done_callback(functools.partial(self._reading_over, link, uuid))
        return reading

    def _reading_over(self, link: Link, uuid: str, reading: asyncio.Task[Machine | None]) -> None:
        del link.readings[uuid]
        self._wanted.set()
        if not reading.cancelled():
            reading.exception()  # whoever waits for it can be gone

    def _take(self, link: Link, uuid: str, due: Due, reading: asyncio.Task[Machine | None]) -> None:
        """Emits the result of a READING, then the device events that libvirt sent before it."""
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

    async def _list(self, link: Link, due: Due) -> None:
        try:
            domains = {domain.UUIDString(): domain for domain in await self._ask(link, Connection.domains)}
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
        self._tell(True, version=link.connection.version)
        self._emit(MachinesListed(self.uri, tuple(self._known.values())))
        due.succeed()

    async def _listed(self, link: Link, uuid: str, domain: Any) -> tuple[Machine | None, bool]:
        """The machine; and whether its last known state stands for it, because its reading failed or goes on."""
        if uuid in link.readings:
            self._touch(uuid)
            return None, True
        reading = self._begin_reading(link, uuid, lambda connection: connection.read_domain(domain))
        await asyncio.wait({reading}, timeout=self._limits.reading)
        if not reading.done():
            reading.add_done_callback(functools.partial(self._take, link, uuid, Due()))
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

    async def _ask(self, link: Link, question: Callable[[Connection], _T], about: str | None = None) -> _T:
        """The answer to QUESTION, which changes nothing.

        Where there is none in time: about one machine HypervisorRefused; else HypervisorUnavailable, as for a loss.
        """
        answer = await self._begin(link, question)
        try:
            async with asyncio.timeout(self._limits.answer):
                await link.first((answer,))
        except TimeoutError:
            words = f"libvirt at {self.uri} has not answered for {self._limits.answer:.0f} seconds."
            if about is not None:
                self._give_up(link, answer, about)
                raise HypervisorRefused(words) from None
            _log.warning("%s", words)
            self._lose(link, words)
        return self._result(link, answer)

    # Changing, and calling.

    async def _call(self, call: Callable[[Connection], _T], about: str) -> _T:
        """Make CALL, ABOUT a machine or a node device. Cancelled, it hangs as long as libvirt is at it.

        It is not even begun as long as another one about that hangs: libvirt would have it wait.
        """
        await self.wait_until_returned((about,))
        if self._link is None:
            raise self._unavailable()
        link = self._link
        change = await self._begin(link, call, CHANGES_AT_ONCE)
        link.changes.add(change)
        try:
            await link.first((change,))
        except asyncio.CancelledError:
            self._give_up(link, change, about)
            raise
        return self._result(link, change)

    async def _begin(
        self, link: Link, call: Callable[[Connection], _T], changes: int = CALLS_AT_ONCE
    ) -> asyncio.Future[_T]:
        """Begins CALL once fewer than CALLS_AT_ONCE calls, and fewer than so many CHANGES, are in progress."""
        await link.wait_for_place(changes)
        if link.lost.done():
            raise self._unavailable()
        return link.begin(call)

    def _result(self, link: Link, call: asyncio.Future[_T]) -> _T:
        if not call.done():
            raise self._unavailable()
        try:
            return call.result()
        except HypervisorUnavailable as error:
            self._lose(link, str(error))
            raise

    def _give_up(self, link: Link, call: asyncio.Future[Any], about: str) -> None:
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
                async with asyncio.timeout(self._limits.answer):
                    return await self._call(lambda connection: connection.wait_for_idle(uuid), uuid)
            except TimeoutError:
                return False  # it hangs itself

    async def _change(self, uuid: str, change: Callable[[Connection], None]) -> None:
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

    async def _change_node(self, name: str, change: Callable[[Connection], None]) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.node_device
        while True:
            try:
                return await self._call(change, name)
            except NoSuchDevice:
                if loop.time() >= deadline:
                    raise
            await asyncio.sleep(self._limits.node_device_step)


@dataclasses.dataclass(slots=True)
class Due:
    """A queued reading of one machine, or of all: the events to emit after it and the callers that wait for it."""

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


def _hand_over(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> None:
    """Have CALL made on LOOP, from any thread; dropped where the loop has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)
