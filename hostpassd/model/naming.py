"""How a device is called: Label, Location, Id, Role, Socket. Pure functions over a Device.

A Label says what a thing is, a Location where it is; neither stands in for the other. What stands in a Label may be
the device's own claim: only the Location is the host's word.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

from hostpassd.model.category import category, interface_category, is_optical, is_wireless, without_driver
from hostpassd.model.device import Block, Device, Mdev, Pci, UsbInterface, escape
from hostpassd.model.text import clean

# Role.

SUBJECT = "device"  # can be the subject of an operation
STRUCTURE = "structure"
FUNCTION = "function"

_STRUCTURES = frozenset({"usb-interface", "scsi-host", "scsi-target", "mdev-parent"})

# Host, ISA, EISA, PCI, CardBus and RACEway bridges. An "other bridge" (0680) may be an NVSwitch: that is a device.
_BRIDGES = frozenset({0x0600, 0x0601, 0x0602, 0x0604, 0x0607, 0x0608})


def role(device: Device, above: Iterable[Device] = ()) -> str:
    """The Role of DEVICE below the devices ABOVE: what hangs below a USB device is a function of that, LUNs too."""
    if device.kind in _STRUCTURES or (device.usb and device.usb.is_hub) or (device.pci and is_bridge(device.pci)):
        return STRUCTURE
    if device.kind in ("pci", "usb", "mdev"):
        return SUBJECT
    if device.kind == "scsi" and not any(ancestor.usb for ancestor in above):
        return SUBJECT
    return FUNCTION


def is_bridge(pci: Pci) -> bool:
    """Whether it is a PCI bridge: by header type, or by class (an ISA bridge has header type 0)."""
    return pci.header_type in (1, 2) or pci.class_code >> 8 in _BRIDGES


# Id.


def identity_id(device: Device) -> str:
    """The Id of DEVICE: vendor and product id, '' where it has none."""
    if device.pci:
        return f"{device.pci.vendor_id:04x}:{device.pci.device_id:04x}"
    return f"{device.usb.vendor_id:04x}:{device.usb.product_id:04x}" if device.usb else ""


# Location.

# The kinds whose kernel names are addresses.
_PLACES = frozenset({"pci", "usb", "usb-interface", "scsi", "mdev"})

# The subsystem of each kind that is not called so. /sys/class/mdev_bus lists the parents of mediated devices.
_SUBSYSTEMS = {
    "scsi-host": "scsi",
    "scsi-target": "scsi",
    "scsi-generic": "scsi_generic",
    "mdev-parent": "mdev_bus",
    "video": "video4linux",
}

# What is never taken for an interface's name, though one may be called so: containers give back the interfaces that
# they were lent under names of their own choice. Names of devices, USB ports and root hubs (from usb1 on; usb0 is an
# interface), disks, and what else the kernel counts.
NO_INTERFACE = re.compile(
    r"(pci|usb|scsi|mdev|net|block|drm|input|sound|video|tty|nvme|tpm)_\w*"
    r"|[0-9]+-[0-9.]+|usb[1-9][0-9]*"
    r"|(sd|hd|vd|xvd)[a-z]{1,2}|tty\w+"
    r"|(sr|sg|fd|mmcblk|pmem|nvme|host|card|input|video|tpm)[0-9]\w*"
)


def kernel_name(device: Device) -> str:
    """The last part of its path in sysfs; of a mediated device that does not run, and has none, its UUID."""
    uuids = (facts.uuid for facts in device.facts if isinstance(facts, Mdev))
    return device.sysfs_path.rpartition("/")[2] or next(uuids, "") or device.name


def location(device: Device) -> str:
    """The Location of DEVICE: its address as administrators write it. No other device has the same."""
    name = kernel_name(device)
    if device.kind in _PLACES:
        return name
    if device.kind == "net":
        return name if _is_told_as_it_is(name) and not NO_INTERFACE.fullmatch(name) else f"net/{_told(name)}"
    node = next((facts.node for facts in device.facts if isinstance(facts, Block)), "")
    nodes = (node, *device.device_nodes)
    return next(filter(None, nodes), f"{_SUBSYSTEMS.get(device.kind, device.kind)}/{_told(name)}")


def _is_told_as_it_is(name: str) -> bool:
    return clean(name) == name


def _told(name: str) -> str:
    """A kernel name as it can be shown. What cleaning would change is escaped: two names do not become one."""
    return name if _is_told_as_it_is(name) else escape(name)


# Label.

# lspci's words, by PCI base class and subclass, else by base class.
_PCI_SUBCLASSES = {
    0x0100: "SCSI storage controller",
    0x0101: "IDE interface",
    0x0104: "RAID bus controller",
    0x0106: "SATA controller",
    0x0107: "Serial Attached SCSI controller",
    0x0108: "Non-Volatile memory controller",
    0x0200: "Ethernet controller",
    0x0207: "Infiniband controller",
    0x0300: "VGA compatible controller",
    0x0302: "3D controller",
    0x0401: "Multimedia audio controller",
    0x0403: "Audio device",
    0x0600: "Host bridge",
    0x0601: "ISA bridge",
    0x0604: "PCI bridge",
    0x0700: "Serial controller",
    0x0805: "SD Host controller",
    0x0B40: "Co-processor",
    0x0C00: "FireWire (IEEE 1394)",
    0x0C03: "USB controller",
    0x0C05: "SMBus",
    0x0D11: "Bluetooth",
}
_PCI_CLASSES = {
    0x01: "Mass storage controller",
    0x02: "Network controller",
    0x03: "Display controller",
    0x04: "Multimedia controller",
    0x05: "Memory controller",
    0x06: "Bridge",
    0x07: "Communication controller",
    0x08: "Generic system peripheral",
    0x09: "Input device controller",
    0x0A: "Docking station",
    0x0B: "Processor",
    0x0C: "Serial bus controller",
    0x0D: "Wireless controller",
    0x0E: "Intelligent controller",
    0x0F: "Satellite communications controller",
    0x10: "Encryption controller",
    0x11: "Signal processing controller",
    0x12: "Processing accelerators",
}

_USB_CATEGORIES = {
    "audio": "USB audio device",
    "bluetooth": "USB Bluetooth adapter",
    "camera": "USB camera",
    "disk": "USB disk",
    "game-controller": "USB game controller",
    "hub": "USB hub",
    "keyboard": "USB keyboard",
    "mouse": "USB mouse",
    "network": "USB network adapter",
    "optical-drive": "USB optical drive",
    "phone": "USB phone",
    "printer": "USB printer",
    "scanner": "USB scanner",
    "security-key": "USB security key",
    "serial": "USB serial adapter",
    "smartcard": "USB smart card reader",
    "tuner": "USB tuner",
}

# By an interface's class.
_USB_CLASSES = {
    "01": "Audio",
    "02": "Communications",
    "03": "HID",
    "06": "Imaging",
    "07": "Printer",
    "08": "Mass storage",
    "09": "Hub",
    "0a": "Communications data",
    "0b": "Smart card",
    "0e": "Video",
    "11": "Billboard",
    "e0": "Wireless",
    "fe": "Application-specific",
    "ff": "Vendor-specific",
}

_SCSI_CATEGORIES = {"disk": "SCSI disk", "optical-drive": "Optical drive", "tape": "Tape drive", "scanner": "Scanner"}

_INPUTS = {"keyboard": "Keyboard", "mouse": "Mouse", "game-controller": "Game controller"}


def label(device: Device) -> str:
    """The Label of DEVICE, for people: never its Location, never a bare number."""
    make = _LABELS.get(device.kind)
    return clean(make(device)) if make else "Device"


def shown(device: Device) -> str:
    """What messages call it: its label, and where it is."""
    return f"{device.label} ({location(device)})"


def describe(device: Device) -> str:
    """How messages call DEVICE: "Label (Location)"."""
    return f"{label(device)} ({location(device)})"


def human_size(size: float) -> str:
    """SIZE in bytes for people, in powers of 1000 like the labels of disks: 20.0 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} PB"


def _named(device: Device, words: str) -> str:
    """Its vendor and product; without a product the class in WORDS and the ids, after the vendor if that is known."""
    vendor = device.vendor if _says_something(device, device.vendor) else ""
    if not _says_something(device, device.product):
        ids = identity_id(device)
        return f"{vendor} {words} [{ids}]" if ids else f"{vendor} {words}"
    return device.product if _begins_with(device.product, vendor) else f"{vendor} {device.product}"


def _begins_with(product: str, vendor: str) -> bool:
    """Whether PRODUCT already says the vendor: all of its name, or the first word (Logitech, Inc.: Logitech BRIO)."""
    first = vendor.lower().partition(" ")[0].rstrip(",.")
    return product.lower().startswith(vendor.lower()) or product.lower().partition(" ")[0] == first


def _says_something(device: Device, text: str) -> bool:
    """Whether a name that the device gives itself is one: it could be "0000", or the name of its place."""
    return any(character.isalpha() for character in text) and text != location(device)


def _pci(device: Device) -> str:
    if not device.pci:
        return "PCI device"
    code = device.pci.class_code
    words = device.pci.class_name or _PCI_SUBCLASSES.get(code >> 8) or _PCI_CLASSES.get(code >> 16)
    return _named(device, words or "PCI device")


def _usb(device: Device) -> str:
    # A permission holds for the label that it was given for: it must be the same whoever drives the device.
    if device.usb:
        device = dataclasses.replace(device, facts=(without_driver(device.usb),))
    return _named(device, _USB_CATEGORIES.get(category(device), "USB device"))


def _usb_interface(device: Device) -> str:
    triple = next((facts.triple for facts in device.facts if isinstance(facts, UsbInterface)), "")
    hid = _INPUTS.get(interface_category(triple)) if triple.startswith("03") else None
    return f"{hid or _USB_CLASSES.get(triple[:2], 'USB')} interface"


def _scsi(device: Device) -> str:
    if device.vendor == "ATA":  # what libata says in place of the maker, whose name is in the product
        device = dataclasses.replace(device, vendor="")
    return _named(device, _SCSI_CATEGORIES.get(category(device), "SCSI device"))


def _mdev(device: Device) -> str:
    type_ = next((facts.type for facts in device.facts if isinstance(facts, Mdev)), "")
    words = "Virtual GPU" if category(device) == "virtual-gpu" else "Mediated device"
    return _named(device, f"{words} [{type_}]" if type_ else words)


def _net(device: Device) -> str:
    return "Wireless network interface" if is_wireless(device) else "Network interface"


def _block(device: Device) -> str:
    if is_optical(device):
        return "Optical drive"
    size = next((facts.size for facts in device.facts if isinstance(facts, Block)), 0)
    return f"Disk, {human_size(size)}" if size else "Disk"


def _input(device: Device) -> str:
    return _INPUTS.get(category(device), "Input device")


def _video(device: Device) -> str:
    return "Radio or TV receiver" if category(device) == "tuner" else "Video device"


_LABELS: dict[str, Callable[[Device], str]] = {
    "pci": _pci,
    "usb": _usb,
    "usb-interface": _usb_interface,
    "scsi-host": lambda _: "SCSI host",
    "scsi-target": lambda _: "SCSI target",
    "scsi": _scsi,
    "scsi-generic": lambda _: "SCSI generic device",
    "mdev": _mdev,
    "mdev-parent": lambda _: "Parent of mediated devices",
    "net": _net,
    "block": _block,
    "drm": lambda _: "Display",
    "input": _input,
    "sound": lambda _: "Sound card",
    "video": _video,
    "tty": lambda _: "Serial port",
    "nvme": lambda _: "NVMe controller",
    "tpm": lambda _: "Trusted Platform Module",
}


# Socket.


def socket(port: str, peers: Mapping[str, str]) -> str:
    """The Socket of the USB device in PORT: the USB 2 port of its physical socket; '' for a root hub.

    PEERS: of a USB 3 port the USB 2 port that the kernel has linked it to. A hub's ports are linked when both halves
    of the hub are there, which may be after what is behind them was read; they are linked by number, below the
    sockets of the two halves. A port that is its own peer has no other.
    """
    if port.startswith("usb"):
        return ""
    hub, rest = port, ""
    while hub and hub not in peers:
        hub, dot, number = hub.rpartition(".")
        rest = f"{dot}{number}{rest}"
    return peers[hub] + rest if hub else port
