"""The codes of reasons and facts: one row each, from which the message, the severity and the docs are made.

A message is the sentence of its code and its details, nothing else: a front end can say it in another language. A part
of a sentence in [brackets] is left out where the details have nothing for one of its fields.

A new code is one row here and one place that finds it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

NEVER = "never"  # nobody can accept it
OVERRIDE = "override"  # a caller can accept it, by its code
FACT = ""  # it is so; whether anything follows from it, a reason tells

Detail = str | int | tuple[str, ...]
Details = tuple[tuple[str, Detail], ...]

# The D-Bus type of each key of the details, the same wherever the key stands. `device` and `machine` hold a device's
# name and a machine's UUID.
KEYS: Mapping[str, str] = {
    "addresses": "as",  # with their prefix lengths: 192.0.2.7/24
    "card": "s",  # a slot of the host with several functions: 0000:07:00
    "class": "s",  # of a PCI function: 0c05
    "controller": "s",  # of a machine, by libvirt's model: pcie-root-port
    "devices": "as",  # for people: Label (Location)
    "driver": "s",  # of the kernel
    "error": "s",  # whoever failed said so
    "element": "s",  # of a machine's XML, by its tag
    "fault": "s",  # what is wrong, in English
    "functions": "as",  # names of virtual functions
    "group": "i",  # number of the IOMMU group
    "interfaces": "as",  # names of network interfaces
    "kind": "s",  # of a device
    "kinds": "as",  # of what stands on an interface: bridge bond vlan macvlan; netns: another network namespace has it
    "machine": "o",
    "machine-name": "s",
    "members": "as",  # of the IOMMU group, with their drivers: 0000:00:1f.0 (lpc_ich)
    "mount-points": "as",
    "owner": "s",  # the device to name instead
    "paths": "as",  # of files and folders on a device
    "places": "i",  # free ones
    "pool": "s",
    "routes": "as",  # default via 192.0.2.1
    "seat": "s",
    "uri": "s",  # of a hypervisor
    "uses": "as",  # codes of host uses
    "volume": "s",
    "volumes": "as",  # what lies on a device, topmost first: LVM volume vg-data on LUKS safe on /dev/sda2
    "what": "s",  # the device that the row is about, for people
}


@dataclasses.dataclass(frozen=True, slots=True)
class Code:
    """One row. MEANING is for the documentation (docs/blockers.md, docs/facts.md): when, or why it counts."""

    code: str
    severity: str
    sentence: str
    meaning: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The keys of the details that the sentence shows."""
        return tuple(_FIELD.findall(self.sentence))


def _table(*rows: Code) -> Mapping[str, Code]:
    return {row.code: row for row in rows}


# In the order in which they are told, which is part of the interface: what nobody can accept first.
BLOCKERS = _table(
    Code(
        "not-assignable-kind",
        NEVER,
        "{what} is of a kind that cannot be assigned ({kind})[: it is a function of {owner}, assign that].",
        "The node is what a device does for the host, or a part of the tree's structure; a machine is given devices.",
    ),
    Code(
        "hub",
        NEVER,
        "{what} is a USB hub: assign the devices below it.",
        "A hub is shared by all that is plugged into it.",
    ),
    Code(
        "bridge",
        NEVER,
        "{what} is a bridge: assign the devices behind it.",
        "A PCI bridge, by its header type or its class, is shared by all that is behind it.",
    ),
    Code(
        "held-live",
        NEVER,
        "The running machine {machine-name} has {what}[, by its virtual functions {functions}]: dismiss it there "
        "first.",
        "A running machine has the device, a companion, a virtual function of it, or something below it.",
    ),
    Code(
        "host-system",
        NEVER,
        "The host runs from {what}[ ({uses} on {volumes})][, mounted at {mount-points}][, with {paths}]: it stays with "
        "the host.",
        "A file system of /, /boot, /usr or /var, swap, or the daemon's own state is on it, or the configuration names "
        "it as never to be given away.",
    ),
    Code(
        "not-responding",
        NEVER,
        "{what} does not answer on its bus: reset or replug it.",
        "The configuration space reads as all ones: the device has no power, has crashed, or is gone.",
    ),
    Code(
        "group-not-viable",
        NEVER,
        "IOMMU group {group} also has {members}, which the host keeps: use another slot.",
        "VFIO hands over a whole IOMMU group or nothing, and a member of this one can never be taken from its driver.",
    ),
    Code(
        "no-iommu",
        NEVER,
        "{what} is in no IOMMU group: enable the IOMMU in the firmware and on the kernel's command line.",
        "Without an IOMMU a device that a machine drives could write to all memory of the host.",
    ),
    Code(
        "boot-display",
        OVERRIDE,
        "{what} shows the host's console: the host would lose its screen.",
        "The firmware's or the kernel's console is on this graphics card.",
    ),
    Code(
        "last-keyboard",
        OVERRIDE,
        "{what} is, or leads to, the only keyboard of {seat}: plug in another one first.",
        "Nobody could type at the host any more.",
    ),
    Code(
        "mounted",
        OVERRIDE,
        "The host has {mount-points} mounted from {what}[ ({volumes})]: unmount it first.",
        "A file system on it is mounted, also where it rests on partitions, volumes or encryption.",
    ),
    Code(
        "storage-stack",
        OVERRIDE,
        "Storage of the host is built on {what}[ ({volumes})]: deactivate that first.",
        "Device mapper, md, LVM, ZFS, bcache or the like have it open.",
    ),
    Code(
        "network-in-use",
        OVERRIDE,
        "The host's network uses {what}[, with the addresses {addresses}][, with the routes {routes}][, under "
        "{interfaces}][ ({kinds})]: take it out of there first.",
        "An address that is not link-local, a default route, or an interface that stands on it is the host's.",
    ),
    Code(
        "held-config",
        OVERRIDE,
        "The stored configuration of the machine {machine-name} has {what}: dismiss it there first.",
        "Another machine would be refused the device, or take it, when it starts.",
    ),
    Code(
        "has-virtual-functions",
        OVERRIDE,
        "{what} has virtual functions ({functions}): assign those, or remove them first.",
        "The virtual functions go when the physical function changes its driver.",
    ),
    Code(
        "class-excluded",
        OVERRIDE,
        "{what} is of PCI class {class}, which the configuration keeps for the host.",
        "The configuration's `excluded-classes` names its class.",
    ),
    Code(
        "no-free-port",
        OVERRIDE,
        "{machine-name} has {places} free places for {devices}: give it an empty {controller} for each and start it "
        "again.",
        "Only in a plan: the running machine has no place for one more PCI device.",
    ),
    Code(
        "not-leaf",
        OVERRIDE,
        "Devices that can be assigned by themselves are below {what}: assign those.",
        "Whoever is given the controller has all that is plugged into it, now and later.",
    ),
)

# What a job does, step by step.
STEPS = _table(
    Code(
        "store",
        FACT,
        "Store {what} in the machine's configuration.",
        "The machine has the device whenever it is started from now on.",
    ),
    Code(
        "unstore",
        FACT,
        "Remove {what} from the machine's stored configuration.",
        "The machine is started without the device from now on.",
    ),
    Code(
        "detach",
        FACT,
        "Free {what} from its host driver[ {driver}].",
        "The host does without the device, and VFIO's driver takes it, so that its whole IOMMU group is free.",
    ),
    Code(
        "reattach",
        FACT,
        "Give {what} back to its host driver.",
        "The driver that the host had for the device binds it again, once the whole IOMMU group is free.",
    ),
    Code(
        "attach",
        FACT,
        "Attach {what} to the running machine[, as a function of the card {card} on a port of its own].",
        "The device is plugged into the running machine; done means that libvirt has said so.",
    ),
    Code(
        "unplug",
        FACT,
        "Ask the guest to release {what} and wait until it has.",
        "A guest that does not answer, or refuses, keeps the device.",
    ),
)

# What comes of an assign, beside the steps.
CONSEQUENCES = _table(
    Code(
        "memory-pinned",
        FACT,
        "All memory of the machine is pinned while it runs with {what}.",
        "A device that writes to the guest's memory by itself needs all of it in its place; none can be swapped out.",
    ),
    Code(
        "no-migration",
        FACT,
        "The machine cannot be migrated while it has {what}.",
        "The device is in this host.",
    ),
    Code(
        "no-save",
        FACT,
        "The machine cannot be saved to a file, nor have a snapshot of its memory, while it has {what}.",
        "What is inside the device cannot be read out.",
    ),
    Code(
        "no-reset",
        FACT,
        "{what} cannot be reset: what one user leaves in it, the next one finds.",
        "The kernel knows no way to reset the function.",
    ),
    Code(
        "takes-along",
        FACT,
        "{what} takes along {devices}, which its IOMMU group has too.",
        "VFIO hands over a whole IOMMU group or nothing.",
    ),
)

# What the host itself uses a device for, on the device on which it stands.
HOST_USES = _table(
    Code(
        "mount",
        FACT,
        "The host has {mount-points} mounted from {what}[ ({volumes})].",
        "A file system on it is mounted, also where it rests on partitions, volumes or encryption.",
    ),
    Code(
        "swap",
        FACT,
        "The host swaps to {what}[ ({volumes})][, in {paths}].",
        "Swap is on it, as a partition, a volume or a file.",
    ),
    Code(
        "storage-stack",
        FACT,
        "Storage of the host is built on {what}[ ({volumes})].",
        "Device mapper, md, LVM, ZFS, bcache or the like have it open.",
    ),
    Code(
        "state",
        FACT,
        "The daemon's own state, {paths}, is on {what}[ ({volumes})].",
        "The folder of hostpassd's own state is on it, and no `mount` says already that the host needs it.",
    ),
    Code(
        "address",
        FACT,
        "The host has the addresses {addresses} on {what}.",
        "An address that is neither link-local nor of the loopback.",
    ),
    Code(
        "default-route",
        FACT,
        "Default routes of the host lead over {what}: {routes}.",
        "What is for no network that the host knows goes out here.",
    ),
    Code(
        "upper-link",
        FACT,
        "The host's network is built on {what}[: {interfaces}][ ({kinds})][, with the addresses {addresses}][, with "
        "the routes {routes}].",
        "It is a member of a bridge or a bond, a VLAN, macvlan or ipvlan stands on it, or it is in another network "
        "namespace, where what it does cannot be seen.",
    ),
    Code(
        "boot-display",
        FACT,
        "{what} shows the host's console.",
        "The firmware's or the kernel's console is on this graphics card.",
    ),
    Code(
        "keyboard",
        FACT,
        "{what} is a keyboard of {seat}, which has no other device with one.",
        "All keyboards of the seat belong to one device that can be assigned.",
    ),
    Code(
        "vfio",
        FACT,
        "{what} has the driver {driver}, and no running machine has it.",
        "A VFIO driver keeps it ready for machines, and the host cannot use it.",
    ),
)

# What is wrong with the host as a whole.
PROBLEMS = _table(
    Code(
        "no-iommu",
        FACT,
        "No device of this host is in an IOMMU group, so no PCI device can be assigned: enable the IOMMU in the "
        "firmware and on the kernel's command line.",
        "There are PCI devices, and none of them is in an IOMMU group.",
    ),
    Code(
        "hypervisor-unreachable",
        FACT,
        "The hypervisor {uri} cannot be reached[ ({error})]: what it told last stands, and its machines cannot be "
        "changed.",
        "One row for each hypervisor that is configured and not connected.",
    ),
    Code(
        "no-polkit",
        FACT,
        "Only root may change anything, as polkit is not on the bus: have it installed and started.",
        "polkit was not on the bus when it was last to be asked whether a caller may do something.",
    ),
    Code(
        "state-folder",
        FACT,
        "No operation can begin[ ({error})].",
        "The intent log cannot be read or written, and nothing is begun that a crash would leave half done.",
    ),
)

# What looks like a hold in a machine's configuration and is not understood.
WARNINGS = _table(
    Code(
        "unreadable-hold",
        FACT,
        "The machine's configuration has a <{element}> that cannot be read ({fault}): what it holds is not known.",
        "An element hands a device of the host to the machine, and does not say which in a way that can be read.",
    ),
    Code(
        "pool-unavailable",
        FACT,
        "Where the volume {volume} of the storage pool {pool} is cannot be told: what the machine holds by it is not "
        "known.",
        "A disk is a volume of a storage pool, which this version does not look up: it can be on any disk of the host.",
    ),
    Code(
        "unknown-reference",
        FACT,
        "The machine's configuration has a <{element}> that names something of the host in an unknown way ({fault}): "
        "what it holds is not known.",
        "An element is of a type or in a mode that this version does not know, or QEMU's own command line names a "
        "device of the host.",
    ),
)

# All tables, by what their rows are.
TABLES: Mapping[str, Mapping[str, Code]] = {
    "blocker": BLOCKERS,
    "host-use": HOST_USES,
    "problem": PROBLEMS,
    "warning": WARNINGS,
    "step": STEPS,
    "consequence": CONSEQUENCES,
}

# Whatever else there is, of a device with one of these it does not matter.
ALONE = frozenset({"not-assignable-kind", "hub", "bridge"})

_ORDER = {code: place for place, code in enumerate(BLOCKERS)}

# Every code that a caller can accept by its name.
OVERRIDABLE = frozenset(row.code for row in BLOCKERS.values() if row.severity == OVERRIDE)

_FIELD = re.compile(r"\{([a-z-]+)\}")
_OPTIONAL = re.compile(r"\[([^\]]*)\]")


def say(sentence: str, details: Mapping[str, Detail]) -> str:
    """SENTENCE, a code's own or its translation, with DETAILS in its fields; nothing where there is no detail."""
    told = _OPTIONAL.sub(
        lambda part: part[1] if all(key in details for key in _FIELD.findall(part[1])) else "", sentence
    )
    return _FIELD.sub(lambda field: _text(details.get(field[1], "")), told)


def _text(detail: Detail) -> str:
    return ", ".join(detail) if isinstance(detail, tuple) else str(detail)


@dataclasses.dataclass(frozen=True, slots=True)
class Blocker:
    """One reason why a device cannot, or should not, be assigned, from the table BLOCKERS."""

    code: str
    severity: str
    device: str
    details: Details = ()

    @property
    def message(self) -> str:
        """One sentence: what is wrong and what to do."""
        return say(BLOCKERS[self.code].sentence, dict(self.details))

    @property
    def place(self) -> tuple[int, str, str]:
        """What blockers are sorted by."""
        return (_ORDER[self.code], self.device, repr(self.details))

    @property
    def machine(self) -> str:
        """The UUID of the machine whose hold it is; '' if it is none."""
        return str(dict(self.details).get("machine", ""))

    def is_within(self, other: Blocker) -> bool:
        """Whether it says what OTHER says, or less: an array is within one that has all its elements."""
        if (self.code, self.device) != (other.code, other.device):
            return False
        mine, others = dict(self.details), dict(other.details)
        return all(_is_within(value, others.get(key, ())) for key, value in mine.items())


def _is_within(detail: Detail, other: Detail) -> bool:
    if isinstance(detail, tuple) and isinstance(other, tuple):
        return set(detail) <= set(other)
    return detail == other


def blocker(code: str, device: str, **details: Detail) -> Blocker:
    """The blocker CODE on DEVICE with DETAILS, as `detailed` takes them."""
    return Blocker(code, BLOCKERS[code].severity, device, detailed(**details))


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """One thing that is so, of a device ('': of none), from one of the tables of facts."""

    row: Code
    device: str
    details: Details = ()

    @property
    def code(self) -> str:
        """Which one it is, of its table."""
        return self.row.code

    @property
    def message(self) -> str:
        """One sentence."""
        return say(self.row.sentence, dict(self.details))


def fact(row: Code, device: str, **details: Detail) -> Fact:
    """The fact of ROW on DEVICE with DETAILS, as `detailed` takes them."""
    return Fact(row, device, detailed(**details))


def detailed(**details: Detail) -> Details:
    """DETAILS by their keys; an underscore in a key stands for its dash, and an empty detail is left out."""
    told = {key.replace("_", "-"): value for key, value in details.items() if value not in ("", ())}
    return tuple(sorted(told.items()))


def gathered(rows: Iterable[Details]) -> dict[str, Detail]:
    """The details of ROWS of one device and code as those of one row: arrays with all their elements, sorted."""
    found: dict[str, Detail] = {}
    for key, value in (detail for row in rows for detail in row):
        known = found.get(key, ())
        if isinstance(value, tuple) and isinstance(known, tuple):
            value = tuple(sorted({*known, *value}))
        found[key] = value
    return found
