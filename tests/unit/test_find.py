"""What a text spells, whoever chose the words that devices, interfaces and machines are called by."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpassd import errors
from hostpassd.machines.domain_xml import claim_of, hostdev_xml
from hostpassd.model.device import Device, Net, device_name
from hostpassd.model.events import DeviceGone, DeviceSeen, MachineRead
from hostpassd.model.machine import Claim
from hostpassd.model.naming import location
from hostpassd.model.order import in_tree_order
from hostpassd.state import State, find
from tests.sim.world import OTHER, UUID, block, hostdev, machine, mdev, net, pci, scsi, state_of, usb

NIC = pci("0000:01:00.0", group=2)
INTERFACE = net("enp1s0", NIC)
HUB = usb("usb1", number=1, vendor=0x1D6B, product=2, device_class=9)
STICK = usb("1-1.2", HUB, number=3, serial="SAME")
TWIN = usb("1-2", HUB, number=4, serial="SAME")
LUN = scsi(0, 0, 1, 0)
DISK = dataclasses.replace(block("sda", LUN), device_nodes=("/dev/sda", "/dev/disk/by-id/scsi-DISK-0001"))
GPU = pci("0000:03:00.0", group=3, code=0x030000)
MDEV = mdev("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", GPU)
TRUTH = (NIC, INTERFACE, HUB, STICK, TWIN, LUN, DISK, GPU, MDEV)


def _node(kind: str, kernel_name: str, parent: Device) -> Device:
    path = f"{parent.sysfs_path}/{kernel_name}"
    return Device(device_name(kind, kernel_name), kind, path, parent.name)


CARD, SOUND, STICK_FACE = (
    _node("drm", "card0", GPU),
    _node("sound", "card0", NIC),
    _node("usb-interface", "1-1.2:1.0", STICK),
)

# Every spelling, and what it finds.
SPELT = {
    NIC.name: [NIC],
    "01:00.0": [NIC],
    "0000:01:00.0": [NIC],
    NIC.sysfs_path: [NIC],
    NIC.sysfs_path + "/": [NIC],
    "/dev/sda": [DISK],
    "/dev/disk/by-id/scsi-DISK-0001": [DISK],
    "sda": [DISK],
    "card0": [CARD, SOUND],
    "0:0:1:0": [LUN],
    "usb1": [HUB],
    "1-1.2": [STICK],
    "1-1.2:1.0": [STICK_FACE],
    "46f4:0001": [STICK, TWIN],
    "46F4:0001": [STICK, TWIN],
    "8086:10d3": [NIC, GPU],
    "enp1s0": [INTERFACE],
    "52:54:00:00:00:01": [INTERFACE],
    "52:54:00:00:00:01".upper(): [INTERFACE],
    "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001": [MDEV],
    "serial:SAME": [STICK, TWIN],
}
NOTHING = ("", "serial:", "serial:same", "SAME", "stick SAME", "/", "/sys", "/dev/", "/dev/nope", "01:00.1", "nope")


@pytest.mark.parametrize(("text", "found"), SPELT.items())
def test_every_spelling_finds_what_it_says(text: str, found: list[Device]) -> None:
    state = state_of(*TRUTH, CARD, SOUND, STICK_FACE)
    assert find.find_devices(state, text) == in_tree_order(state, (device.name for device in found))


@pytest.mark.parametrize("text", NOTHING)
def test_what_spells_nothing_finds_nothing(text: str) -> None:
    assert find.find_devices(state_of(*TRUTH), text) == []


def test_a_path_that_does_not_lead_to_a_device_by_its_words_is_not_followed() -> None:
    state = state_of(*TRUTH)
    assert find.find_devices(state, f"{NIC.sysfs_path}/../{NIC.sysfs_path.rpartition('/')[2]}") == [NIC.name]
    for text in (f"/sys/../tmp{NIC.sysfs_path}", "/sys/bus/pci/devices/0000:01:00.0", f"{NIC.sysfs_path}/driver"):
        assert find.find_devices(state, text) == []


TEXTS = (*SPELT, *NOTHING, "usb_1_9", "sdb", "usb0", "0000:09:00.0", "hostdev:usb:0951:1666", STICK.label)
texts = st.sampled_from(TEXTS) | st.text(max_size=20)


@given(text=texts, claim=texts, thing=st.sampled_from(("usb", "block")))
def test_what_a_device_says_of_itself_changes_what_no_spelling_finds_but_that_of_serials(
    text: str, claim: str, thing: str
) -> None:
    """A stick that calls itself by the name of whatever has just been unplugged is not taken for that."""
    honest = usb("1-9", HUB, number=9, vendor=0xBAD, product=0xBAD) if thing == "usb" else block("sdz", LUN)
    liar = dataclasses.replace(honest, label=claim, vendor=claim, product=claim, serial=claim)
    found = find.find_devices(state_of(HUB, LUN, liar), text)
    if text == f"serial:{claim}":
        assert found == ([liar.name] if claim else [])
    elif not text.startswith("serial:"):
        assert found == find.find_devices(state_of(HUB, LUN, honest), text)
        assert find.find_devices(state_of(*TRUTH, liar), text) == find.find_devices(state_of(*TRUTH, honest), text)


# What a container can call the interface that it was lent: 15 bytes without a slash, a colon or white space.
interfaces = (st.sampled_from(TEXTS) | st.text(min_size=1, max_size=15)).filter(
    lambda name: name.isprintable() and not set(name) & set("/: ") and 0 < len(name.encode()) < 16
)
EXACT = [
    text for text in (*SPELT, "usb_1_9", "sdb", "vda", "1-9", "usb2", "card7", "sg3", "nvme0n1") if text != "enp1s0"
]


@given(text=st.sampled_from(EXACT), called=interfaces, here=st.booleans())
def test_no_interface_is_taken_for_something_else_by_what_it_is_called(text: str, called: str, here: bool) -> None:
    """Whether what the text means is there, or was unplugged a moment ago."""
    things = tuple(thing for thing in (*TRUTH, CARD, SOUND, STICK_FACE) if here and thing != INTERFACE)
    carrier = pci("0000:0e:00.0", group=9, vendor_id=0x1234)
    before = find.find_devices(state_of(*things, carrier), text)
    renamed = dataclasses.replace(net(called, carrier), facts=(Net(called, "52:54:00:00:00:99"),))
    assert find.find_devices(state_of(*things, carrier, renamed), text) == before


def test_an_interface_is_found_by_its_name_where_nothing_else_is_called_so() -> None:
    for name in ("usb0", "lan", "eth0", "br-lan", "vdsl0", "wlp2s0", "sda_uplink"):
        interface = net(name, NIC)
        assert find.find_devices(state_of(NIC, interface), name) == [interface.name]
    hidden = net("sda", NIC)
    assert find.find_devices(state_of(NIC, hidden), "sda") == []
    assert find.find_devices(state_of(NIC, hidden), hidden.name) == [hidden.name]


@pytest.mark.parametrize("text", ["x" * 513, "/sys/" + "a/" * 300, "serial:" + "x" * 512, "/sys/class/" + "a" * 512])
def test_a_text_that_is_longer_than_any_name_is_refused_unread(text: str) -> None:
    state = state_of(*TRUTH)
    state.apply(MachineRead(machine()))
    here = state.machines[UUID]
    for look in (
        lambda: find.find_devices(state, text),
        lambda: find.one_device(state, text),
        lambda: find.one_machine(state, text),
        lambda: find.missing_by_id(state, here, text),
    ):
        with pytest.raises(errors.InvalidArgs, match="512"):
            look()
    assert find.find_devices(state, text[:512]) == []


def test_a_machine_is_not_found_by_what_another_one_is() -> None:
    state = State()
    state.apply(MachineRead(machine(OTHER)))
    with pytest.raises(errors.NoSuchMachine):
        find.one_machine(state, OTHER)
    assert find.one_machine(state, UUID).name == OTHER
    state.apply(MachineRead(machine("b", OTHER)))
    for text in (OTHER, OTHER.upper(), "b"):
        assert find.one_machine(state, text).uuid == OTHER


# --- what is missing ---


def by_ids(device: Device, live: bool) -> Claim:
    """By bus and number as well, as the live half has it, or by the ids alone."""
    return claim_of(hostdev_xml(device, alias="hostdev0" if live else "", config=not live, unique=not live))


def unplug(state: State, device: Device) -> None:
    state.apply(DeviceGone(device.sysfs_path))


def test_an_id_is_that_claim_and_no_place() -> None:
    state = state_of(HUB, STICK)
    state.apply(MachineRead(machine(config=(by_ids(STICK, live=False),))))
    unplug(state, STICK)
    [row] = state.missing[UUID]
    here = state.machines[UUID]
    assert find.missing_by_id(state, here, row.id) == row
    for text in (row.id + "0", STICK.name, ""):
        assert find.missing_by_id(state, here, text) is None
    assert find.missing_at(state, here, STICK.name) == (row,)
    for text in (row.id, "", "1-1.2"):
        assert find.missing_at(state, here, text) == ()


def test_a_place_means_both_halves_of_the_one_thing_that_was_last_there() -> None:
    state = state_of(HUB, STICK)
    state.apply(MachineRead(machine(live=(by_ids(STICK, live=True),), config=(by_ids(STICK, live=False),))))
    instance = state.devices[STICK.name].instance
    unplug(state, STICK)
    rows = find.missing_at(state, state.machines[UUID], STICK.name)
    assert {(row.live, row.config) for row in rows} == {(True, False), (False, True)}
    assert find.missing_at(state, state.machines[UUID], STICK.name, instance) == rows
    assert find.missing_at(state, state.machines[UUID], STICK.name, instance + 1) == ()


@pytest.mark.parametrize("order", [(0xAAAA, 0xBBBB), (0xBBBB, 0xAAAA)])
def test_a_place_where_two_things_were_is_ambiguous_and_never_one_of_them_by_chance(order: tuple[int, int]) -> None:
    sticks = [usb("1-1.2", HUB, number=number, vendor=vendor) for number, vendor in enumerate(order, 3)]
    state = state_of(HUB)
    state.apply(MachineRead(machine(config=tuple(by_ids(stick, live=False) for stick in sticks))))
    instances = []
    for stick in sticks:
        state.apply(DeviceSeen(stick))
        instances.append(state.devices[stick.name].instance)
        unplug(state, stick)
    here = state.machines[UUID]
    with pytest.raises(errors.AmbiguousDevice, match=r"hostdev:usb:aaaa.*hostdev:usb:bbbb|hostdev:usb:bbbb.*:aaaa"):
        find.missing_at(state, here, sticks[0].name)
    for instance, vendor in zip(instances, order, strict=True):
        [row] = find.missing_at(state, here, sticks[0].name, instance)
        assert f"{vendor:04x}" in row.id


def test_what_never_stood_anywhere_is_at_no_place() -> None:
    state = state_of(NIC)
    state.apply(MachineRead(machine(config=(by_ids(STICK, live=False), hostdev(NIC)))))
    assert len(state.missing[UUID]) == 1 and find.missing_at(state, state.machines[UUID], "") == ()


def test_a_location_finds_exactly_that_node() -> None:
    state = state_of(*TRUTH, CARD, SOUND, STICK_FACE)
    for device in state.devices.values():
        assert find.find_devices(state, location(device)) == [device.name]
    renamed = dataclasses.replace(INTERFACE, facts=(Net("lan0", "52:54:00:00:00:01"),))
    state.apply(DeviceGone(INTERFACE.sysfs_path))
    state.apply(DeviceSeen(dataclasses.replace(renamed, name="net_lan0", sysfs_path=f"{NIC.sysfs_path}/lan0")))
    assert find.find_devices(state, "enp1s0") == [] and find.find_devices(state, "lan0") == ["net_lan0"]


def test_what_a_text_spells_is_in_tree_order_and_forgotten_with_the_device() -> None:
    sticks = [usb(f"1-{port}", number=port, serial="SAME") for port in (10, 2)]
    state = state_of(*sticks)
    for text in ("46f4:0001", "serial:SAME"):
        assert find.find_devices(state, text) == ["usb_1_2", "usb_1_10"]
    state.apply(DeviceSeen(dataclasses.replace(sticks[0], serial="OTHER")))
    assert find.find_devices(state, "serial:SAME") == ["usb_1_2"]
    state.apply(DeviceGone(sticks[1].sysfs_path))
    assert find.find_devices(state, "serial:SAME") == []
    assert find.find_devices(state, "46f4:0001") == ["usb_1_10"]
