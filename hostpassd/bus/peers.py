"""The others on the bus: calls of ours and who may answer them, signals that we subscribe to, who has gone."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from dbus_next import MessageFlag, MessageType

from hostpassd import errors, names
from hostpassd.bus.connection import Incoming, Unreadable, read
from hostpassd.bus.wire import Wire

BUS_DRIVER = "org.freedesktop.DBus"
BUS_DRIVER_PATH = "/org/freedesktop/DBus"

# Seconds for an answer of the bus itself.
DRIVER_TIMEOUT = 25.0

# Unique names are never given twice, so the user of one needs asking for only once.
SENDERS_KEPT = 1024

DISCONNECTED = names.STANDARD_ERROR_PREFIX + "Disconnected"
INCONSISTENT = names.STANDARD_ERROR_PREFIX + "InconsistentMessage"
NAME_HAS_NO_OWNER = names.STANDARD_ERROR_PREFIX + "NameHasNoOwner"


class BusCallError(Exception):
    """A call of ours was answered with the error NAME, or (Disconnected) cannot be answered any more."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """Signals of one kind from SENDER, a unique or a well-known name; those of one object, if PATH is given."""

    sender: str
    interface: str
    member: str
    path: str = ""
    arg0: str = ""  # what the first argument is, a string

    @property
    def rule(self) -> str:
        """The match rule that has the bus send them to us."""
        rule = f"type='signal',sender='{self.sender}',interface='{self.interface}',member='{self.member}'"
        path = f",path='{self.path}'" if self.path else ""
        return rule + path + (f",arg0='{self.arg0}'" if self.arg0 else "")


SignalHandler = Callable[[list[Any]], None]
"""Is called with the arguments of a signal."""


@dataclasses.dataclass(slots=True)
class _Asked:
    """A call of ours without an answer yet."""

    destination: str
    answerers: set[str]  # unique names of who may answer it: the destination's owner, and the bus itself
    settle: Callable[[Incoming], None]


class Peers:
    """Calls and subscribes; is told of what comes with `on_reply` and `on_signal`.

    SEND queues a message and returns its serial, 0 where there is no connection.
    """

    def __init__(self, send: Callable[..., int], wire: Wire, counters: collections.Counter[str]) -> None:
        self._send = send
        self._wire = wire
        self._counters = counters
        self.asked: dict[int, _Asked] = {}  # by serial
        self._owners: dict[str, str] = {}  # of the well-known names that are called or subscribed to; "": nobody
        self._subscriptions: dict[tuple[str, str], list[tuple[Match, SignalHandler]]] = {}  # by interface and member
        self.waiting: set[asyncio.Event] = set()  # for a name to vanish
        self._uids: dict[str, int] = {}

    # --- calls ---

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
        answerers = self._answerers(destination)
        serial = self._send_call(destination, path, interface, member, signature, body, flags)
        self.asked[serial] = _Asked(destination, answerers, lambda message: _settle(future, message))
        try:
            async with asyncio.timeout(timeout):
                return await future
        finally:
            self.asked.pop(serial, None)

    def tell(
        self, destination: str, path: str, interface: str, member: str, signature: str = "", body: Sequence[Any] = ()
    ) -> None:
        """Calls a method of somebody else without caring for an answer; nothing happens if the bus is gone."""
        with contextlib.suppress(BusCallError):
            self._send_call(destination, path, interface, member, signature, body, MessageFlag.NO_REPLY_EXPECTED)

    async def ask_driver(
        self, member: str, signature: str = "", body: Sequence[Any] = (), timeout: float | None = None
    ) -> list[Any]:
        """Calls a method of the bus itself. Raises BusCallError as `call` does, and TimedOut.

        Under a flood of strangers its answer waits, too, behind all that came before.
        """
        try:
            return await self.call(
                BUS_DRIVER, BUS_DRIVER_PATH, BUS_DRIVER, member, signature, body, timeout=timeout or DRIVER_TIMEOUT
            )
        except TimeoutError:
            raise errors.TimedOut("The message bus does not answer hostpassd: try again.") from None

    async def uid_of(self, sender: str) -> int:
        """The user id of the caller SENDER, which may be gone if it was asked for before.

        Raises Cancelled if it is gone, BusCallError if the bus does not know, TimedOut if it does not answer.
        """
        if sender in self._uids:
            return self._uids[sender]
        try:
            [uid] = await self.ask_driver("GetConnectionUnixUser", "s", [sender])
        except BusCallError as error:
            if error.name == NAME_HAS_NO_OWNER:
                raise errors.Cancelled("The caller is gone.") from error
            raise
        if len(self._uids) >= SENDERS_KEPT:
            self._uids.clear()
        self._uids[sender] = int(uid)
        return int(uid)

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
        serial = self._send(
            MessageType.METHOD_CALL,
            flags=flags.value,
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=self._wire.marshal(signature, body),
        )
        if not serial:
            raise BusCallError(DISCONNECTED, "There is no connection to the bus.")
        return serial

    # --- who may answer ---

    def _answerers(self, destination: str) -> set[str]:
        """Who may answer a call to DESTINATION that is sent now; whoever owns it later is added then."""
        if destination == BUS_DRIVER or destination.startswith(":"):
            return {BUS_DRIVER, destination}
        return {BUS_DRIVER, self._owner_of(destination)} - {""}

    def _owner_of(self, name: str) -> str:
        """Returns the owner of the well-known NAME. The first call subscribes to its changes of owner.

        Nothing needs waiting for: the bus deals with what we send in order, so its answer and what it tells of later
        owners come before what any of them answers.
        """
        if name not in self._owners:
            self._owners[name] = ""
            match = Match(BUS_DRIVER, BUS_DRIVER, "NameOwnerChanged", BUS_DRIVER_PATH, arg0=name)
            self._listen(match, lambda body: self._is_owned(name, body[2]))
            driver = (BUS_DRIVER, BUS_DRIVER_PATH, BUS_DRIVER)
            self.tell(*driver, "AddMatch", "s", [match.rule])
            with contextlib.suppress(BusCallError):
                serial = self._send_call(*driver, "GetNameOwner", "s", [name], MessageFlag.NONE)
                self.asked[serial] = _Asked(BUS_DRIVER, {BUS_DRIVER}, lambda answer: self._learn(name, answer))
        return self._owners[name]

    def _learn(self, name: str, answer: Incoming) -> None:
        if answer.kind is MessageType.METHOD_RETURN:
            [owner] = read(answer)
            self._is_owned(name, owner)

    def _is_owned(self, name: str, owner: str) -> None:
        self._owners[name] = owner
        for asked in self.asked.values():
            if owner and asked.destination == name:
                asked.answerers.add(owner)

    # --- signals ---

    @contextlib.asynccontextmanager
    async def subscribe(self, match: Match, handler: SignalHandler) -> AsyncIterator[None]:
        """Inside, HANDLER hears the signals of MATCH. Raises as `ask_driver`."""
        if not match.sender.startswith(":") and match.sender != BUS_DRIVER:
            self._owner_of(match.sender)
        self._listen(match, handler)
        try:
            await self.ask_driver("AddMatch", "s", [match.rule])
            yield
        finally:
            # The bus counts equal rules, so each goes with the subscription that it came for.
            self.tell(BUS_DRIVER, BUS_DRIVER_PATH, BUS_DRIVER, "RemoveMatch", "s", [match.rule])
            self._subscriptions[match.interface, match.member].remove((match, handler))

    def _listen(self, match: Match, handler: SignalHandler) -> None:
        self._subscriptions.setdefault((match.interface, match.member), []).append((match, handler))

    @contextlib.asynccontextmanager
    async def vanished(self, sender: str) -> AsyncIterator[asyncio.Event]:
        """Inside, an event that is set once the unique name SENDER or the bus is gone; at once if it is already."""
        event = asyncio.Event()
        match = Match(BUS_DRIVER, BUS_DRIVER, "NameOwnerChanged", BUS_DRIVER_PATH, arg0=sender)
        self.waiting.add(event)
        try:
            async with self.subscribe(match, lambda body: None if body[2] else event.set()):
                [there] = await self.ask_driver("NameHasOwner", "s", [sender])
                if not there:
                    event.set()
                yield event
        finally:
            self.waiting.remove(event)

    # --- what comes in ---

    def on_reply(self, message: Incoming) -> None:
        """Takes the answer to a call of ours; one that nobody waits for, or from somebody else, costs nothing."""
        asked = self.asked.get(message.reply_serial)
        if asked is None or message.sender not in asked.answerers:
            self._counters["replies-not-wanted"] += 1
            return
        del self.asked[message.reply_serial]
        asked.settle(message)

    def on_signal(self, message: Incoming) -> None:
        """Takes a signal; one that nobody subscribed to, or from somebody else, costs nothing."""
        subscriptions = self._subscriptions.get((message.interface, message.member), ())
        wanted = [(match, handler) for match, handler in subscriptions if self._is_of(message, match)]
        if not wanted:
            self._counters["signals-not-wanted"] += 1
            return
        body = read(message)
        for match, handler in wanted:
            if not match.arg0 or body[:1] == [match.arg0]:
                handler(body)

    def _is_of(self, message: Incoming, match: Match) -> bool:
        sender = self._owners.get(match.sender, match.sender)
        return bool(sender) and message.sender == sender and match.path in ("", message.path)

    def on_disconnect(self) -> None:
        """Nothing comes any more: whoever waits hears that the bus is gone."""
        asked, self.asked = self.asked, {}
        gone = Incoming(MessageType.ERROR, 0, 0, error_name=DISCONNECTED, fault=Unreadable("The bus is gone."))
        for call in asked.values():
            call.settle(gone)
        for event in self.waiting:
            event.set()


def _settle(future: asyncio.Future[list[Any]], answer: Incoming) -> None:
    """Has FUTURE come to the ANSWER."""
    if future.done():
        return
    try:
        body = read(answer)
    except Unreadable as error:
        future.set_exception(BusCallError(answer.error_name or INCONSISTENT, str(error)))
        return
    if answer.kind is MessageType.ERROR:
        text = body[0] if answer.signature.startswith("s") else ""
        future.set_exception(BusCallError(answer.error_name, text))
    else:
        future.set_result(body)
