"""The codes by which reasons are told: one row each, from which the message, its severity and the docs are made.

A message is the sentence of its code and its details, nothing else: a front end can say it in another language. A part
of a sentence in [brackets] is left out where the details have nothing for one of its fields.

A new code is one row here and one place that finds it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

NEVER = "never"  # nobody can accept it
OVERRIDE = "override"  # a caller can accept it, by its code

Detail = str | int | tuple[str, ...]
Details = tuple[tuple[str, Detail], ...]

# The D-Bus type of each key of the details, the same wherever the key stands. `device` and `machine` hold a device's
# name and a machine's UUID.
KEYS: Mapping[str, str] = {
    "class": "s",  # of a PCI function: 0c05
    "detail": "s",  # of a use, for people: /home on /dev/sda2
    "devices": "as",  # for people: Label (Location)
    "element": "s",  # of a machine's XML, by its tag
    "fault": "s",  # what is wrong, in English
    "functions": "as",  # names of virtual functions
    "group": "i",  # number of the IOMMU group
    "kind": "s",  # of a device or of a use
    "machine": "o",
    "machine-name": "s",
    "members": "as",  # of the IOMMU group, with their drivers: 0000:00:1f.0 (lpc_ich)
    "needs": "s",  # what a machine lacks
    "owner": "s",  # the device to name instead
    "places": "i",  # free ones
    "pool": "s",
    "seat": "s",
    "volume": "s",
    "what": "s",  # the device that the row is about, for people
}


@dataclasses.dataclass(frozen=True, slots=True)
class Code:
    """One row. MEANING is for the documentation (docs/blockers.md): when it is told, or why it counts."""

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
        "The running machine {machine-name} has {what}: dismiss it there first.",
        "A running machine has the device, a companion, a virtual function of it, or something below it.",
    ),
    Code(
        "host-system",
        NEVER,
        "The host runs from {what}[ ({kind}: {detail})]: it stays with the host.",
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
        "The host uses {what} ({kind}): {detail}.",
        "A file system on it is mounted, also where it rests on partitions, volumes or encryption.",
    ),
    Code(
        "storage-stack",
        OVERRIDE,
        "The host uses {what} ({kind}): {detail}.",
        "Device mapper, md, LVM, ZFS, bcache or the like have it open.",
    ),
    Code(
        "network-in-use",
        OVERRIDE,
        "The host uses {what} ({kind}): {detail}.",
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
        "{machine-name} has {places} free places for {devices}: give it {needs} for each and start it again.",
        "Only in a plan: the running machine has no place for one more PCI device.",
    ),
    Code(
        "not-leaf",
        OVERRIDE,
        "Devices that can be assigned by themselves are below {what}: assign those.",
        "Whoever is given the controller has all that is plugged into it, now and later.",
    ),
)

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


def blocker(code: str, device: str, **details: Detail) -> Blocker:
    """The blocker CODE on DEVICE; an underscore in a key stands for its dash, and an empty detail is left out."""
    told = {key.replace("_", "-"): value for key, value in details.items() if value != ""}
    return Blocker(code, BLOCKERS[code].severity, device, tuple(sorted(told.items())))


FACT = ""  # it is so; whether anything follows from it, a reason tells

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


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """One thing that is so, on a device or on none, from the table WARNINGS."""

    code: str
    device: str
    details: Details = ()

    @property
    def message(self) -> str:
        """One sentence."""
        return say(WARNINGS[self.code].sentence, dict(self.details))


def warning(code: str, **details: str) -> Fact:
    """The warning CODE; an empty detail is left out."""
    return Fact(code, "", tuple(sorted((key, value) for key, value in details.items() if value)))
