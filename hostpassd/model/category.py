"""The Category of a device: one word for pictures and menus. docs/categories.md tells each word and its icon.

A thing's category is told by its ids, its class and its descriptors. It must be the same whoever drives the thing at
the moment, a machine or nobody at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from hostpassd.model import known_ids
from hostpassd.model.device import Block, Device, Input, Mdev, Net, Pci, Usb, UsbInterface

OTHER = "other"

# What a USB device is, is the first of these that its interfaces show.
USB_ORDER = (
    *("security-key", "smartcard", "camera", "scanner", "bluetooth", "phone", "printer", "disk", "optical-drive"),
    *("network", "audio", "keyboard", "mouse", "game-controller", "serial"),
)

CATEGORIES = frozenset(
    {
        *USB_ORDER,
        *("gpu", "wifi", "storage-controller", "usb-controller", "accelerator", "bridge", "system", "hub", "tape"),
        *("virtual-gpu", "tuner", "tpm", OTHER),
    }
)

# By PCI base class and subclass, else by base class.
_PCI_SUBCLASSES = {
    0x0108: "disk",
    0x0200: "network",
    0x0280: "wifi",
    0x0401: "audio",
    0x0403: "audio",
    0x0480: "camera",
    0x0B40: "accelerator",
    0x0C03: "usb-controller",
    0x0C05: "system",
    0x0D11: "bluetooth",
}
_PCI_CLASSES = {
    0x01: "storage-controller",
    0x03: "gpu",
    0x05: "system",
    0x06: "bridge",
    0x07: "serial",
    0x08: "system",
    0x12: "accelerator",
}

# By the beginning of an interface's class, subclass and protocol; the longest that fits counts.
_INTERFACES = {
    "01": "audio",
    "02:02": "serial",  # ACM: modems, boards
    "02:02:ff": "network",  # RNDIS as Microsoft has it
    "02:06": "network",  # ECM
    "02:0c": "network",  # EEM
    "02:0d": "network",  # NCM
    "02:0e": "network",  # MBIM
    "03:01:01": "keyboard",
    "03:01:02": "mouse",
    "06:01": "camera",  # PTP; see `_shown`
    "07": "printer",
    "08": "disk",
    "08:02": "optical-drive",  # MMC-5
    "08:05": "optical-drive",  # SFF-8070i
    "0b": "smartcard",
    "0e": "camera",
    "58:42": "game-controller",  # the first Xbox
    "e0:01:01": "bluetooth",
    "e0:01:03": "network",  # RNDIS
    "e0:01:04": "bluetooth",  # a second radio
    "ef:04:01": "network",  # RNDIS over Ethernet
    "ff:42": "phone",  # Android's debugging bridge and boot loader
    "ff:47:d0": "game-controller",  # Xbox One and later
    "ff:5d": "game-controller",  # Xbox 360
    "ff:fe:02": "phone",  # Apple
}

_MARKS = {"fido": "security-key", "mtp": "phone"}

# The marks that can only be read while a driver of the host has the device.
_MARKS_OF_DRIVERS = frozenset({"fido"})

# What lsscsi's words for the peripheral device types come to.
_SCSI_TYPES = {
    "disk": "disk",
    "sim dsk": "disk",
    "zbc": "disk",
    "cd/dvd": "optical-drive",
    "worm": "optical-drive",
    "optical": "optical-drive",
    "tape": "tape",
    "scanner": "scanner",
}

# Mediated devices are named after their driver; of these each one is a display.
_DISPLAY_MDEVS = ("nvidia-", "i915-", "mdpy-", "mbochs-")

# What a USB device shows only through a driver of the host: its interface wlan0, its logical units, its input devices.
_LEARNT = frozenset({"wifi", "disk", "optical-drive", "keyboard", "mouse", "game-controller", "security-key"})
_TELLING = frozenset({"net", "scsi", "input"})


def category(device: Device, below: Iterable[Device] = (), parent: Device | None = None, before: str = "") -> str:
    """The Category of DEVICE, one of CATEGORIES.

    BELOW: everything below it in the tree. PARENT: what it is a mediated device of. BEFORE: the category of this very
    Instance so far. Some USB devices tell what they are only through a driver, and they are it no less while a
    machine has them.
    """
    if device.usb:
        return _usb(device.usb, tuple(below), before)
    if device.kind == "mdev":
        return _mdev(device, parent)
    tell = _BY_KIND.get(device.kind)
    return tell(device) if tell else OTHER


def without_driver(usb: Usb) -> Usb:
    """What of USB is the same whoever drives the device."""
    return dataclasses.replace(usb, marks=tuple(mark for mark in usb.marks if mark not in _MARKS_OF_DRIVERS))


def is_wireless(device: Device) -> bool:
    """Whether it is a Wi-Fi network interface."""
    return any(isinstance(facts, Net) and facts.type == "wlan" for facts in device.facts)


def _pci(device: Device) -> str:
    return pci_category(device.pci) if device.pci else OTHER


def pci_category(pci: Pci) -> str:
    """The category of a PCI function."""
    known = known_ids.pci_category(pci.vendor_id, pci.device_id)
    return known or _PCI_SUBCLASSES.get(pci.class_code >> 8) or _PCI_CLASSES.get(pci.base_class, OTHER)


def interface_category(triple: str) -> str:
    """What an interface of a USB device with this class, subclass and protocol shows."""
    words = (_INTERFACES.get(part) for part in (triple, triple[:5], triple[:2]))
    return next((word for word in words if word), OTHER)


def _usb(usb: Usb, below: tuple[Device, ...], before: str) -> str:
    if usb.is_hub:
        return "hub"
    if any(is_wireless(device) for device in below):
        return "wifi"
    known = known_ids.usb_category(usb.vendor_id, usb.product_id)
    if known:
        return known
    if before in _LEARNT and not any(device.kind in _TELLING for device in below):
        return before
    shown = _told_below(below, _shown(usb))
    return next((word for word in USB_ORDER if word in shown), OTHER)


def _shown(usb: Usb) -> set[str]:
    """What the interfaces of all configurations show, and whatever else was found in the descriptors."""
    triples = {*usb.interfaces, *usb.other_interfaces}
    shown = {interface_category(triple) for triple in triples} | {_MARKS[mark] for mark in usb.marks if mark in _MARKS}
    if "ff:01:01" in triples and usb.vendor_id in known_ids.BLUETOOTH_VENDORS:
        shown.add("bluetooth")
    if "scanner" in usb.marks and "printer" not in shown:
        shown.add("scanner")
    if any(triple.startswith("06:01") for triple in triples) and not any(t.startswith("0e") for t in triples):
        # PTP is spoken by cameras, telephones and a few scanners.
        if usb.vendor_id in known_ids.PHONE_VENDORS:
            shown.add("phone")
        if shown & {"phone", "scanner"}:
            shown.remove("camera")
    return shown


def _told_below(below: tuple[Device, ...], shown: set[str]) -> set[str]:
    """SHOWN, and what its input devices say; its logical units know better whether it is a disk or an optical drive."""
    storage = {_scsi(device) for device in below if device.scsi} & {"disk", "optical-drive"}
    if storage:
        shown = shown - {"disk", "optical-drive"} | storage
    inputs = {facts.category for device in below for facts in device.facts if isinstance(facts, Input)}
    return shown | inputs


def _scsi(device: Device) -> str:
    return _SCSI_TYPES.get(device.scsi.type, OTHER) if device.scsi else OTHER


def _mdev(device: Device, parent: Device | None) -> str:
    display = parent is not None and parent.pci is not None and parent.pci.base_class == 0x03
    types = (facts.type for facts in device.facts if isinstance(facts, Mdev))
    return "virtual-gpu" if display or any(type_.startswith(_DISPLAY_MDEVS) for type_ in types) else OTHER


def _usb_interface(device: Device) -> str:
    return next((interface_category(facts.triple) for facts in device.facts if isinstance(facts, UsbInterface)), OTHER)


def _input(device: Device) -> str:
    return next((facts.category for facts in device.facts if isinstance(facts, Input) and facts.category), OTHER)


def _net(device: Device) -> str:
    return "wifi" if is_wireless(device) else "network"


def _block(device: Device) -> str:
    return "optical-drive" if is_optical(device) else "disk"


def is_optical(device: Device) -> bool:
    """Whether it is the disk function of an optical drive: the kernel has a driver and names (sr0) for those alone."""
    return any(isinstance(facts, Block) and facts.node.startswith("/dev/sr") for facts in device.facts)


def _video(device: Device) -> str:
    kernel_name = device.sysfs_path.rpartition("/")[2]
    return "tuner" if kernel_name.startswith(("radio", "swradio", "vbi")) else "camera"


_BY_KIND: dict[str, Callable[[Device], str]] = {
    "pci": _pci,
    "usb-interface": _usb_interface,
    "scsi-host": lambda _: "storage-controller",
    "scsi": _scsi,
    "net": _net,
    "block": _block,
    "drm": lambda _: "gpu",
    "input": _input,
    "sound": lambda _: "audio",
    "video": _video,
    "tty": lambda _: "serial",
    "nvme": lambda _: "disk",
    "tpm": lambda _: "tpm",
}
