"""The order of the tree, in which devices are listed everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol

from hostpassd.model.device import Device
from hostpassd.model.naming import kernel_name

_PCI = re.compile(r"([0-9a-f]{4,}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")
_NUMBERS = re.compile(r"([0-9]+)")

Natural = tuple[tuple[int, str], ...]  # numbers as (7, ""), what is between them as (-1, "text")
Way = tuple[tuple[Natural, str], ...]  # from the root
Key = tuple[bool, Way]


class Forest(Protocol):
    """Where devices are looked up by their names."""

    def device(self, name: str) -> Device | None: ...


def tree_key(forest: Forest, name: str) -> Key:
    """What devices are sorted by: parents before children, siblings by kernel name, with numbers as numbers.

    What is no longer in the tree stands after what is.
    """
    return _key(forest, name, {})


def in_tree_order(forest: Forest, names: Iterable[str]) -> list[str]:
    """NAMES, sorted by `tree_key`."""
    ways: dict[str, Way] = {}
    return sorted(names, key=lambda name: _key(forest, name, ways))


def _key(forest: Forest, name: str, ways: dict[str, Way]) -> Key:
    device = forest.device(name)
    return (True, ((natural(name), name),)) if device is None else (False, _way(forest, device, ways))


def _way(forest: Forest, device: Device, ways: dict[str, Way]) -> Way:
    """The way from the root to DEVICE. WAYS: those that are known already, by name; what is found out is added."""
    way = ways.get(device.name)
    if way is None:
        parent = forest.device(device.parent) if device.parent else None
        above = _way(forest, parent, ways) if parent else ()
        way = ways[device.name] = (*above, (natural(kernel_name(device)), device.name))
    return way


def natural(text: str) -> Natural:
    """What kernel names are sorted by: 1-2 comes before 1-10. The numbers of a PCI address are hexadecimal."""
    address = _PCI.fullmatch(text)
    if address:
        return tuple((int(number, 16), "") for number in address.groups())
    parts = _NUMBERS.split(text)
    return tuple((int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts))
