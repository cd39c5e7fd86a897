"""The devices and how they lie: below each other, in IOMMU groups, as functions of each other, on seats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hostpassd.model.device import ASSIGNABLE_KINDS, Device, Key
from hostpassd.model.naming import location
from hostpassd.state.changes import Batches
from hostpassd.state.multimap import Multimap


class Tree:
    """All devices by name.

    Of each device, and of none else, there are: its path in `_by_path`; the pair of its parent's name and its own in
    `_children`, whether the parent is here or not (a child can come first); the pair of its kind with it in `kinds`; if
    it is a PCI function the pairs of its IOMMU group and of its physical function with it in `groups` and `functions`;
    if it is a keyboard, of its seat with it in `_keyboards`. `only_keyboards` has a device exactly when all keyboards
    of its seat are at or below it, as of the last `find_only_keyboards`.
    """

    def __init__(self, batches: Batches) -> None:
        self.devices: dict[str, Device] = {}
        self.groups: Multimap[int, str] = Multimap()
        self.functions: Multimap[str, str] = Multimap()
        self.kinds: Multimap[str, str] = Multimap()
        self.only_keyboards: dict[str, str] = {}
        self._batches = batches
        self.by_path: dict[str, str] = {}
        self.by_location: dict[str, str] = {}
        self.by_parent: Multimap[str, str] = Multimap()
        self.said: Multimap[Key, str] = Multimap()
        self.keyboards: Multimap[str, str] = Multimap()

    # --- reading ---

    def at(self, sysfs_path: str) -> Device | None:
        """The device at SYSFS_PATH."""
        return self.devices.get(self.by_path.get(sysfs_path, ""))

    def children(self, name: str) -> list[str]:
        """The names of the devices directly below, sorted."""
        return sorted(self.by_parent[name])

    def ancestors(self, name: str) -> Iterator[Device]:
        """The devices above, nearest first."""
        device = self.devices.get(name)
        while device and device.parent and (device := self.devices.get(device.parent)):
            yield device

    def descendants(self, name: str) -> Iterator[str]:
        """The names of all devices below, parents first."""
        for child in self.by_parent[name]:
            yield child
            yield from self.descendants(child)

    def target(self, name: str) -> str | None:
        """The device that NAME stands for in an operation: the nearest of a kind that can be assigned.

        What hangs below a USB device is its function, a logical unit too.
        """
        found: str | None = None
        here = self.devices.get(name)
        for node in (here, *self.ancestors(name)) if here else ():
            if node.kind == "usb":
                return found if found and self.devices[found].kind not in ("scsi",) else node.name
            if node.kind in ASSIGNABLE_KINDS and found is None:
                found = node.name
        return found

    # --- writing ---

    def link(self, device: Device) -> None:
        """Enters DEVICE, with what is below it already."""
        self.devices[device.name] = device
        self.by_path[device.sysfs_path] = device.name
        self.by_location[location(device)] = device.name
        self.said.put(device.name, device.said())
        self._index(device, device)
        for name in self.descendants(device.name):
            self.touch(name)

    def replace(self, device: Device) -> None:
        """DEVICE has other values, and lies as before."""
        self._leave_location(self.devices[device.name])
        self.devices[device.name] = device
        self.by_location[location(device)] = device.name
        self.said.put(device.name, device.said())

    def unlink(self, device: Device) -> None:
        """Takes DEVICE out of how things lie; it stays among the devices until `drop` or the next `link`."""
        self.by_path.pop(device.sysfs_path, None)
        self._leave_location(device)
        self.said.put(device.name, ())
        self._index(device, None)

    def drop(self, name: str) -> None:
        """NAME, unlinked, is a device no more."""
        del self.devices[name]

    def _leave_location(self, device: Device) -> None:
        if self.by_location.get(location(device)) == device.name:
            del self.by_location[location(device)]

    def _index(self, device: Device, linked: Device | None) -> None:
        """Has the multimaps tell how LINKED lies; None: that DEVICE does not any more."""
        name, pci = device.name, linked.pci if linked else None
        self.by_parent.put(name, [linked.parent] if linked and linked.parent else [])
        self.groups.put(name, [pci.iommu_group] if pci and pci.iommu_group >= 0 else [])
        self.functions.put(name, [pci.physical_function] if pci and pci.physical_function else [])
        self.kinds.put(name, [linked.kind] if linked else [])
        self.keyboards.put(name, [linked.keyboard_of] if linked and linked.keyboard_of else [])
        self.touch(device.parent)
        for other in _functions_of(device, self.functions[name]):
            self.touch(other)

    def touch(self, name: str | None) -> None:
        """Marks a device, and those of its IOMMU group (whose companion it may be), as changed."""
        device = self.devices.get(name or "")
        if not device:
            return
        self._batches.current.change(("device", device.name))
        if device.pci:
            for mate in self.groups[device.pci.iommu_group]:
                self._batches.current.change(("device", mate))

    def find_only_keyboards(self) -> None:
        """What all keyboards of a seat are below, as each: a handful of names, whatever the size of the tree."""
        found: dict[str, str] = {}
        for seat, keyboards in self.keyboards.groups():
            lines = [{name, *(above.name for above in self.ancestors(name))} for name in keyboards]
            found.update(dict.fromkeys(set.intersection(*lines), seat))
        if found == self.only_keyboards:
            return
        changed = found.items() ^ self.only_keyboards.items()
        self.only_keyboards = found
        keyboards = {name for _, names in self.keyboards.groups() for name in names}
        for name in {name for name, _ in changed} | keyboards:
            self.touch(name)


def _functions_of(device: Device, virtual: Iterable[str]) -> Iterable[str]:
    """The physical function of DEVICE and its VIRTUAL ones: they show each other as long as both are here."""
    physical = device.pci.physical_function if device.pci else None
    return (*([physical] if physical else []), *virtual)
