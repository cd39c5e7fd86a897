"""The Manager's and the Job's methods, on a simulated hypervisor: who may, and what a caller is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hostpassd import errors, names
from hostpassd.base import pieces
from hostpassd.bus.access import Access
from hostpassd.bus.present import hold_row
from hostpassd.bus.router import Call, Rows, Variant
from hostpassd.model.device import Device
from hostpassd.model.events import DeviceGone, DeviceSeen, HypervisorChanged, MachineRead
from tests.sim import world
from tests.sim.house import CALLER, PAIR, STICK, House
from tests.sim.world import URI, UUID, hostdev, machine, usb

OTHER = 1001


class Bus:
    """Calls handlers as the router does, and answers for polkit: `denied`, by device name and then the error."""

    def __init__(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        self._handlers = house.daemon.router._handlers
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.denied: dict[str, type[errors.HostpassError]] = {}

        async def ask(
            _: Access, call: Call, action: str, details: dict[str, str], *, interactive: bool
        ) -> tuple[bool, bool, dict[str, str]]:
            assert not interactive
            self.asked.append((action.removeprefix(names.ACTION_PREFIX), details))
            denied = self.denied.get(details["device.name"])
            return denied is None, denied is errors.InteractiveAuthorizationRequired, {}

        async def uid_of(sender: str) -> int:
            return int(sender.removeprefix(":1."))

        monkeypatch.setattr(Access, "ask", ask)
        monkeypatch.setattr(house.daemon.router, "vanished", lambda sender: contextlib.nullcontext(asyncio.Event()))
        monkeypatch.setattr(house.daemon.router, "uid_of", uid_of)

    async def call(self, uid: int, path: str, interface: str, member: str, *args: Any) -> Sequence[Any]:
        call = Call(f":1.{uid}", path, interface, member, list(args), True)
        answer = await self._handlers[interface, member](call)
        return [list(answer.rows)] if isinstance(answer, Rows) else answer

    async def cancel(self, uid: int, number: int = 1) -> None:
        assert await self.call(uid, names.job_path(number), names.JOB, "Cancel") == []


@pytest.fixture
async def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    made = House(tmp_path, monkeypatch)
    yield made
    made.close()


@pytest.fixture
def bus(house: House, monkeypatch: pytest.MonkeyPatch) -> Bus:
    return Bus(house, monkeypatch)


async def test_ones_own_job_is_cancelled_and_undone(house: House, bus: Bus) -> None:
    house.libvirt.withhold = True
    control = await house.start("assign", PAIR[0])
    await bus.cancel(CALLER)
    assert control.job.state == "cancelled" and not bus.asked
    assert not house.libvirt.machines[UUID].live and not house.libvirt.machines[UUID].config
    record = house.records()[-1]
    assert (record["OPERATION"], record["JOB"], record["RESULT"], record["UID"]) == ("cancel", "1", "done", str(CALLER))


async def test_who_cancels_the_job_of_another_is_asked_with_all_that_the_job_was_asked_with(
    house: House, bus: Bus
) -> None:
    house.libvirt.withhold = True
    control = await house.start("assign", PAIR[0])
    bus.denied = {PAIR[0].name: errors.NotAuthorized}
    with pytest.raises(errors.NotAuthorized):
        await bus.cancel(OTHER)
    assert not control.cancelled.is_set()
    [record] = house.records()
    assert (record["OPERATION"], record["DEVICE"]) == ("cancel", PAIR[0].name)
    assert (record["RESULT"], record["UID"]) == ("org.hostpassd1.Error.NotAuthorized", str(OTHER))
    bus.denied = {}
    await bus.cancel(OTHER)
    assert control.job.state == "cancelled"
    [first, second] = bus.asked
    assert (
        first
        == second
        == (
            "cancel-others",
            {
                "device.name": PAIR[0].name,
                "device.kind": "pci",
                "device.label": PAIR[0].label,
                "device.vendor-id": "8086",
                "device.product-id": "10d3",
                "device.serial": "",
                "device.driver": "e1000e",
                "device.companions": PAIR[1].name,
                "machine.name": "vm",
                "machine.uuid": UUID,
                "machine.state": "running",
                "operation": "assign",
                "override": "",
            },
        )
    )


async def cancelled_at(house: House, bus: Bus, when: str, call: str, count: int = 1) -> str:
    """What Cancel says when it comes during the COUNT-th CALL of an assign, BEFORE or AFTER its effect."""
    cancels: list[asyncio.Task[None]] = []
    calls = 0

    def step(name: str) -> None:
        nonlocal calls
        calls += name == call
        if name == call and calls == count:
            cancels.append(asyncio.create_task(bus.cancel(CALLER)))

    setattr(house.libvirt, when, step)
    control = await house.do("assign", PAIR[0])
    with pytest.raises(errors.Failed) as refused:
        await cancels[0]
    assert house.records()[-1]["RESULT"] == "org.hostpassd1.Error.Failed"
    return f"{control.job.state}: {refused.value}"


async def test_a_cancel_that_comes_too_late_says_so(house: House, bus: Bus) -> None:
    said = await cancelled_at(house, bus, "after", "attach_live", count=2)
    assert said == "done: Job 1 could not be cancelled any more, it is done."


async def test_a_cancel_while_a_failed_job_is_undone_says_why_it_failed(house: House, bus: Bus) -> None:
    house.libvirt.refuse_calls = {"attach_live": "no room"}
    said = await cancelled_at(house, bus, "before", "detach_config")
    assert said.startswith("failed: Job 1 could not be cancelled any more, it is failed: ") and "no room" in said


async def test_a_cancel_during_a_call_of_libvirts_that_does_not_return_is_answered(
    house: House, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostpassd.passthrough.waiting.CALL_PATIENCE", 0.01)
    house.libvirt.stick = lambda call: call == "attach_live"
    control = await house.start("assign", PAIR[0])
    while not house.libvirt.stuck:
        await asyncio.sleep(0)
    await bus.cancel(CALLER)
    assert control.job.state == "cancelled" and "libvirt is still at it" in str(control.job.error)
    assert house.libvirt.stuck
    house.libvirt.calm()
    house.libvirt.let_go("done")
    await house.put_in_order()
    assert not house.libvirt.machines[UUID].live and not house.libvirt.machines[UUID].config
    results = [(record["DEVICE"], record["OPERATION"], record["RESULT"]) for record in house.records()]
    cancelled, recovered = "org.hostpassd1.Error.Cancelled", "recovered"
    assert results[:4] == [
        (PAIR[0].name, "assign", cancelled),
        (PAIR[1].name, "assign", cancelled),
        (PAIR[0].name, "cancel", "done"),
        (PAIR[1].name, "cancel", "done"),
    ]
    assert results[4:] == [(device.name, "assign", recovered) for device in PAIR]


async def test_a_cancel_of_what_has_ended_is_refused(house: House, bus: Bus) -> None:
    await house.do("assign", PAIR[0])
    with pytest.raises(errors.Failed, match="Job 1 has ended"):
        await bus.cancel(CALLER)


@pytest.mark.parametrize("operation", ["Assign", "Dismiss"])
@pytest.mark.parametrize(
    ("denied", "answer"),
    [
        ({}, "yes"),
        ({PAIR[1].name: errors.InteractiveAuthorizationRequired}, "challenge"),
        ({PAIR[1].name: errors.NotAuthorized}, "no"),
        ({PAIR[0].name: errors.NotAuthorized, PAIR[1].name: errors.InteractiveAuthorizationRequired}, "no"),
    ],
)
async def test_a_plans_authorization_is_the_worst_of_all_that_moves(
    house: House, bus: Bus, operation: str, denied: dict[str, type[errors.HostpassError]], answer: str
) -> None:
    if operation == "Dismiss":
        await house.do("assign", PAIR[0])
    bus.denied = denied
    [plan] = await bus.call(CALLER, names.MANAGER_PATH, names.MANAGER, f"Plan{operation}", "vm", [PAIR[0].name], {})
    assert plan["authorization"].value == answer
    asked = [details["device.name"] for _, details in bus.asked]
    assert asked == [device.name for device in PAIR][: 1 if denied.get(PAIR[0].name) is errors.NotAuthorized else 2]


async def test_a_rom_is_looked_up_before_anything_is_planned(house: House, bus: Bus) -> None:
    """Debian has GPL there, as a link to the newest of its versions."""

    async def operate(member: str, file: str) -> None:
        given = {"rom-file": Variant("s", file)}
        await bus.call(CALLER, names.MANAGER_PATH, names.MANAGER, member, "vm", [PAIR[0].name], given)

    for member in ("PlanAssign", "Assign"):
        with pytest.raises(errors.InvalidOption, match="rom-file"):
            await operate(member, "/etc/hostname")
        await operate(member, "/usr/share/common-licenses/GPL")
    [first, second] = house.libvirt.machines[UUID].config
    assert '<rom file="/usr/share/common-licenses/GPL-3"/>' in first.xml and "<rom" not in second.xml


@pytest.mark.parametrize(
    ("device", "chosen"),
    [
        (
            PAIR[0],
            {"driver": Variant("s", "mlx5_vfio_pci"), "rom-bar": Variant("b", False), "boot-order": Variant("u", 3)},
        ),
        (STICK, {"startup-policy": Variant("s", "requisite"), "boot-order": Variant("u", 1)}),
    ],
    ids=["pci", "usb"],
)
async def test_a_hold_tells_what_was_chosen_and_a_dismiss_finds_it_again(
    house: House, bus: Bus, device: Device, chosen: dict[str, Variant]
) -> None:
    house.emit(HypervisorChanged(URI, True, version=10_000_000))
    await bus.call(CALLER, names.MANAGER_PATH, names.MANAGER, "Assign", "vm", [device.name], chosen)
    [hold] = house.daemon.state.holds_on(device.name)
    row = hold_row(hold)
    assert {key: row[key] for key in chosen} == chosen and hold.live and hold.config
    await house.do("dismiss", device)
    assert not house.libvirt.machines[UUID].live and not house.libvirt.machines[UUID].config


async def test_candidates_are_listed_by_what_moves_together_with_what_counts_for_the_machine(
    house: House, bus: Bus
) -> None:
    async def listed(**given: Variant) -> dict[str, tuple[bool, list[str], str]]:
        [rows] = await bus.call(CALLER, names.MANAGER_PATH, names.MANAGER, "ListCandidates", "vm", given)
        assert [possible for _, possible, _, _ in rows] == sorted((row[1] for row in rows), reverse=True)
        return {
            " ".join(path.rpartition("/")[2] for path in paths): (
                possible,
                [reason[1] for reason in reasons],
                more["authorization"].value,
            )
            for paths, possible, reasons, more in rows
        }

    pair = " ".join(device.name for device in PAIR)
    bus.denied = {PAIR[1].name: errors.NotAuthorized}
    before = await listed()
    assert before[pair] == (True, [], "no") and before[STICK.name] == (True, [], "yes")
    house.libvirt.machines[world.OTHER] = machine("other", world.OTHER, live=(hostdev(STICK),))
    house.emit(MachineRead(house.libvirt.machines[world.OTHER]))
    await house.do("assign", PAIR[0])
    after = await listed()
    assert pair not in after and after[STICK.name] == (False, ["held-live"], "yes")
    assert set(after) == set(before) - {pair}
    hub = usb("1-7", number=77, device_class=9)
    house.emit(DeviceSeen(hub))
    assert hub.name not in await listed() and hub.name in await listed(all=Variant("b", True))
    with pytest.raises(errors.InvalidOption):
        await listed(every=Variant("b", True))


async def test_what_comes_and_goes_while_candidates_are_listed_is_no_fault(
    house: House, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "SHARE", 0)
    listing = asyncio.create_task(bus.call(CALLER, names.MANAGER_PATH, names.MANAGER, "ListCandidates", "vm", {}))
    number = 0
    while not listing.done():
        number += 1
        house.emit(DeviceGone(STICK.sysfs_path) if number % 2 else DeviceSeen(STICK))
        house.emit(DeviceSeen(usb(f"3-{number}", number=number)))
        await asyncio.sleep(0)
    [rows] = listing.result()
    pair = [names.device_path(device.name) for device in PAIR]
    assert pair in [row[0] for row in rows] and number > len(PAIR)
