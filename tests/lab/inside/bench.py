"""Measures hostpassd beside its peers, inside the host; prints one JSON line.

Usage: bench.py objects | inventory | start | latency. Seconds throughout.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from dbus_next import Message

OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
HOSTPASSD = ("org.hostpassd1", "/org/hostpassd1")
UDISKS = ("org.freedesktop.UDisks2", "/org/freedesktop/UDisks2")
# A real device whose driver comes and goes quickly: the tablet behind the hub.
INTERFACE, DRIVER = "1-1.1:1.0", "/sys/bus/usb/drivers/usbhid"
DEVICE = b"/org/hostpassd1/devices/usb_1_1_1__1_0"


class Wire:
    """A bus connection that reads whole messages as bytes and decodes nothing."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect("/run/dbus/system_bus_socket")
        self.socket.sendall(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\nBEGIN\r\n")
        while not self.socket.recv(1024).endswith(b"\r\n"):
            pass
        self._serial = 0
        self.call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello")

    def send(self, destination: str, path: str, interface: str, member: str, signature: str = "", *body: Any) -> int:
        self._serial += 1
        message = Message(destination, path, interface, member, signature=signature, body=list(body))
        message.serial = self._serial
        self.socket.sendall(bytes(message._marshall(False)))
        return self._serial

    def read(self) -> bytes:
        """The next message, whole."""
        head = self._read(16)
        body, _, fields = struct.unpack("<III", head[4:16])
        return head + self._read(-(-fields // 8) * 8 + body)

    def call(self, *words: Any) -> bytes:
        """The reply to a call; the type of a message is its second byte."""
        self.send(*words)
        while (message := self.read())[1] not in (2, 3):
            pass
        return message

    def _read(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            parts += self.socket.recv(min(count - len(parts), 1 << 20))
        return bytes(parts)


def median(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def count(name: str, path: str) -> int:
    shown = subprocess.check_output(["busctl", "--json=short", "call", name, path, OBJECT_MANAGER, "GetManagedObjects"])
    return len(json.loads(shown)["data"][0])


def objects() -> dict[str, float]:
    """GetManagedObjects, per object, beside udisksd's."""
    subprocess.run(["systemctl", "start", "udisks2"], check=True)
    wire = Wire()
    told = {}
    for who, (name, path) in (("ours", HOSTPASSD), ("udisksd", UDISKS)):
        wire.call(name, path, OBJECT_MANAGER, "GetManagedObjects")
        told[f"{who}-objects"] = float(count(name, path))
        told[who] = median(lambda n=name, p=path: wire.call(n, p, OBJECT_MANAGER, "GetManagedObjects"), 10)  # type: ignore[misc]
    subprocess.run(["systemctl", "stop", "udisks2"], check=True)
    return told


def inventory() -> dict[str, float]:
    """All devices with all they have, beside virsh nodedev-list and nodedev-dumpxml of each in one virsh."""
    names = subprocess.check_output(["virsh", "nodedev-list"], text=True).split()
    commands = "nodedev-list\n" + "".join(f"nodedev-dumpxml {name}\n" for name in names)
    virsh = median(lambda: subprocess.run(["virsh"], input=commands.encode(), stdout=subprocess.DEVNULL, check=True), 3)
    wire = Wire()
    return {"ours": median(lambda: wire.call(*HOSTPASSD, OBJECT_MANAGER, "GetManagedObjects"), 10), "virsh": virsh}


def start() -> dict[str, float]:
    """Start to READY, beside libvirtd's restart to its first node list."""
    systemctl = ["systemctl", "restart"]
    ours = median(lambda: subprocess.run([*systemctl, "hostpassd"], check=True), 3)

    def libvirtd() -> None:
        subprocess.run([*systemctl, "libvirtd"], check=True)
        subprocess.run(["virsh", "nodedev-list"], stdout=subprocess.DEVNULL, check=True)

    return {"ours": ours, "libvirtd": median(libvirtd, 3)}


def latency() -> dict[str, float]:
    """One trigger, both listening: until udevadm monitor tells the uevent, and until our signal is there."""
    wire = Wire()
    rule = "type='signal',sender='org.hostpassd1',interface='org.freedesktop.DBus.Properties'"
    wire.call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "AddMatch", "s", rule)
    monitor = subprocess.Popen(["udevadm", "monitor", "--udev", "--subsystem-match=usb"], stdout=subprocess.PIPE)
    assert monitor.stdout
    while b"UDEV" not in monitor.stdout.readline():
        pass
    monitor.stdout.readline()
    os.set_blocking(monitor.stdout.fileno(), False)
    both = selectors.DefaultSelector()
    both.register(monitor.stdout, selectors.EVENT_READ, "udevadm")
    both.register(wire.socket, selectors.EVENT_READ, "ours")
    times: dict[str, list[float]] = {"udevadm": [], "ours": []}
    for number in range(40):
        word = ("unbind", "bind")[number % 2]
        began = time.perf_counter()
        with open(f"{DRIVER}/{word}", "w", encoding="ascii") as file:
            file.write(INTERFACE)
        missing = {"udevadm", "ours"}
        while missing:
            for key, _ in both.select(30):
                if _tells(key.data, monitor, wire, word) and key.data in missing:
                    missing.discard(key.data)
                    times[key.data].append(time.perf_counter() - began)
    monitor.terminate()
    monitor.wait()
    return {who: statistics.median(values) for who, values in times.items()}


def _tells(who: str, monitor: subprocess.Popen[bytes], wire: Wire, word: str) -> bool:
    if who == "ours":
        message = wire.read()
        return DEVICE in message and b"Driver" in message
    assert monitor.stdout
    said = monitor.stdout.read() or b""
    return any(f" {word} ".encode() in line and INTERFACE.encode() + b" " in line for line in said.splitlines())


if __name__ == "__main__":
    print(json.dumps({"objects": objects, "inventory": inventory, "start": start, "latency": latency}[sys.argv[1]]()))
