"""hostpassd on a simulated host of thousands of devices: figures, printed. Nothing here fails for being slow.

It needs no lab: `./dev bench tests/bench/test_load.py`. HOSTPASSD_BENCH_DEVICES says how many devices.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.bus.busd import Client, PrivateBus, hang_up
from tests.bus.conftest import NewClient
from tests.bus.mockhost import MockHost
from tests.bus.test_daemon import DEVICES, MANAGER, MANAGER_PATH, OBJECT_MANAGER, ROOT, Daemon, wait_for_name
from tests.bus.test_floods import Measured
from tests.run_private import stand_in_for_polkit

COUNT = int(os.environ.get("HOSTPASSD_BENCH_DEVICES", "2000"))
PLANS = 300
LONG = 600  # seconds


@contextlib.asynccontextmanager
async def daemon_on(bus: PrivateBus, folder: Path, devices: int, client: Client) -> AsyncIterator[Measured]:
    """Inside, the daemon runs on a host of so many DEVICES, all marshalled, and polkit lets everybody do everything.

    CLIENT is one that has heard of no other daemon.
    """
    folder.mkdir()
    polkit = await stand_in_for_polkit(bus.address.partition(",")[0])
    with MockHost() as host:
        host.big_tree(devices)
        made = Measured(folder, "daemon", *Daemon(bus, host, folder).arguments, environment=host.environment())
        await made.start()
        await wait_for_name(client)
        await client.call(ROOT, OBJECT_MANAGER, "GetManagedObjects")
        await made.ask()
        yield made
        await made.stop()
    hang_up(polkit)


def turn(told: dict[str, float]) -> str:
    return f"longest turn {1000 * told['longest']:.1f} ms, {1000 * told['longest_cpu']:.1f} ms of them work"


async def test_many_plans_at_once(bus: PrivateBus, tmp_path: Path, new_client: NewClient, broker: str) -> None:
    caller = await new_client(0)
    async with daemon_on(bus, tmp_path / "daemon", COUNT, caller) as daemon:
        began = time.monotonic()
        names = [f"0001:{index >> 5:02x}:{index & 31:02x}.0" for index in range(PLANS)]
        calls = [caller.begin(MANAGER_PATH, MANAGER, "PlanAssign", "sasa{sv}", "demo", [name], {}) for name in names]
        answers: list[Any] = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), LONG)
        took, told = time.monotonic() - began, await daemon.ask()
    plans = [answer for answer in answers if not isinstance(answer, Exception)]
    refused = sorted({str(answer)[:80] for answer in answers if isinstance(answer, Exception)})
    print(
        f"\n{broker}, {COUNT} devices, {PLANS} PlanAssign of one client at once: {len(plans)} answered in {took:.2f} s"
    )
    print(f"{turn(told)}; {refused or 'none refused'}")
    assert plans


async def test_candidates(bus: PrivateBus, tmp_path: Path, new_client: NewClient, broker: str) -> None:
    caller = await new_client(0)
    async with daemon_on(bus, tmp_path / "daemon", COUNT, caller) as daemon:
        began = time.monotonic()
        answer = caller.begin(MANAGER_PATH, MANAGER, "ListCandidates", "sa{sv}", "demo", {})
        [rows] = await asyncio.wait_for(answer, LONG)
        took, told = time.monotonic() - began, await daemon.ask()
    print(f"\n{broker}, {COUNT} devices, ListCandidates: {len(rows)} rows in {took:.2f} s; {turn(told)}")
    assert rows[0][0][0].startswith(DEVICES)


async def test_memory_of_an_object(bus: PrivateBus, tmp_path: Path, new_client: NewClient, broker: str) -> None:
    resident = {}
    for devices in (1, COUNT + 1):
        async with daemon_on(bus, tmp_path / str(devices), devices, await new_client(0)) as daemon:
            resident[devices] = (await daemon.ask())["resident"]
    each = (resident[COUNT + 1] - resident[1]) / COUNT
    print(f"\n{broker}: {resident[COUNT + 1] / 2**20:.1f} MiB with {COUNT} devices more, {each:.0f} bytes for each")
    assert each > 0
