"""What the plans of all operations have in common: pure."""

from __future__ import annotations

from collections.abc import Sequence

from hostpassd import errors
from hostpassd.model.device import ASSIGNABLE_KINDS, Device
from hostpassd.model.machine import Claim, Hold, Machine
from hostpassd.model.naming import is_bridge
from hostpassd.model.order import in_tree_order
from hostpassd.passthrough.request import Options
from hostpassd.state import State, eligibility
from hostpassd.state.find import one_device

# Devices of one operation; nobody picks more by hand, and each costs libvirt calls.
DEVICES_LIMIT = 64

# The kinds of hold that are the handing over of the device itself.
DETACHABLE_KINDS = frozenset({"hostdev", "interface"})


def lock_of(device: Device) -> str:
    """What two operations on DEVICE share: its IOMMU group, or itself if it is in none."""
    return f"group {device.pci.iommu_group}" if device.pci and device.pci.iommu_group >= 0 else device.name


def locks_of(state: State, devices: list[Device]) -> tuple[str, ...]:
    """The locks of an operation that moves DEVICES, sorted.

    With those above: a controller and what is plugged into it are not handed out at once.
    """
    locks = {lock_of(d) for d in devices}
    locks |= {lock_of(above) for d in devices for above in state.ancestors(d.name) if _is_device(above)}
    return tuple(sorted(locks))


def _is_device(device: Device) -> bool:
    """Whether an operation could be about it: a bridge or a hub is what others share."""
    bridge = device.pci and is_bridge(device.pci)
    return device.kind in ASSIGNABLE_KINDS and not bridge and not eligibility.is_hub(device)


def check_reachable(machine: Machine) -> None:
    """Raises HypervisorUnavailable if MACHINE is only as last known."""
    if machine.stale:
        raise errors.HypervisorUnavailable(
            f"{machine.uri} cannot be reached: {machine.name} is as last known, try later."
        )


def asked_devices(state: State, texts: Sequence[str]) -> list[Device]:
    """The devices that an operation on TEXTS is about, each once, in tree order.

    Errors: those of `find`, InvalidArgs where there is none, or too many.
    """
    check_number(texts)
    found = {device.name: device for device in (one_device(state, text) for text in texts)}
    return [found[name] for name in in_tree_order(state, found)]


def check_apart(state: State, asked: Sequence[Device], moving: Sequence[Device]) -> None:
    """Raises InvalidArgs if one of the devices ASKED for is below another of those MOVING, which takes it off the host.

    What moves with it is not meant: a controller that shares a group with what it drives.
    """
    names = {device.name for device in moving}
    for device in asked:
        above = (d.name for d in state.ancestors(device.name))
        taken = (name for name in above if name in names - set(eligibility.companions(state, device)))
        if name := next(taken, ""):
            raise errors.InvalidArgs(f"{device.name} is below {name} and moves with it: name one of them.")


def check_number(texts: Sequence[str]) -> None:
    """Raises InvalidArgs if TEXTS are not as many as an operation can be about."""
    if not texts:
        raise errors.InvalidArgs("No device is named: name at least one.")
    if len(texts) > DEVICES_LIMIT:
        raise errors.InvalidArgs(f"{len(texts)} devices are too many for one operation: name {DEVICES_LIMIT} or less.")


def check_instance(asked: Sequence[Device], options: Options) -> None:
    """Raises StalePlan if the one device ASKED for is not the instance that the caller means.

    Error: InvalidOption, OPTIONS have what only one device can have, and there are more.
    """
    check_single(asked, options)
    device = asked[0]
    if options.instance is not None and options.instance != device.instance:
        raise errors.StalePlan(
            f"Another thing is plugged in at {device.name} now (instance {device.instance}): look again."
        )


_FOR_ONE = ("instance", "guest-address", "rom-file", "boot-order")


def check_single(asked: Sequence[object], options: Options) -> None:
    """Raises InvalidOption if OPTIONS have what only one device can have, and ASKED are more."""
    if len(asked) <= 1:
        return
    for option in (option for option in _FOR_ONE if option in options.given):
        raise errors.InvalidOption(f"The option {option} is for one device: leave it out, or name one device only.")


def hold_of(state: State, machine: Machine, name: str) -> Hold | None:
    """The hold of MACHINE on the device NAME that is the handing over of it."""
    return next((h for h in state.holds_in(machine.key) if h.device == name and h.kind in DETACHABLE_KINDS), None)


def claim_on(state: State, machine: Machine, device: str, *, live: bool) -> Claim | None:
    """The claim, in one half of MACHINE, that is the handing over of DEVICE."""
    for claim in machine.live if live else machine.config:
        if claim.kind in DETACHABLE_KINDS and state.find_claim(machine.key, claim, live=live) == device:
            return claim
    return None
