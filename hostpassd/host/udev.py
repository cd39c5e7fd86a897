"""Coldplug and monitor: udev's devices and uevents, as events for the state. The only importer of pyudev."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator

import pyudev

from hostpassd.errors import TimedOut
from hostpassd.events import DeviceGone, DeviceSeen, DevicesScanned, Event
from hostpassd.faults import vital
from hostpassd.host.device import Device, clean
from hostpassd.host.sysfs import (
    KINDS,
    NAMES,
    SHOWS_IN_PARENT,
    Complaints,
    Source,
    describe,
    kind_of,
    may_be_in_tree,
    own_nodes,
)
from hostpassd.host.uses import BlockNode

log = logging.getLogger(__name__)

_BATCH = 64  # uevents taken in one turn of the loop
_RECEIVE_BUFFER = 128 << 20  # bytes; what udev itself asks for
_QUIET = 0.5  # seconds between two looks at udevd's queue
_KNOWN_LIMIT = 100_000  # uevents waited for; past it they are counted as lost

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


class Udev:
    """The live view of the host's devices.

    `arm`, then `scan`: what happens during a scan is kept by the kernel and follows it. EMIT gets every event, on
    the loop. USES_CHANGED is called where a block or network device came, changed or went, in the tree or not
    (device mapper, md). RUN is udevd's folder. BLOCKS: all block devices by sysfs path, in the tree or not.
    """

    def __init__(
        self,
        emit: Callable[[Event], None],
        uses_changed: Callable[[], None] = lambda: None,
        run: str = "/run/udev",
    ) -> None:
        self._emit = emit
        self._uses_changed = uses_changed
        # Without udevd (containers, tests) there is only the kernel to listen to.
        self.source = "udev" if os.path.exists(f"{run}/control") else "kernel"
        self._queue = f"{run}/queue"
        self._context = pyudev.Context()
        self._monitor: pyudev.Monitor | None = None
        self._kernel: socket.socket | None = None
        self._outstanding = Outstanding()
        self._lost = False  # uevents not known here may still be in udevd's queue
        self._scanning = asyncio.Lock()
        self._rescan: asyncio.Task[DevicesScanned] | None = None
        self.blocks: dict[str, BlockNode] = {}
        self._names: dict[str, str] = {}
        self._complaints = Complaints()

    def arm(self) -> None:
        """Open the sockets: from now on no uevent is missed. Raises OSError if there is no netlink to be had."""
        if self.source == "udev":
            self._kernel = _kernel_socket()
            self._lost = os.path.exists(self._queue)
        self._monitor = pyudev.Monitor.from_netlink(self._context, source=self.source)
        self._monitor.start()
        with socket.socket(fileno=os.dup(self._monitor.fileno())) as handle:
            _enlarge(handle)
        log.debug("listening to %s", self.source)

    async def scan(self) -> DevicesScanned:
        """Read every device afresh, off the loop, and emit (and return) the result; uevents wait until that is done."""
        async with self._scanning:
            self._pause()
            try:
                devices, blocks = await asyncio.to_thread(_read_all, self._complaints)
                self._names = {device.sysfs_path: device.name for device in devices}
                self.blocks.clear()
                self.blocks.update(blocks)
                event = DevicesScanned(tuple(devices))
                self._emit(event)
                self._uses_changed()
                return event
            finally:
                self._resume()

    async def settled(self, deadline: float) -> None:
        """Return when every uevent that the kernel sent before the call has been through udevd and been emitted.

        DEADLINE is in the loop's time. Raises TimedOut when it passes.
        """
        try:
            async with asyncio.timeout_at(deadline):
                await self._drained()
                if self.source == "udev":
                    await self._passed_on()
        except TimeoutError:
            raise TimedOut("udev did not finish its queue in time; try again when the host is calmer.") from None

    def node_of(self, sysfs_path: str) -> str | None:
        """The name of the nearest device in the tree at or above SYSFS_PATH."""
        while len(sysfs_path) > 1:
            name = self._names.get(sysfs_path)
            if name is not None:
                return name
            sysfs_path = sysfs_path.rpartition("/")[0]
        return None

    def close(self) -> None:
        """Listen no more."""
        self._pause()
        if self._rescan is not None:
            self._rescan.cancel()
        if self._kernel is not None:
            self._kernel.close()
        self._monitor = self._kernel = None

    # --- reading sockets ---

    def _pause(self) -> None:
        if self._monitor is not None:
            asyncio.get_running_loop().remove_reader(self._monitor.fileno())

    def _resume(self) -> None:
        if self._monitor is not None:
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
                device = self._monitor._receive_device()
                if device is None:
                    return False
                self._take(device)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self._overflowed()
        return True

    def _read_kernel(self) -> None:
        """Note what the kernel sent. Read along with the monitor, so that a uevent wakes the daemon once, not twice."""
        while self._kernel is not None:
            try:
                message = self._kernel.recv(8192)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._lost = True
                continue
            number = _number_in(message)
            if number:
                self._outstanding.sent(number)
        self._outstanding.caught_up()
        if len(self._outstanding) > _KNOWN_LIMIT:
            self._outstanding.forget(self._outstanding.newest)
            self._lost = True

    def _overflowed(self) -> None:
        """uevents were lost: read everything and let the state make the difference."""
        self._lost = True
        if self._rescan is None or self._rescan.done():
            log.warning("uevents came faster than they could be read and some were lost: reading all devices again")
            self._rescan = asyncio.get_running_loop().create_task(self.scan())
            self._rescan.add_done_callback(vital)
        self._pause()

    async def _drained(self) -> None:
        """All that is in the sockets now has been emitted, and no scan is under way."""
        while True:
            if self._rescan is not None and not self._rescan.done():
                await asyncio.wait([self._rescan])
            async with self._scanning:
                more = self._monitor is not None and self._read()
            if not more:
                return
            await asyncio.sleep(0)

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
        return os.path.exists(self._queue)  # udevd keeps this file while it has something queued

    # --- uevents to events ---

    def _take(self, device: pyudev.Device) -> None:
        try:
            self._handle(device)
        except UnicodeDecodeError as error:
            log.warning("a device whose name is not UTF-8 is left out: %r", error.object)
        finally:
            if self._kernel is not None:
                self._outstanding.passed(device.sequence_number)

    def _handle(self, device: pyudev.Device) -> None:
        source = self._source(device)
        if source.subsystem == "block":
            self._note_block(source, gone=device.action == "remove")
        if source.subsystem in _USED_BY_HOST:
            self._uses_changed()
        old = source.prop("DEVPATH_OLD")
        if old and f"/sys{old}" != source.path:
            self._moved(f"/sys{old}")
        if device.action == "remove":
            self._gone(source.path)
        else:
            self._seen(source)
        # Bound: only then the report descriptors of a USB interface can be read.
        if device.action in ("add", "remove", "change") or (device.action == "bind" and source.subsystem == "usb"):
            self._show_in_parent(source)

    def _source(self, device: pyudev.Device) -> Source:
        return _source_of(device, self._complaints)

    def _note_block(self, source: Source, *, gone: bool) -> None:
        if gone:
            self.blocks.pop(source.path, None)
        else:
            self.blocks[source.path] = _block_node(source)

    def _seen(self, source: Source) -> None:
        kind = kind_of(source)
        if kind is None:
            # A driver of mediated devices let go of its parent: it may have been a node as that alone.
            self._gone(source.path)
            return
        seen = describe(source, kind, self.node_of(source.path.rpartition("/")[0]))
        if seen is not None:
            self._names[source.path] = seen.name
            self._emit(DeviceSeen(seen))

    def _gone(self, path: str) -> None:
        self._complaints.forget(path)
        if self._names.pop(path, None) is not None:
            self._emit(DeviceGone(path))

    def _moved(self, old: str) -> None:
        """What was at OLD has another name now. What is below it has no uevents of its own: that needs a scan."""
        if self._names.get(old, "net_").startswith("net_"):
            self._gone(old)  # no node of the tree is below a network interface
        elif self._rescan is None or self._rescan.done():
            self._rescan = asyncio.get_running_loop().create_task(self.scan())
            self._rescan.add_done_callback(vital)

    def _show_in_parent(self, source: Source) -> None:
        shows = SHOWS_IN_PARENT.get(source.subsystem)
        folder = source.path.rpartition("/")[0]
        if shows is None or folder not in self._names or not shows(source):
            return
        with contextlib.suppress(pyudev.DeviceNotFoundError):
            self._seen(self._source(pyudev.Devices.from_sys_path(self._context, folder)))


# Everything, blocking.


def _read_all(complaints: Complaints) -> tuple[list[Device], dict[str, BlockNode]]:
    """All devices of the tree, parents first, and all block devices. In a thread: with a libudev context of its own."""
    context = pyudev.Context()
    NAMES.forget()
    names: dict[str, str] = {}
    devices = []
    blocks = {}
    for path in sorted(set(_paths())):
        try:
            source = _source_of(pyudev.Devices.from_sys_path(context, path), complaints)
        except (pyudev.DeviceNotFoundError, UnicodeError):
            continue  # vanished, or has a name that no bus and no terminal can carry
        if source.subsystem == "block":
            blocks[path] = _block_node(source)
        kind = kind_of(source)
        device = describe(source, kind, _nearest(path, names)) if kind else None
        if device is not None:
            names[path] = device.name
            devices.append(device)
    return devices, blocks


def _block_node(source: Source) -> BlockNode:
    pool = clean(source.prop("ID_FS_LABEL")) if source.prop("ID_FS_TYPE") == "zfs_member" else ""
    return BlockNode(own_nodes(source), pool)


def _nearest(path: str, names: dict[str, str]) -> str | None:
    while path := path.rpartition("/")[0]:
        if path in names:
            return names[path]
    return None


def _paths() -> Iterator[str]:
    """Where devices of the subsystems that have kinds are, all block devices, and parents of mediated devices."""
    for subsystem in (*KINDS, "mdev_bus"):
        for path in _listed(f"/sys/bus/{subsystem}/devices", f"/sys/class/{subsystem}"):
            if subsystem == "block" or may_be_in_tree(path, subsystem):
                yield path


def _listed(*folders: str) -> Iterator[str]:
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(folder):
                with contextlib.suppress(OSError):
                    yield "/sys/" + os.readlink(f"{folder}/{name}").lstrip("./")


def _source_of(device: pyudev.Device, complaints: Complaints) -> Source:
    path = device.sys_path
    properties = device.properties

    def prop(name: str) -> str:
        try:
            value: str = properties[name]
        except KeyError:
            return ""
        except UnicodeDecodeError as error:
            complaints.unreadable(path, name, error)
            return ""
        return value

    def child(name: str) -> Source | None:
        try:
            return _source_of(pyudev.Devices.from_sys_path(device.context, f"{path}/{name}"), complaints)
        except (pyudev.DeviceNotFoundError, UnicodeError):
            return None

    return Source(path, device.subsystem or "", device.device_type or "", prop, complaints, child)


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
