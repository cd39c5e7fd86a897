"""What the host itself uses its devices for: reads it, of storage and network, and watches for changes -> events."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import select
import socket
from collections.abc import Callable, Collection, Mapping

from hostpassd.base.shared import Shared
from hostpassd.base.tasks import end_daemon_on_error
from hostpassd.host import rtnetlink
from hostpassd.host.network import elsewhere, lowest, network_uses
from hostpassd.host.reading import Files, Hung, Reader, Sysfs
from hostpassd.host.storage import BlockNode, Storage, parse_mounts, parse_swaps
from hostpassd.host.sysfs import VIRTUAL
from hostpassd.model.events import Event, HostUsesRead, Nodes, Uses

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """What the host does with its devices. `uses`: of physical devices, by sysfs path."""

    uses: Uses
    nodes: Nodes
    whole: bool = True  # False: the network changed all the while; something may be in here that was


def read_uses(state_folder: str, blocks: Mapping[str, BlockNode], nics: Collection[str], files: Files) -> Reading:
    """All uses, and what leads to the devices. Blocking, some ms. Raises OSError."""
    sysfs = Sysfs(files=files)
    mounts = parse_mounts(_read(files, "/proc/self/mountinfo"))
    swaps = parse_swaps(_read(files, "/proc/swaps"))
    storage = Storage(sysfs, mounts, swaps, state_folder, blocks, _imported_pools())
    network = rtnetlink.read()
    found = storage.uses() | elsewhere(sysfs, nics)
    for name, uses in network_uses(network).items():
        place = sysfs.real(f"class/net/{name}")
        if uses and place and not place.startswith(VIRTUAL):
            found[place] = uses
    nodes = storage.nodes() | random_generator(sysfs)
    for link in network.links:
        if (place := sysfs.real(f"class/net/{link.name}")) and place.startswith(VIRTUAL):
            below = (sysfs.real(f"class/net/{name}") for name in lowest(link, network))
            nodes[link.name] = tuple(path for path in below if path and not path.startswith(VIRTUAL))
    return Reading(found, nodes, network.whole)


def random_generator(sysfs: Sysfs) -> Nodes:
    """Finds the device behind /dev/hwrng by the driver's name for it: that tells it for virtio and TPMs only."""
    folder = "/sys/class/misc/hw_random"
    if not sysfs.names(folder):
        return {}
    current = sysfs.text(f"{folder}/rng_current")
    place = None
    if current.startswith("virtio_rng."):
        devices = [name for name in sysfs.names("/sys/bus/virtio/drivers/virtio_rng") if name.startswith("virtio")]
        place = sysfs.real(f"bus/virtio/devices/{devices[0]}") if len(devices) == 1 else None
    elif current.startswith("tpm-rng-"):
        place = sysfs.real(f"class/tpm/tpm{current.removeprefix('tpm-rng-')}")
    return {"/dev/hwrng": (place,) if place else ()}


def _imported_pools() -> list[str]:
    try:
        return [entry.name for entry in os.scandir("/proc/spl/kstat/zfs") if entry.is_dir()]
    except OSError:
        return []  # no ZFS here


def _read(files: Files, path: str) -> str:
    files.begin(path)
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read())
    except FileNotFoundError:
        return ""  # a kernel without swap has no /proc/swaps
    finally:
        files.end()


class HostUses:
    """Reads the host's uses when they change, and emits each reading.

    NODE_OF names the nearest device of the tree at or above a sysfs path. BLOCKS: all block devices, by sysfs path.
    NICS: the devices that network interfaces are or were of. STATE_FOLDER: where the daemon keeps its own state, which
    it cannot live without.
    """

    _DELAY = 0.05  # seconds that changes are gathered for
    _AGAIN = 2.0  # seconds after a reading that is not whole

    def __init__(
        self,
        emit: Callable[[Event], None],
        node_of: Callable[[str], str | None],
        blocks: Mapping[str, BlockNode],
        nics: Collection[str],
        state_folder: str,
        reader: Reader | None = None,
    ) -> None:
        self._emit = emit
        self._node_of = node_of
        self._blocks = blocks
        self._nics = nics
        self._reader = reader or Reader()
        self._state_folder = state_folder
        self._shared = Shared(self._read_now)
        self._timer: asyncio.TimerHandle | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._files: list[int] = []
        self._epoll: select.epoll | None = None
        self._routes: socket.socket | None = None

    def start(self) -> None:
        """Watch mounts, swap and the network: each change leads to a reading. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._epoll = self._watch_files()
        loop.add_reader(self._epoll.fileno(), self._files_changed)
        self._routes = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._routes.bind((0, rtnetlink.GROUPS))
        loop.add_reader(self._routes.fileno(), self._network_changed)

    def refresh(self) -> None:
        """Something may have changed: read soon, once for all that changes until then."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._DELAY, self._due)

    async def read_now(self) -> HostUsesRead:
        """A reading that begins after the call; emitted, too. Raises OSError; the last reading then stands."""
        return await self._shared()

    def close(self) -> None:
        """Watch no more."""
        loop = asyncio.get_running_loop()
        for watched in (self._epoll, self._routes):
            if watched is not None:
                loop.remove_reader(watched.fileno())
                watched.close()
        for file in self._files:
            os.close(file)
        if self._timer is not None:
            self._timer.cancel()
        self._epoll = self._routes = self._timer = None
        self._files.clear()

    def _watch_files(self) -> select.epoll:
        """These files are always readable, and have an exceptional condition when they changed: an epoll inside the
        loop's own is how to wait for that alone."""
        epoll = select.epoll()
        for path in filter(os.path.exists, ("/proc/self/mountinfo", "/proc/swaps")):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._files.append(file)
            epoll.register(file, select.EPOLLPRI | select.EPOLLERR)
        return epoll

    def _files_changed(self) -> None:
        if self._epoll is not None:
            self._epoll.poll(0)
            self.refresh()

    def _network_changed(self) -> None:
        """The messages only wake: what they say is read afresh. An overflow is no loss, then."""
        try:
            while self._routes is not None:
                self._routes.recv(65536)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                log.debug("rtnetlink: %s", error)
        self.refresh()

    def _due(self) -> None:
        self._timer = None
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())
            self._refreshing.add_done_callback(end_daemon_on_error)
        else:
            self.refresh()  # a reading may have begun before the change; look again

    async def _refresh(self) -> None:
        try:
            await self.read_now()
        except OSError as error:
            log.error("what the host uses its devices for cannot be read, the last reading stands: %s", error)

    async def _read_now(self) -> HostUsesRead:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        reading = await self._read()
        event = HostUsesRead(self._by_name(reading.uses), self._with_names(reading.nodes))
        self._emit(event)
        if not reading.whole and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._AGAIN, self._due)
        return event

    async def _read(self) -> Reading:
        while True:
            # Copies: the loop goes on writing meanwhile.
            blocks, nics = dict(self._blocks), frozenset(self._nics)
            with contextlib.suppress(Hung):  # then once more, without the file that it hung at
                return await self._reader.run(functools.partial(read_uses, self._state_folder, blocks, nics))

    def _with_names(self, nodes: Nodes) -> dict[str, tuple[str, ...]]:
        named = {node: filter(None, map(self._node_of, places)) for node, places in nodes.items()}
        return {node: tuple(dict.fromkeys(names)) for node, names in named.items()}

    def _by_name(self, found: Uses) -> Uses:
        named: Uses = {}
        for path, uses in found.items():
            name = self._node_of(path)
            if name is not None:
                named[name] = named.get(name, ()) + uses
        return named
