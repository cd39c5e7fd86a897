"""What the outside tells the state. Every event is a plain value; the state's `apply` is the only one to act on it."""

from __future__ import annotations

import dataclasses

from hostpassd.model.codes import Details, detailed
from hostpassd.model.device import Device
from hostpassd.model.job import Job
from hostpassd.model.machine import Machine, MachineKey


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceSeen:
    """A device is there, new or with other values."""

    device: Device


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceGone:
    """The device at this sysfs path, and all below it, is gone."""

    sysfs_path: str


@dataclasses.dataclass(frozen=True, slots=True)
class DevicesScanned:
    """A fresh scan of everything, parents first: what is not in it is gone.

    `unread`: the sysfs paths of devices that are there, and cannot be read at present.
    """

    devices: tuple[Device, ...]
    unread: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class FilesHang:
    """These files of the kernel, and no others, do not answer: what they would tell is not known."""

    files: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class HostUse:
    """One thing the host itself uses a device for."""

    code: str  # of the table HOST_USES
    details: Details = ()  # of what a code can have several of, an array with this one
    system: bool = False  # the host cannot live without it (a file system of /, /boot, /usr, /var; swap; own state)


def host_use(code: str, *, system: bool = False, **details: str | tuple[str, ...]) -> HostUse:
    """The use CODE with DETAILS, as `detailed` takes them."""
    return HostUse(code, detailed(**details), system)


# By device: its sysfs path while it is read, then its name.
Uses = dict[str, tuple[HostUse, ...]]
# By node of a partition or volume, or name of a virtual interface: the devices behind it.
Nodes = dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class HostUsesRead:
    """What the host does with its devices at present.

    `uses`: by device name; a device that is not a key has none. `nodes`: what is here but is not in the tree, the
    device nodes of partitions and volumes and the names of virtual interfaces, each with the devices behind it, if any.
    """

    uses: Uses
    nodes: Nodes = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class ProblemChanged:
    """Something is wrong with the host as a whole, or (`there` false) no longer is."""

    code: str  # of the table PROBLEMS
    there: bool
    details: Details = ()


@dataclasses.dataclass(frozen=True, slots=True)
class HypervisorChanged:
    """A hypervisor connection came or went. `error` is '' while connected."""

    uri: str
    connected: bool
    error: str = ""
    version: int = 0  # of its libvirt, 9000000 for 9.0.0; 0: not known


@dataclasses.dataclass(frozen=True, slots=True)
class MachineRead:
    """A machine as libvirt describes it now."""

    machine: Machine


@dataclasses.dataclass(frozen=True, slots=True)
class MachineGone:
    """A machine that its hypervisor no longer has."""

    machine: MachineKey


@dataclasses.dataclass(frozen=True, slots=True)
class MachinesListed:
    """All machines of one hypervisor, freshly read: what is not in it is gone."""

    uri: str
    machines: tuple[Machine, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceAdded:
    """libvirt: the live device with this alias is in the machine. Moves no state by itself; jobs wait for it."""

    machine: MachineKey
    alias: str


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceRemoved:
    """libvirt: the live device with this alias has left the machine."""

    machine: MachineKey
    alias: str


@dataclasses.dataclass(frozen=True, slots=True)
class RemovalFailed:
    """libvirt: the guest refused to let the device with this alias go."""

    machine: MachineKey
    alias: str


@dataclasses.dataclass(frozen=True, slots=True)
class Releasing:
    """A guest was asked to let the device with this alias go, or (`asked` false) no longer is."""

    machine: MachineKey
    alias: str
    asked: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class JobChanged:
    """A job is new or has moved on."""

    job: Job


@dataclasses.dataclass(frozen=True, slots=True)
class JobForgotten:
    """An ended job's time is over."""

    number: int


@dataclasses.dataclass(frozen=True, slots=True)
class OperationRefused:
    """A user was refused an operation. This and the next two change nothing in the state: the audit log takes them."""

    operation: str
    machine: str  # UUID; '' where what was spelt is no machine
    devices: tuple[str, ...]  # names; none where something that was spelt is no device
    spelt: str  # how the devices were spelt
    uid: int
    error: Exception


@dataclasses.dataclass(frozen=True, slots=True)
class CancelAnswered:
    """A user has cancelled a job, or (`error`) could not."""

    job: Job
    uid: int
    error: Exception | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class OperationRecovered:
    """What an unfinished operation had left is put in order."""

    operation: str
    machine: str  # UUID; '' for none
    devices: tuple[str, ...]
    number: int  # of its job; below 0 for one of an earlier run of the daemon


Event = (
    DeviceSeen
    | DeviceGone
    | DevicesScanned
    | FilesHang
    | HostUsesRead
    | ProblemChanged
    | HypervisorChanged
    | MachineRead
    | MachineGone
    | MachinesListed
    | DeviceAdded
    | DeviceRemoved
    | RemovalFailed
    | Releasing
    | JobChanged
    | JobForgotten
    | OperationRefused
    | CancelAnswered
    | OperationRecovered
)
