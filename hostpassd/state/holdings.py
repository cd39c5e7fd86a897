"""The machines, what they claim, and which devices that means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from hostpassd.model.device import Device, Key
from hostpassd.model.machine import (
    Claim,
    Hold,
    Look,
    Machine,
    MachineKey,
    Missing,
    UsbSource,
)
from hostpassd.model.naming import location
from hostpassd.state.changes import Batches, Entity, Lost, Standing
from hostpassd.state.multimap import Multimap
from hostpassd.state.tree import Tree

# By what a claim can name a device: ("pci", address), ("usb", bus, number), ("usb-id", vendor, product) ...

# What a reading of the host's uses can lead on to the devices behind: a device node, an interface.
_BEHIND = ("node", "net")

# The states of a machine that runs, and is not only there (paused, as one that a migration brings).
_RUNS = ("running", "idle")

# The holds of a machine, by device and kind.
_Rows = dict[tuple[str, str], Hold]


class _Place(NamedTuple):
    """The device on which a claim stood last."""

    device: str = ""
    instance: int = 0
    look: Look = Look()


class Holdings:
    """What machines hold. HELD_OTHERWISE is called with each device of which other holds are told than before.

    `copies` has every machine of every hypervisor, and `_in` and `_missing_in` say of each what its claims come to:
    always as they would be found afresh, from the keys that the devices have in `_keys` and the `_nodes` (of
    partitions, volumes, virtual interfaces, each with the devices here behind it, if any). That is kept up by resolving
    a machine whenever it is read anew, or one of the keys that it names (`_interest`) has other devices, or devices
    that lie elsewhere. A node n is in `_leading[d]` exactly when d is in `_nodes[n]`.

    What is told is one for each UUID: `machines` has the copy that runs, `_told` the holds of all copies, and `missing`
    what the copy in `machines` claims and is not here. A device d has the row (u, k) in `_on` exactly when `_told[u]`
    has the row (d, k). `lost` has the holds whose devices went while claims of theirs are missing, until these stand on
    a device again, or are no more.
    """

    def __init__(
        self,
        tree: Tree,
        batches: Batches,
        held_otherwise: Callable[[str], None],
        category: Callable[[str], str],
    ) -> None:
        """CATEGORY: of a device, as far as it is known yet."""
        self.copies: dict[MachineKey, Machine] = {}
        self.machines: dict[str, Machine] = {}
        self.missing: dict[str, tuple[Missing, ...]] = {}
        self._tree = tree
        self._batches = batches
        self._held_otherwise = held_otherwise
        self._category = category
        self._copies_of: Multimap[str, MachineKey] = Multimap()
        self._keys: Multimap[Key, str] = Multimap()
        self.nodes: dict[str, tuple[str, ...]] = {}
        self.leading: Multimap[str, str] = Multimap()
        self._interest: Multimap[Key, MachineKey] = Multimap()
        self.by_machine: dict[MachineKey, _Rows] = {}
        self.missing_in: dict[MachineKey, tuple[Missing, ...]] = {}
        self.told: dict[str, _Rows] = {}
        self.lost: dict[str, dict[tuple[str, str], Lost]] = {}
        self.by_device: Multimap[str, tuple[str, str]] = Multimap()
        self.asked: dict[MachineKey, set[str]] = {}  # the aliases that a guest was asked for
        self._places: dict[MachineKey, dict[str, _Place]] = {}  # where each claim of a machine stood last

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
        return self._places.get(machine, {}).get(claim_id, _Place())[:2]

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
        self._resolve_interested([*keys, *((kind, node) for node in nodes for kind in _BEHIND)], gone=True)

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

    def look_again(self, name: str) -> None:
        """What the device NAME is to people may be told otherwise now: the last of it is kept for when it has gone."""
        for key in {key for uuid, _ in self.by_device[name] for key in self._copies_of[uuid]}:
            now = self._place(name)
            # One that stood there on an earlier instance stays with that.
            for claim in [claim for claim, place in self._places[key].items() if place[:2] == now[:2]]:
                self._places[key][claim] = now

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

    def resolve(self, key: MachineKey, *, gone: bool = False) -> None:
        """Stands each claim of the machine KEY on the device that it means now; what means none is missing.

        GONE: because a device has gone.
        """
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
                    places[claim.id] = self._place(device)
                    _merge_hold(rows, self._hold(machine, claim, device, live))
                if not devices and not self._is_here(claim):
                    look, fits = places.get(claim.id, _Place()).look, self._targets(claim)
                    _merge_missing(missing, claim, live, look, ambiguous=bool(fits))
            own = frozenset(device for device, _ in rows)
        self.by_machine[key], self.missing_in[key] = rows, tuple(missing.values())
        self._show(key.uuid, gone=gone)

    def _resolve_interested(self, keys: Iterable[Key], *, gone: bool = False) -> None:
        """Resolves the machines that name something by one of KEYS."""
        for machine in dict.fromkeys(machine for key in keys for machine in self._interest[key]):
            self.resolve(machine, gone=gone)

    def _place(self, name: str) -> _Place:
        device = self._tree.devices[name]
        return _Place(name, device.instance, Look(device.label, self._category(name), location(device)))

    def _find(self, claim: Claim, own: frozenset[str] | None) -> list[str]:
        """The devices that CLAIM means: one, but for a volume on several disks or a bridge of several interfaces.

        OWN: what the machine holds live, which tells the twins of a stored claim apart. None: CLAIM is live itself,
        one of the twins is in use, and none of them is free as long as nobody knows which.
        """
        targets = self._targets(claim)
        if len(targets) > 1 and isinstance(claim.source, UsbSource) and own is not None:
            # libvirt refuses an ambiguous vendor and product; the live half says which of the twins it is.
            targets = [name for name in targets if name in own]
            return targets if len(targets) == 1 else []
        return targets

    def _targets(self, claim: Claim) -> list[str]:
        """The devices that CLAIM fits."""
        # A serial port on the mainboard is below nothing that can be assigned: it is held itself.
        return list(dict.fromkeys(self._tree.target(name) or name for name in self._candidates(claim)))

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
        return Hold(
            machine=machine.uuid,
            device=device,
            kind=claim.kind,
            live=live,
            config=not live,
            alias=claim.alias,
            releasing=releasing,
            stale=machine.stale,
            claims=(claim.id,),
            guest_address=claim.guest_address,
            settings=claim.settings,
        )

    # --- what is told ---

    def _show(self, uuid: str, *, gone: bool = False) -> None:
        """Tells of all copies of a machine together. One has the path: the one that runs."""
        old, new = self.machines.get(uuid), self._foremost(uuid)
        if new is None:
            self._tell_holds(uuid, {}, gone=False)
            for index in (self.told, self.lost, self.machines, self.missing):
                index.pop(uuid, None)
            self._batches.current.remove(("machine", uuid))
            return
        self.machines[uuid] = new
        self._tell_machine(old, new)
        rows: _Rows = {}
        for hold in (hold for key in (new.key, *self.twins(new.key)) for hold in self.within(key)):
            _merge_hold(rows, hold)
        self._tell_holds(uuid, rows, gone=gone)
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

    def _tell_holds(self, uuid: str, new: _Rows, *, gone: bool) -> None:
        old = self.told.get(uuid, {})
        changed = [row for row in {**old, **new} if old.get(row) != new.get(row)]
        lost = self.lost.get(uuid, {})
        if not changed and not lost:
            return
        claimed, missing = self._claimed(uuid)
        self.lost[uuid] = {}
        for row in dict.fromkeys((*lost, *changed)):
            before = old.get(row) or lost.get(row)
            after = new.get(row) or (_left(before, claimed, missing, gone=gone) if before else None)
            if isinstance(after, Lost) and any(claim in missing for claim in after.hold.claims):
                self.lost[uuid][row] = after
            self._batches.current.stand((uuid, *row), before, after)
        if changed:
            self._take(uuid, new, changed)

    def _claimed(self, uuid: str) -> tuple[dict[str, Missing], dict[str, Missing]]:
        """What all copies of a machine claim, as if it were missing, and what of it is; by the claims' ids."""
        claimed: dict[str, Missing] = {}
        for copy in (self.copies[key] for key in self._copies_of[uuid]):
            for live, claims in ((True, copy.live), (False, copy.config)):
                for claim in claims:
                    if not (live and claim.missing):
                        _merge_missing(claimed, claim, live, Look())
        missing = {row.id: row for key in self._copies_of[uuid] for row in self.missing_in[key]}
        foremost = self.missing_in.get(self.machines[uuid].key, ())  # what the machine itself is told to miss
        return claimed, missing | {row.id: row for row in foremost}

    def _take(self, uuid: str, new: _Rows, changed: list[tuple[str, str]]) -> None:
        """NEW is told of the machine with UUID from now on; the rows CHANGED are others than before."""
        self._batches.current.change(("machine", uuid))
        self.told[uuid] = new
        for kind in {kind for _, kind in changed}:
            self.by_device.put((uuid, kind), (device for device, other in new if other == kind))
        for device in dict.fromkeys(device for device, _ in changed):
            self._held_otherwise(device)


def _merge_hold(rows: _Rows, hold: Hold) -> None:
    """Adds HOLD to ROWS: of one device and kind there is one row, with the halves of all."""
    old = rows.get((hold.device, hold.kind))
    if old:
        halves = {name: getattr(old, name) or getattr(hold, name) for name in ("live", "config", "releasing", "stale")}
        hold = dataclasses.replace(
            old,
            **halves,
            claims=tuple(dict.fromkeys((*old.claims, *hold.claims))),
            guest_address=old.guest_address or hold.guest_address,
            settings=old.settings.or_else(hold.settings),
        )
    rows[(hold.device, hold.kind)] = hold


def _left(
    before: Hold | Lost, claimed: Mapping[str, Missing], missing: Mapping[str, Missing], *, gone: bool
) -> Standing:
    """What is left of BEFORE, a row that stands on its device no more; of a machine with these claims.

    Lost if claims of it are missing, or if its device has GONE and they still stand on others. A lost one whose claims
    have come to stand elsewhere is told no more.
    """
    hold = before.hold if isinstance(before, Lost) else before
    rows = tuple(missing[claim] for claim in hold.claims if claim in missing)
    others = tuple(claimed[claim] for claim in hold.claims if claim in claimed)
    if rows or (gone and others):
        return Lost(hold, rows or others)
    return before if others and isinstance(before, Lost) else None


def _merge_missing(
    missing: dict[str, Missing], claim: Claim, live: bool, look: Look, *, ambiguous: bool = False
) -> None:
    old = missing.get(claim.id)
    row = Missing(claim.id, claim.text, live, not live, claim.alias, claim.kind, look, ambiguous)
    if old:
        row = dataclasses.replace(old, live=old.live or live, config=old.config or not live)
    missing[claim.id] = row
