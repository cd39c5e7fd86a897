"""Calls of libvirt that do not return: whoever waits is told in time, the locks stay, and it ends in a clean state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostpassd import errors
from hostpassd.model.device import Device
from hostpassd.model.events import MachineRead
from hostpassd.passthrough.jobs import RunningJob
from hostpassd.passthrough.operations import STOP_PATIENCE
from tests.sim.clockwork import Clockwork
from tests.sim.world import UUID, error_name
from tests.unit.test_execute import GPU, NIC, PAIR, STICK, World, upkeep

TIMEOUT = 30  # seconds, of the jobs

every_operation = pytest.mark.parametrize("operation", ["assign", "dismiss"])
every_device = pytest.mark.parametrize("device", [NIC, PAIR[0], GPU[0], STICK], ids=lambda d: d.name)


class Rig:
    """A world, and its time."""

    def __init__(self, folder: Path, loop: Clockwork, before: World | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.loop = folder, loop
        self.world = loop.do(lambda: World(folder, libvirt=before.libvirt if before else None))
        self.libvirt = self.world.libvirt

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Runs it as far as it goes without time."""
        task = self.loop.create_task(coroutine)
        self.loop.run_forever()
        return task

    def start(self, operation: str, device: Device) -> RunningJob:
        """A job, as far as it goes."""
        control: RunningJob = self.begin(self.world.start(operation, device, TIMEOUT)).result()
        return control

    def do(self, operation: str, device: Device) -> None:
        assert self.start(operation, device).job.state == "done"

    def stick_at(self, at: int) -> None:
        """The call with that number, from 0, does not return."""
        self.libvirt.stick = lambda call: len(self.libvirt.calls) == at + 1

    def let_go(self, outcome: str) -> None:
        """What is stuck returns, and everything happens that comes of it."""
        self.libvirt.stick = lambda call: False
        self.loop.do(lambda: self.libvirt.let_go(outcome))
        self.loop.advance(60)

    @property
    def locked(self) -> list[str]:
        return self.world.executor.locked

    def is_quiet(self) -> bool:
        """Whether nothing is left to be done, and nobody waits."""
        world = self.world
        at_work = world.operations.running or upkeep(world) or self.locked
        return world.executor.waiting.is_idle and not (at_work or world.intents.unfinished)

    def reborn(self) -> Rig:
        """A new daemon on the same truth; libvirt is still at what it was at."""
        self.loop.do(self.libvirt.lose)
        self.libvirt.calm()
        new = Rig(self.folder, self.loop, self.world)
        self.loop.do(self.libvirt.come_back)
        self.loop.advance(60)
        return new


@pytest.fixture
def loop() -> Iterator[Clockwork]:
    made = Clockwork()
    yield made
    made.abandon()
    assert made.faults == []


def prepared(folder: Path, loop: Clockwork, operation: str, device: Device) -> Rig:
    rig = Rig(folder, loop)
    if operation == "dismiss":
        rig.do("assign", device)
    rig.libvirt.calls.clear()
    return rig


def clean_states(
    folder: Path, loop: Clockwork, operation: str, device: Device
) -> tuple[list[str], list[tuple[object, ...]]]:
    """The calls of an operation that works, and the truth before and after it."""
    works = prepared(folder / "works", loop, operation, device)
    before = works.world.truth()
    works.do(operation, device)
    return works.libvirt.calls, [before, works.world.truth()]


def time_out(rig: Rig, control: RunningJob) -> None:
    rig.loop.advance(TIMEOUT)


def cancel(rig: Rig, control: RunningJob) -> None:
    rig.loop.do(control.cancelled.set)
    rig.loop.advance(5)


GIVING_UP: dict[Callable[[Rig, RunningJob], None], tuple[str, str]] = {
    time_out: ("failed", "org.hostpassd1.Error.TimedOut"),
    cancel: ("cancelled", "org.hostpassd1.Error.Cancelled"),
}


@every_operation
@every_device
@pytest.mark.parametrize("give_up", GIVING_UP, ids=lambda f: f.__name__)
@pytest.mark.parametrize("outcome", ["done", "refused", "done and refused"])
def test_given_up_at_every_call_the_job_ends_and_when_libvirt_returns_it_is_put_in_order(
    tmp_path: Path,
    loop: Clockwork,
    operation: str,
    device: Device,
    give_up: Callable[[Rig, RunningJob], None],
    outcome: str,
) -> None:
    calls, clean = clean_states(tmp_path, loop, operation, device)
    for at, call in enumerate(calls):
        rig = prepared(tmp_path / str(at), loop, operation, device)
        rig.stick_at(at)
        control = rig.start(operation, device)
        assert rig.libvirt.calls[at] == call and not control.ended.is_set()
        give_up(rig, control)
        assert (control.job.state, error_name(control.job)) == GIVING_UP[give_up], call
        assert "libvirt is still at it" in str(control.job.error)
        assert len(rig.libvirt.calls) == at + 1 and rig.locked
        rig.loop.advance(600)
        assert len(rig.libvirt.calls) == at + 1 and rig.locked, "nothing is done before libvirt has returned"
        rig.let_go(outcome)
        assert rig.world.truth() in (clean[:1] if operation == "assign" else clean), call
        assert rig.is_quiet()


@every_operation
@every_device
@pytest.mark.parametrize("outcome", ["done", "refused"])
def test_the_daemon_stops_soon_and_the_next_one_puts_it_in_order(
    tmp_path: Path, loop: Clockwork, operation: str, device: Device, outcome: str
) -> None:
    calls, clean = clean_states(tmp_path, loop, operation, device)
    for at, call in enumerate(calls):
        rig = prepared(tmp_path / str(at), loop, operation, device)
        rig.stick_at(at)
        control = rig.start(operation, device)
        stopping = rig.begin(rig.world.operations.stop())
        loop.advance(STOP_PATIENCE)
        assert stopping.done() and control.job.state == "cancelled", call
        rig.loop.do(rig.libvirt.lose)
        if outcome == "refused":
            rig.libvirt.hanging.clear()
        new = rig.reborn()
        assert new.world.truth() in clean, call
        assert new.is_quiet()


def test_a_stop_does_not_wait_for_an_undoing_that_hangs_either(tmp_path: Path, loop: Clockwork) -> None:
    _, clean = clean_states(tmp_path, loop, "assign", NIC)
    rig = prepared(tmp_path / "undoing", loop, "assign", NIC)
    rig.libvirt.refuse_calls = {"attach_live": "no room"}
    rig.libvirt.stick = lambda call: call == "detach_config"
    control = rig.start("assign", NIC)
    assert control.job.state == "undoing"
    stopping = rig.begin(rig.world.operations.stop())
    loop.advance(2 * STOP_PATIENCE)
    assert stopping.done()
    assert "no room" in str(control.job.error) and "not undone yet" in str(control.job.error)
    with pytest.raises(errors.Failed, match="is being stopped"):
        rig.begin(rig.world.start("assign", STICK)).result()
    new = rig.reborn()
    assert new.world.truth() == clean[0] and new.is_quiet()


@every_operation
@every_device
@pytest.mark.parametrize("outcome", ["done", "refused", "done and refused"])
def test_what_hangs_while_a_refused_job_is_undone_is_told_and_put_in_order_later(
    tmp_path: Path, loop: Clockwork, operation: str, device: Device, outcome: str
) -> None:
    calls, clean = clean_states(tmp_path, loop, operation, device)
    for refused, call in enumerate(calls):
        at, stuck = refused + 1, True
        while stuck:
            rig = prepared(tmp_path / f"{refused} {at}", loop, operation, device)
            rig.libvirt.fails = lambda call, n=refused + 1, rig=rig: len(rig.libvirt.calls) == n  # type: ignore[misc]
            rig.stick_at(at)
            control = rig.start(operation, device)
            loop.advance(TIMEOUT)
            assert control.job.state == "failed" and "was told to fail" in str(control.job.error)
            stuck, at = bool(rig.libvirt.stuck), at + 1
            assert bool(rig.locked) == stuck
            rig.let_go(outcome)
            loop.do(rig.libvirt.come_back)  # what has failed is tried again
            loop.advance(60)
            assert rig.world.truth() in clean, f"{call} refused, stuck at call {at}"
            assert rig.is_quiet()


def test_who_waits_for_its_turn_can_stop_waiting_and_the_recovery_keeps_its_locks(
    tmp_path: Path, loop: Clockwork
) -> None:
    _, clean = clean_states(tmp_path, loop, "assign", PAIR[0])
    rig = prepared(tmp_path / "recovery", loop, "assign", PAIR[0])
    rig.libvirt.refuse_calls = {"attach_live": "no", "detach_config": "never"}
    control = rig.start("assign", PAIR[0])
    loop.advance(10)
    assert control.job.state == "failed" and rig.world.intents.unfinished
    rig.libvirt.calm()
    rig.libvirt.stick = lambda call: call == "detach_config"
    waiting = rig.start("assign", PAIR[0])
    assert rig.libvirt.stuck and waiting.job.state == "queued"
    loop.do(waiting.cancelled.set)
    assert waiting.job.state == "cancelled" and rig.locked and not rig.libvirt.stuck[0].given_up
    late = rig.start("assign", PAIR[1])
    loop.advance(TIMEOUT)
    assert error_name(late.job) == "org.hostpassd1.Error.TimedOut"
    assert "libvirt is still at an earlier job" in str(late.job.error)
    assert rig.locked and rig.libvirt.calls[-1] == "detach_config"
    rig.let_go("done")
    assert rig.world.truth() == clean[0] and rig.is_quiet()


def test_the_next_job_has_its_turn_when_libvirt_has_returned_and_others_need_not_wait(
    tmp_path: Path, loop: Clockwork
) -> None:
    rig = prepared(tmp_path / "next", loop, "assign", PAIR[0])
    rig.libvirt.stick = lambda call: call == "attach_live" and not rig.libvirt.stuck
    cancel(rig, rig.start("assign", PAIR[0]))
    second = rig.start("assign", PAIR[1])
    rig.do("assign", STICK)
    assert second.job.state == "queued"
    rig.let_go("done")
    assert second.job.state == "done"
    m = rig.libvirt.machines[UUID]
    assert len(m.live) == len(m.config) == 3 and rig.is_quiet()


def test_a_dismissal_that_libvirt_refuses_after_all_puts_back_what_it_had_stored(
    tmp_path: Path, loop: Clockwork
) -> None:
    _, clean = clean_states(tmp_path, loop, "dismiss", PAIR[0])
    rig = prepared(tmp_path / "refused", loop, "dismiss", PAIR[0])
    rig.libvirt.stick = lambda call: call == "detach_live"
    control = rig.start("dismiss", PAIR[0])
    time_out(rig, control)
    rig.libvirt.refuse_calls = {"detach_live": "cannot hot unplug multifunction PCI device"}
    rig.let_go("refused")
    assert rig.world.truth() == clean[0] and rig.is_quiet()
    assert not [hold for hold in rig.world.state.holds_of(UUID) if hold.releasing]


def test_what_is_given_back_late_and_hangs_holds_up_nothing_but_its_group(tmp_path: Path, loop: Clockwork) -> None:
    rig = prepared(tmp_path / "back", loop, "assign", PAIR[0])
    home = rig.world.truth()
    rig.do("assign", PAIR[0])
    rig.do("assign", GPU[0])
    rig.libvirt.stick = lambda call: call == "reattach_host" and not rig.libvirt.stuck
    loop.do(lambda: rig.libvirt.destroy(UUID))
    loop.advance(300)
    assert len(rig.libvirt.stuck) == 1 and len(rig.locked) == 1
    assert len(rig.world.intents.lent) == 2  # those of the group that is stuck
    rig.let_go("refused")
    assert rig.world.truth()[0] == home[0] and rig.world.intents.lent == {} and rig.is_quiet()


def test_a_connection_lost_while_libvirt_is_still_at_it_is_put_in_order_on_its_return(
    tmp_path: Path, loop: Clockwork
) -> None:
    calls, clean = clean_states(tmp_path, loop, "assign", PAIR[0])
    for at, call in enumerate(calls):
        rig = prepared(tmp_path / str(at), loop, "assign", PAIR[0])
        rig.stick_at(at)
        time_out(rig, rig.start("assign", PAIR[0]))
        loop.do(rig.libvirt.lose)
        loop.advance(60)
        assert rig.world.intents.unfinished and not rig.locked
        rig.libvirt.calm()
        loop.do(rig.libvirt.come_back)
        loop.advance(60)
        assert rig.world.truth() == clean[0], call
        assert rig.is_quiet()


def test_what_cannot_be_put_in_order_is_not_tried_again_and_again_for_the_events_that_it_brings_about(
    tmp_path: Path, loop: Clockwork
) -> None:
    rig = prepared(tmp_path / "again", loop, "assign", PAIR[0])
    rig.do("assign", PAIR[0])
    rig.libvirt.refuse_calls = {"reattach_host": "no"}
    rig.libvirt.before = lambda call: rig.world.emit(MachineRead(rig.libvirt.machines[UUID]))
    rig.libvirt.calls.clear()
    loop.do(lambda: rig.libvirt.destroy(UUID))
    assert rig.libvirt.calls == ["reattach_host"] * 2  # once for each device
    loop.advance(10)
    assert len(rig.libvirt.calls) == 8  # and after 1, 3 and 7 seconds
    rig.libvirt.calm()
    loop.advance(6)
    assert rig.world.intents.lent == {}
