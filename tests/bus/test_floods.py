"""Strangers who flood: the loop goes on turning, others are answered, and the memory stays what it was.

HOSTPASSD_FLOOD_SECONDS says for how long; what was measured is printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.bus import flooder
from tests.bus.busd import DRIVER, PATIENCE, PROJECT, Client, PrivateBus
from tests.bus.conftest import NewClient
from tests.bus.flooder import KINDS, MANAGER, MANAGER_PATH, PEER, PROPERTIES, ROOT
from tests.bus.mockhost import MockHost
from tests.bus.test_daemon import Daemon, wait_for_name

pytestmark = pytest.mark.flood

SECONDS = float(os.environ.get("HOSTPASSD_FLOOD_SECONDS", "3"))
WARMING = 1.0  # seconds of a flood after which the memory is what it will be
CONNECTIONS = 4
NOBODY, DAEMON = 65534, 1

# Seconds after which an answer will not come any more. A call waits in the bus behind what was sent before it, and the
# bus passes on more in a second than is read in one where other programs want the processor too.
LONG = 120

# Seconds of work in one turn of the loop. On hardware of today it is below a quarter of one; test machines are slow.
TURN = 1.0

# Bytes: calls that wait take at most 16 MiB.
GROWTH = 24 << 20


class Measured:
    """A process that runs tests.bus.measured."""

    def __init__(self, folder: Path, *command: str, environment: dict[str, str] | None = None) -> None:
        self._command = [sys.executable, "-B", "-m", "tests.bus.measured", str(folder / "told"), *command]
        self._environment = environment
        self._words = folder / "words"  # a file: nobody reads while a flood is on, and a full pipe stops who writes
        self._told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._told.bind(str(folder / "told"))
        self._told.setblocking(False)

    async def start(self) -> None:
        with self._words.open("w", encoding="utf-8") as words:
            self.process = await asyncio.create_subprocess_exec(
                *self._command,
                env={**(self._environment or os.environ), "PYTHONPATH": str(PROJECT)},
                cwd=PROJECT,
                stderr=words,
                start_new_session=True,
            )

    async def ask(self) -> dict[str, float]:
        """What it measured since it was asked last."""
        self.process.send_signal(signal.SIGUSR1)
        data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self._told, 1 << 16), PATIENCE)
        return dict(json.loads(data))

    async def stop(self) -> str:
        """Ends it; its words."""
        if self.process.returncode is None:
            self.process.terminate()
        await asyncio.wait_for(self.process.wait(), PATIENCE)
        self._told.close()
        return self._words.read_text(encoding="utf-8")


@pytest.fixture(params=["router", "daemon"])
async def target(
    request: pytest.FixtureRequest, bus: PrivateBus, tmp_path: Path, client: Client
) -> AsyncIterator[Measured]:
    """What is flooded: a router with some hundred devices, or the whole daemon."""
    with contextlib.ExitStack() as stack:
        if request.param == "daemon":
            host = stack.enter_context(MockHost())
            host.furnish()
            arguments = Daemon(bus, host, tmp_path).arguments
            made = Measured(tmp_path, "daemon", *arguments, environment=host.environment())
        else:
            made = Measured(tmp_path, "router", bus.address)
        await made.start()
        named, ended = asyncio.create_task(wait_for_name(client)), asyncio.create_task(made.process.wait())
        await asyncio.wait({named, ended}, return_when=asyncio.FIRST_COMPLETED)
        assert named.done(), await made.stop()
        ended.cancel()
        yield made
        words = await made.stop()
        assert "Traceback" not in words, words[words.index("Traceback") - 1000 :][:4000]


@contextlib.asynccontextmanager
async def flooding(bus: PrivateBus, kind: str, seconds: float) -> AsyncIterator[asyncio.subprocess.Process]:
    """Inside, nobody floods."""
    arguments = [bus.address, str(NOBODY), kind, str(seconds), str(CONNECTIONS)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-B", flooder.__file__, *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def ask_meanwhile(other: Client, flood: asyncio.subprocess.Process) -> tuple[list[float], list[float]]:
    """What another caller asks until the flood is over: how long the answers took, the daemon's and the bus's own."""
    waits, of_the_bus = [], []
    calls = [(ROOT, PEER, "Ping"), (MANAGER_PATH, PROPERTIES, "Get", "ss", MANAGER, "Generation")]
    calls.append((MANAGER_PATH, MANAGER, "FindDevices", "s", "d1"))
    while flood.returncode is None:
        for call in calls:
            waits.append(await timed(other.begin(*call)))
        of_the_bus.append(await timed(other.begin(DRIVER[1], DRIVER[2], "GetId", destination=DRIVER[0])))
        await asyncio.sleep(0.05)  # as often as a person could look
    return waits, of_the_bus


async def timed(answer: asyncio.Future[Any]) -> float:
    """How long ANSWER is in coming."""
    asked = time.monotonic()
    await asyncio.wait_for(answer, LONG)
    return time.monotonic() - asked


@pytest.mark.parametrize("kind", KINDS)
async def test_a_flood(target: Measured, bus: PrivateBus, kind: str, new_client: NewClient, broker: str) -> None:
    other = await new_client(DAEMON)
    async with flooding(bus, kind, WARMING) as flood:
        await flood.wait()
    await timed(other.begin(ROOT, PEER, "Ping"))
    before = await target.ask()
    async with flooding(bus, kind, SECONDS) as flood:
        waits, of_the_bus = await ask_meanwhile(other, flood)
        assert flood.stdout
        sent, lost = map(int, (await flood.stdout.read()).split())
    await timed(other.begin(ROOT, PEER, "Ping"))
    after = await target.ask()
    print(
        f"\n{broker}, {kind}, {SECONDS:.0f} s: {sent / SECONDS:.0f} messages/s, hung up on {lost} times; longest turn "
        f"{1000 * after['longest']:.0f} ms, {1000 * after['longest_cpu']:.0f} ms of them work; memory "
        f"{before['resident'] / 2**20:.0f} to {after['resident'] / 2**20:.0f} MiB; another's longest wait "
        f"{1000 * max(waits):.0f} ms of {len(waits)}, for the bus's own answers {1000 * max(of_the_bus):.0f} ms"
    )
    assert target.process.returncode is None
    assert len(waits) >= 3
    assert after["longest_cpu"] < TURN
    assert after["resident"] - before["resident"] < GROWTH
