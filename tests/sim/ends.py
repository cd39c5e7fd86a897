"""Ends of a daemon that reach nothing outside of the process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from hostpassd.config import Config
from hostpassd.daemon import Daemon
from hostpassd.ends import Ends, Host, Hypervisor, Inlet
from tests.sim.listener import Bus


class Still:
    """A host on which nothing happens, or a hypervisor that has nothing."""

    async def start(self) -> None:
        """Nothing to be read."""

    async def scan(self) -> None:
        """Nothing to be read."""

    async def settled(self, deadline: float) -> None:
        """Nothing to wait for."""

    async def read_uses(self) -> None:
        """Nothing to be read."""

    async def run(self) -> None:
        """Nothing to be told."""

    async def refresh(self) -> None:
        """Nothing to be told."""


def simulated(
    folder: Path, *, host: Host | None = None, hypervisors: dict[str, Any] | None = None, bus: Any = Bus
) -> Ends:
    """Ends of which those that are not given are still; BUS makes the connection to a bus."""
    others: dict[str, Hypervisor] = hypervisors or {}
    return Ends(Inlet(), host or Still(), others, lambda uri: None, folder, None, bus)


def daemon_on(ends: Ends) -> Daemon:
    """A daemon joined to ENDS. To be made on the running loop."""
    asyncio.get_running_loop()
    return Daemon(Config(hypervisors=tuple(ends.hypervisors)), ends)
