"""Records every signal that a service sends on the system bus, one JSON line each, until its input ends.

Usage: record_bus.py BUS-NAME. Each line: time (Unix, at arrival), monotonic (of the same host), path, interface,
member, signature, body (variants unwrapped) and tagged (variants as {"signature", "value"}). A first
line {"ready": true} is said when nothing can be missed any more. The service may come, go and come back.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from dbus_next import BusType, Message, MessageType, Variant
from dbus_next.aio import MessageBus

BUS = "org.freedesktop.DBus"
BUS_PATH = "/org/freedesktop/DBus"


def plain(value: Any, tag: bool) -> Any:
    """A value of the library as JSON can tell it, variants unwrapped or tagged with their signature."""
    if isinstance(value, Variant):
        inner = plain(value.value, tag)
        return {"signature": value.signature, "value": inner} if tag else inner
    if isinstance(value, dict):
        return {str(k): plain(v, tag) for k, v in value.items()}
    if isinstance(value, bytes):
        return list(value)
    if isinstance(value, list | tuple):
        return [plain(item, tag) for item in value]
    return value


def say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


class Recorder:
    """Follows who owns the name and says what they signal."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.owner = ""

    def hear(self, message: Message) -> None:
        if message.message_type is not MessageType.SIGNAL:
            return
        if message.sender == BUS and message.member == "NameOwnerChanged" and message.body[0] == self.name:
            self.owner = message.body[2]
        elif message.sender == self.owner:
            say(
                {
                    "time": time.time(),
                    "monotonic": time.monotonic(),
                    "path": message.path,
                    "interface": message.interface,
                    "member": message.member,
                    "signature": message.signature,
                    "body": plain(message.body, False),
                    "tagged": plain(message.body, True),
                }
            )


async def ask(bus: MessageBus, member: str, argument: str) -> Message | None:
    """Calls the bus itself with one text."""
    question = Message(destination=BUS, path=BUS_PATH, interface=BUS, member=member, signature="s", body=[argument])
    answer: Message | None = await bus.call(question)
    return answer


async def main(name: str) -> None:
    recorder = Recorder(name)
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    bus.add_message_handler(recorder.hear)
    await ask(bus, "AddMatch", f"type='signal',sender='{name}'")
    await ask(bus, "AddMatch", f"type='signal',sender='{BUS}',member='NameOwnerChanged',arg0='{name}'")
    owner = await ask(bus, "GetNameOwner", name)
    if owner is not None and owner.message_type is MessageType.METHOD_RETURN:
        recorder.owner = owner.body[0]
    say({"ready": True})
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
