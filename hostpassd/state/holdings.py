"""The machines, what they claim, and which devices that means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from hostpassd.model.device import Device, Key
from hostpassd.model.machine import (
    Claim,
    Hold,
    Machine,
    MachineKey,
    Missing,
    UsbSource,
)
from hostpassd.state.changes import Batches, Entity
from hostpassd.state.multimap import Multimap
from hostpassd.state.tree import Tree

# By what a claim can name a device: ("pci", address), ("usb", bus, number), ("usb-id", vendor, product) ...

# What a reading of the host's uses can lead on to the devices behind: a device node, an interface.
_BEHIND = ("node", "net")

# The states of a machine that runs, and is not only there (paused, as one that a migration brings).
_RUNS = ("running", "idle")

# The holds of a machine, by device and kind.
_Rows = dict[tuple[str, str], Hold]


class Holdings:
    """What machines hold. HELD_OTHERWISE is called with each device of which other holds are told than before.

    `copies` has every machine of every hypervisor, and `_in` and `_missing_in` say of each what its claims come to:
    always as they would be found afresh, from the keys that the devices have in `_keys` and the `_nodes` (of
    partitions, volumes, virtual interfaces, each with the devices here behind it, if any). That is kept up by resolving
    a machine whenever it is read anew, or one of the keys that it names (`_interest`) has other devices, or devices
    that lie elsewhere. A node n is in `_leading[d]` exactly when d is in `_nodes[n]`.

    What is told is one for each UUID: `machines` has the copy that runs, `_told` the holds of all copies, and `missing`
    what the copy in `machines` claims and is not here. A device d has the row (u, k) in `_on` exactly when `_told[u]`
    has the row (d, k).
    """

    def __init__(self, tree: Tree, batches: Batches, held_otherwise: Callable[[str], None]) -> None:
        self.copies: dict[MachineKey, Machine] = {}
        self.machines: dict[str, Machine] = {}
        self.missing: dict[str, tuple[Missing, ...]] = {}
        self._tree = tree
        self._batches = batches
        self._held_otherwise = held_otherwise
        self._copies_of: Multimap[str, MachineKey] = Multimap()
        self._keys: Multimap[Key, str] = Multimap()
        self.nodes: dict[str, tuple[str, ...]] = {}
        self.leading: Multimap[str, str] = Multimap()
        self._interest: Multimap[Key, MachineKey] = Multimap()
        self.by_machine: dict[MachineKey, _Rows] = {}
        self.missing_in: dict[MachineKey, tuple[Missing, ...]] = {}
        self.told: dict[str, _Rows] = {}
        self.by_device: Multimap[str, tuple[str, str]] = Multimap()
        self.asked: dict[MachineKey, set[str]] = {}  # the aliases that a guest was asked for
        self._places: dict[MachineKey, dict[str, tuple[str, int]]] = {}  # where each claim of a machine stood last

    # --- reading ---

    def on(self, device: str) -> list[Hold]:
        """What is told of DEVICE."""
        return [self.told[uuid][(device, kind)] for uuid, kind in self.by_device[device]]

    def of(self, uuid: str) -> Iterable[Hold]:
        """What is told of the machine with UUID."""
        return self.told.get(uuid, {}).values()

    def within(self, machine: MachineKey) -> Iterable[Hold]:
        """The holds of this very machine."""
        return self.by_machine.get(machine, {}).values()

    def twins(self, machine: MachineKey) -> list[MachineKey]:
        """The copies of MACHINE on other hypervisors."""
        return [key for key in self._copies_of[machine.uuid] if key != machine]

    def keyed(self, key: Key) -> list[str]:
        """The devices that KEY names; of a partition's, volume's or bridge's those behind it."""
        return [*self._keys[key], *(self.nodes.get(str(key[1]), ()) if key[0] in _BEHIND else ())]

    def find_claim(self, machine: MachineKey, claim: Claim, *, live: bool) -> str | None:
        """The device that a machine's CLAIM means now."""
        if live and claim.missing:
            return None
        own = frozenset(hold.device for hold in self.within(machine) if hold.live)
        return next(iter(self._find(claim, None if live else own)), None)

    def last_place(self, machine: MachineKey, claim_id: str) -> tuple[str, int]:
        """The name and the instance of the device on which a claim stood last; ('', 0): it never stood on any."""
        return self._places.get(machine, {}).get(claim_id, ("", 0))

    # --- what devices are called ---

    def rename(self, device: Device) -> None:
        """Updates by what claims can name DEVICE."""
        self._resolve_interested(self._keys.put(device.name, device.lookup_keys()))

    def drop(self, name: str) -> None:
        """NAME is a device no more. What came of its partitions is not known before the next reading."""
        keys = self._keys.put(name, ())
        nodes = list(self.leading[name])
        for node in nodes:
            self.nodes[node] = tuple(other for other in self.nodes[node] if other != name)
            self.leading.put(node, self.nodes[node])
            if not self.nodes[node]:
                del self.nodes[node]
        self._resolve_interested([*keys, *((kind, node) for node in nodes for kind in _BEHIND)])

    def moved(self, names: Iterable[str]) -> None:
        """The devices NAMES lie below others than before: what stands for them in an operation may be another."""
        for name in names:
            led = [(kind, node) for node in self.leading[name] for kind in _BEHIND]
            self._resolve_interested([*self._keys.keys_of(name), *led])

    def read_nodes(self, nodes: Mapping[str, tuple[str, ...]]) -> None:
        """NODES, with the devices behind each, are all that there are now."""
        devices = self._tree.devices
        new = {node: tuple(name for name in names if name in devices) for node, names in nodes.items()}
        changed = [node for node in {**self.nodes, **new} if self.nodes.get(node) != new.get(node)]
        self.nodes = new
        for node in changed:
            self.leading.put(node, new.get(node, ()))
        self._resolve_interested((kind, node) for node in changed for kind in _BEHIND)

    # --- machines ---

    def read(self, machine: Machine) -> None:
        """MACHINE is as its hypervisor describes it now."""
        if self.copies.get(machine.key) == machine:
            return
        self.copies[machine.key] = machine
        self._copies_of.put(machine.key, [machine.uuid])
        self._interest.put(
            machine.key, (key for claim in (*machine.live, *machine.config) for key in claim.source.lookup_keys())
        )
        self.resolve(machine.key)

    def lose(self, key: MachineKey) -> None:
        """The machine KEY is no more."""
        if not self.copies.pop(key, None):
            return
        self._copies_of.put(key, ())
        self._interest.put(key, ())
        for index in (self.by_machine, self.missing_in, self._places, self.asked):
            index.pop(key, None)
        self._show(key.uuid)

    def releasing(self, key: MachineKey, alias: str, *, asked: bool) -> None:
        """The guest of KEY was asked to let the device with ALIAS go; or (not ASKED) has, or needs not any more."""
        aliases = self.asked.setdefault(key, set())
        (aliases.add if asked else aliases.discard)(alias)
        self.resolve(key)

    def resolve(self, key: MachineKey) -> None:
        """Stands each claim of the machine KEY on the device that it means now; what means none is missing."""
        machine = self.copies.get(key)
        if not machine:
            return
        self.asked[key] = {c.alias for c in machine.live} & self.asked.get(key, set())
        made = {claim.id for claim in (*machine.live, *machine.config)}
        places = {claim: place for claim, place in self._places.get(key, {}).items() if claim in made}
        self._places[key] = places
        rows: _Rows = {}
        missing: dict[str, Missing] = {}
        own: frozenset[str] = frozenset()
        for live, claims in ((True, machine.live), (False, machine.config)):
            for claim in claims:
                if live and claim.missing:
                    continue
                devices = self._find(claim, None if live else own)
                for device in devices:
                    places[claim.id] = (device, self._tree.devices[device].instance)
                    _merge_hold(rows, self._hold(machine, claim, device, live))
                if not devices and not self._is_here(claim):
                    _merge_missing(missing, claim, live)
            own = frozenset(device for device, _ in rows)
        self.by_machine[key], self.missing_in[key] = rows, tuple(missing.values())
        self._show(key.uuid)

    def _resolve_interested(self, keys: Iterable[Key]) -> None:
        """Resolves the machines that name something by one of KEYS."""
        for machine in dict.fromkeys(machine for key in keys for machine in self._interest[key]):
            self.resolve(machine)

    def _find(self, claim: Claim, own: frozenset[str] | None) -> list[str]:
        """The devices that CLAIM means: one, but for a volume on several disks or a bridge of several interfaces.

        OWN: what the machine holds live, which tells the twins of a stored claim apart. None: CLAIM is live itself,
        one of the twins is in use, and none of them is free as long as nobody knows which.
        """
        # A serial port on the mainboard is below nothing that can be assigned: it is held itself.
        targets = list(dict.fromkeys(self._tree.target(name) or name for name in self._candidates(claim)))
        if len(targets) > 1 and isinstance(claim.source, UsbSource) and own is not None:
            # libvirt refuses an ambiguous vendor and product; the live half says which of the twins it is.
            targets = [name for name in targets if name in own]
            return targets if len(targets) == 1 else []
        return targets

    def _is_here(self, claim: Claim) -> bool:
        """Whether CLAIM means something of this host that is on no device: a loop, a bridge without members."""
        return any(key[0] in _BEHIND and key[1] in self.nodes for key in claim.source.lookup_keys())

    def _candidates(self, claim: Claim) -> list[str]:
        keys = claim.source.lookup_keys()
        if not keys:
            return []
        found = self.keyed(keys[0])
        return [name for name in found if all(name in self._keys[key] for key in keys[1:])]

    def _hold(self, machine: Machine, claim: Claim, device: str, live: bool) -> Hold:
        releasing = live and claim.alias in self.asked[machine.key]
        return Hold(machine.uuid, device, claim.kind, live, not live, claim.alias, releasing, machine.stale)

    # --- what is told ---

    def _show(self, uuid: str) -> None:
        """Tells of all copies of a machine together. One has the path: the one that runs."""
        old, new = self.machines.get(uuid), self._foremost(uuid)
        if new is None:
            self._tell_holds(uuid, {})
            for index in (self.told, self.machines, self.missing):
                index.pop(uuid, None)
            self._batches.current.remove(("machine", uuid))
            return
        self.machines[uuid] = new
        self._tell_machine(old, new)
        rows: _Rows = {}
        for hold in (hold for key in (new.key, *self.twins(new.key)) for hold in self.within(key)):
            _merge_hold(rows, hold)
        self._tell_holds(uuid, rows)
        missing = self.missing_in.get(new.key, ())
        if self.missing.get(uuid, ()) != missing:
            self.missing[uuid] = missing
            self._batches.current.change(("machine", uuid))
        if old and old.shown_name != new.shown_name:
            for hold in list(self.of(uuid)):
                self._held_otherwise(hold.device)

    def _foremost(self, uuid: str) -> Machine | None:
        """Of copies the one that runs, or does most; else always the same."""
        found = (self.copies[key] for key in self._copies_of[uuid])
        return min(found, key=lambda m: (not m.active, m.stale, m.state not in _RUNS, m.uri), default=None)

    def _tell_machine(self, old: Machine | None, new: Machine) -> None:
        entity: Entity = ("machine", new.uuid)
        if old and old.uri == new.uri:
            if old != new:
                self._batches.current.change(entity)
            return
        if old:
            self._batches.current.remove(entity)  # as an object it is another one: its hypervisor is
        self._batches.add(entity)

    def _tell_holds(self, uuid: str, new: _Rows) -> None:
        old = self.told.get(uuid, {})
        if new == old:
            return
        self._batches.current.change(("machine", uuid))
        self.told[uuid] = new
        changed = [row for row in {**old, **new} if old.get(row) != new.get(row)]
        for kind in {kind for _, kind in changed}:
            self.by_device.put((uuid, kind), (device for device, other in new if other == kind))
        for row in changed:
            self._tell_hold(old.get(row), new.get(row))
        for device in dict.fromkeys(device for device, _ in changed):
            self._held_otherwise(device)

    def _tell_hold(self, before: Hold | None, after: Hold | None) -> None:
        changes = self._batches.current
        if before and after:
            if (before.live, before.config) != (after.live, after.config):
                changes.holds_changed.append((before, after))
        elif after:
            changes.add_hold(after)
        elif before:
            changes.remove_hold(before)


def _merge_hold(rows: _Rows, hold: Hold) -> None:
    """Adds HOLD to ROWS: of one device and kind there is one row, with the halves of all."""
    old = rows.get((hold.device, hold.kind))
    if old:
        halves = {name: getattr(old, name) or getattr(hold, name) for name in ("live", "config", "releasing", "stale")}
        hold = dataclasses.replace(old, **halves)
    rows[(hold.device, hold.kind)] = hold


def _merge_missing(missing: dict[str, Missing], claim: Claim, live: bool) -> None:
    old = missing.get(claim.id)
    row = Missing(claim.id, claim.text, live, not live, claim.alias, claim.kind)
    if old:
        row = dataclasses.replace(old, live=old.live or live, config=old.config or not live)
    missing[claim.id] = row
