"""The intent log: what it keeps, what it refuses in words, and that it neither blocks nor loses anything."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import errno
import json
import math
import os
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostpassd import errors
from hostpassd.model.device import Device
from hostpassd.model.events import DeviceSeen
from hostpassd.model.machine import Claim, MachineKey
from hostpassd.passthrough.assign import Assign
from hostpassd.passthrough.intent_rows import Unfinished
from hostpassd.passthrough.intents import IntentLog
from hostpassd.passthrough.request import Options, Plan
from hostpassd.passthrough.rowfile import rows_in
from hostpassd.passthrough.steps import Attach, Detach, Reattach, Store, Unplug, Unstore
from hostpassd.state.problems import problems
from tests.sim.disk import Disk, no_room
from tests.sim.ends import daemon_on, simulated
from tests.sim.world import OTHER, URI, UUID, error_name, hostdev, pci, usb
from tests.unit.test_execute import GPU, LUN, NIC, PAIR, STICK, World, reborn

CLAIM = hostdev(NIC, alias="ua-1")
STEPS = (
    Store("nic", CLAIM),
    Unstore("nic", CLAIM),
    Detach("nic", "e1000e"),
    Attach("nic", "ua-1", CLAIM.xml),
    Unplug("nic", "ua-1", CLAIM.id),
    Reattach("nic"),
)


def plan(device: str = "nic", *locks: str, uri: str = URI) -> Plan:
    request = Assign(UUID, (device,), Options(), 0)
    steps = tuple(dataclasses.replace(step, device=device) for step in STEPS)
    return Plan(request, MachineKey(uri, UUID), (device,), (device,), (1,), steps, locks or (device,))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostpassd.passthrough.intents.CHECK_PAUSE", 0.0)


def log_in(folder: Path) -> IntentLog:
    return IntentLog(folder / "intents", (URI,))


def line(row: object) -> bytes:
    """ROW, a text or what JSON can say, as a line of the file."""
    text = (row if isinstance(row, str) else json.dumps(row)).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def rows(folder: Path) -> list[Any]:
    """The rows of the file, JSON's where they are."""
    found = []
    for text in rows_in((folder / "intents").read_bytes()):
        assert text is not None
        found.append(json.loads(text))
    return found


def fine(call: str) -> None:
    """Nothing happens."""


def known(log: IntentLog) -> tuple[list[Unfinished], dict[str, tuple[str, str]]]:
    """What LOG knows of unfinished operations, whatever their numbers and order."""
    operations = [*log.unfinished, *log.under_way.values()]
    return sorted((dataclasses.replace(operation, number=0) for operation in operations), key=repr), log.lent


# What is written is what is known.

KINDS = ("begin", "step", "fail", "done", "undone", "leave", "end", "lend", "give_back")
ACTIONS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 3), st.integers(0, 5)), min_size=5, max_size=25)


async def act(log: IntentLog, action: str, number: int, at: int) -> None:
    """Calls one method, if it makes sense now."""
    running, left = number in log.under_way, log.left(number)
    if action == "begin" and not running and not left:
        await log.begin(number, plan(f"device {at}"))
    elif action in (("step", "fail", "leave") if running else ()) + (("done", "undone") if running or left else ()):
        await getattr(log, action)(number, at)
    elif action == "end":
        await log.end(number)
    elif action == "lend":
        await log.lend(f"device {at}", URI, ("", "e1000e")[number % 2])
    elif action == "give_back":
        await log.give_back(f"device {at}")


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(actions=ACTIONS, failing=st.sets(st.integers(1, 40)), restarts=st.sets(st.integers(0, 12)))
def test_whatever_happens_to_the_disk_a_new_log_knows_what_the_old_one_did(
    tmp_path: Path, actions: list[tuple[str, int, int]], failing: set[int], restarts: set[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        disk.lay({}, tmp_path)

        def fail(call: str) -> None:
            if disk.moments in failing:
                no_room(call)

        async def live() -> None:
            log = log_in(tmp_path)
            for turn, (action, number, at) in enumerate(actions):
                disk.at, before = fail, copy.deepcopy(known(log))
                try:
                    await act(log, action, number, at)
                except errors.StateFolderError:
                    assert action in ("begin", "step", "lend") and known(log) == before
                disk.at = fine
                if log.trouble.is_set():
                    await log.catch_up()
                new = log_in(tmp_path)
                assert known(new) == known(log), (action, number, at)
                log = new if turn in restarts else log

        asyncio.run(live())


async def test_each_step_is_read_as_it_was_written(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    await log.begin(7, plan())
    await log.step(7, 3)
    await log.undone(7, 2)
    (left,) = log_in(tmp_path).unfinished
    assert left == dataclasses.replace(log.running(7), number=-1)
    assert left.steps == STEPS and left.begun == 4
    assert (left.done, left.undone) == (frozenset({0, 1, 2}), frozenset({2}))


async def test_a_write_that_failed_half_way_does_not_swallow_the_next(tmp_path: Path, disk: Disk) -> None:
    log = log_in(tmp_path)
    await log.lend("other", URI, "e1000e")
    disk.at = lambda call: no_room(call) if call == "write" else None
    with pytest.raises(errors.StateFolderError, match=f"The state folder {tmp_path} is full: free some room"):
        await log.begin(1, plan())
    disk.at = fine
    await log.begin(2, plan())
    await log.step(2, 0)
    new = log_in(tmp_path)
    assert [(left.machine, left.begun) for left in new.unfinished] == [(UUID, 1)] and new.lent.keys() == {"other"}


async def test_the_end_is_written_before_the_file_is_written_anew(tmp_path: Path, disk: Disk) -> None:
    log = log_in(tmp_path)
    await log.begin(1, plan())
    disk.at = lambda call: no_room(call) if call == "replace" else None
    await log.end(1)
    assert rows(tmp_path)[-1] == {"end": 1} and not log.trouble.is_set()
    assert log_in(tmp_path).unfinished == ()


@pytest.mark.parametrize("happens", ["removed", "shortened", "replaced"])
async def test_what_others_do_to_the_file_is_mended_by_the_next_write(tmp_path: Path, happens: str) -> None:
    log = log_in(tmp_path)
    await log.begin(1, plan())
    path = tmp_path / "intents"
    if happens == "removed":
        path.unlink()
    elif happens == "shortened":
        path.write_bytes(b"")
    else:
        copy = path.read_bytes()
        path.unlink()
        (tmp_path / "other").write_bytes(b"")  # so that it is another file
        path.write_bytes(copy)
    await log.step(1, 0)
    assert [left.begun for left in log_in(tmp_path).unfinished] == [1]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "is full: free some room"),
        (errno.EDQUOT, "is full: free some room"),
        (errno.EROFS, "read-only: make it writable"),
        (errno.EACCES, "give it to that user"),
        (errno.EIO, "has an error: see the kernel's log"),
        (errno.ENOTDIR, "cannot be read or written (Not a directory)"),
    ],
)
async def test_why_it_cannot_be_written_is_told_in_words(tmp_path: Path, disk: Disk, number: int, words: str) -> None:
    def fail(call: str) -> None:
        raise OSError(number, os.strerror(number))

    world = World(tmp_path)
    before = world.truth()
    disk.at = fail
    job = await world.do("assign", NIC)
    assert (job.state, error_name(job)) == ("failed", "org.hostpassd1.Error.Failed")
    assert words in str(job.error) and str(tmp_path) in str(job.error) and "try again" in str(job.error)
    assert world.truth() == before and world.libvirt.calls == []
    with pytest.raises(errors.StateFolderError, match="again"):  # nobody is asked for a password in vain
        await world.start("assign", NIC)
    disk.at = fine
    assert (await world.do("assign", NIC)).state == "done"


# Ended is ended.


async def test_an_operation_whose_end_cannot_be_written_is_done_and_is_written_before_anything_else(
    tmp_path: Path, disk: Disk
) -> None:
    world = World(tmp_path)
    world.libvirt.after = lambda call: setattr(disk, "at", no_room) if call == "attach_live" else None
    assert (await world.do("assign", NIC)).state == "done"
    assigned = world.truth()
    assert rows(tmp_path)[-1]["step"] == 1 and world.intents.problem
    with pytest.raises(errors.StateFolderError):
        await world.start("assign", STICK)
    world.libvirt.calm()
    disk.at = fine
    assert (await world.do("assign", LUN)).state == "done"
    assert not world.intents.trouble.is_set() and rows(tmp_path) == [{"version": 2}]
    world = await reborn(world, tmp_path)
    assert world.truth()[0] == assigned[0] and len(world.libvirt.machines[UUID].config) == 2


async def test_what_could_not_be_written_is_written_by_itself_when_there_is_room(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostpassd.passthrough.upkeep.LOG_RETRY", 0.001)
    world = World(tmp_path)
    keeping = asyncio.create_task(world.operations.upkeep.keep_log())
    tries: list[str] = []
    world.libvirt.after = lambda call: setattr(disk, "at", no_room) if call == "attach_live" else None
    assert (await world.do("assign", NIC)).state == "done"

    def run_out(call: str) -> None:
        tries.append(call)
        if len(tries) > 3:
            disk.at = fine
        no_room(call)

    disk.at = run_out
    while world.intents.trouble.is_set():
        await asyncio.sleep(0)
    assert rows(tmp_path) == [{"version": 2}]
    keeping.cancel()


# Without a folder.


async def test_with_nowhere_to_write_operations_are_refused_until_there_is(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("no folder")
    world = World(tmp_path / "state")
    before = world.truth()
    with pytest.raises(errors.StateFolderError, match="cannot be read or written"):
        await world.start("assign", NIC)
    assert world.truth() == before and world.libvirt.calls == []
    (tmp_path / "state").unlink()
    assert (await world.do("assign", NIC)).state == "done"
    assert rows(tmp_path / "state") == [{"version": 2}]


async def test_the_service_manager_is_told_why_there_are_no_operations(tmp_path: Path, disk: Disk) -> None:
    daemon = daemon_on(simulated(tmp_path))
    assert "operations" not in daemon.status()
    disk.at = no_room
    with pytest.raises(errors.StateFolderError):
        await daemon.intents.catch_up()
    assert daemon.status().endswith("; no operations: " + daemon.intents.problem) and "full" in daemon.status()
    [problem] = problems(daemon.state)
    assert problem.code == "state-folder" and dict(problem.details)["error"] == daemon.intents.problem[:-1]
    disk.at = fine
    await daemon.intents.catch_up()
    assert "operations" not in daemon.status() and problems(daemon.state) == ()


async def test_what_is_wrong_at_the_start_is_a_problem_of_the_host(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("no folder")
    [problem] = problems(daemon_on(simulated(tmp_path / "state")).state)
    assert problem.code == "state-folder" and f"{tmp_path}/state/intents cannot be read" in problem.message


async def test_a_file_that_can_be_read_late_is_put_in_order_then(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostpassd.passthrough.upkeep.LOG_RETRY", 0.001)
    world = World(tmp_path)
    before = world.truth()
    world.libvirt.refuse_calls = {"attach_live": "no", "detach_config": "never"}
    await world.do("assign", NIC)
    await world.quiet()
    assert world.truth() != before
    (tmp_path / "intents").rename(tmp_path / "aside")
    (tmp_path / "intents").mkdir()
    world = await reborn(world, tmp_path)
    with pytest.raises(errors.StateFolderError, match="Is a directory"):
        await world.start("assign", NIC)
    assert world.truth() != before
    keeping = asyncio.create_task(world.operations.upkeep.keep_log())
    (tmp_path / "intents").rmdir()
    (tmp_path / "aside").rename(tmp_path / "intents")
    while world.intents.trouble.is_set() or world.intents.unfinished:
        await asyncio.sleep(0)
    await world.quiet()
    assert world.truth() == before and world.intents.unfinished == ()
    keeping.cancel()


async def test_what_hostpassd_1_0_left_is_taken_over(tmp_path: Path) -> None:
    step = {"kind": "Store", "device": NIC.name, "xml": hostdev(NIC, alias="ua-hostpassd-old").xml}
    begin = foreign_rows({})[0] | {"begin": -1, "steps": [step, {"kind": "GiveBack", "device": NIC.name}]}
    del begin["instead"]
    begin["groups"] = begin.pop("locks")
    ended = begin | {"begin": 1}
    lend = {"lend": PAIR[0].name, "uri": URI, "driver": "e1000e"}
    left = [ended, begin, {"step": -1, "begun": 1}, lend, {"end": 1}]
    (tmp_path / "journal").write_text("".join(json.dumps(row) + "\n" for row in left) + '{"end": -')
    world = World(tmp_path)
    world.libvirt.store(UUID, hostdev(NIC, alias="ua-hostpassd-old"))
    assert [(left.number, left.begun) for left in world.intents.unfinished] == [(-1, 1)]
    assert world.intents.lent == {PAIR[0].name: (URI, "e1000e")}
    await world.intents.catch_up()
    assert not (tmp_path / "journal").exists()
    world = await reborn(world, tmp_path)
    assert world.libvirt.machines[UUID].config == () and known(world.intents) == ([], {})


async def test_what_belongs_to_a_hypervisor_that_is_configured_no_more_is_told_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = IntentLog(tmp_path / "intents", (URI, "qemu:///gone"))
    await log.begin(1, plan(NIC.name, uri="qemu:///gone"))
    await log.lend(PAIR[0].name, "qemu:///gone", "e1000e")
    assert not caplog.text
    world = await reborn(World(tmp_path), tmp_path)
    await world.intents.catch_up()
    for name in (NIC.name, PAIR[0].name):
        assert any(name in text and "qemu:///gone" in text for text in caplog.messages), name
    assert world.libvirt.calls == []
    assert known(IntentLog(tmp_path / "intents", (URI, "qemu:///gone"))) == known(log)


# The loop is not blocked.


async def test_a_slow_disk_holds_up_the_effect_and_nobody_else(tmp_path: Path, disk: Disk) -> None:
    world = World(tmp_path)
    reached, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow(call: str) -> None:
        if call == "fsync":
            loop.call_soon_threadsafe(reached.set)
            assert go_on.wait(60)

    disk.at = slow
    control = await world.start("assign", STICK)
    await reached.wait()
    assert world.libvirt.calls == [] and not control.ended.is_set()
    go_on.set()
    await control.ended.wait()
    assert control.job.state == "done" and world.libvirt.calls == ["attach_config", "attach_live"]


async def test_a_disk_that_hangs_ends_the_job_in_words_and_is_made_up_for_when_it_goes_on(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostpassd.passthrough.intents.PATIENCE", 0.05)
    world = World(tmp_path)
    await world.intents.catch_up()
    before = world.truth()
    go_on = threading.Event()
    disk.at = lambda call: go_on.wait(60)
    job = await world.do("assign", NIC)
    assert (job.state, error_name(job)) == ("failed", "org.hostpassd1.Error.Failed")
    assert "does not answer" in str(job.error) and world.truth() == before
    with pytest.raises(errors.StateFolderError, match="does not answer"):
        await world.start("assign", NIC)
    go_on.set()
    assert world.intents.hanging
    await asyncio.wait({world.intents.hanging})
    assert (await world.do("assign", STICK)).state == "done"
    assert known(log_in(tmp_path)) == ([], {})


async def test_many_wishes_bring_about_one_attempt_to_write_and_then_none_for_a_while(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever may do nothing keeps the disk busy, and what is to be written waits behind that."""
    monkeypatch.setattr("hostpassd.passthrough.intents.CHECK_PAUSE", 3600.0)
    log = log_in(tmp_path)
    attempts: list[str] = []

    def fail(call: str) -> None:
        attempts.append(call)
        no_room(call)

    disk.at = fail
    with pytest.raises(errors.StateFolderError):
        await log.begin(1, plan())
    monkeypatch.setattr(log, "_failed_at", -math.inf)  # a machine may have been started a moment ago
    for _ in range(2):
        refused = await asyncio.gather(*(log.check(plan()) for _ in range(20)), return_exceptions=True)
        assert {str(error) for error in refused} == {log.problem} and len(attempts) == 2
    disk.at = fine
    await log.begin(1, plan())  # what was allowed does not wait
    await log.check(plan())


async def test_a_row_that_waits_for_many_others_is_written_though_that_takes_long(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, loop = [0.0], asyncio.get_running_loop()
    monkeypatch.setattr("hostpassd.passthrough.intents.time.monotonic", lambda: now[0])
    monkeypatch.setattr("hostpassd.passthrough.intents.PATIENCE", 15.0)
    log = log_in(tmp_path)

    async def look_again(futures: object, timeout: float) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr("hostpassd.passthrough.intents.asyncio.wait", look_again)

    def slow(call: str) -> None:
        now[0] += 2.0  # and no call has more than five of these
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()

    disk.at = slow
    await asyncio.gather(*(log.lend(f"device {at}", URI, "") for at in range(20)))
    assert now[0] > 45.0 and not log.trouble.is_set() and len(log_in(tmp_path).lent) == 20


async def test_what_is_added_costs_no_writing_of_all_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_in(tmp_path)
    await log.begin(1, plan("a"))
    monkeypatch.delattr("hostpassd.passthrough.intents.rows_of")
    await log.begin(2, plan("b"))
    await log.step(1, 0)
    assert len(log_in(tmp_path).unfinished) == 2


async def test_what_a_refused_operation_was_to_stand_for_is_kept(tmp_path: Path, disk: Disk) -> None:
    log = log_in(tmp_path)
    await log.begin(1, plan())
    await log.leave(1, 0)
    go_on = threading.Event()

    def fail(call: str) -> None:
        go_on.wait(60)
        disk.at = fine  # the next one goes well
        no_room(call)

    disk.at = fail
    refused, other = (asyncio.create_task(call) for call in (log.begin(2, plan()), log.lend("b", URI, "")))
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(errors.StateFolderError):
        await refused
    await other
    await log.lend("c", URI, "")
    assert known(log_in(tmp_path)) == known(log) and len(log.unfinished) == 1


async def test_writes_are_made_in_the_order_in_which_they_were_asked_for(tmp_path: Path, disk: Disk) -> None:
    log = log_in(tmp_path)
    await log.begin(1, plan("a"))
    go_on = threading.Event()
    disk.at = lambda call: go_on.wait(60)
    writes = [
        asyncio.create_task(write)
        for write in (log.step(1, 0), log.lend("b", URI, ""), log.step(1, 1), log.give_back("b"))
    ]
    await asyncio.sleep(0)
    writes[1].cancel()  # it is written all the same
    go_on.set()
    await asyncio.gather(*writes, return_exceptions=True)
    assert [next(iter(row)) for row in rows(tmp_path)] == ["version", "begin", "step", "lend", "step", "return"]


# What an operation stands for.


def moving(*devices: str, machine: str = UUID, uri: str = URI) -> Plan:
    """A plan of DEVICES that are below one controller."""
    steps = tuple(Store(device, CLAIM) for device in devices)
    locks = (*sorted(devices), "group 5")
    return Plan(
        Assign(machine, devices[:1], Options(), 0),
        MachineKey(uri, machine),
        devices[:1],
        devices,
        (1,) * len(devices),
        steps,
        locks,
    )


@pytest.mark.parametrize(
    ("later", "open_steps"),
    [
        (moving("b"), {0, 1}),
        (moving("a", machine=OTHER), {0, 1}),
        (moving("a", uri="qemu:///other"), {0, 1}),
        (moving("a"), {1}),
        (moving("a", "b", "c"), set()),
    ],
    ids=["another device", "another machine", "another hypervisor", "one of the two", "both"],
)
async def test_an_operation_stands_for_what_was_left_on_its_own_devices_and_machine_alone(
    tmp_path: Path, disk: Disk, later: Plan, open_steps: set[int]
) -> None:
    log = log_in(tmp_path)
    await log.begin(1, moving("a", "c"))
    await log.leave(1, 2)
    before = known(log)
    disk.at = no_room
    with pytest.raises(errors.StateFolderError):
        await log.begin(2, later)
    assert known(log) == before
    disk.at = fine
    await log.catch_up()
    await log.begin(2, later)
    new = log_in(tmp_path)
    assert known(new) == known(log)
    await log.end(2)
    for left in (log.unfinished, log_in(tmp_path).unfinished):
        assert {at for operation in left for at in {0, 1} - operation.undone} == open_steps


async def test_of_two_sticks_below_one_controller_one_is_undone_though_the_other_is_assigned(tmp_path: Path) -> None:
    world = World(tmp_path)
    controller = pci("0000:05:00.0", group=7, driver="xhci_hcd", code=0x0C0330)
    first, second = usb("1-8", controller, number=8, product=8), usb("1-9", controller, number=9, product=9)
    for device in (controller, first, second):
        world.emit(DeviceSeen(device))
    world.libvirt.refuse_calls = {"attach_live": "no", "detach_config": "never"}
    assert "not undone" in str((await world.do("assign", first)).error)
    await world.quiet()
    world.libvirt.refuse_calls = {"detach_config": "never"}
    assert (await world.do("assign", second)).state == "done"
    await world.quiet()
    world = await reborn(world, tmp_path)
    (hold,) = world.libvirt.machines[UUID].config
    assert hold.id == hostdev(second, config=True).id and world.intents.unfinished == ()


# What somebody else does to the same device meanwhile is theirs.


def store_by_others(world: World, *devices: Device) -> tuple[Claim, ...]:
    """An administrator puts DEVICES into the stored configuration, in the place of what is there."""
    claims = tuple(hostdev(device, alias="", config=True) for device in devices)
    world.libvirt.put(dataclasses.replace(world.libvirt.machines[UUID], config=claims))
    return claims


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("lost_at", ["detach_config", "detach_live"])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
async def test_going_on_with_a_dismissal_leaves_what_was_stored_again(
    tmp_path: Path, restarted: bool, lost_at: str, whose: str
) -> None:
    world = World(tmp_path)
    await world.do("assign", STICK)
    if whose == "theirs":  # then it looks the same as before when it is stored again
        store_by_others(world, STICK)
    world.libvirt.after = lambda call: world.libvirt.lose() if call == lost_at else None
    job = await world.do("dismiss", STICK)
    assert "when libvirt is back" in str(job.error)
    await world.quiet()
    claims = store_by_others(world, STICK)
    if restarted:
        world = await reborn(world, tmp_path)
    else:
        world.libvirt.calm()
        world.libvirt.come_back()
        await world.quiet()
    assert world.libvirt.machines[UUID].config == claims and world.intents.unfinished == ()


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_step_that_was_taken_back_is_not_taken_back_again(tmp_path: Path, restarted: bool) -> None:
    world = World(tmp_path)
    await world.do("assign", PAIR[0])
    world.libvirt.refuse_calls = {"detach_live": "no"}
    # One of the two cannot be stored again.
    world.libvirt.fails = lambda call: call == "attach_config" and world.libvirt.calls.count(call) == 3
    job = await world.do("dismiss", PAIR[0])
    assert "not undone: store" in str(job.error)
    assert len(world.libvirt.machines[UUID].config) == 1
    world.libvirt.fails = lambda call: call == "attach_config"
    await world.quiet()
    store_by_others(world)  # nothing
    world.libvirt.calm()
    if restarted:
        world = await reborn(world, tmp_path)
    else:
        world.libvirt.come_back()
        await world.quiet()
    assert len(world.libvirt.machines[UUID].config) == 1 and world.intents.unfinished == ()


async def test_an_alias_that_another_device_has_by_now_is_not_asked_for(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.libvirt.put(dataclasses.replace(world.libvirt.machines[UUID], live=(hostdev(STICK, "hostdev0"),)))
    world.libvirt.after = lambda call: world.libvirt.lose() if call == "detach_live" else None
    job = await world.do("dismiss", STICK)
    assert "the rest is done when libvirt is back" in str(job.error)
    await world.quiet()
    others = (hostdev(LUN, "hostdev0"),)
    world.libvirt.put(dataclasses.replace(world.libvirt.machines[UUID], live=others))
    world = await reborn(world, tmp_path)
    assert world.libvirt.machines[UUID].live == others and world.intents.unfinished == ()


# What is not understood.


def foreign_rows(step: dict[str, str], **more: object) -> list[dict[str, object]]:
    begin = {
        "begin": 3,
        "operation": "assign",
        "machine": UUID,
        "uri": URI,
        "locks": ["group 5"],
        "steps": [{"step": "detach", "device": PAIR[0].name, "driver": "snd"} | step],
        "begun": 0,
        "instead": [],
    }
    return [begin | more, {"step": 3, "begun": 1}]


UNKNOWN: dict[str, list[object]] = {
    "another version": [{"version": 3}, {"begin": 1, "what": ["ever", PAIR[0].name]}, {"lend": "x"}],
    "a kind of step": [{"version": 2}, *foreign_rows({"step": "polish"})],
    "a field of a step": [{"version": 2}, *foreign_rows({"colour": "red"})],
    "a field": [{"version": 2}, *foreign_rows({}, deadline=7)],
    "a row of an operation": [{"version": 2}, *foreign_rows({}), {"deadline": 3, "at": 12345}],
    "a row of its own": [{"version": 2}, {"polish": 1, "things": [{"device": PAIR[0].name}]}],
    "a loan": [{"version": 2}, {"lend": PAIR[0].name, "uri": URI, "driver": "snd", "until": 7}],
}


@pytest.mark.parametrize("rows_there", UNKNOWN.values(), ids=UNKNOWN.keys())
async def test_what_is_not_understood_is_kept_as_it_is_and_its_devices_are_left_alone(
    tmp_path: Path, rows_there: list[object]
) -> None:
    data = b"".join(map(line, rows_there))
    (tmp_path / "intents").write_bytes(data)
    world = World(tmp_path)
    for device in PAIR:  # the other one is a companion
        with pytest.raises(errors.Failed, match=f"intents tells of something unfinished with {PAIR[0].name}|group 5"):
            await world.start("assign", device)
    if UUID not in data.decode():
        assert (await world.do("assign", NIC)).state == "done"
        assert (await world.do("dismiss", NIC)).state == "done"
    else:
        with pytest.raises(errors.Failed, match="start that version"):
            await world.start("assign", NIC)
    world = await reborn(world, tmp_path)
    await world.intents.catch_up()
    assert world.intents.unfinished == () and world.libvirt.machines[UUID].live == ()
    assert (tmp_path / "intents").read_bytes() == data + line({"version": 2})


async def test_nobody_touches_anything_when_it_cannot_be_told_what_a_row_is_about(tmp_path: Path) -> None:
    (tmp_path / "intents").write_bytes(line({"version": 3}) + line("no JSON"))
    with pytest.raises(errors.Failed, match="another version of hostpassd wrote"):
        await World(tmp_path).start("assign", NIC)


@pytest.mark.parametrize("how", ["ended", "instead"])
async def test_what_is_not_understood_and_is_over_is_forgotten(tmp_path: Path, how: str) -> None:
    instead = foreign_rows({})[0] | {"begin": 4, "instead": [3]}
    over = [{"end": 3}] if how == "ended" else [instead, {"end": 4}]
    (tmp_path / "intents").write_bytes(b"".join(map(line, [*UNKNOWN["a kind of step"], *over])))
    world = World(tmp_path)
    assert world.intents.unfinished == ()
    assert (await world.do("assign", PAIR[0])).state == "done"
    assert rows(tmp_path)[0] == {"version": 2} and len([row for row in rows(tmp_path) if "begin" in row]) == 0


# Damage.

GARBAGE = [
    b"\x00" * 512,
    b"\x7fELF\x02\x01\n\xff\xfe\n",
    b"{}",
    b"half a row",
    line("no version row"),
    b"\n" + b"x" * (17 << 20),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
async def test_a_file_that_is_something_else_is_kept_beside_and_operations_go_on(
    tmp_path: Path, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "intents.corrupt-1").write_text("an earlier one")
    (tmp_path / "intents").write_bytes(garbage)
    world = World(tmp_path)
    assert "is damaged" in caplog.text
    assert (await world.do("assign", NIC)).state == "done"
    assert (tmp_path / "intents.corrupt-2").read_bytes() == garbage
    assert (tmp_path / "intents.corrupt-1").read_text() == "an earlier one"
    caplog.clear()
    world = await reborn(world, tmp_path)
    assert "is damaged" not in caplog.text and not (tmp_path / "intents.corrupt-3").exists()
    assert world.libvirt.machines[UUID].live


@pytest.mark.parametrize("data", [b"", b"\n"])
async def test_an_empty_file_is_no_damage(tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "intents").write_bytes(data)
    assert (await World(tmp_path).do("assign", NIC)).state == "done"
    assert not caplog.text and not list(tmp_path.glob("*corrupt*"))


async def test_what_stood_below_a_version_row_that_is_damaged_is_kept_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = log_in(tmp_path)
    await log.begin(1, plan(NIC.name))
    await log.lend(PAIR[0].name, URI, "e1000e")
    path = tmp_path / "intents"
    whole = path.read_bytes()
    path.write_bytes(b"x" + whole[1:])
    rest = whole.partition(b"\n")[2]
    for _ in range(2):
        world = World(tmp_path)
        for device in (NIC, PAIR[0]):
            with pytest.raises(errors.Failed, match=f"something unfinished with {device.name}"):
                await world.start("assign", device)
        await world.intents.catch_up()
        assert path.read_bytes() == rest + line({"version": 2}) and world.libvirt.calls == []
        assert "rows of another version, or damaged ones" in caplog.text
    assert [p.read_bytes() for p in tmp_path.glob("*corrupt*")] == [b"x" + whole[1:]]


async def test_a_last_row_is_damaged_where_its_end_is_there_and_torn_where_it_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = log_in(tmp_path)
    await log.begin(1, plan(NIC.name))
    await log.lend("device", URI, "e1000e")
    path = tmp_path / "intents"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    torn = log_in(tmp_path)
    assert len(torn.unfinished) == 1 and not torn.lent and not caplog.text
    path.write_bytes(whole[:-2] + b"?\n")
    damaged = log_in(tmp_path)
    assert "is damaged" in caplog.text and not damaged.unfinished
    with pytest.raises(errors.Failed, match="damaged"):
        await damaged.check(plan(NIC.name))


async def test_an_operation_whose_end_may_be_in_a_damaged_row_is_not_undone(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert (await world.do("assign", NIC)).state == "done"
    assert (await world.do("assign", STICK)).state == "done"
    assigned = world.truth()
    left = [
        foreign_rows({"device": name})[0] | {"begin": number, "machine": "?", "locks": [name]}
        for number, name in enumerate((NIC.name, LUN.name), 1)
    ]
    rows_there = [line({"version": 2}), *map(line, left), line({"end": 1}).replace(b"1", b"2"), line({"end": 2})]
    rows_there.insert(1, line({"lend": GPU[0].name, "uri": URI, "driver": "nouveau"}))
    (tmp_path / "intents").write_bytes(b"".join(rows_there))
    for _ in range(2):  # the doubt outlives a restart
        world = await reborn(world, tmp_path)
        await world.intents.catch_up()
        assert world.truth() == assigned
        with pytest.raises(errors.Failed, match="damaged"):
            await world.start("dismiss", NIC)
        assert (await world.do("assign", LUN)).state == "done"
        assert (await world.do("dismiss", LUN)).state == "done"
    assert (tmp_path / "intents.corrupt-1").read_bytes() == b"".join(rows_there)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(
            st.binary(),
            st.sampled_from([line(row) for rows_ in UNKNOWN.values() for row in rows_]),
            st.recursive(
                st.none() | st.integers(-2, 4) | st.text(max_size=3) | st.sampled_from(("Store", "nic")),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(
                        st.sampled_from(
                            (
                                "begin",
                                "step",
                                "fail",
                                "done",
                                "end",
                                "lend",
                                "return",
                                "version",
                                "at",
                                "begun",
                                "instead",
                                "steps",
                                "kind",
                                "xml",
                            )
                        ),
                        inner,
                        max_size=6,
                    )
                ),
            ).map(line),
        )
    )
)
def test_no_file_keeps_the_daemon_from_starting(tmp_path: Path, parts: list[bytes]) -> None:
    (tmp_path / "intents").write_bytes(line({"version": 2}) + b"".join(parts))
    log = log_in(tmp_path)

    async def written_and_read_again() -> None:
        await log.catch_up()

    asyncio.run(written_and_read_again())
    again = log_in(tmp_path)
    assert known(again) == known(log) and again.kept == log.kept
