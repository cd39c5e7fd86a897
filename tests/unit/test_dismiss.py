"""What a dismiss plans, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest

from hostpassd import errors
from hostpassd.model.events import DeviceGone, DeviceSeen, MachineRead
from hostpassd.model.machine import Ports
from hostpassd.passthrough.request import Options
from hostpassd.passthrough.steps import Reattach, Store, Unplug, Unstore
from hostpassd.state import State
from tests.sim.plans import CARD, LUN, NIC, PAIR, STICK, assign, dismiss, dismiss_all, kinds, with_ports, world
from tests.sim.world import hostdev, machine, pci, state_of, usb


def test_dismiss_takes_the_stored_half_first_then_all_of_the_group_then_gives_back() -> None:
    held = (hostdev(PAIR[0], "a"), hostdev(PAIR[1], "b"))
    state = world(machine(live=held, config=held))
    plan = dismiss(state, PAIR[1].name)
    assert [type(s) for s in plan.steps] == [Unstore, Unstore, Unplug, Unplug, Reattach, Reattach]
    assert [s.alias for s in plan.steps if isinstance(s, Unplug)] == ["b", "a"]


def test_dismiss_of_what_is_not_held_is_refused() -> None:
    state = world(machine(config=(hostdev(STICK),)))
    with pytest.raises(errors.NotAssigned):
        dismiss(state, NIC.name)
    with pytest.raises(errors.NotAssigned):
        dismiss(state, STICK.name, Options(config=False))


GIVEN = (None, False, True)


@pytest.mark.parametrize("here", [True, False], ids=["here", "missing"])
@pytest.mark.parametrize("live_held, config_held", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("live", GIVEN)
@pytest.mark.parametrize("config", GIVEN)
def test_a_dismiss_is_of_the_halves_asked_for_that_there_are(
    here: bool, live_held: bool, config_held: bool, live: bool | None, config: bool | None
) -> None:
    claim = hostdev(LUN, config=True)
    state = world(machine(live=(claim,) if live_held else (), config=(claim,) if config_held else ()))
    options, text = Options(live=live, config=config), LUN.name
    if not here:
        state.apply(DeviceGone(LUN.sysfs_path))
        [row] = state.missing[machine().uuid]
        text = row.id
    wanted = {Unplug: live_held and live is not False, Unstore: config_held and config is not False}
    if any(wanted.values()):
        steps = dismiss(state, text, options).steps
        assert {type(step) for step in steps} == {kind for kind, is_wanted in wanted.items() if is_wanted}
    else:
        with pytest.raises(errors.InvalidOption if live is config is False else errors.NotAssigned):
            dismiss(state, text, options)


def five(*, live: bool) -> tuple[State, dict[str, str]]:
    """Five functions of the host slot 0001:0d:00, each in a group of its own, and the guest place of each."""
    places = {"0": "05.0", "1": "05.1", "2": "06.0", "3": "07.0", "4": "08.0"}
    functions = [pci(f"0001:0d:00.{n}", group=20 + int(n)) for n in places]
    held = tuple(
        dataclasses.replace(hostdev(f, f"hostdev{n}"), guest_address=f"0000:00:{place}")
        for f, (n, place) in zip(functions, places.items(), strict=True)
    )
    # In the same guest slot, and of another card.
    other = pci("0000:0c:00.0", group=30)
    held += (dataclasses.replace(hostdev(other, "hostdev9"), guest_address="0000:00:05.2"),)
    state = state_of(*functions, other)
    state.apply(MachineRead(machine(running=live, live=held if live else (), config=() if live else held)))
    return state, {place: f"pci_0001_0d_00_{n}" for n, place in places.items()}


@pytest.mark.parametrize(
    ("asked", "gone"),
    [("05.0", ["05.0", "05.1"]), ("05.1", ["05.1", "05.0"]), ("06.0", ["06.0"]), ("08.0", ["08.0"])],
)
@pytest.mark.parametrize("live", [True, False])
def test_of_five_functions_of_one_host_slot_those_in_one_guest_slot_go_together(
    asked: str, gone: list[str], live: bool
) -> None:
    state, names = five(live=live)
    plan = dismiss(state, names[asked])
    expected = [f"{'Unplug' if live else 'Unstore'} {names[place]}" for place in gone]
    assert kinds(plan) == expected + ([f"Reattach {names[place]}" for place in gone] if live else [])
    assert plan.locks == tuple(sorted(f"group 2{names[place][-1]}" for place in gone))


def test_what_shares_both_the_group_and_the_slot_goes_once() -> None:
    state = with_ports(*CARD, ports=Ports((3,)))
    stored = tuple(step.claim for step in assign(state, CARD[0]).steps if isinstance(step, Store))
    state.apply(MachineRead(machine(running=False, config=stored)))
    plan = dismiss(state, CARD[1].name)
    assert kinds(plan) == [f"Unstore {CARD[n].name}" for n in (1, 0, 2)]


def test_of_several_all_are_unstored_before_a_guest_is_asked() -> None:
    held = (hostdev(NIC), hostdev(STICK))
    plan = dismiss_all(world(machine(live=held, config=held)), [STICK.name, NIC.name, STICK.name])
    assert plan.asked == plan.devices == (STICK.name, NIC.name)  # in tree order
    assert [kind.split()[0] for kind in kinds(plan)] == ["Unstore", "Unstore", "Unplug", "Unplug", "Reattach"]


def test_of_several_what_the_machine_does_not_have_is_passed_over() -> None:
    state = world(machine(live=(hostdev(STICK),)))
    assert dismiss_all(state, [NIC.name, STICK.name]).devices == (STICK.name,)
    with pytest.raises(errors.NotAssigned):
        dismiss_all(state, [NIC.name, PAIR[0].name])
    with pytest.raises(errors.NoSuchDevice):
        dismiss_all(state, ["nope", STICK.name])


def test_the_instance_is_of_one_device_only() -> None:
    state = world(machine(live=(hostdev(STICK), hostdev(NIC))))
    with pytest.raises(errors.InvalidOption):
        dismiss_all(state, [STICK.name, NIC.name], Options(instance=1))


def test_what_is_at_a_place_and_what_was_there_last_are_not_dismissed_at_once() -> None:
    first = usb("1-1", number=3, product=7)
    state = state_of(first)
    state.apply(MachineRead(machine(config=(hostdev(first, config=True),))))
    state.apply(DeviceGone(first.sysfs_path))
    state.apply(DeviceSeen(STICK))
    [row] = state.missing[machine().uuid]
    state.apply(MachineRead(dataclasses.replace(state.machines[machine().uuid], live=(hostdev(STICK),))))
    for texts in ([STICK.name, row.id], [row.id, STICK.name]):
        with pytest.raises(errors.InvalidArgs, match="two things"):
            dismiss_all(state, texts)
    assert dismiss_all(state, [row.id]).steps and dismiss_all(state, [STICK.name]).steps
