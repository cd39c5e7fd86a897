"""Plans: what they hold, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest

from hostpassd import errors
from hostpassd.model.device import Device
from hostpassd.model.events import DeviceGone, DeviceSeen, HostUse, HostUsesRead, MachineRead
from hostpassd.model.machine import Claim, Machine, NodeSource, Ports
from hostpassd.passthrough.assign import Assign
from hostpassd.passthrough.dismiss import Dismiss
from hostpassd.passthrough.request import Options, Plan
from hostpassd.passthrough.steps import Attach, Detach, Reattach, Store, Unplug, Unstore
from hostpassd.state import State
from tests.sim.world import OTHER, block, bridge, hostdev, machine, net, pci, scsi, state_of, usb

PORT = bridge("0000:00:01.0", group=1)
NIC = pci("0000:01:00.0", PORT, group=2)
STICK = usb("1-1", number=3)
PAIR = (pci("0000:04:01.0", group=5), pci("0000:04:02.0", group=5, driver="snd", code=0x040100))
LUN = scsi(2, 0, 1, 0)


def world(*machines: Machine) -> State:
    state = state_of(PORT, NIC, STICK, *PAIR, LUN)
    for m in machines:
        state.apply(MachineRead(m))
    return state


def assign(state: State, device: Device, options: Options | None = None) -> Plan:
    return Assign("vm", device.name, options or Options(), 0).plan(state)


def dismiss(state: State, device: str, options: Options | None = None) -> Plan:
    return Dismiss(machine().uuid, device, options or Options(), 0).plan(state)


def accepting(*codes: str) -> Options:
    return Options(override=frozenset(codes))


def kinds(plan: Plan) -> list[str]:
    return [f"{type(step).__name__} {step.device}" for step in plan.steps]


@pytest.mark.parametrize("device", [NIC, STICK, LUN])
def test_a_running_persistent_machine_gets_both_halves_stored_first(device: Device) -> None:
    assert kinds(assign(world(machine()), device)) == [f"Store {device.name}", f"Attach {device.name}"]


def test_a_stopped_or_transient_machine_gets_its_only_half() -> None:
    assert kinds(assign(world(machine(running=False)), NIC)) == [f"Store {NIC.name}"]
    assert kinds(assign(world(machine(persistent=False)), NIC)) == [f"Attach {NIC.name}"]


def test_companions_are_freed_before_the_first_attach() -> None:
    plan = assign(world(machine(persistent=False)), PAIR[0])
    assert [type(step) for step in plan.steps] == [Detach, Detach, Attach, Attach]
    assert plan.devices == (PAIR[0].name, PAIR[1].name)


def test_the_missing_half_is_added_and_nothing_more() -> None:
    state = world(machine(config=(hostdev(NIC),)))
    assert kinds(assign(state, NIC)) == [f"Attach {NIC.name}"]
    state = world(machine(live=(hostdev(NIC),), config=(hostdev(NIC),)))
    with pytest.raises(errors.AlreadyAssigned):
        assign(state, NIC)
    assert kinds(assign(world(machine(live=(hostdev(NIC),))), NIC)) == [f"Store {NIC.name}"]


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (machine(running=False), Options(live=True)),
        (machine(persistent=False), Options(config=True)),
        (machine(), Options(live=False, config=False)),
    ],
)
def test_a_half_that_the_machine_has_not_is_an_invalid_option(given: Machine, options: Options) -> None:
    with pytest.raises(errors.InvalidOption):
        assign(world(given), NIC, options)


def test_blocked_names_every_code_and_what_it_names() -> None:
    state = world(machine(), machine("b", OTHER, live=(hostdev(NIC),), config=(hostdev(NIC),)))
    with pytest.raises(errors.Blocked, match=r"held-config.* b has .*held-live.* b has") as error:
        assign(state, NIC).check_allowed()
    assert "0000:01:00.0" in str(error.value)


def test_another_instance_is_a_stale_plan() -> None:
    state = world(machine())
    with pytest.raises(errors.StalePlan):
        assign(state, NIC, Options(instance=state.devices[NIC.name].instance + 1))


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


def test_a_twin_is_stored_by_bus_and_number_too() -> None:
    state = state_of(STICK, usb("1-2", number=4))
    state.apply(MachineRead(machine(running=False)))
    (step,) = assign(state, STICK).steps
    assert isinstance(step, Store) and 'bus="' in step.claim.xml.replace("'", '"')
    (step,) = assign(world(machine(running=False)), STICK).steps
    assert isinstance(step, Store) and 'bus="' not in step.claim.xml.replace("'", '"')
    assert "optional" in step.claim.xml


# Cards of several functions.

CARD = tuple(
    pci(f"0000:0a:00.{n}", group=9, driver=driver, code=code, express=True)
    for n, driver, code in ((0, "nouveau", 0x030000), (1, "snd", 0x040300), (2, "xhci_hcd", 0x0C0330))
)


def with_ports(*devices: Device, ports: Ports, running: bool = False) -> State:
    state = state_of(*devices)
    state.apply(MachineRead(dataclasses.replace(machine(running=running), config_ports=ports)))
    return state


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
    assert all("<address type" not in step.xml and step.text.endswith("at a port of its own") for step in attaches)
    assert any("port of its own" in text for text in plan.consequences)
    lone = assign(world(machine()), PAIR[0])
    assert not any("of its own" in text for text in (*lone.consequences, *(step.text for step in lone.steps)))


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


def test_what_can_be_overridden_is_by_name_and_what_never_can_is_not() -> None:
    state = world(machine(), machine("b", OTHER, running=False, config=(hostdev(NIC),)))
    plan = assign(state, NIC)
    assert [b.code for b in plan.blockers] == ["held-config"]
    with pytest.raises(errors.Blocked):
        assign(state, NIC, accepting("not-leaf")).check_allowed()
    assign(state, NIC, accepting("held-config")).check_allowed()
    assert assign(state, NIC, accepting("held-config", "not-leaf")).overridden == plan.blockers
    state.apply(MachineRead(machine("b", OTHER, live=(hostdev(NIC),))))
    with pytest.raises(errors.Blocked):
        assign(state, NIC, accepting("held-live", "held-config")).check_allowed()


def test_a_token_changes_with_what_the_plan_rests_on_and_with_nothing_else() -> None:
    state = world(machine())
    token = assign(state, NIC).token
    state.apply(DeviceSeen(usb("1-7", number=30, product=9)))
    state.apply(DeviceGone(STICK.sysfs_path))
    assert assign(state, NIC).token == token
    state.apply(HostUsesRead({NIC.name: (HostUse("address", "192.0.2.1/24"),)}))
    assert assign(state, NIC).token != token
    state.apply(HostUsesRead({}))
    assert assign(state, NIC).token == token
    state.apply(DeviceGone(NIC.sysfs_path))
    state.apply(DeviceSeen(NIC))
    assert assign(state, NIC).token != token


@pytest.mark.parametrize(("ports", "blocked"), [(Ports((1,)), False), (Ports((), ((2, 1),)), True)])
def test_a_running_machine_needs_a_port_of_the_right_sort(ports: Ports, blocked: bool) -> None:
    express = pci("0000:02:00.0", group=6, express=True)
    state = state_of(express)
    state.apply(MachineRead(dataclasses.replace(machine(), ports=ports)))
    assert [b.code for b in assign(state, express).blockers] == (["no-free-port"] if blocked else [])
    stopped = Options(live=False)
    assert assign(state, express, stopped).blockers == ()


def test_what_the_host_loses_is_named() -> None:
    interface = net("enp1s0", NIC)
    state = world(machine())
    state.apply(DeviceSeen(interface))
    assert assign(state, NIC).loses == (interface.name,)


def test_what_does_not_fit_the_device_is_no_option_of_it() -> None:
    state = world(machine())
    for device in (STICK, LUN):
        with pytest.raises(errors.InvalidOption, match="guest-address"):
            assign(state, device, Options(guest_address="0000:04:00.0"))
        with pytest.raises(errors.InvalidOption, match="rom-bar"):
            assign(state, device, Options(rom_bar=False))
    assert "04" in assign(state, NIC, Options(guest_address="0000:04:00.0", rom_bar=False)).steps[-1].xml  # type: ignore[attr-defined]


DISK = Claim("disk", NodeSource("/dev/sda"), "virtio-disk0", "<disk/>", "disk:node:/dev/sda", "/dev/sda")


@pytest.mark.parametrize("device", [LUN, STICK], ids=["disk", "stick"])
@pytest.mark.parametrize("stored", [False, True], ids=["", "also a stored hostdev"])
def test_a_disk_that_the_machine_uses_by_its_node_is_not_free_for_it(device: Device, stored: bool) -> None:
    state = world(machine(live=(DISK,), config=(hostdev(device, config=True),) if stored else ()))
    state.apply(DeviceSeen(block("sda", device)))
    plan = assign(state, device)
    assert [b.code for b in plan.blockers] == ["held-live"]
    with pytest.raises(errors.Blocked, match="held-live"):
        assign(state, device, accepting("held-live")).check_allowed()


@pytest.mark.parametrize("stored", [False, True], ids=["", "it has the controller stored"])
def test_what_the_running_machine_has_below_a_controller_blocks_the_controller(stored: bool) -> None:
    controller = pci("0000:05:00.0", group=7, driver="xhci_hcd", code=0x0C0330)
    stick = usb("1-1", controller)
    state = state_of(controller, stick)
    claims = (hostdev(controller, config=True),) if stored else ()
    state.apply(MachineRead(machine(live=(hostdev(stick),), config=claims)))
    found = [(b.code, b.device) for b in assign(state, controller).blockers]
    assert ("held-live", stick.name) in found
    assert not any(device == controller.name and code.startswith("held") for code, device in found)
