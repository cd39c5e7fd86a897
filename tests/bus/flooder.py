"""A stranger who floods the daemon, as a program:

    python3 tests/bus/flooder.py ADDRESS UID KIND SECONDS CONNECTIONS

It sends as fast as the bus takes it, on so many connections, and throws away what comes back. KIND is one of `KINDS`.
At the end it prints how many messages it sent, and how often the bus hung up on it.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator

NAME, ROOT, MANAGER_PATH = "org.hostpassd1", "/org/hostpassd1", "/org/hostpassd1/manager"
MANAGER = "org.hostpassd1.Manager"
OBJECT_MANAGER, PEER = "org.freedesktop.DBus.ObjectManager", "org.freedesktop.DBus.Peer"
INTROSPECTABLE, PROPERTIES = "org.freedesktop.DBus.Introspectable", "org.freedesktop.DBus.Properties"
CALL, SIGNAL = 1, 4
NO_REPLY = 1

SERIAL_AT = 8  # where a message has its serial
AT_ONCE = 1 << 16  # bytes that are made at a time of messages that are shorter


def strings(*values: str) -> bytes:
    """A body of strings."""
    body = b""
    for value in values:
        raw = value.encode()
        body += bytes(-len(body) % 4) + struct.pack("<I", len(raw)) + raw + b"\0"
    return body


def message(
    interface: str,
    member: str,
    signature: str = "",
    body: bytes = b"",
    *,
    path: str = ROOT,
    kind: int = CALL,
    flags: int = 0,
    destination: str = NAME,
) -> bytes:
    """A message, with a serial of 1."""
    fields = b""
    for code, type_, value in ((1, "o", path), (2, "s", interface), (3, "s", member), (6, "s", destination)):
        raw = value.encode()
        fields += bytes(-len(fields) % 8)
        fields += struct.pack("<BBcxI", code, 1, type_.encode(), len(raw)) + raw + b"\0"
    if signature:
        fields += (
            bytes(-len(fields) % 8) + struct.pack("<BBcxB", 8, 1, b"g", len(signature)) + signature.encode() + b"\0"
        )
    head = struct.pack("<cBBBIII", b"l", kind, flags, 1, len(body), 1, len(fields))
    return head + fields + bytes(-len(fields) % 8) + body


# --- kinds of floods ---


def signals() -> Iterator[bytes]:
    """Signals to the daemon alone, each with a signature that was never seen: 120 empty arrays."""
    for chosen in itertools.product("ybnqiuso", repeat=120):
        signature = "".join("a" + letter for letter in reversed(chosen))
        yield message("org.example.Any", "Any", signature, bytes(4 * 120), kind=SIGNAL)


def silent() -> Iterator[bytes]:
    """Calls that want no reply, and whose replies would be long."""
    return itertools.cycle(
        [
            message(OBJECT_MANAGER, "GetManagedObjects", flags=NO_REPLY),
            message(PEER, "Ping", flags=NO_REPLY),
            message(INTROSPECTABLE, "Introspect", flags=NO_REPLY, path=ROOT + "/devices"),
            message(PROPERTIES, "GetAll", "s", strings(MANAGER), flags=NO_REPLY, path=MANAGER_PATH),
        ]
    )


def long() -> Iterator[bytes]:
    """The longest messages, up to what the bus takes, by their bodies and by their headers."""
    bodies = [strings("", "x" * size) for size in (1 << 16, 1 << 20, 8 << 20, 31 << 20)]
    messages = [message(PROPERTIES, "Get", "ss", body) for body in bodies]
    return itertools.cycle([*messages, message(PEER, "Ping", path="/" + "a" * (8 << 20))])


def refused() -> Iterator[bytes]:
    """Operations and calls that are refused, one with as many values in it as go in."""
    nothing = bytes(8)
    named = strings("machine") + struct.pack("<I", 16) + strings("no such one")
    entry = strings("") + b"\1y\0" + bytes(8)  # an empty key, a variant of a byte, and on to the next entry
    many = struct.pack("<I", 3800 * len(entry) - 7) + bytes(4) + (3800 * entry)[:-7]
    return itertools.cycle(
        [
            message(MANAGER, "Assign", "sasa{sv}", named + nothing),
            message(MANAGER, "Assign", "sasa{sv}", named + many),
            message(MANAGER, "NoSuchMethod"),
            message(PROPERTIES, "Get", "ss", strings(MANAGER, "NoSuchProperty")),
            message(PEER, "Ping", "s", strings("x")),
        ]
    )


def reads() -> Iterator[bytes]:
    """Reading calls, whose answers are long and are not waited for."""
    named = strings("demo") + bytes(3) + struct.pack("<I", 10) + strings("1-1.2") + bytes(2)
    return itertools.cycle(
        [
            message(OBJECT_MANAGER, "GetManagedObjects"),
            message(INTROSPECTABLE, "Introspect", path=ROOT + "/devices"),
            message(MANAGER, "FindDevices", "s", strings("x" * 500)),
            message(MANAGER, "PlanAssign", "sasa{sv}", named + bytes(4)),
        ]
    )


KINDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "signals": signals,
    "silent": silent,
    "long": long,
    "refused": refused,
    "reads": reads,
}


# --- sending them ---


@dataclasses.dataclass
class Line:
    """One connection and what goes out on it."""

    socket: socket.socket
    messages: Iterator[bytes]
    out: memoryview = dataclasses.field(default_factory=lambda: memoryview(b""))
    serial: int = 1
    made: int = 0

    def fill(self) -> None:
        """Makes what is to go out next."""
        made = bytearray()
        while len(made) < AT_ONCE:
            self.serial += 1
            at = len(made)
            made += next(self.messages)
            struct.pack_into("<I", made, at + SERIAL_AT, self.serial)
            self.made += 1
        self.out = memoryview(made)


def connect(path: str) -> socket.socket:
    """A connection that the bus has let in."""
    line = socket.socket(socket.AF_UNIX)
    line.connect(path)
    line.sendall(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n")
    assert line.recv(1 << 10).startswith(b"OK")
    line.sendall(b"BEGIN\r\n")
    driver = "org.freedesktop.DBus"
    line.sendall(message(driver, "Hello", path="/org/freedesktop/DBus", destination=driver))
    line.recv(1 << 16)
    line.setblocking(False)
    return line


def flood(path: str, kind: str, seconds: float, connections: int) -> tuple[int, int]:
    """Floods; how many messages were made, and how often the bus hung up on it."""
    end, made, lost = time.monotonic() + seconds, 0, 0
    chosen = selectors.DefaultSelector()
    both = selectors.EVENT_READ | selectors.EVENT_WRITE
    for _ in range(connections):
        line = Line(connect(path), KINDS[kind]())
        chosen.register(line.socket, both, line)
    while time.monotonic() < end:
        for key, events in chosen.select(0.1):
            line = key.data
            if not _serve(line, events):  # a bus hangs up on who floods it
                chosen.unregister(line.socket)
                line.socket.close()
                made, lost = made + line.made, lost + 1
                fresh = Line(connect(path), line.messages)
                chosen.register(fresh.socket, both, fresh)
    return made + sum(int(key.data.made) for key in chosen.get_map().values()), lost


def _serve(line: Line, events: int) -> bool:
    """Reads and writes what can be; false: the bus hung up."""
    try:
        if events & selectors.EVENT_READ and not line.socket.recv(1 << 20):
            return False
        if events & selectors.EVENT_WRITE:
            if not line.out:
                line.fill()
            line.out = line.out[line.socket.send(line.out) :]
    except BlockingIOError:
        pass
    except OSError:
        return False
    return True


def main(address: str, uid: str, kind: str, seconds: str, connections: str) -> None:
    """The program."""
    os.setgroups([])
    os.setgid(int(uid))
    os.setuid(int(uid))
    print(*flood(address.removeprefix("unix:path=").split(",")[0], kind, float(seconds), int(connections)))


if __name__ == "__main__":
    main(*sys.argv[1:])
