"""A small world for the logic's tests: devices, and a hypervisor that behaves as libvirt was seen to."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable

from hostpassd import errors, names
from hostpassd.machines.domain_xml import claim_of
from hostpassd.model.device import Block, Device, Input, Mdev, Net, Pci, Scsi, Usb, device_name
from hostpassd.model.events import (
    DeviceAdded,
    DeviceGone,
    DeviceSeen,
    DevicesScanned,
    Event,
    HypervisorChanged,
    MachineGone,
    MachineRead,
    MachinesListed,
)
from hostpassd.model.job import Job
from hostpassd.model.machine import Claim, Machine, MachineKey, Ports
from hostpassd.passthrough.assign import Assign
from hostpassd.passthrough.dismiss import Dismiss
from hostpassd.passthrough.request import Request
from hostpassd.state import State
from tests.sim import truth

URI = "qemu:///system"
UUID = "11111111-2222-3333-4444-555555555555"
OTHER = "99999999-2222-3333-4444-555555555555"
KEY = MachineKey(URI, UUID)
VERSION = 10_000_000  # of libvirt


REQUESTS: dict[str, type[Request]] = {"assign": Assign, "dismiss": Dismiss}


def error_name(job: Job) -> str:
    """The whole name of the error that JOB ended with, '' for none."""
    return names.error_name(job.error) if job.error else ""


def pci(
    address: str,
    parent: Device | None = None,
    *,
    driver: str = "e1000e",
    code: int = 0x020000,
    group: int = -1,
    header: int = 0,
    physical: Device | None = None,
    **facts: object,
) -> Device:
    """A PCI function; in a group of its own number unless GROUP says otherwise."""
    own = Pci(
        address=address,
        class_code=code,
        class_name="",
        vendor_id=0x8086,
        device_id=0x10D3,
        subsystem_vendor_id=0,
        subsystem_device_id=0,
        revision=0,
        header_type=header,
        iommu_group=group,
        numa_node=-1,
        reset_methods=(),
        boot_display=False,
        physical_function=physical.name if physical else None,
        max_virtual_functions=0,
        off_bus=False,
    )
    own = dataclasses.replace(own, **facts)  # type: ignore[arg-type]
    return _device("pci", address, parent, own, driver=driver, label=address)


def bridge(address: str, parent: Device | None = None, group: int = 0) -> Device:
    """A PCI bridge on pcieport."""
    return pci(address, parent, driver="pcieport", code=0x060400, group=group, header=1)


def usb(
    port: str,
    parent: Device | None = None,
    *,
    number: int = 2,
    vendor: int = 0x46F4,
    product: int = 0x0001,
    device_class: int = 0,
    serial: str = "",
) -> Device:
    """A USB device on bus 1."""
    own = Usb(1, number, port, vendor, product, device_class, 480, ("08:06:50",))
    return _device("usb", port, parent, own, driver="usb", label=f"stick {serial or port}", serial=serial)


def scsi(host: int, channel: int, target: int, lun: int, parent: Device | None = None) -> Device:
    """A SCSI disk."""
    return _device(
        "scsi", f"{host}:{channel}:{target}:{lun}", parent, Scsi(host, channel, target, lun, "disk", ""), driver="sd"
    )


def block(name: str, parent: Device) -> Device:
    """A whole disk."""
    return _device("block", name, parent, Block(f"/dev/{name}", 1 << 30), nodes=(f"/dev/{name}",))


def net(name: str, parent: Device) -> Device:
    """A network interface."""
    return _device("net", name, parent, Net(name, "52:54:00:00:00:01"))


def keyboard(name: str, parent: Device, seat: str = "seat0") -> Device:
    """The input device of a keyboard."""
    return _device("input", name, parent, Input(seat))


def mdev(uuid: str, parent: Device) -> Device:
    """A mediated device of PARENT."""
    device = _device("mdev", uuid, parent, Mdev(uuid, "sim-1"))
    return dataclasses.replace(device, name=device_name("mdev", uuid, parent.sysfs_path.rpartition("/")[2]))


def _device(
    kind: str,
    kernel: str,
    parent: Device | None,
    facts: Pci | Usb | Scsi | Block | Net | Input | Mdev,
    *,
    driver: str = "",
    label: str = "",
    serial: str = "",
    nodes: tuple[str, ...] = (),
) -> Device:
    path = f"{parent.sysfs_path if parent else '/sys/devices/pci0000:00'}/{kernel}"
    name = device_name(kind, kernel)
    parent_name = parent.name if parent else None
    return Device(name, kind, path, parent_name, nodes, driver, label or kernel, serial=serial, facts=(facts,))


def state_of(*devices: Device) -> State:
    """A state with these devices, parents first."""
    state = State()
    state.apply(DevicesScanned(devices))
    return state


def hostdev(device: Device, alias: str = "hostdev0", *, config: bool = False) -> Claim:
    """The claim that a <hostdev> of DEVICE makes in the live half, or in the stored one."""
    from hostpassd.machines.domain_xml import hostdev_xml

    return claim_of(hostdev_xml(device, alias=alias, config=config, unique=True))


_PORTS = Ports((1, 2, 3, 4, 5), tuple((6, slot) for slot in range(1, 32)))


def machine(
    name: str = "vm",
    uuid: str = UUID,
    *,
    running: bool = True,
    persistent: bool = True,
    live: tuple[Claim, ...] = (),
    config: tuple[Claim, ...] = (),
    uri: str = URI,
) -> Machine:
    """A machine of the hypervisor URI."""
    state = "running" if running else "shut off"
    return Machine(
        uuid, name, uri, state, persistent, live, config, ports=_PORTS if running else Ports(), config_ports=_PORTS
    )


class Stuck:
    """A call that does not return."""

    def __init__(self, about: str, lock: str, effect: Callable[[], None]) -> None:
        self.about, self.lock, self.effect = about, lock, effect
        self.given_up = False
        self.returned: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self, error: errors.HostpassError | None) -> None:
        """It returns; nobody needs to wait for it any more."""
        if error:
            self.returned.set_exception(error)
            self.returned.exception()
        else:
            self.returned.set_result(None)


class PromptHost(truth.Host):
    """A host whose uevents are TOLD at once. What others tell a daemon of it, it has to `hear`, too."""

    def __init__(self, tell: Callable[[Event], None], devices: Iterable[Device]) -> None:
        super().__init__(*devices)
        self._tell = tell

    def plug(self, device: Device) -> None:
        super().plug(device)
        self._pass_on()

    def unplug(self, device: Device, parent_first: bool = False) -> None:
        super().unplug(device, parent_first)
        self._pass_on()

    def _pass_on(self) -> None:
        while self.notices:
            if event := self.deliver():
                self._tell(event)

    def hear(self, event: Event) -> None:
        """A test tells EVENT as the host's: so it is."""
        match event:
            case DeviceSeen(device):
                self.home.setdefault(device.name, device.driver)
                self.present[device.sysfs_path] = device
            case DeviceGone(path):
                for gone in [place for place in self.present if place == path or place.startswith(path + "/")]:
                    del self.present[gone]


class Libvirt(truth.Libvirt):
    """The same libvirt, which tells everything at once, and of which every call can go wrong.

    `before` and `after` are called with each call's name, around its effect. `refuse_calls`: libvirt's words, by call;
    `fails`: whether a call is refused; `hang`: whether a call is taken, and its effect comes later, when something
    waits for it; `stick`: whether a call does not return until `let_go`. `withhold` swallows DeviceAdded, `stubborn` is
    a deaf guest.
    """

    def __init__(
        self, devices: Iterable[Device], emit: Callable[[Event], None], *machines: Machine, uri: str = URI
    ) -> None:
        self.host_told = PromptHost(self._tell_of_host, devices)
        super().__init__(self.host_told)
        self.emit = emit
        self.uri = uri
        self.machines = {m.uuid: m for m in machines}
        self.calls: list[str] = []
        self.withhold = False
        self.ports = 5
        self.hanging: list[tuple[str, Callable[[], None]]] = []
        self.stuck: list[Stuck] = []
        self.calm()
        self.come_back()

    @property
    def taken(self) -> dict[str, tuple[str, str]]:
        """By sysfs path which machine has a device, as which alias: as the machines are, whoever made them so."""
        found: dict[str, tuple[str, str]] = {}
        for machine in self.machines.values():
            for claim in machine.live:
                if (device := self.find(claim)) and not claim.missing:
                    found[device.sysfs_path] = (machine.uuid, claim.alias)
        return found

    @taken.setter
    def taken(self, value: dict[str, tuple[str, str]]) -> None:
        """It follows from the machines."""

    @property
    def home(self) -> dict[str, str]:
        """The host drivers."""
        return self.host.home

    @property
    def stubborn(self) -> bool:
        """Whether no guest answers."""
        return self.mood == "late"

    @stubborn.setter
    def stubborn(self, value: bool) -> None:
        self.mood = "late" if value else "prompt"

    # The connection.

    def lose(self) -> None:
        """The connection is lost: nothing is told any more. libvirt is still at what it was at."""
        self.connected = False
        for call in self.stuck:
            self.hanging.append((call.lock, call.effect))
            call.end(errors.HypervisorUnavailable("the connection to libvirt was lost"))
        self.stuck.clear()
        self.emit(HypervisorChanged(self.uri, False, "libvirt has closed the connection"))

    def come_back(self) -> None:
        """It is there again, and all machines are listed."""
        self.connected = True
        self.emit(HypervisorChanged(self.uri, True, version=VERSION))
        self.emit(MachinesListed(self.uri, tuple(self.machines.values())))

    def calm(self) -> None:
        """From here on every call works."""
        self.refuse_calls: dict[str, str] = {}
        self.fails: Callable[[str], bool] = lambda call: False
        self.hang: Callable[[str], bool] = lambda call: False
        self.stick: Callable[[str], bool] = lambda call: False
        self.before: Callable[[str], None] = lambda call: None
        self.after: Callable[[str], None] = lambda call: None

    def finish(self, *locks: str) -> None:
        """The calls that hang at these locks (none given: all) come to their end."""
        for lock, effect in list(self.hanging):
            if not locks or lock in locks:
                self.hanging.remove((lock, effect))
                with contextlib.suppress(errors.HostpassError):
                    effect()

    def let_go(self, outcome: str) -> None:
        """The calls that are stuck return: done, refused, or both, done and then refused."""
        stuck, self.stuck = self.stuck, []
        for call in stuck:
            error = errors.HypervisorRefused("libvirt refused: it was stuck.") if outcome != "done" else None
            if outcome != "refused":
                with contextlib.suppress(errors.HostpassError):
                    call.effect()
            call.end(error)

    async def wait_until_returned(self, names: Collection[str]) -> None:
        while stuck := [call.returned for call in self.stuck if call.about in names]:
            await asyncio.wait(stuck)

    async def wait_until_idle(self, uuid: str) -> None:
        await self._call("wait_until_idle", uuid, lambda: self._read(uuid))

    async def refresh(self) -> None:
        await asyncio.sleep(0)
        self._check_connected()
        self.come_back()

    def store(self, uuid: str, claim: Claim) -> None:
        """Somebody stores CLAIM."""
        self._store(uuid, claim)

    # What it tells.

    def touch(self, uuid: str, event: Event | None = None) -> None:
        """The machine is read, and EVENT told, at once."""
        if event is None:
            machine = self.machines.get(uuid)
            self._tell(MachineRead(machine) if machine else MachineGone(MachineKey(self.uri, uuid)))
        elif not (self.withhold and isinstance(event, DeviceAdded)):
            self._tell(event)

    def _read(self, uuid: str) -> None:
        self.touch(self._machine(uuid).uuid)

    def _tell(self, event: Event) -> None:
        if self.connected:
            self.emit(event)

    def _tell_of_host(self, event: Event) -> None:
        self.emit(event)

    def _ports(self, machine: Machine) -> Ports:
        return machine.ports

    # How a call goes.

    async def _call(self, name: str, uuid: str, effect: Callable[[], None], about: str = "") -> None:
        """One that is about a node device, and not a machine, takes the lock of the list of host devices."""
        lock = uuid or "host"
        self._check_connected()
        self.finish(lock)
        self.calls.append(name)
        if self.hang(name):
            self.hanging.append((lock, effect))
        if self.stick(name):
            stuck = Stuck(about or lock, lock, effect)
            self.stuck.append(stuck)
            try:
                await asyncio.wait({stuck.returned})
            except asyncio.CancelledError:
                stuck.given_up = True
                raise
            return stuck.returned.result()
        self.before(name)
        self._check_connected()
        if name in self.refuse_calls or self.fails(name):
            words = self.refuse_calls.get(name, name + " was told to fail")
            raise errors.HypervisorRefused(f"libvirt refused: {words}.")
        effect()
        self.after(name)
        await asyncio.sleep(0)  # as every real call does, it lets others go first
        self._check_connected()

    def _check_connected(self) -> None:
        if not self.connected:
            raise errors.HypervisorUnavailable("the connection to libvirt was lost")
