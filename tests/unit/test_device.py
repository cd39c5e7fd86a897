"""Names, and what makes two readings the same thing."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpassd.model.device import Device, Facts, Mdev, Scsi, Usb, device_name, escape, same_thing

# (kind, kernel name, parent's kernel name) -> name, as the design has them.
NAMES = [
    ("pci", "0000:01:00.0", "", "pci_0000_01_00_0"),
    ("pci", "10000:e1:00.0", "", "pci_10000_e1_00_0"),
    ("usb", "usb1", "", "usb_usb1"),
    ("usb", "1-1.2", "", "usb_1_1_2"),
    ("usb-interface", "1-1.2:1.0", "", "usb_1_1_2__1_0"),
    ("usb-interface", "1-0:1.0", "", "usb_1_0__1_0"),
    ("scsi-host", "host0", "", "scsi_host0"),
    ("scsi-target", "target0:0:1", "", "scsi_target0_0_1"),
    ("scsi", "0:0:1:0", "", "scsi_0_0_1_0"),
    ("scsi-generic", "sg0", "", "scsi_generic_sg0"),
    ("mdev", "c2177883-f1bb-47f0-914d-32a22e3a8804", "0000:00:02.0",
     "mdev_c2177883_f1bb_47f0_914d_32a22e3a8804_0000_00_02_0"),
    ("mdev", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "mtty", "mdev_83b8f4f2_509f_382f_3c1e_e6bfe0fa1001_mtty"),
    ("mdev-parent", "mtty", "", "mdev_parent_mtty"),
    ("net", "enp1s0", "", "net_enp1s0"),
    ("net", "br-lan", "", "net_br_2dlan"),
    ("net", "eth0.5", "", "net_eth0_2e5"),
    ("net", "a_b", "", "net_a_5fb"),
    ("net", "ü", "", "net__c3_bc"),
    ("block", "cciss!c0d0", "", "block_cciss_21c0d0"),
    ("drm", "card0", "", "drm_card0"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "kernel_name", "parent", "name"), NAMES)
def test_names(kind: str, kernel_name: str, parent: str, name: str) -> None:
    assert device_name(kind, kernel_name, parent) == name


def test_an_interface_is_not_named_like_a_device_on_a_deeper_port() -> None:
    assert device_name("usb-interface", "1-1:1.0") != device_name("usb", "1-1.1.0")


@given(st.text(min_size=1).filter(lambda text: "/" not in text), st.text(min_size=1))
def test_escape_is_injective_and_fit_for_an_object_path(one: str, other: str) -> None:
    assert all(c == "_" or (c.isascii() and c.isalnum()) for c in _escaped(one))
    assert (_escaped(one) == _escaped(other)) == (one == other)


def _escaped(text: str) -> str:
    """What the kernel can have called something: bytes, however they are decoded."""
    return escape(text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape"))


STICK = Device(
    "usb_1_1", "usb", "/sys/devices/pci0000:00/usb1/1-1", None,
    facts=(Usb(1, 5, "1-1", 0x46F4, 1, 0, 480, ("08:06:50",)),),
)  # fmt: skip
DISK = Device("scsi_0_0_0_0", "scsi", "/sys/devices/x", None, facts=(Scsi(0, 0, 0, 0, "disk", "naa.5"),))


def test_the_same_thing_with_other_values() -> None:
    assert same_thing(STICK, dataclasses.replace(STICK, driver="usb", serial="X", instance=7))
    interfaces = dataclasses.replace(_usb(STICK), interfaces=())
    assert same_thing(STICK, dataclasses.replace(STICK, facts=(interfaces,)))


def test_another_thing_in_the_same_place() -> None:
    replugged = dataclasses.replace(_usb(STICK), number=6)
    assert not same_thing(STICK, dataclasses.replace(STICK, facts=(replugged,)))
    assert not same_thing(DISK, dataclasses.replace(DISK, facts=(Scsi(0, 0, 0, 0, "disk", "naa.6"),)))


def _usb(device: Device) -> Usb:
    assert device.usb is not None
    return device.usb


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        (Scsi(0, 0, 1, 0, "disk", "naa.5"), Scsi(0, 0, 1, 0, "disk", "naa.6"), False),
        (Scsi(0, 0, 1, 0, "disk", "naa.5"), Scsi(0, 0, 1, 0, "disk", ""), True),
        (Mdev("a", "one"), Mdev("a", "other"), True),
    ],
)
def test_what_has_another_identity_is_another_thing_and_what_tells_nothing_is_not(
    before: Facts, after: Facts, same: bool
) -> None:
    old, new = (Device("x", "scsi", "/sys/devices/x", None, facts=(facts,)) for facts in (before, after))
    assert same_thing(old, new) == same and not same_thing(old, dataclasses.replace(new, sysfs_path="/sys/devices/y"))
