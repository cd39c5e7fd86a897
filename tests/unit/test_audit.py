"""The audit log: one story for each device, whoever moved it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

from hostpassd import audit, errors, names
from hostpassd.audit import Records
from hostpassd.model.events import CancelAnswered, DeviceGone, DeviceSeen, MachineGone, MachineRead
from hostpassd.model.job import Job
from hostpassd.passthrough.assign import Assign
from hostpassd.passthrough.permission import Check
from hostpassd.passthrough.request import Options
from tests.sim.clockwork import Clockwork
from tests.sim.house import CALLER, HUB, PAIR, STICK, House
from tests.sim.world import KEY, UUID, hostdev, machine, usb


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
    house.libvirt.release(UUID, hostdev_alias(house))
    [live] = house.records()
    assert (live["KIND"], live["DEVICE"], live["OPERATION"]) == ("foreign", STICK.name, "removed")
    assert live["MESSAGE"].startswith("hold removed by others in its live half")
    assert "UID" not in live and live["MACHINE_NAME"] == "vm"
    house.emit(MachineRead(machine()))
    [gone] = house.records()
    assert gone["MESSAGE"].startswith("hold removed by others:")


async def test_what_is_unplugged_is_missing_and_nobody_gave_it_back(house: House) -> None:
    await house.do("assign", STICK)
    house.records()
    house.emit(DeviceGone(STICK.sysfs_path))
    house.emit(DeviceSeen(STICK))
    missing, found = house.records()
    assert (missing["KIND"], missing["DEVICE"], missing["OPERATION"]) == ("foreign", STICK.name, "missing")
    words = "hold missing, its device is gone and nobody gave it back"
    assert missing["MESSAGE"] == f"{words}: vm and {STICK.name}"
    assert (found["DEVICE"], found["OPERATION"]) == (STICK.name, "found")
    house.emit(DeviceGone(STICK.sysfs_path))
    house.records()
    house.emit(MachineRead(machine()))
    assert [row["OPERATION"] for row in house.records()] == ["removed"]


async def test_what_is_missing_and_did_not_go_is_not_said_to_be_gone(house: House) -> None:
    stored, twin = hostdev(STICK, config=True), usb("1-5", number=9)
    house.emit(MachineRead(machine(running=False, config=(stored,))))
    house.records()
    house.emit(DeviceSeen(twin))
    house.emit(DeviceGone(twin.sysfs_path))
    ambiguous, found = house.records()
    assert (ambiguous["DEVICE"], ambiguous["OPERATION"]) == (STICK.name, "missing")
    why = "its claim fits more than one device now and nobody gave it back"
    assert ambiguous["MESSAGE"] == f"hold missing, {why}: vm and {STICK.name}"
    assert (found["DEVICE"], found["OPERATION"]) == (STICK.name, "found")
    house.emit(MachineRead(machine(live=(hostdev(STICK),))))
    house.records()
    house.emit(DeviceSeen(dataclasses.replace(STICK, facts=usb("1-1", number=7).facts)))
    [other] = house.records()
    assert other["MESSAGE"].startswith("hold missing, its claim finds it no longer and")


def hostdev_alias(house: House) -> str:
    [hold] = house.daemon.state.holds_of(UUID)
    return hold.alias


async def test_each_half_that_others_give_or_take_has_a_record(house: House) -> None:
    claim = hostdev(STICK)
    for given, said in (
        (machine(live=(claim,)), ["added by others"]),
        (machine(live=(claim,), config=(claim,)), ["added by others in its stored half"]),
        (machine(live=(claim,)), ["removed by others in its stored half"]),
        (machine(config=(claim,)), ["removed by others in its live half", "added by others in its stored half"]),
        (machine(), ["removed by others"]),
    ):
        house.emit(MachineRead(given))
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
    house.libvirt.put(dataclasses.replace(house.libvirt.machines[UUID], config=(hostdev(STICK),)))
    assert [row["MESSAGE"].partition(":")[0] for row in house.records()] == ["hold added by others in its stored half"]
    house.libvirt.release(UUID, alias)
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
    records = house.records()
    assert [row["RESULT"].rpartition(".")[2] for row in records] == ["NotAuthorized", "Blocked", "NotAssigned"]
    assert [row["DEVICE"] for row in records] == [STICK.name, HUB.name, STICK.name]
    for row in records:
        assert (row["UID"], row["MACHINE"], row["MACHINE_NAME"]) == (str(CALLER), UUID, "vm")
        assert "JOB" not in row and "SPELT" not in row


async def test_a_refusal_for_what_is_not_there_is_no_record(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """Or anybody could write thousands of them, with names of their own choice."""
    caplog.set_level(logging.DEBUG, "hostpassd")
    twin = usb("1-3", number=9)
    house.emit(DeviceSeen(twin))
    for name in ("nope", "x" * 9999, "46f4:0001"):
        with pytest.raises((errors.NoSuchDevice, errors.InvalidArgs, errors.AmbiguousDevice)):
            await house.start("assign", dataclasses.replace(STICK, name=name))
    house.emit(MachineGone(KEY))
    with pytest.raises(errors.NoSuchMachine):
        await house.start("assign", STICK)
    assert house.records() == []
    told = [record for record in caplog.records if "refused" in record.getMessage()]
    assert [record.levelname for record in told] == ["DEBUG"] * 4
    assert all(f"user {CALLER}" in record.getMessage() for record in told)


async def test_what_was_spelt_and_is_not_there_is_in_no_field_of_a_device(house: House) -> None:
    request = Assign("vm", ("usb_9_9",), Options(plan="0" * 32), CALLER)
    with pytest.raises(errors.StalePlan):
        await house.daemon.operations.start(request, _yes)
    [record] = house.records()
    assert record["SPELT"] == "usb_9_9" and "DEVICE" not in record


async def _yes(checks: Sequence[Check]) -> None:
    pass


async def test_what_was_left_and_put_in_order_is_ours_and_has_a_record(house: House) -> None:
    house.libvirt.after = lambda call: house.libvirt.lose() if call == "attach_config" else None
    assert (await house.do("assign", STICK)).job.state == "failed"
    assert stories(house.records()) == [("operation", STICK.name, "org.hostpassd1.Error.HypervisorUnavailable")]
    house.libvirt.calm()
    house.libvirt.come_back()
    await house.put_in_order()
    assert not house.libvirt.machines[UUID].config
    [record] = house.records()
    assert (record["KIND"], record["RESULT"], record["JOB"]) == ("operation", "recovered", "1")
    assert "put in order" in record["MESSAGE"]


# --- what it costs ---


class Journal:
    """What journald is to the daemon: a socket that takes some datagrams, and then no more until it is read."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(str(path))

    def read(self) -> list[dict[str, str]]:
        """The records that came since the last call."""
        found: list[dict[str, str]] = []
        while True:
            try:
                lines = self.socket.recv(65536).decode().splitlines()
            except BlockingIOError:
                return found
            found.append(
                {name.removeprefix("HOSTPASSD_"): value for name, _, value in (x.partition("=") for x in lines)}
            )


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    made = Journal(tmp_path / "socket")
    monkeypatch.setattr(audit, "JOURNAL", str(tmp_path / "socket"))
    yield made
    made.socket.close()


@pytest.fixture
def loop() -> Iterator[Clockwork]:
    made = Clockwork()
    yield made
    made.abandon()


def refused(log: Records, loop: Clockwork, uid: int) -> None:
    loop.do(lambda: log.refusal(uid, "refused", operation="assign", device="usb_1_1"))


def test_of_refusals_a_user_has_a_few_records_a_minute_and_a_count(journal: Journal, loop: Clockwork) -> None:
    log = Records()
    for _ in range(1000):
        refused(log, loop, 1000)
    refused(log, loop, 1001)
    assert [row["UID"] for row in journal.read()] == ["1000"] * 5 + ["1001"]
    loop.advance(59)
    assert journal.read() == []
    loop.advance(1)
    [record] = journal.read()
    assert (record["UID"], record["LEFT_OUT"], record["OPERATION"]) == ("1000", "995", "refusals")
    assert record["MESSAGE_ID"] == names.MESSAGE_OPERATION and "995 more calls of user 1000" in record["MESSAGE"]
    refused(log, loop, 1000)
    assert [row["MESSAGE"] for row in journal.read()] == ["refused"]
    loop.advance(600)
    assert journal.read() == []


def test_nor_do_many_users_fill_the_journal(journal: Journal, loop: Clockwork) -> None:
    """Who has a range of user ids has 65,536 of them."""
    log, records = Records(), 0
    for uid in range(100000, 101000):
        for _ in range(10):
            refused(log, loop, uid)
            records += len(journal.read())
    assert records == 60
    loop.advance(60)
    counts: list[int] = []
    while told := journal.read():
        counts += [int(row["LEFT_OUT"]) for row in told]
        if log.waiting:  # the socket had no room for all of them at once
            loop.do(log.send_waiting)
    assert len(counts) == 21 and sum(counts) + records == 10000
    loop.advance(600)
    assert journal.read() == []


async def test_a_cancel_that_is_refused_is_a_refusal_like_others(house: House) -> None:
    job = Job(1, "assign", UUID, (STICK.name,), (STICK.name,), CALLER)
    for _ in range(100):
        house.emit(CancelAnswered(job, 1001, errors.NotAuthorized("no")))
    assert {row["OPERATION"] for row in house.records()} == {"cancel"}
    house.emit(CancelAnswered(job, CALLER))
    assert [row["RESULT"] for row in house.records()] == ["done"]


@pytest.mark.parametrize("lost", [0, 7])
async def test_a_full_journal_is_waited_for_by_nobody_and_gets_all_later(
    journal: Journal, caplog: pytest.LogCaptureFixture, lost: int
) -> None:
    """journald's queue is full, and stderr may be nobody's to read: the loop goes on."""
    caplog.set_level(logging.DEBUG)
    log, sent = Records(), 0
    while not log.waiting:
        log.write(names.MESSAGE_OPERATION, str(sent), uid="1000")
        sent += 1
    for _ in range(audit.WAITING_LIMIT - 1 + lost):
        log.write(names.MESSAGE_OPERATION, str(sent), uid="1000")
        sent += 1
    assert not caplog.records
    records: list[dict[str, str]] = []
    while log.waiting or log.lost:
        records += journal.read()
        await asyncio.sleep(0)
    records += journal.read()
    assert [row["MESSAGE"] for row in records[: sent - lost]] == [str(number) for number in range(sent - lost)]
    assert [row["MESSAGE"] for row in records[sent - lost :]] == (
        [f"{lost} records are lost: the journal had no room for them"] if lost else []
    )
    log.write(names.MESSAGE_OPERATION, "again")
    assert [row["MESSAGE"] for row in journal.read()] == ["again"]


async def test_a_journal_that_goes_while_something_waits_leaves_the_log(
    journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    log = Records()
    while not log.waiting:
        log.write(names.MESSAGE_OPERATION, "assign of usb_1_1: done", uid="1000")
    journal.socket.close()
    (tmp_path / "socket").unlink()
    while log.waiting:
        await asyncio.sleep(0)
    assert [record.getMessage() for record in caplog.records] == ["assign of usb_1_1: done (by user 1000)"]


def test_without_a_journal_the_log_has_it_and_who_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(audit, "JOURNAL", str(tmp_path / "nothing"))
    caplog.set_level(logging.INFO)
    Records().write(names.MESSAGE_OPERATION, "assign of usb_1_1:\ndone", uid="1000")
    assert [record.getMessage() for record in caplog.records] == ["assign of usb_1_1: done (by user 1000)"]
