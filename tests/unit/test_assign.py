"""What an assign plans, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hostpassd import errors
from hostpassd.machines.domain_xml import claim_of
from hostpassd.model.device import Device, Mdev
from hostpassd.model.events import DeviceGone, DeviceSeen, HostUsesRead, HypervisorChanged, MachineRead, host_use
from hostpassd.model.machine import Claim, Machine, NodeSource, Ports, Settings
from hostpassd.passthrough.request import Options, Plan
from hostpassd.passthrough.steps import Attach, Detach, Store
from hostpassd.state import State
from tests.sim.plans import LUN, NIC, PAIR, STICK, accepting, assign, assign_all, kinds, world
from tests.sim.world import OTHER, URI, block, hostdev, machine, net, pci, state_of, usb


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
    with pytest.raises(errors.Blocked, match=r"held-live.* b has .*held-config.* b has") as error:
        assign(state, NIC).check_allowed()
    assert "0000:01:00.0" in str(error.value)


def test_another_instance_is_a_stale_plan() -> None:
    state = world(machine())
    with pytest.raises(errors.StalePlan):
        assign(state, NIC, Options(instance=state.devices[NIC.name].instance + 1))


def test_a_twin_is_stored_by_bus_and_number_too() -> None:
    state = state_of(STICK, usb("1-2", number=4))
    state.apply(MachineRead(machine(running=False)))
    (step,) = assign(state, STICK).steps
    assert isinstance(step, Store) and 'bus="' in step.claim.xml.replace("'", '"')
    (step,) = assign(world(machine(running=False)), STICK).steps
    assert isinstance(step, Store) and 'bus="' not in step.claim.xml.replace("'", '"')
    assert "optional" in step.claim.xml


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
    state.apply(HostUsesRead({NIC.name: (host_use("address", addresses=("192.0.2.1/24",)),)}))
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


def current(*machines: Machine, version: int = 10_000_000) -> State:
    """A host whose libvirt is of VERSION."""
    state = world(*machines)
    state.apply(HypervisorChanged(URI, True, version=version))
    return state


# A value of each option that not every device takes, and those that take it.
FITTING: dict[str, tuple[Any, list[Device]]] = {
    "guest_address": ("0000:04:00.0", [NIC]),
    "rom_bar": (False, [NIC]),
    "startup_policy": ("requisite", [STICK]),
    "rom_file": ("/usr/share/x.rom", [NIC]),
    "driver": ("mlx5_vfio_pci", [NIC]),
    "boot_order": (1, [NIC, STICK, LUN]),
}


@pytest.mark.parametrize("device", [NIC, STICK, LUN], ids=lambda device: device.kind)
@pytest.mark.parametrize("option", FITTING)
def test_what_does_not_fit_the_device_is_no_option_of_it(device: Device, option: str) -> None:
    value, fitting = FITTING[option]
    state, options = current(machine()), Options(**{option: value})
    if device in fitting:
        assert assign(state, device, options).token != assign(state, device).token
        return
    with pytest.raises(errors.InvalidOption, match=f"leave the option {option.replace('_', '-')} out"):
        assign(state, device, options)


def test_no_machine_boots_from_a_mediated_device() -> None:
    uuid = "0a0d3b5e-8a5b-4a4e-9b0e-2f6a1c9d7e10"
    vgpu = dataclasses.replace(pci("0000:01:00.0"), name="mdev_x", kind="mdev", facts=(Mdev(uuid, "x", "vfio-pci"),))
    state = state_of(vgpu)
    state.apply(MachineRead(machine()))
    with pytest.raises(errors.InvalidOption, match="leave the option boot-order out"):
        assign(state, vgpu, Options(boot_order=1))


def said(plan: Plan) -> dict[str, Settings]:
    """What each element that PLAN writes says of its device, but for what all say."""
    written = [
        (step, step.claim.xml if isinstance(step, Store) else step.xml)
        for step in plan.steps
        if isinstance(step, Store | Attach)
    ]
    return {
        f"{step.code} {step.device}": dataclasses.replace(claim_of(xml).settings, managed=None) for step, xml in written
    }


def test_both_halves_say_what_was_chosen_and_what_moves_along_is_as_libvirt_has_it() -> None:
    chosen = Options(driver="x", rom_bar=False, boot_order=2, guest_address="0000:04:00.0")
    first, second = (d.name for d in PAIR)
    wanted = Settings(driver="x", rom_bar=False, boot_order=2)
    assert said(assign(current(machine()), PAIR[0], chosen)) == {
        f"store {first}": wanted,
        f"store {second}": Settings(),
        f"attach {first}": wanted,
        f"attach {second}": Settings(),
    }


def test_an_option_that_would_change_nothing_is_refused() -> None:
    stored = current(machine(config=(hostdev(STICK, config=True),)))
    with pytest.raises(errors.InvalidOption, match="leave the option startup-policy out"):
        assign(stored, STICK, Options(startup_policy="mandatory"))
    assert said(assign(stored, STICK, Options(boot_order=3))) == {f"attach {STICK.name}": Settings(boot_order=3)}
    first = hostdev(PAIR[0])
    lacking = current(machine(live=(first,), config=(hostdev(PAIR[0], config=True),)))
    assert [step.device for step in assign(lacking, PAIR[0]).steps if isinstance(step, Store | Attach)] == [
        PAIR[1].name
    ] * 2
    for options in (
        Options(rom_bar=False),
        Options(rom_file="/usr/share/x"),
        Options(driver="x"),
        Options(boot_order=1),
    ):
        with pytest.raises(errors.InvalidOption, match="leaves it as it is"):
            assign(lacking, PAIR[0], options)


def test_a_libvirt_that_would_ignore_a_driver_is_not_asked_for_it() -> None:
    with pytest.raises(errors.NotSupported, match="older than 10"):
        assign(current(machine(), version=9_999_999), NIC, Options(driver="vfio-pci"))
    assert assign(current(machine(), version=9_999_999), NIC).steps


def test_a_startup_policy_is_of_the_stored_half_and_of_nothing_else() -> None:
    chosen = Options(startup_policy="mandatory")
    plan = assign(world(machine()), STICK, chosen)
    assert said(plan) == {
        f"store {STICK.name}": Settings(startup_policy="mandatory"),
        f"attach {STICK.name}": Settings(),
    }
    for given, options in ((machine(persistent=False), chosen), (machine(), dataclasses.replace(chosen, config=False))):
        with pytest.raises(errors.InvalidOption, match="startup-policy"):
            assign(world(given), STICK, options)


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


def test_several_devices_are_one_plan_whose_steps_are_those_of_all() -> None:
    state = world(machine())
    plan = assign_all(state, ["1-1", PAIR[1].name, STICK.name])
    assert plan.asked == (STICK.name, PAIR[1].name)  # in tree order
    assert plan.devices == (STICK.name, PAIR[0].name, PAIR[1].name)
    order = [kind.split()[0] for kind in kinds(plan)]
    assert order == ["Store"] * 3 + ["Detach"] * 2 + ["Attach"] * 3
    assert plan.token == assign_all(state, [STICK.name, PAIR[1].name]).token
    assert [fact.code for fact in plan.consequences].count("takes-along") == 1


def test_what_blocks_one_of_several_blocks_all_and_ports_are_counted_together() -> None:
    state = world(machine("b", OTHER, live=(hostdev(STICK),)), machine())
    with pytest.raises(errors.Blocked) as refused:
        assign_all(state, [NIC.name, STICK.name]).check_allowed()
    assert [b.code for b in refused.value.blockers] == ["held-live"]
    state.apply(MachineRead(dataclasses.replace(machine(), ports=Ports(conventional=((1, 1), (1, 2))))))
    assert not assign(state, NIC).blockers and not assign(state, PAIR[0]).blockers
    assert [b.code for b in assign_all(state, [NIC.name, PAIR[0].name]).blockers] == ["no-free-port"]


def test_of_several_devices_those_that_are_there_are_left_as_they_are() -> None:
    state = world(machine(live=(hostdev(STICK),), config=(hostdev(STICK),)))
    assert {step.device for step in assign_all(state, [STICK.name, NIC.name]).steps} == {NIC.name}
    with pytest.raises(errors.AlreadyAssigned):
        assign_all(state, [STICK.name])


@pytest.mark.parametrize(
    ("devices", "options", "error"),
    [
        ([], Options(), errors.InvalidArgs),
        (["x"] * 65, Options(), errors.InvalidArgs),
        ([NIC.name, "nope"], Options(), errors.NoSuchDevice),
        ([NIC.name, STICK.name], Options(instance=1), errors.InvalidOption),
        ([NIC.name, LUN.name], Options(guest_address="0000:04:00.0"), errors.InvalidOption),
        ([NIC.name, STICK.name], Options(rom_bar=False), errors.InvalidOption),
        ([NIC.name, PAIR[0].name], Options(boot_order=1), errors.InvalidOption),
        ([NIC.name, PAIR[0].name], Options(rom_file="/usr/share/x.rom"), errors.InvalidOption),
        ([NIC.name, STICK.name], Options(startup_policy="optional"), errors.InvalidOption),
    ],
)
def test_what_is_wrong_with_one_of_several_refuses_all(
    devices: list[str], options: Options, error: type[errors.HostpassError]
) -> None:
    with pytest.raises(error):
        assign_all(world(machine()), devices, options)


def test_a_device_and_what_is_below_it_are_not_two() -> None:
    controller = pci("0000:05:00.0", group=30)
    stick = dataclasses.replace(usb("3-1", number=2), parent=controller.name)
    state = state_of(controller, stick)
    state.apply(MachineRead(machine()))
    with pytest.raises(errors.InvalidArgs, match="is below"):
        assign_all(state, [stick.name, controller.name])


def test_a_mediated_device_that_is_no_pci_device_in_the_guest_gets_no_pci_address() -> None:
    uuid = "0a0d3b5e-8a5b-4a4e-9b0e-2f6a1c9d7e10"
    crypto = dataclasses.replace(pci("0000:01:00.0"), name="mdev_x", kind="mdev", facts=(Mdev(uuid, "x", "vfio-ap"),))
    state = state_of(crypto)
    state.apply(MachineRead(machine()))
    with pytest.raises(errors.InvalidOption, match="guest-address"):
        assign(state, crypto, Options(guest_address="0000:04:00.0"))


def test_what_is_there_already_blocks_nothing_and_is_not_authorised_again() -> None:
    serial = pci("0000:07:00.0", group=40, code=0x070002)
    state = state_of(NIC, serial)
    state.excluded_classes = ("07",)
    held = (hostdev(serial),)
    state.apply(MachineRead(machine(live=held, config=held)))
    plan = assign_all(state, [serial.name, NIC.name])
    assert plan.asked == plan.devices == (NIC.name,) and plan.blockers == ()


def test_what_is_below_a_companion_of_another_does_not_move_with_both() -> None:
    graphics, controller = pci("0000:08:00.0", group=41), pci("0000:08:00.2", group=41, driver="xhci_hcd")
    stick = dataclasses.replace(usb("3-1", number=2), parent=controller.name)
    state = state_of(graphics, controller, stick)
    state.apply(MachineRead(machine()))
    with pytest.raises(errors.InvalidArgs, match="is below pci_0000_08_00_2"):
        assign_all(state, [graphics.name, stick.name], accepting("not-leaf"))
