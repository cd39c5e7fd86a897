"""Cards: the functions of one host slot, which a machine should see as one card too. Pure."""

from __future__ import annotations

from hostpassd.model.device import Device
from hostpassd.model.machine import Machine
from hostpassd.model.pci_address import PciAddress


def functions_beside(device: Device, devices: list[Device]) -> list[Device]:
    """Of DEVICES the functions of the host slot that DEVICE is in, in order; none for what is no PCI function."""
    if not device.pci:
        return []
    slot = device.pci.place.slot
    found = {d.pci.place: d for d in devices if d.pci and d.pci.place.slot == slot}
    return [found[place] for place in sorted(found)]


def card_places(machine: Machine, asked: Device, to_store: list[Device], given_address: str) -> dict[str, str]:
    """The guest addresses in the stored half of those that stay one card there, by device name.

    GIVEN_ADDRESS: the one that the caller gave for the device ASKED for, or ''. Host and guest function numbers are
    the same. Without function 0 a guest sees no card, and where no slot is free libvirt adds one for each device by
    itself: then there is no address here.
    """
    ports, given = machine.config_ports, PciAddress.parse(given_address) if given_address else None
    free = {
        True: [PciAddress(0, bus, 0) for bus in ports.express],
        False: [PciAddress(0, bus, slot) for bus, slot in ports.conventional],
    }
    taken = {given.slot} if given else set()
    places: dict[str, str] = {}
    for first in to_store:
        card = functions_beside(first, to_store)
        if not first.pci or len(card) < 2 or first.pci.place.function != 0:
            continue
        if given and asked in card:
            slot = given if asked is first and given.function == 0 else None
        else:
            slot = next((slot for slot in free[first.pci.express] if slot not in taken), None)
        if slot:
            taken.add(slot)
            places |= {d.name: str(slot._replace(function=d.pci.place.function)) for d in card if d.pci}
    return places
