"""The daemon on a made-up host that is worth a look, as a program of ./dev run --simulated:

    python3 -m tests.sim.demo BUS_ADDRESS STATE_FOLDER

The devices are those of a tree that umockdev shows in place of /sys, read by the daemon's own code. What becomes of
them then, the machines and their guests are simulated. The guest of `web` takes three seconds to let go of a device,
and refuses the first time; a stick comes and goes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hostpassd import bus

bus.leave_out_glib()

from hostpassd.base.logs import Lines  # noqa: E402
from hostpassd.base.tasks import Tasks  # noqa: E402
from hostpassd.config import Config  # noqa: E402
from hostpassd.daemon import Daemon  # noqa: E402
from hostpassd.ends import Ends, Inlet  # noqa: E402
from hostpassd.host.udev import Udev  # noqa: E402
from hostpassd.machines.domain_xml import claim_of, hostdev_xml  # noqa: E402
from hostpassd.model.device import Device  # noqa: E402
from hostpassd.model.events import DevicesScanned, Event, HostUse, host_use  # noqa: E402
from hostpassd.model.machine import Claim, Machine  # noqa: E402
from tests.bus.mockhost import MockHost  # noqa: E402
from tests.sim import truth, world  # noqa: E402

URI = "sim:///demo"
STICK = "1-3"  # where the stick that comes and goes is
GUEST_TAKES = 3.0  # seconds to let go, or to refuse
STICK_STAYS = 10.0  # seconds, here or away

WEB, BUILD, DESKTOP = (f"{digit * 8}-2222-4333-8444-555555555555" for digit in "abc")

# What the host uses its devices for.
USES: dict[str, tuple[HostUse, ...]] = {
    "net_eno1": (
        host_use("address", addresses=("192.0.2.10/24",)),
        host_use("default-route", routes=("default via 192.0.2.1",)),
    ),
    "block_nvme0n1": (
        host_use("mount", system=True, mount_points=("/", "/boot"), volumes=("/dev/nvme0n1p2",)),
        host_use("swap", system=True, volumes=("LVM volume host-swap on /dev/nvme0n1p3",)),
    ),
    "block_sdb": (host_use("mount", mount_points=("/srv/backup",), volumes=("LUKS backup on /dev/sdb1",)),),
}

CAMERA = ("0e:01:00", "0e:02:00", "01:01:00")
MOUSE = ("03:01:02",)
FIDO = ("03:00:00", "0b:00:00")
BLUETOOTH = ("e0:01:01",)


def furnish(mock: MockHost) -> None:
    """One of each, and what else a workstation has."""
    mock.furnish()
    onboard = mock.pci("0000:00:19.0", device=0x153A, group=8, driver="e1000e")
    mock.net(onboard, "eno1", "52:54:00:00:00:19", 9)
    disk = mock.pci("0000:00:1d.0", vendor=0x144D, device=0xA808, class_code=0x010802, group=9, driver="nvme")
    controller = mock.add("nvme", f"{disk}/nvme/nvme0", {"dev": "240:0"}, {"DEVNAME": "nvme0"})
    mock.disk(controller, "nvme0n1", 259, 0, 512_110_190_592)
    wireless = mock.pci("0000:00:14.3", device=0x02F0, class_code=0x028000, group=15, driver="iwlwifi")
    mock.net(wireless, "wlan0", "52:54:00:00:00:14", 10)
    adapter = mock.path("target1:0:0")
    mock.lun(adapter, 1, "SEAGATE", "ST4000NM0023", 4_000_787_030_016)
    mock.mdev_types(mock.path("0000:00:02.0"), {"i915-GVTg_V5_4": ("GVTg_V5_4", 1)})
    mock.mdev(mock.path("0000:00:02.0"), "5d2f1a4e-8f0c-4d0b-9d6a-0c6c1b2a3d4e", "i915-GVTg_V5_4")
    mock.plug_usb("1-4", 0x046D, 0xC077, "", "Logitech", "USB Optical Mouse", MOUSE, "1", "usbhid")
    mock.plug_usb("1-5", 0x046D, 0x085E, "8A2C3F10", "Logitech", "BRIO", CAMERA, "480", "uvcvideo")
    mock.plug_usb("1-6", 0x1050, 0x0407, "", "Yubico", "YubiKey OTP+FIDO+CCID", FIDO, "12", "usbhid")
    mock.plug_usb("1-7", 0x8087, 0x0029, "", "", "", BLUETOOTH, "12", "btusb")
    stick = mock.plug_usb(STICK, 0x0951, 0x1666, "E0D55EA573F0", "Kingston", "DataTraveler 3.0", speed="480")
    mock.scsi_disk(f"{stick}/{STICK}:1.0", "Kingston", "DataTraveler 3.0", 31_004_295_168)


async def read_devices() -> tuple[Device, ...]:
    """All devices of the tree, parents first."""
    found: list[Event] = []
    await Udev(found.append).scan()
    return next(event.devices for event in found if isinstance(event, DevicesScanned))


class Guests(world.Libvirt):
    """The machines. Whoever is asked to let go thinks about it; the first of all answers is a refusal."""

    def __init__(self, devices: Sequence[Device], emit: Callable[[Event], None], *machines: Machine) -> None:
        super().__init__(devices, emit, *machines, uri=URI)
        self.stubborn = True  # it answers, but later
        self._has_refused = False

    async def run(self) -> None:
        """A daemon connects."""
        self.come_back()

    def _ask(self, uuid: str, alias: str) -> None:
        super()._ask(uuid, alias)
        asyncio.get_running_loop().call_later(GUEST_TAKES, self._answer, uuid, alias)

    def _answer(self, uuid: str, alias: str) -> None:
        if self._has_refused:
            self.release(uuid, alias)
        else:
            self._has_refused = True
            self.refuse(uuid, alias)


class Demonstration:
    """A host, its machines, and a daemon's ends at both. Nothing is told before the daemon has asked for the host."""

    def __init__(self, devices: Sequence[Device], bus_address: str, state_folder: Path) -> None:
        self._named = {device.name: device for device in devices}
        self._inlet = Inlet()
        self._is_told = False
        self._guests = Guests(devices, self._tell, *self._machines())
        self._host = self._guests.host_told
        self._host.uses = dict(USES)
        for uuid in (WEB, BUILD):
            self._guests.start(uuid)
        self._end = truth.HostEnd(self._host, truth.Ear(self._tell))
        self.ends = Ends(self._inlet, self, {URI: self._guests}, lambda uri: None, state_folder, bus_address)
        self.scan, self.settled, self.read_uses = self._end.scan, self._end.settled, self._end.read_uses

    async def start(self) -> None:
        """The daemon asks for the host."""
        self._is_told = True
        await self._end.start()

    async def play(self) -> None:
        """The stick comes and goes, unless a machine has it."""
        stick = self._named[f"usb_{STICK.replace('-', '_')}"]
        line = [stick, *self._host.below(stick)]
        while True:
            await asyncio.sleep(STICK_STAYS)
            if any(device.sysfs_path in self._guests.taken for device in line):
                continue
            if stick.sysfs_path in self._host.present:
                self._guests.unplug(stick, parent_first=False)
            elif self._host.has_room_for(stick):
                for device in line:
                    self._host.plug(device)

    def _tell(self, event: Event) -> None:
        if self._is_told:
            self._inlet.emit(event)

    def _machines(self) -> tuple[Machine, ...]:
        web = self._machine("web", WEB, "Web server", self._stored("pci_0000_03_10_0"), _disk("/dev/sdc"))
        build = self._machine("build", BUILD, "Nightly builds", self._stored("usb_1_5"))
        desktop = self._machine(
            "desktop",
            DESKTOP,
            "Windows with the graphics card",
            self._stored("pci_0000_02_00_0"),
            self._stored("pci_0000_02_00_1"),
            _absent_headset(),
        )
        return web, build, desktop

    def _machine(self, name: str, uuid: str, title: str, *config: Claim) -> Machine:
        made = world.machine(name, uuid, config=config, uri=URI)
        return dataclasses.replace(made, state="shut off", title=title)

    def _stored(self, name: str) -> Claim:
        return claim_of(hostdev_xml(self._named[name], alias="", config=True, unique=True))


def _disk(node: str) -> Claim:
    return claim_of(f"<disk type='block' device='disk'><source dev='{node}'/><target dev='vda' bus='virtio'/></disk>")


def _absent_headset() -> Claim:
    return claim_of(
        "<hostdev mode='subsystem' type='usb'><source startupPolicy='optional'><vendor id='0x047f'/>"
        "<product id='0xc025'/></source></hostdev>"
    )


async def main() -> None:
    """Serves until a signal."""
    address, folder = sys.argv[1:]
    shown = Demonstration(await read_devices(), address, Path(folder))
    daemon = Daemon(Config(hypervisors=(URI,)), shown.ends)
    playing = Tasks()  # a fault in it ends the daemon
    playing.start(shown.play())
    await daemon.run()
    await playing.stop()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, handlers=[Lines()])
    asyncio.run(main())
