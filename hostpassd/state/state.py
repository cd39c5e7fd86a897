"""The one state and its single writer: apply(event) -> changes. No I/O."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping

from hostpassd.model.category import category
from hostpassd.model.codes import Blocker, Details
from hostpassd.model.device import Device, Key, same_thing
from hostpassd.model.events import (
    CancelAnswered,
    DeviceAdded,
    DeviceGone,
    DeviceRemoved,
    DeviceSeen,
    DevicesScanned,
    Event,
    FilesHang,
    HostUse,
    HostUsesRead,
    HypervisorChanged,
    JobChanged,
    JobForgotten,
    MachineGone,
    MachineRead,
    MachinesListed,
    OperationRecovered,
    OperationRefused,
    ProblemChanged,
    Releasing,
    RemovalFailed,
    host_use,
)
from hostpassd.model.job import Job
from hostpassd.model.machine import Claim, Hold, Machine, MachineKey, Missing
from hostpassd.state import eligibility
from hostpassd.state.changes import MANAGER, Batches, Changes
from hostpassd.state.holdings import Holdings
from hostpassd.state.spread import Spread
from hostpassd.state.tree import Tree


@dataclasses.dataclass(frozen=True, slots=True)
class HypervisorState:
    """A hypervisor connection."""

    uri: str
    connected: bool
    error: str
    version: int = 0  # of its libvirt, 9000000 for 9.0.0; 0: not known
    listed: bool = False  # whether it has told its machines since it was connected


class State:
    """Everything that is known. Only `apply` writes it, and each write costs per change, not per size.

    The face of three: `Tree`, how the devices lie; `Holdings`, which machine holds which; `Spread`, what they are used
    for and what that comes to above them. When `apply` returns, what each of them says of itself holds.
    """

    def __init__(
        self,
        first_instance: int = 1,
        excluded_classes: tuple[str, ...] = eligibility.EXCLUDED_CLASSES,
        never: frozenset[str] = frozenset(),
    ) -> None:
        self.jobs: dict[int, Job] = {}
        self.hypervisors: dict[str, HypervisorState] = {}
        self.hanging: tuple[str, ...] = ()  # files of the kernel that do not answer
        self.told_problems: dict[str, Details] = {}  # of the host as a whole, by code
        self._lacked_iommu = False
        self.excluded_classes = excluded_classes
        self.never = never
        self._categories: dict[str, str] = {}
        self._next_instance = first_instance
        self._batches = Batches()
        self.tree = Tree(self._batches)
        self.spread = Spread(self.tree, lambda device: eligibility.use_blockers(self, device))
        self.holdings = Holdings(self.tree, self._batches, self._held_otherwise, self.category)

    # --- reading: devices ---

    @property
    def devices(self) -> Mapping[str, Device]:
        """All devices, by name."""
        return self.tree.devices

    def device(self, name: str) -> Device | None:
        """The device called NAME."""
        return self.tree.devices.get(name)

    def at(self, sysfs_path: str) -> Device | None:
        """The device at SYSFS_PATH."""
        return self.tree.at(sysfs_path)

    def located(self, location: str) -> Device | None:
        """The device whose Location that is."""
        return self.device(self.tree.by_location.get(location, ""))

    def category(self, name: str) -> str:
        """The Category of the device NAME; '' before its event is taken in."""
        return self._categories.get(name, "")

    def children(self, name: str) -> list[str]:
        """The names of the devices directly below, sorted."""
        return self.tree.children(name)

    def ancestors(self, name: str) -> Iterator[Device]:
        """The devices above, nearest first."""
        return self.tree.ancestors(name)

    def descendants(self, name: str) -> Iterator[str]:
        """The names of all devices below, parents first."""
        return self.tree.descendants(name)

    def group(self, number: int) -> Iterable[str]:
        """The members of an IOMMU group."""
        return self.tree.groups[number]

    def virtual_functions(self, device: str) -> Iterable[str]:
        """The virtual functions of DEVICE."""
        return self.tree.functions[device]

    def target(self, device: str) -> str | None:
        """The device that DEVICE stands for in an operation: the nearest of a kind that can be assigned."""
        return self.tree.target(device)

    # --- reading: what they are used for ---

    def uses_of(self, device: str) -> tuple[HostUse, ...]:
        """What the host uses DEVICE for, what it is to the host by itself included."""
        here = self.device(device)
        uses = self.spread.uses.get(device, ())
        if here and here.pci and here.pci.boot_display:
            uses += (host_use("boot-display"),)
        if here and here.keyboard_of and self.only_keyboards_of(self.target(device) or device):
            uses += (host_use("keyboard", seat=here.keyboard_of),)
        if here and here.pci and here.pci.vfio_device and not any(hold.live for hold in self.holds_on(device)):
            uses += (host_use("vfio", driver=here.driver),)
        return uses

    def only_keyboards_of(self, device: str) -> str:
        """The seat all of whose keyboards are at or below DEVICE, '' if there is none."""
        return self.tree.only_keyboards.get(device, "")

    def below(self, device: str) -> Mapping[Blocker, int]:
        """The blockers that spread upward from what is below DEVICE."""
        return self.spread.below(device)

    def has_leaves(self, device: str) -> bool:
        """Whether anything below DEVICE could be assigned by itself."""
        return self.spread.has_leaves(device)

    # --- reading: machines ---

    @property
    def copies(self) -> Mapping[MachineKey, Machine]:
        """All machines of all hypervisors."""
        return self.holdings.copies

    @property
    def machines(self) -> Mapping[str, Machine]:
        """The machines that are told, by UUID: of copies on several hypervisors the one that runs."""
        return self.holdings.machines

    @property
    def missing(self) -> Mapping[str, tuple[Missing, ...]]:
        """By UUID what a machine claims and is not here."""
        return self.holdings.missing

    def twins(self, machine: MachineKey) -> list[MachineKey]:
        """The copies of MACHINE on other hypervisors."""
        return self.holdings.twins(machine)

    def machine_name(self, uuid: str) -> str:
        """What a machine is called in messages and logs."""
        machine = self.machines.get(uuid)
        return machine.shown_name if machine else uuid

    def holds_on(self, device: str) -> Iterable[Hold]:
        """The holds on DEVICE as clients see them: the holds of all copies of a machine count as that one machine's."""
        return self.holdings.on(device)

    def holds_of(self, uuid: str) -> Iterable[Hold]:
        """The holds of one machine as clients see them, those of its copies on other hypervisors included."""
        return self.holdings.of(uuid)

    def holds_in(self, machine: MachineKey) -> Iterable[Hold]:
        """The holds of this very machine."""
        return self.holdings.within(machine)

    def keyed(self, key: Key) -> list[str]:
        """The devices that KEY names; of a partition's, volume's or bridge's those behind it."""
        return self.holdings.keyed(key)

    def saying(self, key: Key) -> Collection[str]:
        """The devices that say KEY of themselves (`Device.said`)."""
        return self.tree.said[key]

    def find_claim(self, machine: MachineKey, claim: Claim, *, live: bool) -> str | None:
        """The device that a machine's CLAIM means now."""
        return self.holdings.find_claim(machine, claim, live=live)

    def last_place(self, machine: MachineKey, claim_id: str) -> tuple[str, int]:
        """The name and the instance of the device on which a claim stood last; ('', 0): it never stood on any."""
        return self.holdings.last_place(machine, claim_id)

    @property
    def degraded(self) -> bool:
        """Whether a hypervisor cannot be reached, or something of the host cannot be read."""
        return bool(self.hanging) or any(not h.connected for h in self.hypervisors.values())

    @property
    def lacks_iommu(self) -> bool:
        """Whether there are PCI devices, and none of them is in an IOMMU group."""
        return bool(self.tree.kinds["pci"]) and not any(True for _ in self.tree.groups.groups())

    # --- writing ---

    def apply(self, event: Event) -> list[Changes]:
        """Takes one event in; what it changed, in batches: what goes and comes back ends one and opens the next."""
        match event:
            case DeviceSeen(device):
                self._see(device)
            case DeviceGone(path):
                self._lose(self.at(path))
            case DevicesScanned(devices, unread):
                self._scanned(devices, unread)
            case FilesHang(files):
                self.hanging = files
                self._batches.current.change(MANAGER)
            case HostUsesRead(uses, nodes):
                self.spread.read_uses(uses)
                self.holdings.read_nodes(nodes)
            case MachineRead(machine):
                self.holdings.read(machine)
            case MachineGone(key):
                self.holdings.lose(key)
            case MachinesListed(uri, machines):
                self._listed(uri, machines)
            case ProblemChanged(code, there, details):
                self._problem(code, details if there else None)
            case HypervisorChanged(uri, connected, error, version):
                self._hypervisor(HypervisorState(uri, connected, error, version))
            case Releasing(key, alias, asked):
                self.holdings.releasing(key, alias, asked=asked)
            case DeviceRemoved(key, alias):
                self.holdings.releasing(key, alias, asked=False)
            case JobChanged(job):
                self._job(job)
            case JobForgotten(number):
                if self.jobs.pop(number, None):
                    self._batches.current.remove(("job", str(number)))
            case DeviceAdded() | RemovalFailed() | OperationRefused() | CancelAnswered() | OperationRecovered():
                pass
        self.tree.find_only_keyboards()
        self._look_for_iommu()
        batches = self._batches.take()
        for changes in batches:
            self._categorise(changes)
        return batches

    # --- devices ---

    def _scanned(self, devices: tuple[Device, ...], unread: tuple[str, ...]) -> None:
        seen = {device.name for device in (*devices, *filter(None, map(self.at, unread)))}
        for device in [device for device in self.devices.values() if device.name not in seen]:
            self._lose(device)
        for device in devices:
            self._see(device)

    def _see(self, device: Device) -> None:
        old = self.device(device.name)
        if old and same_thing(old, device):
            self._update(old, dataclasses.replace(device, instance=old.instance))
            return
        # What is below has uevents of its own: as long as none says that it is gone, it is there.
        below = [self.devices[name] for name in self.descendants(device.name)] if old else []
        uses = {name: self.spread.uses[name] for name in (d.name for d in below) if name in self.spread.uses}
        self._lose(old)
        self.spread.uses |= uses
        for fresh in (device, *below):
            self._insert(dataclasses.replace(fresh, instance=self._next_instance))
            self._next_instance += 1

    def _categorise(self, changes: Changes) -> None:
        """What is below a USB device tells what it is; what it once was it stays, whoever drives it."""
        for kind, name in (*changes.added, *changes.changed):
            if kind == "device" and (device := self.device(name)):
                below = (
                    (self.devices[n] for n in self.descendants(name)) if device.usb and not device.usb.is_hub else ()
                )
                parent = self.device(device.parent or "")
                self._categories[name] = category(device, below, parent, self._categories.get(name, ""))
                self.holdings.look_again(name)

    def _insert(self, device: Device) -> None:
        self._categories.pop(device.name, None)
        self._batches.add(("device", device.name))
        self._link(device)
        self._settle(device)
        self.holdings.moved(self.descendants(device.name))  # a child can come first

    def _update(self, old: Device, new: Device) -> None:
        if old == new:
            return
        if old.parent != new.parent or old.facts != new.facts:
            self.tree.touch(old.name)  # and those of the group that it may leave
            self._unlink(old)
            self._link(new)
        else:
            self.tree.replace(new)
        self._settle(new)
        if old.parent != new.parent:
            self.holdings.moved((new.name, *self.descendants(new.name)))

    def _lose(self, device: Device | None) -> None:
        """DEVICE, with all that is below it, is no more."""
        if not device or device.name not in self.devices:
            return
        for child in self.children(device.name):
            self._lose(self.device(child))
        self.tree.touch(device.name)
        self._unlink(device)
        self.tree.drop(device.name)
        self._categories.pop(device.name, None)
        self.spread.forget(device.name)
        self._batches.current.remove(("device", device.name))
        self.holdings.drop(device.name)

    def _link(self, device: Device) -> None:
        self.tree.link(device)
        self._touch_usb_above(device)
        self.spread.link(device)
        self.spread.again(_physical(device))

    def _unlink(self, device: Device) -> None:
        self._touch_usb_above(device)
        self.spread.unlink(device)
        self.tree.unlink(device)
        self.spread.again(_physical(device))

    def _touch_usb_above(self, device: Device) -> None:
        """What a USB device is, what is below it tells, too."""
        above = next((each for each in self.ancestors(device.name) if each.usb), None)
        if above and not device.usb:
            self.tree.touch(above.name)

    def _settle(self, device: Device) -> None:
        """DEVICE lies where it does: finds what names it, and what it spreads."""
        self.holdings.rename(device)
        self.spread.again(device.name)
        self.tree.touch(device.name)

    def _held_otherwise(self, name: str) -> None:
        """Other holds are told of NAME than before: it, and whose virtual function it is, may spread otherwise."""
        self.tree.touch(name)
        self.spread.again(name)
        device = self.device(name)
        if device:
            self.spread.again(_physical(device))

    # --- the host as a whole ---

    def _problem(self, code: str, details: Details | None) -> None:
        if self.told_problems.get(code) == details:
            return
        self.told_problems.pop(code, None)
        if details is not None:
            self.told_problems[code] = details
        self._batches.current.change(MANAGER)

    def _look_for_iommu(self) -> None:
        if self.lacks_iommu != self._lacked_iommu:
            self._lacked_iommu = not self._lacked_iommu
            self._batches.current.change(MANAGER)

    # --- machines ---

    def _hypervisor(self, new: HypervisorState) -> None:
        old = self.hypervisors.get(new.uri)
        if old and (old.connected, old.error, old.version) == (new.connected, new.error, new.version):
            return
        self.hypervisors[new.uri] = new
        self._batches.current.change(MANAGER)
        if not new.connected:
            for machine in [m for m in self.copies.values() if m.uri == new.uri]:
                self.holdings.read(dataclasses.replace(machine, stale=True))

    def _listed(self, uri: str, machines: tuple[Machine, ...]) -> None:
        seen = {machine.key for machine in machines}
        for key in [key for key in self.copies if key.uri == uri and key not in seen]:
            self.holdings.lose(key)
        for machine in machines:
            self.holdings.read(machine)
        if uri in self.hypervisors:
            self.hypervisors[uri] = dataclasses.replace(self.hypervisors[uri], listed=True)

    # --- jobs ---

    def _job(self, job: Job) -> None:
        old = self.jobs.get(job.number)
        if old == job:
            return
        self.jobs[job.number] = job
        entity = ("job", str(job.number))
        (self._batches.current.change if old else self._batches.current.add)(entity)
        if job.ended and not (old and old.ended):
            self._batches.current.jobs_ended.append(job)


def _physical(device: Device) -> str | None:
    return device.pci.physical_function if device.pci else None
