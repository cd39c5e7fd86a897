"""Assign: hands a device, and what must move with it, to a machine. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from hostpassd import errors
from hostpassd.machines.domain_xml import claim_of, hostdev_xml
from hostpassd.model.codes import Blocker, blocker
from hostpassd.model.device import ASSIGNABLE_KINDS, Device
from hostpassd.model.drivers import VFIO_PCI
from hostpassd.model.machine import Hold, Machine
from hostpassd.model.order import in_tree_order
from hostpassd.passthrough.cards import card_places, functions_beside
from hostpassd.passthrough.plan import DETACHABLE_KINDS, check_instance, check_reachable, hold_of, locks_of
from hostpassd.passthrough.request import Options, Plan, Request
from hostpassd.passthrough.steps import Attach, Detach, Step, Store
from hostpassd.state import State, eligibility
from hostpassd.state.find import one_device, one_machine


@dataclasses.dataclass(frozen=True, slots=True)
class Assign(Request):
    """Hands a device to a machine."""

    operation = "assign"

    def plan(self, state: State) -> Plan:
        """The plan that hands the device and its companions to the machine, with what blocks it.

        Errors: those of `find`, HypervisorUnavailable, InvalidOption, StalePlan, AlreadyAssigned.
        """
        machine = one_machine(state, self.machine)
        device = one_device(state, self.device)
        check_reachable(machine)
        check_instance(device, self.options)
        live, config = _halves(machine, self.options)
        devices = _moving(state, device) if device.kind in ASSIGNABLE_KINDS else [device]
        plan = Plan(
            self,
            machine.key,
            tuple(d.name for d in devices),
            tuple(d.instance for d in devices),
            (),
            locks_of(state, devices),
            blockers_for(state, device, machine),
        )
        if device.kind not in ASSIGNABLE_KINDS:
            return plan
        _check_fits(device, self.options)
        held = {d.name: hold_of(state, machine, d.name) for d in devices}
        to_store = [d for d in devices if config and not _half(held[d.name], live=False)]
        to_attach = [d for d in devices if live and not _half(held[d.name], live=True)]
        if not to_store and not to_attach:
            raise errors.AlreadyAssigned(f"{machine.name} already has {device.name}: there is nothing to do.")
        return dataclasses.replace(
            plan,
            steps=(*self._store(state, machine, device, to_store), *self._attach(state, devices, to_attach)),
            blockers=tuple(sorted((*plan.blockers, *_port_blockers(machine, to_attach)), key=lambda b: b.place)),
            loses=_loses(state, devices),
            consequences=tuple(_consequences(devices, to_attach)),
        )

    def action(self, overridden: bool) -> str:
        return "assign-override" if overridden else "assign"

    def _store(self, state: State, machine: Machine, asked: Device, devices: list[Device]) -> Iterable[Step]:
        places = card_places(machine, asked, devices, self.options.guest_address)
        # Those with a place first: for the others libvirt takes what is free.
        for d in sorted(devices, key=lambda d: (d.name not in places, places.get(d.name, ""))):
            xml = _xml(state, d, self.options, asked, places.get(d.name, ""), config=True)
            yield Store(d.name, claim_of(xml))

    def _attach(self, state: State, moving: list[Device], devices: list[Device]) -> Iterable[Step]:
        if len(moving) > 1:
            # libvirt frees a managed device as it attaches it, but the group must be free before the first attach.
            yield from (Detach(d.name, d.driver) for d in devices if d.pci and d.driver not in ("", VFIO_PCI))
        for d in devices:
            of_card = len(functions_beside(d, devices)) > 1
            yield Attach(d.name, alias_of(d), _xml(state, d, self.options, moving[0], "", config=False), of_card)


def blockers_for(state: State, device: Device, machine: Machine) -> tuple[Blocker, ...]:
    """The device's blockers without the target machine's own holds, of the kinds that an assign makes, on what moves.

    A disk that the machine has by its node is in use, by the machine itself. So is what it has below the device, and
    what its copy on another hypervisor has.
    """
    own: set[Blocker] = set()
    others: set[Blocker] = set()
    for d in _moving(state, device):
        for key in (machine.key, *state.twins(machine.key)):
            for hold in state.holds_in(key):
                if hold.device == d.name:
                    is_own = key == machine.key and hold.kind in DETACHABLE_KINDS
                    (own if is_own else others).update(eligibility.hold_blockers(state, d, hold))
    return tuple(b for b in eligibility.blockers(state, device) if b not in own or b in others)


def alias_of(device: Device) -> str:
    """The alias under which hostpassd attaches DEVICE: new for each plug-in, so that a stale twin is never hit."""
    return f"ua-hostpassd-{device.name.replace('_', '-')}-{device.instance}"


def _moving(state: State, device: Device) -> list[Device]:
    """What an assign of DEVICE moves, DEVICE first."""
    return [device, *(state.devices[name] for name in eligibility.companions(state, device))]


def _check_fits(device: Device, options: Options) -> None:
    if options.guest_address and device.kind not in ("pci", "mdev"):
        raise errors.InvalidOption(
            f"{device.name} is {device.kind}, which gets no PCI address: leave the option guest-address out."
        )
    if options.rom_bar is not None and not device.pci:
        raise errors.InvalidOption(
            f"{device.name} is {device.kind}, which has no ROM to show: leave the option rom-bar out."
        )


def _halves(machine: Machine, options: Options) -> tuple[bool, bool]:
    live = machine.active if options.live is None else options.live
    config = machine.persistent if options.config is None else options.config
    if live and not machine.active:
        raise errors.InvalidOption(f"{machine.name} does not run: start it, or leave the option live out.")
    if config and not machine.persistent:
        raise errors.InvalidOption(
            f"{machine.name} is transient and has no stored configuration: leave the option config out."
        )
    if not live and not config:
        raise errors.InvalidOption("The options live and config are both false: ask for one of them.")
    return live, config


def _port_blockers(machine: Machine, to_attach: list[Device]) -> Iterable[Blocker]:
    """Whether the running machine has a free place for each PCI device: libvirt's own refusal is cryptic."""
    for express, free, what in (
        (True, len(machine.ports.express), "an empty pcie-root-port"),
        (False, len(machine.ports.conventional), "a pcie-to-pci-bridge with a free slot"),
    ):
        needed = [d for d in to_attach if d.pci and d.pci.express is express]
        if len(needed) > free:
            names, told = tuple(d.name for d in needed), machine.shown_name
            yield blocker("no-free-port", names[0], machine_name=told, devices=names, places=free, needs=what)


# The kinds of node that are what a device does for the host.
_FUNCTIONS = frozenset({"net", "block", "drm", "input", "sound", "video", "tty", "tpm"})


def _loses(state: State, devices: list[Device]) -> tuple[str, ...]:
    below = (state.devices[name] for device in devices for name in state.descendants(device.name))
    return tuple(in_tree_order(state, (d.name for d in below if d.kind in _FUNCTIONS)))


def _consequences(devices: list[Device], to_attach: list[Device]) -> Iterable[str]:
    pci = [d for d in devices if d.pci]
    if pci:
        yield "all memory of the machine is pinned while it runs with the device"
    if any(d.kind in ("pci", "mdev") for d in devices):
        yield "the machine cannot be migrated or saved while it has the device"
    for d in pci:
        if d.pci and not d.pci.reset_methods:
            yield f"{d.name} cannot be reset: what one user leaves in it, the next one finds"
    if any(len(functions_beside(d, to_attach)) > 1 for d in to_attach):
        yield "in the running machine each function has a port of its own, not one slot for the card"


def _half(hold: Hold | None, *, live: bool) -> bool:
    return hold is not None and (hold.live if live else hold.config)


def _xml(state: State, device: Device, options: Options, asked: Device, place: str, *, config: bool) -> str:
    """PLACE: the guest address as a function of a card, '' for none."""
    unique = not device.usb or len(state.keyed(("usb-id", device.usb.vendor_id, device.usb.product_id))) == 1
    return hostdev_xml(
        device,
        alias=alias_of(device),
        config=config,
        unique=unique,
        guest_address=place or (options.guest_address if device is asked else ""),
        multifunction=place.endswith(".0"),
        rom_bar=options.rom_bar if device is asked else None,
    )
