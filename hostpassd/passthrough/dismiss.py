"""Dismiss: takes devices, and what must move with them, out of a machine, and gives them back to the host. Pure."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from hostpassd import errors
from hostpassd.model.device import Device
from hostpassd.model.machine import Machine, Missing
from hostpassd.model.order import in_tree_order
from hostpassd.model.pci_address import PciAddress
from hostpassd.passthrough.plan import (
    check_instance,
    check_number,
    check_reachable,
    check_single,
    claim_on,
    hold_of,
    locks_of,
)
from hostpassd.passthrough.request import Options, Plan, Request
from hostpassd.passthrough.steps import Reattach, Unplug, Unstore
from hostpassd.state import State
from hostpassd.state.eligibility import mates
from hostpassd.state.find import missing_at, missing_by_id, one_device, one_machine


class _Part(NamedTuple):
    """What is done about one of the texts that were asked for."""

    asked: tuple[str, ...]
    moved: Mapping[str, int]  # the instance of each that moves, by its name
    unstore: Sequence[Unstore]
    unplug: Sequence[Unplug]
    locks: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Dismiss(Request):
    """Takes devices, or claims on something that is not here, out of a machine."""

    operation = "dismiss"

    def plan(self, state: State) -> Plan:
        """The plan that takes the devices, and their companions that the machine holds, back.

        The id of a claim that is missing goes first; what is at a place now goes before what was there last. What the
        machine does not have is passed over, unless it has none of them. Errors: those of `find`, InvalidArgs,
        HypervisorUnavailable, InvalidOption, StalePlan, NotAssigned, NotSupported.
        """
        check_number(self.devices)
        machine = one_machine(state, self.machine)
        check_single(self.devices, self.options)
        parts, error = [], None
        for text in dict.fromkeys(self.devices):
            try:
                parts.append(self._part(state, machine, text))
            except errors.NotAssigned as not_assigned:
                error = error or not_assigned
        if error and not parts:
            raise error
        return self._together(state, machine, parts)

    def action(self, overridden: bool) -> str:
        return "dismiss"

    def _together(self, state: State, machine: Machine, parts: Sequence[_Part]) -> Plan:
        """Of everything that is unstored first, unplugged then, and given back to its host driver last."""
        _check_places(parts)
        moved = {name: instance for part in parts for name, instance in part.moved.items()}
        names = in_tree_order(state, moved)
        unstore = dict.fromkeys(step for part in parts for step in part.unstore)
        unplug = dict.fromkeys(step for part in parts for step in part.unplug)
        # Only when the last member is out can a host driver bind: the group is VFIO's as long as one is in.
        here = (state.device(step.device) for step in unplug if state.device(step.device))
        released = (d for d in here if d and d.pci and d.instance == moved[d.name])
        return Plan(
            self,
            machine.key,
            tuple(in_tree_order(state, {name for part in parts for name in part.asked})),
            tuple(names),
            tuple(moved[name] for name in names),
            (*unstore, *unplug, *(Reattach(d.name) for d in released)),
            tuple(sorted({lock for part in parts for lock in part.locks})),
        )

    def _part(self, state: State, machine: Machine, text: str) -> _Part:
        if row := missing_by_id(state, machine, text):
            return self._missing(state, machine, (row,))
        try:
            return self._here(state, machine, one_device(state, text))
        except (errors.NoSuchDevice, errors.NotAssigned, errors.StalePlan):
            rows = missing_at(state, machine, text, self.options.instance)
            if not rows:
                raise
        return self._missing(state, machine, rows)

    def _here(self, state: State, machine: Machine, device: Device) -> _Part:
        check_reachable(machine)
        check_instance([device], self.options)
        hold = hold_of(state, machine, device.name)
        if hold is None:
            _refuse_other_kinds(state, machine, device)
            raise errors.NotAssigned(
                f"{machine.name} does not have {device.name}: see the machine's Devices and Missing."
            )
        live, config = _halves_held(self.options, machine, device.name, live=hold.live, config=hold.config)
        devices = _held_with(state, machine, device, live, config)
        stored = [(d.name, claim_on(state, machine, d.name, live=False)) for d in devices if config]
        plugged = [(d.name, claim_on(state, machine, d.name, live=True)) for d in devices if live]
        return _Part(
            (device.name,),
            {d.name: d.instance for d in devices},
            [Unstore(name, claim) for name, claim in stored if claim],
            [Unplug(name, claim.alias, claim.id) for name, claim in plugged if claim],
            locks_of(state, devices),
        )

    def _missing(self, state: State, machine: Machine, rows: Sequence[Missing]) -> _Part:
        """What takes ROWS, claims on one thing that is not on this host, out of MACHINE."""
        # The name and the instance that it had, ('', 0) if it never was here.
        place, instance = state.last_place(machine.key, rows[0].id)
        if self.options.instance not in (None, instance):
            raise errors.StalePlan(f"{rows[0].id} is not the instance {self.options.instance}: look again.")
        check_reachable(machine)
        ids = {row.id for row in rows}
        name = place or rows[0].id
        unstore = [Unstore(name, claim) for claim in machine.config if claim.id in ids]
        live_claims = [claim for claim in machine.live if claim.id in ids and claim.alias and not claim.missing]
        unplug = [Unplug(name, claim.alias, claim.id) for claim in live_claims]
        live, config = _halves_held(self.options, machine, name, live=bool(unplug), config=bool(unstore))
        return _Part((name,), {name: instance}, unstore if config else [], unplug if live else [], (name,))


def _check_places(parts: Sequence[_Part]) -> None:
    """Raises InvalidArgs if PARTS are about two things at one place: what is there, and what was there last."""
    moved = {thing for part in parts for thing in part.moved.items()}
    for name, count in Counter(name for name, _ in moved).items():
        if count > 1:
            raise errors.InvalidArgs(
                f"What is at {name} and what was there last are two things: dismiss one after the other."
            )


def _halves_held(options: Options, machine: Machine, name: str, *, live: bool, config: bool) -> tuple[bool, bool]:
    """The halves, of those asked for, in which MACHINE has NAME; LIVE, CONFIG: whether it has it in each.

    Errors: InvalidOption where none is asked for, NotAssigned where it has it in none of them.
    """
    if options.live is False and options.config is False:
        raise errors.InvalidOption("The options live and config are both false: ask for one of them.")
    found = live and options.live is not False, config and options.config is not False
    if not any(found):
        half = "in its stored configuration" if options.live is False else "live"
        raise errors.NotAssigned(f"{machine.name} does not have {name} {half}: leave live and config out.")
    return found


def _refuse_other_kinds(state: State, machine: Machine, device: Device) -> None:
    for hold in state.holds_in(machine.key):
        if hold.device == device.name:
            text = f"{machine.name} uses {device.name} as {hold.kind}: change that in the machine's own configuration."
            raise errors.NotSupported(text)
    for twin in state.twins(machine.key):
        if any(hold.device == device.name for hold in state.holds_in(twin)):
            text = (
                f"It is not {machine.uri} but {twin.uri} whose machine {machine.uuid} has {device.name}: take it there."
            )
            raise errors.NotAssigned(text)


def _held_with(state: State, machine: Machine, device: Device, live: bool, config: bool) -> list[Device]:
    """DEVICE and what MACHINE gives up with it: the IOMMU group, and of a card what is in one guest slot with it."""
    found = [device]
    for d in found:  # which grows meanwhile: a function of the card can have a group of its own
        for mate in (*mates(state, d), *_slot_mates(state, machine, d, live, config)):
            if mate not in found and hold_of(state, machine, mate.name):
                found.append(mate)
    return found


def _slot_mates(state: State, machine: Machine, device: Device, live: bool, config: bool) -> Iterable[Device]:
    """The functions of DEVICE's host slot that are in its guest slot too, in one of the halves asked for."""
    for half, claims in ((True, machine.live if live else ()), (False, machine.config if config else ())):
        own = claim_on(state, machine, device.name, live=half)
        if not device.pci or not own or not own.guest_address:
            continue
        slot = PciAddress.parse(own.guest_address).slot
        for claim in claims:
            mate = state.device(state.find_claim(machine.key, claim, live=half) or "")
            in_slot = claim.guest_address and PciAddress.parse(claim.guest_address).slot == slot
            if in_slot and mate and mate.pci and mate.pci.place.slot == device.pci.place.slot:
                yield mate
