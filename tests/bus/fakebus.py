"""A bus that is played by the test: whatever bytes it likes come from it, and from whomever it likes."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from dbus_next import MessageType, Variant
from dbus_next._private.marshaller import Marshaller

from hostpassd.bus.connection import Inbox, Incoming
from tests.bus.busd import DRIVER, PATIENCE

CALL, RETURN, ERROR, SIGNAL = (kind.value for kind in MessageType)
PATH, INTERFACE, MEMBER, ERROR_NAME, REPLY_SERIAL, DESTINATION, SENDER, SIGNATURE = range(1, 9)
TYPES = {PATH: "o", REPLY_SERIAL: "u", SIGNATURE: "g"}

STRANGER = ":1.66"


def message(
    kind: int,
    fields: dict[int, Any],
    signature: str = "",
    body: Sequence[Any] | bytes = (),
    *,
    serial: int = 1,
    flags: int = 0,
    sender: str = STRANGER,
) -> bytes:
    """A message with FIELDS by code (Variants, where the type is not the usual one), and SENDER last, as a bus does."""
    data = body if isinstance(body, bytes) else bytes(Marshaller(signature, list(body)).marshall())
    usual = {**fields, **({SIGNATURE: signature} if signature else {}), **({SENDER: sender} if sender else {})}
    array = [
        [code, value if isinstance(value, Variant) else Variant(TYPES.get(code, "s"), value)]
        for code, value in usual.items()
    ]
    header = Marshaller("yyyyuua(yv)", [ord("l"), kind, flags, 1, len(data), serial, array])
    header.marshall()
    header.align(8)
    return bytes(header.buffer) + data


def framed(fields: bytes, body: bytes = b"", *, kind: int = CALL, serial: int = 1, order: str = "<") -> bytes:
    """A message with a header of whatever FIELDS and a BODY of whatever, whose lengths are right."""
    first = b"l" if order == "<" else b"B"
    head = struct.pack(order + "cBBBIII", first, kind, 0, 1, len(body), serial, len(fields))
    return head + fields + bytes(-len(fields) % 8) + body


def ping(serial: int, sender: str = STRANGER) -> bytes:
    """A call that every connection answers."""
    fields = {PATH: "/", INTERFACE: "org.freedesktop.DBus.Peer", MEMBER: "Ping"}
    return message(CALL, fields, serial=serial, sender=sender)


def cut(data: bytes) -> list[Incoming]:
    """The messages that DATA is."""
    inbox = Inbox()
    inbox.add(data)
    return list(iter(inbox.next, None))


class FakeBus:
    """Lets one connection in, greets it and answers GetId; all else that it sends is for `take`."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "fake-bus"
        self.address = f"unix:path={self._socket}"
        self._came: asyncio.Queue[Incoming] = asyncio.Queue()
        self._greeted = asyncio.Event()
        self.reads = asyncio.Event()  # what the other side sends; else that stays in the socket
        self.reads.set()
        self._serial = 0

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeBus]:
        """Inside, it can be connected to."""
        server = await asyncio.start_unix_server(self._serve, self._socket)
        try:
            yield self
        finally:
            server.close()

    async def send(self, data: bytes) -> None:
        """DATA comes from the bus."""
        await self._greeted.wait()
        self._writer.write(data)
        await self._writer.drain()

    async def take(self) -> Incoming:
        """The next message from the other side."""
        return await asyncio.wait_for(self._came.get(), PATIENCE)

    async def answer(self, call: Incoming, signature: str, body: Sequence[Any], sender: str = DRIVER[0]) -> None:
        """Answers CALL in the name of SENDER."""
        self._serial += 1
        fields = {REPLY_SERIAL: call.serial}
        await self.send(message(RETURN, fields, signature, body, serial=self._serial, sender=sender))

    async def in_step(self) -> None:
        """Returns when all that was sent has been dealt with: a ping after it is answered, whatever comes before."""
        self._serial += 1
        serial = 1_000_000 + self._serial
        await self.send(ping(serial))
        while (await self.take()).reply_serial != serial:
            pass

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        await reader.readuntil(b"\r\n")
        writer.write(b"OK 0123456789abcdef0123456789abcdef\r\n")
        await reader.readuntil(b"BEGIN\r\n")
        inbox = Inbox()
        while data := await reader.read(1 << 16):
            await self.reads.wait()
            inbox.add(data)
            for incoming in iter(inbox.next, None):
                await self._take(incoming)
        writer.close()

    async def _take(self, incoming: Incoming) -> None:
        match incoming.member:
            case "Hello":
                self._greeted.set()
                await self.answer(incoming, "s", [":1.0"])
            case "GetId":
                await self.answer(incoming, "s", ["id"])
            case _:
                self._came.put_nowait(incoming)
