"""Waiting: for calls that may never return, and for events that may never come."""

from __future__ import annotations

import asyncio

import pytest

from hostpassd import errors
from hostpassd.model.events import DeviceAdded, DeviceRemoved, Event, MachineRead, MachinesListed, RemovalFailed
from hostpassd.passthrough.waiting import Patience, StillAtIt, Waiting
from hostpassd.state import State
from tests.sim.world import KEY, URI, hostdev, machine, pci, state_of

NIC = pci("0000:01:00.0", group=2)
HELD = machine(live=(hostdev(NIC, "ua-1"),))


@pytest.fixture
def state() -> State:
    made = state_of(NIC)
    made.apply(MachineRead(HELD))
    return made


async def forever() -> None:
    await asyncio.Event().wait()


async def test_a_call_that_returns_is_done_and_its_error_is_raised() -> None:
    async def refused() -> None:
        raise errors.HypervisorRefused("No.")

    await Patience("x", 5).made(asyncio.sleep(0))
    with pytest.raises(errors.HypervisorRefused):
        await Patience("x", 5).made(refused())


async def test_a_call_that_does_not_return_in_time_is_given_up_with_the_step() -> None:
    with pytest.raises(StillAtIt, match="the step"):
        await Patience("the step", 0.01).made(forever())


async def test_a_call_under_way_gets_a_while_more_when_the_job_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostpassd.passthrough.waiting.CALL_PATIENCE", 0.05)
    over = asyncio.Event()
    over.set()
    await Patience("x", 5, over).made(asyncio.sleep(0.01))
    with pytest.raises(StillAtIt):
        await Patience("x", 5, over).made(forever())


async def test_an_event_ends_the_wait_for_it(state: State) -> None:
    waiting, said = Waiting(state), []
    with waiting.listening(KEY, "ua-1") as heard:
        wait = asyncio.create_task(waiting.until(lambda: heard.said is DeviceAdded, Patience("x", 5)))
        await asyncio.sleep(0)
        assert not waiting.is_idle
        for event in (DeviceAdded(KEY, "ua-other"), DeviceAdded(KEY, "ua-1")):
            said.append(wait.done())
            waiting.notice(event)
            await asyncio.sleep(0)
        assert await wait and said == [False, False]
    assert waiting.is_idle


async def test_a_wait_ends_with_the_time_or_the_job(state: State) -> None:
    waiting, over = Waiting(state), asyncio.Event()
    assert not await waiting.until(lambda: False, Patience("x", 0.01))
    asyncio.get_running_loop().call_soon(over.set)
    with pytest.raises(errors.Cancelled):
        await waiting.until(lambda: False, Patience("x", 5, over))
    assert waiting.is_idle


@pytest.mark.parametrize(
    ("event", "left"), [(DeviceRemoved(KEY, "ua-1"), True), (RemovalFailed(KEY, "ua-1"), False)], ids=["gone", "kept"]
)
async def test_a_device_has_left_when_libvirt_says_so(state: State, event: Event, left: bool) -> None:
    waiting = Waiting(state)
    with waiting.listening(KEY, "ua-1") as heard:
        waiting.notice(event)
        assert heard.has_left == left


async def test_or_when_its_machine_does_not_run_any_more(state: State) -> None:
    with Waiting(state).listening(KEY, "ua-1") as heard:
        assert not heard.has_left
        state.apply(MachineRead(machine(running=False)))
        assert heard.has_left


@pytest.mark.parametrize("there", [True, False])
async def test_a_list_of_all_machines_stands_for_events_that_were_lost(state: State, there: bool) -> None:
    listed = MachinesListed(URI, (HELD if there else machine(),))
    waiting = Waiting(state)
    with waiting.listening(KEY, "ua-1") as heard:
        state.apply(listed)
        waiting.notice(listed)
        assert heard.said is (DeviceAdded if there else DeviceRemoved)
