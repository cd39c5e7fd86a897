"""Label, Location, Id, Role and Socket."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpassd.model.device import Mdev
from hostpassd.model.naming import describe, human_size, identity_id, label, location, role, socket
from tests.sim.hardware import THINGS, UUID, Thing, block, lun, net, node, pci, usb


@pytest.mark.parametrize("thing", THINGS, ids=str)
def test_things_of_real_life(thing: Thing) -> None:
    assert label(thing.device) == thing.label
    assert location(thing.device) == thing.location
    assert role(thing.device) == thing.role
    assert describe(thing.device) == f"{thing.label} ({thing.location})"


@pytest.mark.parametrize("thing", THINGS, ids=str)
def test_a_label_is_for_people(thing: Thing) -> None:
    assert any(character.isalpha() for character in thing.label)
    assert thing.location not in thing.label


# Whatever a device calls itself.
@given(st.sampled_from(THINGS), st.text(max_size=40), st.text(max_size=40))
def test_no_claim_makes_a_label_a_number_or_a_place(thing: Thing, vendor: str, product: str) -> None:
    for claim in (product, location(thing.device), "1234", "0:0:1:0"):
        made = label(dataclasses.replace(thing.device, vendor=vendor, product=claim))
        assert any(character.isalpha() for character in made)
        assert made != location(thing.device)
        assert made == made.strip() and made.isprintable() and len(made) <= 256


def test_the_vendor_is_said_once() -> None:
    assert label(usb("0781:5581", "08:06:50", "SanDisk", "Sandisk Ultra")) == "Sandisk Ultra"
    assert label(usb("0781:5581", "08:06:50", "SanDisk", "Ultra")) == "SanDisk Ultra"
    assert label(usb("046d:085e", "0e:01:00", "Logitech, Inc.", "Logitech BRIO")) == "Logitech BRIO"
    assert label(usb("046d:085e", "0e:01:00", "Logitech, Inc.", "Logi BRIO")) == "Logitech, Inc. Logi BRIO"


def test_ids() -> None:
    assert identity_id(pci("8086:10ca", 0x0200)) == "8086:10ca"
    assert identity_id(usb("0001:000a", "")) == "0001:000a"
    assert identity_id(lun("disk")) == identity_id(net("eth0")) == ""


# Location.


def test_locations_of_different_things_differ() -> None:
    """Also where people call an interface like something else, which then keeps the name for itself."""
    odd = "1-1.2 usb1 usb0 sda ttyS0 card0 net_eth0 host0 eth0 eth0.5 br-lan eth\x010"
    devices = [net(name) for name in odd.split(" ")]
    devices += [usb("0781:5581", "", port="1-1.2"), usb("1d6b:0002", "", port="usb1"), block("sda", 1)]
    devices += [node("scsi-host", "host0"), node("drm", "card0"), node("sound", "card0"), node("tty", "ttyS0")]
    locations = [location(device) for device in devices]
    assert len(set(locations)) == len(locations), locations
    assert {"1-1.2", "usb1", "usb0", "/dev/sda", "scsi/host0", "drm/card0", "sound/card0", "eth0.5"} <= set(locations)
    assert {"net/1-1.2", "net/usb1", "net/sda", "net/eth_010", "eth0", "br-lan"} <= set(locations)


def test_the_location_of_a_disk_with_a_slash_in_its_name() -> None:
    disk = block("cciss!c0d0")
    told = dataclasses.replace(disk, facts=(), device_nodes=())
    assert location(told) == "block/cciss!c0d0"


def test_a_mediated_device_that_does_not_run_has_no_path_but_its_uuid() -> None:
    defined = dataclasses.replace(node("mdev", UUID, Mdev(UUID, "mtty-2")), sysfs_path="")
    assert location(defined) == UUID


def test_the_label_is_the_same_whoever_drives_the_device() -> None:
    """It is a part of what polkit is told, and that must hold while a machine takes the device from its driver."""
    told = {label(usb("ffff:0001", "03:00:00", marks=marks)) for marks in ((), ("fido",))}
    assert told == {"USB device [ffff:0001]"}
    assert label(usb("ffff:0001", "06:01:01", marks=("mtp",))) == "USB phone [ffff:0001]"


# Role.


def test_what_hangs_below_a_usb_device_is_its_function() -> None:
    stick, adapter = usb("0781:5581", "08:06:50"), pci("1000:0072", 0x0107)
    assert role(lun("disk"), (node("scsi-host", "host7"), stick, adapter)) == "function"
    assert role(lun("disk"), (node("scsi-host", "host7"), adapter)) == "device"


@pytest.mark.parametrize(
    ("code", "header", "expected"),
    [
        (0x0604, 1, "structure"), (0x0607, 2, "structure"), (0x0600, 0, "structure"), (0x0601, 0, "structure"),
        (0x0602, 0, "structure"), (0x0608, 0, "structure"), (0x0200, 1, "structure"), (0x0680, 0, "device"),
        (0x0200, 0x7F, "device"), (0x0300, 0, "device"),
    ],
)  # fmt: skip
def test_which_pci_functions_are_bridges(code: int, header: int, expected: str) -> None:
    assert role(pci("8086:0001", code, header=header)) == expected


# Socket.


@pytest.mark.parametrize(
    ("port", "peers", "expected"),
    [
        ("usb2", {"2-1": "1-1"}, ""),
        ("1-1", {}, "1-1"),
        ("2-1", {}, "2-1"),
        ("2-1", {"2-1": "1-5"}, "1-5"),
        ("2-1.3", {"2-1": "1-5", "2-1.3": "1-5.4"}, "1-5.4"),
        # The other half of the hub is not there yet: the kernel will link by number.
        ("2-1.3", {"2-1": "1-5"}, "1-5.3"),
        ("2-1.3.2", {"2-1": "1-5"}, "1-5.3.2"),
        # The firmware says where the port is, and that no other is there.
        ("2-1.3", {"2-1": "1-5", "2-1.3": "2-1.3"}, "2-1.3"),
        ("2-10.1", {"2-1": "1-5"}, "2-10.1"),
    ],
)
def test_sockets(port: str, peers: dict[str, str], expected: str) -> None:
    assert socket(port, peers) == expected


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (8_600_000_000, "8.6 GB"), (4e12, "4.0 TB"), (2e15, "2.0 PB")],
)
def test_sizes(size: float, text: str) -> None:
    assert human_size(size) == text


def test_the_things_are_many_and_not_the_same() -> None:
    assert len(THINGS) > 100
    for one, other in itertools.combinations(THINGS, 2):
        assert (one.device, one.below, one.parent) != (other.device, other.below, other.parent)
