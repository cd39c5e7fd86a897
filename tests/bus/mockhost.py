"""A simulated host: a sysfs tree and uevents for a child process that runs with umockdev's preload library.

The tree is written, and the uevents are sent, from here: nothing of umockdev is loaded into the test process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

PRELOAD = "libumockdev-preload.so.0"

_BUSES = frozenset({"pci", "usb", "scsi", "mdev", "virtio"})

# libudev's message header: prefix, magic (network order), header size, offset and length of the properties, filters.
_HEADER = struct.Struct("=8sIIIIIIII")
_MAGIC = socket.htonl(0xFEEDCAFE)

# The interfaces of common things, as class, subclass and protocol.
STORAGE = ("08:06:50",)
KEYBOARD = ("03:01:01",)
HUB = ("09:00:00",)

Text = str | bytes


class MockHost:
    """A host that a child process sees in place of the real one, given `environment`. A context manager."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="mockhost-"))
        self.sequence = 0
        self._properties: dict[str, dict[str, str]] = {}
        self._links: dict[str, list[Path]] = {}
        self._usb_numbers: dict[int, int] = {}
        self._next_scsi_host = 0
        self._next_disk = 0
        self._next_input = 0
        for folder in ("sys/bus", "sys/class", "sys/devices", "sys/kernel/iommu_groups", "dev", "run/udev/data"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> MockHost:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        """What a child process needs in its environment to live on this host."""
        return {**os.environ, "LD_PRELOAD": PRELOAD, "UMOCKDEV_DIR": str(self.root)}

    # --- anything ---

    def add(
        self,
        subsystem: str,
        path: str,
        attributes: Mapping[str, Text] | None = None,
        properties: Mapping[str, str] | None = None,
        driver: str = "",
        event: bool = True,
    ) -> str:
        """A device at PATH (/sys/devices/...), and its uevent; returns PATH."""
        folder = self._folder(path)
        folder.mkdir(parents=True)
        name = folder.name
        kind = "bus" if subsystem in _BUSES else "class"
        listed = self.root / "sys" / kind / subsystem / ("devices" if kind == "bus" else "") / name
        self._properties[path] = {**(properties or {})}
        self._link(path, listed, folder)
        self._link(path, folder / "subsystem", self.root / "sys" / kind / subsystem)
        for attribute, value in (attributes or {}).items():
            self.write(path, attribute, value)
        self._write_uevent(path)
        if driver:
            self._link_driver(path, subsystem, driver)
        if event:
            self.event(path, "add")
        return path

    def remove(self, path: str, event: bool = True) -> None:
        """The device at PATH and all below it go, the lowest first, with their uevents."""
        below = sorted((known for known in self._properties if known.startswith(path + "/")), reverse=True)
        gone = [(known, self._subsystem(known)) for known in (*below, path)]
        for known, _ in gone:
            for link in self._links.pop(known, []):
                link.unlink(missing_ok=True)
        shutil.rmtree(self._folder(path))
        for known, subsystem in gone:
            if event:
                self.event(known, "remove", subsystem=subsystem)
            del self._properties[known]

    unplug = remove

    def write(self, path: str, attribute: str, value: Text) -> None:
        """Give the device at PATH an attribute, or another value of it."""
        file = self._folder(path) / attribute
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(value if isinstance(value, bytes) else value.encode() + b"\n")

    def change(self, path: str, properties: Mapping[str, str] | None = None, **attributes: Text) -> None:
        """Other attributes and udev properties for the device at PATH, and the uevent that says so."""
        for attribute, value in attributes.items():
            self.write(path, attribute, value)
        self._properties[path].update(properties or {})
        self._write_uevent(path)
        self.event(path, "change")

    def set_driver(self, path: str, driver: str) -> None:
        """Take the device at PATH from its driver and, unless DRIVER is '', bind it to DRIVER."""
        link = self._folder(path) / "driver"
        if link.is_symlink():
            link.unlink()
            self.event(path, "unbind")
        if driver:
            self._link_driver(path, self._subsystem(path), driver)
            self.event(path, "bind")

    def event(self, path: str, action: str, properties: Mapping[str, str] | None = None, subsystem: str = "") -> None:
        """Send a uevent for the device at PATH to every listener; returns when they all have it in their sockets."""
        self.sequence += 1
        values = {
            "ACTION": action,
            "DEVPATH": path.removeprefix("/sys"),
            "SUBSYSTEM": subsystem or self._subsystem(path),
            **self._properties.get(path, {}),
            **(properties or {}),
            "SEQNUM": str(self.sequence),
        }
        if "DEVNAME" in values:
            values["DEVNAME"] = "/dev/" + values["DEVNAME"]
        body = b"".join(f"{key}={value}".encode() + b"\0" for key, value in values.items())
        header = _HEADER.pack(b"libudev\0", _MAGIC, _HEADER.size, _HEADER.size, len(body), 0, 0, 0, 0)
        for listener in self.root.glob("event[0-9]*"):
            self._send(listener, header + body)

    def _send(self, listener: Path, message: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            try:
                sender.sendto(message, str(listener))
            except ConnectionRefusedError:
                listener.unlink()  # its process has ended

    # --- PCI ---

    def pci(
        self,
        address: str,
        parent: str = "",
        vendor: int = 0x8086,
        device: int = 0x1000,
        class_code: int = 0x020000,
        group: int | None = None,
        driver: str = "",
        bridge: bool = False,
        names: tuple[str, str] = ("", ""),
        attributes: Mapping[str, Text] | None = None,
        event: bool = True,
    ) -> str:
        """A PCI function below PARENT (the root by default). NAMES: its vendor and product in the hardware database."""
        path = f"{parent or '/sys/devices/pci' + address[:7]}/{address}"
        slot, function = path.rpartition("/")[2].rpartition(".")[::2]
        multifunction = any(known.rpartition("/")[2].startswith(slot + ".") for known in self._properties)
        header = (1 if bridge else 0) | (0x80 if multifunction or function != "0" else 0)
        values: dict[str, Text] = {
            "vendor": f"0x{vendor:04x}",
            "device": f"0x{device:04x}",
            "class": f"0x{class_code:06x}",
            "subsystem_vendor": f"0x{vendor:04x}",
            "subsystem_device": "0x0001",
            "revision": "0x01",
            "numa_node": "-1",
            "config": config(vendor, device, class_code, header),
            **(attributes or {}),
        }
        database = {"ID_VENDOR_FROM_DATABASE": names[0], "ID_MODEL_FROM_DATABASE": names[1]}
        properties = {"PCI_SLOT_NAME": address, **{key: value for key, value in database.items() if value}}
        self.add("pci", path, values, properties, driver, event=False)
        if group is not None:
            folder = self.root / f"sys/kernel/iommu_groups/{group}"
            self._link(path, folder / "devices" / address, self._folder(path))
            self._link(path, self._folder(path) / "iommu_group", folder)
        if event:
            self.event(path, "add")
            if driver:
                self.event(path, "bind")
        return path

    def virtual_function(self, physical: str, address: str, group: int, driver: str = "", device: int = 0x10CA) -> str:
        """A virtual function of the PCI function at PHYSICAL, beside it."""
        path = self.pci(address, physical.rpartition("/")[0], 0x8086, device, 0x020000, group, driver, event=False)
        self._link(path, self._folder(path) / "physfn", self._folder(physical))
        index = sum(1 for _ in self._folder(physical).glob("virtfn*"))
        self._link(path, self._folder(physical) / f"virtfn{index}", self._folder(path))
        self.event(path, "add")
        return path

    def net(self, parent: str, name: str, address: str = "52:54:00:00:00:01", ifindex: int = 2) -> str:
        """The network interface of the device at PARENT."""
        return self.add(
            "net", f"{parent}/net/{name}", {"address": address, "ifindex": str(ifindex)}, {"INTERFACE": name}
        )

    def rename_net(self, path: str, name: str) -> str:
        """Give the network interface at PATH another name; returns its new path."""
        new = f"{path.rpartition('/')[0]}/{name}"
        self._folder(path).rename(self._folder(new))
        for link in self._links.pop(path):
            link.unlink(missing_ok=True)
        self._properties[new] = {**self._properties.pop(path), "INTERFACE": name}
        self._link(new, self.root / "sys/class/net" / name, self._folder(new))
        self._link(new, self._folder(new) / "subsystem", self.root / "sys/class/net")
        self._write_uevent(new)
        self.event(new, "move", {"DEVPATH_OLD": path.removeprefix("/sys")})
        return new

    def mdev_types(self, path: str, types: Mapping[str, tuple[str, int]]) -> None:
        """Let the device at PATH offer mediated devices: (name, available) by type."""
        for identity, (name, available) in types.items():
            self.write(path, f"mdev_supported_types/{identity}/name", name)
            self.write(path, f"mdev_supported_types/{identity}/available_instances", str(available))
        self._link(path, self.root / "sys/class/mdev_bus" / path.rpartition("/")[2], self._folder(path))
        self.event(path, "change", {"MDEV_STATE": "registered"})

    def mdev(self, parent: str, uuid: str, identity: str) -> str:
        """A mediated device of type IDENTITY of PARENT."""
        path = self.add("mdev", f"{parent}/{uuid}", event=False)
        kind = self._folder(parent) / "mdev_supported_types" / identity
        self._link(path, self._folder(path) / "mdev_type", kind)
        self.event(path, "add")
        return path

    # --- USB ---

    def usb_controller(self, pci: str, bus: int, speed: str = "480") -> str:
        """The root hub of USB bus number BUS at the controller at PCI."""
        return self._usb_device(f"{pci}/usb{bus}", bus, 0x1D6B, 0x0002, "", "", "", HUB, speed, 9, "hub", "hub")

    def plug_usb(
        self,
        port: str,
        vendor: int = 0x46F4,
        product: int = 0x0001,
        serial: Text = "",
        manufacturer: Text = "QEMU",
        name: Text = "QEMU USB HARDDRIVE",
        interfaces: Iterable[str] = STORAGE,
        speed: str = "480",
        driver: str = "usb-storage",
    ) -> str:
        """Plug a device into PORT (1-1.2: bus 1, port 2 of the hub in port 1); returns its path."""
        bus = int(port.partition("-")[0])
        upstream = port.rpartition(".")[0] or f"usb{bus}"
        parent = next(known for known in self._properties if known.endswith(f"/{upstream}"))
        triples = tuple(interfaces)
        device_class = 9 if triples == HUB else 0
        path = f"{parent}/{port}"
        return self._usb_device(
            path, bus, vendor, product, serial, manufacturer, name, triples, speed, device_class, "usb", driver
        )

    def plug_usb_disk(self, port: str, serial: Text = "", size: int = 8 << 30) -> str:
        """Plug a stick into PORT, down to its disk; returns the USB device's path."""
        path = self.plug_usb(port, serial=serial)
        self.scsi_disk(f"{path}/{port}:1.0", model="USB HARDDRIVE", size=size)
        return path

    def plug_keyboard(self, port: str, name: Text = "QEMU USB Keyboard") -> str:
        """Plug a keyboard into PORT, with its input device; returns the USB device's path."""
        path = self.plug_usb(port, 0x0627, 0x0001, "", "QEMU", name, KEYBOARD, "12", "usbhid")
        number = self._next_input
        self._next_input += 1
        kind = {"ID_INPUT": "1", "ID_INPUT_KEYBOARD": "1"}
        device = self.add("input", f"{path}/{port}:1.0/input/input{number}", {"name": name}, kind)
        self.add("input", f"{device}/event{number}", {"dev": f"13:{64 + number}"}, {"DEVNAME": f"input/event{number}"})
        return path

    def _usb_device(
        self,
        path: str,
        bus: int,
        vendor: int,
        product: int,
        serial: Text,
        manufacturer: Text,
        name: Text,
        interfaces: tuple[str, ...],
        speed: str,
        device_class: int,
        driver: str,
        interface_driver: str,
    ) -> str:
        number = self._usb_numbers[bus] = self._usb_numbers.get(bus, 0) + 1
        node = f"bus/usb/{bus:03d}/{number:03d}"
        attributes: dict[str, Text] = {
            "busnum": str(bus),
            "devnum": str(number),
            "idVendor": f"{vendor:04x}",
            "idProduct": f"{product:04x}",
            "bDeviceClass": f"{device_class:02x}",
            "speed": speed,
        }
        strings = {"serial": serial, "manufacturer": manufacturer, "product": name}
        attributes.update({key: value for key, value in strings.items() if value})
        packed = ":" + "".join(triple.replace(":", "") + ":" for triple in interfaces)
        properties = {"DEVTYPE": "usb_device", "DEVNAME": node, "BUSNUM": f"{bus:03d}", "DEVNUM": f"{number:03d}"}
        self.add("usb", path, attributes, {**properties, "ID_USB_INTERFACES": packed})
        kernel_name = path.rpartition("/")[2]
        port = f"{bus}-0" if kernel_name.startswith("usb") else kernel_name
        for index, triple in enumerate(interfaces):
            self._usb_interface(f"{path}/{port}:1.{index}", triple, interface_driver)
        self.set_driver(path, driver)
        return path

    def _usb_interface(self, path: str, triple: str, driver: str) -> None:
        parts = zip(("Class", "SubClass", "Protocol"), triple.split(":"), strict=True)
        attributes = {f"bInterface{part}": value for part, value in parts}
        self.add("usb", path, attributes, {"DEVTYPE": "usb_interface"})
        if driver:
            self.set_driver(path, driver)

    # --- SCSI ---

    def scsi_disk(
        self, parent: str, vendor: Text = "QEMU", model: Text = "QEMU HARDDISK", size: int = 20_000_000_000
    ) -> str:
        """A SCSI host below PARENT with one disk, its sg node and block device; returns the logical unit's path."""
        host = self._next_scsi_host
        self._next_scsi_host += 1
        self.add("scsi", f"{parent}/host{host}", properties={"DEVTYPE": "scsi_host"})
        target = f"{parent}/host{host}/target{host}:0:0"
        self.add("scsi", target, properties={"DEVTYPE": "scsi_target"})
        return self.lun(target, 0, vendor, model, size)

    def lun(self, target: str, lun: int, vendor: Text, model: Text, size: int = 20_000_000_000) -> str:
        """A disk as one more logical unit of TARGET; returns its path."""
        place = f"{target.rpartition('target')[2]}:{lun}"
        number = self._next_disk
        self._next_disk += 1
        attributes: dict[str, Text] = {
            "type": "0",
            "vendor": vendor,
            "model": model,
            "wwid": f"naa.5000c500{number:08x}",
            "vpd_pg80": b"\x00\x80\x00\x08SN%06d" % number,
        }
        unit = self.add("scsi", f"{target}/{place}", attributes, {"DEVTYPE": "scsi_device"}, "sd")
        sg = f"{unit}/scsi_generic/sg{number}"
        self.add("scsi_generic", sg, {"dev": f"21:{number}"}, {"DEVNAME": f"sg{number}"})
        self.disk(unit, _disk_name(number), 8 + 57 * (number // 16), 16 * (number % 16), size)
        return unit

    def disk(self, parent: str, name: str, major: int, minor: int, size: int) -> str:
        """A whole disk as the block device of PARENT, with one partition; returns its path."""
        number, part = f"{major}:{minor}", f"{major}:{minor + 1}"
        attributes = {"dev": number, "size": str(size // 512)}
        path = self.add("block", f"{parent}/block/{name}", attributes, {"DEVTYPE": "disk", "DEVNAME": name})
        self._link(path, self.root / "sys/dev/block" / number, self._folder(path))
        (self._folder(path) / "holders").mkdir()
        partition = {"dev": part, "size": str(size // 512 - 2048), "partition": "1"}
        child = self.add("block", f"{path}/{name}1", partition, {"DEVTYPE": "partition", "DEVNAME": f"{name}1"})
        self._link(child, self.root / "sys/dev/block" / part, self._folder(child))
        return path

    # --- whole hosts ---

    def furnish(self) -> None:
        """A host with one of each: see the comments. Paths are found again with `path`."""
        self.pci("0000:00:00.0", device=0x29C0, class_code=0x060000, group=0)
        # A NIC alone in its group, in the first root port.
        port = self._root_port("0000:00:01.0", 1)
        intel = ("Intel Corporation", "82574L Gigabit Network Connection")
        nic = self.pci("0000:01:00.0", port, device=0x10D3, group=10, driver="e1000e", names=intel)
        self.net(nic, "enp1s0", "52:54:00:00:00:10", 2)
        # A display with its sound function: a group of two.
        port = self._root_port("0000:00:01.1", 2)
        gpu = self.pci("0000:02:00.0", port, 0x10DE, 0x1C03, 0x030000, 11, "nouveau", names=("NVIDIA", "GP106"))
        self.add("drm", f"{gpu}/drm/card1", {"dev": "226:1"}, {"DEVNAME": "dri/card1", "DEVTYPE": "drm_minor"})
        sound = self.pci("0000:02:00.1", port, 0x10DE, 0x10F1, 0x040300, 11, "snd_hda_intel")
        card = self.add("sound", f"{sound}/sound/card0", {"id": "NVidia"})
        self.add("sound", f"{card}/controlC0", {"dev": "116:2"}, {"DEVNAME": "snd/controlC0"})
        # A NIC with two virtual functions, each in a group of its own.
        port = self._root_port("0000:00:01.2", 3)
        physical = self.pci(
            "0000:03:00.0", port, device=0x10C9, group=12, driver="igb", attributes={"sriov_totalvfs": "7"}
        )
        self.net(physical, "enp3s0", "52:54:00:00:00:30", 3)
        self.virtual_function(physical, "0000:03:10.0", 13, "igbvf")
        self.virtual_function(physical, "0000:03:10.2", 14)
        # The display the host booted with.
        boot = self.pci("0000:00:02.0", device=0x5912, class_code=0x030000, group=4, driver="i915",
                        attributes={"boot_vga": "1"})  # fmt: skip
        self.add("drm", f"{boot}/drm/card0", {"dev": "226:0"}, {"DEVNAME": "dri/card0", "DEVTYPE": "drm_minor"})
        # USB: a hub with a stick and its twin, and a keyboard.
        usb = self.pci("0000:00:14.0", vendor=0x1033, device=0x0194, class_code=0x0C0330, group=5, driver="xhci_hcd",
                       names=("NEC Corporation", "uPD720200 USB 3.0 Host Controller"))  # fmt: skip
        self.usb_controller(usb, 1)
        self.usb_controller(usb, 2, "5000")
        self.plug_usb("1-1", 0x0409, 0x55AA, "", "QEMU", "QEMU USB Hub", HUB, "12", "hub")
        self.plug_usb_disk("1-1.2", "1-0000:00:14.0-1.2")
        self.plug_usb("1-1.3", serial="TWIN")
        self.plug_keyboard("1-2")
        # A host adapter with a disk.
        adapter = self.pci("0000:00:16.0", vendor=0x1000, device=0x0072, class_code=0x010700, group=6,
                           driver="mpt3sas", attributes={"reset_method": "flr bus"})  # fmt: skip
        self.scsi_disk(adapter)
        # The chipset: one group that is not viable.
        chipset = (
            (0, 0x2918, 0x060100, "lpc_ich"),
            (2, 0x2922, 0x010601, "ahci"),
            (3, 0x2930, 0x0C0500, "i801_smbus"),
        )
        for function, device, class_code, driver in chipset:
            self.pci(f"0000:00:1f.{function}", device=device, class_code=class_code, group=7, driver=driver)
        self.add("tty", "/sys/devices/platform/serial8250/tty/ttyS0", {"dev": "4:64"}, {"DEVNAME": "ttyS0"})

    def _root_port(self, address: str, group: int) -> str:
        return self.pci(address, device=0x3420, class_code=0x060400, group=group, driver="pcieport", bridge=True)

    def big_tree(self, count: int) -> None:
        """COUNT PCI functions in groups of their own, straight into the files, with no uevents."""
        for index in range(count):
            domain, rest = divmod(index, 8192)
            address = f"{domain + 1:04x}:{rest >> 5:02x}:{rest & 31:02x}.0"
            self.pci(address, device=0x10C9, group=1000 + index, driver="igb", event=False)

    def path(self, kernel_name: str) -> str:
        """Where the device that the kernel calls KERNEL_NAME is."""
        return next(known for known in self._properties if known.endswith(f"/{kernel_name}"))

    # --- files ---

    def _folder(self, path: str) -> Path:
        return self.root / path.removeprefix("/")

    def _subsystem(self, path: str) -> str:
        return os.readlink(self._folder(path) / "subsystem").rpartition("/")[2]

    def _link(self, owner: str, link: Path, target: Path) -> None:
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(os.path.relpath(target, link.parent))
        self._links.setdefault(owner, []).append(link)

    def _link_driver(self, path: str, subsystem: str, driver: str) -> None:
        folder = self.root / "sys/bus" / subsystem / "drivers" / driver
        folder.mkdir(parents=True, exist_ok=True)
        self._link(path, self._folder(path) / "driver", folder)

    def _write_uevent(self, path: str) -> None:
        lines = (f"{key}={value}" for key, value in self._properties[path].items())
        self.write(path, "uevent", "\n".join(lines))


def config(vendor: int, device: int, class_code: int, header_type: int = 0) -> bytes:
    """The first 64 bytes of a PCI function's configuration space."""
    head = struct.pack("<HHHHBBBBBBBB", vendor, device, 0, 0x10, 1, class_code & 0xFF, class_code >> 8 & 0xFF,
                       class_code >> 16, 0, 0, header_type, 0)  # fmt: skip
    return head.ljust(64, b"\0")


def _disk_name(number: int) -> str:
    """The kernel's name of its disk NUMBER: sda, ..., sdz, sdaa."""
    letters = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return "sd" + letters
