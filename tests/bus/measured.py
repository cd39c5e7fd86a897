"""The daemon, or its router alone, with the turns of its loop measured, as a program:

    python3 -m tests.bus.measured SOCKET daemon [ARGUMENTS OF THE DAEMON]
    python3 -m tests.bus.measured SOCKET router ADDRESS

At a SIGUSR1 it tells SOCKET, a datagram one, what it has measured, and begins anew.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hostpassd import __main__ as program
from hostpassd import names
from hostpassd.bus.router import Batch, Call, Router
from hostpassd.bus.spec import Specification

DEVICES = 500


class MeasuredSelector(selectors.DefaultSelector):
    """What a loop waits with: a turn of the loop is from the end of one waiting to the beginning of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forgets what was measured."""
        self._woke = time.monotonic(), time.thread_time()
        self.turns, self.longest, self.longest_cpu = 0, 0.0, 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        now, cpu = time.monotonic(), time.thread_time()
        self.turns += 1
        self.longest = max(self.longest, now - self._woke[0])
        self.longest_cpu = max(self.longest_cpu, cpu - self._woke[1])
        try:
            return super().select(timeout)
        finally:
            self._woke = time.monotonic(), time.thread_time()


class Policy(asyncio.DefaultEventLoopPolicy):
    """Makes loops with SELECTOR."""

    def __init__(self, selector: MeasuredSelector) -> None:
        super().__init__()
        self._selector = selector

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop(self._selector)


def told(selector: MeasuredSelector) -> dict[str, float]:
    """What was measured, and the memory that is resident now."""
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")
    return {
        "turns": selector.turns,
        "longest": selector.longest,
        "longest_cpu": selector.longest_cpu,
        "resident": resident,
    }


async def route(address: str) -> None:
    """A router with some devices, until its bus goes or a SIGTERM comes."""
    router = Router(Specification.load(), log=logging.getLogger("hostpassd"))
    manager = {
        "Version": "1",
        "Features": [],
        "State": "running",
        "Problems": [],
        "Counters": {},
        "Hypervisors": [],
        "Generation": 0,
    }
    router.publish(Batch(added={names.MANAGER_PATH: {names.MANAGER: manager}}))
    for number in range(DEVICES):
        router.publish(Batch(added={names.device_path(f"d{number}"): {names.DEVICE: a_device()}}))

    async def find(call: Call) -> Sequence[Any]:
        return [[names.device_path("d1")] if call.args[0] == "d1" else []]

    router.handle(names.MANAGER, "FindDevices", find, quick=True)
    await router.connect(address)
    await router.own_name(names.BUS_NAME)
    await router.warm()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, router.lost.set_result, None)
    await router.lost


def a_device() -> dict[str, Any]:
    """Some value for every property of a device."""
    some = {"s": "text", "t": 1, "u": 1, "b": True, "o": "/"}
    declared = Specification.load().interfaces[names.DEVICE].properties
    return {key: some.get(of_it.signature, []) for key, of_it in declared.items()}


def main(address: str, what: str, *arguments: str) -> None:
    """The program."""
    selector = MeasuredSelector()
    asyncio.set_event_loop_policy(Policy(selector))
    teller = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    teller.connect(address)

    def tell(*_: object) -> None:
        teller.send(json.dumps(told(selector)).encode())
        selector.begin_anew()

    signal.signal(signal.SIGUSR1, tell)
    if what == "router":
        asyncio.run(route(*arguments))
    else:
        sys.argv = ["hostpassd", *arguments]
        sys.exit(program.main())


if __name__ == "__main__":
    main(*sys.argv[1:])
