"""Cards: the functions of one host slot, which a machine should see as one card too. Pure."""

from __future__ import annotations

from hostpassd.model.device import Device
from hostpassd.model.machine import Machine


def functions_beside(device: Device, devices: list[Device]) -> list[Device]:
    """Of DEVICES the functions of the host slot that DEVICE is in, in order; none for what is no PCI function."""
    slot = slot_of(device.pci.address) if device.pci else None
    found = [d for d in devices if d.pci and slot_of(d.pci.address) == slot]
    return sorted(found, key=lambda d: d.pci.address if d.pci else "")


def slot_of(address: str) -> str:
    """0000:01:00 of 0000:01:00.0"""
    return address[:-2]


def card_places(machine: Machine, asked: Device, to_store: list[Device], given_address: str) -> dict[str, str]:
    """The guest addresses in the stored half of those that stay one card there, by device name.

    GIVEN_ADDRESS: the one that the caller gave for the device ASKED for, or ''. Host and guest function numbers are
    the same. Without function 0 a guest sees no card, and where no slot is free libvirt adds one for each device by
    itself: then there is no address here.
    """
    ports, given = machine.stored_ports, slot_of(given_address)
    free = {
        True: [f"0000:{bus:02x}:00" for bus in ports.express],
        False: [f"0000:{bus:02x}:{slot:02x}" for bus, slot in ports.conventional],
    }
    taken = {given}
    places: dict[str, str] = {}
    for first in to_store:
        card = functions_beside(first, to_store)
        if not first.pci or len(card) < 2 or first.pci.address[-1] != "0":
            continue
        if given and asked in card:
            slot = given if asked is first and given_address[-1] == "0" else ""
        else:
            slot = next((slot for slot in free[first.pci.express] if slot not in taken), "")
        if slot:
            taken.add(slot)
            places |= {d.name: f"{slot}.{d.pci.address[-1]}" for d in card if d.pci}
    return places
