"""What a text spells: a device, a machine, or something that is missing. Pure.

Whoever makes a device, names an interface or defines a machine chooses words that come in here. So the spellings are
kept apart by their shape: what looks like a place or a name means that very thing or nothing, and
what a device says of itself is looked at only where the text asks for it (`serial:TEXT`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from hostpassd import errors
from hostpassd.model.device import KERNEL_NAMED_KINDS, Device, device_name
from hostpassd.model.machine import Machine, Missing
from hostpassd.model.naming import NO_INTERFACE
from hostpassd.model.order import in_tree_order
from hostpassd.state import State

# Characters. Nothing that is here has a longer name.
TEXT_LIMIT = 512

_SERIAL = "serial:"

_SHORT_PCI = re.compile(r"[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]")
_PCI = re.compile(r"[0-9a-fA-F]{4,}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]")
_IDS = re.compile(r"([0-9a-fA-F]{4}):([0-9a-fA-F]{4})")
_MAC = re.compile(r"([0-9a-fA-F]{2}:){5,}[0-9a-fA-F]{2}")
_UUID = re.compile(r"[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")

# What the kernel calls things, and the most characters of an interface's name, which can be any.
_KERNEL_NAME = re.compile(r"[!-~]{1,128}")
_INTERFACE_LIMIT = 15


def find_devices(state: State, text: str) -> list[str]:
    """The names of the devices that TEXT spells, in tree order. Error: InvalidArgs, TEXT is too long.

    Spellings: name, path in /sys/devices, device node, PCI address, vvvv:pppp, MAC address, kernel name
    (a USB port is one), interface name, and a serial number behind "serial:".
    """
    _check_length(text)
    if text.startswith(_SERIAL):
        serial = text.removeprefix(_SERIAL)
        return in_tree_order(state, state.saying(("serial", serial)))
    if here := state.located(text):
        return [here.name]
    if text.startswith("/"):
        return in_tree_order(state, _at_path(state, text))
    if text in state.devices:
        return [text]
    if ids := _IDS.fullmatch(text):
        return in_tree_order(state, state.saying(("ids", int(ids[1], 16), int(ids[2], 16))))
    if _MAC.fullmatch(text):
        return in_tree_order(state, state.saying(("mac", text.lower())))
    return in_tree_order(state, _called(state, text))


def _check_length(text: str) -> None:
    if len(text) > TEXT_LIMIT:
        raise errors.InvalidArgs(
            f"A text of {len(text)} characters spells nothing here: give one of {TEXT_LIMIT} or less."
        )


def _at_path(state: State, text: str) -> Iterable[str]:
    if text.startswith("/dev/"):
        return dict.fromkeys(state.keyed(("node", text)))
    device = state.at(os.path.normpath(text))
    return [device.name] if device else []


def _called(state: State, text: str) -> Iterable[str]:
    """The devices that the kernel calls TEXT; the interface called so only where nothing else could be."""
    if _SHORT_PCI.fullmatch(text):
        text = "0000:" + text
    if _PCI.fullmatch(text):
        text = text.lower()
    if _UUID.fullmatch(text):
        return state.keyed(("mdev", text.lower()))
    kinds = KERNEL_NAMED_KINDS if _KERNEL_NAME.fullmatch(text) else ()
    found = {name for kind in kinds if _is_called(state.device(name := device_name(kind, text)), text)}
    if found or len(text) > _INTERFACE_LIMIT or NO_INTERFACE.fullmatch(text):
        return found
    name = device_name("net", text)
    return [name] if _is_called(state.device(name), text) else []


def _is_called(device: Device | None, kernel_name: str) -> bool:
    """Whether DEVICE is the kernel's KERNEL_NAME: more than one of these can come to the same name here."""
    return device is not None and device.sysfs_path.rpartition("/")[2] == kernel_name


def one_device(state: State, text: str) -> Device:
    """The device that an operation on TEXT is about: what TEXT spells, or its ancestor that can be assigned.

    Errors: InvalidArgs, NoSuchDevice, AmbiguousDevice.
    """
    found = find_devices(state, text)
    if not found:
        raise errors.NoSuchDevice(
            f"No device here is called {text[:80]!r}: give a name, an address, a device node or an interface."
        )
    targets = list(dict.fromkeys(state.target(name) or name for name in found))
    if len(targets) > 1:
        raise errors.AmbiguousDevice(f"{text[:80]!r} is {', '.join(targets[:8])}: name one of them.")
    return state.devices[targets[0]]


def one_machine(state: State, text: str) -> Machine:
    """The machine with this name or UUID. Errors: InvalidArgs, NoSuchMachine, AmbiguousMachine.

    A machine that is called like another's UUID is not found by that.
    """
    _check_length(text)
    if _UUID.fullmatch(text):
        found = [state.machines[text.lower()]] if text.lower() in state.machines else []
    else:
        found = [machine for machine in state.machines.values() if machine.name == text]
    if not found:
        raise errors.NoSuchMachine(f"No machine here is called {text[:80]!r}: give a name or a UUID.")
    if len(found) > 1:
        raise errors.AmbiguousMachine(f"{len(found)} machines are called {text[:80]!r}: give the UUID.")
    return found[0]


def missing_by_id(state: State, machine: Machine, text: str) -> Missing | None:
    """The machine's claim on something not here now whose id is TEXT. Error: InvalidArgs."""
    _check_length(text)
    return next((row for row in state.missing.get(machine.uuid, ()) if row.id == text), None)


def missing_at(state: State, machine: Machine, name: str, instance: int | None = None) -> tuple[Missing, ...]:
    """The machine's claims on what was last at the place NAME and is not here now.

    They are one thing's: what is claimed by address live and by its ids in the stored configuration is two claims.
    INSTANCE: of that very thing. Error: AmbiguousDevice, claims on more than one thing were last there.
    """
    there: dict[int, list[Missing]] = {}
    for row in state.missing.get(machine.uuid, ()):
        place, number = state.last_place(machine.key, row.id)
        if name and place == name and instance in (None, number):
            there.setdefault(number, []).append(row)
    if len(there) > 1:
        ids = ", ".join(row.id for rows in there.values() for row in rows)
        raise errors.AmbiguousDevice(f"More than one thing was last at {name}: give one of the ids {ids}.")
    return tuple(row for rows in there.values() for row in rows)
