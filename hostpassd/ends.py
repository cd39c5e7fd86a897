"""The outer ends of a daemon: all that it hears of and acts on. The real ones, or simulated ones in tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from hostpassd.bus.connection import Connection
from hostpassd.config import Config
from hostpassd.host import host
from hostpassd.host.udev import Armed
from hostpassd.machines import hypervisor
from hostpassd.machines.stored import StoredWatch, folder_of
from hostpassd.model.events import Event
from hostpassd.passthrough.steps import Libvirt


class Host(Protocol):
    """The host's devices and what the host uses them for. Each call returns after its events were emitted."""

    async def start(self) -> None: ...
    async def scan(self) -> Any: ...
    async def settled(self, deadline: float) -> None: ...
    async def read_uses(self) -> Any: ...


class Hypervisor(Libvirt, Protocol):
    """One libvirt: its machines, and changes to them."""

    async def run(self) -> None: ...
    async def refresh(self) -> None: ...


class Inlet:
    """The one way in for events. An event that comes before a daemon has opened it is a fault."""

    def __init__(self) -> None:
        self._take: Callable[[Event], None] | None = None

    def open(self, take: Callable[[Event], None]) -> None:
        """From now on events go to TAKE."""
        self._take = take

    def emit(self, event: Event) -> None:
        """Tells EVENT, on the loop."""
        assert self._take, "an event before there is a daemon"
        self._take(event)


@dataclasses.dataclass(frozen=True, slots=True)
class Ends:
    """What a daemon is joined to. The host and the hypervisors tell what happens to `inlet`."""

    inlet: Inlet
    host: Host
    hypervisors: Mapping[str, Hypervisor]  # by URI
    watch: Callable[[str], None]  # begins to watch the stored configurations of the hypervisor with that URI
    state_folder: Path
    bus_address: str | None = None  # None: the system bus
    connection: Callable[..., Any] = Connection  # to the bus, see there

    @classmethod
    def real(cls, config: Config, state_folder: Path, bus_address: str | None, armed: Armed | None = None) -> Ends:
        """This host's. ARMED: its uevents are listened to already. To be made on the running loop."""
        inlet = Inlet()
        hypervisors = {uri: hypervisor.Hypervisor(uri, inlet.emit) for uri in config.hypervisors}

        def watch(uri: str) -> None:
            if folder := folder_of(uri):
                StoredWatch(hypervisors[uri], folder)

        return cls(
            inlet, host.Host(inlet.emit, str(state_folder), armed), hypervisors, watch, state_folder, bus_address
        )
