"""udev's devices and uevents as the daemon sees them: on a simulated host, and beside a real udevd where that goes."""

from __future__ import annotations

import asyncio
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import pytest

from hostpassd.model.device import Block, Device, Mdev, MdevParent, MdevType, Net, Scsi, Usb, UsbInterface
from hostpassd.model.events import DeviceGone, DeviceSeen, DevicesScanned, Event
from tests.bus.mockhost import MockHost

pyudev = pytest.importorskip("pyudev")

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
UDEVD = shutil.which("systemd-udevd", path="/usr/lib/systemd:/lib/systemd") or ""

needs_preload = pytest.mark.skipif(not shutil.which("umockdev-wrapper"), reason="needs umockdev")


class Listener:
    """A process with a Udev, told what to do: each answer is the events since the last."""

    def __init__(self, environment: dict[str, str], scan: bool = True) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, env={**environment, "PYTHONPATH": PYTHONPATH},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.uses_changed = 0
        self.ask("arm")
        self.scanned = cast(DevicesScanned, self.ask("scan")[0]) if scan else DevicesScanned(())

    def ask(self, command: str) -> list[Event]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(command.encode() + b"\n")
        self._process.stdin.flush()
        events, self.uses_changed = pickle.load(self._process.stdout)
        return cast(list[Event], events)

    def settle(self) -> list[Event]:
        """What has been emitted, now that all that was sent has been."""
        return self.ask("settle")

    def device(self, name: str) -> Device:
        return next(device for device in self.scanned.devices if device.name == name)

    def stop(self) -> str:
        """What it logged."""
        _, log = self._process.communicate(b"quit\n", timeout=10)
        return log.decode()


@pytest.fixture
def host() -> Iterator[MockHost]:
    with MockHost() as made:
        yield made


@pytest.fixture
def listen(host: MockHost) -> Iterator[Callable[..., Listener]]:
    listeners: list[Listener] = []

    def start(scan: bool = True) -> Listener:
        listeners.append(Listener(host.environment(), scan))
        return listeners[-1]

    yield start
    for listener in listeners:
        listener.stop()


Listen = Callable[..., Listener]

FURNISHED = [
    "pci_0000_00_00_0", "pci_0000_00_01_0", "pci_0000_01_00_0", "net_enp1s0", "pci_0000_00_01_1", "pci_0000_02_00_0",
    "drm_card1", "pci_0000_02_00_1", "sound_card0", "pci_0000_00_01_2", "pci_0000_03_00_0", "net_enp3s0",
    "pci_0000_03_10_0", "pci_0000_03_10_2", "pci_0000_00_02_0", "drm_card0", "pci_0000_00_14_0", "usb_usb1",
    "usb_1_0__1_0", "usb_1_1", "usb_1_1__1_0", "usb_1_1_2", "usb_1_1_2__1_0", "scsi_host0", "scsi_target0_0_0",
    "scsi_0_0_0_0", "block_sda", "scsi_generic_sg0", "usb_1_1_3", "usb_1_1_3__1_0", "usb_1_2", "usb_1_2__1_0",
    "input_input0", "usb_usb2", "usb_2_0__1_0", "pci_0000_00_16_0", "scsi_host1", "scsi_target1_0_0", "scsi_1_0_0_0",
    "block_sdb", "scsi_generic_sg1", "pci_0000_00_1f_0", "pci_0000_00_1f_2", "pci_0000_00_1f_3", "tty_ttyS0",
]  # fmt: skip


# What is there.


@needs_preload
def test_coldplug_finds_all_parents_first(host: MockHost, listen: Listen) -> None:
    host.furnish()
    devices = listen().scanned.devices
    assert sorted(device.name for device in devices) == sorted(FURNISHED)
    seen: set[str | None] = {None}
    for device in devices:
        assert device.parent in seen
        assert device.label
        seen.add(device.name)


@needs_preload
def test_pci_facts(host: MockHost, listen: Listen) -> None:
    host.furnish()
    listener = listen()
    nic = listener.device("pci_0000_01_00_0")
    assert nic.parent == "pci_0000_00_01_0"
    assert nic.label == "Intel Corporation 82574L Gigabit Network Connection"
    assert (nic.driver, nic.kind, nic.device_nodes) == ("e1000e", "pci", ())
    assert nic.pci is not None
    assert (nic.pci.address, nic.pci.vendor_id, nic.pci.device_id) == ("0000:01:00.0", 0x8086, 0x10D3)
    assert (nic.pci.class_code, nic.pci.revision, nic.pci.header_type) == (0x020000, 1, 0)
    assert (nic.pci.iommu_group, nic.pci.numa_node, nic.pci.off_bus) == (10, -1, False)
    port, boot = listener.device("pci_0000_00_01_0").pci, listener.device("pci_0000_00_02_0").pci
    assert port and port.header_type == 1
    assert boot and boot.boot_display
    physical, virtual = listener.device("pci_0000_03_00_0").pci, listener.device("pci_0000_03_10_0").pci
    assert physical and physical.max_virtual_functions == 7 and physical.physical_function is None
    assert virtual and virtual.physical_function == "pci_0000_03_00_0"
    adapter = listener.device("pci_0000_00_16_0").pci
    assert adapter and adapter.reset_methods == ("flr", "bus")


@needs_preload
def test_pci_headers(host: MockHost, listen: Listen) -> None:
    host.pci("0000:00:01.0", attributes={"config": b"\xff" * 64})
    host.pci("0000:00:02.0", class_code=0x060400, attributes={"config": b""})
    host.pci("0000:00:03.0", class_code=0x060700, attributes={"config": b""})
    host.pci("0000:00:04.1", attributes={"class": "junk", "numa_node": ""})
    found = {device.name: device.pci for device in listen().scanned.devices}
    gone, bridge, cardbus, odd = (found[f"pci_0000_00_0{place}"] for place in ("1_0", "2_0", "3_0", "4_1"))
    assert gone and gone.off_bus and gone.header_type == 0x7F
    assert bridge and bridge.header_type == 1 and not bridge.off_bus
    assert cardbus and cardbus.header_type == 2
    assert odd and odd.multifunction and (odd.class_code, odd.numa_node, odd.iommu_group) == (0, -1, -1)


def header(device: Device) -> tuple[int, bool]:
    assert device.pci
    return device.pci.header_type, device.pci.off_bus


@needs_preload
def test_a_function_that_sleeps_is_not_woken_to_be_read(host: MockHost, listen: Listen) -> None:
    for number, power in enumerate(("D3cold", "D3hot")):
        attributes: dict[str, str | bytes] = {"power_state": power, "config": b"\xff" * 64}
        path = host.pci(f"0000:00:0{number}.0", class_code=0x060400, attributes=attributes)
        listener = listen()
        assert header(listener.device(f"pci_0000_00_0{number}_0")) == (1, False)  # as its class says
        host.change(path)
        assert [header(event.device) for event in seen(listener.settle())] == [(1, False)]
        host.remove(path)


@needs_preload
def test_a_header_is_read_once_and_at_each_scan_if_its_function_is_awake(host: MockHost, listen: Listen) -> None:
    path = host.pci("0000:00:01.0", attributes={"power_state": "D0"})
    listener = listen()
    host.write(path, "config", b"\xff" * 64)
    host.change(path)
    host.set_driver(path, "vfio-pci")
    assert {header(event.device) for event in seen(listener.settle())} == {(0, False)}
    host.write(path, "power_state", "D3cold")
    assert [header(device) for device in cast(DevicesScanned, listener.ask("scan")[0]).devices] == [(0, False)]
    host.write(path, "power_state", "D0")
    assert [header(device) for device in cast(DevicesScanned, listener.ask("scan")[0]).devices] == [(0x7F, True)]
    # What sleeps, or cannot be read any more, is what it was last.
    host.write(path, "config", b"")
    host.change(path)
    assert [header(event.device) for event in seen(listener.settle())] == [(0x7F, True)]
    host.remove(path)
    host.pci("0000:00:01.0")
    assert header(seen(listener.settle())[-1].device) == (0, False)


@needs_preload
def test_a_file_that_hangs_holds_up_neither_a_scan_nor_uevents(host: MockHost) -> None:
    host.furnish()
    nic, stick = host.path("0000:01:00.0"), host.path("1-1.3")
    listener = Listener(host.environment(), scan=False)
    listener.ask(f"hang {nic}/config")
    listener.ask(f"hang {host.path('enp1s0')}")
    (scanned,) = cast(list[DevicesScanned], listener.ask("scan"))
    found = {device.name: device for device in scanned.devices}
    assert set(FURNISHED) - set(found) == {"net_enp1s0"} and scanned.unread == (host.path("enp1s0"),)
    assert header(found["pci_0000_01_00_0"]) == (0, False)  # not known, which is not dead
    listener.ask(f"hang {stick}/serial")
    host.change(stick)
    host.set_driver(nic, "")
    events = {event.device.name: event.device for event in seen(listener.settle())}
    assert events["usb_1_1_3"].serial == "" and events["pci_0000_01_00_0"].driver == ""
    listener.ask("answer")
    (scanned,) = cast(list[DevicesScanned], listener.ask("scan"))
    assert set(FURNISHED) == {device.name for device in scanned.devices} and scanned.unread == ()
    assert listener.stop().count("does not answer: it is left unread") == 3


@needs_preload
def test_usb_and_scsi_facts(host: MockHost, listen: Listen) -> None:
    host.furnish()
    listener = listen()
    stick, twin = listener.device("usb_1_1_2"), listener.device("usb_1_1_3")
    assert stick.facts == (Usb(1, 3, "1-1.2", 0x46F4, 1, 0, 480, ("08:06:50",), socket="1-1.2"),)
    assert listener.device("usb_1_1_2__1_0").facts == (UsbInterface("08:06:50"),)
    assert (stick.serial, twin.serial) == ("1-0000:00:14.0-1.2", "TWIN")
    assert (stick.label, stick.device_nodes) == ("QEMU USB HARDDRIVE", ("/dev/bus/usb/001/003",))
    assert listener.device("usb_usb2").facts == (Usb(2, 1, "usb2", 0x1D6B, 2, 9, 5000, ("09:00:00",)),)
    assert listener.device("usb_1_1_2__1_0").driver == "usb-storage"
    disk = listener.device("scsi_1_0_0_0")
    assert disk.facts == (Scsi(1, 0, 0, 0, "disk", "naa.5000c50000000001"),)
    assert (disk.vendor, disk.product, disk.serial, disk.driver) == ("QEMU", "QEMU HARDDISK", "SN000001", "sd")
    block = listener.device("block_sdb")
    assert block.facts == (Block("/dev/sdb", 20_000_000_000, "8:16"),)
    assert (block.label, block.parent, block.device_nodes) == ("Disk, 20.0 GB", "scsi_1_0_0_0", ("/dev/sdb",))


@needs_preload
def test_nodes_of_functions(host: MockHost, listen: Listen) -> None:
    host.furnish()
    host.change(host.path("sdb"), {"DEVLINKS": "/dev/disk/by-path/z /dev/disk/by-id/a"})
    host.change(host.path("event0"), {"DEVLINKS": "/dev/input/by-id/usb-keyboard-event-kbd"})
    listener = listen()
    keyboard = listener.device("input_input0")
    assert keyboard.device_nodes == ("/dev/input/event0", "/dev/input/by-id/usb-keyboard-event-kbd")
    assert keyboard.keyboard_of == "seat0"
    assert listener.device("sound_card0").device_nodes == ("/dev/snd/controlC0",)
    assert listener.device("block_sdb").device_nodes == ("/dev/sdb", "/dev/disk/by-id/a", "/dev/disk/by-path/z")
    assert listener.device("net_enp1s0").facts == (Net("enp1s0", "52:54:00:00:00:10", 2),)


@needs_preload
def test_mediated_devices_and_their_parents(host: MockHost, listen: Listen) -> None:
    mtty = host.add("mtty", "/sys/devices/virtual/mtty/mtty")
    host.mdev_types(mtty, {"mtty-2": ("Dual port serial", 11)})
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    host.mdev(mtty, uuid, "mtty-2")
    gpu = host.pci("0000:00:02.0", class_code=0x030000)
    host.mdev_types(gpu, {"i915-GVTg_V5_4": ("", 1)})
    listener = listen()
    parent, made = listener.device("mdev_parent_mtty"), listener.device(f"mdev_{uuid.replace('-', '_')}_mtty")
    assert (parent.parent, made.parent) == (None, "mdev_parent_mtty")
    assert parent.facts == (MdevParent((MdevType("mtty-2", "Dual port serial", 11),)),)
    assert made.facts == (Mdev(uuid, "mtty-2"),)
    assert made.label == "Dual port serial"
    assert listener.device("pci_0000_00_02_0").facts[1:] == (MdevParent((MdevType("i915-GVTg_V5_4", "", 1),)),)


@needs_preload
def test_a_driver_of_mediated_devices_comes_and_goes(host: MockHost, listen: Listen) -> None:
    mtty = host.add("mtty", "/sys/devices/virtual/mtty/mtty")
    listener = listen()
    assert listener.scanned.devices == ()
    host.mdev_types(mtty, {"mtty-2": ("", 12)})
    assert [event.device.name for event in seen(listener.settle())] == ["mdev_parent_mtty"]
    host.write(mtty, "mdev_supported_types/mtty-2/available_instances", "11")
    made = host.mdev(mtty, "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "mtty-2")
    assert seen(listener.settle())[-1].device.facts == (MdevParent((MdevType("mtty-2", "", 11),)),)
    host.remove(made)
    host.remove(mtty)
    assert [event.sysfs_path for event in gone(listener.settle())] == [made, mtty]


@needs_preload
def test_what_is_not_in_the_tree(host: MockHost, listen: Listen) -> None:
    host.add("net", "/sys/devices/virtual/net/br0")
    host.add("block", "/sys/devices/virtual/block/dm-0", properties={"DEVTYPE": "disk"})
    card = host.add("drm", "/sys/devices/pci0000:00/0000:00:02.0/drm/card0")
    host.add("drm", f"{card}/card0-HDMI-A-1")
    host.add("drm", "/sys/devices/pci0000:00/0000:00:02.0/drm/renderD128")
    host.add("block", "/sys/devices/pci0000:00/nvme/nvme0/nvme0c0n1", {"hidden": "1"}, {"DEVTYPE": "disk"})
    host.add("bsg", "/sys/devices/pci0000:00/bsg/0:0:0:0")
    assert [device.name for device in listen().scanned.devices] == ["drm_card0"]


# What devices claim.


@needs_preload
def test_hostile_strings_and_unreadable_files(host: MockHost, listen: Listen) -> None:
    host.usb_controller(host.pci("0000:00:14.0"), 1)
    path = host.plug_usb("1-1", serial=b"A\0B\x1b[2J\n", manufacturer=b"\xff\xfe", name="\u202egnp.exe" + "x" * 5000)
    (host.root / path[1:] / "bDeviceClass").unlink()
    (host.root / path[1:] / "bDeviceClass").mkdir()  # reading it fails, also for root
    listener = Listener(host.environment())
    device = listener.device("usb_1_1")
    assert (device.serial, device.vendor) == ("AB[2J", "\ufffd\ufffd")
    assert device.product == "gnp.exe" + "x" * 249
    assert device.usb and device.usb.device_class == 0
    listener.ask("scan")
    assert listener.stop().count("bDeviceClass") == 1


# What happens.


def seen(events: list[Event]) -> list[DeviceSeen]:
    return [event for event in events if isinstance(event, DeviceSeen)]


def gone(events: list[Event]) -> list[DeviceGone]:
    return [event for event in events if isinstance(event, DeviceGone)]


@needs_preload
def test_plug_and_unplug(host: MockHost, listen: Listen) -> None:
    host.furnish()
    listener = listen()
    path = host.plug_usb_disk("2-1", "NEW")
    events = seen(listener.settle())
    names = list(dict.fromkeys(event.device.name for event in events))
    assert names == ["usb_2_1", "usb_2_1__1_0", "scsi_host2", "scsi_target2_0_0", "scsi_2_0_0_0",
                     "scsi_generic_sg2", "block_sdc"]  # fmt: skip
    last = {event.device.name: event.device for event in events}
    assert last["usb_2_1"].serial == "NEW"
    assert last["usb_2_1"].driver == "usb"
    assert last["block_sdc"].parent == "scsi_2_0_0_0"
    host.unplug(path)
    paths = [event.sysfs_path for event in gone(listener.settle())]
    assert len(paths) == 7
    assert paths[-1] == path
    again = host.plug_usb("2-1", serial="NEW")
    device = seen(listener.settle())[-1].device
    assert (again, device.usb and device.usb.number) == (path, 3)


@needs_preload
def test_interfaces_are_known_before_they_are_there(host: MockHost, listen: Listen) -> None:
    host.usb_controller(host.pci("0000:00:14.0"), 1)
    listener = listen()
    host.plug_usb("1-1", interfaces=("03:01:01", "03:01:01"))
    interfaces = [event.device.usb.interfaces for event in seen(listener.settle()) if event.device.usb]
    assert interfaces[-1] == ("03:01:01", "03:01:01")
    assert () not in interfaces


@needs_preload
def test_report_descriptors_are_read_when_their_driver_has_come(host: MockHost, listen: Listen) -> None:
    host.usb_controller(host.pci("0000:00:14.0"), 1)
    listener = listen()
    key = host.plug_usb("1-1", 0xABCD, 1, interfaces=("03:00:00",), driver="")
    assert [usb.marks for usb in _usb_seen(listener)][-1] == ()
    host.write(f"{key}/1-1:1.0", "0003:ABCD:0001.0001/report_descriptor", b"\x06\xd0\xf1\x09\x01\xa1\x01\xc0")
    host.set_driver(f"{key}/1-1:1.0", "usbhid")
    assert [usb.marks for usb in _usb_seen(listener)] == [("fido",)]


def _usb_seen(listener: Listener) -> list[Usb]:
    return [event.device.usb for event in seen(listener.settle()) if event.device.usb]


@needs_preload
def test_a_driver_goes_and_another_comes(host: MockHost, listen: Listen) -> None:
    host.furnish()
    listener = listen()
    host.set_driver(host.path("0000:01:00.0"), "")
    assert [event.device.driver for event in seen(listener.settle())] == [""]
    host.set_driver(host.path("0000:01:00.0"), "vfio-pci")
    assert [(event.device.name, event.device.driver) for event in seen(listener.settle())] == [
        ("pci_0000_01_00_0", "vfio-pci")
    ]


@needs_preload
def test_an_interface_gets_another_name(host: MockHost, listen: Listen) -> None:
    host.furnish()
    listener = listen()
    old = host.path("enp1s0")
    new = host.rename_net(old, "lan0")
    left, came = listener.settle()
    assert left == DeviceGone(old)
    assert isinstance(came, DeviceSeen)
    assert (came.device.name, came.device.sysfs_path, came.device.parent) == ("net_lan0", new, "pci_0000_01_00_0")


@needs_preload
def test_what_happens_between_arming_and_scanning_is_not_lost(host: MockHost, listen: Listen) -> None:
    host.furnish()
    listener = listen(scan=False)
    path = host.plug_usb("2-1")
    host.unplug(host.path("1-1.3"))
    scanned, *events = listener.ask("scan") + listener.settle()
    assert isinstance(scanned, DevicesScanned)
    assert "usb_2_1" in {device.name for device in scanned.devices}
    assert {event.device.sysfs_path for event in seen(events)} == {path, f"{path}/2-1:1.0"}
    assert gone(events) == []


@needs_preload
def test_a_scan_makes_good_what_no_uevent_told(host: MockHost, listen: Listen) -> None:
    host.furnish()
    listener = listen()
    host.remove(host.path("1-1.3"), event=False)
    assert listener.settle() == []
    (scanned,) = listener.ask("scan")
    assert isinstance(scanned, DevicesScanned)
    before, after = ({device.name for device in scan.devices} for scan in (listener.scanned, scanned))
    assert before - after == {"usb_1_1_3", "usb_1_1_3__1_0"}


@needs_preload
def test_a_device_that_has_gone_before_it_is_read(host: MockHost, listen: Listen) -> None:
    host.furnish()
    listener = listen()
    path = host.path("1-1.3")
    host.remove(path, event=False)
    host.event(path, "change", {"DEVTYPE": "usb_device"}, subsystem="usb")
    assert listener.settle() == []


@needs_preload
def test_a_storm_is_all_there_once_settled(host: MockHost, listen: Listen) -> None:
    host.furnish()
    listener = listen()
    path = host.path("0000:01:00.0")
    for _ in range(300):
        host.event(path, "change")
    assert len(seen(listener.settle())) == 300


@needs_preload
def test_host_uses_can_change_with_block_and_network_devices(host: MockHost, listen: Listen) -> None:
    host.furnish()
    listener = listen()
    listener.settle()
    before = listener.uses_changed
    host.event(host.path("0000:01:00.0"), "change")
    listener.settle()
    assert listener.uses_changed == before
    host.add("block", "/sys/devices/virtual/block/dm-0", properties={"DEVTYPE": "disk"})
    assert listener.settle() == []
    assert listener.uses_changed == before + 1


# Beside a real udevd, alone with it in namespaces of its own.

REAL = """
mount -t tmpfs none /run && mount -t sysfs none /sys && mount -t tmpfs none {rules} || exit 77
mkdir -p /run/udev
{udevd} 2>/dev/null &
export UDEVD=$!
for _ in $(seq 100); do [ -e /run/udev/control ] && break; sleep 0.05; done
{python} {test} real
code=$?
kill -9 $UDEVD
exit $code
"""


@pytest.mark.skipif(os.geteuid() != 0 or not UDEVD, reason="needs root and udevd")
def test_beside_a_real_udevd() -> None:
    rules = next((path for path in ("/usr/lib/udev/rules.d", "/lib/udev/rules.d") if os.path.isdir(path)), "/mnt")
    script = REAL.format(udevd=UDEVD, python=sys.executable, test=__file__, rules=rules)
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", script],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no namespaces here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr


def _poke(path: str, count: int) -> None:
    for _ in range(count):
        with open(f"{path}/uevent", "w") as file:
            file.write("change")


async def _real() -> None:
    """What the test above runs in its namespaces."""
    from hostpassd.errors import TimedOut
    from hostpassd.host.udev import Udev

    loop = asyncio.get_running_loop()
    events: list[Event] = []
    udev = Udev(events.append)
    udev.arm()
    assert udev.settling is not None
    scanned = await udev.scan()
    path = next(device.sysfs_path for device in scanned.devices if device.kind == "pci")
    for count in (1, 10, 500):
        events.clear()
        await asyncio.to_thread(_poke, path, count)
        await udev.settled(loop.time() + 30)
        assert len(seen(events)) == count, (count, len(events))
    # An overflow: one scan, and the count goes on.
    events.clear()
    assert udev.monitor is not None
    with socket.socket(fileno=os.dup(udev.monitor.fileno())) as handle:
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    _poke(path, 2000)
    await asyncio.to_thread(_drain_udevd)
    await udev.settled(loop.time() + 30)
    assert any(isinstance(event, DevicesScanned) for event in events)
    events.clear()
    _poke(path, 1)
    await udev.settled(loop.time() + 30)
    assert len(seen(events)) == 1
    # udevd killed over its queue: nothing more to come, and said so.
    os.kill(int(os.environ["UDEVD"]), 19)
    _poke(path, 3)
    Path("/run/udev/queue").touch()
    os.kill(int(os.environ["UDEVD"]), 9)
    try:
        await udev.settled(loop.time() + 2)
        raise AssertionError("settled over a stale queue")
    except TimedOut:
        pass
    Path("/run/udev/queue").unlink()
    await udev.settled(loop.time() + 5)
    udev.close()


def _drain_udevd() -> None:
    subprocess.run(["udevadm", "settle", "--timeout=30"], check=False)


# The listener's process.


class Lock:
    """What files of the kernel hang at: whoever opens them, or looks their devices up, waits."""

    def __init__(self) -> None:
        self._hanging: set[str] = set()
        self._told: tuple[str, ...] = ()
        self._news = asyncio.Event()
        self._free = threading.Event()
        self._open, self._look_up = os.open, pyudev.Devices.from_sys_path

    def hang(self, path: str) -> None:
        from hostpassd.host import reading

        reading.PATIENCE, reading._LOOK = 0.5, 0.1
        self._hanging.add(path)

        def open_file(path: Any, *rest: Any, **more: Any) -> int:
            self._wait(path)
            return self._open(path, *rest, **more)

        def look_up(context: Any, path: str) -> Any:
            self._wait(path)
            return self._look_up(context, path)

        os.open, pyudev.Devices.from_sys_path = open_file, look_up

    async def answer(self) -> None:
        """Returns when all that hung is known to answer again."""
        self._hanging.clear()
        self._free.set()
        while self._told:
            await self._news.wait()
            self._news.clear()

    def told(self, files: tuple[str, ...]) -> None:
        self._told = files
        self._news.set()

    def _wait(self, path: object) -> None:
        if path in self._hanging:
            self._free.wait()


async def _listener(commands: IO[bytes], answers: IO[bytes]) -> None:
    from hostpassd.host.reading import Reader
    from hostpassd.host.udev import Udev

    loop = asyncio.get_running_loop()
    events: list[Event] = []
    changes: list[Any] = []
    lock = Lock()
    udev = Udev(events.append, lambda: changes.append(None), Reader(lock.told))
    while (command := (await loop.run_in_executor(None, commands.readline)).strip()) != b"quit":
        if command == b"arm":
            udev.arm()
        elif command.startswith(b"hang "):
            lock.hang(command.decode().partition(" ")[2])
        elif command == b"answer":
            await lock.answer()
        elif command == b"scan":
            await udev.scan()
        else:
            await udev.settled(loop.time() + 10)
        pickle.dump((events, len(changes)), answers)
        answers.flush()
        events.clear()
    udev.close()


if __name__ == "__main__":
    import logging

    logging.basicConfig()
    if sys.argv[1:] == ["real"]:
        asyncio.run(_real())
    else:
        asyncio.run(_listener(sys.stdin.buffer, sys.stdout.buffer))
