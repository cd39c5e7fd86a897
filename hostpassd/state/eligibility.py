"""Blockers and companions: pure decisions. What each code means is in the table of codes (model/codes.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from hostpassd.model import drivers
from hostpassd.model.codes import ALONE, BLOCKERS, HOST_USES, Blocker, Detail, Fact, blocker, fact, gathered
from hostpassd.model.device import ASSIGNABLE_KINDS, Device, Pci
from hostpassd.model.events import HostUse
from hostpassd.model.machine import Hold
from hostpassd.model.naming import is_bridge, shown

# 05 memory, 07 communication (serial ports: the original's own rule), 08 system peripherals, 0c05 SMBus.
EXCLUDED_CLASSES = ("05", "07", "08", "0c05")

_USE_CODES = {
    "mount": "mounted",
    "storage-stack": "storage-stack",
    "address": "network-in-use",
    "default-route": "network-in-use",
    "upper-link": "network-in-use",
}


class View(Protocol):
    """What eligibility asks of the state."""

    excluded_classes: tuple[str, ...]
    never: frozenset[str]

    def device(self, name: str) -> Device | None: ...
    def group(self, number: int) -> Iterable[str]: ...
    def holds_on(self, device: str) -> Iterable[Hold]: ...
    def uses_of(self, device: str) -> tuple[HostUse, ...]: ...
    def machine_name(self, uuid: str) -> str: ...
    def below(self, device: str) -> Mapping[Blocker, int]: ...
    def has_leaves(self, device: str) -> bool: ...
    def only_keyboards_of(self, device: str) -> str: ...
    def virtual_functions(self, device: str) -> Iterable[str]: ...
    def target(self, device: str) -> str | None: ...


def is_hub(device: Device) -> bool:
    """Whether it is a USB hub, root hubs included."""
    return device.usb is not None and device.usb.is_hub


def is_leaf(device: Device, under_usb: bool) -> bool:
    """Whether it could be assigned by itself, by kind; what hangs below a USB device is that device's function."""
    if device.kind not in ASSIGNABLE_KINDS or is_hub(device):
        return False
    if device.pci:
        return not is_bridge(device.pci)
    return not (device.kind == "scsi" and under_usb)


def companions(view: View, device: Device) -> tuple[str, ...]:
    """Of an endpoint: the other members of its IOMMU group with header type 0 that a driver binds, by name.

    None where one of the group can never be taken from its driver, for then nothing can move.
    """
    if device.pci and (device.pci.header_type in (1, 2) or any(_culprits(view, device))):
        return ()
    return tuple(sorted(d.name for d in mates(view, device) if d.pci and d.pci.header_type == 0 and d.driver))


def blockers(view: View, device: Device) -> tuple[Blocker, ...]:
    """The union over the device, its companions and all below them, without regard to a machine."""
    found = set(_kind_blockers(view, device))
    if alone := [b for b in found if b.code in ALONE]:
        return tuple(alone)
    found |= set(use_blockers(view, device)) | set(view.below(device.name))
    if device.kind in ASSIGNABLE_KINDS:
        for name in companions(view, device):
            companion = view.device(name)
            if companion:
                found |= {b for b in _kind_blockers(view, companion) if b.code not in _OWN_CODES}
                found |= set(use_blockers(view, companion)) | set(view.below(name))
    return tuple(sorted(found, key=lambda b: b.place))


# What a companion's own row would only say again: the group's culprit is named by group-not-viable.
_OWN_CODES = frozenset({"bridge", "group-not-viable", "no-iommu"})


def use_blockers(view: View, device: Device) -> tuple[Blocker, ...]:
    """The blockers that also block everything above: who holds this very device, and what the host uses it for."""
    return (*_host_blockers(view, device), *_hold_blockers(view, device))


def _kind_blockers(view: View, device: Device) -> list[Blocker]:
    """The blockers that come of what the device is; they stay on it."""
    name, what = device.name, shown(device)
    if device.kind not in ASSIGNABLE_KINDS or view.target(name) != name:
        target = view.target(name) or name
        owner = target if target != name else ""
        return [blocker("not-assignable-kind", name, what=what, kind=device.kind, owner=owner)]
    if is_hub(device):
        return [blocker("hub", name, what=what)]
    found = _pci_blockers(view, device, device.pci) if device.pci else []
    seat = view.only_keyboards_of(name)
    if seat:
        found.append(blocker("last-keyboard", name, what=what, seat=seat))
    return found


def _pci_blockers(view: View, device: Device, pci: Pci) -> list[Blocker]:
    name, what = device.name, shown(device)
    if pci.off_bus or pci.header_type == 0x7F:
        return [blocker("not-responding", name, what=what)]
    found = []
    if is_bridge(pci):
        found.append(blocker("bridge", name, what=what))
    if pci.iommu_group < 0:
        found.append(blocker("no-iommu", name, what=what))
    culprits = () if is_bridge(pci) else tuple(sorted(_culprits(view, device)))
    if culprits:
        found.append(blocker("group-not-viable", name, group=pci.iommu_group, members=culprits))
    if f"{pci.class_code >> 16:02x}" in view.excluded_classes or f"{pci.class_code >> 8:04x}" in view.excluded_classes:
        found.append(blocker("class-excluded", name, what=what, **{"class": f"{pci.class_code >> 8:04x}"}))
    if view.has_leaves(name):
        found.append(blocker("not-leaf", name, what=what))
    if pci.boot_display:
        found.append(blocker("boot-display", name, what=what))
    functions = tuple(sorted(view.virtual_functions(name)))
    if functions:
        found.append(blocker("has-virtual-functions", name, what=what, functions=functions))
    return found


def mates(view: View, device: Device) -> list[Device]:
    """The other devices of its IOMMU group, in the order of their names."""
    if not device.pci or device.pci.iommu_group < 0:
        return []
    found = (view.device(name) for name in sorted(view.group(device.pci.iommu_group)) if name != device.name)
    return [mate for mate in found if mate]


def _culprits(view: View, device: Device) -> Iterable[str]:
    """The group members that keep it from ever being viable, as "0000:00:1f.0 (lpc_ich)"."""
    for mate in mates(view, device):
        if mate.pci and mate.driver and mate.driver not in drivers.GROUP_SAFE and is_bridge(mate.pci):
            yield f"{mate.pci.address} ({mate.driver})"


def host_uses(view: View, device: Device) -> tuple[Fact, ...]:
    """What the host uses this very device for, one row for each code, in the order of the table."""
    found: dict[str, list[HostUse]] = {}
    for use in view.uses_of(device.name):
        found.setdefault(use.code, []).append(use)
    return tuple(
        fact(HOST_USES[code], device.name, **(gathered(use.details for use in found[code]) | {"what": shown(device)}))
        for code in HOST_USES
        if code in found
    )


def _host_blockers(view: View, device: Device) -> Iterable[Blocker]:
    found: dict[str, list[HostUse]] = {"host-system": []} if device.name in view.never else {}
    for use in view.uses_of(device.name):
        if code := "host-system" if use.system else _USE_CODES.get(use.code):
            found.setdefault(code, []).append(use)
    for code, uses in found.items():
        yield blocker(code, device.name, **_details_of(code, uses) | {"what": shown(device)})


def _details_of(code: str, uses: list[HostUse]) -> dict[str, Detail]:
    """What USES come to in the one row of the blocker CODE: what its sentence can say."""
    details = gathered(use.details for use in uses) | {"uses": tuple(sorted({use.code for use in uses}))}
    return {key: value for key, value in details.items() if key in BLOCKERS[code].fields}


def _hold_blockers(view: View, device: Device) -> Iterable[Blocker]:
    """Of holds on DEVICE, and of live ones on its virtual functions, which go with it: one row for each machine."""
    functions: dict[str, set[str]] = {}
    for name in view.virtual_functions(device.name):
        for hold in view.holds_on(name):
            if hold.live:
                functions.setdefault(hold.machine, set()).add(name)
    for machine, names in functions.items():
        yield _hold_blocker(view, "held-live", device, machine, tuple(sorted(names)))
    for hold in view.holds_on(device.name):
        yield from hold_blockers(view, device, hold)


def hold_blockers(view: View, device: Device, hold: Hold) -> Iterable[Blocker]:
    """Of one HOLD on DEVICE itself."""
    if hold.live:
        yield _hold_blocker(view, "held-live", device, hold.machine)
    if hold.config:
        yield _hold_blocker(view, "held-config", device, hold.machine)


def _hold_blocker(view: View, code: str, device: Device, machine: str, functions: tuple[str, ...] = ()) -> Blocker:
    name = view.machine_name(machine)
    return blocker(code, device.name, what=shown(device), machine=machine, machine_name=name, functions=functions)
