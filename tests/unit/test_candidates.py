"""Which devices a machine could be given, and which are not listed."""

from __future__ import annotations

import dataclasses

from hostpassd.model.device import ASSIGNABLE_KINDS, Device
from hostpassd.model.events import MachineRead
from hostpassd.model.order import in_tree_order
from hostpassd.passthrough.candidates import candidates, ranks
from hostpassd.state import State
from tests.sim.plans import NIC, PAIR, PORT, STICK, world
from tests.sim.world import hostdev, machine, pci, state_of, usb


def listed(state: State, *, everything: bool = False) -> dict[tuple[str, ...], list[str]]:
    """The codes of what blocks each set that moves together."""
    [here] = state.machines.values()
    steps = candidates(state, here, subjects(state), everything=everything)
    return {each.devices: [b.code for b in each.blockers] for each in steps if each}


def subjects(state: State) -> list[str]:
    return [name for _, name in sorted(filter(None, ranks(state)))]


def names(*devices: Device) -> tuple[str, ...]:
    return tuple(device.name for device in devices)


def test_what_an_operation_could_be_about_is_looked_for_in_a_step_for_each_device_and_is_in_tree_order() -> None:
    state = world(machine())
    assert len(list(ranks(state))) == len(state.devices)
    assert subjects(state) == in_tree_order(
        state, (d.name for d in state.devices.values() if d.kind in ASSIGNABLE_KINDS)
    )


def test_each_set_that_moves_together_is_listed_once_and_what_is_there_is_not() -> None:
    held = (hostdev(STICK),)
    rows = listed(world(machine(live=held, config=held)))
    assert rows[names(*PAIR)] == rows[names(NIC)] == [] and names(STICK) not in rows
    assert names(STICK) in listed(world(machine(live=held)))  # there is a half to be added


def test_a_bridge_is_listed_only_where_everything_is() -> None:
    state = world(machine())
    assert names(PORT) not in listed(state) and listed(state, everything=True)[names(PORT)] == ["bridge"]


def test_what_is_plugged_into_a_companion_is_a_reason_and_hides_nothing() -> None:
    graphics, controller = pci("0000:08:00.0", group=41), pci("0000:08:00.2", group=41, driver="xhci_hcd")
    stick = dataclasses.replace(usb("3-1", number=2), parent=controller.name)
    state = state_of(graphics, controller, stick)
    state.apply(MachineRead(machine()))
    assert listed(state) == {names(graphics, controller): ["not-leaf"], names(stick): []}
