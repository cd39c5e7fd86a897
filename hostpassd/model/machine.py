"""Machines, their claims as written, and holds: frozen, typed, no I/O."""

from __future__ import annotations

import abc
import dataclasses
from typing import NamedTuple

from hostpassd.model.codes import Fact
from hostpassd.model.device import Key
from hostpassd.model.text import clean


@dataclasses.dataclass(frozen=True, slots=True)
class ClaimSource(abc.ABC):
    """The host resource that an element of a machine's XML names: one class for each way of naming it."""

    @abc.abstractmethod
    def lookup_keys(self) -> list[Key]:
        """The lookup keys that a device must have, all of them, to be the one that is named."""

    @property
    @abc.abstractmethod
    def id(self) -> str:
        """An identifier in one word, equal for equal sources."""

    @property
    @abc.abstractmethod
    def text(self) -> str:
        """A text for people."""


@dataclasses.dataclass(frozen=True, slots=True)
class PciSource(ClaimSource):
    """A PCI function of the host by address, 0000:01:00.0."""

    address: str

    def lookup_keys(self) -> list[Key]:
        return [("pci", self.address)]

    @property
    def id(self) -> str:
        return f"pci:{self.address}"

    @property
    def text(self) -> str:
        return f"pci {self.address}"


@dataclasses.dataclass(frozen=True, slots=True)
class UsbSource(ClaimSource):
    """A USB device of the host: by bus and number, by vendor and product, or all four. None: not said."""

    vendor_id: int | None = None
    product_id: int | None = None
    bus: int | None = None
    number: int | None = None

    @property
    def _has_place(self) -> bool:
        return self.bus is not None and self.number is not None

    @property
    def _ids(self) -> list[str]:
        return [f"{self.vendor_id:04x}:{self.product_id:04x}"] if self.vendor_id is not None else []

    def lookup_keys(self) -> list[Key]:
        place: list[Key] = [("usb", self.bus, self.number)] if self._has_place else []
        named = self.vendor_id is not None and self.product_id is not None
        return [*place, ("usb-id", self.vendor_id, self.product_id)] if named else place

    @property
    def id(self) -> str:
        place = [f"{'' if self._ids else 'bus'}{self.bus}:{self.number}"] if self._has_place else []
        return ":".join(["usb", *self._ids, *place])

    @property
    def text(self) -> str:
        place = [f"bus {self.bus} device {self.number}"] if self._has_place else []
        return " ".join(["usb", *self._ids, *place])


@dataclasses.dataclass(frozen=True, slots=True)
class ScsiSource(ClaimSource):
    """A SCSI logical unit of the host by adapter (scsi_host0) and address."""

    host: int
    channel: int
    target: int
    lun: int

    def lookup_keys(self) -> list[Key]:
        return [("scsi", self.host, self.channel, self.target, self.lun)]

    @property
    def id(self) -> str:
        return f"scsi:{self.host}:{self.channel}:{self.target}:{self.lun}"

    @property
    def text(self) -> str:
        return f"scsi {self.host}:{self.channel}:{self.target}:{self.lun}"


@dataclasses.dataclass(frozen=True, slots=True)
class MdevSource(ClaimSource):
    """A mediated device by UUID."""

    uuid: str

    def lookup_keys(self) -> list[Key]:
        return [("mdev", self.uuid.lower())]

    @property
    def id(self) -> str:
        return f"mdev:{self.uuid}"

    @property
    def text(self) -> str:
        return f"mdev {self.uuid}"


@dataclasses.dataclass(frozen=True, slots=True)
class NodeSource(ClaimSource):
    """A device node of the host, /dev/disk/by-id/... or /dev/ttyUSB0, as written; links are for host/ to resolve."""

    path: str

    def lookup_keys(self) -> list[Key]:
        return [("node", self.path)]

    @property
    def id(self) -> str:
        return f"node:{self.path}"

    @property
    def text(self) -> str:
        return self.path


@dataclasses.dataclass(frozen=True, slots=True)
class InterfaceSource(ClaimSource):
    """A network interface of the host by name (macvtap)."""

    interface: str

    def lookup_keys(self) -> list[Key]:
        return [("net", self.interface)]

    @property
    def id(self) -> str:
        return f"net:{self.interface}"

    @property
    def text(self) -> str:
        return f"interface {self.interface}"


# What a machine's start can do without a device of its stored configuration: libvirt's words.
STARTUP_POLICIES = ("mandatory", "requisite", "optional")


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How a machine is to have a device, as its XML says. None: it does not say, or in no way that is understood."""

    managed: bool | None = None  # libvirt takes it from its host driver, and gives it back
    startup_policy: str | None = None  # of STARTUP_POLICIES
    driver: str | None = None  # the VFIO variant driver that it is to have
    rom_bar: bool | None = None
    mac_address: str | None = None
    vlan: int | None = None
    boot_order: int | None = None

    def or_else(self, other: Settings) -> Settings:
        """These, and what they leave open as OTHER has it."""
        fields = [field.name for field in dataclasses.fields(self)]
        return Settings(**{name: getattr(other if getattr(self, name) is None else self, name) for name in fields})


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """One device element of one half (live or stored) of a machine's XML."""

    kind: str  # hostdev, interface, disk ...
    source: ClaimSource
    alias: str  # '' where libvirt gives none
    xml: str  # the element as libvirt wrote it; what a detach of the stored half is asked with
    id: str  # stable for this claim as written, to dismiss it by when its device is not here
    text: str  # the source for people, as written: "usb 0951:1666 bus 1 device 4"
    missing: bool = False  # libvirt's own missing='yes': this half claims nothing at present
    guest_address: str = ""  # 0000:04:00.0, where it is a PCI one
    settings: Settings = Settings()


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
    config: tuple[Claim, ...] = ()
    stale: bool = False  # as last known: its hypervisor cannot be reached
    ports: Ports = Ports()  # of the live half
    config_ports: Ports = Ports()
    title: str = ""
    warnings: tuple[Fact, ...] = ()  # what looks like a claim in either half, and is not understood

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
    claims: tuple[str, ...] = ()  # ids of the claims that make it
    guest_address: str = ""  # this and the settings: of several claims the first one's that has each
    settings: Settings = Settings()


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """What a device is to people."""

    label: str = ""
    category: str = ""
    location: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Missing:
    """A claim that means no device of this host now."""

    id: str
    source: str
    live: bool
    config: bool
    alias: str
    kind: str = "hostdev"
    look: Look = Look()  # as last known; of a device that never was here nothing is
    ambiguous: bool = False  # it fits several devices, which are here, and says not which of them it means
