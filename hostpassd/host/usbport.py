"""Which ports share the physical socket of a USB device, from sysfs. Blocking, a few links a device."""

from __future__ import annotations

import contextlib
import os
import re

from hostpassd.model.naming import socket

_DEVICE = re.compile(r"[0-9]+-[0-9.]+")
_ROOT_PORT = re.compile(r"usb([0-9]+)-port([0-9]+)")
_HUB_PORT = re.compile(r"([0-9]+-[0-9.]+)-port([0-9]+)")

_SUPER_SPEED = 5000  # Mbit/s


def read_socket(path: str) -> str:
    """The Socket of the USB device whose folder in sysfs is PATH."""
    return socket(os.path.basename(path), read_peers(path))


def read_peers(path: str) -> dict[str, str]:
    """What `socket` wants to know of the device at PATH: the USB 2 peers of its port and of those of the hubs above."""
    found = {}
    while _DEVICE.fullmatch(name := os.path.basename(path)):
        hub = os.path.dirname(path)
        if _number(f"{hub}/speed", 10) >= _SUPER_SPEED:
            peer = _peer(path)
            if peer:
                found[name] = peer
            elif _number(f"{path}/port/location", 16):
                found[name] = name  # the kernel links a port whose place the firmware tells by that alone
        path = hub
    return found


def port_name(folder: str) -> str:
    """What the kernel calls a device in the port FOLDER: 1-2 in usb1-port2, 1-1.3 in 1-1-port3; '' if it is none."""
    if root := _ROOT_PORT.fullmatch(folder):
        return f"{root[1]}-{root[2]}"
    hub = _HUB_PORT.fullmatch(folder)
    return f"{hub[1]}.{hub[2]}" if hub else ""


def _peer(path: str) -> str:
    try:
        return port_name(os.path.basename(os.readlink(f"{path}/port/peer")))
    except OSError:
        return ""  # it has none, or the device has gone


def _number(path: str, base: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        with open(path, encoding="ascii") as file:
            return int(file.read(64), base)
    return 0
