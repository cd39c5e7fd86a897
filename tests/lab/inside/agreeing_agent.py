"""Calls Assign as a user who has a polkit agent that says yes. Run as root: agreeing_agent.py USER MACHINE DEVICE.

The child, as USER, registers itself as its own agent and makes the call, with interaction allowed; when polkit asks it
to authenticate, this process, as polkit's own helper would after a right password, says that it did. Prints the reply.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import sys
from pathlib import Path
from typing import Any

from dbus_next import BusType, Message, MessageFlag, MessageType, Variant
from dbus_next.aio import MessageBus

AUTHORITY = {
    "destination": "org.freedesktop.PolicyKit1",
    "path": "/org/freedesktop/PolicyKit1/Authority",
    "interface": "org.freedesktop.PolicyKit1.Authority",
}
AGENT = "org.freedesktop.PolicyKit1.AuthenticationAgent"


async def user(machine: str, device: str) -> None:
    """The caller and its agent: tells the parent each cookie, and says that it is done when the parent has answered."""
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    waiting: list[Message] = []

    def hear(message: Message) -> bool | None:
        if message.message_type is not MessageType.METHOD_CALL or message.interface != AGENT:
            return None
        if message.member == "BeginAuthentication":
            waiting.append(message)
            print(json.dumps({"cookie": message.body[4], "message": message.body[1]}), flush=True)
        else:
            bus.send(Message.new_method_return(message))
        return True

    bus.add_message_handler(hear)
    started = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
    process = {"pid": Variant("u", os.getpid()), "start-time": Variant("t", started), "uid": Variant("i", os.getuid())}
    body = [["unix-process", process], "C", "/lab/Agent"]
    await bus.call(Message(**AUTHORITY, member="RegisterAuthenticationAgent", signature="(sa{sv})ss", body=body))
    assign = Message(
        "org.hostpassd1", "/org/hostpassd1/manager", "org.hostpassd1.Manager", "Assign", signature="sasa{sv}",
        body=[machine, [device], {"timeout": Variant("u", 250)}], flags=MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION,
    )  # fmt: skip
    call = asyncio.ensure_future(bus.call(assign))
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    answered = asyncio.ensure_future(_answer(reader, bus, waiting))
    reply: Any = await call
    answered.cancel()
    print(json.dumps({"reply": reply.body, "error": reply.error_name}), flush=True)


async def _answer(reader: asyncio.StreamReader, bus: MessageBus, waiting: list[Message]) -> None:
    while await reader.readline():
        bus.send(Message.new_method_return(waiting.pop(0)))


async def root(name: str, machine: str, device: str) -> None:
    """Starts the child as user NAME, and authenticates for it."""
    account = pwd.getpwnam(name)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-B", __file__, "--user", machine, device,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, user=account.pw_uid, group=account.pw_gid,
    )  # fmt: skip
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    assert child.stdin and child.stdout
    while line := await child.stdout.readline():
        print(line.decode(), end="", flush=True)
        if cookie := json.loads(line).get("cookie"):
            body = [account.pw_uid, cookie, ["unix-user", {"uid": Variant("u", 0)}]]
            await bus.call(
                Message(**AUTHORITY, member="AuthenticationAgentResponse2", signature="us(sa{sv})", body=body)
            )
            child.stdin.write(b"done\n")
    await child.wait()


if __name__ == "__main__":
    asyncio.run(user(*sys.argv[2:]) if sys.argv[1] == "--user" else root(*sys.argv[1:]))
