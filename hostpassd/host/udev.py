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

from hostpassd.errors import TimedOut
from hostpassd.events import DeviceGone, DeviceSeen, DevicesScanned, Event
from hostpassd.faults import vital
from hostpassd.host.device import Device, clean
from hostpassd.host.reading import Files, Hung, Reader
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

log = logging.getLogger(__name__)

_BATCH = 64  # uevents taken in one turn of the loop
_QUEUE = 256  # uevents taken and not read yet; the others wait in the kernel
_RECEIVE_BUFFER = 128 << 20  # bytes; what udev itself asks for
_QUIET = 0.5  # seconds between two looks at udevd's queue
_KNOWN_LIMIT = 100_000  # uevents waited for; past it they are counted as lost

_RUN = "/run/udev"  # udevd's folder
_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1
_SO_RCVBUFFORCE = 33

# A host use can change with these, also where the device itself is not in the tree (device mapper, md).
_USED_BY_HOST = frozenset({"block", "net", "nvme", "scsi"})


@dataclasses.dataclass(slots=True)
class Awaited:
    """The uevents that one caller waits for."""

    numbers: set[int]
    all_passed: asyncio.Event

    def drop(self, numbers: set[int]) -> None:
        """Wait for these no more."""
        self.numbers -= numbers
        if not self.numbers:
            self.all_passed.set()

    async def wait(self, seconds: float) -> None:
        """Wait until all have been passed on, or that long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.all_passed.wait(), seconds)


class Outstanding:
    """Which of the kernel's uevents udevd has not passed on yet, by sequence number.

    udevd passes every uevent on once, whatever becomes of its rules, in an order of its own. Either of the two
    messages may be read here first.
    """

    def __init__(self) -> None:
        self.passed_on = 0  # how many
        self.newest = 0
        self._waiting: set[int] = set()
        self._early: set[int] = set()
        self._awaited: list[Awaited] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def sent(self, number: int) -> None:
        """The kernel sent this one."""
        self.newest = max(self.newest, number)
        if number in self._early:
            self._early.remove(number)
        else:
            self._waiting.add(number)

    def passed(self, number: int) -> None:
        """udevd passed this one on, and it has been dealt with."""
        self.passed_on += 1
        if number in self._waiting:
            self._drop({number})
        else:
            self._early.add(number)

    def caught_up(self) -> None:
        """All that the kernel sent so far is known: what is early and no newer was sent before this began."""
        self._early = {number for number in self._early if number > self.newest} if self._early else self._early

    def forget(self, up_to: int) -> None:
        """These never come: they were lost."""
        self._drop({number for number in self._waiting if number <= up_to})

    def _drop(self, numbers: set[int]) -> None:
        self._waiting -= numbers
        for awaited in self._awaited:
            awaited.drop(numbers)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[Awaited]:
        """All that are outstanding now, kept up to date within the context."""
        awaited = Awaited(set(self._waiting), asyncio.Event())
        self._awaited.append(awaited)
        try:
            yield awaited
        finally:
            self._awaited.remove(awaited)


@dataclasses.dataclass(frozen=True, slots=True)
class Armed:
    """The open sockets that uevents come by."""

    source: str  # udev, kernel
    context: pyudev.Context
    monitor: pyudev.Monitor
    kernel: socket.socket | None  # the kernel's own beside udev's
    busy: bool  # udevd had a queue by then


def arm() -> Armed:
    """Open the sockets: from now on no uevent is missed. Raises OSError if there is no netlink to be had.

    With CAP_NET_ADMIN, which nothing else needs, they hold storms of uevents.
    """
    # Without udevd (containers, tests) there is only the kernel to listen to.
    source = "udev" if os.path.exists(f"{_RUN}/control") else "kernel"
    kernel = _kernel_socket() if source == "udev" else None
    busy = os.path.exists(f"{_RUN}/queue")
    context = pyudev.Context()
    monitor = pyudev.Monitor.from_netlink(context, source=source)
    monitor.start()
    with socket.socket(fileno=os.dup(monitor.fileno())) as handle:
        _enlarge(handle)
    return Armed(source, context, monitor, kernel, busy)


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
        self._monitor: pyudev.Monitor | None = None
        self._listening = False
        self._kernel: socket.socket | None = None
        self._outstanding = Outstanding()
        self._lost = False  # uevents not known here may still be in udevd's queue
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
        self._monitor, self._kernel = self._armed.monitor, self._armed.kernel
        self._lost = self._kernel is not None and self._armed.busy
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
                if self._kernel is not None:
                    await self._passed_on()
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
        if self._kernel is not None:
            self._kernel.close()
        self._monitor = self._kernel = None

    # --- reading sockets ---

    def _pause(self) -> None:
        if self._monitor is not None and self._listening:
            self._listening = False
            asyncio.get_running_loop().remove_reader(self._monitor.fileno())

    def _resume(self) -> None:
        if self._monitor is not None and not self._listening:
            self._listening = True
            asyncio.get_running_loop().add_reader(self._monitor.fileno(), self._read)

    def _read(self) -> bool:
        """Take a batch of uevents; whether there may be more."""
        more = self._read_monitor()
        self._read_kernel()
        return more

    def _read_monitor(self) -> bool:
        """`Monitor.poll` would not do: after an overflow it raises for ever and never reads on."""
        assert self._monitor is not None
        try:
            for _ in range(_BATCH):
                if len(self._queue) >= _QUEUE:
                    self._pause()
                    return True
                device = self._monitor._receive_device()
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

    def _read_kernel(self) -> None:
        """Note what the kernel sent. Read along with the monitor, so that a uevent wakes the daemon once, not twice."""
        while self._kernel is not None:
            try:
                message, (port, _) = self._kernel.recvfrom(8192)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._lost = True
                continue
            number = 0 if port else _number_in(message)  # of the kernel's own port; others can send to the group, too
            if number:
                self._outstanding.sent(number)
        self._outstanding.caught_up()
        if len(self._outstanding) > _KNOWN_LIMIT:
            self._outstanding.forget(self._outstanding.newest)
            self._lost = True

    def _overflowed(self) -> None:
        """uevents were lost: read everything and let the state make the difference."""
        self._lost = True
        if self._wanted is None:
            log.warning("uevents came faster than they could be read and some were lost: reading all devices again")
            self._want_scan()

    async def _drained(self) -> None:
        """All that is in the sockets now has been emitted, and no scan is under way."""
        more = True
        while more:
            more = self._monitor is not None and self._read()
            received = self._received
            while self._handled < received or self._wanted is not None or self._scanning:
                await self._next_step()

    async def _passed_on(self) -> None:
        """udevd has passed on all that the kernel had sent.

        What was lost on the way (an overflow, a restart of udevd) never comes: it is given up when udevd has no
        queue and has sent nothing since the last look, at which it had none either.
        """
        with self._outstanding.awaited() as awaited:
            last = None
            while awaited.numbers or self._lost:
                if awaited.numbers:
                    await awaited.wait(_QUIET)
                else:
                    await asyncio.sleep(_QUIET)
                look = None if self._udevd_is_busy() else (self._outstanding.passed_on, self._outstanding.newest)
                if look and last and look[0] == last[0]:
                    self._outstanding.forget(last[1])
                    self._lost = False
                last = look
        await self._drained()

    def _udevd_is_busy(self) -> bool:
        return os.path.exists(f"{_RUN}/queue")  # udevd keeps this file while it has something queued

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
            self._working.add_done_callback(vital)

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
            found = await self._read_all()
            event = DevicesScanned(tuple(found.devices), tuple(found.unread))
            self._note(found)
            self._emit(event)
            self._uses_changed()
        except Exception as error:
            wanted.set_exception(error)
            wanted.exception()  # perhaps nobody waits for it; the task's own is vital
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

    async def _read_all(self) -> _Everything:
        while True:
            with contextlib.suppress(Hung):  # then once more, without the file that it hung at
                return await self._reader.run(functools.partial(_read_all, self._memory))

    async def _take(self) -> None:
        devices = list(itertools.islice(self._queue, _BATCH))
        batch = _Batch(self._names, self._memory)
        try:
            await self._reader.run(functools.partial(batch.read, devices))
        except Hung:
            return  # then once more, without the file that it hung at
        for device in devices:
            self._queue.popleft()
            if self._kernel is not None:
                self._outstanding.passed(device.sequence_number)
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
        """What was at OLD has another name now."""
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


def _read_all(memory: Memory, files: Files) -> _Everything:
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


# Netlink.


def _kernel_socket() -> socket.socket:
    """The kernel's own uevents, only to know their numbers."""
    kernel = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, _NETLINK_KOBJECT_UEVENT
    )
    _enlarge(kernel)
    kernel.bind((0, _KERNEL_GROUP))
    return kernel


def _enlarge(handle: socket.socket) -> None:
    """Give HANDLE udev's own receive buffer if that is more than it has (the kernel tells twice what was set)."""
    if handle.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= 2 * _RECEIVE_BUFFER:
        return
    try:
        handle.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
    except PermissionError:
        log.debug("no CAP_NET_ADMIN: the receive buffer of uevents stays small")


def _number_in(message: bytes) -> int:
    """The sequence number in a uevent; 0 if there is none."""
    _, found, rest = message.rpartition(b"\0SEQNUM=")
    digits = rest.partition(b"\0")[0]
    return int(digits) if found and digits.isdigit() else 0
