"""What an assign or dismiss will do, step by step, with each step's undo: pure.

The plan is the very object that `execute` runs; nothing is decided there.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

from hostpassd import errors
from hostpassd.machines.domain_xml import claim_of, hostdev_xml
from hostpassd.model.codes import NEVER, Blocker, blocker
from hostpassd.model.device import ASSIGNABLE_KINDS, Device
from hostpassd.model.machine import Claim, Hold, Machine, MachineKey, Missing
from hostpassd.model.naming import is_bridge
from hostpassd.state import State, eligibility

# The kinds of hold that are the handing over of the device itself.
DETACHABLE_KINDS = frozenset({"hostdev", "interface"})


@dataclasses.dataclass(frozen=True, slots=True)
class Store:
    """Put a device into the stored configuration, as `claim.xml` says."""

    device: str
    claim: Claim

    @property
    def text(self) -> str:
        return f"store {self.device} in the machine's configuration"


@dataclasses.dataclass(frozen=True, slots=True)
class Unstore:
    """Take a claim out of the stored configuration."""

    device: str
    claim: Claim

    @property
    def text(self) -> str:
        return f"remove {self.device} from the machine's stored configuration"


@dataclasses.dataclass(frozen=True, slots=True)
class Free:
    """Take a device from its host driver, as a node device, so that its group can be owned."""

    device: str
    driver: str  # the host driver that it has now

    @property
    def text(self) -> str:
        return f"free {self.device} from its host driver {self.driver or '(none)'}"


@dataclasses.dataclass(frozen=True, slots=True)
class GiveBack:
    """Give a device back to its host driver, when the whole group is free."""

    device: str

    @property
    def text(self) -> str:
        return f"give {self.device} back to its host driver"


@dataclasses.dataclass(frozen=True, slots=True)
class Attach:
    """Attach a device to the running machine and wait for libvirt's added event of its alias."""

    device: str
    alias: str
    xml: str
    of_card: bool = False  # one of several functions of a card: libvirt takes only function 0 of a slot while it runs

    @property
    def text(self) -> str:
        place = ", at a port of its own" if self.of_card else ""
        return f"attach {self.device} to the running machine{place}"


@dataclasses.dataclass(frozen=True, slots=True)
class Release:
    """Ask the guest to let a device go and wait for libvirt's removed event of its alias."""

    device: str
    alias: str
    claim_id: str = ""  # of what has that alias, where another device could have it later; '' for an alias of ours

    @property
    def text(self) -> str:
        return f"ask the guest to release {self.device} and wait until it has"


Step = Store | Unstore | Free | GiveBack | Attach | Release


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What a caller asks for. None: the default for this machine and device."""

    live: bool | None = None
    config: bool | None = None
    instance: int | None = None
    timeout: int = 20  # seconds, for the whole job
    wait: bool = True
    guest_address: str = ""
    rom_bar: bool | None = None
    override: frozenset[str] = frozenset()  # codes of blockers that the caller accepts
    plan: str = ""  # the token of the plan that this must still be


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """One operation: what moves, and the steps in order."""

    operation: str
    machine: MachineKey
    device: str  # the device that was asked for (of a missing one: where it was last)
    devices: tuple[str, ...]  # all that move, the asked one first
    instances: tuple[int, ...]  # of `devices`, to see a replug between prompt and execution
    steps: tuple[Step, ...]
    groups: tuple[str, ...]  # two plans that share one never run together; sorted
    blockers: tuple[Blocker, ...] = ()  # without the machine's own holds
    loses: tuple[str, ...] = ()  # the functions that the host loses
    consequences: tuple[str, ...] = ()  # for people

    @property
    def token(self) -> str:
        """Names this very plan: another one whenever anything that it rests on is another."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:32]

    def refused(self, override: frozenset[str]) -> tuple[Blocker, ...]:
        """The blockers that a caller who accepts OVERRIDE still meets."""
        return tuple(b for b in self.blockers if b.severity == NEVER or b.code not in override)

    def overridden(self, override: frozenset[str]) -> tuple[Blocker, ...]:
        """The blockers that a caller who accepts OVERRIDE goes past."""
        refused = self.refused(override)
        return tuple(b for b in self.blockers if b not in refused)


def undo(step: Step) -> Step | None:
    """The step that takes STEP back; None where nothing can, or need."""
    match step:
        case Store(device, claim):
            return Unstore(device, claim)
        case Unstore(device, claim):
            return Store(device, claim)
        case Free(device, _):
            return GiveBack(device)
        case Attach(device, alias, _):
            return Release(device, alias)
        case GiveBack() | Release():
            return None


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


def plan_assign(state: State, machine: Machine, device: Device, options: Options) -> Plan:
    """The plan that hands DEVICE and its companions to MACHINE, with what blocks it.

    Errors: HypervisorUnavailable, InvalidOption, StalePlan, AlreadyAssigned.
    """
    _check_reachable(machine)
    _check_instance(device, options)
    live, config = _halves(machine, options)
    if device.kind not in ASSIGNABLE_KINDS:
        return dataclasses.replace(
            _plan(state, "assign", machine, device, [device], []), blockers=blockers_for(state, device, machine)
        )
    _check_fits(device, options)
    devices = _moving(state, device)
    held = {d.name: _hold_of(state, machine, d.name) for d in devices}
    to_store = [d for d in devices if config and not (held[d.name] and _half(held[d.name], live=False))]
    to_attach = [d for d in devices if live and not (held[d.name] and _half(held[d.name], live=True))]
    if not to_store and not to_attach:
        raise errors.AlreadyAssigned(f"{machine.name} already has {device.name}: there is nothing to do.")
    places = _card_places(machine, device, to_store, options)
    steps: list[Step] = []
    # Those with a place first: for the others libvirt takes what is free.
    for d in sorted(to_store, key=lambda d: (d.name not in places, places.get(d.name, ""))):
        steps.append(Store(d.name, claim_of(_xml(state, d, options, device, places.get(d.name, ""), stored=True))))
    if len(devices) > 1:
        # libvirt frees a managed device as it attaches it, but the group must be free before the first attach.
        steps += [Free(d.name, d.driver) for d in to_attach if d.pci and d.driver not in ("", "vfio-pci")]
    for d in to_attach:
        of_card = len(_functions_beside(d, to_attach)) > 1
        steps.append(Attach(d.name, alias_of(d), _xml(state, d, options, device, "", stored=False), of_card))
    found = (*blockers_for(state, device, machine), *_port_blockers(machine, to_attach))
    plan = _plan(state, "assign", machine, device, devices, steps)
    return dataclasses.replace(
        plan, blockers=found, loses=_loses(state, devices), consequences=tuple(_consequences(devices, to_attach))
    )


def plan_dismiss(state: State, machine: Machine, device: Device, options: Options) -> Plan:
    """The plan that takes DEVICE, and its companions that the machine holds, back.

    Errors: HypervisorUnavailable, InvalidOption, StalePlan, NotAssigned, NotSupported.
    """
    _check_reachable(machine)
    _check_instance(device, options)
    hold = _hold_of(state, machine, device.name)
    if hold is None:
        _refuse_other_kinds(state, machine, device)
        raise errors.NotAssigned(f"{machine.name} does not have {device.name}: see the machine's Devices and Missing.")
    live, config = _halves_held(options, machine, device.name, live=hold.live, config=hold.config)
    devices = _held_with(state, machine, device, live, config)
    steps: list[Step] = []
    for d in devices:
        claim = _claim_on(state, machine, d.name, live=False) if config else None
        if claim:
            steps.append(Unstore(d.name, claim))
    released: list[Device] = []
    for d in devices:
        claim = _claim_on(state, machine, d.name, live=True) if live else None
        if claim:
            steps.append(Release(d.name, claim.alias, claim.id))
            released.append(d)
    # Only when the last member is out can a host driver bind: the group is VFIO's as long as one is in.
    steps += [GiveBack(d.name) for d in released if d.pci]
    return _plan(state, "dismiss", machine, device, devices, steps)


def plan_dismiss_missing(machine: Machine, rows: Sequence[Missing], last: tuple[str, int], options: Options) -> Plan:
    """The plan that takes ROWS, claims on one thing that is not on this host, out of MACHINE.

    LAST: the name and the instance that it had, ('', 0) if it never was here. Errors: HypervisorUnavailable,
    InvalidOption, NotAssigned.
    """
    _check_reachable(machine)
    ids = {row.id for row in rows}
    place, instance = last
    name = place or rows[0].id
    unstore = [Unstore(name, claim) for claim in machine.stored if claim.id in ids]
    live_claims = [claim for claim in machine.live if claim.id in ids and claim.alias and not claim.missing]
    release = [Release(name, claim.alias, claim.id) for claim in live_claims]
    live, config = _halves_held(options, machine, name, live=bool(release), config=bool(unstore))
    steps = (*(unstore if config else ()), *(release if live else ()))
    return Plan("dismiss", machine.key, name, (name,), (instance,), steps, (name,))


def alias_of(device: Device) -> str:
    """The alias under which hostpassd attaches DEVICE: new for each plug-in, so that a stale twin is never hit."""
    return f"ua-hostpassd-{device.name.replace('_', '-')}-{device.instance}"


def lock_of(device: Device) -> str:
    """What two operations on DEVICE share: its IOMMU group, or itself if it is in none."""
    return f"group {device.pci.iommu_group}" if device.pci and device.pci.iommu_group >= 0 else device.name


def _plan(
    state: State, operation: str, machine: Machine, device: Device, devices: list[Device], steps: list[Step]
) -> Plan:
    # With those above: a controller and what is plugged into it are not handed out at once.
    locks = {lock_of(d) for d in devices}
    locks |= {lock_of(above) for d in devices for above in state.ancestors(d.name) if _is_device(above)}
    groups = tuple(sorted(locks))
    names, instances = tuple(d.name for d in devices), tuple(d.instance for d in devices)
    return Plan(operation, machine.key, device.name, names, instances, tuple(steps), groups)


def _moving(state: State, device: Device) -> list[Device]:
    """What an assign of DEVICE moves, DEVICE first."""
    return [device, *(state.devices[name] for name in eligibility.companions(state, device))]


def _is_device(device: Device) -> bool:
    """Whether an operation could be about it: a bridge or a hub is what others share."""
    bridge = device.pci and is_bridge(device.pci)
    return device.kind in ASSIGNABLE_KINDS and not bridge and not eligibility.is_hub(device)


def _check_reachable(machine: Machine) -> None:
    if machine.stale:
        raise errors.HypervisorUnavailable(
            f"{machine.uri} cannot be reached: {machine.name} is as last known, try later."
        )


def _check_instance(device: Device, options: Options) -> None:
    if options.instance is not None and options.instance != device.instance:
        raise errors.StalePlan(
            f"Another thing is plugged in at {device.name} now (instance {device.instance}): look again."
        )


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


def check_allowed(plan: Plan, override: frozenset[str]) -> None:
    """Raises Blocked unless the caller accepts, by OVERRIDE, all that blocks PLAN."""
    found = plan.refused(override)
    if found:
        told = " ".join(f"{b.code}: {b.message}" for b in found)
        raise errors.Blocked(f"{plan.device} cannot be assigned: {told}")


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
    return tuple(sorted(d.name for d in below if d.kind in _FUNCTIONS))


def _consequences(devices: list[Device], to_attach: list[Device]) -> Iterable[str]:
    pci = [d for d in devices if d.pci]
    if pci:
        yield "all memory of the machine is pinned while it runs with the device"
    if any(d.kind in ("pci", "mdev") for d in devices):
        yield "the machine cannot be migrated or saved while it has the device"
    for d in pci:
        if d.pci and not d.pci.reset_methods:
            yield f"{d.name} cannot be reset: what one user leaves in it, the next one finds"
    if any(len(_functions_beside(d, to_attach)) > 1 for d in to_attach):
        yield "in the running machine each function has a port of its own, not one slot for the card"


def _hold_of(state: State, machine: Machine, name: str) -> Hold | None:
    return next((h for h in state.holds_in(machine.key) if h.device == name and h.kind in DETACHABLE_KINDS), None)


def _half(hold: Hold | None, *, live: bool) -> bool:
    return hold is not None and (hold.live if live else hold.config)


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


def _claim_on(state: State, machine: Machine, device: str, *, live: bool) -> Claim | None:
    for claim in machine.live if live else machine.stored:
        if claim.kind in DETACHABLE_KINDS and state.find_claim(machine.key, claim, live=live) == device:
            return claim
    return None


def _group_of(state: State, device: Device) -> Iterable[Device]:
    if not device.pci or device.pci.iommu_group < 0:
        return []
    return [state.devices[name] for name in sorted(state.group(device.pci.iommu_group)) if name != device.name]


def _held_with(state: State, machine: Machine, device: Device, live: bool, config: bool) -> list[Device]:
    """DEVICE and what MACHINE gives up with it: the IOMMU group, and of a card what is in one guest slot with it."""
    found = [device]
    for d in found:  # which grows meanwhile: a function of the card can have a group of its own
        for mate in (*_group_of(state, d), *_slot_mates(state, machine, d, live, config)):
            if mate not in found and _hold_of(state, machine, mate.name):
                found.append(mate)
    return found


def _slot_mates(state: State, machine: Machine, device: Device, live: bool, config: bool) -> Iterable[Device]:
    """The functions of DEVICE's host slot that are in its guest slot too, in one of the halves asked for."""
    for half, claims in ((True, machine.live if live else ()), (False, machine.stored if config else ())):
        own = _claim_on(state, machine, device.name, live=half)
        if not device.pci or not own or not own.guest_address:
            continue
        for claim in claims:
            mate = state.device(state.find_claim(machine.key, claim, live=half) or "")
            same_guest_slot = _slot(claim.guest_address) == _slot(own.guest_address)
            if same_guest_slot and mate and mate.pci and _slot(mate.pci.address) == _slot(device.pci.address):
                yield mate


def _functions_beside(device: Device, devices: list[Device]) -> list[Device]:
    """Of DEVICES the functions of the host slot that DEVICE is in, in order; none for what is no PCI function."""
    slot = _slot(device.pci.address) if device.pci else None
    found = [d for d in devices if d.pci and _slot(d.pci.address) == slot]
    return sorted(found, key=lambda d: d.pci.address if d.pci else "")


def _slot(address: str) -> str:
    """0000:01:00 of 0000:01:00.0"""
    return address[:-2]


def _card_places(machine: Machine, asked: Device, to_store: list[Device], options: Options) -> dict[str, str]:
    """The guest addresses in the stored half of those that stay one card there, by device name.

    Host and guest function numbers are the same. Without function 0 a guest sees no card, and where no slot is free
    libvirt adds one for each device by itself: then there is no address here.
    """
    ports, given = machine.stored_ports, _slot(options.guest_address)
    free = {
        True: [f"0000:{bus:02x}:00" for bus in ports.express],
        False: [f"0000:{bus:02x}:{slot:02x}" for bus, slot in ports.conventional],
    }
    taken = {given}
    places: dict[str, str] = {}
    for first in to_store:
        card = _functions_beside(first, to_store)
        if not first.pci or len(card) < 2 or first.pci.address[-1] != "0":
            continue
        if given and asked in card:
            slot = given if asked is first and options.guest_address[-1] == "0" else ""
        else:
            slot = next((slot for slot in free[first.pci.express] if slot not in taken), "")
        if slot:
            taken.add(slot)
            places |= {d.name: f"{slot}.{d.pci.address[-1]}" for d in card if d.pci}
    return places


def _xml(state: State, device: Device, options: Options, asked: Device, place: str, *, stored: bool) -> str:
    """PLACE: the guest address as a function of a card, '' for none."""
    unique = not device.usb or len(state.keyed(("usb-id", device.usb.vendor_id, device.usb.product_id))) == 1
    return hostdev_xml(
        device,
        alias=alias_of(device),
        stored=stored,
        unique=unique,
        guest_address=place or (options.guest_address if device is asked else ""),
        multifunction=place.endswith(".0"),
        rom_bar=options.rom_bar if device is asked else None,
    )
