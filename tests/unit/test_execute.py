"""Running plans against a hypervisor that behaves as libvirt was seen to: failures, undo, waiting, crash."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hostpassd import errors
from hostpassd.model.device import Device
from hostpassd.model.events import (
    DeviceAdded,
    DeviceGone,
    DeviceSeen,
    Event,
    HostUsesRead,
    HypervisorChanged,
    MachineGone,
    MachineRead,
    MachinesListed,
    host_use,
)
from hostpassd.model.job import Job
from hostpassd.passthrough.assign import Assign
from hostpassd.passthrough.execute import Executor
from hostpassd.passthrough.intents import IntentLog
from hostpassd.passthrough.jobs import RunningJob
from hostpassd.passthrough.operations import Operations
from hostpassd.passthrough.permission import Check
from hostpassd.passthrough.request import Options
from hostpassd.state import State
from tests.sim.world import (
    KEY,
    OTHER,
    REQUESTS,
    URI,
    UUID,
    Libvirt,
    bridge,
    error_name,
    hostdev,
    machine,
    pci,
    scsi,
    state_of,
    usb,
)

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


# No instance is given twice, over restarts of daemons.
_INSTANCES = itertools.count(1000, 1000)


class Died(BaseException):
    """The daemon was killed here."""


class World:
    """State, simulated libvirt, executor and operations, wired as the daemon wires them."""

    def __init__(self, folder: Path, given: str = "running", libvirt: Libvirt | None = None) -> None:
        self.state = state_of(PORT, NIC, *PAIR, *GPU, STICK, LUN)
        if libvirt:  # the host and the machines are as they were; the daemon is new, and so are its instances
            self.state = State(first_instance=next(_INSTANCES))
            self.state.apply(libvirt.host.scan())
        self.events: list[Event] = []
        self.libvirt = libvirt or Libvirt(self.state.devices.values(), self.emit_early, MACHINES[given])
        self.libvirt.emit = self.emit
        self.intents = IntentLog(folder / "intents", (URI,))
        self.executor = Executor(self.state, lambda uri: self.libvirt, self.settle, self.emit, self.intents)
        self.operations = Operations(self.state, self.executor, self.emit, self.intents)

    def emit_early(self, event: Event) -> None:
        self.state.apply(event)

    def emit(self, event: Event) -> None:
        self.libvirt.host_told.hear(event)
        self.events.append(event)
        batches = self.state.apply(event)
        self.executor.notice(event, batches)
        self.operations.notice(event, batches)

    async def settle(self) -> None:
        await asyncio.sleep(0)

    async def do(self, operation: str, device: Device, timeout: int = 5) -> Job:
        control = await self.start(operation, device, timeout)
        await control.ended.wait()
        return control.job

    async def start(self, operation: str, device: Device, timeout: int = 5) -> RunningJob:
        async def authorise(checks: Sequence[Check]) -> None:
            pass

        request = REQUESTS[operation]("vm", (device.name,), Options(timeout=timeout), 0)
        return await self.operations.start(request, authorise)

    async def quiet(self) -> None:
        """Waits until what is put in order after jobs is; nothing must be left waiting then."""
        while busy := upkeep(self):
            await asyncio.wait(busy)
        self.libvirt.finish()
        assert self.executor.waiting.is_idle and not self.operations.running
        assert not self.executor.locked

    def truth(self) -> tuple[object, ...]:
        """Drivers, the two halves, what is kept as a detached node device, what the intent log says is lent."""
        m = self.libvirt.machines[UUID]
        drivers = tuple(sorted((d.name, d.driver) for d in self.state.devices.values()))
        halves = tuple(tuple(sorted(c.id for c in half)) for half in (m.live, m.config))
        return drivers, halves, tuple(sorted(self.libvirt.detached)), tuple(sorted(self.intents.lent))


@pytest.fixture(autouse=True)
async def nothing_is_left_running() -> AsyncIterator[None]:
    yield
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def upkeep(world: World) -> set[asyncio.Task[None]]:
    """What puts in order what jobs left."""
    return world.operations.upkeep.tasks


@pytest.mark.parametrize("given", MACHINES)
@pytest.mark.parametrize("device", [NIC, PAIR[0], GPU[1], STICK, LUN], ids=lambda d: d.name)
async def test_there_and_back(tmp_path: Path, given: str, device: Device) -> None:
    world = World(tmp_path, given)
    before = world.truth()
    assert (await world.do("assign", device)).state == "done"
    m = world.state.machines[UUID]
    moved = next((len(group) for group in (PAIR, GPU) if device in group), 1)
    assert len(m.live) == (moved if given != "stopped" else 0)
    assert len(m.config) == (moved if given != "transient" else 0)
    if device.pci and given != "stopped":
        assert world.state.devices[device.name].driver == "vfio-pci"
    assert (await world.do("dismiss", device)).state == "done"
    assert world.truth() == before


async def test_a_graphics_card_goes_with_its_sound_as_one_card_and_both_drivers_come_back(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert (await world.do("assign", GPU[0])).state == "done"
    m = world.state.machines[UUID]
    assert [c.guest_address for c in m.config] == ["0000:01:00.0", "0000:01:00.1"]
    assert ["multifunction" in c.xml for c in m.config] == [True, False]
    assert [world.state.devices[d.name].driver for d in GPU] == ["vfio-pci", "vfio-pci"]
    job = await world.do("dismiss", GPU[1])
    assert job.state == "done"
    assert [world.state.devices[d.name].driver for d in GPU] == ["nouveau", "snd_hda_intel"]
    m = world.state.machines[UUID]
    assert m.live == m.config == ()


async def test_the_last_attach_of_a_group_fails_and_everything_is_as_before(tmp_path: Path) -> None:
    world = World(tmp_path)
    before = world.truth()
    world.libvirt.ports = 1
    job = await world.do("assign", PAIR[0])
    assert (job.state, error_name(job)) == ("failed", "org.hostpassd1.Error.HypervisorRefused")
    assert "No more available PCI slots" in str(job.error)
    assert world.truth() == before


async def test_a_card_that_is_in_one_slot_of_the_running_machine_stays(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.do("assign", NIC)
    before = world.truth()
    words = "operation failed: cannot hot unplug multifunction PCI device: hostdev0"
    world.libvirt.refuse_calls = {"detach_live": words}
    job = await world.do("dismiss", NIC)
    assert (job.state, error_name(job)) == ("failed", "org.hostpassd1.Error.HypervisorRefused")
    assert words in str(job.error)
    assert not next(iter(world.state.holds_on(NIC.name))).releasing
    assert world.truth() == before


AWAY = "qemu+ssh://away/system"


async def test_a_job_stays_with_its_hypervisor_when_another_ones_machine_gets_the_path(tmp_path: Path) -> None:
    """Both have the UUID: what the other tells, and is asked for by others, is not about this one."""
    world = World(tmp_path)
    world.libvirt.withhold = True
    control = await world.start("assign", STICK)
    while "attach_live" not in world.libvirt.calls:
        await asyncio.sleep(0)
    alias = world.libvirt.machines[UUID].live[0].alias
    away = machine("copy", live=(hostdev(NIC, alias),), uri=AWAY)
    world.libvirt.destroy(UUID)
    for event in (HypervisorChanged(AWAY, True), MachinesListed(AWAY, (away,)), DeviceAdded(away.key, alias)):
        world.emit(event)
    await asyncio.sleep(0)
    assert world.state.machines[UUID].uri == AWAY and not control.ended.is_set()
    control.cancelled.set()
    await control.ended.wait()
    assert control.job.state == "cancelled"
    # What is undone is undone here: the copy has the alias still.
    assert world.libvirt.machines[UUID].config == () and world.state.copies[away.key].live
    assert world.intents.unfinished == ()


async def test_a_plan_and_a_permission_are_of_one_hypervisors_machine(tmp_path: Path) -> None:
    world = World(tmp_path)
    request = Assign("vm", (STICK.name,), Options(), 0)
    plan = request.plan(world.state)

    async def authorise(checks: Sequence[Check]) -> None:
        world.libvirt.destroy(UUID)
        world.emit(MachineRead(dataclasses.replace(machine(), uri=AWAY)))

    with pytest.raises(errors.StalePlan):
        await world.operations.start(request, authorise)
    assert request.plan(world.state).token != plan.token


async def test_assign_waits_for_the_added_event(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.libvirt.withhold = True
    control = await world.start("assign", STICK)
    while "attach_live" not in world.libvirt.calls:
        await asyncio.sleep(0)
    assert world.state.machines[UUID].live and not control.ended.is_set()
    world.emit(DeviceAdded(KEY, "ua-of-somebody-else"))
    await asyncio.sleep(0)
    assert not control.ended.is_set()
    world.emit(DeviceAdded(KEY, world.state.machines[UUID].live[0].alias))
    await control.ended.wait()
    assert control.job.state == "done"


async def test_an_assign_that_is_never_confirmed_is_undone(tmp_path: Path) -> None:
    world = World(tmp_path)
    before = world.truth()
    world.libvirt.withhold = True
    job = await world.do("assign", PAIR[0], timeout=1)
    assert (job.state, error_name(job)) == ("failed", "org.hostpassd1.Error.TimedOut")
    assert world.truth() == before


async def test_a_guest_that_keeps_a_device_is_told_of_and_the_drivers_come_back_when_it_is_destroyed(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    before = world.truth()
    await world.do("assign", PAIR[0])
    world.libvirt.stubborn = True
    job = await world.do("dismiss", PAIR[0], timeout=1)
    assert (job.state, error_name(job)) == ("failed", "org.hostpassd1.Error.GuestDidNotRelease")
    hold = next(iter(world.state.holds_on(PAIR[0].name)))
    assert (hold.live, hold.config, hold.releasing) == (True, False, True)
    world.libvirt.destroy(UUID)
    await world.quiet()
    assert world.truth()[0] == before[0] and world.truth()[3] == ()


def held_by_others(world: World) -> None:
    """The pair is in the machine, in both halves, and hostpassd has not put it there."""
    held = tuple(hostdev(device, f"hostdev{n}") for n, device in enumerate(PAIR))
    for device in PAIR:
        world.emit(DeviceSeen(dataclasses.replace(device, driver="vfio-pci")))
    world.libvirt.machines[UUID] = machine(live=held, config=held)
    world.libvirt.come_back()


@pytest.mark.parametrize("given_up", ["timed out", "cancelled"])
@pytest.mark.parametrize("restarted", [False, True])
async def test_a_guest_that_lets_go_late_ends_the_hold_and_the_drivers_come_back_with_the_last(
    tmp_path: Path, given_up: str, restarted: bool
) -> None:
    world = World(tmp_path)
    home = world.truth()
    held_by_others(world)
    world.libvirt.stubborn = True
    control = await world.start("dismiss", PAIR[0], timeout=1 if given_up == "timed out" else 20)
    while control.job.state != "waiting-for-guest":
        await asyncio.sleep(0)
    if given_up == "cancelled":
        control.cancelled.set()
    await control.ended.wait()
    assert f"{PAIR[1].name} was not asked for and stays" in str(control.job.error)
    await world.quiet()
    if restarted:
        world = await reborn(world, tmp_path)
    first, second = (next(iter(world.state.holds_on(device.name))) for device in PAIR)
    assert (first.live, first.config, first.releasing) == (True, False, not restarted)
    assert (second.live, second.config, second.releasing) == (True, False, False)
    world.libvirt.release(UUID, "hostdev0")
    await world.quiet()
    assert not list(world.state.holds_on(PAIR[0].name))
    assert list(world.state.holds_on(PAIR[1].name)) == [second]
    assert world.state.devices[PAIR[0].name].driver == ""  # its group is still the machine's
    world.libvirt.stubborn = False
    assert (await world.do("dismiss", PAIR[1])).state == "done"
    await world.quiet()
    assert world.truth() == home


async def test_an_alias_that_another_device_has_at_the_moment_of_asking_is_not_asked_for(tmp_path: Path) -> None:
    world = World(tmp_path)
    held = hostdev(STICK, "hostdev0")
    world.libvirt.put(machine(live=(held,), config=(held,)))
    others = (hostdev(LUN, "hostdev0"),)

    def exchange(call: str) -> None:
        if call == "detach_config":
            world.libvirt.put(dataclasses.replace(world.libvirt.machines[UUID], live=others))

    world.libvirt.after = exchange
    assert (await world.do("dismiss", STICK)).state == "done"
    assert world.libvirt.machines[UUID].live == others and "detach_live" not in world.libvirt.calls


async def left_undone(folder: Path) -> World:
    """An assign of the stick has failed, and cannot be undone."""
    world = World(folder)
    world.libvirt.refuse_calls = {"attach_live": "no", "detach_config": "never"}
    await world.do("assign", STICK)
    await world.quiet()
    world.libvirt.calls.clear()
    return world


async def test_a_list_that_anybody_asks_for_has_nothing_tried_again(tmp_path: Path) -> None:
    world = await left_undone(tmp_path)
    world.emit(MachinesListed(URI, tuple(world.libvirt.machines.values())))
    await world.quiet()
    assert world.libvirt.calls == [] and world.intents.unfinished
    world.libvirt.lose()
    world.libvirt.come_back()
    await world.quiet()
    assert "detach_config" in world.libvirt.calls


async def test_what_was_left_is_tried_again_after_pauses_that_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def soon(delay: float, *args: Any) -> asyncio.TimerHandle:
        if args[0] == world.operations.upkeep.retry_now:
            asked.append(delay)
            delay = 0.0 if len(asked) < 9 else delay
        return call_later(delay, *args)

    world = World(tmp_path)
    monkeypatch.setattr(loop, "call_later", soon)
    world.libvirt.refuse_calls = {"attach_live": "no", "detach_config": "never"}
    await world.do("assign", STICK)
    while len(asked) < 9:
        await asyncio.sleep(0)
    assert asked == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
    world.libvirt.calm()
    world.operations.upkeep.retry_now()
    await world.quiet()
    assert world.intents.unfinished == () and world.libvirt.machines[UUID].config == ()


async def test_a_device_that_cannot_be_given_back_is_tried_after_pauses_that_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def short(delay: float) -> None:
        if delay:
            pauses.append(delay)
        await sleep(0)

    world = World(tmp_path)
    await world.intents.lend(NIC.name, URI, "e1000e")
    world.emit(DeviceSeen(dataclasses.replace(NIC, driver="vfio-pci")))
    world.libvirt.refuse_calls = {"reattach_host": "no"}
    monkeypatch.setattr(asyncio, "sleep", short)
    for _ in range(8):
        world.operations.upkeep.tidy_soon(retry=False)
        while busy := upkeep(world):
            await asyncio.wait(busy)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60] and len(caplog.messages) == 1
    world.libvirt.calm()
    world.operations.upkeep.tidy_soon(retry=False)
    await world.quiet()
    assert world.state.devices[NIC.name].driver == "e1000e" and not world.intents.lent


async def test_a_failure_that_stays_the_same_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = await left_undone(tmp_path)
    for _ in range(3):
        world.operations.upkeep.retry_now()
        await world.quiet()
    assert [text.partition(":")[0] for text in caplog.messages] == [
        "An earlier assign was not finished",
        "Of the earlier assign this could not be done",
    ]
    world.libvirt.refuse_calls = {"detach_config": "not now"}
    world.operations.upkeep.retry_now()
    await world.quiet()
    assert "not now" in caplog.messages[-1] and len(caplog.messages) == 3


async def test_a_log_that_cannot_be_written_has_nothing_else_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostpassd.passthrough.upkeep.LOG_RETRY", 0.0)
    world = await left_undone(tmp_path)
    attempts: list[None] = []

    async def fail() -> None:
        attempts.append(None)
        raise errors.StateFolderError("the disk is full")

    monkeypatch.setattr(world.intents, "catch_up", fail)
    world.intents.trouble.set()
    keeping = asyncio.create_task(world.operations.upkeep.keep_log())
    while len(attempts) < 5:
        await asyncio.sleep(0)
    assert world.libvirt.calls == [] and not upkeep(world)
    world.intents.trouble.clear()
    keeping.cancel()


async def test_a_guest_asked_before_is_waited_for_when_it_is_asked_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    home = world.truth()
    await world.do("assign", NIC)
    world.libvirt.stubborn = True
    first = await world.start("dismiss", NIC)
    while first.job.state != "waiting-for-guest":
        await asyncio.sleep(0)
    first.cancelled.set()
    await first.ended.wait()
    assert "can still let go" in str(first.job.error)
    second = await world.start("dismiss", NIC)
    while second.job.state != "waiting-for-guest":
        await asyncio.sleep(0)
    world.libvirt.release(UUID, world.state.machines[UUID].live[0].alias)
    await second.ended.wait()
    assert second.job.state == "done"
    assert world.truth() == home


async def test_when_the_guest_has_let_go_a_cancel_comes_too_late_to_keep_the_driver_from_the_host(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    home = world.truth()
    await world.do("assign", NIC)
    control = await world.start("dismiss", NIC)
    world.libvirt.after = lambda call: control.cancelled.set() if call == "detach_live" else None
    await control.ended.wait()
    assert control.job.state == "done"
    assert world.truth() == home


@pytest.mark.parametrize("operation", ["assign", "dismiss"])
async def test_an_event_that_is_lost_with_the_connection_is_made_up_for_by_the_list(
    tmp_path: Path, operation: str
) -> None:
    world = World(tmp_path)
    if operation == "dismiss":
        await world.do("assign", STICK)
    world.libvirt.withhold = world.libvirt.stubborn = True
    control = await world.start(operation, STICK)
    call = "attach_live" if operation == "assign" else "detach_live"
    while world.libvirt.calls[-1:] != [call]:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    world.libvirt.lose()
    if operation == "dismiss":
        world.libvirt.release(UUID, world.libvirt.machines[UUID].live[0].alias)
    await asyncio.sleep(0)
    assert not control.ended.is_set()
    world.libvirt.come_back()
    await control.ended.wait()
    assert control.job.state == "done"


async def test_a_dismissal_given_up_while_libvirt_is_away_is_not_gone_on_with(tmp_path: Path) -> None:
    world = World(tmp_path)
    held_by_others(world)
    world.libvirt.stubborn = True
    control = await world.start("dismiss", PAIR[0])
    while world.libvirt.calls[-1:] != ["detach_live"]:
        await asyncio.sleep(0)
    await asyncio.sleep(0)  # now the guest is waited for
    world.libvirt.lose()
    control.cancelled.set()
    await control.ended.wait()
    assert control.job.state == "cancelled"
    world.libvirt.calls.clear()
    world.libvirt.come_back()
    await world.quiet()
    assert world.libvirt.calls == [] and world.intents.unfinished == ()


# What could not be undone.


async def left_with_a_stored_half(folder: Path) -> World:
    """An assign whose attach was refused, and the undoing of what it had stored, too."""
    world = World(folder)
    world.libvirt.refuse_calls = {"attach_live": "no", "detach_config": "never"}
    job = await world.do("assign", NIC)
    assert "not undone: remove pci_0000_01_00_0" in str(job.error) and "never" in str(job.error)
    await world.quiet()
    assert len(world.intents.unfinished) == 1 and world.libvirt.machines[UUID].config
    return world


@pytest.mark.parametrize("undone", [True, False])
async def test_the_next_job_on_the_device_tries_once_more_and_then_its_own_word_counts(
    tmp_path: Path, undone: bool
) -> None:
    world = await left_with_a_stored_half(tmp_path)
    world.libvirt.refuse_calls = {} if undone else {"detach_config": "never"}
    world.libvirt.calls.clear()
    assert (await world.do("assign", NIC)).state == "done"
    expected = ["attach_config", "attach_live"] if undone else ["attach_live"]
    assert world.libvirt.calls == ["wait_until_idle", "detach_config", *expected]
    assert world.intents.unfinished == ()
    assigned = world.truth()
    world.libvirt.calm()
    world.libvirt.come_back()
    await world.quiet()
    assert world.truth() == assigned


async def test_what_is_left_outlives_other_jobs_and_daemons_whose_jobs_have_the_same_numbers(tmp_path: Path) -> None:
    world = await left_with_a_stored_half(tmp_path)
    for _ in range(2):
        world.libvirt.refuse_calls = {"detach_config": "never"}
        world = World(tmp_path, libvirt=world.libvirt)
        world.libvirt.come_back()
        job = await world.do("assign" if not world.libvirt.machines[UUID].live else "dismiss", STICK)
        assert job.number == 1
        await world.quiet()
        (left,) = world.intents.unfinished
        assert [step.device for step in left.steps] == [NIC.name, NIC.name]
    world = await reborn(world, tmp_path)
    assert world.intents.unfinished == () and not [c for c in world.libvirt.machines[UUID].config if "pci" in c.id]


@pytest.mark.parametrize(
    ("driver", "vfio_device", "back"),
    [("e1000e", "", True), ("", "", False), ("vfio-pci", "vfio0", False), ("mlx5_vfio_pci", "vfio0", False)],
)
async def test_a_device_on_any_driver_of_vfio_is_not_back_yet(
    tmp_path: Path, driver: str, vfio_device: str, back: bool
) -> None:
    world = World(tmp_path)
    assert NIC.pci
    facts = (dataclasses.replace(NIC.pci, vfio_device=vfio_device),)
    world.emit(DeviceSeen(dataclasses.replace(NIC, driver=driver, facts=facts)))
    assert world.executor.loans.has_host_driver(NIC.name) == back


async def test_what_was_freed_and_then_pulled_out_is_owed_to_nobody(tmp_path: Path) -> None:
    world = World(tmp_path)

    def lose() -> None:
        world.libvirt.lose()
        world.emit(DeviceGone(PAIR[0].sysfs_path))

    at_call(world, 2, "before", lose)
    await world.do("assign", PAIR[0])
    assert world.libvirt.calls[2:] == ["detach_host"] and PAIR[0].name in world.intents.lent
    world.libvirt.calm()
    world.libvirt.come_back()
    await world.quiet()
    assert world.intents.unfinished == () and world.intents.lent == {}
    assert "reattach_host" not in world.libvirt.calls


async def test_what_is_left_on_a_machine_that_is_gone_is_over(tmp_path: Path) -> None:
    world = await left_with_a_stored_half(tmp_path)
    del world.libvirt.machines[UUID]
    world = await reborn(world, tmp_path)
    assert world.intents.unfinished == ()


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
    assert error_name(failed.job) == "org.hostpassd1.Error.AlreadyAssigned"
    assert len(world.state.machines[UUID].live) == len(PAIR)


async def test_a_replug_between_prompt_and_job_is_a_stale_plan(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def authorise(checks: Sequence[Check]) -> None:
        world.emit(DeviceSeen(usb("1-1", number=9)))

    with pytest.raises(errors.StalePlan):
        await world.operations.start(Assign("vm", (STICK.name,), Options(), 0), authorise)
    assert world.libvirt.calls == []


@pytest.mark.parametrize(
    "event",
    [
        MachineRead(machine(running=False)),
        MachineRead(machine("renamed")),
        HostUsesRead({LUN.name: (host_use("mount", mount_points=("/srv",)),)}),
        DeviceSeen(dataclasses.replace(LUN, label="another label")),
    ],
    ids=["stopped", "renamed", "mounted", "relabelled"],
)
async def test_whatever_changes_during_the_prompt_is_not_what_was_authorised(tmp_path: Path, event: Event) -> None:
    world = World(tmp_path)
    asked: list[str] = []

    async def authorise(checks: Sequence[Check]) -> None:
        asked.extend(action for action, _ in checks)
        world.emit(event)

    options = Options(override=frozenset({"mounted"}))
    with pytest.raises((errors.StalePlan, errors.NoSuchMachine)):
        await world.operations.start(Assign("vm", (LUN.name,), options, 0), authorise)
    assert world.libvirt.calls == [] and asked == ["assign"]


async def test_what_somebody_else_stores_meanwhile_is_not_undone(tmp_path: Path) -> None:
    world = World(tmp_path)
    foreign = hostdev(NIC, alias="")

    def store(call: str) -> None:
        if call == "attach_config":
            m = world.libvirt.machines[UUID]
            world.libvirt.machines[UUID] = dataclasses.replace(m, config=(foreign,))
            world.emit(MachineRead(world.libvirt.machines[UUID]))

    world.libvirt.before = store
    job = await world.do("assign", NIC)
    assert error_name(job) == "org.hostpassd1.Error.AlreadyAssigned"
    assert world.libvirt.machines[UUID].config == (foreign,) and "detach_config" not in world.libvirt.calls


async def test_the_undo_of_a_lone_device_ends_when_its_driver_is_back(tmp_path: Path) -> None:
    world = World(tmp_path)
    bind, late = world.libvirt.host.bind, []

    def bind_later(name: str, driver: str) -> None:
        late.append(driver)
        bind(name, driver if driver == "vfio-pci" else "")
        if driver != "vfio-pci":
            asyncio.get_running_loop().call_later(0.05, bind, name, driver)

    world.libvirt.host.bind = bind_later  # type: ignore[method-assign]
    world.libvirt.withhold = True
    job = await world.do("assign", NIC, timeout=1)
    assert error_name(job) == "org.hostpassd1.Error.TimedOut" and late == ["vfio-pci", "e1000e"]
    assert world.state.devices[NIC.name].driver == "e1000e"


async def test_a_device_whose_home_is_vfio_goes_back_to_it(tmp_path: Path) -> None:
    world = World(tmp_path)
    for device in PAIR:
        world.emit(DeviceSeen(dataclasses.replace(world.state.devices[device.name], driver="vfio-pci")))
        world.libvirt.home[device.name] = "vfio-pci"
    assert (await world.do("assign", PAIR[0])).state == "done"
    job = await world.do("dismiss", PAIR[0])
    assert job.state == "done", str(job.error)
    assert world.libvirt.machines[UUID].live == () and world.intents.lent == {}


async def test_a_stick_and_its_controller_are_not_handed_out_at_once(tmp_path: Path) -> None:
    controller = pci("0000:0c:00.0", group=20, code=0x0C0330)
    stick = usb("5-1", usb("usb5", controller, number=1, device_class=9), number=7, vendor=0x1111)
    world = World(tmp_path)
    for device in (controller, usb("usb5", controller, number=1, device_class=9), stick):
        world.emit(DeviceSeen(device))
        world.libvirt.home[device.name] = device.driver

    async def authorise(checks: Sequence[Check]) -> None:
        pass

    other = machine("other", OTHER)
    world.libvirt.machines[OTHER] = other
    world.emit(MachineRead(other))
    one = await world.start("assign", stick)
    request = Assign("other", (controller.name,), Options(override=frozenset({"not-leaf"})), 0)
    two = await world.operations.start(request, authorise)
    await asyncio.gather(one.ended.wait(), two.ended.wait())
    assert one.job.state == "done" and error_name(two.job).endswith(".Blocked") and "held-live" in str(two.job.error)


async def test_a_queued_job_does_not_go_to_another_machine_of_that_name(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.executor.alone(("group 2",)):
        control = await world.start("assign", NIC)
        world.emit(MachineGone(KEY))
        world.emit(MachineRead(machine("vm", OTHER)))
    await control.ended.wait()
    assert error_name(control.job) == "org.hostpassd1.Error.StalePlan" and world.libvirt.calls == []


async def test_a_queued_job_does_not_go_past_a_blocker_that_nobody_authorised(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def authorise(checks: Sequence[Check]) -> None:
        assert [action for action, _ in checks] == ["assign"]

    async with world.executor.alone((LUN.name,)):
        options = Options(override=frozenset({"mounted"}))
        control = await world.operations.start(Assign("vm", (LUN.name,), options, 0), authorise)
        world.emit(HostUsesRead({LUN.name: (host_use("mount", mount_points=("/srv",)),)}))
    await control.ended.wait()
    assert error_name(control.job) == "org.hostpassd1.Error.StalePlan" and world.libvirt.calls == []


# The matrices: something dies, is lost or is refused at each call in turn. The calls are counted in a run that works,
# so that a new step joins by itself.

every_operation = pytest.mark.parametrize("operation", ["assign", "dismiss"])
every_device = pytest.mark.parametrize("device", [NIC, PAIR[0], GPU[0], STICK], ids=lambda d: d.name)


async def prepared(folder: Path, operation: str, device: Device) -> World:
    folder.mkdir()
    world = World(folder)
    if operation == "dismiss":
        await world.do("assign", device)
    world.libvirt.calls.clear()
    return world


async def clean_states(folder: Path, operation: str, device: Device) -> tuple[list[str], list[tuple[object, ...]]]:
    """The calls of an operation that works, and the truth before and after it."""
    works = await prepared(folder / "works", operation, device)
    before = works.truth()
    await works.do(operation, device)
    assert works.libvirt.calls
    return works.libvirt.calls, [before, works.truth()]


def at_call(world: World, at: int, when: str, happens: Callable[[], None]) -> None:
    """Has HAPPENS happen before the effect of the call AT, after it, or, 'during' it, with the effect still to come."""

    def hook(call: str) -> None:
        if len(world.libvirt.calls) == at + 1:
            happens()

    if when == "during":
        world.libvirt.hang = lambda call: len(world.libvirt.calls) == at + 1
    setattr(world.libvirt, "after" if when == "after" else "before", hook)


async def reborn(world: World, folder: Path) -> World:
    """A new daemon on the same truth, and what it has done by itself when it is quiet."""
    world.libvirt.calm()
    new = World(folder, libvirt=world.libvirt)
    world.libvirt.come_back()
    await new.quiet()
    return new


@every_operation
@every_device
@pytest.mark.parametrize("when", ["before", "during", "after"])
async def test_killed_at_every_call_it_recovers_to_a_clean_state(
    tmp_path: Path, operation: str, device: Device, when: str
) -> None:
    calls, clean = await clean_states(tmp_path, operation, device)

    def die() -> None:
        raise Died

    for at, call in enumerate(calls):
        world = await prepared(tmp_path / str(at), operation, device)
        at_call(world, at, when, die)
        await world.start(operation, device)
        ends = await asyncio.gather(*world.operations.tasks, return_exceptions=True)
        assert any(isinstance(end, Died) for end in ends)
        new = await reborn(world, tmp_path / str(at))
        assert new.truth() in clean, f"{when} {call}"
        assert new.intents.unfinished == ()


@every_operation
@every_device
async def test_killed_while_it_undoes_or_goes_on_it_recovers_too(
    tmp_path: Path, operation: str, device: Device
) -> None:
    calls, clean = await clean_states(tmp_path, operation, device)
    for refused in range(len(calls)):
        at, died = refused + 1, True
        while died:
            folder = tmp_path / f"{refused} {at}"
            world = await prepared(folder, operation, device)
            world.libvirt.fails = lambda call, n=refused + 1, w=world: len(w.libvirt.calls) == n  # type: ignore[misc]
            tasks: list[asyncio.Task[None]] = []

            def die(world: World = world, tasks: list[asyncio.Task[None]] = tasks) -> None:
                tasks += [*world.operations.tasks, *upkeep(world)]
                raise Died

            at_call(world, at, "after", die)
            await world.start(operation, device)
            await asyncio.gather(*world.operations.tasks, return_exceptions=True)
            await asyncio.gather(*upkeep(world), return_exceptions=True)
            died, at = bool(tasks), at + 1
            new = await reborn(world, folder)
            assert new.truth() in clean, f"{calls[refused]} refused, killed at call {at}"
            assert new.intents.unfinished == ()


@every_operation
@every_device
@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("back", ["at once", "later"])
async def test_libvirt_lost_at_every_call_the_operation_is_undone_or_finished_on_its_return(
    tmp_path: Path, operation: str, device: Device, when: str, back: str
) -> None:
    calls, clean = await clean_states(tmp_path, operation, device)
    for at, call in enumerate(calls):
        world = await prepared(tmp_path / str(at), operation, device)

        def lose(world: World = world) -> None:
            world.libvirt.lose()
            if back == "at once":
                world.libvirt.come_back()
            raise errors.HypervisorUnavailable("the connection to libvirt was lost")

        at_call(world, at, when, lose)
        job = await world.do(operation, device)
        assert (job.state, error_name(job)) == ("failed", "org.hostpassd1.Error.HypervisorUnavailable"), call
        world.libvirt.calm()
        if back == "later":
            await world.quiet()
            assert all(hold.stale for hold in world.state.holds_of(UUID))
            assert world.intents.unfinished and "when libvirt is back" in str(job.error)
            world.libvirt.come_back()
        await world.quiet()
        assert world.truth() in clean, f"{when} {call}"
        assert world.intents.unfinished == ()


@every_operation
@every_device
async def test_every_call_refused_in_turn_ends_in_a_clean_state(tmp_path: Path, operation: str, device: Device) -> None:
    calls, clean = await clean_states(tmp_path, operation, device)
    for at, call in enumerate(calls):
        world = await prepared(tmp_path / str(at), operation, device)
        world.libvirt.fails = lambda call, n=at + 1, w=world: len(w.libvirt.calls) == n  # type: ignore[misc]
        job = await world.do(operation, device)
        assert (job.state, error_name(job)) == ("failed", "org.hostpassd1.Error.HypervisorRefused"), call
        await world.quiet()
        assert world.truth() in (clean[:1] if operation == "assign" else clean), call
        assert world.intents.unfinished == ()


@every_operation
@every_device
async def test_every_call_that_is_made_and_refused_all_the_same_ends_in_a_clean_state(
    tmp_path: Path, operation: str, device: Device
) -> None:
    calls, clean = await clean_states(tmp_path, operation, device)
    for at, call in enumerate(calls):
        world = await prepared(tmp_path / str(at), operation, device)

        def refuse() -> None:
            raise errors.HypervisorRefused("libvirt refused: it went wrong after all")

        at_call(world, at, "after", refuse)
        job = await world.do(operation, device)
        # What has left the machine cannot be taken back.
        assert job.state == ("done" if call == "detach_live" else "failed"), call
        await world.quiet()
        assert world.truth() in (clean[:1] if operation == "assign" else clean), call
        assert world.intents.unfinished == ()


@every_operation
@every_device
async def test_what_libvirt_refuses_to_undo_too_is_said_and_kept_until_it_can_be(
    tmp_path: Path, operation: str, device: Device
) -> None:
    calls, clean = await clean_states(tmp_path, operation, device)
    for at, call in enumerate(calls):
        world = await prepared(tmp_path / str(at), operation, device)
        world.libvirt.fails = lambda call, n=at, w=world: len(w.libvirt.calls) > n  # type: ignore[misc]
        job = await world.do(operation, device)
        await world.quiet()
        if world.truth() not in clean:
            assert "not undone" in str(job.error) or "not done yet" in str(job.error), call
            assert [left.number for left in world.intents.unfinished] == [job.number]
        world.libvirt.calm()
        world.libvirt.come_back()
        await world.quiet()
        assert world.truth() in clean, call
        assert world.intents.unfinished == ()


def test_the_uri_is_the_machines() -> None:
    assert MACHINES["running"].uri == URI
