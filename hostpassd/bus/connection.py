"""The connection to the message bus: dbus-next's, with a reader of our own, so that nothing that comes can end it.

Whoever can reach the bus chooses what comes in: header fields that are not known, bodies that are not what their
signature says, 32 MiB at once, as fast as it goes. Messages are told apart by their length alone, which the bus has
checked; of what is in them only the header is read, and the rest by whoever wants it (`read`).

This is the only importer of dbus-next's private parts, which it does not promise to keep:
- MessageBus: `_sock`, `_stream`, `_fd`, `_loop`, `_authenticate`, `_auth_readline` and `_finalize`, to be let in and to
  leave as the library does, and read and write in between as it does not;
- Marshaller and Unmarshaller, for values to bytes and back: the library itself only does whole messages;
- SignatureTree's `_get` and `_cache`: the types of a signature, and what it keeps of them for ever.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import itertools
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from dbus_next import BusType, MessageFlag, MessageType
from dbus_next._private.constants import BIG_ENDIAN, LITTLE_ENDIAN, PROTOCOL_VERSION
from dbus_next._private.marshaller import Marshaller
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.aio import MessageBus
from dbus_next.signature import SignatureTree

# What the D-Bus specification allows: bytes of a message, and of its array of header fields.
SPECIFIED_LIMIT = 128 * 1024 * 1024
SPECIFIED_HEADER_LIMIT = 64 * 1024 * 1024

# What a stock bus takes (dbus-daemon's max_message_size); it closes the connection of who sends more.
MESSAGE_LIMIT = 32 * 1024 * 1024

# Bytes of a header and of a body; nothing that is meant for us is longer.
READ_LIMIT = 64 * 1024

# What the specification allows of values within values.
DEPTH_LIMIT = 64

# Values and characters of signatures in one message: dbus-next makes an object of each, which takes a microsecond or a
# few.
VALUES_LIMIT = 1024

# Seconds of reading in one turn of the loop, and bytes after which the time is looked at: some hundred messages.
SHARE = 0.005
AT_ONCE = 32 * 1024

# Messages that are sent at once, at most.
PIECES = 64

# Bytes that wait to be sent and keep the socket busy for a while: more answers would only wait behind them.
ENOUGH = 256 * 1024

# Bytes that may wait to be sent before no more is read: answers to who asks and does not read would fill the memory.
UNSENT_LIMIT = 8 * 1024 * 1024

_FIXED = 16  # bytes before the header's fields

# The header's fields by code: what they are called here, and their type.
_STRING, _PATH, _UINT32, _SIGNATURE = b"soug"
_FIELDS = {
    1: ("path", _PATH),
    2: ("interface", _STRING),
    3: ("member", _STRING),
    4: ("error_name", _STRING),
    5: ("reply_serial", _UINT32),
    6: ("destination", _STRING),
    7: ("sender", _STRING),
    8: ("signature", _SIGNATURE),
}
_Number = Callable[[bytes, int], tuple[int]]
_NUMBER: dict[int, _Number] = {
    LITTLE_ENDIAN: struct.Struct("<I").unpack_from,
    BIG_ENDIAN: struct.Struct(">I").unpack_from,
}
_KINDS = {kind.value: kind for kind in MessageType}
_REQUIRED: dict[MessageType | None, tuple[str, ...]] = {
    MessageType.METHOD_CALL: ("path", "member"),
    MessageType.SIGNAL: ("path", "interface", "member"),
    MessageType.METHOD_RETURN: ("reply_serial",),
    MessageType.ERROR: ("reply_serial", "error_name"),
}


class OutOfStep(Exception):
    """What comes from the bus is no D-Bus: where the next message begins cannot be known."""


class Unreadable(Exception):
    """A message is not what it says it is."""


class TooMuch(Unreadable):
    """A message is longer, or has more in it, than is read."""


@dataclasses.dataclass(slots=True)
class Incoming:
    """A message as far as its header tells.

    `fault`: why there is no more to be had of it; the fields that could be read are there all the same.
    """

    kind: MessageType | None  # None: one that the specification does not know
    flags: int
    serial: int
    path: str = ""
    interface: str = ""
    member: str = ""
    error_name: str = ""
    reply_serial: int = 0
    destination: str = ""
    sender: str = ""
    signature: str = ""
    fault: Unreadable | None = None
    data: bytes = b""  # header and body
    body: int = 0  # where the body begins

    @property
    def wants_reply(self) -> bool:
        """Whether it is a call that is to be answered."""
        return self.kind is MessageType.METHOD_CALL and not self.flags & MessageFlag.NO_REPLY_EXPECTED.value


def types_of(signature: str) -> list[Any]:
    """The complete types of SIGNATURE, each with its `token` and its `children`."""
    types: list[Any] = SignatureTree._get(signature).types
    return types


def marshal(signature: str, body: list[Any]) -> bytes:
    """BODY, whose values are as dbus-next wants them, as bytes."""
    return bytes(Marshaller(signature, body).marshall())


def read(message: Incoming) -> list[Any]:
    """The values in the body of MESSAGE. Raises Unreadable, which says why."""
    if message.fault:
        raise type(message.fault)(*message.fault.args)  # one that was raised holds on to all that was there then
    try:
        with _forgetting():
            values = _Values(message.data, message.body)
            found = [values.read_argument(type_) for type_ in types_of(message.signature)]
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable("its body is not what its signature says") from error
    if values.offset != len(message.data):
        raise Unreadable("there is more in its body than its signature says")
    return found


@contextlib.contextmanager
def _forgetting() -> Iterator[None]:
    """dbus-next keeps every signature that it ever saw, and those of messages are their senders' choice: not here."""
    known = len(SignatureTree._cache)
    try:
        yield
    finally:
        while len(SignatureTree._cache) > known:
            SignatureTree._cache.popitem()


class _Values(Unmarshaller):  # type: ignore[misc]
    """dbus-next's reader of values, from offset AT of DATA and on no stream; it looks at what dbus-next does not."""

    def __init__(self, data: bytes, at: int) -> None:
        super().__init__(io.BytesIO())
        self.buf, self.offset, self.endian = data, at, data[0]
        self._left = VALUES_LIMIT
        self._depth = 0

    def read_argument(self, type_: Any) -> Any:
        self._spend(1)
        if self._depth == DEPTH_LIMIT:
            raise TooMuch(f"its values are more than {DEPTH_LIMIT} deep in each other")
        self._depth += 1
        value = super().read_argument(type_)
        self._depth -= 1
        return value

    def read_signature(self, _: Any = None) -> Any:
        signature = super().read_signature()
        self._spend(len(signature))
        return signature

    def read_string(self, _: Any = None) -> Any:
        text = super().read_string()
        if "\0" in text or self.buf[self.offset - 1] != 0:
            raise Unreadable("a string in it has a NUL, or has none at its end")
        return text

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise TooMuch(f"it has more than {VALUES_LIMIT} values")


class Inbox:
    """Cuts the stream of bytes from the bus into messages, whatever is in them.

    What is too long is left out as it comes, and never held: without its body a message still tells whose it is, with
    a header of that length (only an endless path makes one) not even that.
    """

    def __init__(self) -> None:
        self.data = b""
        self._at = 0
        self._skip = 0  # bytes to come that nobody wants

    def add(self, data: bytes) -> None:
        """DATA came."""
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self.data = self.data[self._at :] + data[skipped:]
        self._at = 0

    def next(self) -> Incoming | None:
        """The next message that is there as a whole. Raises OutOfStep."""
        left = len(self.data) - self._at
        if left < _FIXED:
            return None
        header, body = self._lengths()
        if header > READ_LIMIT:
            data = self._take(_FIXED)
            self._leave_out(header - _FIXED + body)
            return _message(data, _FIXED, TooMuch(f"its header has more than {READ_LIMIT} bytes"))
        if body > READ_LIMIT and left >= header:
            data = self._take(header)
            self._leave_out(body)
            return _message(data, header, TooMuch(f"it has more than {READ_LIMIT} bytes"))
        if left < header + body:
            return None
        return _message(self._take(header + body), header)

    def _lengths(self) -> tuple[int, int]:
        order, version = self.data[self._at], self.data[self._at + 3]
        if order not in _NUMBER or version != PROTOCOL_VERSION:
            raise OutOfStep(f"A message from the bus begins with {self.data[self._at : self._at + 4]!r}.")
        number = _NUMBER[order]
        (body,), (fields,) = number(self.data, self._at + 4), number(self.data, self._at + 12)
        header = _FIXED + fields + -fields % 8
        if fields > SPECIFIED_HEADER_LIMIT or header + body > SPECIFIED_LIMIT:
            raise OutOfStep(f"A message from the bus claims a header of {fields} bytes and a body of {body}.")
        return header, body

    def _take(self, count: int) -> bytes:
        self._at += count
        return self.data[self._at - count : self._at]

    def _leave_out(self, count: int) -> None:
        here = min(count, len(self.data) - self._at)
        self._at += here
        self._skip = count - here


def _message(data: bytes, body: int, fault: Unreadable | None = None) -> Incoming:
    """The message DATA, whose body begins at BODY; FAULT is what is wrong with it already."""
    number = _NUMBER[data[0]]
    message = Incoming(_KINDS.get(data[1]), data[2], number(data, 8)[0], fault=fault, data=data, body=body)
    try:
        _read_fields(message, _FIXED + number(data, 12)[0], number)
    except Exception:  # whatever it was: the messages after this one are not touched by it
        message.fault = fault or Unreadable("its header cannot be read")
    return message


def _read_fields(message: Incoming, end: int, number: _Number) -> None:
    """Fills MESSAGE from its header's fields, which go up to END; one that is of no use is its `fault`.

    This is what every message costs that comes, so it calls nothing for the common ones.
    """
    data, at = message.data, _FIXED
    while at < end:
        name, wanted = _FIELDS.get(data[at], ("", 0))
        type_ = data[at + 2] if data[at + 1] == 1 else 0
        value_at, at = at + 4, at + 1
        if type_ in (_STRING, _PATH):
            value_at += 4
            at = value_at + number(data, value_at - 4)[0] + 1
            value: Any = data[value_at : at - 1].decode()
        elif type_ == _SIGNATURE:
            at = value_at + data[value_at] + 2
            value = data[value_at + 1 : at - 1].decode()
        elif type_ == _UINT32:
            (value,) = number(data, value_at)
            at = value_at + 4
        else:
            at = _after_variant(data, at)
        at += -at % 8
        if name and type_ == wanted:
            setattr(message, name, value)
        elif name:
            message.fault = Unreadable(f"its header's {name} has a type of its own")
    if at != message.body:
        raise Unreadable("the last field ends elsewhere")
    for name in _REQUIRED.get(message.kind, ()):
        if not getattr(message, name):
            message.fault = message.fault or Unreadable(f"its header has no {name}")


def _after_variant(data: bytes, at: int) -> int:
    """Where the variant at AT in DATA ends, whatever is in it."""
    with _forgetting():
        values = _Values(data, at)
        values.read_variant()
    return int(values.offset)


class Connection(MessageBus):  # type: ignore[misc]
    """A connection to the bus at ADDRESS, without one to the system bus, which hands TAKE each message that comes.

    RELIEVED is told when it is `congested` no more.
    """

    def __init__(self, address: str | None, take: Callable[[Incoming], None], relieved: Callable[[], None]) -> None:
        super().__init__(bus_address=address, bus_type=BusType.SYSTEM)
        self._take = take
        self._relieved = relieved
        self._inbox = Inbox()
        self._outbox: collections.deque[bytes | memoryview] = collections.deque()
        self.unsent = 0  # bytes

    async def open(self) -> None:
        """Is let in by the bus, which then waits for a Hello. Raises OSError or dbus-next's AuthError."""
        await self._authenticate()
        self._loop.add_reader(self._fd, self._message_reader)

    @property
    def congested(self) -> bool:
        """Whether so much waits to be sent that answers had better not be made yet."""
        return self.unsent >= ENOUGH

    def queue(self, data: bytes) -> None:
        """Sends DATA, a finished message, after all that was queued before."""
        if not self._outbox:
            self._loop.add_writer(self._fd, self._write)
        self._outbox.append(data)
        self.unsent += len(data)

    def release(self) -> None:
        """Gives the descriptor of a lost connection back; dbus-next leaves that to the garbage collector."""
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._stream.close()
        self._sock.close()

    async def _auth_readline(self) -> str:
        # dbus-next reads on after the end of the stream, for ever and without giving way.
        line = b""
        while not line.endswith(b"\r\n"):
            piece = await self._loop.sock_recv(self._sock, 1)
            if not piece:
                raise ConnectionResetError("The bus closed the connection before it let us in.")
            line += piece
        return line[:-2].decode()

    def _message_reader(self) -> None:
        """Reads for one turn's share of time; the loop comes back as long as there is more."""
        end = time.monotonic() + SHARE
        try:
            while self.unsent < UNSENT_LIMIT:
                data = self._sock.recv(AT_ONCE)
                if not data:
                    raise EOFError("The bus closed the connection.")
                self._inbox.add(data)
                while (message := self._inbox.next()) is not None:
                    self._take(message)
                if time.monotonic() >= end:
                    return
            self._loop.remove_reader(self._fd)
        except BlockingIOError:
            return
        except Exception as error:
            self._finalize(error)

    def _write(self) -> None:
        """Sends what the socket takes. (dbus-next, its #153, drops the connection when a socket is full.)"""
        before = self.unsent
        try:
            sent = self._sock.sendmsg(list(itertools.islice(self._outbox, PIECES)))
        except BlockingIOError:
            return
        except OSError as error:
            self._finalize(error)
            return
        self.unsent -= sent
        while sent >= len(self._outbox[0]):
            sent -= len(self._outbox.popleft())
            if not self._outbox:
                self._loop.remove_writer(self._fd)
                break
        else:
            self._outbox[0] = memoryview(self._outbox[0])[sent:]
        if before >= UNSENT_LIMIT > self.unsent:
            self._loop.add_reader(self._fd, self._message_reader)
        if before >= ENOUGH > self.unsent:
            self._relieved()
