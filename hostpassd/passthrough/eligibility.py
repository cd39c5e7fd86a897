"""Blockers and companions: pure. What each code means stands in the design's section on meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Protocol

from hostpassd.events import HostUse
from hostpassd.host.device import ASSIGNABLE_KINDS, Device, Pci
from hostpassd.machines.machine import Hold

NEVER = "never"
OVERRIDE = "override"

# 05 memory, 07 communication (serial ports: the original's own rule), 08 system peripherals, 0c05 SMBus.
EXCLUDED_CLASSES = ("05", "07", "08", "0c05")

# Drivers that leave DMA to whoever owns the group (since Linux 5.18 they set driver_managed_dma).
_GROUP_SAFE_DRIVERS = frozenset({"vfio-pci", "pci-stub", "pcieport"})

_USE_CODES = {
    "mount": "mounted",
    "swap": "host-system",
    "storage-stack": "storage-stack",
    "address": "network-in-use",
    "default-route": "network-in-use",
    "bridge": "network-in-use",
    "bond": "network-in-use",
    "vlan": "network-in-use",
    "macvlan": "network-in-use",
    "namespace": "network-in-use",
}


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Blocker:
    """One reason why a device cannot, or should not, be assigned. `machine`: whose hold it is, if it is one."""

    code: str
    severity: str
    message: str
    device: str
    machine: str = ""


# Every code that a caller can accept by name.
OVERRIDABLE = frozenset(
    {
        "class-excluded",
        "not-leaf",
        "mounted",
        "storage-stack",
        "network-in-use",
        "boot-display",
        "last-keyboard",
        "has-virtual-functions",
        "held-config",
        "no-free-port",
    }
)


# Every code that no caller can.
FINAL = frozenset(
    {
        "not-assignable-kind",
        "bridge",
        "hub",
        "no-iommu",
        "group-not-viable",
        "host-system",
        "not-responding",
        "held-live",
    }
)


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
    return device.usb is not None and (device.usb.device_class == 0x09 or device.usb.port.startswith("usb"))


def is_bridge(pci: Pci) -> bool:
    """Whether it is a PCI bridge: by header type, or by base class (an ISA bridge has header type 0)."""
    return pci.header_type in (1, 2) or pci.base_class == 0x06


def is_leaf(device: Device, under_usb: bool) -> bool:
    """Whether it could be assigned by itself, by kind; what hangs below a USB device is that device's function."""
    if device.kind not in ASSIGNABLE_KINDS or is_hub(device):
        return False
    if device.pci:
        return not is_bridge(device.pci)
    return not (device.kind == "scsi" and under_usb)


def companions(view: View, device: Device) -> tuple[str, ...]:
    """Of an endpoint: the other members of its IOMMU group with header type 0 that a driver binds, by name."""
    if device.pci and device.pci.header_type in (1, 2):
        return ()
    return tuple(sorted(d.name for d in _mates(view, device) if d.pci and d.pci.header_type == 0 and d.driver))


def blockers(view: View, device: Device) -> tuple[Blocker, ...]:
    """The union over the device, its companions and all below them, without regard to a machine."""
    found = set(_kind_blockers(view, device)) | set(use_blockers(view, device)) | set(view.below(device.name))
    if device.kind in ASSIGNABLE_KINDS:
        for name in companions(view, device):
            companion = view.device(name)
            if companion:
                found |= {b for b in _kind_blockers(view, companion) if b.code not in _OWN_CODES}
                found |= set(use_blockers(view, companion)) | set(view.below(name))
    return tuple(sorted(found))


# What a companion's own row would only say again: the group's culprit is named by group-not-viable.
_OWN_CODES = frozenset({"bridge", "group-not-viable", "no-iommu"})


def use_blockers(view: View, device: Device) -> tuple[Blocker, ...]:
    """The blockers that also block everything above: who holds this very device, and what the host uses it for."""
    return (*_host_blockers(view, device), *_hold_blockers(view, device))


def _kind_blockers(view: View, device: Device) -> list[Blocker]:
    """The blockers that come of what the device is; they stay on it."""
    name, label = device.name, device.label
    if device.kind not in ASSIGNABLE_KINDS or view.target(name) != name:
        return [Blocker("not-assignable-kind", NEVER, _not_assignable(view, device), name)]
    if is_hub(device):
        return [Blocker("hub", NEVER, f"{label} is a USB hub: assign the devices below it", name)]
    found = _pci_blockers(view, device, device.pci) if device.pci else []
    seat = view.only_keyboards_of(name)
    if seat:
        text = f"{label} is, or leads to, the only keyboard of {seat}: plug in another one first"
        found.append(Blocker("last-keyboard", OVERRIDE, text, name))
    return found


def _not_assignable(view: View, device: Device) -> str:
    target = view.target(device.name)
    if target and target != device.name:
        return f"{device.label} is a function of {target}: assign that"
    return f"{device.label} is of a kind ({device.kind}) that cannot be assigned"


def _pci_blockers(view: View, device: Device, pci: Pci) -> list[Blocker]:
    name = device.name
    if pci.off_bus or pci.header_type == 0x7F:
        return [Blocker("not-responding", NEVER, f"{pci.address} does not answer on its bus: reset or replug it", name)]
    found = []
    if is_bridge(pci):
        found.append(Blocker("bridge", NEVER, f"{pci.address} is a bridge: assign the devices behind it", name))
    if pci.iommu_group < 0:
        text = f"{pci.address} is in no IOMMU group: enable the IOMMU in the firmware and on the kernel's command line"
        found.append(Blocker("no-iommu", NEVER, text, name))
    culprits = [] if is_bridge(pci) else sorted(_culprits(view, device))
    if culprits:
        text = f"IOMMU group {pci.iommu_group} also has {', '.join(culprits)}, which the host keeps: use another slot"
        found.append(Blocker("group-not-viable", NEVER, text, name))
    if f"{pci.class_code >> 16:02x}" in view.excluded_classes or f"{pci.class_code >> 8:04x}" in view.excluded_classes:
        text = f"{pci.address} is of PCI class {pci.class_code >> 8:04x}, which the configuration keeps for the host"
        found.append(Blocker("class-excluded", OVERRIDE, text, name))
    if view.has_leaves(name):
        text = f"devices that can be assigned by themselves are below {pci.address}: assign those"
        found.append(Blocker("not-leaf", OVERRIDE, text, name))
    if pci.boot_display:
        text = f"{pci.address} shows the host's console: the host would lose its screen"
        found.append(Blocker("boot-display", OVERRIDE, text, name))
    functions = sorted(view.virtual_functions(name))
    if functions:
        text = f"{pci.address} has virtual functions ({', '.join(functions)}): assign those, or remove them first"
        found.append(Blocker("has-virtual-functions", OVERRIDE, text, name))
    return found


def _mates(view: View, device: Device) -> Iterable[Device]:
    """The other devices of its IOMMU group."""
    if not device.pci or device.pci.iommu_group < 0:
        return []
    found = (view.device(name) for name in view.group(device.pci.iommu_group) if name != device.name)
    return [mate for mate in found if mate]


def _culprits(view: View, device: Device) -> Iterable[str]:
    """The group members that keep it from ever being viable, as "0000:00:1f.0 (lpc_ich)"."""
    for mate in _mates(view, device):
        if mate.pci and mate.driver and mate.driver not in _GROUP_SAFE_DRIVERS and is_bridge(mate.pci):
            yield f"{mate.pci.address} ({mate.driver})"


def _host_blockers(view: View, device: Device) -> Iterable[Blocker]:
    if device.name in view.never:
        text = f"{device.label} is named in the configuration as never to be given away"
        yield Blocker("host-system", NEVER, text, device.name)
    for use in view.uses_of(device.name):
        code = "host-system" if use.system else _USE_CODES.get(use.kind)
        if code:
            severity = NEVER if code == "host-system" else OVERRIDE
            text = f"the host uses {device.label} ({use.kind}): {use.detail}"
            yield Blocker(code, severity, text, device.name)


def _hold_blockers(view: View, device: Device) -> Iterable[Blocker]:
    """Of holds on DEVICE, and of live ones on its virtual functions, which go with it."""
    for name in view.virtual_functions(device.name):
        for hold in view.holds_on(name):
            if hold.live:
                machine = view.machine_name(hold.machine)
                text = f"the running machine {machine} has {name}, a virtual function of {device.label}"
                yield Blocker("held-live", NEVER, f"{text}: dismiss it there first", device.name, hold.machine)
    for hold in view.holds_on(device.name):
        machine = view.machine_name(hold.machine)
        if hold.live:
            text = f"the running machine {machine} has {device.label}: dismiss it there first"
            yield Blocker("held-live", NEVER, text, device.name, hold.machine)
        if hold.config:
            text = f"the stored configuration of the machine {machine} has {device.label}: dismiss it there first"
            yield Blocker("held-config", OVERRIDE, text, device.name, hold.machine)
