"""A private system bus with the shipped policy, a real polkitd on it, and callers with user ids of their own.

Needs root. Every process is ended by whoever started it, through its handle. Run as a program this file is such a
caller: see `Client`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

from dbus_next import Message, MessageFlag, MessageType, Variant
from dbus_next.aio import MessageBus

PROJECT = Path(__file__).resolve().parents[2]
SHIPPED_POLICY = PROJECT / "dbus" / "org.hostpassd1.conf"
SHIPPED_ACTIONS = PROJECT / "dbus" / "org.hostpassd1.policy"

POLKIT_POLICY = Path("/usr/share/dbus-1/system.d/org.freedesktop.PolicyKit1.conf")
ACTIONS = Path("/usr/share/polkit-1/actions")
RULES = Path("/etc/polkit-1/rules.d")
POLKITD = "/usr/lib/polkit-1/polkitd"

# The two message buses of the world, and how the second is started. It is not installed, which would have it take the
# place of the host's own bus: `./dev test` unpacks it.
DBUS_DAEMON, DBUS_BROKER = "dbus-daemon", "dbus-broker"
BECOME_BROKER = Path(__file__).with_name("broker.py")
BROKER_UNPACKED = [os.environ[key] for key in ("HOSTPASSD_DBUS_BROKER",) if key in os.environ]
OWN_MOUNTS = ["unshare", "--mount", "--propagation", "private"]

DRIVER = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
AUTHORITY = (
    "org.freedesktop.PolicyKit1",
    "/org/freedesktop/PolicyKit1/Authority",
    "org.freedesktop.PolicyKit1.Authority",
)
AGENT = "org.freedesktop.PolicyKit1.AuthenticationAgent"

# Seconds after which a test that waits has failed. No test may count on less: machines are as slow as they are.
PATIENCE = 60

# What Debian's system bus has; and the user who runs it, as whom the daemon's parts run too, may own our name, stand in
# for polkit and call agents. polkit's policy comes with polkitd: where that is not installed, the bus does without.
BUS_CONFIGURATION = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
  </policy>
  <include>{policy}</include>
  <include ignore_missing="yes">{polkit}</include>
  <policy user="{uid}">
    <allow own="org.hostpassd1"/>
    <allow own="org.freedesktop.PolicyKit1"/>
    <allow send_destination="org.freedesktop.PolicyKit1"/>
    <allow send_interface="org.freedesktop.PolicyKit1.AuthenticationAgent"/>
  </policy>
</busconfig>
"""

# What a new file of rules lets polkitd's own user do, to see that it is in force.
PROBE_RULE = """
polkit.addRule(function(action, subject) {{
    return action.lookup("probe") == "{probe}" ? polkit.Result.YES : polkit.Result.NOT_HANDLED;
}});
"""


class BusDidNotStart(Exception):
    """The bus ended before it listened; why, in its own words."""


def brokers() -> tuple[list[str], str]:
    """The message buses that tests can run on here and, where that is not all of them, why."""
    if os.getuid() != 0:
        return [DBUS_DAEMON], f"{DBUS_BROKER} needs root"
    if subprocess.run([*OWN_MOUNTS, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        return [DBUS_DAEMON], f"{DBUS_BROKER} needs a mount namespace, which cannot be made here"
    return [DBUS_DAEMON, DBUS_BROKER], ""


class PrivateBus:
    """A bus of its own, of type system, under POLICY (the shipped one), served by BROKER. A context manager."""

    def __init__(self, policy: Path = SHIPPED_POLICY, broker: str = DBUS_DAEMON) -> None:
        self._policy = policy
        self._broker = broker
        self.address = ""

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="hostpassd-bus-"))
        self._folder.chmod(0o755)  # callers with other user ids reach the socket
        self._configuration = self._folder / "bus.conf"
        self._configuration.write_text(
            BUS_CONFIGURATION.format(
                socket=self._folder / "socket", policy=self._policy, polkit=POLKIT_POLICY, uid=os.getuid()
            ),
            encoding="utf-8",
        )
        started = self._start_broker() if self._broker == DBUS_BROKER else self._start_daemon()
        if not started:
            said = (self._folder / "words").read_text(encoding="utf-8").strip()
            self.__exit__()
            raise BusDidNotStart(f"{self._broker} did not start: {said}")
        return self

    def _start_daemon(self) -> bool:
        command = ["dbus-daemon", "--nofork", "--nopidfile", "--nosyslog", f"--config-file={self._configuration}"]
        self._spawn([*command, "--print-address"])
        assert self.process.stdout
        self.address = self.process.stdout.readline().strip()
        return bool(self.address)

    def _start_broker(self) -> bool:
        with socket.socket(socket.AF_UNIX) as bus, socket.socket(socket.AF_UNIX) as client:
            bus.bind(str(self._folder / "socket"))
            (self._folder / "socket").chmod(0o666)
            bus.listen(128)
            command = [sys.executable, "-B", str(BECOME_BROKER), str(bus.fileno()), str(self._configuration)]
            self._spawn([*OWN_MOUNTS, *command, *BROKER_UNPACKED], bus.fileno())
            bus.close()
            self.address = f"unix:path={self._folder / 'socket'}"
            client.settimeout(PATIENCE)
            client.connect(str(self._folder / "socket"))
            with contextlib.suppress(ConnectionError):
                client.sendall(b"\0AUTH\r\n")  # answered once it serves; hung up on if it ends before
                return bool(client.recv(1))
        return False

    def _spawn(self, command: list[str], *passed: int) -> None:
        # setpriv: a test run that is killed takes its bus along, and that takes its polkitd along.
        with (self._folder / "words").open("w", encoding="utf-8") as stderr:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,  # Ctrl-C at a terminal is not for the bus
                pass_fds=passed,
            )

    def __exit__(self, *_: object) -> None:
        self.stop()
        assert self.process.stdout
        self.process.stdout.close()
        shutil.rmtree(self._folder)

    def stop(self) -> None:
        """The bus is gone for everybody on it."""
        _end(self.process)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.terminate()
    process.wait(PATIENCE)


class Polkit:
    """The system's polkitd on a private bus, with the shipped actions. An async context manager.

    RULES is JavaScript for /etc/polkit-1/rules.d. The actions are put into the system's folder where they are missing
    or others, for that is the only one polkitd reads, and what was there before is put back.
    """

    def __init__(self, bus: PrivateBus, rules: str = "", actions: Path = SHIPPED_ACTIONS) -> None:
        self._bus = bus
        self._rules = rules
        self._actions = actions
        self._undo = contextlib.ExitStack()
        self._rule_files = 0

    async def __aenter__(self) -> Self:
        _sweep()
        with contextlib.ExitStack() as undo:
            self._place(undo, ACTIONS / self._actions.name, self._actions.read_text(encoding="utf-8"))
            self._place(undo, self._rule_file(), self._rules)
            self._connection = await MessageBus(bus_address=self._bus.address).connect()
            undo.callback(hang_up, self._connection)
            self._changed = asyncio.Event()
            self._connection.add_message_handler(self._hear)
            await self.ask(*DRIVER, "AddMatch", "s", [f"type='signal',interface='{AUTHORITY[2]}'"])
            await self.ask(*DRIVER, "AddMatch", "s", [f"member='NameOwnerChanged',arg0='{AUTHORITY[0]}'"])
            self.process = subprocess.Popen(
                [POLKITD],
                env=os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": self._bus.address},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            undo.callback(self.stop)
            await self._until(self._is_there)
            self._undo = undo.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._undo.close()

    def stop(self) -> None:
        """polkitd is gone from the bus; nothing starts it again."""
        _end(self.process)

    def freeze(self) -> None:
        """polkitd does not answer any more."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It answers again."""
        self.process.send_signal(signal.SIGCONT)

    async def rule(self, script: str) -> None:
        """Adds rules, JavaScript, and returns when polkitd goes by them."""
        file = self._rule_file()
        script = PROBE_RULE.format(probe=file.name) + script
        self._changed.clear()
        self._place(self._undo, file, script)
        await self._until(lambda: self._goes_by(file.name))

    async def authenticate(self, uid: int, cookie: str) -> None:
        """What the setuid helper of an agent of UID does after a good password: root's for the prompt of COOKIE."""
        body = [uid, cookie, ["unix-user", {"uid": Variant("u", 0)}]]
        await self.ask(*AUTHORITY, "AuthenticationAgentResponse2", "us(sa{sv})", body)

    async def ask(self, destination: str, path: str, interface: str, member: str, signature: str, body: Any) -> Any:
        """Calls as root; returns the reply's body."""
        message = Message(destination, path, interface, member, signature=signature, body=body)
        reply = await asyncio.wait_for(self._connection.call(message), PATIENCE)
        assert reply.message_type is MessageType.METHOD_RETURN, f"{reply.error_name}: {reply.body}"
        return reply.body

    async def _until(self, true: Callable[[], Awaitable[bool]]) -> None:
        """Asks again at each of polkitd's signals: one new file can make it say Changed more than once."""
        async with asyncio.timeout(PATIENCE):
            while not await true():
                await self._changed.wait()
                self._changed.clear()

    async def _is_there(self) -> bool:
        [there] = await self.ask(*DRIVER, "NameHasOwner", "s", [AUTHORITY[0]])
        return bool(there)

    async def _goes_by(self, probe: str) -> bool:
        uid = os.stat(f"/proc/{self.process.pid}").st_uid
        subject = ["unix-process", process_details(self.process.pid, uid)]
        body = [subject, "org.hostpassd1.assign", {"probe": probe}, 0, ""]
        [[authorized, _, _]] = await self.ask(*AUTHORITY, "CheckAuthorization", "(sa{sv})sa{ss}us", body)
        return bool(authorized)

    def _rule_file(self) -> Path:
        self._rule_files += 1
        return RULES / f"00-hostpassd-test-{os.getpid()}-{self._rule_files}.rules"

    def _place(self, undo: contextlib.ExitStack, target: Path, text: str) -> None:
        old = target.read_text(encoding="utf-8") if target.exists() else None
        if text != old:
            _write(target, text)
            undo.callback(target.unlink if old is None else lambda: _write(target, old))

    def _hear(self, message: Any) -> None:
        if message.member in ("Changed", "NameOwnerChanged"):
            self._changed.set()


def hang_up(connection: Any) -> None:
    """Leaves the bus, and closes the socket, which dbus-next would leave to the garbage collector."""
    asyncio.get_running_loop().remove_reader(connection._fd)
    connection._stream.close()
    connection._sock.close()


def _sweep() -> None:
    """Takes away the rules of test runs that were killed."""
    for file in RULES.glob("00-hostpassd-test-*"):
        if not Path("/proc", file.name.split("-")[3]).exists():
            file.unlink()


def _write(target: Path, text: str) -> None:
    # polkitd must not see it half written.
    other = target.with_suffix(".new")
    other.write_text(text, encoding="utf-8")
    other.chmod(0o644)
    other.rename(target)


def process_details(pid: int, uid: int) -> dict[str, Any]:
    """What polkit wants to be told of a process as a subject."""
    start = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    return {"pid": Variant("u", pid), "start-time": Variant("t", start), "uid": Variant("i", uid)}


class Refused(Exception):
    """An error reply."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message


@dataclasses.dataclass(frozen=True)
class Heard:
    """A signal, a call to the agent, or a reply (`member` is ""), in the order in which they came."""

    kind: str  # signal, agent, reply
    path: str = ""
    interface: str = ""
    member: str = ""
    body: Any = None
    signature: str = ""


class Client:
    """A process of user UID with a connection of its own: a caller, and a polkit agent if told so."""

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.name = ""
        self.heard: list[Heard] = []
        self._news = asyncio.Condition()
        self._answers: dict[int, asyncio.Future[Any]] = {}

    async def start(self, address: str) -> None:
        """Starts the process and connects it to the bus at ADDRESS."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            address,
            str(self.uid),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=2**28,
        )
        self._reading = asyncio.create_task(self._read())
        await self.wait_for(lambda heard: heard.kind == "hello")
        self.name = self.heard.pop(0).body

    async def stop(self) -> None:
        """Ends the process; the bus sees its name go."""
        if self.process.returncode is None:
            self.process.terminate()
        await self.process.wait()
        await self._reading

    async def call(
        self,
        path: str,
        interface: str | None,
        member: str,
        signature: str = "",
        *body: Any,
        destination: str = "org.hostpassd1",
        interactive: bool = False,
    ) -> Any:
        """Calls a method and returns the body of the reply, variants as {"v": [signature, value]}. Raises Refused."""
        answer = self.begin(path, interface, member, signature, *body, destination=destination, interactive=interactive)
        return await asyncio.wait_for(answer, PATIENCE)

    def begin(
        self,
        path: str,
        interface: str | None,
        member: str,
        signature: str = "",
        *body: Any,
        destination: str = "org.hostpassd1",
        interactive: bool = False,
        no_reply: bool = False,
    ) -> asyncio.Future[Any]:
        """Sends a call; the future is its reply's body or Refused."""
        return self._order(
            "call",
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
            flags=interactive * 4 + no_reply,
        )

    async def match(self, rule: str = "type='signal',sender='org.hostpassd1'") -> None:
        """From now on hears the signals of RULE."""
        await self.call(DRIVER[1], DRIVER[2], "AddMatch", "s", rule, destination=DRIVER[0])

    async def send_raw(self, data: bytes) -> None:
        """Puts DATA on the wire as it is. Returns when the bus has read it or hung up."""
        await self._order("raw", data=list(data), answered=0)

    async def call_raw(self, data: bytes, serial: int) -> Any:
        """Puts DATA on the wire as it is, a call of SERIAL; returns the body of its reply. Raises Refused."""
        return await asyncio.wait_for(self._order("raw", data=list(data), answered=serial), PATIENCE)

    async def be_agent(self, subject: Client) -> None:
        """Registers as the polkit agent of SUBJECT's process; both must have one user id."""
        await self._order("agent", pid=subject.process.pid)

    async def answer_prompt(self, ok: bool) -> None:
        """The agent ends its oldest prompt: authenticated (for which see `Polkit.authenticate`) or dismissed."""
        await self._order("answer", ok=ok)

    async def wait_for(self, wanted: Any, count: int = 1) -> list[Heard]:
        """The first COUNT of what was heard that WANTED (a function, or a member's name) holds for."""
        matches = wanted if callable(wanted) else lambda heard: heard.member == wanted

        def found() -> list[Heard]:
            return [heard for heard in self.heard if matches(heard)][:count]

        async with asyncio.timeout(PATIENCE), self._news:
            await self._news.wait_for(lambda: len(found()) >= count)
        return found()

    def _order(self, what: str, **details: Any) -> asyncio.Future[Any]:
        number = len(self._answers) + 1
        future = self._answers[number] = asyncio.get_running_loop().create_future()
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"id": number, "do": what, **details}).encode() + b"\n")
        return future

    async def _read(self) -> None:
        assert self.process.stdout
        async for line in self.process.stdout:
            told = json.loads(line)
            self._settle(told.pop("id", None), told)
            async with self._news:
                self.heard.append(Heard(**{key: told[key] for key in told if key not in ("error", "message")}))
                self._news.notify_all()
        for future in self._answers.values():
            future.cancel()

    def _settle(self, number: int | None, told: dict[str, Any]) -> None:
        future = self._answers.get(number) if number else None
        if future and not future.done():
            if "error" in told:
                future.set_exception(Refused(told["error"], told["message"]))
            else:
                future.set_result(told["body"])


class _Caller:
    """The other side of `Client`, in its process: orders come as JSON lines, what is heard goes out as such."""

    def __init__(self, bus: Any) -> None:
        self._bus = bus
        self._calls: dict[int, int] = {}  # numbers of orders by serial
        self._prompts: list[Any] = []
        bus.add_message_handler(self._hear)

    async def obey(self) -> None:
        """Does what is ordered until nobody orders any more."""
        reader = asyncio.StreamReader(limit=2**28)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        _tell(kind="hello", body=self._bus.unique_name)
        async for line in reader:
            order = json.loads(line)
            await getattr(self, "_do_" + order.pop("do"))(**order)

    async def _do_call(self, id: int, flags: int, body: Any, **fields: Any) -> None:
        message = Message(**fields, body=_from_json(body), flags=MessageFlag(flags), serial=self._bus.next_serial())
        self._calls[message.serial] = id
        await self._bus.send(message)
        if flags & 1:
            _tell(id=id, kind="sent", body=None)

    async def _do_raw(self, id: int, data: list[int], answered: int) -> None:
        loop = asyncio.get_running_loop()
        self._calls[answered] = id
        await loop.sock_sendall(self._bus._sock, bytes(data))
        if not answered:
            _tell(id=id, kind="sent", body=None)

    async def _do_agent(self, id: int, pid: int) -> None:
        body = [["unix-process", process_details(pid, os.getuid())], "C", "/agent"]
        await self._do_call(
            id, 0, _to_json(body), **_to(*AUTHORITY, "RegisterAuthenticationAgent"), signature="(sa{sv})ss"
        )

    async def _do_answer(self, id: int, ok: bool) -> None:
        prompt = self._prompts.pop(0)
        cancelled = "org.freedesktop.PolicyKit1.Error.Cancelled"
        await self._bus.send(
            Message.new_method_return(prompt) if ok else Message.new_error(prompt, cancelled, "dismissed")
        )
        _tell(id=id, kind="sent", body=None)

    def _hear(self, message: Any) -> Any:
        body, signature = _to_json(message.body), message.signature
        match message.message_type:
            case MessageType.SIGNAL if message.member not in ("NameAcquired", "NameLost"):
                _tell(
                    kind="signal",
                    path=message.path,
                    interface=message.interface,
                    member=message.member,
                    body=body,
                    signature=signature,
                )
            case MessageType.METHOD_RETURN if message.reply_serial in self._calls:
                _tell(id=self._calls[message.reply_serial], kind="reply", body=body, signature=signature)
            case MessageType.ERROR if message.reply_serial in self._calls:
                _tell(
                    id=self._calls[message.reply_serial],
                    kind="reply",
                    error=message.error_name,
                    message=message.body[0],
                )
            case MessageType.METHOD_CALL if message.interface == AGENT:
                return self._prompt(message, body)
        return None

    def _prompt(self, message: Any, body: Any) -> Any:
        _tell(kind="agent", member=message.member, body=body)
        if message.member == "BeginAuthentication":
            self._prompts.append(message)
            return True
        return Message.new_method_return(message)


def _to(destination: str, path: str, interface: str, member: str) -> dict[str, str]:
    return {"destination": destination, "path": path, "interface": interface, "member": member}


def _tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def _to_json(value: Any) -> Any:
    match value:
        case Variant():
            return {"v": [value.signature, _to_json(value.value)]}
        case bytes():
            return list(value)
        case list():
            return [_to_json(item) for item in value]
        case dict():
            return {key: _to_json(item) for key, item in value.items()}
    return value


def _from_json(value: Any) -> Any:
    match value:
        case {"v": [signature, inner], **rest} if not rest:
            return Variant(signature, _from_json(inner))
        case list():
            return [_from_json(item) for item in value]
        case dict():
            return {key: _from_json(item) for key, item in value.items()}
    return value


async def _be_caller(address: str, uid: int) -> None:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    caller = _Caller(await MessageBus(bus_address=address).connect())
    await caller.obey()


if __name__ == "__main__":
    asyncio.run(_be_caller(sys.argv[1], int(sys.argv[2])))
