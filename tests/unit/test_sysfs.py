"""From a folder like those of sysfs to a Device: what things are called, with and without udev's database."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hostpassd.host.hwdb import Names
from hostpassd.host.reading import Files
from hostpassd.host.sysfs import KINDS, Memory, Source, describe
from hostpassd.model.category import category
from hostpassd.model.device import Device

PCI_IDS = (
    "8086  Intel Corporation\n\t10ca  82576 Virtual Function\nC 02  Network controller\n\t00  Ethernet controller\n"
)
USB_IDS = "046d  Logitech, Inc.\n\t0825  Webcam C270\n1d6b  Linux Foundation\n\t0003  3.0 root hub\n"

IN_DATABASE = {
    "ID_VENDOR_FROM_DATABASE": "Vendor of udev",
    "ID_MODEL_FROM_DATABASE": "Model of udev",
    "ID_PCI_SUBCLASS_FROM_DATABASE": "Class of udev",
}


class Sysfs:
    """Devices in a folder, read by the daemon's rows; and the ids that were looked up on the way."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []
        for name, text in (("pci.ids", PCI_IDS), ("usb.ids", USB_IDS)):
            (root / name).write_text(text)
        self.names = Names(self._udev, [str(root / "pci.ids")], [str(root / "usb.ids")])

    def _udev(self, modalias: str) -> Mapping[str, str]:
        self.asked.append(modalias)
        return {}

    def read(self, subsystem: str, path: str, properties: Mapping[str, str], **files: str) -> Device:
        """The device at PATH with these properties in udev's run-time database and these files."""
        folder = self.root / path
        folder.mkdir(parents=True)
        for name, text in {"uevent": "", **files}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(text.encode("latin-1") + b"\n")
        source = Source(
            path=str(folder),
            subsystem=subsystem,
            devtype=properties.get("DEVTYPE", ""),
            prop=lambda name: properties.get(name, ""),
            child=lambda name: None,
            files=Files(),
            memory=Memory(),
            afresh=True,
            names=self.names,
        )
        kind = next(kind for kind in KINDS[subsystem] if kind.covers(source))
        device = describe(source, kind, None)
        assert device is not None
        return device

    def pci(
        self, ids: str, properties: Mapping[str, str] | None = None, address: str = "0000:03:10.0", **more: str
    ) -> Device:
        """A network card."""
        vendor, _, device = ids.partition(":")
        files = {"vendor": f"0x{vendor}", "device": f"0x{device}", "class": "0x020000", **more}
        return self.read("pci", address, properties or {}, **files)

    def usb(self, ids: str, port: str = "1-1", udev: Mapping[str, str] | None = None, **files: str) -> Device:
        """A USB device."""
        vendor, _, product = ids.partition(":")
        told = {"DEVTYPE": "usb_device", **(udev or {})}
        return self.read("usb", port, told, idVendor=vendor, idProduct=product, **files)


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path)


def test_a_pci_function_that_udev_has_said_nothing_of_goes_by_its_ids(sysfs: Sysfs) -> None:
    card = sysfs.pci("8086:10ca")
    assert (card.vendor, card.product) == ("Intel Corporation", "82576 Virtual Function")
    assert card.pci and card.pci.class_name == "Ethernet controller"


def test_names_do_not_depend_on_what_udev_has_set_at_this_moment(sysfs: Sysfs) -> None:
    card, later = sysfs.pci("8086:10ca", IN_DATABASE), sysfs.pci("8086:10ca", address="0000:01:00.1")
    assert (
        (card.vendor, card.product) == (later.vendor, later.product) == ("Intel Corporation", "82576 Virtual Function")
    )
    assert card.pci and card.pci.class_name == "Ethernet controller"


def test_the_device_s_own_modalias_is_looked_up(sysfs: Sysfs) -> None:
    modalias = "pci:v00008086d000010CAsv00001AF4sd00001100bc02sc00i00"
    sysfs.pci("8086:10ca", modalias=modalias)
    assert modalias in sysfs.asked


def test_what_udev_has_set_counts_where_no_file_has_the_ids(sysfs: Sysfs) -> None:
    card = sysfs.pci("8086:beef", IN_DATABASE)
    assert (card.vendor, card.product) == ("Intel Corporation", "Model of udev")


def test_what_nobody_knows_has_no_name(sysfs: Sysfs) -> None:
    card = sysfs.pci("abcd:0001")
    assert (card.vendor, card.product, card.label) == ("", "", "Ethernet controller [abcd:0001]")


def test_a_usb_device_s_own_strings_come_first(sysfs: Sysfs) -> None:
    camera = sysfs.usb("046d:0825", udev=IN_DATABASE, manufacturer="Logi\x1b[2J", product="C270", serial="1")
    assert (camera.vendor, camera.product, camera.serial) == ("Logi[2J", "C270", "1")
    assert sysfs.asked == []


def test_a_usb_device_without_strings_has_the_names_of_its_ids(sysfs: Sysfs) -> None:
    plain = sysfs.usb("046d:0825", port="1-2", udev=IN_DATABASE)
    assert (plain.vendor, plain.product) == ("Logitech, Inc.", "Webcam C270")
    half = sysfs.usb("046d:0825", port="1-3", product="HD Webcam")
    assert (half.vendor, half.product) == ("Logitech, Inc.", "HD Webcam")


def test_a_root_hub_is_not_made_by_a_version_of_the_kernel(sysfs: Sysfs) -> None:
    hub = sysfs.usb(
        "1d6b:0003", port="usb2", manufacturer="Linux 6.1.0-18-amd64 xhci-hcd", product="xHCI Host Controller"
    )
    assert (hub.vendor, hub.product) == ("Linux Foundation", "xHCI Host Controller")


# What the category is told by.


def test_a_network_adapter_s_second_configuration(sysfs: Sysfs) -> None:
    device = "\x12\x01" + "\0" * 16
    vendor, ecm = "\x09\x04\0\0\3\xff\xff\0\0", "\x09\x04\0\0\1\x02\x06\0\0"
    padding = "\x09\x04\0\0\0\xff\0\0\0" * 1000  # past the first page
    adapter = sysfs.usb("17ef:3062", descriptors=device + vendor + padding + ecm, **_interface("1-1:1.0/", "ff:ff:00"))
    assert adapter.usb and adapter.usb.interfaces == ("ff:ff:00",)
    assert adapter.usb.other_interfaces == ("ff:00:00", "02:06:00")
    assert category(adapter) == "network"


def _interface(folder: str, triple: str) -> dict[str, Any]:
    parts = zip(("Class", "SubClass", "Protocol"), triple.split(":"), strict=True)
    return {f"{folder}bInterface{part}": value for part, value in parts}


def test_a_telephone_and_a_scanner(sysfs: Sysfs) -> None:
    name: dict[str, Any] = {"1-1:1.0/interface": "MTP"}
    phone = sysfs.usb("abcd:0001", **name)
    assert (phone.usb and phone.usb.marks, category(phone)) == (("mtp",), "phone")
    scanner = sysfs.usb("04b8:013a", port="1-2", udev={"libsane_matched": "yes"})
    assert (scanner.usb and scanner.usb.marks, category(scanner)) == (("scanner",), "scanner")


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({"ID_INPUT_KEYBOARD": "1"}, "keyboard"),
        ({"ID_INPUT_MOUSE": "1"}, "mouse"),
        ({"ID_INPUT_TOUCHPAD": "1"}, "mouse"),
        ({"ID_INPUT_JOYSTICK": "1", "ID_INPUT_KEYBOARD": "1"}, "game-controller"),
        ({"ID_INPUT": "1", "ID_INPUT_KEY": "1"}, "other"),
    ],
)
def test_input_devices(sysfs: Sysfs, properties: Mapping[str, str], expected: str) -> None:
    assert category(sysfs.read("input", "input5", properties, name="Something")) == expected


def test_network_interfaces(sysfs: Sysfs) -> None:
    assert category(sysfs.read("net", "wlp2s0", {"DEVTYPE": "wlan"})) == "wifi"
    assert category(sysfs.read("net", "enp1s0", {})) == "network"


def test_a_usb_interface_and_a_mediated_device(sysfs: Sysfs) -> None:
    told = {"DEVTYPE": "usb_interface"}
    interface = sysfs.read("usb", "1-1:1.0", told, interface="Storage", **_interface("", "08:06:50"))
    assert (interface.label, interface.product) == ("Mass storage interface", "Storage")
    made = sysfs.read("mdev", UUID, {}, **{"mdev_type/name": "Dual port serial"})
    assert (made.label, made.product) == ("Dual port serial", "Dual port serial")


UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


def test_the_socket_of_a_device_is_told(sysfs: Sysfs) -> None:
    plugged = sysfs.usb("046d:0825", port="1-1.2").usb
    assert plugged and plugged.socket == "1-1.2"
