"""The message bus as the daemon's connection sees it, and a client that folds what it hears and checks its order."""

from __future__ import annotations

import asyncio
import dataclasses
import io
from collections.abc import Callable
from typing import Any

from dbus_next import Message, MessageFlag, MessageType, Variant
from dbus_next._private.unmarshaller import Unmarshaller

from hostpassd import names
from hostpassd.bus.connection import Inbox, Incoming

DRIVER = "org.freedesktop.DBus"
POLKIT, POLKITS_OWNER = "org.freedesktop.PolicyKit1", ":1.3"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"

Tree = dict[str, dict[str, dict[str, Any]]]


@dataclasses.dataclass
class Reply:
    """A call of the client and, once it is there, its answer."""

    member: str
    body: list[Any] | None = None
    error: str = ""

    @property
    def there(self) -> bool:
        """Whether the answer has come."""
        return self.body is not None


class Bus:
    """Takes the place of a router's connection: real bytes go in, and are answered as dbus-daemon and polkit would.

    `prompting`: polkit wants passwords, and its prompts wait for `answer_prompts`. `client` hears every signal,
    `replies` are to its calls.
    """

    congested = False
    unique_name = ""

    def __init__(
        self, address: str | None, take: Callable[[Incoming], None], relieved: Callable[[], None] | None = None
    ) -> None:
        self._take = take
        self._gone = asyncio.get_running_loop().create_future()
        self.client = Client()
        self.replies: dict[int, Reply] = {}
        self.prompting = False
        self._is_cut = False
        self._prompts: list[Message] = []

    async def open(self) -> None:
        """The daemon comes."""

    def release(self) -> None:
        """Nothing to be given back."""

    async def wait_for_disconnect(self) -> None:
        """Returns when the daemon has left, or was cut off."""
        await self._gone

    def cut(self) -> None:
        """Whoever was connected is dead: nothing of it is heard."""
        self._is_cut = True

    def queue(self, data: bytes) -> None:
        """What the daemon sends."""
        if self._is_cut:
            return
        message = Unmarshaller(io.BytesIO(data)).unmarshall()
        match message.message_type:
            case MessageType.SIGNAL:
                self.client.hear(message.path, message.interface, message.member, plain(message.body))
            case MessageType.METHOD_CALL:
                self._answer(message)
            case _:
                reply = self.replies[message.reply_serial]
                reply.body, reply.error = plain(message.body), message.error_name or ""
                self.client.check_reply(reply)

    def disconnect(self) -> None:
        """The daemon leaves."""
        if not self._gone.done():
            self._gone.set_result(None)

    def call(self, path: str, interface: str, member: str, signature: str = "", *body: Any) -> Reply:
        """The client calls the daemon."""
        serial = len(self.replies) + 1
        reply = self.replies[serial] = Reply(member)
        how = {"path": path, "interface": interface, "member": member, "signature": signature, "body": list(body)}
        flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION
        self._bring(":1.7", Message(destination=names.BUS_NAME, serial=serial, flags=flags, **how))
        return reply

    def answer_prompts(self) -> None:
        """Whoever is asked for a password gives it."""
        self.prompting = False
        prompts, self._prompts = self._prompts, []
        for message in prompts:
            self._send(message, "(bba{ss})", [[True, False, {}]])

    def _answer(self, message: Message) -> None:
        if message.destination == POLKIT and message.member == "CheckAuthorization":
            if self.prompting and message.body[3]:
                self._prompts.append(message)
            else:
                self._send(message, "(bba{ss})", [[not self.prompting, self.prompting, {}]])
            return
        match message.member:
            case "Hello":
                self._send(message, "s", [":1.2"])
            case "GetId":
                self._send(message, "s", ["0" * 32])
            case "RequestName":
                self._send(message, "u", [1])
            case "GetConnectionUnixUser":
                self._send(message, "u", [1000])
            case "NameHasOwner":
                self._send(message, "b", [True])
            case "GetNameOwner":
                self._send(message, "s", [POLKITS_OWNER])
            case "AddMatch":
                self._send(message, "", [])

    def _send(self, message: Message, signature: str, body: list[Any]) -> None:
        answer = Message.new_method_return(message, signature, body)
        answer.serial = 1
        sender = POLKITS_OWNER if message.destination == POLKIT else DRIVER
        asyncio.get_running_loop().call_soon(self._bring, sender, answer)

    def _bring(self, sender: str, message: Message) -> None:
        """MESSAGE comes from SENDER, which the bus writes into it."""
        inbox = Inbox()
        inbox.add(bytes(message._marshall()))
        incoming = inbox.next()
        assert incoming
        incoming.sender = sender
        self._take(incoming)


# In one batch: objects added, properties changed, other signals, objects removed, the Generation.
_ADDED, _CHANGED, _SIGNAL, _REMOVED, _LAST = range(5)


Row = tuple[str, str, str]  # of a hold: device, machine, kind


class Client:
    """Folds signals onto what GetManagedObjects said first; what breaks the contract goes to `complaints`."""

    def __init__(self) -> None:
        self.tree: Tree = {}
        self.holds: dict[Row, dict[str, Any]] = {}  # as the signals about holds tell them
        self.missing: set[Row] = set()  # what HoldMissing told, and is not back
        self.absent: set[str] = set()  # the machines that missed something at first
        self.complaints: list[str] = []
        self.batch: list[tuple[int, str]] = []  # stage and what was said in it, since the last Generation
        self.listens = False

    def start(self, tree: Tree) -> None:
        """Forgets what was folded, for what is there now."""
        self.tree, self.batch, self.listens = tree, [], True
        self.holds, self.missing = holds_of_devices(tree), set()
        self.absent = {path for path, faces in tree.items() if faces.get(names.MACHINE, {}).get("Missing")}

    def hear(self, path: str, interface: str, member: str, body: list[Any]) -> None:
        """Takes one signal in."""
        if not self.listens:
            return
        try:
            match member:
                case "InterfacesAdded":
                    self._stage(_CHANGED if body[0] in self.tree else _ADDED, f"{member} {body[0]} {sorted(body[1])}")
                    self._add(*body)
                case "InterfacesRemoved":
                    whole = set(body[1]) == set(self.tree[body[0]])
                    self._stage(_REMOVED if whole else _CHANGED, f"{member} {body[0]} {sorted(body[1])}")
                    self._remove(*body)
                case "PropertiesChanged":
                    self._properties(path, *body)
                case "HoldAdded" | "HoldChanged" | "HoldMissing" | "HoldRemoved":
                    self._stage(_SIGNAL, f"{member} {body}")
                    self._hold(member, *body)
                case "Completed":
                    self._stage(_SIGNAL, f"{member} {path}")
                    if self.tree[path][names.JOB]["State"] != body[0]:
                        self.complaints.append(f"{path} is Completed as {body[0]} before its State says so")
        except KeyError as error:
            self.complaints.append(f"{member} of {path} {body}: there is no {error}")

    def check_reply(self, reply: Reply) -> None:
        """Values before replies: no batch is half told, and a job that is over is told as over."""
        if self.batch:
            self.complaints.append(f"the reply of {reply.member} came within a batch: {self.batch}")
        if "fault of its own" in str(reply.body):
            self.complaints.append(f"{reply.member} found a fault: {reply.body}")
        if reply.member in ("Assign-wait", "Dismiss-wait") and not reply.error:
            assert reply.body
            state = self.tree[reply.body[0]][names.JOB]["State"]
            if state != "done":
                self.complaints.append(f"{reply.member} was answered while the job is {state}")

    def _stage(self, stage: int, what: str) -> None:
        if self.batch and self.batch[-1][0] > stage:
            self.complaints.append(f"out of order: {what} after {self.batch[-1][1]}")
        if stage in (_ADDED, _CHANGED, _REMOVED) and (stage, what) in self.batch:
            self.complaints.append(f"twice in one batch: {what}")
        self.batch.append((stage, what))

    def _add(self, path: str, interfaces: dict[str, dict[str, Any]]) -> None:
        thing = self.tree.setdefault(path, {})
        if set(thing) & set(interfaces):
            self.complaints.append(f"{path} was there already: {sorted(interfaces)}")
        thing.update(interfaces)

    def _remove(self, path: str, interfaces: list[str]) -> None:
        for name in interfaces:
            del self.tree[path][name]
        if not self.tree[path]:
            del self.tree[path]

    def _properties(self, path: str, interface: str, values: dict[str, Any], invalidated: list[str]) -> None:
        here = self.tree[path][interface]
        if same := [key for key in values if here.get(key) == values[key]]:
            self.complaints.append(f"{path} {interface}: told as changed and is not: {same}")
        if "Generation" in values:
            if values["Generation"] != here["Generation"] + 1:
                self.complaints.append(f"Generation {values['Generation']} after {here['Generation']}")
            self.batch = []
        else:
            self._stage(_CHANGED, f"PropertiesChanged {path} {interface}")
        here.update(values)

    def _hold(self, member: str, device: str, machine: str, told: dict[str, Any], before: Any = None) -> None:
        row = (device, machine, told["kind"])
        there = row in self.holds
        # What was missing before this client came has no row that it knows, and what came and went at once had none.
        lost = row in self.missing or machine in self.absent
        fits = {"HoldAdded": not there, "HoldChanged": there, "HoldRemoved": there or lost, "HoldMissing": True}
        if not fits[member]:
            self.complaints.append(f"{member} {row}, which is {'there already' if there else 'not there'}")
        if machine not in self.tree or (there and device not in self.tree):
            self.complaints.append(f"{member} {row}, which names what is not there")
        absent = {row["id"]: row for row in self.tree.get(machine, {}).get(names.MACHINE, {}).get("Missing", ())}
        if member == "HoldMissing" and absent.get(told["id"], told) != told:
            self.complaints.append(f"{member} {told}, which the machine tells as {absent[told['id']]}")
        known = self.holds.pop(row, {})
        if member == "HoldChanged" and (before != known or before == told):
            self.complaints.append(f"{member} {row} from {before} to {told}, which was {known}")
        if member in ("HoldAdded", "HoldChanged"):
            self.holds[row] = told
        (self.missing.add if member == "HoldMissing" else self.missing.discard)(row)


def holds_of_devices(tree: Tree) -> dict[Row, dict[str, Any]]:
    """Each hold as the devices tell it."""
    return {
        (path, machine, hold["kind"]): hold
        for path, interfaces in tree.items()
        if names.DEVICE in interfaces
        for machine, hold in interfaces[names.DEVICE]["Holders"]
    }


def holds_of_machines(tree: Tree) -> dict[Row, dict[str, Any]]:
    """Each hold as the machines tell it."""
    return {
        (device, path, hold["kind"]): hold
        for path, interfaces in tree.items()
        if names.MACHINE in interfaces
        for device, hold in interfaces[names.MACHINE]["Devices"]
    }


def plain(value: Any) -> Any:
    """VALUE without variants and tuples."""
    match value:
        case Variant():
            return plain(value.value)
        case list() | tuple():
            return [plain(item) for item in value]
        case dict():
            return {key: plain(item) for key, item in value.items()}
    return value
