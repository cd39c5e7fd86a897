"""Running plans against a hypervisor that behaves as libvirt was seen to: failures, undo, waiting, crash."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from hostpassd import errors
from hostpassd.events import DeviceAdded, DeviceSeen, Event, HostUse, HostUsesRead, Job, MachineGone, MachineRead
from hostpassd.host.device import Device
from hostpassd.passthrough.execute import Control, Executor
from hostpassd.passthrough.journal import Journal
from hostpassd.passthrough.operations import Operations, Wish
from hostpassd.passthrough.plan import Options
from hostpassd.state import State
from tests.unit.world import OTHER, URI, UUID, Libvirt, bridge, machine, pci, scsi, state_of, usb

PORT = bridge("0000:00:01.0", group=1)
NIC = pci("0000:01:00.0", PORT, group=2)
PAIR = (pci("0000:04:01.0", group=5), pci("0000:04:02.0", group=5, driver="snd", code=0x040100))
GPU = (
    pci("0000:0a:00.0", group=9, driver="nouveau", code=0x030000, express=True),
    pci("0000:0a:00.1", group=9, driver="snd_hda_intel", code=0x040300, express=True),
)
STICK = usb("1-1", number=3)
LUN = scsi(2, 0, 1, 0)
MACHINES = {"running": machine(), "stopped": machine(running=False), "transient": machine(persistent=False)}


class Died(BaseException):
    """The daemon was killed here."""


class World:
    """State, simulated libvirt, executor and operations, wired as the daemon wires them."""

    def __init__(
        self, folder: Path, given: str = "running", state: State | None = None, libvirt: Libvirt | None = None
    ) -> None:
        self.state = state or state_of(PORT, NIC, *PAIR, *GPU, STICK, LUN)
        self.events: list[Event] = []
        self.libvirt = libvirt or Libvirt(self.state, self.emit_early, MACHINES[given])
        self.libvirt.emit = self.emit
        self.journal = Journal(folder / "journal")
        self.executor = Executor(self.state, lambda uri: self.libvirt, self.settle, self.emit, self.journal)
        self.operations = Operations(self.state, self.executor, self.emit)

    def emit_early(self, event: Event) -> None:
        self.state.apply(event)

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.state.apply(event)
        self.executor.notice(event)

    async def settle(self) -> None:
        await asyncio.sleep(0)

    async def do(self, operation: str, device: Device, timeout: int = 5) -> Job:
        control = await self.start(operation, device, timeout)
        await control.ended.wait()
        return control.job

    async def start(self, operation: str, device: Device, timeout: int = 5) -> Control:
        async def authorise(action: str, details: Mapping[str, str]) -> None:
            pass

        wish = Wish(operation, "vm", device.name, Options(timeout=timeout), 0)
        return await self.operations.start(wish, authorise)

    def truth(self) -> tuple[object, ...]:
        """Drivers, the two halves, what is kept as a detached node device, what the journal says is lent."""
        m = self.state.machines[UUID]
        drivers = tuple(sorted((d.name, d.driver) for d in self.state.devices.values()))
        halves = tuple(tuple(sorted(c.id for c in half)) for half in (m.live, m.stored))
        return drivers, halves, tuple(sorted(self.libvirt.detached)), tuple(sorted(self.journal.lent))


@pytest.mark.parametrize("given", MACHINES)
@pytest.mark.parametrize("device", [NIC, PAIR[0], GPU[1], STICK, LUN], ids=lambda d: d.name)
async def test_there_and_back(tmp_path: Path, given: str, device: Device) -> None:
    world = World(tmp_path, given)
    before = world.truth()
    assert (await world.do("assign", device)).state == "done"
    m = world.state.machines[UUID]
    moved = next((len(group) for group in (PAIR, GPU) if device in group), 1)
    assert len(m.live) == (moved if given != "stopped" else 0)
    assert len(m.stored) == (moved if given != "transient" else 0)
    if device.pci and given != "stopped":
        assert world.state.devices[device.name].driver == "vfio-pci"
    assert (await world.do("dismiss", device)).state == "done"
    assert world.truth() == before


async def test_a_graphics_card_goes_with_its_sound_as_one_card_and_both_drivers_come_back(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert (await world.do("assign", GPU[0])).state == "done"
    m = world.state.machines[UUID]
    assert [c.guest_address for c in m.stored] == ["0000:01:00.0", "0000:01:00.1"]
    assert ["multifunction" in c.xml for c in m.stored] == [True, False]
    assert [world.state.devices[d.name].driver for d in GPU] == ["vfio-pci", "vfio-pci"]
    job = await world.do("dismiss", GPU[1])
    assert job.state == "done"
    assert [world.state.devices[d.name].driver for d in GPU] == ["nouveau", "snd_hda_intel"]
    m = world.state.machines[UUID]
    assert m.live == m.stored == ()


async def test_the_last_attach_of_a_group_fails_and_everything_is_as_before(tmp_path: Path) -> None:
    world = World(tmp_path)
    before = world.truth()
    world.libvirt.ports = 1
    job = await world.do("assign", PAIR[0])
    assert (job.state, job.error_name) == ("failed", "org.hostpassd1.Error.HypervisorRefused")
    assert "No more available PCI slots" in job.error_message
    assert world.truth() == before


@pytest.mark.parametrize("device", [NIC, PAIR[0], STICK], ids=lambda d: d.name)
async def test_every_call_that_fails_is_undone(tmp_path: Path, device: Device) -> None:
    """Each libvirt call in turn; they are counted in a run that works, so a new one joins by itself."""
    works = World(tmp_path)
    await works.do("assign", device)
    for at in range(len(works.libvirt.calls)):
        folder = tmp_path / str(at)
        folder.mkdir()
        world = World(folder)
        before = world.truth()
        world.libvirt.fail = lambda call, at=at, w=world: len(w.libvirt.calls) == at + 1  # type: ignore[misc]
        job = await world.do("assign", device)
        assert job.state == "failed", works.libvirt.calls[at]
        assert world.truth() == before, works.libvirt.calls[at]


async def test_a_card_that_is_in_one_slot_of_the_running_machine_stays_and_the_answer_says_what_to_do(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    await world.do("assign", NIC)
    words = "operation failed: cannot hot unplug multifunction PCI device: hostdev0"
    world.libvirt.refuse = {"detach_live": words}
    job = await world.do("dismiss", NIC)
    assert (job.state, job.error_name) == ("failed", "org.hostpassd1.Error.HypervisorRefused")
    assert words in job.error_message and "live=false" in job.error_message
    assert not next(iter(world.state.holds_on(NIC.name))).releasing


async def test_assign_waits_for_the_added_event(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.libvirt.withhold = True
    control = await world.start("assign", STICK)
    while "attach_live" not in world.libvirt.calls:
        await asyncio.sleep(0)
    assert world.state.machines[UUID].live and not control.ended.is_set()
    world.emit(DeviceAdded(UUID, "ua-of-somebody-else"))
    await asyncio.sleep(0)
    assert not control.ended.is_set()
    world.emit(DeviceAdded(UUID, world.state.machines[UUID].live[0].alias))
    await control.ended.wait()
    assert control.job.state == "done"


async def test_an_assign_that_is_never_confirmed_is_undone(tmp_path: Path) -> None:
    world = World(tmp_path)
    before = world.truth()
    world.libvirt.withhold = True
    job = await world.do("assign", PAIR[0], timeout=1)
    assert (job.state, job.error_name) == ("failed", "org.hostpassd1.Error.TimedOut")
    assert world.truth() == before


async def test_a_guest_that_keeps_a_device_is_told_of_and_the_drivers_come_back_when_it_is_destroyed(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    before = world.truth()
    await world.do("assign", PAIR[0])
    world.libvirt.stubborn = True
    job = await world.do("dismiss", PAIR[0], timeout=1)
    assert (job.state, job.error_name) == ("failed", "org.hostpassd1.Error.GuestDidNotRelease")
    hold = next(iter(world.state.holds_on(PAIR[0].name)))
    assert (hold.live, hold.config, hold.releasing) == (True, False, True)
    world.libvirt.destroy(UUID)
    await world.executor.give_back_idle()
    assert world.truth()[0] == before[0] and world.truth()[3] == ()


async def test_cancel_while_queued_and_while_waiting_for_the_guest(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.do("assign", PAIR[0])
    world.libvirt.stubborn = True
    waiting = await world.start("dismiss", PAIR[0])
    queued = await world.start("dismiss", PAIR[1])
    while waiting.job.state != "waiting-for-guest":
        await asyncio.sleep(0)
    assert queued.job.state == "queued"
    queued.cancelled.set()
    await queued.ended.wait()
    assert queued.job.state == "cancelled"
    waiting.cancelled.set()
    await waiting.ended.wait()
    assert waiting.job.state == "cancelled" and len(world.state.machines[UUID].live) == len(PAIR)


async def test_two_callers_on_one_group_never_make_half_a_group(tmp_path: Path) -> None:
    world = World(tmp_path)
    one, two = await world.start("assign", PAIR[0]), await world.start("assign", PAIR[1])
    await asyncio.gather(one.ended.wait(), two.ended.wait())
    assert sorted((one.job.state, two.job.state)) == ["done", "failed"]
    failed = one if one.job.state == "failed" else two
    assert failed.job.error_name == "org.hostpassd1.Error.AlreadyAssigned"
    assert len(world.state.machines[UUID].live) == len(PAIR)


async def test_a_replug_between_prompt_and_job_is_a_stale_plan(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def authorise(action: str, details: Mapping[str, str]) -> None:
        world.emit(DeviceSeen(usb("1-1", number=9)))

    with pytest.raises(errors.StalePlan):
        await world.operations.start(Wish("assign", "vm", STICK.name, Options(), 0), authorise)
    assert world.libvirt.calls == []


@pytest.mark.parametrize(
    "event",
    [
        MachineRead(machine(running=False)),
        MachineRead(machine("renamed")),
        HostUsesRead({LUN.name: (HostUse("mount", "/srv"),)}),
        DeviceSeen(dataclasses.replace(LUN, label="another label")),
    ],
    ids=["stopped", "renamed", "mounted", "relabelled"],
)
async def test_whatever_changes_during_the_prompt_is_not_what_was_authorised(tmp_path: Path, event: Event) -> None:
    world = World(tmp_path)
    asked: list[str] = []

    async def authorise(action: str, details: Mapping[str, str]) -> None:
        asked.append(action)
        world.emit(event)

    options = Options(override=frozenset({"mounted"}))
    with pytest.raises((errors.StalePlan, errors.NoSuchMachine)):
        await world.operations.start(Wish("assign", "vm", LUN.name, options, 0), authorise)
    assert world.libvirt.calls == [] and asked == ["org.hostpassd1.assign"]


async def test_a_queued_job_does_not_go_to_another_machine_of_that_name(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.executor.lock("group 2"):
        control = await world.start("assign", NIC)
        world.emit(MachineGone(UUID))
        world.emit(MachineRead(machine("vm", OTHER)))
    await control.ended.wait()
    assert control.job.error_name == "org.hostpassd1.Error.StalePlan" and world.libvirt.calls == []


async def test_a_queued_job_does_not_go_past_a_blocker_that_nobody_authorised(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def authorise(action: str, details: Mapping[str, str]) -> None:
        assert action == "org.hostpassd1.assign"

    async with world.executor.lock(LUN.name):
        options = Options(override=frozenset({"mounted"}))
        control = await world.operations.start(Wish("assign", "vm", LUN.name, options, 0), authorise)
        world.emit(HostUsesRead({LUN.name: (HostUse("mount", "/srv"),)}))
    await control.ended.wait()
    assert control.job.error_name == "org.hostpassd1.Error.StalePlan" and world.libvirt.calls == []


def _die(world: World, at: int, when: str) -> Callable[[str], None]:
    def kill(call: str) -> None:
        if len(world.libvirt.calls) == at + 1:
            raise Died(f"{when} {call}")

    return kill


@pytest.mark.parametrize("operation", ["assign", "dismiss"])
@pytest.mark.parametrize("device", [NIC, PAIR[0], STICK], ids=lambda d: d.name)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_killed_at_every_step_it_recovers_to_a_clean_state(
    tmp_path: Path, operation: str, device: Device, when: str
) -> None:
    """The kill matrix: dies before and after each libvirt call, a new daemon on the same truth recovers."""

    async def prepared(name: str) -> World:
        folder = tmp_path / name
        folder.mkdir()
        world = World(folder)
        if operation == "dismiss":
            await world.do("assign", device)
        world.libvirt.calls.clear()
        return world

    works = await prepared("works")
    before = works.truth()
    await works.do(operation, device)
    after = works.truth()
    assert works.libvirt.calls
    for at in range(len(works.libvirt.calls)):
        world = await prepared(str(at))
        setattr(world.libvirt, when, _die(world, at, when))
        await world.start(operation, device)
        ends = await asyncio.gather(*world.operations._tasks, return_exceptions=True)
        assert any(isinstance(end, Died) for end in ends)
        setattr(world.libvirt, when, lambda call: None)
        reborn = World(tmp_path / str(at), state=world.state, libvirt=world.libvirt)
        await reborn.operations.recover(reborn.journal)
        assert reborn.truth() in (before, after), f"{when} {works.libvirt.calls[at]}"
        assert reborn.journal.unfinished == ()


def test_the_uri_is_the_machines() -> None:
    assert MACHINES["running"].uri == URI
