"""Makes the bus calls that come as JSON lines on standard input and answers each with a JSON line.

It is one client of the system bus with one unique name, running as whoever started it; it ends with its input.
In: {"id", "destination", "path", "interface", "member", "signature", "body", "interactive"}, variants in the body as
[signature, value]. Out: {"id", "body", "signature"} or {"id", "error", "message"}; first of all {"name": unique name}.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from dbus_next import BusType, Message, MessageFlag, MessageType, Variant
from dbus_next.aio import MessageBus
from dbus_next.signature import SignatureTree, SignatureType


def packed(kind: SignatureType, value: Any) -> Any:
    """A value from JSON as the library wants it for that type."""
    if kind.token == "v":
        signature, inner = value
        return Variant(signature, packed(SignatureTree(signature).types[0], inner))
    if kind.token == "a" and kind.children[0].token == "{":
        key_kind, value_kind = kind.children[0].children
        return {key(key_kind, k): packed(value_kind, v) for k, v in value.items()}
    if kind.token == "a" and kind.children[0].token == "y":
        return bytes(value)
    if kind.token == "a":
        return [packed(kind.children[0], item) for item in value]
    if kind.token == "(":
        return [packed(child, item) for child, item in zip(kind.children, value, strict=True)]
    return value


def key(kind: SignatureType, text: str) -> Any:
    """JSON's keys are all text; the bus's need not be."""
    return text if kind.token in "sog" else int(text)


def plain(value: Any) -> Any:
    """A value of the library as JSON can tell it, variants replaced by what is in them."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, bytes):
        return list(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


async def call(bus: MessageBus, request: dict[str, Any]) -> None:
    try:
        types = SignatureTree(request["signature"]).types
        body = [packed(kind, value) for kind, value in zip(types, request["body"], strict=True)]
        flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if request["interactive"] else MessageFlag.NONE
        reply = await bus.call(
            Message(
                destination=request["destination"],
                path=request["path"],
                interface=request["interface"] or None,
                member=request["member"],
                signature=request["signature"],
                body=body,
                flags=flags,
            )
        )
    except Exception as error:  # the caller outside is told, whatever it was
        say({"id": request["id"], "error": "lab.CallFailed", "message": f"{type(error).__name__}: {error}"})
        return
    assert reply is not None
    if reply.message_type is MessageType.ERROR:
        message = str(reply.body[0]) if reply.body else ""
        say({"id": request["id"], "error": reply.error_name, "message": message})
    else:
        say({"id": request["id"], "body": plain(reply.body), "signature": reply.signature})


async def main() -> None:
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    say({"name": bus.unique_name})
    reader = asyncio.StreamReader(limit=1 << 26)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    running: set[asyncio.Task[None]] = set()
    while line := await reader.readline():
        task = loop.create_task(call(bus, json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)


if __name__ == "__main__":
    asyncio.run(main())
