"""A whole daemon for the logic's tests, without a bus or a host."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hostpassd import errors, names
from hostpassd.model.device import Device
from hostpassd.model.events import DevicesScanned, Event
from hostpassd.passthrough.jobs import RunningJob
from hostpassd.passthrough.permission import Check
from hostpassd.passthrough.request import Options
from tests.sim.ends import daemon_on, simulated
from tests.sim.world import REQUESTS, URI, Libvirt, machine, pci, usb

PAIR = (pci("0000:04:01.0", group=5), pci("0000:04:02.0", group=5, driver="snd", code=0x040100))
STICK = usb("1-1", number=3)
HUB = usb("1-2", number=4, device_class=9)
CALLER = 1000


class House:
    """A whole daemon without a bus, on a simulated hypervisor, and the journal it writes to."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._journal.bind(str(folder / "socket"))
        monkeypatch.setattr("hostpassd.audit.JOURNAL", str(folder / "socket"))
        hypervisors: dict[str, Any] = {URI: None}
        ends = simulated(folder, hypervisors=hypervisors)
        self.daemon, self._tell = daemon_on(ends), ends.inlet.emit
        self._tell(DevicesScanned((*PAIR, STICK, HUB)))
        self.libvirt = hypervisors[URI] = Libvirt(self.daemon.state.devices.values(), self._tell, machine())
        self.daemon.announce_running()

    def emit(self, event: Event) -> None:
        """Tells the daemon of something outside."""
        self.libvirt.host_told.hear(event)
        self._tell(event)

    def close(self) -> None:
        self._journal.close()

    def records(self) -> list[dict[str, str]]:
        """What was written since the last call, without the prefix and what all records have."""
        found: list[dict[str, str]] = []
        while True:
            try:
                lines = self._journal.recv(65536).decode().splitlines()
            except BlockingIOError:
                return found
            row = {name.removeprefix("HOSTPASSD_"): value for name, _, value in (line.partition("=") for line in lines)}
            row["KIND"] = {names.MESSAGE_OPERATION: "operation", names.MESSAGE_FOREIGN_CHANGE: "foreign"}[
                row.pop("MESSAGE_ID")
            ]
            assert (row.pop("PRIORITY"), row.pop("SYSLOG_IDENTIFIER")) == ("5", "hostpassd")
            found.append(row)

    async def start(self, operation: str, device: Device, denied: bool = False) -> RunningJob:
        async def authorise(checks: Sequence[Check]) -> None:
            if denied:
                raise errors.NotAuthorized("no")

        request = REQUESTS[operation]("vm", (device.name,), Options(timeout=5), CALLER)
        return await self.daemon.operations.start(request, authorise)

    async def do(self, operation: str, device: Device) -> RunningJob:
        control = await self.start(operation, device)
        await control.ended.wait()
        return control

    async def put_in_order(self) -> None:
        """Waits until what jobs left is looked after."""
        while busy := self.daemon.operations.upkeep.tasks:
            await asyncio.wait(busy)
