"""Addresses of PCI functions, of the host and of guests."""

from __future__ import annotations

import re
from typing import NamedTuple

_WRITTEN = re.compile(r"([0-9a-fA-F]{4,8}):([0-9a-fA-F]{2}):([01][0-9a-fA-F])\.([0-7])")


class PciAddress(NamedTuple):
    """One function: 0000:01:00.0. They are in order as numbers."""

    domain: int
    bus: int
    device: int  # libvirt's slot
    function: int = 0

    @classmethod
    def parse(cls, text: str) -> PciAddress:
        """The address that TEXT is. ValueError: it is none."""
        match = _WRITTEN.fullmatch(text)
        if match is None:
            raise ValueError(f"{text} is no PCI address.")
        return cls(*(int(part, 16) for part in match.groups()))

    @property
    def slot(self) -> PciAddress:
        """That of function 0 of the same slot: what functions of one card have in common."""
        return self._replace(function=0)

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function}"
