"""A device and its per-bus facts: frozen, typed, no I/O."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple

from hostpassd.model.pci_address import PciAddress

# What a claim can name a device by: its first part says what sort of name it is.
Key = tuple[str | int | None, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a device because of what it is: one class for each kind that has some."""

    @property
    def ids(self) -> tuple[int, int] | None:
        """The vendor's and the product's number."""
        return None

    def lookup_keys(self) -> Iterator[Key]:
        """What a claim can name the device by."""
        yield from ()

    def identity(self) -> Key:
        """Values that differ if another device is plugged in at the same place; () if they cannot tell."""
        return ()


@dataclasses.dataclass(frozen=True, slots=True)
class Pci(Facts):
    """Facts of a PCI function, as lspci and sysfs tell them."""

    address: str  # 0000:01:00.0
    class_code: int  # 24 bits: base class, subclass, programming interface
    class_name: str
    vendor_id: int
    device_id: int
    subsystem_vendor_id: int
    subsystem_device_id: int
    revision: int
    header_type: int  # without the multi-function bit; 0x7f: the device is off the bus
    iommu_group: int  # -1: none
    numa_node: int  # -1: none
    reset_methods: tuple[str, ...]
    boot_display: bool
    physical_function: str | None  # device name
    max_virtual_functions: int
    off_bus: bool  # configuration space reads all ones
    multifunction: bool = False
    express: bool = False  # PCI Express, not conventional PCI
    vfio_device: str = ""  # its character device of VFIO, vfio3; '' for none

    @property
    def base_class(self) -> int:
        """The PCI base class, 0x02 for a network controller."""
        return self.class_code >> 16

    @property
    def place(self) -> PciAddress:
        """Its address in parts."""
        return PciAddress.parse(self.address)

    @property
    def ids(self) -> tuple[int, int]:
        return (self.vendor_id, self.device_id)

    def lookup_keys(self) -> Iterator[Key]:
        yield ("pci", self.address)

    def identity(self) -> Key:
        return self.ids


@dataclasses.dataclass(frozen=True, slots=True)
class Usb(Facts):
    """Facts of a USB device, as lsusb and sysfs tell them."""

    bus: int
    number: int
    port: str  # the kernel's name: 1-1.2, for a root hub usb1
    vendor_id: int
    product_id: int
    device_class: int
    speed: int  # Mbit/s, rounded down (1.5 is 1)
    interfaces: tuple[str, ...]  # class, subclass and protocol of each interface: 08:06:50
    other_interfaces: tuple[str, ...] = ()  # those of its other configurations and alternate settings
    marks: tuple[str, ...] = ()  # what else it shows: fido mtp scanner
    socket: str = ""  # the port by which its physical socket goes, '' for a root hub

    @property
    def is_hub(self) -> bool:
        """Whether it is a hub, root hubs included."""
        return self.device_class == 0x09 or self.port.startswith("usb")

    @property
    def ids(self) -> tuple[int, int]:
        return (self.vendor_id, self.product_id)

    def lookup_keys(self) -> Iterator[Key]:
        if not self.is_hub:
            yield ("usb", self.bus, self.number)
            yield ("usb-id", *self.ids)

    def identity(self) -> Key:
        return (self.bus, self.number, *self.ids)


@dataclasses.dataclass(frozen=True, slots=True)
class UsbInterface(Facts):
    """Facts of an interface of a USB device."""

    triple: str  # class, subclass and protocol: 08:06:50


@dataclasses.dataclass(frozen=True, slots=True)
class Scsi(Facts):
    """Facts of a SCSI logical unit, as lsscsi and sysfs tell them."""

    host: int
    channel: int
    target: int
    lun: int
    type: str  # disk, cd/dvd, tape ... (lsscsi's words)
    wwid: str

    def lookup_keys(self) -> Iterator[Key]:
        yield ("scsi", self.host, self.channel, self.target, self.lun)

    def identity(self) -> Key:
        return (self.wwid,) if self.wwid else ()  # one that could not be read tells nothing


@dataclasses.dataclass(frozen=True, slots=True)
class Mdev(Facts):
    """Facts of a mediated device."""

    uuid: str
    type: str
    api: str = "vfio-pci"  # the kernel's device_api: vfio-ap, vfio-ccw ...

    def lookup_keys(self) -> Iterator[Key]:
        yield ("mdev", self.uuid.lower())


class MdevType(NamedTuple):
    """One type of mediated devices."""

    id: str
    name: str
    available: int  # how many more can be made
    api: str = ""
    description: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class MdevParent(Facts):
    """What a device offers in mediated device types."""

    types: tuple[MdevType, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Net(Facts):
    """Facts of a network interface."""

    interface: str
    mac_address: str
    ifindex: int = 0
    type: str = ""  # the kernel's DEVTYPE: wlan, wwan ...; '' for Ethernet

    def lookup_keys(self) -> Iterator[Key]:
        yield ("net", self.interface)


@dataclasses.dataclass(frozen=True, slots=True)
class Block(Facts):
    """Facts of a whole disk."""

    node: str  # /dev/sda
    size: int  # bytes
    number: str = ""  # major:minor


@dataclasses.dataclass(frozen=True, slots=True)
class Input(Facts):
    """Facts of an input device."""

    keyboard_of: str  # the seat whose keyboard it is: seat0; '' if it is none
    category: str = ""  # keyboard, mouse, game-controller; '' for another or none


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """One node of the tree. `instance` is given by the state: new for each plug-in."""

    name: str  # libvirt's node device name where unambiguous; [A-Za-z0-9_] only
    kind: str
    sysfs_path: str  # /sys/devices/...
    parent: str | None  # name of the nearest ancestor in the tree
    device_nodes: tuple[str, ...] = ()
    driver: str = ""
    label: str = ""
    vendor: str = ""
    product: str = ""
    serial: str = ""
    facts: tuple[Facts, ...] = ()
    instance: int = 0

    @property
    def pci(self) -> Pci | None:
        """The PCI facts, if it is a PCI function."""
        return next((facts for facts in self.facts if isinstance(facts, Pci)), None)

    @property
    def usb(self) -> Usb | None:
        """The USB facts, if it is a USB device."""
        return next((facts for facts in self.facts if isinstance(facts, Usb)), None)

    @property
    def scsi(self) -> Scsi | None:
        """The SCSI facts, if it is a logical unit."""
        return next((facts for facts in self.facts if isinstance(facts, Scsi)), None)

    @property
    def ids(self) -> tuple[int, int] | None:
        """The vendor's and the product's number, if it has some."""
        return next((facts.ids for facts in self.facts if facts.ids), None)

    def lookup_keys(self) -> Iterator[Key]:
        """What a claim can name it by."""
        for facts in self.facts:
            yield from facts.lookup_keys()
        yield from (("node", node) for node in self.device_nodes)

    def said(self) -> Iterator[Key]:
        """What it says of itself, and can be looked for by."""
        if self.ids:
            yield ("ids", *self.ids)
        if self.serial:
            yield ("serial", self.serial)
        yield from (("mac", facts.mac_address.lower()) for facts in self.facts if isinstance(facts, Net))

    @property
    def keyboard_of(self) -> str:
        """The seat whose keyboard it is, '' if it is none."""
        return next((facts.keyboard_of for facts in self.facts if isinstance(facts, Input)), "")


# The kinds that can be handed to a machine; anything else stands for its nearest ancestor of such a kind.
ASSIGNABLE_KINDS = frozenset({"pci", "usb", "scsi", "mdev"})

# The kinds whose kernel names are the kernel's own, unlike those of network interfaces.
KERNEL_NAMED_KINDS = (
    *("pci", "usb", "usb-interface", "scsi-host", "scsi-target", "scsi", "scsi-generic", "mdev-parent"),
    *("block", "drm", "input", "sound", "video", "tty", "nvme", "tpm"),
)


def escape(kernel_name: str) -> str:
    """KERNEL_NAME with each byte outside [A-Za-z0-9] as _xx: br-lan is br_2dlan."""
    raw = kernel_name.encode("utf-8", "surrogateescape")
    return "".join(chr(b) if chr(b).isascii() and chr(b).isalnum() else f"_{b:02x}" for b in raw)


def plain(kernel_name: str) -> str:
    """KERNEL_NAME the way libvirt writes it in node device names: 0000:01:00.0 is 0000_01_00_0."""
    return re.sub(r"[^A-Za-z0-9]", "_", kernel_name)


def device_name(kind: str, kernel_name: str, parent_kernel_name: str = "") -> str:
    """The name of a device of KIND that the kernel calls KERNEL_NAME (for mdev, below PARENT_KERNEL_NAME)."""
    if kind == "pci":
        return "pci_" + plain(kernel_name)
    if kind == "usb":
        return "usb_" + plain(kernel_name)
    if kind == "usb-interface":
        port, _, interface = kernel_name.partition(":")
        return f"usb_{plain(port)}__{plain(interface)}"
    if kind == "scsi-host":
        return "scsi_" + plain(kernel_name)
    if kind == "scsi-target":
        return "scsi_" + plain(kernel_name)
    if kind == "scsi":
        return "scsi_" + plain(kernel_name)
    if kind == "mdev":
        return f"mdev_{plain(kernel_name)}_{plain(parent_kernel_name)}"
    return f"{kind.replace('-', '_')}_{escape(kernel_name)}"


def same_thing(old: Device, new: Device) -> bool:
    """Whether NEW, found where OLD was, is the same plugged-in thing with other values, and not another one."""
    if (old.kind, old.sysfs_path) != (new.kind, new.sysfs_path):
        return False
    before = {type(facts): facts.identity() for facts in old.facts}
    return all(before.get(type(facts), ()) in ((), facts.identity()) or not facts.identity() for facts in new.facts)
