"""Assign: hands devices, and what must move with them, to a machine. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from hostpassd import errors
from hostpassd.machines.domain_xml import claim_of, hostdev_xml
from hostpassd.model.codes import CONSEQUENCES, Blocker, Detail, Fact, blocker, fact
from hostpassd.model.device import ASSIGNABLE_KINDS, Device, Mdev
from hostpassd.model.drivers import VFIO_PCI
from hostpassd.model.machine import Hold, Machine, Settings
from hostpassd.model.naming import shown
from hostpassd.model.order import in_tree_order
from hostpassd.passthrough.cards import card_places, functions_beside
from hostpassd.passthrough.plan import (
    DETACHABLE_KINDS,
    asked_devices,
    check_apart,
    check_instance,
    check_reachable,
    hold_of,
    locks_of,
)
from hostpassd.passthrough.request import Options, Plan, Request
from hostpassd.passthrough.steps import Attach, Detach, Step, Store
from hostpassd.state import State, eligibility
from hostpassd.state.eligibility import companions, mates
from hostpassd.state.find import one_machine

# The first libvirt that reads a hostdev's <driver model=...>, as libvirt counts its versions.
_TAKES_DRIVERS = 10_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Assign(Request):
    """Hands devices to a machine."""

    operation = "assign"

    def plan(self, state: State) -> Plan:
        """The plan that hands the devices and their companions to the machine, with what blocks it.

        What is there already is left as it is. Errors: those of `find` and of `asked_devices`, HypervisorUnavailable,
        InvalidOption, NotSupported, StalePlan, AlreadyAssigned.
        """
        machine = one_machine(state, self.machine)
        asked = asked_devices(state, self.devices)
        check_reachable(machine)
        check_instance(asked, self.options)
        live, config = _halves(machine, self.options)
        lacked = [d for d in asked if _lacks(state, machine, d, live=live, config=config)]
        if not lacked:
            names = ", ".join(d.name for d in asked)
            raise errors.AlreadyAssigned(f"{machine.name} already has {names}: there is nothing to do.")
        devices = _moving(state, lacked)
        check_apart(state, lacked, devices)
        plan = Plan(
            self,
            machine.key,
            tuple(d.name for d in lacked),
            tuple(d.name for d in devices),
            tuple(d.instance for d in devices),
            (),
            locks_of(state, devices),
            blockers_for(state, lacked, machine),
        )
        if any(d.kind not in ASSIGNABLE_KINDS for d in lacked):
            return plan
        _check_fits(asked, self.options)
        _check_version(state, machine, self.options)
        held = {d.name: hold_of(state, machine, d.name) for d in devices}
        to_store = [d for d in devices if config and not _half(held[d.name], live=False)]
        to_attach = [d for d in devices if live and not _half(held[d.name], live=True)]
        _check_used(self.options, asked, to_store, to_attach)
        return dataclasses.replace(
            plan,
            steps=(*self._store(state, machine, lacked, to_store), *self._attach(state, lacked, devices, to_attach)),
            blockers=tuple(sorted((*plan.blockers, *_port_blockers(machine, to_attach)), key=lambda b: b.place)),
            loses=_loses(state, devices),
            consequences=tuple(_consequences(state, lacked, devices)),
        )

    def action(self, overridden: bool) -> str:
        return "assign-override" if overridden else "assign"

    def _store(self, state: State, machine: Machine, asked: list[Device], devices: list[Device]) -> Iterable[Step]:
        places = card_places(machine, asked[0], devices, self.options.guest_address)
        # Those with a place first: for the others libvirt takes what is free.
        for d in sorted(devices, key=lambda d: (d.name not in places, places.get(d.name, ""))):
            xml = _xml(state, d, self.options, asked, places.get(d.name, ""), config=True)
            yield Store(d.name, claim_of(xml))

    def _attach(self, state: State, asked: list[Device], moving: list[Device], devices: list[Device]) -> Iterable[Step]:
        for d in devices:
            # libvirt frees a managed device as it attaches it, but the group must be free before the first attach.
            shared = any(mate in moving for mate in mates(state, d))
            if shared and d.driver not in ("", VFIO_PCI):
                yield Detach(d.name, d.driver)
        for d in devices:
            card = d.pci.address.rpartition(".")[0] if d.pci and len(functions_beside(d, devices)) > 1 else ""
            yield Attach(d.name, alias_of(d), _xml(state, d, self.options, asked, "", config=False), card)


def blockers_for(state: State, asked: list[Device], machine: Machine) -> tuple[Blocker, ...]:
    """What blocks the devices ASKED for, without the target machine's own holds on what moves, of the kinds that an
    assign makes.

    A disk that the machine has by its node is in use, by the machine itself. So is what it has below a device, and
    what its copy on another hypervisor has.
    """
    own: set[Blocker] = set()
    others: set[Blocker] = set()
    for d in _moving(state, asked):
        for key in (machine.key, *state.twins(machine.key)):
            for hold in state.holds_in(key):
                if hold.device == d.name:
                    is_own = key == machine.key and hold.kind in DETACHABLE_KINDS
                    (own if is_own else others).update(eligibility.hold_blockers(state, d, hold))
    found = {b for device in asked for b in eligibility.blockers(state, device) if b not in own or b in others}
    return tuple(sorted(found, key=lambda b: b.place))


def alias_of(device: Device) -> str:
    """The alias under which hostpassd attaches DEVICE: new for each plug-in, so that a stale twin is never hit."""
    return f"ua-hostpassd-{device.name.replace('_', '-')}-{device.instance}"


def _moving(state: State, asked: list[Device]) -> list[Device]:
    """What an assign of the devices ASKED for moves, in tree order."""
    moving = {d.name for d in asked}
    moving |= {name for d in asked if d.kind in ASSIGNABLE_KINDS for name in companions(state, d)}
    return [state.devices[name] for name in in_tree_order(state, moving)]


def _check_fits(asked: list[Device], options: Options) -> None:
    """Raises InvalidOption if one of OPTIONS is not for the devices ASKED for."""
    for option, (fits, why) in _FITTING.items():
        unfit = next((d for d in asked if not fits(d)), None)
        if unfit and option in options.given:
            raise errors.InvalidOption(f"{unfit.name} is {unfit.kind}, which {why}: leave the option {option} out.")


def _check_used(options: Options, asked: list[Device], to_store: list[Device], to_attach: list[Device]) -> None:
    """Raises InvalidOption if one of OPTIONS would change nothing: those ASKED for are there, and stay as they are."""
    for option in (option for option in _FITTING if option in options.given):
        written = to_store if option == "startup-policy" else to_store + to_attach
        if not any(d in written for d in asked):
            names = ", ".join(d.name for d in asked)
            raise errors.InvalidOption(
                f"The machine has {names} already and leaves it as it is: dismiss it first, or leave the option "
                f"{option} out."
            )


def _check_version(state: State, machine: Machine, options: Options) -> None:
    """Raises NotSupported for what the machine's libvirt would ignore."""
    known = state.hypervisors.get(machine.uri)
    if options.driver is not None and (known is None or known.version < _TAKES_DRIVERS):
        raise errors.NotSupported(
            f"The libvirt at {machine.uri} is older than 10.0 and takes no VFIO driver: leave the option driver out."
        )


def _is_pci_in_guest(device: Device) -> bool:
    return device.pci is not None or any(isinstance(f, Mdev) and f.api == VFIO_PCI for f in device.facts)


# The options that say how a machine is to have a device: which devices each is for, and what the others are.
_FITTING: Mapping[str, tuple[Callable[[Device], object], str]] = {
    "guest-address": (_is_pci_in_guest, "gets no PCI address"),
    "rom-bar": (lambda device: device.pci, "has no ROM to show"),
    "rom-file": (lambda device: device.pci, "has no ROM to show"),
    "driver": (lambda device: device.pci, "has no VFIO driver"),
    "startup-policy": (lambda device: device.usb, "no machine starts without"),
    "boot-order": (lambda device: device.kind != "mdev", "no machine boots from"),
}


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
    if options.startup_policy and not config:
        raise errors.InvalidOption(
            "The option startup-policy is for the stored configuration, which is not to be changed: leave it out."
        )
    return live, config


def _port_blockers(machine: Machine, to_attach: list[Device]) -> Iterable[Blocker]:
    """Whether the running machine has a free place for each PCI device: libvirt's own refusal is cryptic."""
    for express, free, model in (
        (True, len(machine.ports.express), "pcie-root-port"),
        (False, len(machine.ports.conventional), "pcie-to-pci-bridge"),
    ):
        needed = [d for d in to_attach if d.pci and d.pci.express is express]
        if len(needed) > free:
            names = tuple(shown(d) for d in needed)
            details: dict[str, Detail] = {"devices": names, "places": free, "controller": model}
            yield blocker("no-free-port", needed[0].name, machine_name=machine.shown_name, **details)


# The kinds of node that are what a device does for the host.
_FUNCTIONS = frozenset({"net", "block", "drm", "input", "sound", "video", "tty", "tpm"})


def _loses(state: State, devices: list[Device]) -> tuple[str, ...]:
    below = (state.devices[name] for device in devices for name in state.descendants(device.name))
    return tuple(in_tree_order(state, (d.name for d in below if d.kind in _FUNCTIONS)))


def _consequences(state: State, asked: list[Device], devices: list[Device]) -> Iterable[Fact]:
    for device in devices:
        what = shown(device)
        if device.pci:
            yield fact(CONSEQUENCES["memory-pinned"], device.name, what=what)
        if not device.usb:  # libvirt lets a machine with host devices go only where all of them are USB
            yield fact(CONSEQUENCES["no-migration"], device.name, what=what)
            yield fact(CONSEQUENCES["no-save"], device.name, what=what)
        if device.pci and not device.pci.reset_methods:
            yield fact(CONSEQUENCES["no-reset"], device.name, what=what)
        along = in_tree_order(state, companions(state, device)) if device in asked else []
        if along:
            told = tuple(shown(state.devices[name]) for name in along)
            yield fact(CONSEQUENCES["takes-along"], device.name, what=what, devices=told)


def _lacks(state: State, machine: Machine, device: Device, *, live: bool, config: bool) -> bool:
    """Whether MACHINE has DEVICE, or what moves with it, not in each half that is asked for."""
    held = [hold_of(state, machine, d.name) for d in _moving(state, [device])]
    return any((live and not _half(hold, live=True)) or (config and not _half(hold, live=False)) for hold in held)


def _half(hold: Hold | None, *, live: bool) -> bool:
    return hold is not None and (hold.live if live else hold.config)


def _xml(state: State, device: Device, options: Options, asked: list[Device], place: str, *, config: bool) -> str:
    """PLACE: the guest address as a function of a card, '' for none."""
    unique = not device.usb or len(state.keyed(("usb-id", device.usb.vendor_id, device.usb.product_id))) == 1
    if device not in asked:
        options = Options()  # it moves along, and is given to the machine as libvirt has it
    return hostdev_xml(
        device,
        alias=alias_of(device),
        config=config,
        unique=unique,
        guest_address=place or options.guest_address,
        multifunction=place.endswith(".0"),
        rom_file=options.rom_file or "",
        settings=Settings(
            driver=options.driver,
            startup_policy=options.startup_policy,
            rom_bar=options.rom_bar,
            boot_order=options.boot_order,
        ),
    )
