"""The connection to libvirt, against its embedded driver in this process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from hostpassd.errors import (
    AlreadyAssigned,
    HypervisorRefused,
    HypervisorUnavailable,
    NoSuchDevice,
    NoSuchMachine,
    NotAssigned,
    NotSupported,
)
from hostpassd.machines import connection as blocking
from hostpassd.machines.connection import Connection
from hostpassd.machines.hypervisor import Hypervisor, Limits
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
from hostpassd.model.machine import Claim, Machine, MachineKey, PciSource, UsbSource

GAMING, OFF, TRANSIENT = (f"aaaaaaaa-2222-3333-4444-00000000000{n}" for n in (1, 2, 3))
PCI = (
    "<hostdev mode='subsystem' type='pci' managed='yes'><source>"
    "<address domain='0x0000' bus='0x06' slot='0x00' function='0x0'/></source></hostdev>"
)
USB = (
    "<hostdev mode='subsystem' type='usb'><source startupPolicy='optional'>"
    "<vendor id='0x046d'/><product id='0xc52b'/></source></hostdev>"
)


def domain(name: str, uuid: str, devices: str = "", extra: str = "") -> str:
    return (
        f"<domain type='test'><name>{name}</name><uuid>{uuid}</uuid><memory>8192</memory>"
        f"<os><type>hvm</type></os>{extra}<devices>{devices}</devices></domain>"
    )


NODE = (
    "<node xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>"
    + domain("gaming", GAMING, PCI + USB, "<test:runstate>1</test:runstate>")
    + domain("off", OFF, "", "<test:runstate>5</test:runstate>")
    + domain("trans", TRANSIENT, USB, "<test:transient>1</test:transient>")
    + "</node>"
)


class Tape:
    """The events so far, and a wait for more."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._more = asyncio.Event()

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self._more.set()

    async def until(self, wanted: Callable[[list[Event]], Any]) -> Any:
        """What WANTED finds, once it finds something."""
        async with asyncio.timeout(10):
            while not (found := wanted(self.events)):
                self._more.clear()
                await self._more.wait()
        return found

    async def until_listed(self, times: int = 1) -> MachinesListed:
        def listed(events: list[Event]) -> MachinesListed | None:
            lists = [event for event in events if isinstance(event, MachinesListed)]
            return lists[times - 1] if len(lists) >= times else None

        found = await self.until(listed)
        assert isinstance(found, MachinesListed)
        return found

    def last(self, uuid: str) -> Machine:
        """The machine as it was last told."""
        for event in reversed(self.events):
            machines = (event.machine,) if isinstance(event, MachineRead) else getattr(event, "machines", ())
            for machine in machines:
                if machine.uuid == uuid:
                    assert isinstance(machine, Machine)
                    return machine
        raise AssertionError(uuid)


@contextlib.asynccontextmanager
async def running(uri: str, limits: Limits | None = None) -> AsyncIterator[tuple[Hypervisor, Tape]]:
    tape = Tape()
    hypervisor = Hypervisor(uri, tape.emit, limits)
    before = asyncio.all_tasks()
    task = asyncio.create_task(hypervisor.run())
    try:
        yield hypervisor, tape
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        if left := asyncio.all_tasks() - before:  # which close connections once the calls on them have returned
            await asyncio.wait(left)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    (tmp_path / "node.xml").write_text(NODE)
    return f"test://{tmp_path}/node.xml"


class Opened:
    """libvirt.open, seen through: its connections, the callbacks given to them, and how it is to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.connections: list[Any] = []
        self.close_callbacks: list[Any] = []
        self.callbacks: dict[int, tuple[Any, Any]] = {}
        self.closed: list[Any] = []
        self.refusals = 0
        self.go = threading.Event()
        self.go.set()
        self._open = libvirt.open
        monkeypatch.setattr(libvirt, "open", self)

    def __call__(self, uri: str) -> Any:
        self.go.wait(10)
        if self.refusals:
            self.refusals -= 1
            raise libvirt.libvirtError("no libvirtd here")
        connection = self._open(uri)
        self.connections.append(connection)
        register = connection.domainEventRegisterAny

        def register_any(domain: Any, number: int, callback: Any, opaque: Any) -> Any:
            self.callbacks[number] = (callback, opaque)
            return register(domain, number, callback, opaque)

        connection.domainEventRegisterAny = register_any
        connection.registerCloseCallback = lambda callback, _opaque: self.close_callbacks.append(callback)
        connection.unregisterCloseCallback = lambda: None
        close = connection.close

        def closing() -> None:
            close()
            self.closed.append(connection)

        connection.close = closing
        return connection

    def fire(self, number: int, *values: Any) -> None:
        """Call the callback for event NUMBER on the newest connection as libvirt does: in a thread of its own."""
        callback, opaque = self.callbacks[number]
        thread = threading.Thread(target=callback, args=(self.connections[-1], *values, opaque))
        thread.start()
        thread.join()

    def lose(self, reason: int) -> None:
        """What libvirt does when the connection breaks."""
        self.connections[-1].isAlive = lambda: 0
        thread = threading.Thread(target=self.close_callbacks[-1], args=(self.connections[-1], reason, None))
        thread.start()
        thread.join()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    return Opened(monkeypatch)


# Reading.


async def test_all_machines_are_listed_with_both_halves(uri: str) -> None:
    async with running(uri) as (_, tape):
        listed = await tape.until_listed()
        assert tape.events[0] == HypervisorChanged(uri, True, "", libvirt.getVersion())
    machines = {machine.name: machine for machine in listed.machines}
    assert machines.keys() == {"gaming", "off", "trans"}
    gaming = machines["gaming"]
    assert (gaming.uuid, gaming.uri, gaming.state, gaming.persistent) == (GAMING, uri, "running", True)
    both = [PciSource("0000:06:00.0"), UsbSource(0x046D, 0xC52B)]
    assert [claim.source for claim in gaming.live] == [claim.source for claim in gaming.config] == both
    assert (machines["off"].state, machines["off"].live, machines["off"].config) == ("shut off", (), ())
    assert (machines["trans"].persistent, machines["trans"].config, len(machines["trans"].live)) == (False, (), 1)


async def test_what_others_do_to_a_machine_is_told(tmp_path: Path) -> None:
    uuid = "bbbbbbbb-2222-3333-4444-000000000001"
    async with running("test:///default") as (_, tape):
        await tape.until_listed()
        other = libvirt.open("test:///default")
        machine = await asyncio.to_thread(other.defineXML, domain("theirs", uuid, USB))
        read = await tape.until(lambda events: [e for e in events if isinstance(e, MachineRead)])
        assert read[0].machine.name == "theirs"
        assert len(read[0].machine.config) == 1
        await asyncio.to_thread(machine.create)
        await tape.until(lambda _: len(tape.last(uuid).live) == 1)
        assert tape.last(uuid).active
        await asyncio.to_thread(machine.destroy)
        await tape.until(lambda _: tape.last(uuid).state == "shut off")
        await asyncio.to_thread(machine.undefine)
        await tape.until(lambda events: MachineGone(MachineKey("test:///default", uuid)) in events)
        other.close()


async def test_a_device_event_comes_after_the_reading_that_shows_it(uri: str, opened: Opened) -> None:
    async with running(uri) as (_, tape):
        await tape.until_listed()
        machine = opened.connections[-1].lookupByUUIDString(GAMING)
        for number, event in (
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, DeviceAdded(MachineKey(uri, GAMING), "ua-1")),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, DeviceRemoved(MachineKey(uri, GAMING), "ua-1")),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, RemovalFailed(MachineKey(uri, GAMING), "ua-1")),
        ):
            before = len(tape.events)
            opened.fire(number, machine, "ua-1")
            await tape.until(lambda events: events[-1:] == [event])  # noqa: B023
            assert [type(e) for e in tape.events[before:]] == [MachineRead, type(event)]


async def test_an_event_during_a_reading_has_the_machine_read_again(
    uri: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, finish = threading.Event(), threading.Event()
    read = Connection.read

    def slow(self: Any, uuid: str) -> Any:
        machine = read(self, uuid)
        reading.set()
        finish.wait(10)
        return machine

    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        monkeypatch.setattr(Connection, "read", slow)
        first = asyncio.create_task(hypervisor.refresh_machine(GAMING))
        assert await asyncio.to_thread(reading.wait, 10)
        machine = opened.connections[-1].lookupByUUIDString(GAMING)
        for alias in ("ua-1", "ua-2"):
            opened.fire(libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, machine, alias)
        finish.set()
        await first
        await tape.until(lambda events: DeviceAdded(MachineKey(uri, GAMING), "ua-2") in events)
    after = [type(event) for event in tape.events if not isinstance(event, HypervisorChanged | MachinesListed)]
    assert after == [MachineRead, MachineRead, DeviceAdded, DeviceAdded]


async def test_refresh_reads_everything_and_a_machine_by_name(uri: str) -> None:
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        await hypervisor.refresh()
        assert isinstance(tape.events[-1], MachinesListed)
        await hypervisor.refresh_machine("off")
        assert tape.last(OFF) == getattr(tape.events[-1], "machine", None)
        with pytest.raises(NoSuchMachine):
            await hypervisor.refresh_machine("nobody")


async def test_what_is_not_understood_is_told_and_logged_once_for_both_halves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = "<disk type='volume' device='disk'><source pool='vms' volume='root'/><target dev='vda' bus='virtio'/></disk>"
    machine = domain("gaming", GAMING, disk, "<test:runstate>1</test:runstate>")
    (tmp_path / "node.xml").write_text(
        f"<node xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>{machine}</node>"
    )
    async with running(f"test://{tmp_path}/node.xml") as (hypervisor, tape):
        await tape.until_listed()
        await hypervisor.refresh()
        [found] = tape.last(GAMING).warnings
    assert (found.code, dict(found.details)) == ("pool-unavailable", {"pool": "vms", "volume": "root"})
    assert [record.getMessage() for record in caplog.records if found.message in record.getMessage()] == [
        f"Machine gaming: {found.message}"
    ]


async def test_a_machine_that_cannot_be_read_is_shown_as_it_was(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(uri) as (hypervisor, tape):
        listed = await tape.until_listed()

        def unreadable(xml: str) -> Any:
            raise ValueError("no XML")

        monkeypatch.setattr(blocking, "read_claims", unreadable)
        with pytest.raises(HypervisorRefused):
            await hypervisor.refresh_machine(GAMING)
        await hypervisor.refresh()
        again = await tape.until_listed(2)
        assert set(again.machines) == set(listed.machines)


# Changing.


def stored(tape: Tape, uuid: str) -> dict[str, Claim]:
    return {claim.id: claim for claim in tape.last(uuid).config}


async def test_a_driver_that_cannot_attach_is_given_the_whole_machine_again(uri: str) -> None:
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        await hypervisor.attach_config(OFF, USB)
        await hypervisor.attach_config(OFF, PCI)
        assert stored(tape, OFF).keys() == {"hostdev:usb:046d:c52b", "hostdev:pci:0000:06:00.0"}
        with pytest.raises(AlreadyAssigned):
            await hypervisor.attach_config(OFF, PCI)
        claim = stored(tape, OFF)["hostdev:pci:0000:06:00.0"]
        await hypervisor.detach_config(OFF, claim)
        assert stored(tape, OFF).keys() == {"hostdev:usb:046d:c52b"}
        await hypervisor.detach_config(OFF, claim)  # already gone
        assert stored(tape, OFF).keys() == {"hostdev:usb:046d:c52b"}


async def test_a_machine_that_boots_by_its_os_element_takes_no_boot_order_and_is_told_why(uri: str) -> None:
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        with pytest.raises(
            HypervisorRefused, match=r"cannot be used together with os/boot .*leave the option boot-order"
        ):
            await hypervisor.attach_config(OFF, PCI.replace("<source>", "<boot order='1'/><source>"))
        assert "hostdev:pci:0000:06:00.0" not in stored(tape, OFF)


async def test_the_same_device_stored_again_by_somebody_else_stays(uri: str) -> None:
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        await hypervisor.attach_config(OFF, PCI)
        ours = dataclasses.replace(stored(tape, OFF)["hostdev:pci:0000:06:00.0"], alias="ua-hostpassd-ours")
        await hypervisor.detach_config(OFF, ours)
        assert stored(tape, OFF).keys() == {ours.id}


async def test_the_live_half_stays_when_the_stored_half_changes(uri: str) -> None:
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        await hypervisor.detach_config(GAMING, stored(tape, GAMING)["hostdev:usb:046d:c52b"])
        assert len(tape.last(GAMING).config) == 1
        assert len(tape.last(GAMING).live) == 2


async def test_of_twins_the_one_meant_goes(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(libvirt.virDomain, "detachDeviceFlags", lambda self, xml, flags: asked.append(xml))
    placed = USB.replace("</source>", "<address bus='1' device='11'/></source>")
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        await hypervisor.attach_config(OFF, placed)
        await hypervisor.attach_config(OFF, USB)
        by_ids, by_place = (stored(tape, OFF)[f"hostdev:usb:046d:c52b{place}"] for place in ("", ":1:11"))
        await hypervisor.detach_config(OFF, by_ids)
        assert stored(tape, OFF).keys() == {by_place.id}
        assert asked == []  # libvirt would have taken the other one
        await hypervisor.detach_config(OFF, by_place)
        assert asked == [by_place.xml]


async def test_a_transient_machine_is_not_made_persistent(uri: str) -> None:
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        with pytest.raises(HypervisorRefused):
            await hypervisor.attach_config(TRANSIENT, PCI)
        await hypervisor.refresh()
        assert not tape.last(TRANSIENT).persistent


async def test_errors_say_what_is_wrong_in_libvirts_words(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(uri, Limits(node_device=0.0)) as (hypervisor, tape):
        await tape.until_listed()
        with pytest.raises(NoSuchMachine):
            await hypervisor.attach_config("aaaaaaaa-2222-3333-4444-00000000000f", USB)
        with pytest.raises((NotSupported, NotAssigned)):  # libvirt 9 cannot; libvirt 11 can, and there is none
            await hypervisor.detach_live(GAMING, "ua-1")
        with pytest.raises(NoSuchDevice, match="pci_0000_99_00_0"):
            await hypervisor.detach_host("pci_0000_99_00_0")
        broken = USB.replace("0x046d", "x")
        with pytest.raises(HypervisorRefused, match=r"libvirt refused: .*vendor") as refused:
            await hypervisor.attach_config(OFF, broken)
        assert "\n" not in str(refused.value)


async def test_a_node_device_that_libvirt_has_not_seen_yet_is_waited_for(uri: str, opened: Opened) -> None:
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        connection, calls = opened.connections[-1], []
        lookup = connection.nodeDeviceLookupByName

        class Node:
            def detachFlags(self, driver: str | None) -> None:
                calls.append("detached")

        def late(name: str) -> Any:
            calls.append("looked")
            return Node() if calls.count("looked") == 3 else lookup("pci_0000_99_00_0")

        connection.nodeDeviceLookupByName = late
        await hypervisor.detach_host("pci_0000_06_00_0")
        assert calls == ["looked", "looked", "looked", "detached"]


@pytest.mark.parametrize("uuid", [GAMING, OFF])
async def test_a_change_that_libvirt_still_works_on_is_waited_out_and_then_the_machine_is_read(
    uri: str, uuid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As QEMU's driver does it: a query waits for the job lock for a time, and then gives up."""
    asked, ends = threading.Event(), threading.Event()
    tried: list[str] = []
    busy = libvirt.libvirtError("cannot acquire state change lock")
    busy.err = (libvirt.VIR_ERR_OPERATION_TIMEOUT, 10, "cannot acquire state change lock", 2, None, None, None, -1, -1)
    stats = libvirt.virDomain.memoryStats

    def query(domain: Any) -> Any:
        tried.append(domain.name())
        if len(tried) == 1:
            raise busy
        asked.set()
        ends.wait(10)
        return stats(domain)

    monkeypatch.setattr(libvirt.virDomain, "memoryStats", query)
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        before = len(tape.events)
        waiting = asyncio.create_task(hypervisor.wait_until_idle(uuid))
        assert await asyncio.to_thread(asked.wait, 10)
        await hypervisor.refresh_machine(GAMING)  # other calls go on
        assert not waiting.done()
        ends.set()
        await waiting
    assert len(set(tried)) == 1 and len(tried) == 2
    read = [event.machine.uuid for event in tape.events[before:] if isinstance(event, MachineRead)]
    assert read == [GAMING, uuid]


async def test_a_driver_without_such_a_lock_is_idle_and_a_machine_that_is_gone_is_told(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = libvirt.libvirtError("this function is not supported")
    unknown.err = (libvirt.VIR_ERR_NO_SUPPORT, 12, "this function is not supported", 2, None, None, None, -1, -1)

    def query(domain: Any) -> Any:
        raise unknown

    monkeypatch.setattr(libvirt.virDomain, "memoryStats", query)
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        await hypervisor.wait_until_idle(GAMING)
        assert isinstance(tape.events[-1], MachineRead)
        with pytest.raises(NoSuchMachine):
            await hypervisor.wait_until_idle("aaaaaaaa-2222-3333-4444-00000000000f")


async def test_a_connection_that_is_lost_meanwhile_says_nothing_of_idle(
    uri: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        connection = opened.connections[-1]

        def query(domain: Any) -> Any:
            connection.isAlive = lambda: 0
            raise libvirt.libvirtError("client socket is closed")

        monkeypatch.setattr(libvirt.virDomain, "memoryStats", query)
        with pytest.raises(HypervisorUnavailable):
            await hypervisor.wait_until_idle(GAMING)


# Losing libvirt and finding it again.


async def test_not_connected_is_an_error_and_no_empty_list(uri: str, opened: Opened) -> None:
    opened.refusals = 10**6
    async with running(uri) as (hypervisor, tape):
        await tape.until(lambda events: events)
        assert isinstance(tape.events[0], HypervisorChanged) and not tape.events[0].connected
        assert "no libvirtd here" in tape.events[0].error
        for call in (hypervisor.refresh(), hypervisor.detach_live(GAMING, "x"), hypervisor.refresh_machine("off")):
            with pytest.raises(HypervisorUnavailable, match="no libvirtd here"):
                await call
        opened.refusals = 0
        await tape.until_listed()
    assert [type(event) for event in tape.events] == [HypervisorChanged, HypervisorChanged, MachinesListed]


async def test_a_lost_connection_is_told_and_comes_back(uri: str, opened: Opened) -> None:
    async with running(uri) as (_, tape):
        await tape.until_listed()
        opened.refusals = 1
        opened.lose(libvirt.VIR_CONNECT_CLOSE_REASON_EOF)
        await tape.until_listed(2)
    changes = [event.connected for event in tape.events if isinstance(event, HypervisorChanged)]
    assert changes == [True, False, False, True]
    assert not any(isinstance(event, MachineGone) for event in tape.events)
    assert opened.closed == opened.connections


async def test_a_call_that_finds_the_connection_dead_ends_as_unavailable(uri: str, opened: Opened) -> None:
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        connection = opened.connections[-1]

        def dead(*_: Any) -> Any:
            connection.isAlive = lambda: 0
            raise libvirt.libvirtError("client socket is closed")

        connection.lookupByUUIDString = dead
        with pytest.raises(HypervisorUnavailable):
            await hypervisor.attach_live(GAMING, USB)
        assert not [e for e in tape.events if isinstance(e, HypervisorChanged)][-1].connected  # told before the error
        await tape.until_listed(2)


async def test_what_waits_for_a_reading_hears_of_the_loss_and_no_event_is_lost(
    uri: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, finish = threading.Event(), threading.Event()
    read = Connection.read

    def stuck(self: Any, uuid: str) -> Any:
        reading.set()
        finish.wait(10)
        return read(self, uuid)

    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        monkeypatch.setattr(Connection, "read", stuck)
        first = asyncio.create_task(hypervisor.refresh_machine(GAMING))
        await asyncio.sleep(0)  # it waits for the very reading in which the connection is lost
        opened.fire(
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, opened.connections[-1].lookupByUUIDString(GAMING), "ua-1"
        )
        assert await asyncio.to_thread(reading.wait, 10)
        waits = [asyncio.create_task(hypervisor.refresh_machine(uuid)) for uuid in (GAMING, OFF)]
        waits += [asyncio.create_task(hypervisor.refresh()), first]
        await asyncio.sleep(0)  # all wait now
        opened.lose(libvirt.VIR_CONNECT_CLOSE_REASON_KEEPALIVE)
        for wait in waits:
            with pytest.raises(HypervisorUnavailable, match="does not answer"):
                async with asyncio.timeout(5):
                    await wait
        finish.set()
        await tape.until(lambda events: DeviceRemoved(MachineKey(uri, GAMING), "ua-1") in events)
        lists = [n for n, event in enumerate(tape.events) if isinstance(event, MachinesListed)]
        assert lists[1] < tape.events.index(DeviceRemoved(MachineKey(uri, GAMING), "ua-1"))


async def test_a_libvirtd_that_does_not_answer_holds_nothing_up(
    uri: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.go.clear()
    async with running(uri, Limits(open=0.01)) as (hypervisor, tape):
        await tape.until(lambda events: events)
        assert "does not answer" in tape.events[0].error  # type: ignore[union-attr, operator]
        with pytest.raises(HypervisorUnavailable):
            await hypervisor.refresh()
        opened.go.set()
        await tape.until_listed()


# Calls that do not return.


class Hang:
    """In the place of a method of libvirt's: a call hangs until it is let go, then it is made, or ends with ERROR."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.error: Exception | None = None
        self.calm = False  # calls from here on do not hang
        self.made = 0
        self._began = threading.Semaphore(0)
        self._go = threading.Event()
        real = getattr(owner, name)

        def hang(*arguments: Any) -> Any:
            self.made += 1
            self._began.release()
            if not self.calm:
                self._go.wait(30)
            if self.error:
                raise self.error
            return real(*arguments)

        monkeypatch.setattr(owner, name, hang)

    async def began(self, count: int = 1) -> None:
        """So many more calls have been made."""
        for _ in range(count):
            assert await asyncio.to_thread(self._began.acquire, timeout=10)

    def let_go(self) -> None:
        self.calm = True
        self._go.set()


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hang]:
    """Definitions of machines: with them this driver's stored halves are changed."""
    made = Hang(monkeypatch, libvirt.virConnect, "defineXML")
    yield made
    made.let_go()


async def given_up(*calls: asyncio.Task[None]) -> None:
    """Whoever made them waits no more."""
    for call in calls:
        call.cancel()
    async with asyncio.timeout(5):
        await asyncio.wait(calls)
    assert all(call.cancelled() for call in calls)


async def hanging(hypervisor: Hypervisor, hang: Hang, count: int) -> list[asyncio.Task[None]]:
    calls = [asyncio.create_task(hypervisor.attach_config(OFF, USB)) for _ in range(count)]
    await hang.began(count)
    return calls


@pytest.mark.parametrize("outcome", ["done", "refused"])
async def test_a_call_that_hangs_can_be_given_up_and_is_waited_out_later(
    uri: str, hang: Hang, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        await given_up(*await hanging(hypervisor, hang, 1))
        await hypervisor.refresh()  # others get on
        await hypervisor.wait_until_returned({GAMING})
        returned = asyncio.create_task(hypervisor.wait_until_returned({GAMING, OFF}))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(returned), 0.1)
        if outcome == "refused":
            hang.error = libvirt.libvirtError("no room")
        hang.let_go()
        await returned
        await hypervisor.wait_until_idle(OFF)
        assert len(tape.last(OFF).config) == (1 if outcome == "done" else 0)
    assert ("no room" if outcome == "refused" else "has ended: done") in caplog.text


async def test_a_node_device_that_hangs_is_waited_for_by_name(uri: str, opened: Opened) -> None:
    go = threading.Event()
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        opened.connections[-1].nodeDeviceLookupByName = lambda name: go.wait(10)
        call = asyncio.create_task(hypervisor.reattach_host("pci_0000_06_00_0"))
        await asyncio.sleep(0)
        await given_up(call)
        await hypervisor.wait_until_returned({"pci_0000_07_00_0"})
        returned = asyncio.create_task(hypervisor.wait_until_returned({"pci_0000_06_00_0"}))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(returned), 0.1)
        go.set()
        await returned


async def test_what_waits_for_a_place_and_is_given_up_is_never_begun(uri: str, hang: Hang) -> None:
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        calls = await hanging(hypervisor, hang, 3)
        late = asyncio.create_task(hypervisor.attach_config(GAMING, PCI))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(late), 0.1)
        await given_up(late)
        hang.let_go()
        await asyncio.wait(calls)
        assert hang.made == 3


async def test_when_too_many_hang_the_connection_is_made_afresh_and_others_get_on(
    uri: str, hang: Hang, opened: Opened
) -> None:
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        calls = await hanging(hypervisor, hang, 3)
        fourth = asyncio.create_task(hypervisor.attach_config(GAMING, PCI))
        await given_up(*calls[:2])
        assert len(opened.connections) == 1 and not fourth.done()
        await given_up(calls[2])
        with pytest.raises(HypervisorUnavailable, match=r"3 calls .* do not return"):
            await fourth
        await tape.until_listed(2)
        hang.calm = True
        await hypervisor.attach_config(OFF, PCI)
        assert len(tape.last(OFF).config) == 1
        assert opened.closed == []  # three calls use it
        await hypervisor.wait_until_returned({OFF})  # of a connection that is lost nothing is known
        hang.let_go()
    assert opened.connections[0] in opened.closed
    assert [event.connected for event in tape.events if isinstance(event, HypervisorChanged)] == [True, False, True]


async def test_calls_that_hang_on_and_on_do_not_use_libvirtd_up(uri: str, hang: Hang, opened: Opened) -> None:
    async with running(uri) as (hypervisor, tape):
        for connections in (1, 2):
            await tape.until_listed(connections)
            await given_up(*await hanging(hypervisor, hang, 3))
        words = "6 calls of libvirt .* do not return; it is tried when one does"
        await tape.until(lambda events: re.search(words, getattr(events[-1], "error", "")))
        assert len(opened.connections) == 2
        hang.let_go()
        await tape.until_listed(3)


async def test_a_machine_on_which_a_call_hangs_is_left_alone_until_it_has_returned(uri: str, hang: Hang) -> None:
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        await given_up(*await hanging(hypervisor, hang, 1))
        later = [asyncio.create_task(hypervisor.attach_config(OFF, PCI)) for _ in range(5)]
        hang.calm = True
        await hypervisor.attach_config(GAMING, USB.replace("0x046d", "0x046e"))  # others get on
        assert hang.made == 2
        await given_up(*later[1:])
        hang.let_go()
        await later[0]
        assert len(tape.last(OFF).config) == 2


class Frozen:
    """Of one machine, or of some: a reading hangs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.go = threading.Event()
        self.began = threading.Event()
        self.readings = 0
        persistent = libvirt.virDomain.isPersistent

        def wait(domain: Any) -> Any:
            if domain.name() in names:
                self.readings += 1
                self.began.set()
                self.go.wait(30)
            return persistent(domain)

        monkeypatch.setattr(libvirt.virDomain, "isPersistent", wait)


async def test_a_machine_that_libvirt_does_not_describe_holds_up_no_other(
    uri: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(uri, Limits(reading=0.05)) as (hypervisor, tape):
        listed = await tape.until_listed()
        frozen = Frozen(monkeypatch, "off")
        reading = asyncio.create_task(hypervisor.refresh_machine(OFF))
        assert await asyncio.to_thread(frozen.began.wait, 10)
        await hypervisor.refresh_machine(GAMING)
        await hypervisor.refresh()
        assert set((await tape.until_listed(2)).machines) == set(listed.machines)
        machine = opened.connections[-1].lookupByUUIDString(OFF)
        opened.fire(libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, machine, "ua-1")
        await hypervisor.attach_config(GAMING, USB.replace("0x046d", "0x046e"))
        assert not reading.done() and frozen.readings == 1
        frozen.go.set()
        await reading
        await tape.until(lambda events: DeviceAdded(MachineKey(hypervisor.uri, OFF), "ua-1") in events)
    later = tape.events[tape.events.index(await tape.until_listed(2)) :]
    assert [type(e) for e in later if getattr(getattr(e, "machine", e), "uuid", "") == OFF][:3] == [
        MachineRead,
        MachineRead,
        DeviceAdded,
    ]


async def test_a_machine_that_libvirt_describes_only_later_is_listed_without_it(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = Frozen(monkeypatch, "off")
    async with running(uri, Limits(reading=0.05)) as (_, tape):
        listed = await tape.until_listed()
        assert {machine.name for machine in listed.machines} == {"gaming", "trans"}
        frozen.go.set()
        await tape.until(lambda events: any(isinstance(event, MachineRead) for event in events))
        assert tape.last(OFF).name == "off"


async def test_a_machine_that_is_not_described_at_all_is_shown_as_it_was(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(uri, Limits(answer=0.1)) as (hypervisor, tape):
        listed = await tape.until_listed()
        frozen = Frozen(monkeypatch, "off")
        with pytest.raises(HypervisorRefused, match="has not answered"):
            await hypervisor.refresh_machine(OFF)
        await hypervisor.refresh()
        assert set((await tape.until_listed(2)).machines) == set(listed.machines)
        frozen.go.set()
        await tape.until(lambda events: isinstance(events[-1], MachineRead))
    assert "could not be read and is shown as it was" in caplog.text


async def test_a_list_that_never_comes_is_told_and_the_connection_is_made_afresh(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(uri, Limits(answer=0.2)) as (hypervisor, tape):
        await tape.until_listed()
        hang = Hang(monkeypatch, libvirt.virConnect, "listAllDomains")
        with pytest.raises(HypervisorUnavailable):
            await hypervisor.refresh()
        lost = [event for event in tape.events if isinstance(event, HypervisorChanged)][1]
        assert (lost.connected, "has not answered" in lost.error) == (False, True)
        hang.calm = True
        await tape.until_listed(2)
        hang.let_go()


async def test_a_name_that_is_never_looked_up_ends_too(
    uri: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    async with running(uri, Limits(answer=0.2)) as (hypervisor, tape):
        await tape.until_listed()
        opened.connections[-1].lookupByName = lambda name: go.wait(10)
        with pytest.raises(HypervisorRefused, match="has not answered"):
            await hypervisor.refresh_machine("nobody")
        go.set()


async def test_waiting_for_idle_can_hang_and_then_others_still_can_wait(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = Hang(monkeypatch, libvirt.virDomain, "memoryStats")
    async with running(uri, Limits(answer=0.2)) as (hypervisor, tape):
        await tape.until_listed()
        first = asyncio.create_task(hypervisor.wait_until_idle(GAMING))
        await hang.began()
        hang.calm = True
        await hypervisor.wait_until_idle(OFF)
        assert not first.done()
        hang.let_go()
        await first


HANGS = """
import asyncio, os, sys, threading
import libvirt
from hostpassd.machines.hypervisor import Hypervisor

async def main():
    listed = asyncio.Event()
    hypervisor = Hypervisor(sys.argv[1], lambda event: listed.set())
    run = asyncio.create_task(hypervisor.run())
    await listed.wait()
    begun = threading.Event()
    setattr(libvirt.virConnect, sys.argv[2], lambda *_: (begun.set(), threading.Event().wait()))
    calls = [hypervisor.attach_config("%s", "%s"), hypervisor.detach_host("x"), hypervisor.refresh()]
    calls = [asyncio.create_task(call) for call in calls]
    await asyncio.to_thread(begun.wait)
    run.cancel()
    await asyncio.wait({run})
    await asyncio.gather(*calls, return_exceptions=True)

asyncio.run(main())
print("over")
""" % (OFF, USB)  # noqa: UP031


@pytest.mark.parametrize("method", ["defineXML", "nodeDeviceLookupByName", "listAllDomains"])
def test_a_call_that_hangs_does_not_keep_the_process_from_ending(uri: str, method: str) -> None:
    command, folder = [sys.executable, "-c", HANGS, uri, method], Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr
    assert done.stderr == ""


# What shows when libvirt has refused.


async def test_what_is_refused_has_been_read_again_before_its_caller_hears(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt can say no to what it has half done."""
    define = libvirt.virConnect.defineXML

    def half(connection: Any, xml: str) -> Any:
        define(connection, xml)
        raise libvirt.libvirtError("it went wrong after all")

    monkeypatch.setattr(libvirt.virConnect, "defineXML", half)
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        with pytest.raises(HypervisorRefused, match="after all"):
            await hypervisor.attach_config(OFF, USB)
        assert len(tape.last(OFF).config) == 1


async def test_a_refusal_whose_effect_cannot_be_read_any_more_is_a_loss(
    uri: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()

        def lost(*_: Any) -> Any:
            opened.connections[-1].isAlive = lambda: 0
            raise libvirt.libvirtError("client socket is closed")

        def refused(xml: str) -> None:
            monkeypatch.setattr(libvirt.virDomain, "state", lost)
            raise libvirt.libvirtError("no room")

        opened.connections[-1].defineXML = refused
        with pytest.raises(HypervisorUnavailable):
            await hypervisor.attach_config(OFF, USB)


async def test_a_machine_that_stops_while_it_is_read_has_no_live_half(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt then describes its stored half where it was asked for the live one."""
    state = libvirt.virDomain.state

    def stops(domain: Any) -> Any:
        was = state(domain)
        if domain.name() == "gaming" and was[0] == libvirt.VIR_DOMAIN_RUNNING:
            domain.destroy()
        return was

    async with running(uri) as (hypervisor, tape):
        await tape.until_listed()
        monkeypatch.setattr(libvirt.virDomain, "state", stops)
        await hypervisor.refresh_machine(GAMING)
        gaming = tape.last(GAMING)
        assert (gaming.state, gaming.active, gaming.live, len(gaming.config)) == ("shut off", False, (), 2)


async def test_a_machine_that_has_crashed_and_is_kept_has_its_devices(tmp_path: Path) -> None:
    (tmp_path / "node.xml").write_text(NODE.replace("<test:runstate>1<", "<test:runstate>6<"))
    async with running(f"test://{tmp_path}/node.xml") as (_, tape):
        await tape.until_listed()
    gaming = tape.last(GAMING)
    assert (gaming.state, gaming.active, len(gaming.live)) == ("crashed", True, 2)
