"""The codes by which reasons and facts are told: a row each, from which message, severity and docs are made.

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
    "driver": "s",
    "devices": "as",  # for people: Label (Location)
    "functions": "as",  # names of virtual functions
    "group": "i",  # number of the IOMMU group
    "kind": "s",  # of a device or of a use
    "machine": "o",
    "machine-name": "s",
    "members": "as",  # of the IOMMU group, with their drivers: 0000:00:1f.0 (lpc_ich)
    "needs": "s",  # what a machine lacks
    "owner": "s",  # the device to name instead
    "place": "s",  # where in a machine, for people
    "places": "i",  # free ones
    "seat": "s",
    "what": "s",  # the device that the row is about, for people
}


@dataclasses.dataclass(frozen=True, slots=True)
class Code:
    """One row. MEANING is for the documentation: when it is told, or why it counts. SEVERITY: '' of a fact."""

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

# What a job does, step by step.
STEPS = _table(
    Code(
        "store",
        "",
        "Store {what} in the machine's configuration.",
        "The machine has the device whenever it is started from now on.",
    ),
    Code(
        "unstore",
        "",
        "Remove {what} from the machine's stored configuration.",
        "The machine is started without the device from now on.",
    ),
    Code(
        "detach",
        "",
        "Free {what} from its host driver[ {driver}].",
        "The host does without the device, and VFIO's driver takes it, so that its whole IOMMU group is free.",
    ),
    Code(
        "reattach",
        "",
        "Give {what} back to its host driver.",
        "The driver that the host had for the device binds it again, once the whole IOMMU group is free.",
    ),
    Code(
        "attach",
        "",
        "Attach {what} to the running machine[, at {place}].",
        "The device is plugged into the running machine; done means that libvirt has said so.",
    ),
    Code(
        "unplug",
        "",
        "Ask the guest to release {what} and wait until it has.",
        "A guest that does not answer, or refuses, keeps the device.",
    ),
)

# What comes of an assign, beside the steps.
CONSEQUENCES = _table(
    Code(
        "memory-pinned",
        "",
        "All memory of the machine is pinned while it runs with {what}.",
        "A device that writes to the guest's memory by itself needs all of it in its place; none can be swapped out.",
    ),
    Code(
        "no-migration",
        "",
        "The machine cannot be migrated while it has {what}.",
        "The device is in this host.",
    ),
    Code(
        "no-save",
        "",
        "The machine cannot be saved to a file, nor have a snapshot of its memory, while it has {what}.",
        "What is inside the device cannot be read out.",
    ),
    Code(
        "no-reset",
        "",
        "{what} cannot be reset: what one user leaves in it, the next one finds.",
        "The kernel knows no way to reset the function.",
    ),
    Code(
        "takes-along",
        "",
        "{what} takes along {devices}, which its IOMMU group has too.",
        "VFIO hands over a whole IOMMU group or nothing.",
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
    return Blocker(code, BLOCKERS[code].severity, device, _told(details))


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """Something that is told with its details and is no reason against anything."""

    row: Code
    device: str  # name; '' where it is about none
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
    """The fact of ROW on DEVICE; the details as for `blocker`."""
    return Fact(row, device, _told(details))


def _told(details: Mapping[str, Detail]) -> Details:
    told = {key.replace("_", "-"): value for key, value in details.items() if value != ""}
    return tuple(sorted(told.items()))
