"""A host and its hypervisor as they really are, whatever a daemon knows of it: what udev and libvirt would tell.

Nothing here looks at a daemon's state. Changes leave a notice behind; a daemon hears of them when those are delivered,
and then what is true by then, as with sysfs and libvirt.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Collection

from hostpassd import errors
from hostpassd.machines.domain_xml import claim_of, hostdev_xml
from hostpassd.model.device import Device
from hostpassd.model.events import (
    DeviceAdded,
    DeviceGone,
    DeviceRemoved,
    DeviceSeen,
    DevicesScanned,
    Event,
    HostUse,
    HostUsesRead,
    HypervisorChanged,
    MachineGone,
    MachineRead,
    MachinesListed,
    RemovalFailed,
)
from hostpassd.model.machine import Claim, Machine, MachineKey, MdevSource, PciSource, Ports, ScsiSource, UsbSource

URI = "sim:///histories"
STUBS = ("", "vfio-pci")
SAFE = (*STUBS, "pcieport")
_PORTS = 3


@dataclasses.dataclass
class Notice:
    """A uevent that udevd has not passed on yet. `path` is there now or not: that is looked up on delivery."""

    path: str
    gone: bool


class Host:
    """The devices that are plugged in, their drivers, and what the host uses them for."""

    def __init__(self, *devices: Device) -> None:
        self.present: dict[str, Device] = {}  # by sysfs path, parents first
        self.uses: dict[str, tuple[HostUse, ...]] = {}
        self.uses_due = True
        self.notices: list[Notice] = []
        self.home: dict[str, str] = {d.name: d.driver for d in devices}
        self.blame: set[str] = set()  # names of devices that others took from their driver
        self.on_gone: Callable[[str], object] = lambda path: None
        self._hidden: dict[str, list[Device]] = {}  # what a driver that is away would show below its device
        for device in devices:
            self.present[device.sysfs_path] = device

    def named(self, name: str) -> Device | None:
        """The device called NAME, if it is here."""
        return next((d for d in self.present.values() if d.name == name), None)

    def has_room_for(self, device: Device) -> bool:
        """Whether DEVICE's parent is here, and not with a driver that shows nothing below it."""
        parent = self.present.get(device.sysfs_path.rpartition("/")[0])
        return not device.parent or (parent is not None and parent.driver == self.home[parent.name])

    def below(self, device: Device) -> list[Device]:
        """What is below DEVICE, parents first."""
        return [d for d in self.present.values() if d.sysfs_path.startswith(device.sysfs_path + "/")]

    def plug(self, device: Device) -> None:
        """DEVICE appears, or is there with other values; it needs its parent."""
        self.present[device.sysfs_path] = device
        self.notices.append(Notice(device.sysfs_path, gone=False))

    def unplug(self, device: Device, parent_first: bool = False) -> None:
        """DEVICE goes, with all below it."""
        line = [*reversed(self.below(device)), device]
        for gone in reversed(line) if parent_first else line:
            del self.present[gone.sysfs_path]
            self._hidden.pop(gone.name, None)
            self.notices.append(Notice(gone.sysfs_path, gone=True))
            self.blame.discard(gone.name)
            self.on_gone(gone.sysfs_path)
            if self.uses.pop(gone.name, None):
                self.uses_due = True

    def bind(self, name: str, driver: str) -> None:
        """A driver takes the device called NAME; what another one showed below it goes, or comes back."""
        device = self.named(name)
        if device is None or device.driver == driver:
            return
        if driver == self.home[name]:
            self.plug(dataclasses.replace(device, driver=driver))
            self.blame.discard(name)
            for child in self._hidden.pop(name, []):
                self.plug(child)
        else:
            if device.driver == self.home[name]:
                self._hide(device)
            self.plug(dataclasses.replace(device, driver=driver))

    def lend(self, name: str, away: bool) -> None:
        """The functions of a device without a change of driver (USB, SCSI) go, or come back."""
        device = self.named(name)
        if device and away:
            self._hide(device)
        elif device:
            for child in self._hidden.pop(name, []):
                self.plug(child)

    def _hide(self, device: Device) -> None:
        below = self.below(device)
        for child in [d for d in below if d.parent == device.name]:
            self.unplug(child)
        self._hidden[device.name] = below

    # --- what a daemon hears ---

    def scan(self) -> DevicesScanned:
        """Everything, parents first."""
        return DevicesScanned(tuple(sorted(self.present.values(), key=lambda d: d.sysfs_path.count("/"))))

    def deliver(self, choose: Callable[[int], int] = lambda count: 0) -> Event | None:
        """What udevd passes on next: any that needs not wait for an earlier one of the same line of devices."""
        free = [n for i, n in enumerate(self.notices) if not any(_related(n, e) for e in self.notices[:i])]
        if not free:
            return None
        notice = free[choose(len(free))]
        self.notices = [n for n in self.notices if n is not notice]
        if notice.path.rpartition("/")[2][:2] in ("sd", "en"):  # disks and network interfaces
            self.uses_due = True
        if notice.gone:
            return DeviceGone(notice.path)
        device = self.present.get(notice.path)
        return DeviceSeen(device) if device else None

    def read_uses(self) -> HostUsesRead:
        """What the host uses its devices for."""
        self.uses_due = False
        disks = [d for d in self.present.values() if d.kind == "block"]
        return HostUsesRead(dict(self.uses), {f"{d.device_nodes[0]}1": (d.name,) for d in disks})


def _related(one: Notice, other: Notice) -> bool:
    long, short = sorted((one.path, other.path), key=len, reverse=True)
    return long == short or long.startswith(short + "/")


class Libvirt:
    """A hypervisor that does on HOST what runs of libvirt and VFIO were seen to do, with machines of all moods.

    A managed device goes to vfio-pci as it is attached; an attach while a group member is on a host driver fails; a
    node device that was detached stays on vfio-pci until it is re-attached; a host driver cannot bind while a group
    member is in a machine.

    `moods`: what the guest of a machine does when it is asked to let go: prompt, late, refuse. `fail`: the names of
    the calls that fail next, once each. `stalled`: calls wait for `resume`, before or after their effect, and whoever
    gives them up changes nothing of that. `late`: events come later than the readings that show their effects.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.uri = URI
        host.on_gone = lambda path: self.taken.pop(path, None)
        self.machines: dict[str, Machine] = {}
        self.due: dict[str, list[Event]] = {}
        self.moods: dict[str, str] = {}
        self.mood = "prompt"  # of the other guests
        self.ports = _PORTS
        self.asked: dict[tuple[str, str], None] = {}
        self.taken: dict[str, tuple[str, str]] = {}  # by sysfs path: which machine has it live, as which alias
        self.detached: set[str] = set()
        self.connected = True
        self.fail: set[str] = set()
        self.late = False
        self.stalled = ""  # "", before, after
        self.ear: Ear | None = None
        self._gates: list[asyncio.Future[None]] = []
        self._calls: dict[asyncio.Task[None], str] = {}  # under way, and which machine or device they are about
        self._given_up: set[asyncio.Task[None]] = set()  # of these
        self._events: list[tuple[str, Event]] = []

    # --- what is asked of it ---

    async def run(self) -> None:
        """A daemon connects."""
        if self.connected:
            self.list_all()
        else:
            self.lose()

    async def attach_live(self, uuid: str, xml: str) -> None:
        """Attaches to a running machine."""
        await self._call("attach_live", uuid, lambda: self._attach(uuid, claim_of(xml)))

    async def attach_config(self, uuid: str, xml: str) -> None:
        """Adds to a stored configuration."""
        await self._call("attach_config", uuid, lambda: self._store(uuid, claim_of(xml)))

    async def detach_live(self, uuid: str, alias: str) -> None:
        """Asks a guest to let go."""
        await self._call("detach_live", uuid, lambda: self._ask(uuid, alias))

    async def detach_config(self, uuid: str, claim: Claim) -> None:
        """Takes out of a stored configuration."""
        await self._call("detach_config", uuid, lambda: self._unstore(uuid, claim))

    async def detach_host(self, name: str) -> None:
        """Frees a PCI function from its driver."""
        await self._call("detach_host", "", lambda: self._detach_node(name), name)

    async def reattach_host(self, name: str) -> None:
        """Gives a PCI function back to its driver."""
        await self._call("reattach_host", "", lambda: self._reattach_node(name), name)

    async def wait_until_returned(self, names: Collection[str]) -> None:
        """Waits for the calls about these that were given up."""
        while calls := [call for call in self._given_up if self._calls[call] in names]:
            await asyncio.wait(calls)

    async def wait_until_idle(self, uuid: str) -> None:
        """Waits out all calls about the machine, and reads it."""
        await self._gate("before")
        while calls := [call for call, about in self._calls.items() if about == uuid]:
            await asyncio.wait(calls)
        if not self.connected:
            raise errors.HypervisorUnavailable("libvirt is away")
        if uuid not in self.machines:
            raise errors.NoSuchMachine("there is no such domain")
        self.touch(uuid)
        self.deliver(uuid)

    async def refresh(self) -> None:
        """Reads all machines again."""
        await asyncio.sleep(0)
        if not self.connected or not self.ear:
            raise errors.HypervisorUnavailable("gone")
        self.list_all()

    async def _call(self, name: str, uuid: str, effect: Callable[[], None], about: str = "") -> None:
        call = asyncio.ensure_future(self._made(name, uuid, effect))
        self._calls[call] = about or uuid
        call.add_done_callback(self._returned)
        try:
            await asyncio.wait({call})
        except asyncio.CancelledError:
            if not call.done():
                self._given_up.add(call)
            raise
        call.result()

    def _returned(self, call: asyncio.Task[None]) -> None:
        self._calls.pop(call, None)
        self._given_up.discard(call)
        if not call.cancelled():
            call.exception()

    async def _made(self, name: str, uuid: str, effect: Callable[[], None]) -> None:
        ear = self.ear
        await self._gate("before")
        if not self.connected:
            raise errors.HypervisorUnavailable("libvirt is away")
        try:
            self._do(name, effect)
        except errors.HostpassError:
            if uuid:
                self.deliver(uuid)
            raise
        await self._gate("after")
        if not self.connected or self.ear is not ear:
            raise errors.HypervisorUnavailable("libvirt went away during the call")
        if uuid:
            self.deliver(uuid)

    def _do(self, name: str, effect: Callable[[], None]) -> None:
        if name in self.fail:
            self.fail.discard(name)
            raise errors.HypervisorRefused(f"internal error: {name} failed as it was told to")
        effect()

    async def _gate(self, when: str) -> None:
        if self.stalled == when:
            gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._gates.append(gate)
            await gate
        else:
            await asyncio.sleep(0)

    def resume(self) -> None:
        """Calls that wait go on."""
        self.stalled = ""
        gates, self._gates = self._gates, []
        for gate in gates:
            if not gate.done():
                gate.set_result(None)

    def forget_calls(self) -> None:
        """Whoever made calls is dead."""
        self._gates, self.stalled = [], ""
        self._calls, self._given_up = {}, set()

    # --- what it tells ---

    def touch(self, uuid: str, event: Event | None = None) -> None:
        """The machine is to be read again; EVENT is told after that, or later still."""
        if not uuid:
            return
        self.due.setdefault(uuid, [])
        if event and self.late:
            self._events.append((uuid, event))
        elif event:
            self.due[uuid].append(event)

    def deliver(self, uuid: str) -> None:
        """The daemon reads a machine."""
        if not self.connected or not self.ear:
            return
        events = self.due.pop(uuid, [])
        machine = self.machines.get(uuid)
        self.ear.emit(MachineRead(machine) if machine else MachineGone(MachineKey(self.uri, uuid)))
        for event in events:
            self.ear.emit(event)

    def deliver_all(self) -> None:
        """The daemon is told everything."""
        for uuid, event in self._events:
            self.due.setdefault(uuid, []).append(event)
        self._events = []
        for uuid in list(self.due):
            self.deliver(uuid)

    @property
    def is_told(self) -> bool:
        """Whether a daemon knows everything."""
        return not self.due and not self._events

    def list_all(self) -> None:
        """The daemon reads all machines."""
        assert self.ear
        self.ear.emit(HypervisorChanged(URI, True))
        self.ear.emit(MachinesListed(URI, tuple(self.machines.values())))
        for events in self.due.values():
            for event in events:
                self.ear.emit(event)
        self.due = {}

    def lose(self) -> None:
        """libvirt goes away; machines run on."""
        self.connected = False
        if self.ear:
            self.ear.emit(HypervisorChanged(URI, False, "gone"))

    def come_back(self) -> None:
        """libvirt is there again."""
        self.connected = True
        if self.ear:
            self.list_all()

    # --- what happens in it ---

    def put(self, machine: Machine) -> None:
        """A machine is as given."""
        self.machines[machine.uuid] = dataclasses.replace(machine, ports=self._ports(machine))
        self.touch(machine.uuid)

    def forget(self, uuid: str) -> None:
        """A machine is no more."""
        self.machines.pop(uuid, None)
        self.touch(uuid)

    def start(self, uuid: str) -> None:
        """The machine starts with what its stored half names, or not at all."""
        machine = self.machines[uuid]
        live: list[Claim] = []
        devices: list[tuple[Device, str]] = []
        for number, claim in enumerate(machine.config):
            claim = dataclasses.replace(claim, alias=claim.alias or f"hostdev{number}")
            if claim.kind not in ("hostdev", "interface"):
                live.append(claim)
                continue
            device = self.find(claim)
            if device is None and isinstance(claim.source, UsbSource):
                live.append(dataclasses.replace(claim, missing=True))
            elif device is None or device.sysfs_path in self.taken or device in [d for d, _ in devices]:
                return
            else:
                devices.append((device, claim.alias))
                live.append(_exact(claim, device))
        if self._take(uuid, devices):
            self.put(dataclasses.replace(machine, state="running", live=tuple(live)))

    def destroy(self, uuid: str) -> None:
        """The machine is powered off."""
        machine = self.machines[uuid]
        paths = [path for path, (holder, _) in self.taken.items() if holder == uuid]
        for path in paths:
            self.taken.pop(path, None)
        self.asked = {ask: None for ask in self.asked if ask[0] != uuid}
        if machine.persistent:
            self.put(dataclasses.replace(machine, state="shut off", live=()))
        else:
            self.forget(uuid)
        for path in paths:
            self._come_home(path)

    def release(self, uuid: str, alias: str, by_others: bool = False) -> None:
        """The guest lets a device go."""
        self.asked.pop((uuid, alias), None)
        machine = self.machines.get(uuid)
        if not machine or all(c.alias != alias for c in machine.live):
            return
        paths = [path for path, taken in self.taken.items() if taken == (uuid, alias)]
        self.put(dataclasses.replace(machine, live=tuple(c for c in machine.live if c.alias != alias)))
        for path in paths:
            self.taken.pop(path, None)
            self._come_home(path, by_others)
        self.touch(uuid, DeviceRemoved(MachineKey(self.uri, uuid), alias))

    def unplug(self, device: Device, parent_first: bool) -> None:
        """A device goes from the host; a machine loses what is PCI, and keeps the claim on what is not."""
        for gone in (device, *self.host.below(device)):
            taken = self.taken.get(gone.sysfs_path)
            if taken and gone.pci:
                self.release(*taken, by_others=True)
            self.detached.discard(gone.name)
        if device.sysfs_path in self.host.present:
            self.host.unplug(device, parent_first)

    def refuse(self, uuid: str, alias: str) -> None:
        """The guest does not let go."""
        self.asked.pop((uuid, alias), None)
        self.touch(uuid, RemovalFailed(MachineKey(self.uri, uuid), alias))

    def find(self, claim: Claim) -> Device | None:
        """The device that libvirt takes for CLAIM, if it is one."""
        found = [d for d in self.host.present.values() if _means(claim, d)]
        return found[0] if len(found) == 1 else None

    def group_taken(self, device: Device) -> bool:
        """Whether a machine has DEVICE or another member of its group."""
        return device.sysfs_path in self.taken or self._mates_taken(device)

    def attach_by_others(self, uuid: str, claim: Claim) -> None:
        """virsh attach-device."""
        try:
            self._attach(uuid, claim)
        except errors.HostpassError:
            self.touch(uuid)

    # --- effects ---

    def _machine(self, uuid: str) -> Machine:
        machine = self.machines.get(uuid)
        if not machine:
            raise errors.NoSuchMachine("libvirt has no such machine")
        return machine

    def _attach(self, uuid: str, claim: Claim) -> None:
        machine, device = self._machine(uuid), self.find(claim)
        if not machine.active:
            raise errors.HypervisorRefused("Requested operation is not valid: domain is not running")
        if any(c.alias == claim.alias for c in machine.live):
            raise errors.HypervisorRefused(f"non unique alias detected: {claim.alias}")
        if device is None:
            raise errors.HypervisorRefused("Device not found, or more than one")
        if device.pci and sum(isinstance(c.source, PciSource) for c in machine.live) >= self.ports:
            raise errors.NoFreePort("No more available PCI slots")
        if device.sysfs_path in self.taken or not self._take(uuid, [(device, claim.alias)]):
            raise errors.HypervisorRefused("the device is in use, or its group is not viable")
        self.put(dataclasses.replace(machine, live=(*machine.live, _exact(claim, device))))
        self.touch(uuid, DeviceAdded(MachineKey(self.uri, uuid), claim.alias))

    def _store(self, uuid: str, claim: Claim) -> None:
        machine = self._persistent(uuid)
        if any(c.id == claim.id for c in machine.config):
            raise errors.AlreadyAssigned("device is already in the domain configuration")
        self.put(dataclasses.replace(machine, config=(*machine.config, claim)))

    def _unstore(self, uuid: str, claim: Claim) -> None:
        machine = self._persistent(uuid)
        stored = list(machine.config)
        written = next((c for c in stored if (c.id, c.alias) == (claim.id, claim.alias)), None)
        if written:
            stored.remove(written)
            self.put(dataclasses.replace(machine, config=tuple(stored)))

    def _persistent(self, uuid: str) -> Machine:
        machine = self._machine(uuid)
        if not machine.persistent:
            raise errors.HypervisorRefused("the machine is transient: it has no stored configuration")
        return machine

    def _ask(self, uuid: str, alias: str) -> None:
        machine = self._machine(uuid)
        if not machine.active or all(c.alias != alias for c in machine.live):
            raise errors.NotAssigned(f"{machine.name} has no device {alias}")
        if (uuid, alias) in self.asked:
            raise errors.UnplugPending(f"device {alias} is already in the process of unplug")
        match self.moods.get(uuid, self.mood):
            case "prompt":
                self.release(uuid, alias)
            case "late":
                self.asked[(uuid, alias)] = None
            case "refuse":
                self.refuse(uuid, alias)

    def _detach_node(self, name: str) -> None:
        self._free(name)
        self.detached.add(name)
        self.host.bind(name, "vfio-pci")

    def _reattach_node(self, name: str) -> None:
        device = self._free(name)
        self.detached.discard(name)
        self.host.bind(name, "" if self._mates_taken(device) else self.host.home[name])

    def _free(self, name: str) -> Device:
        device = self.host.named(name)
        if device is None:
            raise errors.NoSuchDevice(f"libvirt has no node device {name}")
        if device.sysfs_path in self.taken:
            raise errors.HypervisorRefused(f"{name} is in use by a machine")
        return device

    def _take(self, uuid: str, devices: list[tuple[Device, str]]) -> bool:
        """Takes DEVICES for a machine, all or none."""
        names = {d.name for d, _ in devices}
        for device, _ in devices:
            for mate in self._mates(device):
                others = self.taken.get(mate.sysfs_path, (uuid, ""))[0] != uuid
                if others or (mate.driver not in SAFE and mate.name not in names):
                    return False
        for device, alias in devices:
            self.taken[device.sysfs_path] = (uuid, alias)
            if device.pci:
                self.host.bind(device.name, "vfio-pci")
            else:
                self.host.lend(device.name, away=True)
        return True

    def _come_home(self, path: str, by_others: bool = False) -> None:
        device = self.host.present.get(path)
        if device is None:
            return
        if not device.pci:
            self.host.lend(device.name, away=False)
        elif device.name not in self.detached:
            self.host.bind(device.name, "" if self._mates_taken(device) else self.host.home[device.name])
            if by_others and self._mates_taken(device):
                self.host.blame.add(device.name)

    def _mates(self, device: Device) -> list[Device]:
        if not device.pci or device.pci.iommu_group < 0:
            return []
        group = device.pci.iommu_group
        return [d for d in self.host.present.values() if d.pci and d.pci.iommu_group == group and d is not device]

    def _mates_taken(self, device: Device) -> bool:
        return any(mate.sysfs_path in self.taken for mate in self._mates(device) if mate.name != device.name)

    def _ports(self, machine: Machine) -> Ports:
        used = sum(isinstance(c.source, PciSource) for c in machine.live)
        if not machine.active:
            return Ports()
        return Ports(tuple(range(1 + used, 1 + _PORTS)), tuple((_PORTS + 2, slot) for slot in range(1, 32)))


class Elsewhere:
    """A hypervisor on another host, which has machines with UUIDs of this one's: copies, ends of migrations.

    It tells everything at once, and does nothing that it is asked for.
    """

    uri = "sim:///z-elsewhere"

    def __init__(self) -> None:
        self.machines: dict[str, Machine] = {}
        self.ear: Ear | None = None

    async def run(self) -> None:
        """A daemon connects."""
        self.list_all()

    async def refresh(self) -> None:
        """Reads all machines again."""
        self.list_all()

    async def wait_until_idle(self, uuid: str) -> None:
        """It never is at anything."""

    def list_all(self) -> None:
        """The daemon reads all machines."""
        assert self.ear
        self.ear.emit(HypervisorChanged(self.uri, True))
        self.ear.emit(MachinesListed(self.uri, tuple(self.machines.values())))

    def put(self, uuid: str, machine: Machine | None) -> None:
        """A machine is as given, or no more."""
        assert self.ear
        if machine:
            self.machines[uuid] = machine
            self.ear.emit(MachineRead(machine))
        elif self.machines.pop(uuid, None):
            self.ear.emit(MachineGone(MachineKey(self.uri, uuid)))

    async def _refuse(self, *_: object) -> None:
        raise errors.HypervisorRefused("this hypervisor only watches")

    attach_live = attach_config = detach_live = detach_config = detach_host = reattach_host = _refuse


class Ear:
    """Where a living daemon hears of all this."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self.emit = emit


def _exact(claim: Claim, device: Device) -> Claim:
    """CLAIM as libvirt writes it in a live half: a USB device by its number, too."""
    if not device.usb:
        return claim
    return claim_of(hostdev_xml(device, alias=claim.alias, config=False, unique=False))


def _means(claim: Claim, device: Device) -> bool:
    match claim.source:
        case PciSource(address):
            return device.pci is not None and device.pci.address == address
        case UsbSource(vendor, product, bus, number):
            usb = device.usb
            if usb is None or usb.device_class == 9:
                return False
            return (bus in (None, usb.bus) and number in (None, usb.number)) and (
                vendor in (None, usb.vendor_id) and product in (None, usb.product_id)
            )
        case ScsiSource(host, channel, target, lun):
            scsi = device.scsi
            return scsi is not None and (scsi.host, scsi.channel, scsi.target, scsi.lun) == (host, channel, target, lun)
        case MdevSource(uuid):
            return any(getattr(facts, "uuid", "") == uuid for facts in device.facts)
    return False


class HostEnd:
    """HOST as a daemon is told of it, by udev and by readings of the host's uses."""

    def __init__(self, host: Host, ear: Ear) -> None:
        self._host = host
        self._ear = ear

    async def start(self) -> None:
        """Reads everything; what came before is no news."""
        self._host.notices = []
        await self.scan()
        await self.read_uses()

    async def scan(self) -> None:
        """Reads everything; what is queued comes after it."""
        await asyncio.sleep(0)
        self._ear.emit(self._host.scan())

    async def settled(self, deadline: float) -> None:
        """udevd's queue is empty."""
        await asyncio.sleep(0)
        self.drain()

    def drain(self) -> None:
        """Passes on all that is queued."""
        while self._host.notices:
            event = self._host.deliver()
            if event:
                self._ear.emit(event)

    async def read_uses(self) -> None:
        """Reads what the host uses its devices for."""
        await asyncio.sleep(0)
        self._ear.emit(self._host.read_uses())
