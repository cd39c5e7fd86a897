"""Coldplug and monitor: udev's devices and uevents, as events for the state. The only importer of pyudev."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import itertools
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import pyudev

from hostpassd.base.tasks import end_daemon_on_error
from hostpassd.errors import TimedOut
from hostpassd.host.reading import Files, Hung, Reader
from hostpassd.host.settle import Settling, enlarge, kernel_socket
from hostpassd.host.storage import BlockNode
from hostpassd.host.sysfs import (
    KINDS,
    NAMES,
    SHOWS_IN_PARENT,
    VIRTUAL,
    Memory,
    Source,
    describe,
    kind_of,
    may_be_in_tree,
    own_nodes,
)
from hostpassd.model.device import Device
from hostpassd.model.events import DeviceGone, DeviceSeen, DevicesScanned, Event
from hostpassd.model.text import clean

log = logging.getLogger(__name__)

_BATCH = 64  # uevents taken in one turn of the loop
_QUEUE = 256  # uevents taken and not read yet; the others wait in the kernel

_RUN = "/run/udev"  # udevd's folder

# A host use can change with these, also where the device itself is not in the tree (device mapper, md).
_USED_BY_HOST = frozenset({"block", "net", "nvme", "scsi"})


@dataclasses.dataclass(frozen=True, slots=True)
class Armed:
    """The open sockets that uevents come by."""

    source: str  # udev, kernel
    context: pyudev.Context
    monitor: pyudev.Monitor
    settling: Settling | None  # None: there is only the kernel, which passes on what it sends


def arm() -> Armed:
    """Open the sockets: from now on no uevent is missed. Raises OSError if there is no netlink to be had.

    With CAP_NET_ADMIN, which nothing else needs, they hold storms of uevents.
    """
    # Without udevd (containers, tests) there is only the kernel to listen to.
    source = "udev" if os.path.exists(f"{_RUN}/control") else "kernel"
    settling = Settling(kernel_socket(), f"{_RUN}/queue") if source == "udev" else None
    context = pyudev.Context()
    monitor = pyudev.Monitor.from_netlink(context, source=source)
    monitor.start()
    with socket.socket(fileno=os.dup(monitor.fileno())) as handle:
        enlarge(handle)
    return Armed(source, context, monitor, settling)


class Udev:
    """The live view of the host's devices.

    `arm` (ARMED: the sockets are open), then `scan`: what happens meanwhile is kept by the kernel and follows it. EMIT
    gets every event, on the loop. USES_CHANGED is called where a block or network device came, changed or went, in the
    tree or not (device mapper, md). BLOCKS: all block devices by sysfs path, in the tree or not. NICS: the devices that
    network interfaces are or were of.

    uevents are received on the loop; the devices are read by READER, one job after the other: a scan where one is
    wanted, else the next uevents.
    """

    def __init__(
        self,
        emit: Callable[[Event], None],
        uses_changed: Callable[[], None] = lambda: None,
        reader: Reader | None = None,
        armed: Armed | None = None,
    ) -> None:
        self._emit = emit
        self._uses_changed = uses_changed
        self._armed = armed
        self.monitor: pyudev.Monitor | None = None
        self._listening = False
        self.settling: Settling | None = None
        self.blocks: dict[str, BlockNode] = {}
        self.nics: set[str] = set()
        self._names: dict[str, str] = {}
        self._memory = Memory()
        self._reader = reader or Reader()
        self._queue: deque[pyudev.Device] = deque()
        self._wanted: asyncio.Future[DevicesScanned] | None = None  # the next scan
        self._scanning = False
        self._working: asyncio.Task[None] | None = None
        self._received = 0  # uevents, ever
        self._handled = 0
        self._step: asyncio.Future[None] | None = None

    def arm(self) -> None:
        """Take the sockets, opened by now: from here on no uevent is missed. Raises OSError."""
        self._armed = self._armed or arm()
        self.monitor, self.settling = self._armed.monitor, self._armed.settling
        log.debug("listening to %s", self._armed.source)

    async def scan(self) -> DevicesScanned:
        """Read every device afresh, and emit that. One scan, begun after the call, serves all who call until then."""
        return await asyncio.shield(self._want_scan())

    def scan_soon(self) -> None:
        """Have every device read afresh."""
        self._want_scan()

    async def settled(self, deadline: float) -> None:
        """Return when every uevent that the kernel sent before the call has been through udevd and been emitted.

        DEADLINE is in the loop's time. Raises TimedOut when it passes.
        """
        try:
            async with asyncio.timeout_at(deadline):
                await self._drained()
                if self.settling is not None:
                    await self.settling.passed_on()
                    await self._drained()
        except TimeoutError:
            raise TimedOut("udev did not finish its queue in time; try again when the host is calmer.") from None

    def node_of(self, sysfs_path: str) -> str | None:
        """The name of the nearest device in the tree at or above SYSFS_PATH."""
        return _nearest(sysfs_path, self._names)

    def close(self) -> None:
        """Listen no more."""
        self._pause()
        if self._working is not None:
            self._working.cancel()
        if self.settling is not None:
            self.settling.close()
        self.monitor = self.settling = None

    # --- reading sockets ---

    def _pause(self) -> None:
        if self.monitor is not None and self._listening:
            self._listening = False
            asyncio.get_running_loop().remove_reader(self.monitor.fileno())

    def _resume(self) -> None:
        if self.monitor is not None and not self._listening:
            self._listening = True
            asyncio.get_running_loop().add_reader(self.monitor.fileno(), self._read)

    def _read(self) -> bool:
        """Take a batch of uevents; whether there may be more."""
        more = self._read_monitor()
        if self.settling is not None:
            self.settling.read()  # along with the monitor, so that a uevent wakes the daemon once, not twice
        return more

    def _read_monitor(self) -> bool:
        """`Monitor.poll` would not do: after an overflow it raises for ever and never reads on."""
        assert self.monitor is not None
        try:
            for _ in range(_BATCH):
                if len(self._queue) >= _QUEUE:
                    self._pause()
                    return True
                device = self.monitor._receive_device()
                if device is None:
                    return False
                self._queue.append(device)
                self._received += 1
                self._work()
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self._overflowed()
        return True

    def _overflowed(self) -> None:
        """uevents were lost: read everything and let the state make the difference."""
        if self.settling is not None:
            self.settling.lose()
        if self._wanted is None:
            log.warning("uevents came faster than they could be read and some were lost: reading all devices again")
            self._want_scan()

    async def _drained(self) -> None:
        """All that is in the sockets now has been emitted, and no scan is under way."""
        more = True
        while more:
            more = self.monitor is not None and self._read()
            received = self._received
            while self._handled < received or self._wanted is not None or self._scanning:
                await self._next_step()

    # --- reading devices ---

    def _want_scan(self) -> asyncio.Future[DevicesScanned]:
        if self._wanted is None:
            self._wanted = asyncio.get_running_loop().create_future()
            self._work()
        return self._wanted

    def _work(self) -> None:
        """Have read what is to be read."""
        if self._working is None or self._working.done():
            self._working = asyncio.get_running_loop().create_task(self._work_off())
            self._working.add_done_callback(end_daemon_on_error)

    async def _work_off(self) -> None:
        while self._wanted is not None or self._queue:
            if self._wanted is not None:
                wanted, self._wanted = self._wanted, None
                await self._scan(wanted)
            else:
                await self._take()
            step, self._step = self._step, None
            if step is not None:
                step.set_result(None)

    async def _next_step(self) -> None:
        if self._step is None:
            self._step = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._step)

    async def _scan(self, wanted: asyncio.Future[DevicesScanned]) -> None:
        self._scanning = True
        try:
            found = await self._read_everything()
            event = DevicesScanned(tuple(found.devices), tuple(found.unread))
            self._note(found)
            self._emit(event)
            self._uses_changed()
        except Exception as error:
            wanted.set_exception(error)
            wanted.exception()  # perhaps nobody waits for it; the task's own is end_daemon_on_error
            raise
        finally:
            self._scanning = False
        wanted.set_result(event)
        self._resume()

    def _note(self, found: _Everything) -> None:
        unread = {path: self._names[path] for path in found.unread if path in self._names}
        self._names = {device.sysfs_path: device.name for device in found.devices} | unread
        self._memory.keep(self._names.keys() | found.blocks.keys())
        self.blocks.clear()
        self.blocks.update(found.blocks)
        self.nics |= found.nics

    async def _read_everything(self) -> _Everything:
        while True:
            with contextlib.suppress(Hung):  # then once more, without the file that it hung at
                return await self._reader.run(functools.partial(read_all, self._memory))

    async def _take(self) -> None:
        devices = list(itertools.islice(self._queue, _BATCH))
        batch = _Batch(self._names, self._memory)
        try:
            await self._reader.run(functools.partial(batch.read, devices))
        except Hung:
            return  # then once more, without the file that it hung at
        for device in devices:
            self._queue.popleft()
            if self.settling is not None:
                self.settling.passed(device.sequence_number)
        self._handled += len(devices)
        self._apply(batch)
        self._resume()

    def _apply(self, batch: _Batch) -> None:
        for path, name in batch.names.items():
            if name is None:
                self._names.pop(path, None)
            else:
                self._names[path] = name
        for path, block in batch.blocks.items():
            if block is None:
                self.blocks.pop(path, None)
            else:
                self.blocks[path] = block
        self.nics |= batch.nics
        self.nics -= batch.gone
        for event in batch.events:
            self._emit(event)
        if batch.uses_changed:
            self._uses_changed()
        if batch.moved:
            self._want_scan()


class _Batch:
    """What some uevents come to: read in a thread, put into effect on the loop, or not at all.

    NAMES: those of all devices, by sysfs path, which nobody changes meanwhile.
    """

    def __init__(self, names: Mapping[str, str], memory: Memory) -> None:
        self.names: dict[str, str | None] = {}  # those that changed; None: of none in the tree any more
        self.events: list[Event] = []
        self.blocks: dict[str, BlockNode | None] = {}
        self.nics: set[str] = set()
        self.gone: set[str] = set()
        self.uses_changed = False
        self.moved = False  # something has another path now, and what is below it has no uevents of its own
        self._known = names
        self._memory = memory

    def read(self, devices: list[pyudev.Device], files: Files) -> None:
        """Read what DEVICES, the uevents', are now."""
        for device in devices:
            try:
                self._handle(device, files)
            except UnicodeDecodeError as error:
                log.warning("a device whose name is not UTF-8 is left out: %r", error.object)

    def _handle(self, device: pyudev.Device, files: Files) -> None:
        source = _source_of(device, files, self._memory)
        gone = device.action == "remove"
        if source.subsystem == "block":
            self.blocks[source.path] = None if gone else _block_node(source)
        if source.subsystem == "net" and not gone and (nic := _nic_of(source.path)):
            self.nics.add(nic)
        if source.subsystem in _USED_BY_HOST:
            self.uses_changed = True
        old = source.prop("DEVPATH_OLD")
        if old and f"/sys{old}" != source.path:
            self._leave(f"/sys{old}")
        if gone:
            self._memory.forget(source.path)
            self._gone(source.path)
            self.gone.add(source.path)
        else:
            self._seen(source)
        # Bound: only then the report descriptors of a USB interface can be read.
        if device.action in ("add", "remove", "change") or (device.action == "bind" and source.subsystem == "usb"):
            self._show_in_parent(source, device.context, files)

    def _seen(self, source: Source) -> None:
        kind = kind_of(source)
        if kind is None:
            # A driver of mediated devices let go of its parent: it may have been a node as that alone.
            self._gone(source.path)
            return
        seen = describe(source, kind, self._nearest(source.path.rpartition("/")[0]))
        if seen is not None:
            self.names[source.path] = seen.name
            self.events.append(DeviceSeen(seen))

    def _gone(self, path: str) -> None:
        if self._name_of(path) is not None:
            self.names[path] = None
            self.events.append(DeviceGone(path))

    def _leave(self, old: str) -> None:
        """Drops the device at the sysfs path OLD: the kernel has moved it to another one."""
        if (self._name_of(old) or "net_").startswith("net_"):
            self._gone(old)  # no node of the tree is below a network interface
        else:
            self.moved = True

    def _show_in_parent(self, source: Source, context: pyudev.Context, files: Files) -> None:
        shows = SHOWS_IN_PARENT.get(source.subsystem)
        folder = source.path.rpartition("/")[0]
        if shows is None or self._name_of(folder) is None or not shows(source):
            return
        with contextlib.suppress(TimeoutError):
            parent = _source_at(context, folder, files, self._memory)
            if parent is not None:
                self._seen(parent)

    def _name_of(self, path: str) -> str | None:
        return self.names[path] if path in self.names else self._known.get(path)

    def _nearest(self, path: str) -> str | None:
        while len(path) > 1:
            name = self._name_of(path)
            if name is not None:
                return name
            path = path.rpartition("/")[0]
        return None


# Everything, blocking.


@dataclasses.dataclass(frozen=True, slots=True)
class _Everything:
    """What a scan found: devices of the tree, parents first."""

    devices: list[Device] = dataclasses.field(default_factory=list)
    unread: list[str] = dataclasses.field(default_factory=list)  # what is there and hangs
    blocks: dict[str, BlockNode] = dataclasses.field(default_factory=dict)
    nics: set[str] = dataclasses.field(default_factory=set)


def read_all(memory: Memory, files: Files) -> _Everything:
    """Everything there is. In a thread: with a libudev context of its own."""
    context = pyudev.Context()
    NAMES.forget()
    found = _Everything(nics=set(_nics()))
    names: dict[str, str] = {}
    for path in sorted(set(_paths())):
        try:
            source = _source_at(context, path, files, memory, afresh=True)
        except TimeoutError:
            found.unread.append(path)
            continue
        if source is None:
            continue
        if source.subsystem == "block":
            found.blocks[path] = _block_node(source)
        kind = kind_of(source)
        device = describe(source, kind, _nearest(path.rpartition("/")[0], names)) if kind else None
        if device is not None:
            names[path] = device.name
            found.devices.append(device)
    return found


def _block_node(source: Source) -> BlockNode:
    pool = clean(source.prop("ID_FS_LABEL")) if source.prop("ID_FS_TYPE") == "zfs_member" else ""
    return BlockNode(own_nodes(source), pool)


def _nearest(path: str, names: Mapping[str, str]) -> str | None:
    """The name of the device at PATH, or the nearest above it."""
    while len(path) > 1:
        if path in names:
            return names[path]
        path = path.rpartition("/")[0]
    return None


def _paths() -> Iterator[str]:
    """Where devices of the subsystems that have kinds are, all block devices, and parents of mediated devices."""
    for subsystem in (*KINDS, "mdev_bus"):
        for path in _listed(f"/sys/bus/{subsystem}/devices", f"/sys/class/{subsystem}"):
            if subsystem == "block" or may_be_in_tree(path, subsystem):
                yield path


def _nics() -> Iterator[str]:
    """The devices of any bus that network interfaces are of, in whatever network namespace."""
    with contextlib.suppress(OSError):
        for bus in os.listdir("/sys/bus"):
            for path in _listed(f"/sys/bus/{bus}/devices"):
                if os.path.exists(f"{path}/net"):
                    yield path


def _nic_of(path: str) -> str:
    """The device that the network interface at PATH is of; '' for a virtual one."""
    return "" if path.startswith(VIRTUAL) else path.rpartition("/net/")[0]


def _listed(*folders: str) -> Iterator[str]:
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(folder):
                with contextlib.suppress(OSError):
                    yield "/sys/" + os.readlink(f"{folder}/{name}").lstrip("./")


def _source_at(
    context: pyudev.Context, path: str, files: Files, memory: Memory, *, afresh: bool = False
) -> Source | None:
    """The device at PATH; None: vanished, or of a name that no bus and no terminal can carry. Raises TimeoutError."""
    files.begin(f"{path}/uevent")
    try:
        return _source_of(pyudev.Devices.from_sys_path(context, path), files, memory, afresh=afresh)
    except (pyudev.DeviceNotFoundError, UnicodeError):
        return None
    finally:
        files.end()


def _source_of(device: pyudev.Device, files: Files, memory: Memory, *, afresh: bool = False) -> Source:
    path = device.sys_path
    properties = device.properties

    def prop(name: str) -> str:
        try:
            value: str = properties[name]
        except KeyError:
            return ""
        except UnicodeDecodeError as error:
            memory.complain(path, name, error)
            return ""
        return value

    def child(name: str) -> Source | None:
        with contextlib.suppress(TimeoutError):
            return _source_at(device.context, f"{path}/{name}", files, memory)
        return None

    return Source(path, device.subsystem or "", device.device_type or "", prop, child, files, memory, afresh)
