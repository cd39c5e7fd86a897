"""The daemon's face on D-Bus: dispatch, properties, introspection, object manager, all driven by dbus/*.xml.

The only importer of dbus_next, of which it takes transport, message types and marshalling. What the wire needs and
Python does not say (variants of properties, 8-byte alignment) is made here from the signatures of the specification.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import re
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dbus_next import BusType, Message, MessageFlag, MessageType, Variant
from dbus_next._private.constants import LITTLE_ENDIAN
from dbus_next._private.marshaller import Marshaller
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.aio import MessageBus
from dbus_next.signature import SignatureTree

from hostpassd import errors, names
from hostpassd.bus import spec
from hostpassd.bus.spec import InterfaceSpec, MethodSpec, Specification

__all__ = [
    "Batch",
    "BusCallError",
    "Call",
    "Handler",
    "Interfaces",
    "NameTaken",
    "Router",
    "Signal",
    "Variant",
]

BUS_DRIVER = "org.freedesktop.DBus"
BUS_DRIVER_PATH = "/org/freedesktop/DBus"

# Calls that handlers are at work on; of those that wait for something also by user, who can have many connections.
CALLS_PER_SENDER = 32
CALLS_PER_USER = 128
CALLS = 512

# Unique names are never given twice, so the user of one needs asking for only once.
SENDERS_KEPT = 1024

# What a stock bus takes (dbus-daemon's max_message_size); it closes the connection of who sends more.
MESSAGE_LIMIT = 32 * 1024 * 1024
BODY_LIMIT = MESSAGE_LIMIT - 1024  # a reply's header has two names and a signature of 255 bytes at most

# Bytes; no call of ours is longer. dbus-next makes Python objects of all that a message holds, many times its size.
CALL_LIMIT = 64 * 1024

# Bytes that may wait to be sent before more is read: answers to who asks and does not read would fill the memory.
UNSENT_LIMIT = 8 * 1024 * 1024

# Characters of an error's message, which can hold the caller's own words. A Blocked names every blocker.
TEXT_LIMIT = 4 * 1024
BLOCKED_LIMIT = 64 * 1024

# dbus-next keeps every signature it ever saw; strangers choose those of their calls.
SIGNATURES_KEPT = 1024

DISCONNECTED = names.STANDARD_ERROR_PREFIX + "Disconnected"
NAME_HAS_NO_OWNER = names.STANDARD_ERROR_PREFIX + "NameHasNoOwner"

FAULT = "hostpassd failed at this through a fault of its own: 'journalctl -u hostpassd' has the details."

DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)

Interfaces = dict[str, dict[str, Any] | None]
"""An object's interfaces, each with the values of its properties: plain Python of the property's signature.

None is an interface that the object has not. In a change, what is left out stays as it is.
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A method call whose arguments have the types that the specification asks for."""

    sender: str
    path: str
    interface: str
    member: str
    args: list[Any]
    interactive: bool  # the caller allows a prompt


Handler = Callable[[Call], Awaitable[Sequence[Any]]]
"""Answers a call with its out arguments, or raises HostpassError."""


@dataclasses.dataclass(frozen=True, slots=True)
class Signal:
    """A signal of an object that is there, with its plain arguments."""

    path: str
    interface: str
    member: str
    args: Sequence[Any] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Changes that belong together, told in the order of these fields."""

    added: Mapping[str, Interfaces] = dataclasses.field(default_factory=dict)  # paths that are not there, every value
    changed: Mapping[str, Interfaces] = dataclasses.field(default_factory=dict)  # what differs is told, unless const
    signals: Sequence[Signal] = ()
    removed: Sequence[str] = ()  # one that is not there is left out
    last: Mapping[str, Interfaces] = dataclasses.field(default_factory=dict)


class BusCallError(Exception):
    """A call of ours was answered with the error NAME, or (Disconnected) cannot be answered any more."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message


class NameTaken(Exception):
    """The bus does not give us the name we asked for."""


# --- the wire ---

_PATH = re.compile(r"/|(/[A-Za-z0-9_]+)+")
_UNSENDABLE = re.compile("[\0\ud800-\udfff]")
_PADDING = [bytes(n) for n in (0, 7, 6, 5, 4, 3, 2, 1)]  # by length modulo 8


class _Wire:
    """Plain values to bytes, with dbus-next's marshaller, by the signatures of the specification."""

    def __init__(self, specification: Specification, log: logging.Logger) -> None:
        self._spec = specification
        self._log = log
        self._warned = False

    def marshal(self, signature: str, body: Iterable[Any]) -> bytes:
        """BODY, one value per type of SIGNATURE, as bytes. Raises ValueError where a value has not its type."""
        return _marshal(
            signature, [self.fit(type_, value) for type_, value in zip(_types(signature), body, strict=True)]
        )

    def complete(self, interface: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """VALUES of all properties of INTERFACE, fit to be marshalled. Raises as fit, KeyError if one is missing."""
        unknown = set(values) - set(self._spec.interfaces[interface].properties)
        if unknown:
            raise KeyError(f"{interface} has no property {sorted(unknown)}")
        return {
            key: self.fit_property(interface, key, values[key]) for key in self._spec.interfaces[interface].properties
        }

    def fit_property(self, interface: str, key: str, value: Any) -> Any:
        """VALUE of the property KEY, fit to be marshalled. Raises as fit, KeyError if there is no such property."""
        signature = self._spec.interfaces[interface].properties[key].signature
        try:
            return self.fit(_types(signature)[0], value)
        except Exception as error:
            error.add_note(f"{interface}.{key} {signature}: {value!a}")
            raise

    def variant(self, interface: str, key: str, value: Any) -> Any:
        """VALUE of the property KEY, fit already, as a variant. Raises ValueError if it has not its type."""
        signature = self._spec.interfaces[interface].properties[key].signature
        try:
            return Variant(signature, value)
        except ValueError as error:
            error.add_note(f"{interface}.{key} {signature}: {value!a}")
            raise

    def variants(self, interface: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """VALUES, fit already, as a{sv}. Raises as variant."""
        return {key: self.variant(interface, key, value) for key, value in values.items()}

    def entry(self, path: str, interfaces: Mapping[str, Mapping[str, Any]]) -> bytes:
        """An object's entry of a{oa{sa{sv}}}, which is at once the body of its InterfacesAdded."""
        dressed = {name: self.variants(name, values) for name, values in interfaces.items()}
        return _marshal("oa{sa{sv}}", [_path(path), dressed])

    def fit(self, type_: Any, value: Any) -> Any:
        """VALUE as dbus-next wants it for TYPE_, and such that the bus does not hang up on us for it."""
        match type_.token:
            case "s":
                return self._sendable(value)
            case "o":
                return _path(value)
            case "a":
                return self._fit_array(type_.children[0], value)
            case "(":
                return [self.fit(child, item) for child, item in zip(type_.children, value, strict=True)]
            case "v":
                return Variant(value.type, self.fit(value.type, value.value))
        return value

    def _fit_array(self, child: Any, value: Any) -> Any:
        if child.token == "{":
            key_type, value_type = child.children
            return {self.fit(key_type, key): self.fit(value_type, item) for key, item in value.items()}
        if child.token == "y":
            return bytes(value)
        return [self.fit(child, item) for item in value]

    def _sendable(self, text: str) -> str:
        # A NUL makes the bus close the connection, a lone surrogate cannot be encoded; strings are cleaned where they
        # enter, so this is the last line of defence.
        if text.isascii() and "\0" not in text:
            return text
        clean = _UNSENDABLE.sub("\N{REPLACEMENT CHARACTER}", text)
        if clean != text and not self._warned:
            self._warned = True
            self._log.warning("A string with NUL or surrogates came as far as the bus: %a. Said once.", text)
        return clean


def _types(signature: str) -> list[Any]:
    types: list[Any] = SignatureTree._get(signature).types
    return types


def _marshal(signature: str, body: list[Any]) -> bytes:
    return bytes(Marshaller(signature, body).marshall())


def _path(value: str) -> str:
    # dbus-next lets a trailing newline pass, the bus does not.
    if not _PATH.fullmatch(value):
        raise ValueError(f"{value!a} is no object path")
    return value


def _pad(data: bytes) -> bytes:
    return _PADDING[len(data) % 8]


def _join(entries: Sequence[bytes]) -> bytes:
    """The elements of an array of dictionary entries or structs, each marshalled from offset 0: they are 8-aligned."""
    parts: list[bytes] = []
    for entry in entries:
        parts += (entry, _PADDING[len(entry) % 8])
    return b"".join(parts[:-1])  # no padding after the last one


def _string_field(code: int, type_: bytes, value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<BBcxI", code, 1, type_, len(raw)) + raw + b"\0" if raw else b""


def _frame(
    kind: MessageType,
    serial: int,
    *,
    flags: int = 0,
    path: str = "",
    interface: str = "",
    member: str = "",
    error_name: str = "",
    reply_serial: int = 0,
    destination: str = "",
    signature: str = "",
    body: bytes = b"",
) -> bytes:
    """A whole message around a marshalled body; dbus-next only sends bodies that it marshals itself."""
    fields = [
        _string_field(1, b"o", path),
        _string_field(2, b"s", interface),
        _string_field(3, b"s", member),
        _string_field(4, b"s", error_name),
        struct.pack("<BBcxI", 5, 1, b"u", reply_serial) if reply_serial else b"",
        _string_field(6, b"s", destination),
        struct.pack("<BBcxB", 8, 1, b"g", len(signature)) + signature.encode() + b"\0" if signature else b"",
    ]
    array = _join([field for field in fields if field])
    head = struct.pack("<cBBBIII", b"l", kind.value, flags, 1, len(body), serial, len(array))
    return b"".join((head, array, _pad(array), body))


class _Frame:
    """A finished message, for dbus-next's queue."""

    unix_fds = None

    def __init__(self, data: bytes) -> None:
        self._data = data

    def _marshall(self, negotiate_unix_fd: bool) -> bytes:
        return self._data


class _PatientSocket:
    """A socket whose full buffer is no error: on EAGAIN dbus-next (its #153) drops the connection, after 0 it waits.

    SENT is told of the bytes that went out.
    """

    def __init__(self, socket: Any, sent: Callable[[int], None]) -> None:
        self._socket = socket
        self._sent = sent

    def send(self, data: memoryview) -> int:
        try:
            count = int(self._socket.send(data))
        except BlockingIOError:
            return 0
        self._sent(count)
        return count


class _Unmarshaller(Unmarshaller):  # type: ignore[misc]
    """dbus-next's, but what is over CALL_LIMIT is dropped unread.

    A message without its body still has its signature. One whose header is as long (a path may be) becomes a signal
    that nobody waits for: to read a path of 32 MB takes minutes.
    """

    def _unmarshall(self) -> None:
        self.offset = 0
        self.read(16, prefetch=True)
        order = "<" if self.buf[0] == LITTLE_ENDIAN else ">"
        body, header = struct.unpack_from(f"{order}I4xI", self.buf, 4)
        length = 16 + header + -header % 8
        if max(body, header) > CALL_LIMIT:
            self.read(length + body, prefetch=True)
            del self.buf[length:]
            struct.pack_into(f"{order}I", self.buf, 4, 0)
        if header > CALL_LIMIT:
            self.message = Message(message_type=MessageType.SIGNAL, path="/", interface="too.large", member="Dropped")
        else:
            super()._unmarshall()


class _Connection(MessageBus):  # type: ignore[misc]
    """dbus-next's connection, cured of what would kill or hang the daemon."""

    _unmarshaller: Any
    _unsent = 0  # bytes
    _reads = True

    async def _auth_readline(self) -> str:
        # dbus-next reads on after the end of the stream, for ever and without giving way.
        line = b""
        while not line.endswith(b"\r\n"):
            piece = await self._loop.sock_recv(self._sock, 1)
            if not piece:
                raise ConnectionResetError("The bus closed the connection before it let us in.")
            line += piece
        return line[:-2].decode()

    async def connect(self) -> _Connection:
        await super().connect()
        self._writer.sock = _PatientSocket(self._writer.sock, self._went_out)
        return self

    def _create_unmarshaller(self) -> _Unmarshaller:
        return _Unmarshaller(self._stream)

    def queue(self, data: bytes) -> None:
        """Sends DATA, a finished message, after all that was queued before."""
        self._unsent += len(data)
        self._writer.schedule_write(_Frame(data))

    def _message_reader(self) -> None:
        try:
            while self._unsent < UNSENT_LIMIT:
                if self._disconnect_future.done() or not self._unmarshaller.unmarshall():
                    return
                self._on_message(self._unmarshaller.message)
                self._unmarshaller = self._create_unmarshaller()
            self._loop.remove_reader(self._fd)
            self._reads = False
        except Exception as error:
            self._finalize(error)

    def _went_out(self, count: int) -> None:
        self._unsent = max(0, self._unsent - count)  # dbus-next's own few messages were not counted
        if not self._reads and self._unsent < UNSENT_LIMIT:
            self._reads = True
            self._loop.add_reader(self._fd, self._message_reader)
            self._loop.call_soon(self._message_reader)  # no event tells of what the stream has taken in already

    def release(self) -> None:
        """Gives the descriptor of a lost connection back; dbus-next leaves that to the garbage collector."""
        self._stream.close()
        self._sock.close()


# --- the objects ---


@dataclasses.dataclass(slots=True)
class _Object:
    interfaces: dict[str, dict[str, Any]]
    entry: bytes | None = None  # {oa{sa{sv}}} of GetManagedObjects; None: to be marshalled again


class _Table:
    """The objects that are there, and the tree of nodes that their paths make."""

    def __init__(self) -> None:
        self.objects: dict[str, _Object] = {}
        self._children: dict[str, set[str]] = {}
        self._link(names.ROOT)

    def put(self, path: str, thing: _Object) -> None:
        """THING is at PATH from now on."""
        if path not in self.objects:
            self._link(path)
        self.objects[path] = thing

    def drop(self, path: str) -> None:
        """Nothing is at PATH any more. Nodes above it that lead nowhere go too."""
        if self.objects.pop(path, None):
            self._unlink(path)

    def is_node(self, path: str) -> bool:
        """Whether PATH is an object or leads to one."""
        return path in self.objects or path in self._children or path == names.ROOT

    def children(self, path: str) -> list[str]:
        """The names of the nodes directly below PATH."""
        return sorted(self._children.get(path, ()))

    def _link(self, path: str) -> None:
        while path != "/":
            parent, name = _split(path)
            siblings = self._children.setdefault(parent, set())
            if name in siblings:
                return
            siblings.add(name)
            path = parent

    def _unlink(self, path: str) -> None:
        while not self.is_node(path):
            parent, name = _split(path)
            self._children[parent].remove(name)
            if self._children[parent]:
                return
            del self._children[parent]
            path = parent


def _split(path: str) -> tuple[str, str]:
    parent, _, name = path.rpartition("/")
    return parent or "/", name


@dataclasses.dataclass(frozen=True, slots=True)
class _Telling:
    """A signal ready to be sent."""

    path: str
    interface: str
    member: str
    signature: str
    body: bytes


class _Draft:
    """What a batch comes to. All of it is checked and marshalled before any of it is done.

    Before anybody can hear (HEARD is false) nothing is told, and an added object is marshalled when it is asked for:
    at the start that is half of the time.
    """

    def __init__(self, specification: Specification, table: _Table, wire: _Wire, heard: bool) -> None:
        self._heard = heard
        self._spec = specification
        self._table = table
        self._wire = wire
        self.objects: dict[str, _Object | None] = {}
        self.tellings: list[_Telling] = []

    def fill(self, batch: Batch) -> None:
        """Works BATCH out. Raises ValueError, KeyError and the like, with notes on where, if it does not fit."""
        for path, interfaces in batch.added.items():
            self._at(path, self._add, interfaces)
        for path, changes in batch.changed.items():
            self._at(path, self._change, changes)
        for signal in batch.signals:
            self._at(signal.path, self._signal, signal)
        for path in batch.removed:
            self._at(path, self._remove, None)
        for path, changes in batch.last.items():
            self._at(path, self._change, changes)

    def _at(self, path: str, step: Callable[[str, Any], None], what: Any) -> None:
        try:
            step(path, what)
        except Exception as error:
            error.add_note(f"in {step.__name__[1:]} of {path}")
            raise

    def _find(self, path: str) -> _Object | None:
        return self.objects[path] if path in self.objects else self._table.objects.get(path)

    def _get(self, path: str) -> _Object:
        thing = self._find(path)
        if thing is None:
            raise ValueError("there is no such object")
        return thing

    def _add(self, path: str, interfaces: Interfaces) -> None:
        if self._find(path):
            raise ValueError("it is there already")
        complete = {
            name: self._wire.complete(name, values) for name, values in interfaces.items() if values is not None
        }
        if not self._heard:
            self.objects[path] = _Object(complete)
            return
        entry = self._wire.entry(path, complete)
        self.objects[path] = _Object(complete, entry)
        self._tell_manager(path, "InterfacesAdded", "oa{sa{sv}}", entry)

    def _change(self, path: str, changes: Interfaces) -> None:
        old = self._get(path)
        new = dict(old.interfaces)
        self._appear(path, new, changes)
        for name, values in changes.items():
            if values is not None and name in old.interfaces:
                new[name] = self._change_values(path, name, old.interfaces[name], values)
        self._go(path, new, [name for name, values in changes.items() if values is None and name in new])
        if any(new.get(name) is not old.interfaces.get(name) for name in new.keys() | old.interfaces.keys()):
            self.objects[path] = _Object(new)

    def _appear(self, path: str, interfaces: dict[str, dict[str, Any]], changes: Interfaces) -> None:
        fresh = {name: values for name, values in changes.items() if values is not None and name not in interfaces}
        if fresh:
            complete = {name: self._wire.complete(name, values) for name, values in fresh.items()}
            interfaces.update(complete)
            self._tell_manager(path, "InterfacesAdded", "oa{sa{sv}}", self._wire.entry(path, complete))

    def _go(self, path: str, interfaces: dict[str, dict[str, Any]], gone: list[str]) -> None:
        if gone:
            for name in gone:
                del interfaces[name]
            self._tell_manager(path, "InterfacesRemoved", "oas", _marshal("oas", [path, gone]))

    def _change_values(self, path: str, name: str, old: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        declared = self._spec.interfaces[name].properties
        fit = {key: self._wire.fit_property(name, key, value) for key, value in values.items() if value != old.get(key)}
        fresh = {key: value for key, value in fit.items() if value != old[key]}
        variants = self._wire.variants(name, fresh)
        told = {key: variant for key, variant in variants.items() if not declared[key].const}
        if told:
            body = _marshal("sa{sv}as", [name, told, []])
            self.tellings.append(_Telling(path, spec.PROPERTIES, "PropertiesChanged", "sa{sv}as", body))
        return {**old, **fresh} if fresh else old

    def _signal(self, path: str, signal: Signal) -> None:
        if signal.interface not in self._get(path).interfaces:
            raise ValueError(f"it has no {signal.interface}")
        signature = self._spec.interfaces[signal.interface].signals[signal.member].signature
        body = self._wire.marshal(signature, signal.args)
        self.tellings.append(_Telling(path, signal.interface, signal.member, signature, body))

    def _remove(self, path: str, _: None) -> None:
        thing = self._find(path)
        if thing:
            self.objects[path] = None
            self._tell_manager(path, "InterfacesRemoved", "oas", _marshal("oas", [path, list(thing.interfaces)]))

    def _tell_manager(self, path: str, member: str, signature: str, body: bytes) -> None:
        # The specification's ObjectManager tells of what is below it, so not of itself.
        if path != names.ROOT:
            self.tellings.append(_Telling(names.ROOT, spec.OBJECT_MANAGER, member, signature, body))


# --- the router ---


class Router:
    """One connection to the bus, the objects told on it, and the calls in both directions.

    Make it inside the running loop. `lost` is done when the connection is gone, for whatever reason; a lost router
    stays lost.
    """

    def __init__(self, specification: Specification, *, log: logging.Logger) -> None:
        self._spec = specification
        self._log = log
        self._wire = _Wire(specification, log)
        self._table = _Table()
        self._handlers: dict[tuple[str, str], Handler] = {}
        self._quick: set[tuple[str, str]] = set()
        self._connection: _Connection | None = None
        self._named = False
        self._serial = 0
        self._pending: dict[int, asyncio.Future[list[Any]]] = {}  # our calls by serial
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: collections.Counter[str] = collections.Counter()  # calls at work by sender
        self._waiting: collections.Counter[int] = collections.Counter()  # those that are not quick, by user id
        self._uids: dict[str, int] = {}
        self._watched: dict[str, list[asyncio.Event]] = {}  # unique names whose end is waited for
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # --- life ---

    async def connect(self, address: str | None = None) -> None:
        """Connects to the bus at ADDRESS, without one to the system bus. Raises OSError or dbus-next's AuthError."""
        connection = _Connection(bus_address=address, bus_type=BusType.SYSTEM)
        connection.add_message_handler(self._on_message)
        try:
            await connection.connect()
        except BaseException:
            connection.release()
            raise
        self._connection = connection
        self._start(self._watch(connection))

    async def own_name(self, name: str) -> None:
        """Owns NAME, without queueing for it. Raises NameTaken with the reason if the bus does not give it."""
        do_not_queue, primary_owner = 4, 1
        self._named = True  # whoever learns of the name hears what changes from then on
        try:
            [answer] = await self._ask_driver("RequestName", "su", [name, do_not_queue])
        except BusCallError as error:
            raise NameTaken(f"The bus refuses the name {name}: {error.message}") from error
        if answer != primary_owner:
            raise NameTaken(f"The name {name} is taken: hostpassd runs already on this bus.")

    async def close(self) -> None:
        """Sends what is queued (for up to a second) and leaves the bus. Handlers at work go on, unheard."""
        with contextlib.suppress(BusCallError, TimeoutError):
            await self._ask_driver("GetId", timeout=1)
        if self._connection:
            self._connection.disconnect()
            await self.lost

    async def _watch(self, connection: _Connection) -> None:
        try:
            await connection.wait_for_disconnect()
        except Exception as error:
            self._log.debug("The bus connection ended: %r", error)
        self._connection = None
        for future in self._pending.values():
            if not future.done():
                future.set_exception(BusCallError(DISCONNECTED, "The bus is gone."))
        for event in [event for events in self._watched.values() for event in events]:
            event.set()
        self.lost.set_result(None)
        connection.release()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- what others see ---

    def publish(self, batch: Batch) -> None:
        """Makes BATCH the truth and tells it, at once: a reply sent after this comes after it.

        What does not fit the specification raises (ValueError, KeyError and the like, with notes on where), and
        then nothing of BATCH was done.
        """
        draft = _Draft(self._spec, self._table, self._wire, self._named)
        draft.fill(batch)
        for path, thing in draft.objects.items():
            if thing:
                self._table.put(path, thing)
            else:
                self._table.drop(path)
        for telling in draft.tellings if self._named else ():
            self._emit(telling)

    async def warm(self) -> None:
        """Marshals what nobody has asked for yet, a little in each turn of the loop: the first reader need not wait."""
        for path in list(self._table.objects):
            thing = self._table.objects.get(path)
            if thing and not thing.entry:
                self._entry(path, thing)
                await asyncio.sleep(0)

    def _emit(self, telling: _Telling) -> None:
        self._send(
            MessageType.SIGNAL,
            path=telling.path,
            interface=telling.interface,
            member=telling.member,
            signature=telling.signature,
            body=telling.body,
        )

    def handle(self, interface: str, member: str, handler: Handler, *, quick: bool = False) -> None:
        """Has HANDLER answer the calls of a method. Raises KeyError if the specification has no such method.

        `quick`: it waits for nothing, so its calls need not be counted by user.
        """
        if member not in self._spec.interfaces[interface].methods:
            raise KeyError(f"{interface} has no method {member}")
        self._handlers[interface, member] = handler
        if quick:
            self._quick.add((interface, member))

    # --- calls of ours ---

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        timeout: float | None = 25,
        interactive: bool = False,
    ) -> list[Any]:
        """Calls a method of somebody else and returns its out arguments. `timeout` is in seconds; None: wait for ever.

        Raises BusCallError for an error reply and when the bus is gone, TimeoutError when no answer came in time.
        """
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if interactive else MessageFlag.NONE
        serial = self._send_call(destination, path, interface, member, signature, body, flags)
        self._pending[serial] = future
        try:
            async with asyncio.timeout(timeout):
                return await future
        finally:
            del self._pending[serial]

    def tell(
        self, destination: str, path: str, interface: str, member: str, signature: str = "", body: Sequence[Any] = ()
    ) -> None:
        """Calls a method of somebody else without caring for an answer; nothing happens if the bus is gone."""
        with contextlib.suppress(BusCallError):
            self._send_call(destination, path, interface, member, signature, body, MessageFlag.NO_REPLY_EXPECTED)

    async def uid_of(self, sender: str) -> int:
        """The user id of the caller SENDER, which may be gone if it was asked for before.

        Raises Cancelled if it is gone, BusCallError if the bus does not know.
        """
        if sender in self._uids:
            return self._uids[sender]
        try:
            [uid] = await self._ask_driver("GetConnectionUnixUser", "s", [sender])
        except BusCallError as error:
            if error.name == NAME_HAS_NO_OWNER:
                raise errors.Cancelled("The caller is gone.") from error
            raise
        if len(self._uids) >= SENDERS_KEPT:
            self._uids.clear()
        self._uids[sender] = int(uid)
        return int(uid)

    @contextlib.asynccontextmanager
    async def vanished(self, sender: str) -> AsyncIterator[asyncio.Event]:
        """Inside, an event that is set once the unique name SENDER or the bus is gone; at once if it is already."""
        event = asyncio.Event()
        rule = (
            f"type='signal',sender='{BUS_DRIVER}',path='{BUS_DRIVER_PATH}',interface='{BUS_DRIVER}',"
            f"member='NameOwnerChanged',arg0='{sender}'"
        )
        self._watched.setdefault(sender, []).append(event)
        try:
            await self._ask_driver("AddMatch", "s", [rule])
            [there] = await self._ask_driver("NameHasOwner", "s", [sender])
            if not there:
                event.set()
            yield event
        finally:
            # The bus counts equal rules, so each goes with the event it came for.
            self.tell(BUS_DRIVER, BUS_DRIVER_PATH, BUS_DRIVER, "RemoveMatch", "s", [rule])
            self._watched[sender].remove(event)
            if not self._watched[sender]:
                del self._watched[sender]

    async def _ask_driver(
        self, member: str, signature: str = "", body: Sequence[Any] = (), timeout: float = 25
    ) -> list[Any]:
        return await self.call(BUS_DRIVER, BUS_DRIVER_PATH, BUS_DRIVER, member, signature, body, timeout=timeout)

    def _send_call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: Sequence[Any],
        flags: MessageFlag,
    ) -> int:
        if self._connection is None:
            raise BusCallError(DISCONNECTED, "There is no connection to the bus.")
        return self._send(
            MessageType.METHOD_CALL,
            flags=flags.value,
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=self._wire.marshal(signature, body),
        )

    def _send(self, kind: MessageType, **fields: Any) -> int:
        """Queues a message and returns its serial; without a connection it goes nowhere."""
        self._serial = self._serial % 0xFFFFFFFF + 1
        if self._connection:
            self._connection.queue(_frame(kind, self._serial, **fields))
        return self._serial

    # --- what comes in ---

    def _on_message(self, message: Message) -> bool:
        """Takes MESSAGE; true: dbus-next has nothing to do with it."""
        match message.message_type:
            case MessageType.METHOD_CALL:
                self._on_call(message)
                return True
            case MessageType.SIGNAL:
                self._on_signal(message)
                return True
            case _:
                return self._on_reply(message)

    def _on_reply(self, message: Message) -> bool:
        future = self._pending.get(message.reply_serial)
        if future is None:
            return False
        if not future.done():
            if message.message_type is MessageType.ERROR:
                text = message.body[0] if message.signature.startswith("s") and message.body else ""
                future.set_exception(BusCallError(message.error_name, text))
            else:
                future.set_result(message.body)
        return True

    def _on_signal(self, message: Message) -> None:
        if message.sender == BUS_DRIVER and message.member == "NameOwnerChanged":
            name, _, new_owner = message.body
            if not new_owner:
                for event in self._watched.get(name, ()):
                    event.set()

    def _on_call(self, message: Message) -> None:
        if len(SignatureTree._cache) > SIGNATURES_KEPT:
            SignatureTree._cache.clear()
        try:
            self._dispatch(message)
        except Exception as error:
            self._answer_error(message, error)

    def _dispatch(self, message: Message) -> None:
        interface, method = self._method(message.path, message.interface, message.member)
        if message.signature != method.in_signature:
            raise errors.InvalidArgs(_mismatch(interface, method, message.signature))
        if message.signature and not message.body:
            raise errors.LimitExceeded(f"A call here has at most {CALL_LIMIT} bytes: ask for less at a time.")
        if interface in spec.STANDARD.interfaces:
            self._answer(message, method.out_signature, self._answer_standard(message, method.name))
        else:
            self._start_handler(message, interface, method)

    def _method(self, path: str, interface: str | None, member: str) -> tuple[str, MethodSpec]:
        """The interface's name and the method that a call means, whether it names the interface or not."""
        available = self._interfaces_at(path, interface)
        if interface and interface not in available:
            raise errors.UnknownInterface(f"{path} has no interface {interface}.")
        for candidate in [available[interface]] if interface else available.values():
            if member in candidate.methods:
                return candidate.name, candidate.methods[member]
        raise errors.UnknownMethod(f"{interface or path} has no method {member}.")

    def _interfaces_at(self, path: str, wanted: str | None = None) -> dict[str, InterfaceSpec]:
        if wanted == spec.PEER:  # answers on any path, says its specification
            return {spec.PEER: spec.STANDARD.interfaces[spec.PEER]}
        if not self._table.is_node(path):
            raise errors.UnknownObject(f"There is no object {path}, or no longer.")
        thing = self._table.objects.get(path)
        own = {name: self._spec.interfaces[name] for name in thing.interfaces} if thing else {}
        standard = [spec.PEER, spec.INTROSPECTABLE]
        standard += [spec.PROPERTIES] if thing else []
        standard += [spec.OBJECT_MANAGER] if path == names.ROOT else []
        return own | {name: spec.STANDARD.interfaces[name] for name in standard}

    def _start_handler(self, message: Message, interface: str, method: MethodSpec) -> None:
        handler, sender = self._handlers.get((interface, method.name)), message.sender
        if handler is None:
            raise errors.NotSupported(f"This hostpassd cannot do {interface}.{method.name}.")
        if self._running[sender] >= CALLS_PER_SENDER:
            raise errors.LimitExceeded(f"You have {CALLS_PER_SENDER} calls at work: wait for one of them to end.")
        interactive = bool(message.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION)
        call = Call(sender, message.path, interface, method.name, message.body, interactive)
        self._running[sender] += 1
        self._start(self._run(handler, call, message, method.out_signature))

    async def _run(self, handler: Handler, call: Call, message: Message, signature: str) -> None:
        try:
            async with self._place(call):
                results = await handler(call)
            self._answer(message, signature, self._wire.marshal(signature, results))
        except asyncio.CancelledError:
            self._answer_error(message, errors.Cancelled("hostpassd ended before this was done."))
            raise
        except Exception as error:
            self._answer_error(message, error)
        finally:
            _uncount(self._running, call.sender)

    @contextlib.asynccontextmanager
    async def _place(self, call: Call) -> AsyncIterator[None]:
        """One of the places for calls that wait, of which no user has all."""
        if (call.interface, call.member) in self._quick:
            yield
            return
        uid = await self.uid_of(call.sender)
        if self._waiting[uid] >= CALLS_PER_USER:
            raise errors.LimitExceeded(f"You have {CALLS_PER_USER} calls at work: wait for one of them to end.")
        if self._waiting.total() >= CALLS:
            raise errors.LimitExceeded(f"{CALLS} calls are at work here: try again later.")
        self._waiting[uid] += 1
        try:
            yield
        finally:
            _uncount(self._waiting, uid)

    def _answer(self, message: Message, signature: str, body: bytes) -> None:
        if len(body) > BODY_LIMIT:
            raise errors.LimitExceeded(f"The answer has {len(body)} bytes, more than the bus carries: ask for less.")
        self._reply(MessageType.METHOD_RETURN, message, signature=signature, body=body)

    def _answer_error(self, message: Message, error: Exception) -> None:
        if not isinstance(error, errors.HostpassError):
            self._log.error("%s.%s failed", message.interface, message.member, exc_info=error)
            error = errors.Failed(FAULT)
        prefix = names.STANDARD_ERROR_PREFIX if error.standard else names.ERROR_PREFIX
        limit = BLOCKED_LIMIT if isinstance(error, errors.Blocked) else TEXT_LIMIT
        text = str(error)
        body = self._wire.marshal("s", [text if len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"])
        self._reply(MessageType.ERROR, message, error_name=prefix + error.name, signature="s", body=body)

    def _reply(self, kind: MessageType, message: Message, **fields: Any) -> None:
        if not message.flags & MessageFlag.NO_REPLY_EXPECTED:
            self._send(kind, reply_serial=message.serial, destination=message.sender, **fields)

    # --- the standard interfaces ---

    def _answer_standard(self, message: Message, member: str) -> bytes:
        match member:
            case "GetMachineId":
                return self._wire.marshal("s", [_machine_id()])
            case "Introspect":
                return self._wire.marshal("s", [self._introspect(message.path)])
            case "Get":
                return self._get(message.path, *message.body)
            case "GetAll":
                return self._get_all(message.path, *message.body)
            case "Set":
                return self._set(message.path, *message.body)
            case "GetManagedObjects":
                return self._managed_objects()
        return b""  # Ping

    def _introspect(self, path: str) -> str:
        interfaces = "".join(interface.text for interface in self._interfaces_at(path).values())
        nodes = "".join(f'  <node name="{name}"/>\n' for name in self._table.children(path))
        return f"{DOCTYPE}<node>\n{interfaces}{nodes}</node>\n"

    def _get(self, path: str, interface: str, key: str) -> bytes:
        owner, value = self._property(path, interface, key)
        return _marshal("v", [self._wire.variant(owner, key, value)])

    def _get_all(self, path: str, interface: str) -> bytes:
        everything: dict[str, Any] = {}
        for name, values in self._values(path, interface).items():
            everything |= self._wire.variants(name, values)
        return _marshal("a{sv}", [everything])

    def _set(self, path: str, interface: str, key: str, _: Any) -> bytes:
        owner, _ = self._property(path, interface, key)
        raise errors.PropertyReadOnly(f"{owner}.{key} can only be read: the methods change things.")

    def _property(self, path: str, interface: str, key: str) -> tuple[str, Any]:
        for name, values in self._values(path, interface).items():
            if key in values:
                return name, values[key]
        raise errors.UnknownProperty(f"{interface or path} has no property {key}.")

    def _values(self, path: str, interface: str) -> dict[str, dict[str, Any]]:
        """The values of INTERFACE's properties; of all interfaces if it is empty."""
        interfaces = self._table.objects[path].interfaces
        if not interface:
            return interfaces
        if interface not in self._interfaces_at(path):
            raise errors.UnknownInterface(f"{path} has no interface {interface}.")
        return {interface: interfaces[interface]} if interface in interfaces else {}

    def _managed_objects(self) -> bytes:
        array = _join([self._entry(path, thing) for path, thing in self._table.objects.items() if path != names.ROOT])
        return struct.pack("<I4x", len(array)) + array

    def _entry(self, path: str, thing: _Object) -> bytes:
        thing.entry = thing.entry or self._wire.entry(path, thing.interfaces)
        return thing.entry


def _uncount(counter: collections.Counter[Any], key: Any) -> None:
    """One less of KEY; what has none is not kept."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def _mismatch(interface: str, method: MethodSpec, got: str) -> str:
    wanted = ", ".join(f"{argument.name} {argument.signature}" for argument in method.inputs) or "nothing"
    return f"{interface}.{method.name} takes {wanted}; the call has {got or 'nothing'}."


def _machine_id() -> str:
    for file in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        with contextlib.suppress(OSError):
            return file.read_text(encoding="ascii").strip()
    raise errors.Failed("This host has no machine id: systemd-machine-id-setup makes one.")
