"""From a sysfs folder and udev's properties to a Device: one row a kind, one small function a facts class.

Blocking file reads only (a device costs some 100 us); nothing here knows where the properties come from.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import re
from collections.abc import Callable, Collection

from hostpassd.host.hwdb import Names
from hostpassd.host.reading import Files
from hostpassd.host.usbmarks import all_interfaces, marks
from hostpassd.host.usbport import read_socket
from hostpassd.model.device import (
    Block,
    Device,
    Facts,
    Input,
    Mdev,
    MdevParent,
    MdevType,
    Net,
    Pci,
    Scsi,
    Usb,
    UsbInterface,
    device_name,
)
from hostpassd.model.naming import label
from hostpassd.model.text import clean

log = logging.getLogger(__name__)

# Of the whole daemon: a model that is new to it is looked up once.
NAMES = Names()

DEVICES = "/sys/devices/"
VIRTUAL = "/sys/devices/virtual/"

_READ_LIMIT = 4096  # bytes: a page, the most that sysfs gives for a text attribute

# How the kernel says "this device has none of that", or is about to go.
_ABSENT = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO, errno.EINVAL, errno.ENODATA, errno.EOPNOTSUPP}
)

# lsscsi's words, by the SCSI peripheral device type.
_SCSI_TYPES = {
    0x00: "disk",
    0x01: "tape",
    0x02: "printer",
    0x03: "process",
    0x04: "worm",
    0x05: "cd/dvd",
    0x06: "scanner",
    0x07: "optical",
    0x08: "mediumx",
    0x09: "comms",
    0x0C: "storage",
    0x0D: "enclosu",
    0x0E: "sim dsk",
    0x0F: "opti rd",
    0x10: "bridge",
    0x11: "osd",
    0x12: "adi",
    0x13: "sec man",
    0x14: "zbc",
    0x1E: "wlun",
    0x1F: "no dev",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """The configuration header of a PCI function."""

    type: int
    multifunction: bool = False
    off_bus: bool = False


class Memory:
    """Keeps, from one reading to the next, the devices' configuration headers and which warnings were logged."""

    def __init__(self) -> None:
        self.headers: dict[str, Header] = {}
        self._complaints: dict[str, set[str]] = {}

    def complain(self, path: str, name: str, error: Exception) -> None:
        """Warn that NAME of the device at PATH cannot be read, if that has not been said."""
        made = self._complaints.setdefault(path, set())
        if name not in made:
            made.add(name)
            log.warning("%s of %s cannot be read: %s", name, clean(path), error)

    def forget(self, path: str) -> None:
        """The device at PATH has gone: what comes to its place is another one."""
        self.headers.pop(path, None)
        self._complaints.pop(path, None)

    def keep(self, paths: Collection[str]) -> None:
        """Only at PATHS there are devices."""
        for path in [path for path in {**self.headers, **self._complaints} if path not in paths]:
            self.forget(path)


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """What a device is read from: its folder, and what udev says of it ('' for a property that it has not)."""

    path: str
    subsystem: str
    devtype: str
    prop: Callable[[str], str]
    child: Callable[[str], Source | None]  # what udev knows of the device in the folder of that name
    files: Files
    memory: Memory
    afresh: bool  # read also what does not change as long as the device is there
    names: Names = NAMES  # by ids, for what udev has no names

    @property
    def kernel_name(self) -> str:
        """The last part of the path: 0000:01:00.0, 1-1.2, sda."""
        return self.path.rpartition("/")[2]

    def read(self, name: str) -> bytes:
        """At most 4 KiB of the file NAME; empty if there is no such file or it cannot be read."""
        return self.read_parts(name, (0, _READ_LIMIT))[0]

    def read_parts(self, name: str, *parts: tuple[int, int]) -> list[bytes]:
        """PARTS (offset, size) of the file NAME; all empty if there is no such file or it cannot be read."""
        try:
            return self.files.read(f"{self.path}/{name}", *parts)
        except OSError as error:
            if error.errno not in _ABSENT:
                self.memory.complain(self.path, name, error)
            return [b"" for _ in parts]

    def text(self, name: str) -> str:
        """The file NAME fit for everything that follows, by `clean`."""
        return clean(self.read(name))

    def number(self, name: str, base: int = 0, default: int = 0) -> int:
        """The file NAME as a number; DEFAULT if it is none."""
        try:
            return int(self.read(name), base)
        except ValueError:
            return default

    def link(self, name: str) -> str:
        """The last part of where the link NAME leads, or ''."""
        try:
            return os.readlink(f"{self.path}/{name}").rpartition("/")[2]
        except OSError:
            return ""

    def has(self, name: str) -> bool:
        """Whether there is a file NAME."""
        return os.path.exists(f"{self.path}/{name}")

    def entries(self, name: str = "") -> list[str]:
        """What is in the folder NAME (the device's own by default), sorted; empty if there is none."""
        try:
            return sorted(os.listdir(f"{self.path}/{name}" if name else self.path))
        except OSError:
            return []


@dataclasses.dataclass(frozen=True, slots=True)
class Words:
    """What a device calls itself."""

    vendor: str = ""
    product: str = ""
    serial: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """One row: which devices of a subsystem are of this kind, and how they are read."""

    name: str
    devtype: str = ""  # '': any
    pattern: str = ""  # of the whole kernel name; '': any
    unless: str = ""  # a file that, when it reads 1, makes the device none of this kind
    facts: Callable[[Source], tuple[Facts, ...]] = lambda source: ()
    words: Callable[[Source], Words] = lambda source: Words()
    by_ids: Callable[[Source], tuple[str, str]] | None = None  # vendor and product, where nobody else tells them
    nodes: Callable[[Source], tuple[str, ...]] | None = None  # None: its own

    def covers(self, source: Source) -> bool:
        """Whether SOURCE, of this row's subsystem, is of this kind."""
        return (
            self.devtype in ("", source.devtype)
            and (not self.pattern or re.fullmatch(self.pattern, source.kernel_name) is not None)
            and (not self.unless or source.read(self.unless).strip() != b"1")
        )


def may_be_in_tree(path: str, subsystem: str) -> bool:
    """Whether a device of SUBSYSTEM at PATH can be a node, as far as those tell (mdev_bus: parents of mdevs)."""
    return path.startswith(DEVICES) and (subsystem in ("mdev", "mdev_bus") or not path.startswith(VIRTUAL))


def kind_of(source: Source) -> Kind | None:
    """What kind of node SOURCE is in the tree; None: it is not in the tree."""
    if may_be_in_tree(source.path, source.subsystem):
        for kind in KINDS.get(source.subsystem, ()):
            if kind.covers(source):
                return kind
    offers = source.path.startswith(DEVICES) and os.path.isdir(f"{source.path}/{_TYPES}")
    return _MDEV_PARENT if offers else None


def describe(source: Source, kind: Kind, parent: str | None) -> Device | None:
    """SOURCE, of KIND and below the device named PARENT, as a Device; None if it vanished meanwhile."""
    words = _words(source, kind)
    device = Device(
        name=device_name(kind.name, source.kernel_name, os.path.basename(os.path.dirname(source.path))),
        kind=kind.name,
        sysfs_path=source.path,
        parent=parent,
        device_nodes=(kind.nodes or own_nodes)(source),
        driver=source.link("driver"),
        vendor=words.vendor,
        product=words.product,
        serial=words.serial,
        facts=kind.facts(source),
    )
    # Asked last: only what was there after the reading was there all through it.
    return dataclasses.replace(device, label=label(device)) if os.path.exists(f"{source.path}/uevent") else None


def _words(source: Source, kind: Kind) -> Words:
    """The first name there is for each of vendor and product: its own, that which its ids have, or udev's."""
    own = kind.words(source)
    vendor, product = own.vendor, own.product
    if kind.by_ids and not (vendor and product):
        by_ids = kind.by_ids(source)
        vendor, product = vendor or by_ids[0], product or by_ids[1]
    vendor = vendor or clean(source.prop("ID_VENDOR_FROM_DATABASE"))
    return Words(vendor, product or clean(source.prop("ID_MODEL_FROM_DATABASE")), own.serial)


# Nodes.


def own_nodes(source: Source) -> tuple[str, ...]:
    """The device's node and, sorted, the links to it."""
    node = clean(source.prop("DEVNAME"))
    links = sorted(clean(link) for link in source.prop("DEVLINKS").split())
    return (node, *links) if node else ()


def _nodes_of_children(source: Source) -> tuple[str, ...]:
    """The nodes of a device that has none itself, but children with one each (event3 of input5, pcmC0D0p of card0)."""
    children = (source.child(name) for name in source.entries() if source.has(f"{name}/dev"))
    return tuple(node for child in children if child for node in own_nodes(child))


# PCI.


def _pci(source: Source) -> tuple[Facts, ...]:
    return (_pci_function(source), *_mdev_types(source))


def _pci_function(source: Source) -> Pci:
    class_code = source.number("class")
    header = _header(source, class_code)
    physical_function = source.link("physfn")
    group = source.link("iommu_group")
    return Pci(
        address=source.kernel_name,
        class_code=class_code,
        class_name=_class_name(source, class_code),
        vendor_id=source.number("vendor"),
        device_id=source.number("device"),
        subsystem_vendor_id=source.number("subsystem_vendor"),
        subsystem_device_id=source.number("subsystem_device"),
        revision=source.number("revision"),
        header_type=header.type,
        iommu_group=int(group) if group.isdecimal() else -1,
        numa_node=source.number("numa_node", default=-1),
        reset_methods=tuple(source.text("reset_method").split()),
        boot_display=source.number("boot_vga") == 1,
        physical_function=device_name("pci", physical_function) if physical_function else None,
        max_virtual_functions=source.number("sriov_totalvfs"),
        off_bus=header.off_bus,
        multifunction=header.multifunction,
        # The kernel shows link attributes for PCI Express functions only (pcie_dev_attrs_are_visible).
        express=source.has("current_link_speed"),
        vfio_device=clean(next(iter(source.entries("vfio-dev")), "")),
    )


def _header(source: Source, class_code: int) -> Header:
    """What the configuration header says, or said last; what the class implies where it could never be read."""
    known = source.memory.headers.get(source.path)
    if known is None or source.afresh:
        known = _read_header(source) or known
        if known is not None:
            source.memory.headers[source.path] = known
    return known or Header({0x0604: 1, 0x0607: 2}.get(class_code >> 8, 0))


def _read_header(source: Source) -> Header | None:
    """The header; None: it cannot be read, or not without waking the device (seconds, and a laptop's battery).

    Only what is needed is read: each word is an access to the device, tens of microseconds in a virtual machine.
    """
    if source.text("power_state") in _ASLEEP:
        return None
    vendor, header_type = source.read_parts("config", (0x00, 2), (0x0E, 1))
    if not header_type:
        return None
    return Header(
        type=header_type[0] & 0x7F,
        multifunction=bool(header_type[0] & 0x80),
        off_bus=vendor == b"\xff\xff",
    )


# To read the header of such a device the kernel wakes it, or the ports above it.
_ASLEEP = frozenset({"D3hot", "D3cold"})


def _class_name(source: Source, class_code: int) -> str:
    known = source.names.pci_class(class_code)
    told = known or source.prop("ID_PCI_SUBCLASS_FROM_DATABASE") or source.prop("ID_PCI_CLASS_FROM_DATABASE")
    return clean(told)


def _pci_by_ids(source: Source) -> tuple[str, str]:
    return source.names.pci(source.number("vendor"), source.number("device"), source.text("modalias"))


# USB.


def _usb(source: Source) -> tuple[Facts, ...]:
    folders = _usb_interface_folders(source)
    interfaces = _usb_interfaces(source, folders)
    descriptors = b"".join(source.read_parts("descriptors", *_DESCRIPTORS))
    return (
        Usb(
            bus=source.number("busnum", 10),
            number=source.number("devnum", 10),
            port=source.kernel_name,
            vendor_id=source.number("idVendor", 16),
            product_id=source.number("idProduct", 16),
            device_class=source.number("bDeviceClass", 16),
            speed=_speed(source.text("speed")),
            interfaces=interfaces,
            other_interfaces=tuple(triple for triple in all_interfaces(descriptors) if triple not in interfaces),
            marks=marks(source, folders, source.prop("libsane_matched") == "yes"),
            socket=read_socket(source.path),
        ),
    )


# A page each, the most that sysfs gives at once. The descriptors of a camera are longer than one.
_DESCRIPTORS = tuple((page * 4096, 4096) for page in range(4))


def _speed(text: str) -> int:
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        return 0  # "unknown"


def _usb_interface_folders(source: Source) -> list[str]:
    name = source.kernel_name
    # A root hub usb1 has the interface 1-0:1.0.
    port = f"{name[3:]}-0" if name.startswith("usb") else name
    return [entry for entry in source.entries() if entry.startswith(f"{port}:")]


def _usb_interfaces(source: Source, folders: list[str]) -> tuple[str, ...]:
    """The active configuration's; those udev read from the descriptors while none has been made active yet."""
    found = [_triple(source, f"{folder}/") for folder in folders]
    if found:
        return tuple(found)
    told = (word for word in source.prop("ID_USB_INTERFACES").split(":") if re.fullmatch("[0-9a-f]{6}", word))
    return tuple(bytes.fromhex(word).hex(":") for word in told)


def _triple(source: Source, folder: str = "") -> str:
    return ":".join(f"{source.number(f'{folder}bInterface{part}', 16):02x}" for part in _TRIPLE)


_TRIPLE = ("Class", "SubClass", "Protocol")


def _usb_words(source: Source) -> Words:
    # The kernel calls itself, its version and its driver the manufacturer of a root hub.
    root = source.kernel_name.startswith("usb")
    return Words("" if root else source.text("manufacturer"), source.text("product"), source.text("serial"))


def _usb_by_ids(source: Source) -> tuple[str, str]:
    ids = source.number("idVendor", 16), source.number("idProduct", 16)
    return source.names.usb(*ids, source.text("modalias"))


def _usb_interface(source: Source) -> tuple[Facts, ...]:
    return (UsbInterface(_triple(source)),)


# SCSI.


def _scsi(source: Source) -> tuple[Facts, ...]:
    place = [int(part) if part.isdecimal() else 0 for part in source.kernel_name.split(":")]
    host, channel, target, lun = (*place, 0, 0, 0, 0)[:4]
    return (Scsi(host, channel, target, lun, _scsi_type(source), source.text("wwid")),)


def _scsi_type(source: Source) -> str:
    number = source.number("type", 10)
    return _SCSI_TYPES.get(number, f"(0x{number:x})")


def _scsi_words(source: Source) -> Words:
    page = source.read("vpd_pg80")  # unit serial number: a header of four bytes, the last the length
    serial = clean(page[4 : 4 + page[3]]) if len(page) > 4 else ""
    return Words(source.text("vendor"), source.text("model"), serial)


# Mediated devices.


def _mdev(source: Source) -> tuple[Facts, ...]:
    api = source.text("mdev_type/device_api")
    return (Mdev(clean(source.kernel_name), clean(source.link("mdev_type")), *([api] if api else [])),)


def _mdev_types(source: Source) -> tuple[Facts, ...]:
    types = tuple(_mdev_type(source, name) for name in source.entries(_TYPES))
    return (MdevParent(types),) if types else ()


def _mdev_type(source: Source, name: str) -> MdevType:
    def text(file: str) -> str:
        return source.text(f"{_TYPES}/{name}/{file}")

    available = max(0, source.number(f"{_TYPES}/{name}/available_instances"))
    return MdevType(clean(name), text("name"), available, text("device_api"), text("description"))


_TYPES = "mdev_supported_types"


# The rest.


def _net(source: Source) -> tuple[Facts, ...]:
    number = source.number("ifindex", 10)
    return (Net(clean(source.kernel_name), source.text("address"), number, clean(source.devtype)),)


def _block(source: Source) -> tuple[Facts, ...]:
    return (Block(_node(source), _size(source), source.text("dev")),)


def _node(source: Source) -> str:
    """The device's node, made up from the kernel's name where udev has not told it (a "!" stands for a "/")."""
    return clean(source.prop("DEVNAME")) or "/dev/" + clean(source.kernel_name).replace("!", "/")


def _size(source: Source) -> int:
    return source.number("size", 10) * 512  # sysfs counts sectors of 512 bytes, whatever the disk's are


def _block_words(source: Source) -> Words:
    return Words(serial=clean(source.prop("ID_SERIAL_SHORT")))


def _input(source: Source) -> tuple[Facts, ...]:
    seat = clean(source.prop("ID_SEAT")) or "seat0"
    keyboard = source.prop("ID_INPUT_KEYBOARD") == "1"
    category = next((word for prop, word in _INPUTS.items() if source.prop(prop) == "1"), "")
    return (Input(seat if keyboard else "", category),)


# The first that udev has found in the capabilities of an input device tells its category.
_INPUTS = {
    "ID_INPUT_JOYSTICK": "game-controller",
    "ID_INPUT_KEYBOARD": "keyboard",
    "ID_INPUT_MOUSE": "mouse",
    "ID_INPUT_TOUCHPAD": "mouse",
    "ID_INPUT_TABLET": "mouse",
}


KINDS: dict[str, tuple[Kind, ...]] = {
    "pci": (Kind("pci", facts=_pci, by_ids=_pci_by_ids),),
    "usb": (
        Kind(
            "usb",
            "usb_device",
            facts=_usb,
            words=_usb_words,
            by_ids=_usb_by_ids,
        ),
        Kind(
            "usb-interface",
            "usb_interface",
            facts=_usb_interface,
            words=lambda source: Words(product=source.text("interface")),
        ),
    ),
    "scsi": (
        Kind("scsi-host", "scsi_host"),
        Kind("scsi-target", "scsi_target"),
        Kind("scsi", "scsi_device", facts=_scsi, words=_scsi_words),
    ),
    "scsi_generic": (Kind("scsi-generic"),),
    "mdev": (Kind("mdev", facts=_mdev, words=lambda source: Words(product=source.text("mdev_type/name"))),),
    "net": (Kind("net", facts=_net),),
    # NVMe's hidden paths have neither a node nor a number; their disk is the multipath head above them.
    "block": (Kind("block", "disk", unless="hidden", facts=_block, words=_block_words),),
    "drm": (Kind("drm", pattern="card[0-9]+"),),
    "input": (
        Kind(
            "input",
            pattern="input[0-9]+",
            facts=_input,
            words=lambda source: Words(product=source.text("name")),
            nodes=_nodes_of_children,
        ),
    ),
    "sound": (
        Kind(
            "sound",
            pattern="card[0-9]+",
            words=lambda source: Words(product=source.text("id")),
            nodes=_nodes_of_children,
        ),
    ),
    "video4linux": (Kind("video", words=lambda source: Words(product=source.text("name"))),),
    "tty": (Kind("tty"),),
    "nvme": (
        Kind(
            "nvme",
            words=lambda source: Words(product=source.text("model"), serial=source.text("serial")),
        ),
    ),
    "tpm": (Kind("tpm"),),
}

# Of any subsystem; /sys/class/mdev_bus lists them.
_MDEV_PARENT = Kind("mdev-parent", facts=_mdev_types)

# What is not a node, or is one of its own, but shows in the node of the folder it is in: a USB device's interfaces,
# an input device's and a sound card's device nodes, how many more mediated devices a parent can make.
SHOWS_IN_PARENT: dict[str, Callable[[Source], bool]] = {
    "usb": lambda source: source.devtype == "usb_interface",
    "input": lambda source: True,
    "sound": lambda source: True,
    "mdev": lambda source: True,
}
