"""Machines, their claims as written, and holds: frozen, typed, no I/O."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from hostpassd.model.text import clean


@dataclasses.dataclass(frozen=True, slots=True)
class PciSource:
    """A PCI function of the host by address, 0000:01:00.0."""

    address: str


@dataclasses.dataclass(frozen=True, slots=True)
class UsbSource:
    """A USB device of the host: by bus and number, by vendor and product, or all four. None: not said."""

    vendor_id: int | None = None
    product_id: int | None = None
    bus: int | None = None
    number: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ScsiSource:
    """A SCSI logical unit of the host by adapter (scsi_host0) and address."""

    host: int
    channel: int
    target: int
    lun: int


@dataclasses.dataclass(frozen=True, slots=True)
class MdevSource:
    """A mediated device by UUID."""

    uuid: str


@dataclasses.dataclass(frozen=True, slots=True)
class NodeSource:
    """A device node of the host, /dev/disk/by-id/... or /dev/ttyUSB0, as written; links are for host/ to resolve."""

    path: str


@dataclasses.dataclass(frozen=True, slots=True)
class InterfaceSource:
    """A network interface of the host by name (macvtap)."""

    interface: str


Source = PciSource | UsbSource | ScsiSource | MdevSource | NodeSource | InterfaceSource


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """One device element of one half (live or stored) of a machine's XML."""

    kind: str  # hostdev, interface, disk ...
    source: Source
    alias: str  # '' where libvirt gives none
    xml: str  # the element as libvirt wrote it; what a detach of the stored half is asked with
    id: str  # stable for this claim as written, to dismiss it by when its device is not here
    text: str  # the source for people, as written: "usb 0951:1666 bus 1 device 4"
    missing: bool = False  # libvirt's own missing='yes': this half claims nothing at present
    guest_address: str = ""  # 0000:04:00.0, where it is a PCI one


@dataclasses.dataclass(frozen=True, slots=True)
class Ports:
    """The free places for PCI devices in one half of a machine."""

    express: tuple[int, ...] = ()  # buses of the empty PCI Express root and downstream ports
    conventional: tuple[tuple[int, int], ...] = ()  # bus and slot, of conventional buses


class MachineKey(NamedTuple):
    """Which machine: two hypervisors can have one with the same UUID, a copy or the two ends of a migration."""

    uri: str  # the hypervisor's
    uuid: str


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """A libvirt domain as it was last read."""

    uuid: str
    name: str
    uri: str
    state: str  # libvirt's words: running, idle, paused, in shutdown, shut off, crashed, pmsuspended
    persistent: bool
    live: tuple[Claim, ...] = ()
    stored: tuple[Claim, ...] = ()
    stale: bool = False  # as last known: its hypervisor cannot be reached
    ports: Ports = Ports()  # of the live half
    stored_ports: Ports = Ports()

    @property
    def key(self) -> MachineKey:
        """Which machine it is."""
        return MachineKey(self.uri, self.uuid)

    @property
    def shown_name(self) -> str:
        """The name fit for messages and logs: whoever may define machines may call them anything."""
        return clean(self.name) or self.uuid

    @property
    def active(self) -> bool:
        """Whether it has a live half now. One that has crashed and is kept (on_crash) still has its devices."""
        return self.state != "shut off"


@dataclasses.dataclass(frozen=True, slots=True)
class Hold:
    """One machine's claim on one device of the tree, both halves together."""

    machine: str  # UUID
    device: str  # name
    kind: str
    live: bool
    config: bool
    alias: str
    releasing: bool = False
    stale: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Missing:
    """A claim on something that is not on this host now."""

    id: str
    source: str
    live: bool
    config: bool
    alias: str
    kind: str = "hostdev"
