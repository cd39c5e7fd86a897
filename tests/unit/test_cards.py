"""Cards of several functions, in the stored half and live."""

from __future__ import annotations

import dataclasses

import pytest

from hostpassd.model.device import Device
from hostpassd.model.events import MachineRead
from hostpassd.model.machine import Ports
from hostpassd.passthrough.request import Options, Plan
from hostpassd.passthrough.steps import Attach, Store
from tests.sim.plans import CARD, PAIR, assign, with_ports, world
from tests.sim.world import hostdev, machine, pci


def addresses(plan: Plan) -> list[tuple[str, str, bool]]:
    """Of each stored device: name, guest address, whether it is marked as a card."""
    stores = [step for step in plan.steps if isinstance(step, Store)]
    return [(s.device, s.claim.guest_address, 'multifunction="on"' in s.claim.xml) for s in stores]


@pytest.mark.parametrize("asked", CARD, ids=lambda d: d.name)
def test_a_card_stays_one_in_the_stored_half(asked: Device) -> None:
    plan = assign(with_ports(*CARD, ports=Ports((0x12, 3), ((4, 1),))), asked)
    expected = [(f"pci_0000_0a_00_{n}", f"0000:12:00.{n}", n == 0) for n in range(3)]
    assert addresses(plan) == expected


def test_a_conventional_card_gets_a_slot_of_a_conventional_bus() -> None:
    card = [pci(f"0000:0a:00.{n}", group=9) for n in (0, 1)]
    plan = assign(with_ports(*card, ports=Ports((3,), ((4, 0x1E), (4, 0x1F)))), card[1])
    assert [address for _, address, _ in addresses(plan)] == ["0000:04:1e.0", "0000:04:1e.1"]


@pytest.mark.parametrize(
    ("devices", "ports"),
    [(CARD, Ports((), ((4, 1),))), (CARD[1:], Ports((3,))), ((CARD[0],), Ports((3,))), (PAIR, Ports((3,), ((4, 1),)))],
    ids=["no place", "no function 0", "one function", "not one slot"],
)
def test_what_is_no_card_or_has_no_place_is_left_to_libvirt(devices: tuple[Device, ...], ports: Ports) -> None:
    assert {row[1:] for row in addresses(assign(with_ports(*devices, ports=ports), devices[0]))} == {("", False)}


def test_a_card_of_which_function_0_is_stored_already_is_no_card_any_more() -> None:
    state = with_ports(*CARD, ports=Ports((3,)))
    state.apply(MachineRead(dataclasses.replace(state.machines[machine().uuid], config=(hostdev(CARD[0]),))))
    assert [row[1:] for row in addresses(assign(state, CARD[1]))] == [("", False), ("", False)]


def test_of_two_cards_in_one_group_each_gets_a_slot_and_what_is_none_comes_last() -> None:
    more = [pci(f"0000:0b:00.{n}", group=9, express=True) for n in (0, 1)]
    single = pci("0000:09:00.0", group=9, express=True)
    plan = assign(with_ports(*CARD, *more, single, ports=Ports((3, 4, 5))), single)
    assert addresses(plan) == [
        *((f"pci_0000_0a_00_{n}", f"0000:03:00.{n}", n == 0) for n in range(3)),
        *((f"pci_0000_0b_00_{n}", f"0000:04:00.{n}", n == 0) for n in range(2)),
        (single.name, "", False),
    ]


def test_an_address_that_the_caller_chose_holds_for_the_asked_device_and_its_card() -> None:
    state = with_ports(*CARD, ports=Ports((3,)))
    chosen = Options(guest_address="0000:05:00.0")
    assert [row[1] for row in addresses(assign(state, CARD[0], chosen))] == [f"0000:05:00.{n}" for n in range(3)]
    assert sorted(addresses(assign(state, CARD[1], chosen))) == [
        (CARD[0].name, "", False),
        (CARD[1].name, "0000:05:00.0", False),
        (CARD[2].name, "", False),
    ]


def test_live_each_function_of_a_card_has_a_port_of_its_own_and_the_job_says_so() -> None:
    state = with_ports(*CARD, ports=Ports((3,)), running=True)
    plan = assign(state, CARD[0])
    attaches = [step for step in plan.steps if isinstance(step, Attach)]
    assert len(attaches) == 3
    assert all("<address type" not in step.xml and step.text.endswith("on a port of its own") for step in attaches)
    lone = assign(world(machine()), PAIR[0])
    assert not any("of its own" in step.text for step in lone.steps)
