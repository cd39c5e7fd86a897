"""The one state and its single writer: apply(event) -> changes. No I/O."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from hostpassd.events import (
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
    Job,
    JobChanged,
    JobForgotten,
    MachineGone,
    MachineRead,
    MachinesListed,
    Releasing,
    RemovalFailed,
)
from hostpassd.host.device import ASSIGNABLE_KINDS, Device, Net, same_thing
from hostpassd.machines.machine import (
    Claim,
    Hold,
    InterfaceSource,
    Machine,
    MachineKey,
    MdevSource,
    Missing,
    NodeSource,
    PciSource,
    ScsiSource,
    UsbSource,
)
from hostpassd.model.codes import Blocker
from hostpassd.passthrough import eligibility

# What an object on the bus stands for: ("device", name), ("machine", uuid), ("job", number) or ("manager", "").
Entity = tuple[str, str]
MANAGER: Entity = ("manager", "")

# By what a claim can name a device: ("pci", address), ("usb", bus, number), ("usb-id", vendor, product) ...
Key = tuple[Any, ...]

# What a reading of the host's uses can lead on to the devices behind: a device node, an interface.
_BEHIND = ("node", "net")

# The states of a machine that runs, and is not only there (paused, as one that a migration brings).
_RUNS = ("running", "idle")

_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclasses.dataclass(slots=True)
class Changes:
    """What one or more events did. An entity is in at most one of the three."""

    added: dict[Entity, None] = dataclasses.field(default_factory=dict)
    changed: dict[Entity, None] = dataclasses.field(default_factory=dict)
    removed: dict[Entity, None] = dataclasses.field(default_factory=dict)
    holds_added: list[Hold] = dataclasses.field(default_factory=list)
    holds_removed: list[Hold] = dataclasses.field(default_factory=list)
    holds_changed: list[tuple[Hold, Hold]] = dataclasses.field(default_factory=list)  # a half came or went: from, to
    jobs_ended: list[Job] = dataclasses.field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed or self.holds_added or self.holds_removed)

    def reopens(self, later: Changes) -> bool:
        """Whether LATER brings back what this removes: then they are two batches."""
        return any(entity in self.removed for entity in later.added)

    def merge(self, later: Changes) -> None:
        """Takes in what happened after."""
        for entity in later.added:
            self.add(entity)
        for entity in later.changed:
            self.change(entity)
        for entity in later.removed:
            self.remove(entity)
        for hold in later.holds_removed:
            self.remove_hold(hold)
        for hold in later.holds_added:
            self.add_hold(hold)
        self.holds_changed += later.holds_changed
        self.jobs_ended += later.jobs_ended

    def add_hold(self, hold: Hold) -> None:
        """A row that went and came back within these changes never went."""
        if not _take_out(self.holds_removed, hold):
            self.holds_added.append(hold)

    def remove_hold(self, hold: Hold) -> None:
        """A row that came and went within these changes never came: nobody has heard of it."""
        if not _take_out(self.holds_added, hold):
            self.holds_removed.append(hold)

    def add(self, entity: Entity) -> None:
        self.changed.pop(entity, None)
        self.added[entity] = None

    def change(self, entity: Entity) -> None:
        if entity not in self.added and entity not in self.removed:
            self.changed[entity] = None

    def remove(self, entity: Entity) -> None:
        self.changed.pop(entity, None)
        if entity in self.added:
            del self.added[entity]
        else:
            self.removed[entity] = None


@dataclasses.dataclass(frozen=True, slots=True)
class HypervisorState:
    """A hypervisor connection."""

    uri: str
    connected: bool
    error: str
    listed: bool = False  # whether it has told its machines since it was connected


class State:
    """Everything that is known. Only `apply` writes it, and each write costs per change, not per size."""

    def __init__(
        self,
        first_instance: int = 1,
        excluded_classes: tuple[str, ...] = eligibility.EXCLUDED_CLASSES,
        never: frozenset[str] = frozenset(),
    ) -> None:
        self.devices: dict[str, Device] = {}
        self.copies: dict[MachineKey, Machine] = {}  # all machines of all hypervisors
        self.machines: dict[str, Machine] = {}  # by UUID; of copies the one that has the path
        self.jobs: dict[int, Job] = {}
        self.hypervisors: dict[str, HypervisorState] = {}
        self.missing: dict[str, tuple[Missing, ...]] = {}
        self.hanging: tuple[str, ...] = ()  # files of the kernel that do not answer
        self.excluded_classes = excluded_classes
        self.never = never
        self._next_instance = first_instance
        self._by_path: dict[str, str] = {}
        self._children: dict[str, dict[str, None]] = {}
        self._groups: dict[int, dict[str, None]] = {}
        self._functions: dict[str, dict[str, None]] = {}
        self._keys: dict[Key, dict[str, None]] = {}
        self._interest: dict[Key, dict[MachineKey, None]] = {}
        self._interest_of: dict[MachineKey, frozenset[Key]] = {}
        self._copies_of: dict[str, dict[MachineKey, None]] = {}
        # A machine's holds and claims that mean nothing here; then what is told, of all copies together.
        self._holds_in: dict[MachineKey, dict[tuple[str, str], Hold]] = {}
        self._missing_in: dict[MachineKey, tuple[Missing, ...]] = {}
        self._holds_on: dict[str, dict[tuple[str, str], Hold]] = {}
        self._holds_of: dict[str, dict[tuple[str, str], Hold]] = {}
        self._uses: dict[str, tuple[HostUse, ...]] = {}
        self._nodes: dict[str, tuple[str, ...]] = {}
        self._nodes_on: dict[str, dict[str, None]] = {}
        self._releasing: set[tuple[MachineKey, str]] = set()
        self._places: dict[MachineKey, dict[str, tuple[str, int]]] = {}  # where each claim of a machine stood last
        # What spreads upward is counted at each ancestor, so that one change costs the depth of the tree.
        self._spread: dict[str, tuple[Blocker, ...]] = {}
        self._below: dict[str, Counter[Blocker]] = {}
        self._leaves: Counter[str] = Counter()
        self._keyboards: dict[str, dict[str, None]] = {}
        # By device: the seat all of whose keyboards are at or below it.
        self._only_keyboards: dict[str, str] = {}
        self._changes = Changes()
        self._ended: list[Changes] = []

    # --- reading ---

    def device(self, name: str) -> Device | None:
        return self.devices.get(name)

    def at(self, sysfs_path: str) -> Device | None:
        """The device at SYSFS_PATH."""
        return self.devices.get(self._by_path.get(sysfs_path, ""))

    def children(self, name: str) -> list[str]:
        """The names of the devices directly below, sorted."""
        return sorted(self._children.get(name, ()))

    def group(self, number: int) -> Iterable[str]:
        return self._groups.get(number, {})

    def virtual_functions(self, device: str) -> Iterable[str]:
        return self._functions.get(device, {})

    def holds_on(self, device: str) -> Iterable[Hold]:
        """What is told of DEVICE: of copies of a machine on several hypervisors all holds count, as one's."""
        return self._holds_on.get(device, {}).values()

    def holds_of(self, uuid: str) -> Iterable[Hold]:
        """What is told of one machine, with the holds of its copies."""
        return self._holds_of.get(uuid, {}).values()

    def holds_in(self, machine: MachineKey) -> Iterable[Hold]:
        """The holds of this very machine."""
        return self._holds_in.get(machine, {}).values()

    def twins(self, machine: MachineKey) -> list[MachineKey]:
        """Its copies on other hypervisors."""
        return [key for key in self._copies_of.get(machine.uuid, ()) if key != machine]

    def uses_of(self, device: str) -> tuple[HostUse, ...]:
        """What the host uses DEVICE for, the console that it shows and the seat's only keyboard included."""
        here = self.devices.get(device)
        uses = self._uses.get(device, ())
        if here and here.pci and here.pci.boot_display:
            uses += (HostUse("boot-display", "shows the host's console"),)
        if here and here.keyboard_of and self.only_keyboards_of(self.target(device) or device):
            uses += (HostUse("keyboard", f"the only keyboard of {here.keyboard_of}"),)
        return uses

    def only_keyboards_of(self, device: str) -> str:
        """The seat all of whose keyboards are at or below DEVICE, '' if there is none."""
        return self._only_keyboards.get(device, "")

    def below(self, device: str) -> Mapping[Blocker, int]:
        return self._below.get(device, {})

    def has_leaves(self, device: str) -> bool:
        return self._leaves[device] > 0

    def machine_name(self, uuid: str) -> str:
        """What a machine is called in messages and logs."""
        machine = self.machines.get(uuid)
        return machine.shown_name if machine else uuid

    def keyed(self, key: Key) -> list[str]:
        """The devices that KEY names; of a partition's, volume's or bridge's those behind it."""
        behind = self._nodes.get(key[1], ()) if key[0] in _BEHIND else ()
        return [*self._keys.get(key, ()), *(name for name in behind if name in self.devices)]

    def ancestors(self, name: str) -> Iterator[Device]:
        """The devices above, nearest first."""
        device = self.devices.get(name)
        while device and device.parent and (device := self.devices.get(device.parent)):
            yield device

    def descendants(self, name: str) -> Iterator[str]:
        """The names of all devices below, parents first."""
        for child in self._children.get(name, ()):
            yield child
            yield from self.descendants(child)

    def target(self, device: str) -> str | None:
        """The device that DEVICE stands for in an operation: the nearest of a kind that can be assigned.

        What hangs below a USB device is its function, a logical unit too.
        """
        found: str | None = None
        here = self.devices.get(device)
        for node in (here, *self.ancestors(device)) if here else ():
            if node.kind == "usb":
                return found if found and self.devices[found].kind not in ("scsi",) else node.name
            if node.kind in ASSIGNABLE_KINDS and found is None:
                found = node.name
        return found

    def find_claim(self, machine: MachineKey, claim: Claim, *, live: bool) -> str | None:
        """The device that a machine's CLAIM means now."""
        if live and claim.missing:
            return None
        own = frozenset(hold.device for hold in self.holds_in(machine) if hold.live)
        return next(iter(self._find(claim, None if live else own)), None)

    def last_place(self, machine: MachineKey, claim_id: str) -> tuple[str, int]:
        """The name and the instance of the device on which a claim stood last; ('', 0): it never stood on any."""
        return self._places.get(machine, {}).get(claim_id, ("", 0))

    @property
    def degraded(self) -> bool:
        """Whether a hypervisor cannot be reached, or something of the host cannot be read."""
        return bool(self.hanging) or any(not h.connected for h in self.hypervisors.values())

    # --- writing ---

    def apply(self, event: Event) -> list[Changes]:
        """Takes one event in; what it changed, in batches: what goes and comes back ends one and opens the next."""
        match event:
            case DeviceSeen(device):
                self._see(device)
            case DeviceGone(path):
                self._lose(self._by_path.get(path))
            case DevicesScanned(devices, unread):
                self._scanned(devices, unread)
            case FilesHang(files):
                self.hanging = files
                self._changes.change(MANAGER)
            case HostUsesRead(uses, nodes):
                self._read_uses(uses)
                self._read_nodes(nodes)
            case MachineRead(machine):
                self._read_machine(machine)
            case MachineGone(key):
                self._lose_machine(key)
            case MachinesListed(uri, machines):
                self._listed(uri, machines)
            case HypervisorChanged(uri, connected, error):
                self._hypervisor(HypervisorState(uri, connected, error))
            case Releasing(key, alias, asked):
                (self._releasing.add if asked else self._releasing.discard)((key, alias))
                self._resolve(key)
            case DeviceRemoved(key, alias):
                self._releasing.discard((key, alias))
                self._resolve(key)
            case JobChanged(job):
                self._job(job)
            case JobForgotten(number):
                if self.jobs.pop(number, None):
                    self._changes.remove(("job", str(number)))
            case DeviceAdded() | RemovalFailed():
                pass
        self._find_only_keyboards()
        batches, self._ended, self._changes = [*self._ended, self._changes], [], Changes()
        return [changes for changes in batches if changes]

    # --- devices ---

    def _scanned(self, devices: tuple[Device, ...], unread: tuple[str, ...]) -> None:
        seen = {device.name for device in devices} | {self._by_path.get(path) for path in unread}
        for name in [name for name in self.devices if name not in seen]:
            self._lose(name)
        for device in devices:
            self._see(device)

    def _see(self, device: Device) -> None:
        old = self.devices.get(device.name)
        if old and same_thing(old, device):
            self._update(old, dataclasses.replace(device, instance=old.instance))
            return
        # What is below has uevents of its own: as long as none says that it is gone, it is there.
        below = [self.devices[name] for name in self.descendants(device.name)] if old else []
        uses = {name: self._uses[name] for name in (d.name for d in below) if name in self._uses}
        self._lose(device.name)
        self._uses |= uses
        for fresh in (device, *below):
            self._insert(dataclasses.replace(fresh, instance=self._next_instance))
            self._next_instance += 1

    def _update(self, old: Device, new: Device) -> None:
        if old == new:
            return
        if old.parent != new.parent or old.facts != new.facts:
            self._touch(old.name)  # and those of the group that it leaves
            self._unlink(old)
            self.devices[new.name] = new
            self._link(new)
        self.devices[new.name] = new
        self._rekey(old, new)
        self._touch(new.name)
        self._spread_again(new.name)

    def _insert(self, device: Device) -> None:
        name = device.name
        self.devices[name] = device
        self._add(("device", name))
        self._link(device)
        self._rekey(None, device)
        self._spread_again(name)
        self._touch(name)

    def _add(self, entity: Entity) -> None:
        """An object comes; where one went from its path, that ended a batch."""
        if entity in self._changes.removed:
            self._ended.append(self._changes)
            self._changes = Changes()
        self._changes.add(entity)

    def _lose(self, name: str | None) -> None:
        device = self.devices.get(name or "")
        if not device:
            return
        for child in list(self._children.get(device.name, ())):
            self._lose(child)
        self._touch(device.name)
        self._unlink(device)
        del self.devices[device.name]
        self._changes.remove(("device", device.name))
        self._rekey(device, None)
        self._lose_nodes(device.name)
        for index in (self._spread, self._below, self._uses):
            index.pop(device.name, None)
        del self._leaves[device.name]

    def _link(self, device: Device) -> None:
        """Enters a device into the indexes of the tree, with what is below it already (a child can come first)."""
        self._by_path[device.sysfs_path] = device.name
        _index(self._children, device.parent, device.name)
        if device.pci:
            _index(self._groups, device.pci.iommu_group, device.name)
            _index(self._functions, device.pci.physical_function, device.name)
            self._touch_functions(device)
        if device.keyboard_of:
            _index(self._keyboards, device.keyboard_of, device.name)
        self._touch(device.parent)
        for name in (device.name, *self.descendants(device.name)):
            if name != device.name:
                self._touch(name)
            self._count(name, device.name, self._spread.get(name, ()), 1)

    def _unlink(self, device: Device) -> None:
        for name in (device.name, *self.descendants(device.name)):
            self._count(name, device.name, self._spread.get(name, ()), -1)
        self._by_path.pop(device.sysfs_path, None)
        if device.keyboard_of:
            _unindex(self._keyboards, device.keyboard_of, device.name)
        _unindex(self._children, device.parent, device.name)
        if device.pci:
            _unindex(self._groups, device.pci.iommu_group, device.name)
            _unindex(self._functions, device.pci.physical_function, device.name)
            self._touch_functions(device)
        self._touch(device.parent)

    def _touch_functions(self, device: Device) -> None:
        """The physical function and the virtual ones show each other, and only as long as both are here."""
        for name in (device.pci and device.pci.physical_function, *self._functions.get(device.name, ())):
            self._touch(name)
        self._spread_physical(device)

    def _find_only_keyboards(self) -> None:
        """What all keyboards of a seat are below, as each: a handful of names, whatever the size of the tree."""
        found: dict[str, str] = {}
        for seat, keyboards in self._keyboards.items():
            lines = [{name, *(above.name for above in self.ancestors(name))} for name in keyboards]
            found.update(dict.fromkeys(set.intersection(*lines), seat))
        if found == self._only_keyboards:
            return
        changed = found.items() ^ self._only_keyboards.items()
        self._only_keyboards = found
        for name in {name for name, _ in changed} | {name for names in self._keyboards.values() for name in names}:
            self._touch(name)

    def _count(self, name: str, link: str, spread: tuple[Blocker, ...], by: int) -> None:
        """Adds what NAME spreads upward, and whether it is a leaf, to LINK (if above NAME) and all above LINK."""
        device = self.devices[name]
        above = list(self.ancestors(link))
        if name != link:
            above.insert(0, self.devices[link])
        under_usb = any(d.kind == "usb" for d in self.ancestors(name))
        leaf = eligibility.is_leaf(device, under_usb)
        for ancestor in above:
            if spread:
                _add(self._below.setdefault(ancestor.name, Counter()), spread, by)
                self._touch(ancestor.name)
            if leaf:
                had = self._leaves[ancestor.name] > 0
                self._leaves[ancestor.name] += by
                if had != (self._leaves[ancestor.name] > 0):
                    self._touch(ancestor.name)

    def _spread_holds(self, name: str) -> None:
        """Brings up to date what spreads upward because of the holds on NAME."""
        self._spread_again(name)
        device = self.devices.get(name)
        if device:
            self._spread_physical(device)

    def _spread_physical(self, device: Device) -> None:
        """What a virtual function is held by, its physical one spreads, too."""
        if device.pci and device.pci.physical_function:
            self._spread_again(device.pci.physical_function)

    def _spread_again(self, name: str) -> None:
        """Brings up to date what NAME spreads upward."""
        device = self.devices.get(name)
        if not device:
            return
        old, new = self._spread.get(name, ()), eligibility.use_blockers(self, device)
        if old == new:
            return
        self._spread[name] = new
        self._touch(name)
        for ancestor in self.ancestors(name):
            counter = self._below.setdefault(ancestor.name, Counter())
            _add(counter, old, -1)
            _add(counter, new, 1)
            self._touch(ancestor.name)

    def _touch(self, name: str | None) -> None:
        """Marks a device, and those of its IOMMU group (whose companion it may be), as changed."""
        device = self.devices.get(name or "")
        if not device:
            return
        self._changes.change(("device", device.name))
        if device.pci and device.pci.iommu_group >= 0:
            for mate in self._groups.get(device.pci.iommu_group, ()):
                self._changes.change(("device", mate))

    def _rekey(self, old: Device | None, new: Device | None) -> None:
        """Brings the index of names-by-which-claims-name-it up to date, and the machines that named it."""
        before, after = (frozenset(_device_keys(d)) if d else frozenset() for d in (old, new))
        name = (old or new).name  # type: ignore[union-attr]
        for key in before - after:
            _unindex(self._keys, key, name)
        for key in after - before:
            _index(self._keys, key, name)
        self._resolve_interested(before | after if not (old and new) else before ^ after)

    def _read_uses(self, uses: Mapping[str, tuple[HostUse, ...]]) -> None:
        changed = [n for n in {**self._uses, **uses} if self._uses.get(n, ()) != uses.get(n, ())]
        self._uses = dict(uses)
        for name in changed:
            self._touch(name)
            self._spread_again(name)

    def _read_nodes(self, nodes: Mapping[str, tuple[str, ...]]) -> None:
        changed = [n for n in {**self._nodes, **nodes} if self._nodes.get(n, ()) != nodes.get(n, ())]
        self._nodes, self._nodes_on = dict(nodes), {}
        for node, names in nodes.items():
            for name in names:
                _index(self._nodes_on, name, node)
        self._resolve_interested((kind, node) for node in changed for kind in _BEHIND)

    def _lose_nodes(self, name: str) -> None:
        """What came of a disk's partitions is not known before the next reading: they lead to nothing until then."""
        nodes = self._nodes_on.pop(name, {})
        for node in nodes:
            left = tuple(other for other in self._nodes[node] if other != name)
            if left:
                self._nodes[node] = left
            else:
                del self._nodes[node]
        self._resolve_interested((kind, node) for node in nodes for kind in _BEHIND)

    def _resolve_interested(self, keys: Iterable[Key]) -> None:
        """The machines that name something by one of KEYS."""
        for machine in dict.fromkeys(machine for key in keys for machine in self._interest.get(key, ())):
            self._resolve(machine)

    # --- machines ---

    def _hypervisor(self, new: HypervisorState) -> None:
        old = self.hypervisors.get(new.uri)
        if old and (old.connected, old.error) == (new.connected, new.error):
            return
        self.hypervisors[new.uri] = new
        self._changes.change(MANAGER)
        if not new.connected:
            for machine in [m for m in self.copies.values() if m.uri == new.uri]:
                self._read_machine(dataclasses.replace(machine, stale=True))

    def _listed(self, uri: str, machines: tuple[Machine, ...]) -> None:
        seen = {machine.key for machine in machines}
        for key in [key for key in self.copies if key.uri == uri and key not in seen]:
            self._lose_machine(key)
        for machine in machines:
            self._read_machine(machine)
        if uri in self.hypervisors:
            self.hypervisors[uri] = dataclasses.replace(self.hypervisors[uri], listed=True)

    def _read_machine(self, machine: Machine) -> None:
        key = machine.key
        if self.copies.get(key) == machine:
            return
        self.copies[key] = machine
        _index(self._copies_of, machine.uuid, key)
        self._set_interest(machine)
        self._resolve(key)

    def _lose_machine(self, key: MachineKey) -> None:
        machine = self.copies.pop(key, None)
        if not machine:
            return
        _unindex(self._copies_of, key.uuid, key)
        self._set_interest(dataclasses.replace(machine, live=(), stored=()))
        for index in (self._holds_in, self._missing_in, self._places):
            index.pop(key, None)
        self._releasing = {pair for pair in self._releasing if pair[0] != key}
        self._show(key.uuid)

    def _show(self, uuid: str) -> None:
        """Tells of all copies of a machine together. One has the path: the one that runs."""
        old, new = self.machines.get(uuid), self._foremost(uuid)
        if new is None:
            self._set_holds(uuid, {})
            self.machines.pop(uuid, None)
            self.missing.pop(uuid, None)
            self._changes.remove(("machine", uuid))
            return
        self.machines[uuid] = new
        self._note_machine(old, new)
        keys = (new.key, *self.twins(new.key))
        holds: dict[tuple[str, str], Hold] = {}
        for hold in (hold for key in keys for hold in self.holds_in(key)):
            _merge_hold(holds, hold)
        self._set_holds(uuid, holds)
        rows = self._missing_in.get(new.key, ())
        if self.missing.get(uuid, ()) != rows:
            self.missing[uuid] = rows
            self._changes.change(("machine", uuid))
        if old and old.shown_name != new.shown_name:
            for hold in list(self.holds_of(uuid)):
                self._spread_holds(hold.device)

    def _foremost(self, uuid: str) -> Machine | None:
        """Of copies the one that runs, or does most; else always the same."""
        found = (self.copies[key] for key in self._copies_of.get(uuid, ()))
        return min(found, key=lambda m: (not m.active, m.stale, m.state not in _RUNS, m.uri), default=None)

    def _note_machine(self, old: Machine | None, new: Machine) -> None:
        entity = ("machine", new.uuid)
        if old and old.uri == new.uri:
            if old != new:
                self._changes.change(entity)
            return
        if old:
            self._changes.remove(entity)  # as an object it is another one: its hypervisor is
        self._add(entity)

    def _set_interest(self, machine: Machine) -> None:
        new = frozenset(key for claim in (*machine.live, *machine.stored) for key in _claim_keys(claim))
        old = self._interest_of.get(machine.key, frozenset())
        for key in old - new:
            _unindex(self._interest, key, machine.key)
        for key in new - old:
            _index(self._interest, key, machine.key)
        if new:
            self._interest_of[machine.key] = new
        else:
            self._interest_of.pop(machine.key, None)

    def _resolve(self, key: MachineKey) -> None:
        """Stands each claim of a machine on the device it means now; what means none is missing."""
        machine = self.copies.get(key)
        if not machine:
            return
        aliases = {claim.alias for claim in machine.live}
        self._releasing = {pair for pair in self._releasing if pair[0] != key or pair[1] in aliases}
        made = {claim.id for claim in (*machine.live, *machine.stored)}
        places = {claim: place for claim, place in self._places.get(key, {}).items() if claim in made}
        self._places[key] = places
        holds: dict[tuple[str, str], Hold] = {}
        missing: dict[str, Missing] = {}
        own: frozenset[str] = frozenset()
        for live, claims in ((True, machine.live), (False, machine.stored)):
            for claim in claims:
                if live and claim.missing:
                    continue
                devices = self._find(claim, None if live else own)
                for device in devices:
                    places[claim.id] = (device, self.devices[device].instance)
                    _merge_hold(holds, self._hold(machine, claim, device, live))
                if not devices and not self._is_here(claim):
                    _merge_missing(missing, claim, live)
            own = frozenset(device for device, _ in holds)
        self._holds_in[key], self._missing_in[key] = holds, tuple(missing.values())
        self._show(key.uuid)

    def _find(self, claim: Claim, own: frozenset[str] | None) -> list[str]:
        """The devices that CLAIM means: one, but for a volume on several disks or a bridge of several interfaces.

        OWN: what the machine holds live, which tells the twins of a stored claim apart. None: CLAIM is live itself,
        one of the twins is in use, and none of them is free as long as nobody knows which.
        """
        # A serial port on the mainboard is below nothing that can be assigned: it is held itself.
        targets = list(dict.fromkeys(self.target(name) or name for name in self._candidates(claim)))
        if len(targets) > 1 and isinstance(claim.source, UsbSource) and own is not None:
            # libvirt refuses an ambiguous vendor and product; the live half says which of the twins it is.
            targets = [name for name in targets if name in own]
            return targets if len(targets) == 1 else []
        return targets

    def _is_here(self, claim: Claim) -> bool:
        """Whether CLAIM means something of this host that is on no device: a loop, a bridge without members."""
        return any(key[0] in _BEHIND and key[1] in self._nodes for key in _claim_keys(claim))

    def _candidates(self, claim: Claim) -> list[str]:
        keys = _claim_keys(claim)
        if not keys:
            return []
        found = self.keyed(keys[0])
        return [name for name in found if all(name in self._keys.get(key, {}) for key in keys[1:])]

    def _hold(self, machine: Machine, claim: Claim, device: str, live: bool) -> Hold:
        releasing = live and (machine.key, claim.alias) in self._releasing
        return Hold(machine.uuid, device, claim.kind, live, not live, claim.alias, releasing, machine.stale)

    def _set_holds(self, uuid: str, new: dict[tuple[str, str], Hold]) -> None:
        old = self._holds_of.get(uuid, {})
        if new == old:
            return
        self._changes.change(("machine", uuid))
        self._holds_of[uuid] = new
        for key in {**old, **new}:
            before, after = old.get(key), new.get(key)
            if before == after:
                continue
            device, kind = key
            rows = self._holds_on.setdefault(device, {})
            rows.pop((uuid, kind), None)
            if after:
                rows[(uuid, kind)] = after
            if before and not after:
                self._changes.remove_hold(before)
            if after and not before:
                self._changes.add_hold(after)
            if not rows:
                del self._holds_on[device]
            self._touch(device)
            self._spread_holds(device)
            if before and after and (before.live, before.config) != (after.live, after.config):
                self._changes.holds_changed.append((before, after))

    # --- jobs ---

    def _job(self, job: Job) -> None:
        old = self.jobs.get(job.number)
        if old == job:
            return
        self.jobs[job.number] = job
        entity = ("job", str(job.number))
        (self._changes.change if old else self._changes.add)(entity)
        if job.ended and not (old and old.ended):
            self._changes.jobs_ended.append(job)


def _device_keys(device: Device) -> Iterator[Key]:
    """By what claims can name DEVICE."""
    if device.pci:
        yield ("pci", device.pci.address)
    if device.usb and not eligibility.is_hub(device):
        yield ("usb", device.usb.bus, device.usb.number)
        yield ("usb-id", device.usb.vendor_id, device.usb.product_id)
    if device.scsi:
        yield ("scsi", device.scsi.host, device.scsi.channel, device.scsi.target, device.scsi.lun)
    if device.kind == "mdev":
        for facts in device.facts:
            yield ("mdev", getattr(facts, "uuid", "").lower())
    for facts in device.facts:
        if isinstance(facts, Net):
            yield ("net", facts.interface)
    for node in device.device_nodes:
        yield ("node", node)


def _claim_keys(claim: Claim) -> list[Key]:
    """The keys that a device must have, all of them, to be what CLAIM means."""
    match claim.source:
        case PciSource(address):
            return [("pci", address)]
        case UsbSource(vendor, product, bus, number):
            place: list[Key] = [("usb", bus, number)] if bus is not None and number is not None else []
            named: list[Key] = [("usb-id", vendor, product)] if vendor is not None and product is not None else []
            return place + named
        case ScsiSource(host, channel, target, lun):
            return [("scsi", host, channel, target, lun)]
        case MdevSource(uuid):
            return [("mdev", uuid.lower())]
        case NodeSource(path):
            return [("node", path)]
        case InterfaceSource(interface):
            return [("net", interface)]


def _merge_hold(holds: dict[tuple[str, str], Hold], hold: Hold) -> None:
    old = holds.get((hold.device, hold.kind))
    if old:
        halves = {name: getattr(old, name) or getattr(hold, name) for name in ("live", "config", "releasing", "stale")}
        hold = dataclasses.replace(old, **halves)
    holds[(hold.device, hold.kind)] = hold


def _take_out(holds: list[Hold], hold: Hold) -> bool:
    """Takes the row of HOLD (whatever is in it) out of HOLDS; whether it was there."""
    row = (hold.machine, hold.device, hold.kind)
    for known in holds:
        if (known.machine, known.device, known.kind) == row:
            holds.remove(known)
            return True
    return False


def _merge_missing(missing: dict[str, Missing], claim: Claim, live: bool) -> None:
    old = missing.get(claim.id)
    row = Missing(claim.id, claim.text, live, not live, claim.alias, claim.kind)
    if old:
        row = dataclasses.replace(old, live=old.live or live, config=old.config or not live)
    missing[claim.id] = row


def _index(index: dict[_K, dict[_V, None]], key: _K | None, name: _V) -> None:
    if key is not None:
        index.setdefault(key, {})[name] = None


def _unindex(index: dict[_K, dict[_V, None]], key: _K | None, name: _V) -> None:
    if key is not None and key in index:
        index[key].pop(name, None)
        if not index[key]:
            del index[key]


def _add(counter: Counter[Blocker], blockers: tuple[Blocker, ...], by: int) -> None:
    for blocker in blockers:
        counter[blocker] += by
        if not counter[blocker]:
            del counter[blocker]
