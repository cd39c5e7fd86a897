"""Tree order: parents first, siblings by name, numbers as numbers."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpassd.model.device import Device
from hostpassd.model.order import Natural, in_tree_order, natural, tree_key
from tests.sim.hardware import block, lun, net, node, pci, usb


class Forest:
    """Devices by name."""

    def __init__(self, *devices: Device) -> None:
        self.devices = {device.name: device for device in devices}

    def device(self, name: str) -> Device | None:
        return self.devices.get(name)


def host() -> list[Device]:
    """In the order of the tree."""
    controller = pci("8086:a36d", 0x0C03, address="0000:00:14.0")
    root = usb("1d6b:0002", "09:00:00", device_class=9, port="usb1", parent=controller)
    hub = usb("05e3:0610", "09:00:00", device_class=9, port="1-2", parent=root)
    port = pci("8086:1901", 0x0604, header=1, address="0000:00:1c.0")
    card = pci("8086:1533", 0x0200, address="0000:0a:00.0", parent=port)
    return [
        controller,
        root,
        hub,
        usb("0781:5581", "08:06:50", port="1-2.2", parent=hub),
        usb("0781:5581", "08:06:50", port="1-2.10", parent=hub),
        usb("046d:c31c", "03:01:01", port="1-10", parent=root),
        port,
        card,
        node("net", "eth2", parent=card),
        node("net", "eth10", parent=card),
        pci("8086:a348", 0x0403, address="0000:00:1f.3"),
        pci("8086:0001", 0x0200, address="0000:02:00.0"),
        pci("8086:0001", 0x0200, address="0000:0a:00.1"),
        pci("8086:0001", 0x0200, address="0000:10:00.0"),
        pci("8086:0001", 0x0200, address="0000:10:00.1"),
        pci("8086:0001", 0x0200, address="10000:01:00.0"),
    ]


def test_the_order_of_a_host() -> None:
    devices = host()
    forest, names = Forest(*devices), [device.name for device in devices]
    for seed in range(20):
        shuffled = random.Random(seed).sample(names, len(names))
        assert in_tree_order(forest, shuffled) == names


@given(st.sets(st.sampled_from(range(16))))
def test_a_part_of_the_tree_is_in_the_order_of_the_whole(chosen: set[int]) -> None:
    devices = host()
    forest, names = Forest(*devices), [device.name for device in devices]
    wanted = [name for index, name in enumerate(names) if index in chosen]
    assert in_tree_order(forest, reversed(wanted)) == wanted


def test_what_has_gone_stands_last() -> None:
    devices = host()
    forest, names = Forest(*devices), [device.name for device in devices]
    assert in_tree_order(forest, ["gone_10", *names, "gone_2"]) == [*names, "gone_2", "gone_10"]


def test_things_with_one_kernel_name_have_an_order_too() -> None:
    forest = Forest(node("sound", "card0"), node("drm", "card0"))
    assert in_tree_order(forest, ["sound_card0", "drm_card0"]) == ["drm_card0", "sound_card0"]


def test_a_parent_that_is_not_in_the_tree_is_none() -> None:
    orphan = node("net", "eth0", parent=pci("8086:1533", 0x0200))
    assert tree_key(Forest(orphan), orphan.name) == tree_key(Forest(node("net", "eth0")), orphan.name)


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("1-2", "1-10"), ("1-2", "1-2.1"), ("1-2.9", "1-2.10"), ("usb2", "usb10"), ("sda", "sdb"), ("sg2", "sg10"),
        ("0:0:2:0", "0:0:10:0"), ("nvme0n1", "nvme0n2"), ("enp2s0", "enp10s0"), ("eth0", "eth0.5"),
        ("0000:02:00.0", "0000:0a:00.0"), ("0000:0a:00.0", "0000:10:00.0"), ("0000:1f:00.0", "0001:00:00.0"),
        ("ffff:00:00.0", "10000:00:00.0"), ("host2", "host10"),
    ],
)  # fmt: skip
def test_natural(earlier: str, later: str) -> None:
    assert natural(earlier) < natural(later)


@given(st.lists(st.text(alphabet="ab01-.:", max_size=12), max_size=8))
def test_any_names_can_be_compared(names: list[str]) -> None:
    def key(name: str) -> tuple[Natural, str]:
        return natural(name), name

    backwards = names[::-1]
    assert sorted(names, key=key) == sorted(backwards, key=key)


def test_other_kinds_are_no_matter() -> None:
    forest = Forest(lun("disk"), block("sda", 1), net("eth0"))
    assert in_tree_order(forest, forest.devices) == ["scsi_0_0_1_0", "net_eth0", "block_sda"]
