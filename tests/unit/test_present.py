"""What is told of devices and machines."""

from __future__ import annotations

import dataclasses
from typing import Any

from hostpassd import names
from hostpassd.bus.present import device_interfaces, machine_properties, manager_properties
from hostpassd.bus.router import Variant
from hostpassd.model.codes import BLOCKERS, PROBLEMS, WARNINGS, fact, say
from hostpassd.model.device import Device, Input, Usb
from hostpassd.model.events import (
    DeviceGone,
    DeviceSeen,
    HostUsesRead,
    HypervisorChanged,
    MachineRead,
    ProblemChanged,
    host_use,
)
from hostpassd.model.machine import Settings
from hostpassd.model.naming import shown
from hostpassd.state import State
from tests.sim.world import UUID, block, bridge, hostdev, keyboard, machine, net, pci, scsi, state_of, usb

PORT = bridge("0000:00:01.0", group=1)
NIC = pci("0000:01:00.0", PORT, group=2)
WIRE = net("enp1s0", NIC)
XHCI = pci("0000:00:14.0", group=3, code=0x0C0330)
HUB = usb("usb1", XHCI, number=1, device_class=9)
STICK = usb("1-1", HUB, number=3)
LUN = scsi(6, 0, 0, 0, STICK)
DISK = block("sdb", LUN)


def told(state: State, device: Device) -> dict[str, Any]:
    row = device_interfaces(state, state.devices[device.name])[names.DEVICE]
    assert row is not None
    return row


def test_what_a_node_is_and_whose() -> None:
    state = state_of(PORT, NIC, WIRE, XHCI, HUB, STICK, LUN, DISK)
    rows = {
        device.name: (row["Role"], row["Owner"], row["Location"], row["Category"])
        for device in state.devices.values()
        for row in [told(state, device)]
    }

    def path(device: Device) -> str:
        return names.device_path(device.name)

    assert rows == {
        PORT.name: ("structure", path(PORT), "0000:00:01.0", "bridge"),
        NIC.name: ("device", path(NIC), "0000:01:00.0", "network"),
        WIRE.name: ("function", path(NIC), "enp1s0", "network"),
        XHCI.name: ("device", path(XHCI), "0000:00:14.0", "usb-controller"),
        HUB.name: ("structure", path(HUB), "usb1", "hub"),
        STICK.name: ("device", path(STICK), "1-1", "disk"),
        LUN.name: ("function", path(STICK), "6:0:0:0", "disk"),
        DISK.name: ("function", path(STICK), "/dev/sdb", "disk"),
    }
    assert (told(state, NIC)["Id"], told(state, WIRE)["Id"]) == ("8086:10d3", "")


def test_children_are_in_tree_order_with_numbers_as_numbers() -> None:
    ports = [usb(f"1-{number}", HUB, number=number) for number in (10, 2, 1)]
    state = state_of(XHCI, HUB, *ports)
    assert told(state, HUB)["Children"] == [names.device_path(f"usb_1_{number}") for number in (1, 2, 10)]


def test_what_a_device_is_stays_while_a_machine_has_it() -> None:
    """A keyboard that is told by its input device alone is one, too, when the host's driver is away."""
    facts = Usb(1, 5, "1-2", 0x1234, 1, 0, 480, ("03:00:00",))
    board = dataclasses.replace(usb("1-2", HUB, number=5), facts=(facts,))
    face = Device("usb_1_2__1_0", "usb-interface", f"{board.sysfs_path}/1-2:1.0", board.name)
    keys = dataclasses.replace(keyboard("input7", face), facts=(Input("seat0", "keyboard"),))
    state = state_of(XHCI, HUB, board, face)
    bare = told(state, board)["Category"]
    state.apply(DeviceSeen(keys))
    with_driver = told(state, board)["Category"]
    assert (bare, with_driver) == ("other", "keyboard")
    state.apply(DeviceGone(keys.sysfs_path))
    assert told(state, board)["Category"] == with_driver
    state.apply(DeviceGone(board.sysfs_path))
    state.apply(DeviceSeen(board))
    assert told(state, board)["Category"] == bare  # another plug-in is another thing


def test_a_machine_tells_whether_it_has_a_live_half_and_what_it_holds_in_tree_order() -> None:
    state = state_of(PORT, NIC, XHCI, HUB, STICK)
    held = (hostdev(STICK, "b"), hostdev(NIC, "a"))
    state.apply(MachineRead(dataclasses.replace(machine(live=held), title="Web server")))
    [running] = state.machines.values()
    row = machine_properties(state, running)
    assert (row["State"], row["Active"], row["Title"]) == ("running", True, "Web server")
    assert [path for path, _ in row["Devices"]] == [names.device_path(NIC.name), names.device_path(STICK.name)]
    off = machine_properties(state, machine(running=False))
    assert (off["State"], off["Active"]) == ("shut-off", False)


def test_a_hold_says_how_the_machine_is_to_have_the_device_where_its_configuration_does() -> None:
    state = state_of(PORT, NIC, XHCI, HUB, STICK)
    said = Settings(
        managed=False,
        startup_policy="optional",
        driver="mlx5_vfio_pci",
        rom_bar=True,
        mac_address="52:54:00:00:00:01",
        vlan=0,
        boot_order=7,
    )
    claim = dataclasses.replace(hostdev(NIC, "a"), guest_address="0000:04:00.0", settings=said)
    bare = dataclasses.replace(hostdev(STICK, "b"), settings=Settings())
    state.apply(MachineRead(machine(live=(claim, bare))))
    [[_, full], [_, empty]] = machine_properties(state, state.machines[UUID])["Devices"]
    assert {key: (value.signature, value.value) for key, value in full.items() if key not in empty} == {
        "guest-address": ("s", "0000:04:00.0"),
        "managed": ("b", False),
        "startup-policy": ("s", "optional"),
        "driver": ("s", "mlx5_vfio_pci"),
        "rom-bar": ("b", True),
        "mac-address": ("s", "52:54:00:00:00:01"),
        "vlan": ("u", 0),
        "boot-order": ("u", 7),
    }
    assert empty.keys() == {"kind", "live", "config", "alias", "releasing", "stale", "trial"}
    assert empty["trial"].value is False


def test_what_is_not_understood_of_a_machine_is_told_with_its_details() -> None:
    state = state_of(NIC)
    found = fact(WARNINGS["pool-unavailable"], "", pool="vms", volume="root")
    state.apply(MachineRead(machine()))
    [batch] = state.apply(MachineRead(dataclasses.replace(machine(), warnings=(found,))))
    assert ("machine", UUID) in batch.changed
    [[device, code, details, message]] = machine_properties(state, state.machines[UUID])["Warnings"]
    assert (device, code, message) == ("/", "pool-unavailable", found.message)
    assert {key: (value.signature, value.value) for key, value in details.items()} == {
        "pool": ("s", "vms"),
        "volume": ("s", "root"),
    }


def test_what_is_missing_says_what_it_was_and_leaves_out_what_is_not_known() -> None:
    state = state_of(XHCI, HUB, STICK)
    elsewhere = usb("1-2", HUB, number=9)
    state.apply(MachineRead(machine(live=(hostdev(STICK, "a"), hostdev(elsewhere, "b")))))
    state.apply(DeviceGone(STICK.sysfs_path))
    first, second = machine_properties(state, state.machines[UUID])["Missing"]
    assert {key: value.value for key, value in first.items() if key not in ("id", "source")} == {
        "live": True,
        "config": False,
        "alias": "a",
        "kind": "hostdev",
        "label": STICK.label,
        "category": "disk",
        "location": "1-1",
    }
    assert second.keys() == {"id", "source", "live", "config", "alias", "kind"}


def test_what_is_here_more_than_once_is_missing_and_says_so() -> None:
    state = state_of(XHCI, HUB, STICK)
    state.apply(MachineRead(machine(config=(hostdev(STICK, config=True),))))
    twin = usb("1-2", HUB, number=9)
    state.apply(DeviceSeen(twin))
    [row] = machine_properties(state, state.machines[UUID])["Missing"]
    assert row["ambiguous"] == Variant("b", True) and row["location"].value == "1-1"
    state.apply(DeviceGone(twin.sysfs_path))
    assert machine_properties(state, state.machines[UUID])["Missing"] == []


def test_a_reason_has_its_details_by_their_types_and_its_message_is_made_of_them() -> None:
    state = state_of(PORT, NIC)
    state.apply(MachineRead(machine(live=(hostdev(NIC),), config=(hostdev(NIC),))))
    [[path, code, severity, details, message], second] = told(state, NIC)["Blockers"]
    assert (path, code, severity) == (names.device_path(NIC.name), "held-live", "never")
    assert {key: (value.signature, value.value) for key, value in details.items()} == {
        "machine": ("o", names.machine_path(UUID)),
        "machine-name": ("s", "vm"),
        "what": ("s", shown(NIC)),
    }
    assert message == say(BLOCKERS[code].sentence, {key: value.value for key, value in details.items()})
    assert second[1:3] == ["held-config", "override"]


def test_a_fact_has_the_device_and_its_arrays() -> None:
    state = state_of(PORT, NIC, WIRE)
    carried = ("192.0.2.7/24", "2001:db8::7/64")
    state.apply(HostUsesRead({WIRE.name: (host_use("address", addresses=carried),)}))
    [[path, code, details, message]] = told(state, WIRE)["HostUses"]
    assert (path, code) == (names.device_path(WIRE.name), "address")
    assert {key: (value.signature, value.value) for key, value in details.items()} == {
        "addresses": ("as", list(carried)),
        "what": ("s", shown(WIRE)),
    }
    assert message == f"The host has the addresses 192.0.2.7/24, 2001:db8::7/64 on {shown(WIRE)}."
    assert told(state, NIC)["HostUses"] == []


def test_a_hypervisor_says_why_it_is_not_connected() -> None:
    state = state_of()
    state.apply(HypervisorChanged("qemu:///system", connected=True))
    state.apply(HypervisorChanged("xen:///system", connected=False, error="no such socket"))
    assert manager_properties(state, running=True)["Hypervisors"] == [
        ["qemu:///system", True, {}],
        ["xen:///system", False, {"error": Variant("s", "no such socket")}],
    ]


def test_a_problem_is_of_no_device() -> None:
    state = state_of()
    state.apply(ProblemChanged("no-polkit", there=True))
    [[path, code, details, message]] = manager_properties(state, running=True)["Problems"]
    assert (path, code, details, message) == ("/", "no-polkit", {}, PROBLEMS["no-polkit"].sentence)


def test_of_a_bridge_nothing_else_matters() -> None:
    state = state_of(PORT, NIC)
    state.apply(MachineRead(machine(live=(hostdev(NIC),))))
    assert [row[1] for row in told(state, PORT)["Blockers"]] == ["bridge"]
