"""What a text spells: a device, a machine, or something that is missing. Pure, but that links in /sys are followed."""

from __future__ import annotations

import os
import re

from hostpassd import errors, names
from hostpassd.host.device import Device, Net
from hostpassd.machines.machine import Machine, Missing
from hostpassd.state import State

_SHORT_PCI = re.compile(r"[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]")
_PLACE = re.compile(
    r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]"  # a PCI address
    r"|[0-9]+-[0-9.]+|usb[0-9]+"  # a USB port
    r"|([0-9a-f]{2}:){5}[0-9a-f]{2}"  # a MAC address
)
_IDS = re.compile(r"([0-9a-fA-F]{4}):([0-9a-fA-F]{4})")


def find_devices(state: State, text: str) -> list[str]:
    """The names of the devices that TEXT spells, sorted; the more exact spellings go first and stand alone.

    A place or an address is never taken for a serial number: those are the device's own claims.
    """
    if not text:
        return []
    if text.startswith(names.DEVICES + "/"):
        text = text.removeprefix(names.DEVICES + "/")
    if text in state.devices:
        return [text]
    if text.startswith("/sys/"):
        device = state.at(os.path.realpath(text))
        return [device.name] if device else []
    if text.startswith("/dev/"):
        return sorted(state.keyed(("node", text)))
    address = text.lower()
    if _SHORT_PCI.fullmatch(text):
        address = "0000:" + address
    placed = sorted(device.name for device in state.devices.values() if _is_at(device, text, address))
    if placed or _PLACE.fullmatch(address):
        return placed
    if ids := _IDS.fullmatch(text):
        wanted = (int(ids[1], 16), int(ids[2], 16))
        return sorted(device.name for device in state.devices.values() if _ids(device) == wanted)
    return sorted(device.name for device in state.devices.values() if device.serial == text)


def _is_at(device: Device, text: str, address: str) -> bool:
    if device.pci:
        return device.pci.address == address
    if device.usb:
        return device.usb.port == text
    nets = (facts for facts in device.facts if isinstance(facts, Net))
    return any(net.interface == text or net.mac_address.lower() == address for net in nets)


def _ids(device: Device) -> tuple[int, int] | None:
    if device.pci:
        return (device.pci.vendor_id, device.pci.device_id)
    return (device.usb.vendor_id, device.usb.product_id) if device.usb else None


def one_device(state: State, text: str) -> Device:
    """The device that an operation on TEXT is about: what TEXT spells, or its ancestor that can be assigned.

    Errors: NoSuchDevice, AmbiguousDevice.
    """
    found = find_devices(state, text)
    if not found:
        raise errors.NoSuchDevice(f"no device here is called {text[:80]!r}: see FindDevices and GetManagedObjects")
    targets = list(dict.fromkeys(state.target(name) or name for name in found))
    if len(targets) > 1:
        raise errors.AmbiguousDevice(f"{text[:80]!r} is {', '.join(targets[:8])}: name one of them")
    return state.devices[targets[0]]


def one_machine(state: State, text: str) -> Machine:
    """The machine with this name, UUID or object path. Errors: NoSuchMachine, AmbiguousMachine."""
    wanted = text.removeprefix(names.MACHINES + "/").replace("_", "-").lower()
    machine = state.machines.get(wanted)
    if machine:
        return machine
    found = [machine for machine in state.machines.values() if machine.name == text]
    if not found:
        raise errors.NoSuchMachine(f"no machine here is called {text[:80]!r}: give a name, a UUID or an object path")
    if len(found) > 1:
        raise errors.AmbiguousMachine(f"{len(found)} machines are called {text[:80]!r}: give the UUID")
    return found[0]


def one_missing(state: State, machine: Machine, text: str) -> Missing | None:
    """The machine's claim on something not here now that TEXT names: by its id, or where it was last seen."""
    text = text.removeprefix(names.DEVICES + "/")
    for row in state.missing.get(machine.uuid, ()):
        if row.id == text or state.last_place(machine.uuid, row.id) == text:
            return row
    return None
