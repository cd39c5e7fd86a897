"""The daemon's face on D-Bus: dispatch, properties, introspection, object manager, all driven by dbus/*.xml."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

from dbus_next import MessageFlag, MessageType, Variant

from hostpassd import errors, names
from hostpassd.base.pieces import Pieces
from hostpassd.bus import peers, spec
from hostpassd.bus.connection import MESSAGE_LIMIT, Connection, Incoming, TooMuch, Unreadable, marshal, read
from hostpassd.bus.peers import BusCallError
from hostpassd.bus.spec import InterfaceSpec, MethodSpec, Specification
from hostpassd.bus.tree import Batch, Draft, Interfaces, Object, Signal, Table, Telling
from hostpassd.bus.wire import Wire, array, frame

__all__ = [
    "Batch",
    "BusCallError",
    "Call",
    "Handler",
    "Interfaces",
    "NameTaken",
    "Router",
    "Rows",
    "Signal",
    "Variant",
]

# Calls that handlers are at work on; of those that wait for something also by user, who can have many connections.
CALLS_PER_SENDER = 32
CALLS_PER_USER = 128
CALLS = 512

# Of those that only read, the others of a sender wait for their turn: a program may ask for all that it wants at once.
READS_PER_SENDER = 4

# In each turn of the loop, seconds and calls for those who call; everything else has its turn in between. Short, for
# the socket holds some 200 KB, and a call can only be seen when what came before it has been read.
SHARE = 0.001
CALLS_PER_TURN = 8

# Bytes, about, of calls that came and wait for their turn.
WAITING_PER_SENDER = 1024 * 1024
WAITING = 16 * 1024 * 1024

BODY_LIMIT = MESSAGE_LIMIT - 1024  # a reply's header has two names and a signature of 255 bytes at most

# Characters of an error's message, which can hold the caller's own words. A Blocked names every blocker.
TEXT_LIMIT = 4 * 1024
BLOCKED_LIMIT = 64 * 1024

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


class Rows:
    """The answer of a method whose one out argument is an array of structs, of which there can be thousands.

    ROWS are taken, and marshalled, a piece in each turn of the loop.
    """

    def __init__(self, rows: Iterable[Any]) -> None:
        self.rows = rows


Handler = Callable[[Call], Awaitable[Sequence[Any] | Rows]]
"""Answers a call with its out arguments, or raises HostpassError."""


class NameTaken(Exception):
    """The bus does not give us the name we asked for."""


# --- calls that wait ---


@dataclasses.dataclass(slots=True)
class _Line:
    calls: collections.deque[Incoming] = dataclasses.field(default_factory=collections.deque)
    weight: int = 0


class CallQueue:
    """Calls of others that nobody has looked at yet: SERVE gets each sender's first, then each one's second, and so on.

    Each turn of the loop has a bounded share for them, and so has each sender of what may wait: what is over it REFUSE
    gets at once. READY says whether any may be served at all; `wake` has to be called when it does so again.

    What SERVE cannot begin yet it can `park`: that waits, within the same share, until `unpark` has its sender's first
    served again, before whatever else of that sender waits.
    """

    def __init__(
        self, serve: Callable[[Incoming], None], refuse: Callable[[Incoming], None], ready: Callable[[], bool]
    ) -> None:
        self._serve = serve
        self._refuse = refuse
        self._ready = ready
        self.lines: dict[str, _Line] = {}  # by sender, who is next first
        self.parked: dict[str, _Line] = {}
        self.weight = 0
        self.awake = False

    def put(self, call: Incoming) -> None:
        """Takes CALL in, or refuses it or another one for it."""
        self._keep(self.lines, call)
        self.wake()

    def park(self, call: Incoming) -> None:
        """Takes CALL, which was served, back until `unpark`; or refuses it or another one for it."""
        self._keep(self.parked, call)

    def unpark(self, sender: str) -> None:
        """Has the first parked call of SENDER, if there is one, served next of all of SENDER's."""
        if sender not in self.parked:
            return
        call = self._take(self.parked, sender, self.parked[sender].calls.popleft)
        line = self.lines.setdefault(sender, _Line())
        line.calls.appendleft(call)
        self._weigh(line, _weight(call))
        self.wake()

    def _keep(self, lines: dict[str, _Line], call: Incoming) -> None:
        """Has CALL wait in its sender's of LINES, or refuses it or another one for it."""
        held = sum(line.weight for kind in (self.lines, self.parked) if (line := kind.get(call.sender)))
        if held and held + _weight(call) > WAITING_PER_SENDER:
            self._refuse(call)
            return
        line = lines.setdefault(call.sender, _Line())
        line.calls.append(call)
        self._weigh(line, _weight(call))
        if self.weight > WAITING:
            self._refuse_heaviest()

    def _refuse_heaviest(self) -> None:
        """Refuses the newest call of the longest line."""
        every = [(line.weight, sender, kind) for kind in (self.lines, self.parked) for sender, line in kind.items()]
        _, sender, lines = max(every, key=lambda row: row[0])
        self._refuse(self._take(lines, sender, lines[sender].calls.pop))
        self.unpark(sender)  # it may have been one that was to be served

    def wake(self) -> None:
        """Has calls served, if there are any, when the loop comes to it."""
        if self.lines and not self.awake:
            self.awake = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self.awake = False
        end = time.monotonic() + SHARE
        for _ in range(CALLS_PER_TURN):
            if not self.lines or not self._ready() or time.monotonic() >= end:
                break
            sender, line = next(iter(self.lines.items()))
            call = self._take(self.lines, sender, line.calls.popleft)
            if line.calls:
                self.lines[sender] = self.lines.pop(sender)  # to the end
            self._serve(call)
        if self._ready():
            self.wake()

    def _take(self, lines: dict[str, _Line], sender: str, take: Callable[[], Incoming]) -> Incoming:
        """One call of SENDER's of LINES."""
        call, line = take(), lines[sender]
        self._weigh(line, -_weight(call))
        if not line.calls:
            del lines[sender]
        return call

    def _weigh(self, line: _Line, weight: int) -> None:
        line.weight += weight
        self.weight += weight


def _weight(call: Incoming) -> int:
    """About the bytes of memory that CALL takes while it waits."""
    return 1024 + 2 * len(call.data)


# --- the router ---


class Router:
    """One connection to the bus, the objects told on it, and the calls in both directions.

    Make it inside the running loop. `lost` is done when the connection is gone, for whatever reason; a lost router
    stays lost.
    """

    def __init__(
        self, specification: Specification, *, log: logging.Logger, connection: Callable[..., Connection] = Connection
    ) -> None:
        """CONNECTION makes one, with the arguments of Connection."""
        self._spec = specification
        self._log = log
        self._wire = Wire(specification, log)
        self.pieces = Pieces()
        self.table = Table()
        self._handlers: dict[tuple[str, str], Handler] = {}
        self._quick: set[tuple[str, str]] = set()
        self._reads: set[tuple[str, str]] = set()
        self._live: dict[str, dict[str, Callable[[], Any]]] = {}  # by interface, of properties
        self._connect = connection
        self.connection: Connection | None = None
        self._named = False
        self.serial = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self._over_share = self._wire.marshal("s", ["You call faster than you are served: wait for answers."])
        self._calls = CallQueue(self._serve, self._refuse, self._can_answer)
        self.running: collections.Counter[str] = collections.Counter()  # calls at work by sender, but for
        self.reading: collections.Counter[str] = collections.Counter()  # those that only read
        self.waiting: collections.Counter[int] = collections.Counter()  # those that are not quick, by user id
        self.counters: collections.Counter[str] = collections.Counter()
        self.peers = peers.Peers(self.send, self._wire, self.counters)
        self.call, self.tell = self.peers.call, self.peers.tell
        self.uid_of, self.vanished = self.peers.uid_of, self.peers.vanished
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # --- life ---

    async def connect(self, address: str | None = None) -> None:
        """Connects to the bus at ADDRESS, without one to the system bus. Raises OSError or dbus-next's AuthError."""
        connection = self._connect(address, self._take, self._calls.wake)
        try:
            await connection.open()
        except BaseException:
            connection.release()
            raise
        self.connection = connection
        self._start(self._watch(connection))
        try:
            [connection.unique_name] = await self.peers.ask_driver("Hello")
        except BusCallError as error:
            raise ConnectionError(f"The bus does not greet us: {error.message}") from error

    async def own_name(self, name: str) -> None:
        """Owns NAME, without queueing for it. Raises NameTaken with the reason if the bus does not give it."""
        do_not_queue, primary_owner = 4, 1
        self._named = True  # whoever learns of the name hears what changes from then on
        try:
            [answer] = await self.peers.ask_driver("RequestName", "su", [name, do_not_queue])
        except BusCallError as error:
            raise NameTaken(f"The bus refuses the name {name}: {error.message}") from error
        if answer != primary_owner:
            raise NameTaken(f"The name {name} is taken: hostpassd runs already on this bus.")

    async def close(self) -> None:
        """Sends what is queued (for up to a second) and leaves the bus. Handlers at work go on, unheard."""
        with contextlib.suppress(BusCallError, errors.TimedOut):
            await self.peers.ask_driver("GetId", timeout=1)
        if self.connection:
            self.connection.disconnect()
            await self.lost

    async def _watch(self, connection: Connection) -> None:
        try:
            await connection.wait_for_disconnect()
        except Exception as error:
            self._log.debug("The bus connection ended: %r", error)
        self.connection = None
        self.peers.on_disconnect()
        self.lost.set_result(None)
        connection.release()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    # --- what others see ---

    def publish(self, batch: Batch) -> None:
        """Makes BATCH the truth and tells it, at once: a reply sent after this comes after it.

        What does not fit the specification raises (ValueError, KeyError and the like, with notes on where), and
        then nothing of BATCH was done.
        """
        draft = Draft(self._spec, self.table, self._wire, self._named)
        draft.fill(batch)
        for path, thing in draft.objects.items():
            if thing:
                self.table.put(path, thing)
            else:
                self.table.drop(path)
        for telling in draft.tellings if self._named else ():
            self._emit(telling)

    async def warm(self) -> None:
        """Marshals what nobody has asked for yet, a little in each turn of the loop: the first reader need not wait."""
        for path in list(self.table.objects):
            thing = self.table.objects.get(path)
            if thing and not thing.entry:
                self._entry(path, thing)
                await asyncio.sleep(0)

    def _emit(self, telling: Telling) -> None:
        self.send(
            MessageType.SIGNAL,
            path=telling.path,
            interface=telling.interface,
            member=telling.member,
            signature=telling.signature,
            body=telling.body,
        )

    def handle(
        self, interface: str, member: str, handler: Handler, *, quick: bool = False, reads: bool = False
    ) -> None:
        """Has HANDLER answer the calls of a method. Raises KeyError if the specification has no such method.

        `quick`: it waits for nothing, so its calls need not be counted by user. `reads`: it does nothing but answer, so
        calls that come together are answered by and by.
        """
        if member not in self._spec.interfaces[interface].methods:
            raise KeyError(f"{interface} has no method {member}")
        self._handlers[interface, member] = handler
        if quick:
            self._quick.add((interface, member))
        if reads:
            self._reads.add((interface, member))

    def show_live(self, interface: str, key: str, value: Callable[[], Any]) -> None:
        """Has Get and GetAll tell a property as VALUE makes it then, not as it was published."""
        self._live.setdefault(interface, {})[key] = value

    # --- what comes in ---

    def send(self, kind: MessageType, **fields: Any) -> int:
        """Queues a message and returns its serial; 0 where there is no connection."""
        if self.connection is None:
            return 0
        self.serial = self.serial % 0xFFFFFFFF + 1
        self.connection.queue(frame(kind, self.serial, **fields))
        return self.serial

    def _can_answer(self) -> bool:
        return self.connection is not None and not self.connection.congested

    def _take(self, message: Incoming) -> None:
        """Takes what came over the bus."""
        try:
            match message.kind:
                case MessageType.METHOD_CALL:
                    self._on_call(message)
                case MessageType.SIGNAL:
                    self.peers.on_signal(message)
                case MessageType.METHOD_RETURN | MessageType.ERROR:
                    self.peers.on_reply(message)
                case None:
                    self.counters["messages-not-known"] += 1
        except Unreadable:
            self.counters["messages-not-readable"] += 1
        except Exception:
            self._log.exception("A %s of %s failed", message.member or message.kind, message.sender)

    def _on_call(self, message: Incoming) -> None:
        self.counters["calls"] += 1
        if message.wants_reply or not (message.fault or message.interface in spec.STANDARD.interfaces):
            self._calls.put(message)
        else:
            self.counters["calls-without-use"] += 1

    def _refuse(self, message: Incoming) -> None:
        """Refuses a call that is over its sender's share, and with little ado: there are many where there is one."""
        self.counters["calls-over-share"] += 1
        if message.wants_reply and message.sender:
            name = names.ERROR_PREFIX + errors.LimitExceeded.name
            self._reply(MessageType.ERROR, message, error_name=name, signature="s", body=self._over_share)

    def _serve(self, message: Incoming) -> None:
        try:
            self._dispatch(message)
        except Exception as error:
            self._answer_error(message, error)
            self._calls.unpark(message.sender)  # it may have been one itself

    def _dispatch(self, message: Incoming) -> None:
        if message.fault:
            self._answer_error(message, message.fault)
            return
        interface, method = self._method(message.path, message.interface, message.member)
        if message.signature != method.in_signature:
            raise errors.InvalidArgs(_mismatch(interface, method, message.signature))
        args = read(message)
        if interface not in spec.STANDARD.interfaces:
            self._start_handler(message, interface, method, args)
        elif message.wants_reply:
            self._answer(message, method.out_signature, self._answer_standard(message, method.name, args))

    def _method(self, path: str, interface: str, member: str) -> tuple[str, MethodSpec]:
        """The interface's name and the method that a call means, whether it names the interface or not."""
        available = self._interfaces_at(path, interface)
        if interface and interface not in available:
            raise errors.UnknownInterface(f"{path} has no interface {interface}.")
        for candidate in [available[interface]] if interface else available.values():
            if member in candidate.methods:
                return candidate.name, candidate.methods[member]
        raise errors.UnknownMethod(f"{interface or path} has no method {member}.")

    def _interfaces_at(self, path: str, wanted: str = "") -> dict[str, InterfaceSpec]:
        if wanted == spec.PEER:  # answers on any path, says its specification
            return {spec.PEER: spec.STANDARD.interfaces[spec.PEER]}
        if not self.table.is_node(path):
            raise errors.UnknownObject(f"There is no object {path}, or no longer.")
        thing = self.table.objects.get(path)
        own = {name: self._spec.interfaces[name] for name in thing.interfaces} if thing else {}
        standard = [spec.PEER, spec.INTROSPECTABLE, spec.PROPERTIES]
        standard += [spec.OBJECT_MANAGER] if path == names.ROOT else []
        return own | {name: spec.STANDARD.interfaces[name] for name in standard}

    def _start_handler(self, message: Incoming, interface: str, method: MethodSpec, args: list[Any]) -> None:
        handler, sender = self._handlers.get((interface, method.name)), message.sender
        if handler is None:
            raise errors.NotSupported(f"This hostpassd cannot do {interface}.{method.name}.")
        reads = (interface, method.name) in self._reads
        if reads and self.reading[sender] >= READS_PER_SENDER:
            self._calls.park(message)
            return
        if not reads and self.running[sender] >= CALLS_PER_SENDER:
            raise errors.LimitExceeded(f"You have {CALLS_PER_SENDER} calls at work: wait for one of them to end.")
        interactive = bool(message.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION.value)
        call = Call(sender, message.path, interface, method.name, args, interactive)
        (self.reading if reads else self.running)[sender] += 1
        self._start(self._run(handler, call, message, method.out_signature))

    async def _run(self, handler: Handler, call: Call, message: Incoming, signature: str) -> None:
        try:
            async with self._place(call):
                results = await handler(call)
            if message.wants_reply:
                self._answer(message, signature, await self._marshal(signature, results))
        except asyncio.CancelledError:
            self._answer_error(message, errors.Cancelled("hostpassd ended before this was done."))
            raise
        except Exception as error:
            self._answer_error(message, error)
        finally:
            self._end(call)

    async def _marshal(self, signature: str, results: Sequence[Any] | Rows) -> bytes:
        if not isinstance(results, Rows):
            return self._wire.marshal(signature, results)
        return array(await self.pieces.all_of(self._wire.marshal(signature[1:], [row]) for row in results.rows))

    def _end(self, call: Call) -> None:
        """CALL is at work no more."""
        reads = (call.interface, call.member) in self._reads
        _uncount(self.reading if reads else self.running, call.sender)
        if reads:
            self._calls.unpark(call.sender)

    @contextlib.asynccontextmanager
    async def _place(self, call: Call) -> AsyncIterator[None]:
        """One of the places for calls that wait, of which no user has all."""
        if (call.interface, call.member) in self._quick:
            yield
            return
        uid = await self.uid_of(call.sender)
        if self.waiting[uid] >= CALLS_PER_USER:
            raise errors.LimitExceeded(f"You have {CALLS_PER_USER} calls at work: wait for one of them to end.")
        if self.waiting.total() >= CALLS:
            raise errors.LimitExceeded(f"{CALLS} calls are at work here: try again later.")
        self.waiting[uid] += 1
        try:
            yield
        finally:
            _uncount(self.waiting, uid)

    def _answer(self, message: Incoming, signature: str, body: bytes) -> None:
        if len(body) > BODY_LIMIT:
            raise errors.LimitExceeded(f"The answer has {len(body)} bytes, more than the bus carries: ask for less.")
        self._reply(MessageType.METHOD_RETURN, message, signature=signature, body=body)

    def _answer_error(self, message: Incoming, error: Exception) -> None:
        self.counters["calls-refused"] += 1
        told = self._as_told(message, error)
        if not message.wants_reply or not message.sender:  # not even that could be read
            return
        limit = BLOCKED_LIMIT if isinstance(told, errors.Blocked) else TEXT_LIMIT
        text = str(told)
        body = self._wire.marshal("s", [text if len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"])
        self._reply(MessageType.ERROR, message, error_name=names.error_name(told), signature="s", body=body)

    def _as_told(self, message: Incoming, error: Exception) -> errors.HostpassError:
        """ERROR as the caller of MESSAGE is told it. A fault of ours goes to the log."""
        match error:
            case errors.HostpassError():
                return error
            case TooMuch():
                return errors.LimitExceeded(f"This call is too much, {error}: ask for less at a time.")
            case Unreadable():
                return errors.InvalidArgs(f"This call cannot be read: {error}.")
            case BusCallError(name=peers.DISCONNECTED):
                return errors.Cancelled("hostpassd lost the bus before this was done.")
        self._log.error("%s.%s failed", message.interface, message.member, exc_info=error)
        return errors.Failed(FAULT)

    def _reply(self, kind: MessageType, message: Incoming, **fields: Any) -> None:
        self.send(kind, reply_serial=message.serial, destination=message.sender, **fields)

    # --- the standard interfaces ---

    def _answer_standard(self, message: Incoming, member: str, args: list[Any]) -> bytes:
        match member:
            case "GetMachineId":
                return self._wire.marshal("s", [_machine_id()])
            case "Introspect":
                return self._wire.marshal("s", [self.introspect(message.path)])
            case "Get":
                return self._get(message.path, *args)
            case "GetAll":
                return self._get_all(message.path, *args)
            case "Set":
                return self._set(message.path, *args)
            case "GetManagedObjects":
                return self.managed_objects()
        return b""  # Ping

    def introspect(self, path: str) -> str:
        interfaces = "".join(interface.text for interface in self._interfaces_at(path).values())
        nodes = "".join(f'  <node name="{name}"/>\n' for name in self.table.children(path))
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
        thing = self.table.objects.get(path)
        interfaces = thing.interfaces if thing else {}
        if interface and interface not in self._interfaces_at(path):
            raise errors.UnknownInterface(f"{path} has no interface {interface}.")
        return {name: self._as_now(name, values) for name, values in interfaces.items() if interface in ("", name)}

    def _as_now(self, interface: str, values: dict[str, Any]) -> dict[str, Any]:
        live = self._live.get(interface, {})
        return values | {key: self._wire.fit_property(interface, key, value()) for key, value in live.items()}

    def managed_objects(self) -> bytes:
        return array([self._entry(path, thing) for path, thing in self.table.objects.items()])

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
