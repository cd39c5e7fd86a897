"""The audit log: one story for each device, whoever moved it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hostpassd import errors
from hostpassd.events import MachineRead
from tests.unit.house import CALLER, HUB, PAIR, STICK, House
from tests.unit.world import UUID, hostdev, machine


@pytest.fixture
async def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    made = House(tmp_path, monkeypatch)
    yield made
    made.close()


def stories(records: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    return [(row["KIND"], row["DEVICE"], row.get("RESULT", row["OPERATION"])) for row in records]


async def test_a_job_has_one_record_for_each_device_and_moves_nothing_for_others(house: House) -> None:
    await house.do("assign", PAIR[0])
    first, second = house.records()
    assert first == {
        "KIND": "operation",
        "MESSAGE": f"assign of {PAIR[0].name}: done",
        "DEVICE": PAIR[0].name,
        "MACHINE": UUID,
        "MACHINE_NAME": "vm",
        "OPERATION": "assign",
        "JOB": "1",
        "RESULT": "done",
        "UID": str(CALLER),
    }
    message = f"assign of {PAIR[1].name}, along with {PAIR[0].name}: done"
    assert second == first | {"MESSAGE": message, "DEVICE": PAIR[1].name}
    await house.do("dismiss", PAIR[1])
    assert sorted(stories(house.records())) == [("operation", device.name, "done") for device in PAIR]


async def test_what_others_do_right_after_a_job_is_theirs(house: House) -> None:
    await house.do("assign", STICK)
    house.records()
    house.libvirt.guest_releases(UUID, hostdev_alias(house))
    [live] = house.records()
    assert (live["KIND"], live["DEVICE"], live["OPERATION"]) == ("foreign", STICK.name, "removed")
    assert live["MESSAGE"].startswith("hold removed by others in its live half")
    assert "UID" not in live and live["MACHINE_NAME"] == "vm"
    house.daemon.emit(MachineRead(machine()))
    [gone] = house.records()
    assert gone["MESSAGE"].startswith("hold removed by others:")


def hostdev_alias(house: House) -> str:
    [hold] = house.daemon._state.holds_of(UUID)
    return hold.alias


async def test_each_half_that_others_give_or_take_has_a_record(house: House) -> None:
    claim = hostdev(STICK)
    for given, said in (
        (machine(live=(claim,)), ["added by others"]),
        (machine(live=(claim,), stored=(claim,)), ["added by others in its stored half"]),
        (machine(live=(claim,)), ["removed by others in its stored half"]),
        (machine(stored=(claim,)), ["removed by others in its live half", "added by others in its stored half"]),
        (machine(), ["removed by others"]),
    ):
        house.daemon.emit(MachineRead(given))
        records = house.records()
        assert [row["MESSAGE"] for row in records] == [f"hold {text}: vm and {STICK.name}" for text in said]
        assert [row["OPERATION"] for row in records] == [text.partition(" ")[0] for text in said]
        assert {(row["KIND"], row["DEVICE"]) for row in records} == {("foreign", STICK.name)}


async def test_what_a_guest_lets_go_after_the_job_is_released_late(house: House) -> None:
    await house.do("assign", STICK)
    house.libvirt.stubborn = True
    control = await house.start("dismiss", STICK)
    while control.job.state != "waiting-for-guest":
        await asyncio.sleep(0)
    control.cancelled.set()
    await control.ended.wait()
    house.records()
    alias = hostdev_alias(house)
    house.libvirt._put(dataclasses.replace(house.libvirt.machines[UUID], stored=(hostdev(STICK),)))
    assert [row["MESSAGE"].partition(":")[0] for row in house.records()] == ["hold added by others in its stored half"]
    house.libvirt.guest_releases(UUID, alias)
    [record] = house.records()
    assert (record["OPERATION"], record["MESSAGE"].partition(":")[0]) == (
        "released",
        "hold released late in its live half",
    )


async def test_what_is_refused_has_a_record_with_the_caller(house: House) -> None:
    with pytest.raises(errors.NotAuthorized):
        await house.start("assign", STICK, denied=True)
    with pytest.raises(errors.Blocked):
        await house.start("assign", HUB)
    with pytest.raises(errors.NotAssigned):
        await house.start("dismiss", STICK)
    with pytest.raises(errors.NoSuchDevice):
        await house.start("assign", dataclasses.replace(STICK, name="no\nsuch thing" + "x" * 9999))
    records = house.records()
    assert [row["RESULT"].rpartition(".")[2] for row in records] == [
        "NotAuthorized",
        "Blocked",
        "NotAssigned",
        "NoSuchDevice",
    ]
    assert [row["DEVICE"] for row in records[:3]] == [STICK.name, HUB.name, STICK.name]
    assert records[3]["DEVICE"].startswith("no such thingxxx")
    for row in records:
        assert (row["UID"], row["MACHINE"], row["MACHINE_NAME"]) == (str(CALLER), UUID, "vm") and "JOB" not in row


async def test_what_was_left_and_put_in_order_is_ours_and_has_a_record(house: House) -> None:
    house.libvirt.after = lambda call: house.libvirt.lose() if call == "attach_stored" else None
    assert (await house.do("assign", STICK)).job.state == "failed"
    assert stories(house.records()) == [("operation", STICK.name, "org.hostpassd1.Error.HypervisorUnavailable")]
    house.libvirt.calm()
    house.libvirt.come_back()
    await house.put_in_order()
    assert not house.libvirt.machines[UUID].stored
    [record] = house.records()
    assert (record["KIND"], record["RESULT"], record["JOB"]) == ("operation", "recovered", "1")
    assert "put in order" in record["MESSAGE"]
