"""Things of real life: their ids, classes and interfaces as lspci, lsusb and lsscsi show them, and what they are."""

from __future__ import annotations

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class Thing:
    """A device, what is below it and what it is a mediated device of, and how it must be called."""

    device: Device
    category: str
    label: str
    location: str
    role: str = "device"
    below: tuple[Device, ...] = ()
    parent: Device | None = None

    def __str__(self) -> str:
        return f"{self.device.vendor} {self.device.product or self.label} {self.location}"


def node(
    kind: str,
    kernel_name: str,
    *facts: Facts,
    vendor: str = "",
    product: str = "",
    nodes: tuple[str, ...] = (),
    parent: Device | None = None,
) -> Device:
    """A device of KIND that the kernel calls KERNEL_NAME."""
    folder = parent.sysfs_path if parent else "/sys/devices/pci0000:00"
    return Device(
        name=device_name(kind, kernel_name, folder.rpartition("/")[2]),
        kind=kind,
        sysfs_path=f"{folder}/{kernel_name}",
        parent=parent.name if parent else None,
        device_nodes=nodes,
        vendor=vendor,
        product=product,
        facts=facts,
    )


def pci(ids: str, class_code: int, vendor: str = "", product: str = "", *, class_name: str = "", header: int = 0,
        address: str = "0000:01:00.0", parent: Device | None = None) -> Device:  # fmt: skip
    """A PCI function with IDS vvvv:dddd and CLASS_CODE (16 bits)."""
    vendor_id, _, device_id = ids.partition(":")
    facts = Pci(
        address=address,
        class_code=class_code << 8,
        class_name=class_name,
        vendor_id=int(vendor_id, 16),
        device_id=int(device_id, 16),
        subsystem_vendor_id=0,
        subsystem_device_id=0,
        revision=0,
        header_type=header,
        iommu_group=1,
        numa_node=-1,
        reset_methods=(),
        boot_display=False,
        physical_function=None,
        max_virtual_functions=0,
        off_bus=False,
    )
    return node("pci", address, facts, vendor=vendor, product=product, parent=parent)


def usb(ids: str, interfaces: str, vendor: str = "", product: str = "", *, other: str = "", marks: tuple[str, ...] = (),
        device_class: int = 0, port: str = "1-1.2", parent: Device | None = None) -> Device:  # fmt: skip
    """A USB device with IDS vvvv:pppp, its INTERFACES, and OTHERs of other configurations."""
    vendor_id, _, product_id = ids.partition(":")
    numbers = int(vendor_id, 16), int(product_id, 16)
    triples, others = tuple(interfaces.split()), tuple(other.split())
    facts = Usb(1, 7, port, *numbers, device_class, 480, triples, others, marks)
    return node("usb", port, facts, vendor=vendor, product=product, parent=parent)


def lun(type_: str, vendor: str = "", product: str = "") -> Device:
    """A SCSI logical unit."""
    return node("scsi", "0:0:1:0", Scsi(0, 0, 1, 0, type_, ""), vendor=vendor, product=product)


def net(name: str, type_: str = "") -> Device:
    """A network interface."""
    return node("net", name, Net(name, "52:54:00:00:00:01", 2, type_))


def event(category: str = "") -> Device:
    """An input device."""
    return node("input", "input5", Input("seat0" if category == "keyboard" else "", category),
                product="some name", nodes=("/dev/input/event3", "/dev/input/by-id/x"))  # fmt: skip


def block(name: str, size: int = 0) -> Device:
    """A whole disk."""
    return node("block", name, Block(f"/dev/{name}", size), nodes=(f"/dev/{name}",))


def mdev(type_: str, product: str = "", parent: Device | None = None) -> Device:
    """A mediated device of TYPE."""
    return node("mdev", UUID, Mdev(UUID, type_), product=product, parent=parent)


UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
SLOT = "0000:01:00.0"
PORT = "1-1.2"

INTEL = "Intel Corporation"
NVIDIA = "NVIDIA Corporation"
REALTEK = "Realtek Semiconductor Corp."

T4 = pci("10de:1eb8", 0x0302, NVIDIA, "TU104GL [Tesla T4]")
IGD = pci("8086:5912", 0x0300, INTEL, "HD Graphics 630", address="0000:00:02.0")

PCI = [
    Thing(T4, "gpu", "NVIDIA Corporation TU104GL [Tesla T4]", SLOT),
    Thing(IGD, "gpu", "Intel Corporation HD Graphics 630", "0000:00:02.0"),
    Thing(pci("10de:1b80", 0x0300, NVIDIA, "GP104 [GeForce GTX 1080]"),
          "gpu", "NVIDIA Corporation GP104 [GeForce GTX 1080]", SLOT),
    Thing(pci("10de:10f0", 0x0403, NVIDIA, "GP104 High Definition Audio Controller", address="0000:01:00.1"),
          "audio", "NVIDIA Corporation GP104 High Definition Audio Controller", "0000:01:00.1"),
    Thing(pci("10de:1ad8", 0x0C03, NVIDIA, "TU104 USB 3.1 Host Controller"),
          "usb-controller", "NVIDIA Corporation TU104 USB 3.1 Host Controller", SLOT),
    Thing(pci("1002:73bf", 0x0300, "Advanced Micro Devices, Inc. [AMD/ATI]", "Navi 21"),
          "gpu", "Advanced Micro Devices, Inc. [AMD/ATI] Navi 21", SLOT),
    Thing(pci("8086:56c0", 0x0380, INTEL, "ATS-M"), "gpu", "Intel Corporation ATS-M", SLOT),
    # An NVSwitch, whose class 0680 is an "other bridge", is handed out with its GPUs.
    Thing(pci("10de:22a3", 0x0680, NVIDIA, class_name="Bridge"),
          "bridge", "NVIDIA Corporation Bridge [10de:22a3]", SLOT),
    Thing(pci("8086:1901", 0x0604, INTEL, "6th-10th Gen Core Processor PCIe Controller (x16)", header=1),
          "bridge", "Intel Corporation 6th-10th Gen Core Processor PCIe Controller (x16)", SLOT, "structure"),
    Thing(pci("104c:ac56", 0x0607, header=2), "bridge", "Bridge [104c:ac56]", SLOT, "structure"),
    Thing(pci("8086:0d57", 0x0600, INTEL), "bridge", "Intel Corporation Host bridge [8086:0d57]", SLOT, "structure"),
    Thing(pci("8086:a305", 0x0601, INTEL, "Z390 Chipset LPC/eSPI Controller"),
          "bridge", "Intel Corporation Z390 Chipset LPC/eSPI Controller", SLOT, "structure"),
    Thing(pci("8086:1533", 0x0200, INTEL, "I210 Gigabit Network Connection"),
          "network", "Intel Corporation I210 Gigabit Network Connection", SLOT),
    Thing(pci("8086:10ca", 0x0200), "network", "Ethernet controller [8086:10ca]", SLOT),
    Thing(pci("8086:10ca", 0x0200, class_name="Ethernet controller (virtual)"),
          "network", "Ethernet controller (virtual) [8086:10ca]", SLOT),
    Thing(pci("1af4:1041", 0x0200, "Red Hat, Inc.", "Virtio 1.0 network device"),
          "network", "Red Hat, Inc. Virtio 1.0 network device", SLOT),
    Thing(pci("15b3:1017", 0x0200, "Mellanox Technologies", "MT27800 Family [ConnectX-5]"),
          "network", "Mellanox Technologies MT27800 Family [ConnectX-5]", SLOT),
    Thing(pci("8086:2723", 0x0280, INTEL, "Wi-Fi 6 AX200"), "wifi", "Intel Corporation Wi-Fi 6 AX200", SLOT),
    Thing(pci("105a:4d69", 0x0D11), "bluetooth", "Bluetooth [105a:4d69]", SLOT),
    Thing(pci("144d:a808", 0x0108, "Samsung Electronics Co Ltd", "NVMe SSD Controller SM981/PM981/PM983"),
          "disk", "Samsung Electronics Co Ltd NVMe SSD Controller SM981/PM981/PM983", SLOT),
    Thing(pci("1000:0072", 0x0107, "Broadcom / LSI", "SAS2008"), "storage-controller", "Broadcom / LSI SAS2008", SLOT),
    Thing(pci("8086:a352", 0x0106, INTEL, "Cannon Lake PCH SATA AHCI Controller"),
          "storage-controller", "Intel Corporation Cannon Lake PCH SATA AHCI Controller", SLOT),
    Thing(pci("1106:3483", 0x0C03, "VIA Technologies, Inc.", "VL805/806 xHCI USB 3.0 Controller"),
          "usb-controller", "VIA Technologies, Inc. VL805/806 xHCI USB 3.0 Controller", SLOT),
    Thing(pci("8086:a323", 0x0C05, INTEL, "Cannon Lake PCH SMBus Controller"),
          "system", "Intel Corporation Cannon Lake PCH SMBus Controller", SLOT),
    Thing(pci("8086:a379", 0x1180, INTEL, "Cannon Lake PCH Thermal Controller"),
          "other", "Intel Corporation Cannon Lake PCH Thermal Controller", SLOT),
    Thing(pci("1d0f:efa1", 0x0580), "system", "Memory controller [1d0f:efa1]", SLOT),
    Thing(pci("10ec:525a", 0x0805, "Realtek Semiconductor Co., Ltd.", "RTS525A PCI Express Card Reader"),
          "system", "Realtek Semiconductor Co., Ltd. RTS525A PCI Express Card Reader", SLOT),
    Thing(pci("13a8:0352", 0x0700, "Exar Corp.", "XR17C/D152 Dual PCI UART"),
          "serial", "Exar Corp. XR17C/D152 Dual PCI UART", SLOT),
    Thing(pci("13f6:8788", 0x0401, "C-Media Electronics Inc", "CMI8788 [Oxygen HD Audio]"),
          "audio", "C-Media Electronics Inc CMI8788 [Oxygen HD Audio]", SLOT),
    Thing(pci("8086:9a19", 0x0480, INTEL), "camera", "Intel Corporation Multimedia controller [8086:9a19]", SLOT),
    Thing(pci("14f1:8852", 0x0400, "Conexant Systems, Inc.", "CX23885 PCI Video and Audio Decoder"),
          "tuner", "Conexant Systems, Inc. CX23885 PCI Video and Audio Decoder", SLOT),
    Thing(pci("dd01:0003", 0x0480, "Digital Devices GmbH", "Octopus DVB Adapter"),
          "tuner", "Digital Devices GmbH Octopus DVB Adapter", SLOT),
    Thing(pci("8086:0435", 0x0B40, INTEL, "DH895XCC Series QAT"),
          "accelerator", "Intel Corporation DH895XCC Series QAT", SLOT),
    Thing(pci("1da3:1020", 0x1200, "Habana Labs Ltd.", "Gaudi2 AI Training Accelerator"),
          "accelerator", "Habana Labs Ltd. Gaudi2 AI Training Accelerator", SLOT),
    Thing(pci("1af4:1045", 0xFFFF), "other", "PCI device [1af4:1045]", SLOT),
]  # fmt: skip

HEADSET = "01:01:00 01:02:00 03:00:00"

USB = [
    Thing(usb("1d6b:0003", "09:00:00", "Linux Foundation", "xHCI Host Controller", device_class=9, port="usb2"),
          "hub", "Linux Foundation xHCI Host Controller", "usb2", "structure"),
    Thing(usb("0409:55aa", "09:00:00", "", "", device_class=9), "hub", "USB hub [0409:55aa]", PORT, "structure"),
    # Keys.
    Thing(usb("1050:0407", "03:01:01 03:00:00 0b:00:00", "Yubico", "YubiKey OTP+FIDO+CCID"),
          "security-key", "Yubico YubiKey OTP+FIDO+CCID", PORT),
    Thing(usb("1050:0120", "03:00:00", "Yubico", "Security Key by Yubico"),
          "security-key", "Yubico Security Key by Yubico", PORT),
    Thing(usb("20a0:42b1", "03:00:00", "Nitrokey", "Nitrokey FIDO2"), "security-key", "Nitrokey FIDO2", PORT),
    Thing(usb("1209:53c1", "ff:00:00 03:00:00", "SatoshiLabs", "TREZOR"), "security-key", "SatoshiLabs TREZOR", PORT),
    Thing(usb("ffff:0001", "03:00:00", marks=("fido",)), "security-key", "USB device [ffff:0001]", PORT),
    Thing(usb("076b:3021", "0b:00:00", "OmniKey AG", "CardMan 3121"), "smartcard", "OmniKey AG CardMan 3121", PORT),
    Thing(usb("046a:00a2", "03:01:01 0b:00:00", "Cherry GmbH", "KC 1000 SC"),
          "smartcard", "Cherry GmbH KC 1000 SC", PORT),
    # Pictures.
    Thing(usb("046d:0825", "0e:01:00 0e:02:00 01:01:00 01:02:00", "", "Webcam C270"), "camera", "Webcam C270", PORT),
    Thing(usb("04f2:b604", "0e:01:00 0e:02:00 fe:01:01", "Chicony", "Integrated Camera"),
          "camera", "Chicony Integrated Camera", PORT),
    Thing(usb("04a9:3270", "06:01:01", "Canon Inc.", "Canon Digital Camera"),
          "camera", "Canon Digital Camera", PORT),
    Thing(usb("04a9:1909", "ff:00:ff", "Canon", "CanoScan", marks=("scanner",)), "scanner", "Canon CanoScan", PORT),
    Thing(usb("04b8:013a", "ff:ff:ff", "EPSON", "Perfection V600"), "other", "EPSON Perfection V600", PORT),
    Thing(usb("03f0:1705", "06:01:01", marks=("scanner",)), "scanner", "USB scanner [03f0:1705]", PORT),
    Thing(usb("03f0:0053", "ff:cc:00 07:01:02 07:01:04", "HP", "DeskJet 2600 series", marks=("scanner",)),
          "printer", "HP DeskJet 2600 series", PORT),
    Thing(usb("04f9:0248", "07:01:02"), "printer", "USB printer [04f9:0248]", PORT),
    # Telephones.
    Thing(usb("04e8:6860", "06:01:01 02:02:01 0a:00:00", "SAMSUNG", "SAMSUNG_Android"),
          "phone", "SAMSUNG_Android", PORT),
    Thing(usb("18d1:4ee2", "06:01:01 ff:42:01", "Google", "Pixel 7"), "phone", "Google Pixel 7", PORT),
    Thing(usb("1234:5678", "ff:ff:00", marks=("mtp",)), "phone", "USB phone [1234:5678]", PORT),
    Thing(usb("05ac:12a8", "06:01:01 ff:fe:02", "Apple Inc.", "iPhone", other="01:01:00 01:02:00 03:00:00 ff:fd:01"),
          "phone", "Apple Inc. iPhone", PORT),
    # A telephone as a webcam is a camera.
    Thing(usb("18d1:4eed", "0e:01:00 0e:02:00 ff:42:01", "Google", "Pixel 8"), "camera", "Google Pixel 8", PORT),
    # Radio.
    Thing(usb("8087:0029", "e0:01:01", product=""), "bluetooth", "USB Bluetooth adapter [8087:0029]", PORT),
    Thing(usb("0a5c:21e8", "ff:01:01 ff:01:01 ff:ff:ff fe:01:01", "Broadcom Corp", "BCM20702A0"),
          "bluetooth", "Broadcom Corp BCM20702A0", PORT),
    Thing(usb("148f:7601", "ff:ff:ff", "MediaTek", "802.11 n WLAN", ), "other", "MediaTek 802.11 n WLAN", PORT),
    Thing(usb("148f:7601", "ff:ff:ff", "MediaTek", "802.11 n WLAN"), "wifi", "MediaTek 802.11 n WLAN", PORT,
          below=(net("wlx0013ef", "wlan"),)),
    Thing(usb("0bda:b720", "e0:01:01 ff:ff:ff", "Realtek", "802.11n WLAN Adapter"),
          "wifi", "Realtek 802.11n WLAN Adapter", PORT, below=(net("wlan0", "wlan"),)),
    Thing(usb("0bda:2838", "ff:ff:ff ff:ff:ff", "Realtek", "RTL2838UHIDIR"), "tuner", "Realtek RTL2838UHIDIR", PORT),
    Thing(usb("2040:8265", "ff:00:00 01:01:00", "HCW", "WinTV-dualHD"), "tuner", "HCW WinTV-dualHD", PORT),
    # Networks.
    Thing(usb("0bda:8153", "ff:ff:00", REALTEK, "RTL8153 Gigabit Ethernet Adapter", other="02:06:00 0a:00:00"),
          "network", "Realtek Semiconductor Corp. RTL8153 Gigabit Ethernet Adapter", PORT, below=(net("enp0s20u1"),)),
    Thing(usb("17ef:3062", "ff:ff:00", "Lenovo", "USB-C Dock LAN", other="02:06:00 0a:00:00"),
          "network", "Lenovo USB-C Dock LAN", PORT),
    Thing(usb("0b95:1790", "ff:ff:00", "ASIX", "AX88179"), "network", "ASIX AX88179", PORT),
    Thing(usb("0424:ec00", "ff:00:ff"), "network", "USB network adapter [0424:ec00]", PORT),
    Thing(usb("1d6b:0104", "e0:01:03 0a:00:00"), "network", "USB network adapter [1d6b:0104]", PORT),
    Thing(usb("1d6b:0104", "ef:02:01"), "other", "USB device [1d6b:0104]", PORT),
    Thing(usb("12d1:15c3", "02:0e:00 0a:00:02 02:02:01", "HUAWEI", "ME906s"), "network", "HUAWEI ME906s", PORT),
    # Disks.
    Thing(usb("0781:5581", "08:06:50", "SanDisk", "Ultra"), "disk", "SanDisk Ultra", PORT),
    Thing(usb("0bc2:ab24", "08:06:50", "Seagate", "Backup Plus", other="08:06:62"), "disk", "Seagate Backup Plus", PORT,
          below=(lun("disk"), block("sdb", 8_600_000_000))),
    Thing(usb("46f4:0001", "08:06:50"), "disk", "USB disk [46f4:0001]", PORT),
    Thing(usb("0644:0000", "08:04:00", "TEAC", "USB Floppy"), "disk", "TEAC USB Floppy", PORT),
    Thing(usb("13fd:0840", "08:02:50", "HLDS", "DVD+-RW"), "optical-drive", "HLDS DVD+-RW", PORT),
    Thing(usb("0e8d:1887", "08:06:50", "MediaTek Inc", "Slim Portable DVD"),
          "optical-drive", "MediaTek Inc Slim Portable DVD", PORT, below=(lun("cd/dvd"), block("sr0"))),
    # A stick with its driver's installation on a make-believe disc.
    Thing(usb("0781:5406", "08:06:50", "SanDisk", "U3 Cruzer Micro"), "disk", "SanDisk U3 Cruzer Micro", PORT,
          below=(lun("cd/dvd"), lun("disk"))),
    # Sound, keys and pointers.
    Thing(usb("0d8c:0014", HEADSET, "C-Media", "USB Audio Device"), "audio", "C-Media USB Audio Device", PORT),
    Thing(usb("046d:c31c", "03:01:01 03:00:00", "Logitech", "USB Keyboard"), "keyboard", "Logitech USB Keyboard", PORT),
    Thing(usb("046d:c077", "03:01:02", "Logitech", "USB Optical Mouse"), "mouse", "Logitech USB Optical Mouse", PORT),
    Thing(usb("046d:c52b", "03:01:01 03:01:02 03:00:00", "Logitech", "USB Receiver"),
          "keyboard", "Logitech USB Receiver", PORT),
    # A pen tablet without boot protocol: what udev found in its report descriptors.
    Thing(usb("256c:006d", "03:00:00", "HUION", "Tablet"), "mouse", "HUION Tablet", PORT, below=(event("mouse"),)),
    Thing(usb("0079:0006", "03:00:00", "DragonRise Inc.", "Generic USB Joystick"),
          "game-controller", "DragonRise Inc. Generic USB Joystick", PORT, below=(event("game-controller"),)),
    Thing(usb("045e:028e", "ff:5d:01 ff:5d:03 ff:5d:02 ff:fd:13", "©Microsoft Corporation", "Controller"),
          "game-controller", "©Microsoft Corporation Controller", PORT),
    Thing(usb("045e:02ea", "ff:47:d0 ff:47:d0 ff:47:d0"), "game-controller", "USB game controller [045e:02ea]", PORT),
    Thing(usb("045e:0719", "ff:5d:81 ff:5d:82"), "game-controller", "USB game controller [045e:0719]", PORT),
    Thing(usb("054c:09cc", HEADSET, "Sony", "Wireless Controller"),
          "game-controller", "Sony Wireless Controller", PORT),
    # Serial lines.
    Thing(usb("2341:0043", "02:02:01 0a:00:00", "Arduino", ""),
          "serial", "Arduino USB serial adapter [2341:0043]", PORT),
    Thing(usb("0403:6001", "ff:ff:ff", "FTDI", "FT232R USB UART"), "serial", "FTDI FT232R USB UART", PORT),
    Thing(usb("10c4:ea60", "ff:00:00", "Silicon Labs", "CP2102"), "serial", "Silicon Labs CP2102", PORT),
    Thing(usb("1a86:7523", "ff:01:02", "", "USB2.0-Serial"), "serial", "USB2.0-Serial", PORT),
    Thing(usb("067b:2303", "ff:00:00", "Prolific", "USB-Serial"), "serial", "Prolific USB-Serial", PORT),
    # The rest.
    Thing(usb("051d:0002", "03:00:00", "American Power Conversion", "Back-UPS"),
          "other", "American Power Conversion Back-UPS", PORT),
    Thing(usb("138a:0090", "ff:00:00"), "other", "USB device [138a:0090]", PORT),
    Thing(usb("17e9:6006", "ff:00:00", "DisplayLink", "Dock"), "other", "DisplayLink Dock", PORT),
    # Names that are none.
    Thing(usb("abcd:1234", "08:06:50", "0000", "1.00"), "disk", "USB disk [abcd:1234]", PORT),
    Thing(usb("abcd:1234", "08:06:50", "Generic", ""), "disk", "Generic USB disk [abcd:1234]", PORT),
]  # fmt: skip

REST = [
    Thing(lun("disk", "QEMU", "QEMU HARDDISK"), "disk", "QEMU HARDDISK", "0:0:1:0"),
    Thing(lun("disk", "ATA", "Samsung SSD 860"), "disk", "Samsung SSD 860", "0:0:1:0"),
    Thing(lun("disk", "SEAGATE", "ST4000NM0023"), "disk", "SEAGATE ST4000NM0023", "0:0:1:0"),
    Thing(lun("disk"), "disk", "SCSI disk", "0:0:1:0"),
    Thing(lun("cd/dvd", "HL-DT-ST", "DVDRAM GH24NSD1"), "optical-drive", "HL-DT-ST DVDRAM GH24NSD1", "0:0:1:0"),
    Thing(lun("cd/dvd"), "optical-drive", "Optical drive", "0:0:1:0"),
    Thing(lun("tape", "IBM", "ULT3580-TD6"), "tape", "IBM ULT3580-TD6", "0:0:1:0"),
    Thing(lun("scanner", "EPSON", "GT-7000"), "scanner", "EPSON GT-7000", "0:0:1:0"),
    Thing(lun("enclosu", "DELL", "MD1200"), "other", "DELL MD1200", "0:0:1:0"),
    Thing(lun("process"), "other", "SCSI device", "0:0:1:0"),
    Thing(mdev("mtty-2", "Dual port serial"), "other", "Dual port serial", UUID),
    Thing(mdev("vfio_ap-passthrough"), "other", "Mediated device [vfio_ap-passthrough]", UUID),
    Thing(mdev("nvidia-232", "GRID T4-16Q"), "virtual-gpu", "GRID T4-16Q", UUID),
    Thing(mdev("i915-GVTg_V5_4", parent=IGD), "virtual-gpu", "Virtual GPU [i915-GVTg_V5_4]", UUID, parent=IGD),
    Thing(mdev("future-1", "Slice", parent=T4), "virtual-gpu", "Slice", UUID, parent=T4),
    Thing(mdev("idxd-1dwq-v1", parent=PCI[-3].device), "other", "Mediated device [idxd-1dwq-v1]", UUID,
          parent=PCI[-3].device),
    Thing(node("mdev-parent", "mtty", MdevParent((MdevType("mtty-1", "Single port serial", 24),))),
          "other", "Parent of mediated devices", "mdev_bus/mtty", "structure"),
    Thing(node("usb-interface", "1-1.2:1.0", UsbInterface("08:06:50")),
          "disk", "Mass storage interface", "1-1.2:1.0", "structure"),
    Thing(node("usb-interface", "1-1.2:1.1", UsbInterface("03:01:01")),
          "keyboard", "Keyboard interface", "1-1.2:1.1", "structure"),
    Thing(node("usb-interface", "1-1.2:1.2", UsbInterface("dc:02:01")),
          "other", "USB interface", "1-1.2:1.2", "structure"),
    Thing(node("scsi-host", "host0"), "storage-controller", "SCSI host", "scsi/host0", "structure"),
    Thing(node("scsi-target", "target0:0:1"), "other", "SCSI target", "scsi/target0:0:1", "structure"),
    Thing(node("scsi-generic", "sg0", nodes=("/dev/sg0",)), "other", "SCSI generic device", "/dev/sg0", "function"),
    Thing(net("enp1s0"), "network", "Network interface", "enp1s0", "function"),
    Thing(net("wlp2s0", "wlan"), "wifi", "Wireless network interface", "wlp2s0", "function"),
    Thing(block("sda", 8_600_000_000), "disk", "Disk, 8.6 GB", "/dev/sda", "function"),
    Thing(block("nvme0n1", 512_110_190_592), "disk", "Disk, 512.1 GB", "/dev/nvme0n1", "function"),
    Thing(block("sdc"), "disk", "Disk", "/dev/sdc", "function"),
    Thing(block("sr0", 734_000_000), "optical-drive", "Optical drive", "/dev/sr0", "function"),
    Thing(node("drm", "card0", nodes=("/dev/dri/card0", "/dev/dri/by-path/x")),
          "gpu", "Display", "/dev/dri/card0", "function"),
    Thing(event("keyboard"), "keyboard", "Keyboard", "/dev/input/event3", "function"),
    Thing(event("game-controller"), "game-controller", "Game controller", "/dev/input/event3", "function"),
    Thing(event(), "other", "Input device", "/dev/input/event3", "function"),
    Thing(node("input", "input9", Input("")), "other", "Input device", "input/input9", "function"),
    Thing(node("sound", "card0", product="PCH", nodes=("/dev/snd/controlC0",)),
          "audio", "Sound card", "/dev/snd/controlC0", "function"),
    Thing(node("video", "video0", product="Integrated Camera", nodes=("/dev/video0",)),
          "camera", "Video device", "/dev/video0", "function"),
    Thing(node("video", "radio0", nodes=("/dev/radio0",)), "tuner", "Radio or TV receiver", "/dev/radio0", "function"),
    Thing(node("tty", "ttyUSB0", nodes=("/dev/ttyUSB0",)), "serial", "Serial port", "/dev/ttyUSB0", "function"),
    Thing(node("nvme", "nvme0", product="Samsung SSD 970 PRO 512GB", nodes=("/dev/nvme0",)),
          "disk", "NVMe controller", "/dev/nvme0", "function"),
    Thing(node("tpm", "tpm0", nodes=("/dev/tpm0",)), "tpm", "Trusted Platform Module", "/dev/tpm0", "function"),
    Thing(node("something-new", "thing0"), "other", "Device", "something-new/thing0", "function"),
]  # fmt: skip

THINGS = [*PCI, *USB, *REST]
