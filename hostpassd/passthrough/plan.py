"""What the plans of all operations have in common: pure."""

from __future__ import annotations

from hostpassd import errors
from hostpassd.model.device import ASSIGNABLE_KINDS, Device
from hostpassd.model.machine import Claim, Hold, Machine
from hostpassd.model.naming import is_bridge
from hostpassd.passthrough.request import Options
from hostpassd.state import State, eligibility

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


def check_instance(device: Device, options: Options) -> None:
    """Raises StalePlan if DEVICE is not the instance that the caller means."""
    if options.instance is not None and options.instance != device.instance:
        raise errors.StalePlan(
            f"Another thing is plugged in at {device.name} now (instance {device.instance}): look again."
        )


def hold_of(state: State, machine: Machine, name: str) -> Hold | None:
    """The hold of MACHINE on the device NAME that is the handing over of it."""
    return next((h for h in state.holds_in(machine.key) if h.device == name and h.kind in DETACHABLE_KINDS), None)


def claim_on(state: State, machine: Machine, device: str, *, live: bool) -> Claim | None:
    """The claim, in one half of MACHINE, that is the handing over of DEVICE."""
    for claim in machine.live if live else machine.config:
        if claim.kind in DETACHABLE_KINDS and state.find_claim(machine.key, claim, live=live) == device:
            return claim
    return None
