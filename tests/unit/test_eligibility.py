"""Blockers and companions, case by case."""

from __future__ import annotations

import dataclasses

import pytest

from hostpassd.model.device import Device
from hostpassd.model.events import DeviceGone, DeviceSeen, HostUse, HostUsesRead, MachineRead, host_use
from hostpassd.model.naming import STRUCTURE, SUBJECT, role, shown
from hostpassd.state import State
from hostpassd.state.eligibility import blockers, companions, host_uses
from tests.sim.world import OTHER, block, bridge, hostdev, keyboard, machine, net, pci, scsi, state_of, usb

PORT = bridge("0000:00:01.0", group=1)
NIC = pci("0000:01:00.0", PORT, group=2)


def codes(state: State, device: Device) -> set[tuple[str, str]]:
    return {(b.code, b.severity) for b in blockers(state, state.devices[device.name])}


def test_a_nic_behind_a_root_port_is_free() -> None:
    state = state_of(PORT, NIC, net("enp1s0", NIC))
    assert codes(state, NIC) == set()
    assert codes(state, PORT) == {("bridge", "never")}


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({"code": 0x060100, "driver": "lpc_ich"}, ("bridge", "never")),
        ({"header": 2}, ("bridge", "never")),
        ({"header": 0x7F}, ("not-responding", "never")),
        ({"off_bus": True}, ("not-responding", "never")),
        ({"code": 0x070002}, ("class-excluded", "override")),
        ({"code": 0x0C0500}, ("class-excluded", "override")),
        ({"code": 0x050000}, ("class-excluded", "override")),
        ({"code": 0x088000}, ("class-excluded", "override")),
        ({"boot_display": True, "code": 0x030000}, ("boot-display", "override")),
        ({"group": -1}, ("no-iommu", "never")),
    ],
)
def test_what_a_pci_function_is(facts: dict[str, object], code: tuple[str, str]) -> None:
    device = pci("0000:02:00.0", **{"group": 7, **facts})  # type: ignore[arg-type]
    assert codes(state_of(device), device) == {code}


def test_an_other_bridge_is_a_device_for_its_role_and_its_blockers_alike() -> None:
    """An NVSwitch, say; with the header of a bridge it is one."""
    switch = pci("0000:02:00.0", group=7, code=0x068000)
    assert codes(state_of(switch), switch) == set()
    assert role(switch) == SUBJECT
    port = pci("0000:02:00.0", group=7, code=0x068000, header=1)
    assert codes(state_of(port), port) == {("bridge", "never")}
    assert role(port) == STRUCTURE


def test_a_usb_controller_is_not_excluded_by_the_smbus_class() -> None:
    controller = pci("0000:00:14.0", group=3, code=0x0C0330)
    assert codes(state_of(controller), controller) == set()


def test_companions_are_the_endpoints_that_a_driver_binds() -> None:
    parent = bridge("0000:03:00.0", group=5)
    nic = pci("0000:04:01.0", parent, group=5)
    sound = pci("0000:04:02.0", parent, group=5, driver="snd_intel8x0", code=0x040100)
    idle = pci("0000:04:03.0", parent, group=5, driver="")
    bound = pci("0000:04:04.0", parent, group=5, driver="vfio-pci")
    state = state_of(parent, nic, sound, idle, bound)
    assert companions(state, nic) == (sound.name, bound.name)
    assert codes(state, nic) == set()


def test_a_bridge_on_a_host_driver_makes_its_group_not_viable_and_is_named() -> None:
    lpc = pci("0000:00:1f.0", group=9, code=0x060100, driver="lpc_ich")
    sata = pci("0000:00:1f.2", group=9, code=0x010601, driver="ahci")
    state = state_of(lpc, sata)
    found = {b.code: b.message for b in blockers(state, sata)}
    assert set(found) == {"group-not-viable"}
    assert "0000:00:1f.0 (lpc_ich)" in found["group-not-viable"]
    state.apply(DeviceSeen(dataclasses.replace(lpc, driver="")))
    assert codes(state, sata) == set()


def test_hubs_functions_and_what_hangs_on_a_stick() -> None:
    controller = pci("0000:00:14.0", group=3, code=0x0C0330)
    root = usb("usb1", controller, device_class=9)
    hub = usb("1-1", root, device_class=9)
    stick = usb("1-1.2", hub, number=4)
    lun = scsi(6, 0, 0, 0, stick)
    disk = block("sdc", lun)
    state = state_of(controller, root, hub, stick, lun, disk)
    assert codes(state, root) == codes(state, hub) == {("hub", "never")}
    assert codes(state, stick) == set()
    assert codes(state, lun) == codes(state, disk) == {("not-assignable-kind", "never")}
    assert state.target(disk.name) == state.target(lun.name) == stick.name
    assert codes(state, controller) == {("not-leaf", "override")}
    state.apply(DeviceGone(stick.sysfs_path))
    assert codes(state, controller) == set()


def test_a_use_blocks_everything_above_and_the_companions() -> None:
    nic, sound = pci("0000:04:01.0", group=5), pci("0000:04:02.0", group=5, driver="snd")
    interface = net("enp4s1", nic)
    state = state_of(nic, sound, interface)
    state.apply(HostUsesRead({interface.name: (host_use("address", addresses=("192.0.2.7/24",)),)}))
    assert ("network-in-use", "override") in codes(state, nic)
    assert ("network-in-use", "override") in codes(state, sound)
    assert any("192.0.2.7/24" in b.message for b in blockers(state, state.devices[sound.name]))
    state.apply(HostUsesRead({}))
    assert codes(state, nic) == codes(state, sound) == set()


@pytest.mark.parametrize(
    ("use", "code"),
    [
        (host_use("mount", mount_points=("/",), system=True), ("host-system", "never")),
        (host_use("swap", volumes=("/dev/sda2",), system=True), ("host-system", "never")),
        (host_use("mount", mount_points=("/srv",)), ("mounted", "override")),
        (host_use("storage-stack", volumes=("LVM volume vg-root",)), ("storage-stack", "override")),
    ],
)
def test_a_use_of_a_disk_blocks_the_lun_and_the_controller(use: HostUse, code: tuple[str, str]) -> None:
    controller = pci("0000:05:00.0", group=4, code=0x010000)
    lun = scsi(0, 0, 1, 0, controller)
    disk = block("sda", lun)
    state = state_of(controller, lun, disk)
    state.apply(HostUsesRead({disk.name: (use,)}))
    assert codes(state, lun) == {code}
    assert codes(state, controller) == {code, ("not-leaf", "override")}


def test_uses_of_one_code_are_one_row_and_what_the_host_needs_is_apart() -> None:
    lun = scsi(0, 0, 1, 0, pci("0000:05:00.0", group=4, code=0x010000))
    disk = block("sda", lun)
    state = state_of(lun, disk)
    uses = (
        host_use("mount", system=True, mount_points=("/boot",), volumes=("/dev/sda1",)),
        host_use("mount", mount_points=("/srv",), volumes=("/dev/sda3",)),
        host_use("mount", mount_points=("/home",), volumes=("/dev/sda3",)),
        host_use("swap", system=True, volumes=("/dev/sda2",)),
    )
    state.apply(HostUsesRead({disk.name: uses}))
    assert [(row.code, row.device, dict(row.details)) for row in host_uses(state, disk)] == [
        (
            "mount",
            disk.name,
            {
                "mount-points": ("/boot", "/home", "/srv"),
                "volumes": ("/dev/sda1", "/dev/sda3"),
                "what": shown(disk),
            },
        ),
        ("swap", disk.name, {"volumes": ("/dev/sda2",), "what": shown(disk)}),
    ]
    assert [(row.code, row.device, row.message) for row in blockers(state, lun)] == [
        (
            "host-system",
            disk.name,
            f"The host runs from {shown(disk)} (mount, swap on /dev/sda1, /dev/sda2), mounted at /boot: it stays with "
            "the host.",
        ),
        (
            "mounted",
            disk.name,
            f"The host has /home, /srv mounted from {shown(disk)} (/dev/sda3): unmount it first.",
        ),
    ]


def test_addresses_routes_and_interfaces_are_one_row() -> None:
    nic = pci("0000:04:01.0", group=5)
    interface = net("enp4s1", nic)
    state = state_of(nic, interface)
    uses = (
        host_use("address", addresses=("192.0.2.7/24",)),
        host_use("default-route", routes=("default via 192.0.2.1",)),
        host_use("upper-link", interfaces=("tagged",), kinds=("vlan",), addresses=("198.51.100.1/24",)),
    )
    state.apply(HostUsesRead({interface.name: uses}))
    [row] = blockers(state, nic)
    assert (row.code, row.device) == ("network-in-use", interface.name)
    assert dict(row.details) == {
        "addresses": ("192.0.2.7/24", "198.51.100.1/24"),
        "interfaces": ("tagged",),
        "kinds": ("vlan",),
        "routes": ("default via 192.0.2.1",),
        "what": shown(interface),
    }


def test_a_vfio_driver_is_a_use_while_no_running_machine_has_the_device() -> None:
    ready = pci("0000:04:01.0", group=5, driver="vfio-pci")
    assert ready.pci
    ready = dataclasses.replace(ready, facts=(dataclasses.replace(ready.pci, vfio_device="vfio0"),))
    state = state_of(ready)
    state.apply(MachineRead(machine(config=(hostdev(ready),))))
    [row] = host_uses(state, ready)
    assert (row.code, dict(row.details)) == ("vfio", {"driver": "vfio-pci", "what": shown(ready)})
    assert {code for code, _ in codes(state, ready)} == {"held-config"}
    [batch] = state.apply(MachineRead(machine(live=(hostdev(ready),))))
    assert host_uses(state, ready) == () and ("device", ready.name) in batch.changed


def test_holds_of_any_machine_block_the_device_its_companions_and_what_is_above() -> None:
    controller = pci("0000:05:00.0", group=4, code=0x010000)
    lun = scsi(0, 0, 1, 0, controller)
    state = state_of(controller, lun)
    state.apply(MachineRead(machine("a", live=(hostdev(lun),))))
    state.apply(MachineRead(machine("b", OTHER, running=False, config=(hostdev(lun),))))
    assert codes(state, lun) == {("held-live", "never"), ("held-config", "override")}
    assert codes(state, controller) == {("held-live", "never"), ("held-config", "override"), ("not-leaf", "override")}
    assert {b.machine for b in blockers(state, lun)} == {machine().uuid, OTHER}


def test_what_has_all_keyboards_of_a_seat_is_the_last_one() -> None:
    controller = pci("0000:00:1d.0", group=4, code=0x0C0330)
    hub = usb("usb1", controller, device_class=9)
    first, second, foreign = (usb(port, hub, number=number) for number, port in enumerate(("1-1", "1-2", "1-3"), 3))
    state = state_of(controller, hub, first, keyboard("input1", first), keyboard("input2", first))
    last = ("last-keyboard", "override")
    assert last in codes(state, first) and last in codes(state, controller)
    assert [use.code for use in state.uses_of("input_input2")] == ["keyboard"]
    [batch] = state.apply(DeviceSeen(second))
    assert ("device", first.name) not in batch.changed
    [batch] = state.apply(DeviceSeen(keyboard("input3", second)))
    assert {("device", name) for name in (first.name, "input_input1")} <= set(batch.changed)
    assert last not in codes(state, first) and last not in codes(state, second) and last in codes(state, controller)
    assert state.uses_of("input_input1") == ()
    for device in (foreign, keyboard("input4", foreign, "seat1")):
        state.apply(DeviceSeen(device))
    assert last in codes(state, foreign) and last not in codes(state, second)
    state.apply(DeviceGone(first.sysfs_path))
    assert last in codes(state, second)


def test_virtual_functions_stand_on_their_own_and_block_their_physical_one() -> None:
    physical = pci("0000:06:00.0", group=10)
    virtual = pci("0000:06:10.0", group=11, physical=physical)
    state = state_of(physical, virtual)
    assert codes(state, virtual) == set()
    assert codes(state, physical) == {("has-virtual-functions", "override")}


def test_virtual_functions_in_a_running_machine_keep_their_physical_one_with_one_row() -> None:
    physical = pci("0000:06:00.0", group=10)
    virtual = pci("0000:06:10.0", group=11, physical=physical)
    second = pci("0000:06:10.1", group=12, physical=physical)
    state = state_of(physical, virtual, second)
    [batch] = state.apply(MachineRead(machine(live=(hostdev(virtual), hostdev(second)))))
    [held] = [row for row in blockers(state, physical) if row.code == "held-live"]
    assert dict(held.details)["functions"] == (virtual.name, second.name) and ("device", physical.name) in batch.changed
    assert dict(held.details)["what"] == shown(physical)
    state.apply(MachineRead(machine(config=(hostdev(virtual),))))
    assert codes(state, physical) == {("has-virtual-functions", "override")}


def test_the_configuration_keeps_a_device_for_the_host() -> None:
    state = State(never=frozenset({NIC.name}))
    for device in (PORT, NIC):
        state.apply(DeviceSeen(device))
    assert codes(state, NIC) == {("host-system", "never")}


def test_nothing_moves_along_where_one_of_the_group_stays_with_the_host() -> None:
    one, other = pci("0000:00:1f.2", group=7), pci("0000:00:1f.4", group=7, driver="snd")
    assert companions(state_of(one, other), one) == (other.name,)
    isa = pci("0000:00:1f.0", group=7, driver="lpc_ich", code=0x060100)
    state = state_of(one, other, isa)
    assert companions(state, one) == () and [b.code for b in blockers(state, one)] == ["group-not-viable"]
