"""What the loop of the daemon does on a simulated host with 2,000 devices, here and not in the lab. It only prints."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.bus.busd import Client, PrivateBus, brokers
from tests.bus.mockhost import MockHost
from tests.bus.test_daemon import Daemon, wait_for_name
from tests.bus.test_floods import Measured

ROOT, MANAGER_PATH, MANAGER = "/org/hostpassd1", "/org/hostpassd1/manager", "org.hostpassd1.Manager"
DEVICES, PLANS = 2000, 300


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[tuple[Client, Measured]]:
    """A caller that is root, on dbus-broker where that is here, and what it calls."""
    with PrivateBus(broker=brokers()[0][-1]) as bus, MockHost() as host:
        host.big_tree(DEVICES)
        arguments = Daemon(bus, host, tmp_path).arguments
        measured = Measured(tmp_path, "daemon", *arguments, environment=host.environment())
        caller = Client(0)
        await caller.start(bus.address)
        await measured.start()
        await wait_for_name(caller)
        yield caller, measured
        await caller.stop()
        await measured.stop()


async def test_the_longest_turn_of_the_loop(client: tuple[Client, Measured]) -> None:
    caller, measured = client
    [objects] = await caller.call(ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
    resident = (await measured.ask())["resident"]
    print(f"\n{len(objects)} objects, {resident / 1e6:.1f} MB resident")
    begun = time.monotonic()
    plans = [
        caller.begin(MANAGER_PATH, MANAGER, "PlanAssign", "sasa{sv}", "demo", [f"0001:{n >> 5:02x}:{n & 31:02x}.0"], {})
        for n in range(PLANS)
    ]
    answers = await asyncio.gather(*plans, return_exceptions=True)
    await tell(measured, f"{PLANS} plans at once, {sum(isinstance(a, list) for a in answers)} answered", begun)
    begun = time.monotonic()
    [rows] = await caller.call(MANAGER_PATH, MANAGER, "ListCandidates", "sa{sv}", "demo", {})
    await tell(measured, f"ListCandidates, {len(rows)} rows", begun)


async def tell(measured: Measured, what: str, begun: float) -> None:
    """Prints what was measured since it was asked last."""
    took, told = time.monotonic() - begun, await measured.ask()
    longest = told["longest_cpu"] * 1e3
    print(f"{what}: {took * 1e3:.0f} ms, {told['turns']:.0f} turns, the longest {longest:.1f} ms of work")
