"""The daemon's face on D-Bus: dispatch, properties, introspection, object manager, all driven by dbus/*.xml."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from dbus_next import BusType, Message, MessageFlag, MessageType, Variant
from dbus_next._private.constants import LITTLE_ENDIAN
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.aio import MessageBus
from dbus_next.signature import SignatureTree

from hostpassd import errors, names
from hostpassd.bus import spec
from hostpassd.bus.spec import InterfaceSpec, MethodSpec, Specification
from hostpassd.bus.tree import Batch, Draft, Interfaces, Object, Signal, Table, Telling
from hostpassd.bus.wire import Wire, frame, join, marshal

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


class BusCallError(Exception):
    """A call of ours was answered with the error NAME, or (Disconnected) cannot be answered any more."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message


class NameTaken(Exception):
    """The bus does not give us the name we asked for."""


# --- the connection ---


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


# --- the router ---


class Router:
    """One connection to the bus, the objects told on it, and the calls in both directions.

    Make it inside the running loop. `lost` is done when the connection is gone, for whatever reason; a lost router
    stays lost.
    """

    def __init__(self, specification: Specification, *, log: logging.Logger) -> None:
        self._spec = specification
        self._log = log
        self._wire = Wire(specification, log)
        self._table = Table()
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
        await connection.connect()
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
        draft = Draft(self._spec, self._table, self._wire, self._named)
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

    def _emit(self, telling: Telling) -> None:
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
            self._connection.queue(frame(kind, self._serial, **fields))
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
        return marshal("v", [self._wire.variant(owner, key, value)])

    def _get_all(self, path: str, interface: str) -> bytes:
        everything: dict[str, Any] = {}
        for name, values in self._values(path, interface).items():
            everything |= self._wire.variants(name, values)
        return marshal("a{sv}", [everything])

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
        array = join([self._entry(path, thing) for path, thing in self._table.objects.items() if path != names.ROOT])
        return struct.pack("<I4x", len(array)) + array

    def _entry(self, path: str, thing: Object) -> bytes:
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
