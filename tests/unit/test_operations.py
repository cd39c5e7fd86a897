"""From a wish to a job: what polkit is asked, and what a permission rests on from its answer to the job's turn."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from hostpassd import errors
from hostpassd.machines.domain_xml import claim_of, hostdev_xml
from hostpassd.model.device import Device
from hostpassd.model.events import (
    DeviceGone,
    DeviceSeen,
    Event,
    HostUse,
    HostUsesRead,
    MachineGone,
    MachineRead,
    host_use,
)
from hostpassd.model.machine import Machine, MachineKey
from hostpassd.passthrough.assign import Assign
from hostpassd.passthrough.jobs import RunningJob
from hostpassd.passthrough.permission import Check
from hostpassd.passthrough.plan import lock_of
from hostpassd.passthrough.request import Options, Plan
from tests.sim.house import CALLER, PAIR, STICK, House
from tests.sim.world import OTHER, REQUESTS, URI, UUID, block, error_name, hostdev, machine, net, usb

DISK = block("sda", STICK)
WIRE = net("enp4s1", PAIR[0])
SCRATCH = host_use("mount", mount_points=("/mnt/scratch",))
DATABASE = host_use("mount", mount_points=("/srv/database",))
MOUNTED = Options(override=frozenset({"mounted"}), timeout=5)


@pytest.fixture
async def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    made = House(tmp_path, monkeypatch)
    yield made
    made.close()


def put(house: House, seen: Machine) -> None:
    """The machine is like that, and is read."""
    house.libvirt.machines[seen.uuid] = seen
    house.emit(MachineRead(seen))


async def start(
    house: House,
    device: str,
    options: Options = MOUNTED,
    operation: str = "assign",
    meanwhile: Callable[[], None] = lambda: None,
) -> tuple[RunningJob, list[Check]]:
    """Starts an operation; what happens MEANWHILE happens while polkit is asked. Also what it was asked."""
    asked: list[Check] = []

    async def authorise(checks: Sequence[Check]) -> None:
        asked.extend(checks)
        meanwhile()

    request = REQUESTS[operation](UUID, (device,), options, CALLER)
    return await house.daemon.operations.start(request, authorise), asked


async def during_the_prompt(
    house: House, device: Device, options: Options, happen: Callable[[], None], operation: str = "assign"
) -> str:
    """How an operation ends: a job's state, or an error's name."""
    try:
        control, _ = await start(house, device.name, options, operation, happen)
    except errors.HostpassError as error:
        return error.name
    await control.ended.wait()
    return error_name(control.job).rpartition(".")[2] or control.job.state


async def in_the_queue(
    house: House, device: Device, options: Options, happen: Callable[[], None], operation: str = "assign"
) -> str:
    """The same, where it happens while another job has the group."""
    async with house.daemon.executor.alone((lock_of(device),)):
        control, _ = await start(house, device.name, options, operation)
        happen()
    await control.ended.wait()
    return error_name(control.job).rpartition(".")[2] or control.job.state


When = Callable[..., Awaitable[str]]
at_any_time = pytest.mark.parametrize("when", [during_the_prompt, in_the_queue])


def starting(running: bool) -> Machine:
    """As libvirt tells of a machine that is being started: paused, and then it runs."""
    return dataclasses.replace(machine(), state="running" if running else "paused")


@at_any_time
async def test_a_machine_that_has_started_is_no_other_one(house: House, when: When) -> None:
    put(house, starting(running=False))
    assert await when(house, PAIR[0], Options(timeout=5), lambda: put(house, starting(running=True))) == "done"
    assert len(house.libvirt.machines[UUID].live) == len(house.libvirt.machines[UUID].config) == len(PAIR)


@at_any_time
async def test_a_driver_that_comes_or_goes_is_no_other_device(house: House, when: When) -> None:
    def rebind() -> None:
        for device in PAIR:
            house.emit(DeviceSeen(dataclasses.replace(device, driver="vfio-pci")))

    assert await when(house, PAIR[0], Options(timeout=5), rebind) == "done"


@at_any_time
async def test_a_companion_that_lost_its_driver_meanwhile_need_not_move(house: House, when: When) -> None:
    def unbind() -> None:
        house.emit(DeviceSeen(dataclasses.replace(PAIR[1], driver="")))

    assert await when(house, PAIR[0], Options(timeout=5), unbind) == "done"
    assert len(house.libvirt.machines[UUID].live) == 1


def _start_it(house: House) -> None:
    put(house, dataclasses.replace(house.libvirt.machines[UUID], state="running"))


@at_any_time
async def test_whether_a_running_machine_is_changed_is_what_a_permission_rests_on(house: House, when: When) -> None:
    """What is handed to a machine that is off is not put into one that runs."""
    put(house, machine(running=False))
    assert await when(house, STICK, Options(timeout=5), lambda: _start_it(house)) == "StalePlan"
    assert not house.libvirt.machines[UUID].live and not house.libvirt.machines[UUID].config


@at_any_time
async def test_who_asked_for_a_running_machine_is_not_served_without_it(house: House, when: When) -> None:
    assert await when(house, STICK, Options(timeout=5), lambda: put(house, machine(running=False))) == "StalePlan"
    assert not house.libvirt.machines[UUID].config


@at_any_time
async def test_what_a_machine_let_go_of_as_it_was_shut_off_need_not_be_asked_for(house: House, when: When) -> None:
    stored = (hostdev(STICK, config=True),)
    put(house, dataclasses.replace(machine(live=(hostdev(STICK),)), config=stored))

    def shut_off() -> None:
        put(house, dataclasses.replace(machine(running=False), config=stored))

    assert await when(house, STICK, Options(timeout=5), shut_off, "dismiss") == "done"
    assert house.libvirt.machines[UUID].config == ()


@at_any_time
async def test_what_is_only_stored_is_dismissed_whether_the_machine_runs_or_not(house: House, when: When) -> None:
    put(house, dataclasses.replace(machine(running=False), config=(hostdev(STICK, config=True),)))
    assert await when(house, STICK, Options(timeout=5), lambda: _start_it(house), "dismiss") == "done"
    assert house.libvirt.machines[UUID].config == ()


@at_any_time
async def test_it_does_not_rest_on_it_where_only_the_stored_half_is_asked_for(house: House, when: When) -> None:
    put(house, machine(running=False))
    assert await when(house, STICK, Options(live=False, timeout=5), lambda: _start_it(house)) == "done"
    assert not house.libvirt.machines[UUID].live and len(house.libvirt.machines[UUID].config) == 1


@at_any_time
@pytest.mark.parametrize(
    "event",
    [
        MachineRead(machine("production")),
        DeviceSeen(usb("1-1", number=9)),
        DeviceSeen(dataclasses.replace(STICK, serial="ANOTHER")),
        DeviceSeen(dataclasses.replace(STICK, label="another")),
    ],
    ids=["renamed", "replugged", "another serial", "another label"],
)
async def test_a_permission_rests_on_what_rules_and_people_are_told(house: House, when: When, event: Event) -> None:
    assert await when(house, STICK, Options(timeout=5), lambda: house.emit(event)) == "StalePlan"
    assert not house.libvirt.machines[UUID].live and not house.libvirt.machines[UUID].config


def use(house: House, *uses: HostUse) -> None:
    house.emit(HostUsesRead({DISK.name: uses} if uses else {}))


@at_any_time
@pytest.mark.parametrize(
    ("later", "end"),
    [
        ((SCRATCH,), "done"),
        ((), "done"),
        ((DATABASE,), "StalePlan"),
        ((SCRATCH, DATABASE), "StalePlan"),
        ((SCRATCH, host_use("storage-stack", volumes=("LUKS x",))), "Blocked"),
    ],
)
async def test_an_override_is_for_what_was_in_the_way_and_not_for_what_is_called_the_same(
    house: House, when: When, later: tuple[HostUse, ...], end: str
) -> None:
    house.emit(DeviceSeen(DISK))
    use(house, SCRATCH)
    assert await when(house, STICK, MOUNTED, lambda: use(house, *later)) == end


@at_any_time
async def test_an_override_outlasts_a_part_of_what_was_in_the_way(house: House, when: When) -> None:
    house.emit(DeviceSeen(DISK))
    use(house, SCRATCH, DATABASE)
    assert await when(house, STICK, MOUNTED, lambda: use(house, DATABASE)) == "done"


async def test_each_device_is_asked_about_with_what_is_in_its_own_way(house: House) -> None:
    for function in (DISK, WIRE):
        house.emit(DeviceSeen(function))
    house.emit(HostUsesRead({WIRE.name: (host_use("address", addresses=("192.0.2.1/24",)),)}))
    options = Options(override=frozenset({"network-in-use", "mounted"}), timeout=5)
    control, asked = await start(house, PAIR[1].name, options)
    await control.ended.wait()
    assert [(action, row["device.name"], row["override"]) for action, row in asked] == [
        ("assign", PAIR[1].name, ""),
        ("assign-override", PAIR[0].name, "network-in-use"),
    ]
    assert [row["device.companions"] for _, row in asked] == [PAIR[0].name, PAIR[1].name]


# --- what is missing ---


def missing(house: House) -> str:
    """The machine has the stick stored, and it is unplugged: the id of the row."""
    claim = claim_of(hostdev_xml(STICK, alias="", config=True, unique=True))
    put(house, dataclasses.replace(machine(), config=(claim,)))
    house.emit(DeviceGone(STICK.sysfs_path))
    [row] = house.daemon.state.missing[UUID]
    return row.id


async def test_a_missing_id_is_that_row_whatever_a_stick_calls_itself(house: House) -> None:
    wanted = missing(house)
    liar = usb("1-9", number=30, vendor=0xBAD, serial=wanted)
    house.emit(DeviceSeen(liar))
    put(house, dataclasses.replace(house.libvirt.machines[UUID], live=(hostdev(liar),)))
    control, asked = await start(house, wanted, operation="dismiss")
    await control.ended.wait()
    assert control.job.state == "done" and house.libvirt.machines[UUID].config == ()
    assert [claim.alias for claim in house.libvirt.machines[UUID].live] == ["hostdev0"]
    assert [row["device.name"] for _, row in asked] == [STICK.name]


async def test_what_is_at_a_place_now_is_not_shown_for_what_is_missing_there(house: House) -> None:
    missing(house)
    house.emit(DeviceSeen(usb("1-1", number=40, vendor=0xBAD, serial="NEW")))
    control, asked = await start(house, STICK.name, operation="dismiss")
    await control.ended.wait()
    assert control.job.state == "done"
    [(_, told)] = asked
    assert (told["device.name"], told["device.label"], told["device.serial"]) == (STICK.name, STICK.name, "")


@at_any_time
async def test_a_permission_for_something_missing_is_for_that_thing_and_not_for_that_place(
    house: House, when: When
) -> None:
    """Its claim is taken out by others meanwhile, and another stick was there, is claimed, and is missing too."""
    missing(house)
    other = usb("1-1", number=40, vendor=0xBAD)

    def happen() -> None:
        claim = claim_of(hostdev_xml(other, alias="", config=True, unique=True))
        put(house, dataclasses.replace(machine(), config=(claim,)))
        house.emit(DeviceSeen(other))
        house.emit(DeviceGone(other.sysfs_path))

    assert await when(house, STICK, Options(timeout=5), happen, "dismiss") == "StalePlan"
    assert len(house.libvirt.machines[UUID].config) == 1


async def test_an_instance_is_that_thing_missing_or_not(house: House) -> None:
    instance = house.daemon.state.devices[STICK.name].instance
    wanted = missing(house)
    for text in (wanted, STICK.name):
        with pytest.raises((errors.StalePlan, errors.NoSuchDevice)):
            await start(house, text, Options(instance=instance + 1), "dismiss")
    control, _ = await start(house, STICK.name, Options(instance=instance, timeout=5), "dismiss")
    await control.ended.wait()
    assert control.job.state == "done"


async def test_an_id_is_one_word_in_a_prompt(house: House) -> None:
    """Whoever may write the machine's configuration makes it up."""
    wanted = 'hostdev:usb:x" to the machine \u202escratch'
    put(
        house,
        dataclasses.replace(machine(), config=(dataclasses.replace(hostdev(usb("7-7", vendor=0xDEAD)), id=wanted),)),
    )
    control, [(_, told)] = await start(house, wanted, operation="dismiss")
    await control.ended.wait()
    assert control.job.state == "done" and told["device.name"] == 'hostdev:usb:x"?to?the?machine??scratch'.replace(
        "?", "\N{REPLACEMENT CHARACTER}"
    )


# --- what is refused ---


@pytest.mark.parametrize(
    ("operation", "happen", "options", "error"),
    [
        ("assign", lambda house: house.libvirt.lose(), Options(), errors.HypervisorUnavailable),
        (
            "assign",
            lambda house: house.emit(MachineGone(MachineKey(URI, UUID))),
            Options(),
            errors.NoSuchMachine,
        ),
        ("assign", lambda house: None, Options(guest_address="0000:04:00.0"), errors.InvalidOption),
        ("assign", lambda house: house.emit(DeviceGone(STICK.sysfs_path)), Options(), errors.StalePlan),
        ("dismiss", lambda house: None, Options(), errors.StalePlan),
    ],
    ids=["libvirt is away", "the machine is gone", "a wrong option", "the device is gone", "not assigned any more"],
)
async def test_with_a_token_only_what_comes_of_a_change_is_a_stale_plan(
    house: House, operation: str, happen: Callable[[House], None], options: Options, error: type[errors.HostpassError]
) -> None:
    happen(house)
    request = REQUESTS[operation](UUID, (STICK.name,), dataclasses.replace(options, plan="0" * 32), CALLER)
    with pytest.raises(error):
        await house.daemon.operations.start(request, _nobody)


async def test_whoever_has_too_many_jobs_is_told_so_before_a_password_is_asked_for(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostpassd.passthrough.operations.JOBS_PER_USER", 1)
    async with house.daemon.executor.alone((lock_of(STICK),)):
        first, _ = await start(house, STICK.name)
        with pytest.raises(errors.LimitExceeded):
            await house.daemon.operations.start(Assign(UUID, (PAIR[0].name,), MOUNTED, CALLER), _nobody)
    await first.ended.wait()


async def test_a_machine_that_is_undefined_while_the_log_is_looked_at_is_no_fault(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(plan: Plan) -> None:
        house.emit(MachineGone(MachineKey(URI, UUID)))

    monkeypatch.setattr(house.daemon.intents, "check", check)
    with pytest.raises(errors.NoSuchMachine):
        await start(house, STICK.name)


@pytest.mark.parametrize("options", [Options(), Options(plan="0" * 32)])
async def test_a_text_longer_than_any_name_is_refused_by_every_operation(house: House, options: Options) -> None:
    long = "x" * 513
    for operation in ("assign", "dismiss"):
        with pytest.raises(errors.InvalidArgs):
            await start(house, long, options, operation)
        with pytest.raises(errors.InvalidArgs):
            await house.start(operation, dataclasses.replace(STICK, name=long))
    with pytest.raises(errors.InvalidArgs):
        await house.daemon.operations.start(Assign(long, (STICK.name,), options, CALLER), _nobody)


async def _nobody(checks: Sequence[Check]) -> None:
    pytest.fail("nobody is to be asked")


async def test_of_several_devices_each_has_its_own_companions(house: House) -> None:
    request = Assign(UUID, (STICK.name, PAIR[0].name), Options(timeout=5), CALLER)
    asked: dict[str, str] = {}

    async def authorise(checks: Sequence[Check]) -> None:
        asked.update((row["device.name"], row["device.companions"]) for _, row in checks)

    job = await house.daemon.operations.start(request, authorise)
    await job.ended.wait()
    assert asked == {STICK.name: "", PAIR[0].name: PAIR[1].name, PAIR[1].name: PAIR[0].name}


async def test_what_machines_are_called_is_shown_clean(house: House) -> None:
    put(house, machine("a\u202eb\x9b2Jc\n", running=False))
    request = Assign(UUID, (STICK.name,), Options(live=True), CALLER)
    with pytest.raises(errors.InvalidOption) as refused:
        await house.daemon.operations.start(request, _nobody)
    assert str(refused.value).startswith("ab2Jc does not run")
    put(house, machine("a\u202eb\x9b2Jc\n", live=(hostdev(PAIR[0]),)))
    put(house, machine("other", OTHER))
    with pytest.raises(errors.Blocked) as blocked:
        await house.daemon.operations.start(
            dataclasses.replace(request, machine=OTHER, devices=(PAIR[0].name,)), _nobody
        )
    assert "The running machine ab2Jc has" in str(blocked.value)
    assert house.records()[0]["MACHINE_NAME"] == "ab2Jc"
    await asyncio.sleep(0)
