"""What a USB device's descriptors show beyond the interfaces that are active now. For the Category."""

from __future__ import annotations

import re
from typing import Protocol

_INTERFACE = 0x04
_INTERFACE_LENGTH = 9

_HID_DEVICE = re.compile(r"[0-9A-F]{4}:[0-9A-F]{4}:[0-9A-F]{4}\.[0-9A-F]{4,}")
_USAGE_PAGE = 0x04  # the item's tag and type, without its size
_FIDO_PAGE = 0xF1D0
_LONG_ITEM = 0xFE


class Folder(Protocol):
    """A device's folder in sysfs."""

    def read(self, name: str) -> bytes: ...
    def text(self, name: str) -> str: ...
    def entries(self, name: str = "") -> list[str]: ...


def all_interfaces(descriptors: bytes) -> tuple[str, ...]:
    """Class, subclass and protocol of the interfaces in DESCRIPTORS, of all configurations and alternate settings."""
    found: dict[str, None] = {}
    while len(descriptors) >= 2 and descriptors[0] >= 2:
        length, kind = descriptors[:2]
        if kind == _INTERFACE and length >= _INTERFACE_LENGTH and len(descriptors) >= _INTERFACE_LENGTH:
            found[descriptors[5:8].hex(":")] = None
        descriptors = descriptors[length:]
    return tuple(found)


def marks(folder: Folder, interfaces: list[str], matched_by_sane: bool) -> tuple[str, ...]:
    """What else the USB device in FOLDER, with these folders of INTERFACES, shows: `fido`, `mtp`, `scanner`.

    fido: a report descriptor of its HID interfaces has FIDO's usage page. It can only be read under a driver.
    mtp: an interface is called MTP; the class of those is that of cameras, or none. scanner: SANE's list has its ids.
    """
    found = ["scanner"] if matched_by_sane else []
    for interface in interfaces:
        if folder.text(f"{interface}/interface") == "MTP":
            found.append("mtp")
        for entry in folder.entries(interface):
            if _HID_DEVICE.fullmatch(entry) and is_fido(folder.read(f"{interface}/{entry}/report_descriptor")):
                found.append("fido")
    return tuple(sorted(set(found)))


def is_fido(report_descriptor: bytes) -> bool:
    """Whether a HID report descriptor has FIDO's usage page."""
    at = 0
    while at < len(report_descriptor):
        prefix = report_descriptor[at]
        if prefix == _LONG_ITEM:
            at += 3 + (report_descriptor[at + 1] if at + 1 < len(report_descriptor) else 0)
            continue
        size = (0, 1, 2, 4)[prefix & 0x03]
        value = report_descriptor[at + 1 : at + 1 + size]
        if prefix & 0xFC == _USAGE_PAGE and int.from_bytes(value, "little") == _FIDO_PAGE:
            return True
        at += 1 + size
    return False
