"""Wiring and life cycle, nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

from hostpassd import errors, names
from hostpassd.audit import AuditLog, Records
from hostpassd.base.shared import Shared
from hostpassd.base.tasks import end_daemon_on_error
from hostpassd.bus.access import Access
from hostpassd.bus.manager import ManagerMethods
from hostpassd.bus.publisher import Publisher
from hostpassd.bus.router import Router
from hostpassd.bus.spec import Specification
from hostpassd.config import Config
from hostpassd.host.reading import Reader
from hostpassd.host.udev import Armed, Udev
from hostpassd.host.uses import HostUses
from hostpassd.machines.hypervisor import Hypervisor
from hostpassd.machines.stored import StoredWatch, folder_of
from hostpassd.model.events import Event, FilesHang, HypervisorChanged, MachinesListed
from hostpassd.passthrough.execute import Executor
from hostpassd.passthrough.intents import IntentLog
from hostpassd.passthrough.operations import Operations
from hostpassd.passthrough.request import Options
from hostpassd.state import State

# Seconds: a Sync or a Rescan that takes longer is an error; between two Rescans, which anybody may ask for, there are
# RESCAN_PAUSE; a start does not wait longer for libvirt than START_LIMIT.
SYNC_LIMIT = 10.0
RESCAN_LIMIT = 60.0
RESCAN_PAUSE = 1.0
START_LIMIT = 10.0
# Seconds that a job waits for udev to show what it did.
SETTLE_LIMIT = 5.0


class Daemon:
    """One hostpassd: everything made here and joined here."""

    def __init__(self, config: Config, state_folder: Path, bus_address: str | None, armed: Armed | None = None) -> None:
        self._bus_address = bus_address
        # Instances must not repeat over a restart: no daemon hands out a million in a second.
        self._state = State(time.monotonic_ns() // 1000, config.excluded_classes, config.never)
        self._router = Router(Specification.load(), log=logging.getLogger("hostpassd.bus"))
        self._publisher = Publisher(self._state, self._router)
        self._intents = IntentLog(state_folder / "intents", config.hypervisors)
        self._reader = Reader(self._files_hang)
        self._udev = Udev(self.emit, self._refresh_uses, self._reader, armed)
        self._uses = HostUses(
            self.emit, self._udev.node_of, self._udev.blocks, self._udev.nics, str(state_folder), self._reader
        )
        self._hypervisors = {uri: Hypervisor(uri, self.emit) for uri in config.hypervisors}
        self._executor = Executor(self._state, self._hypervisors.__getitem__, self._settle, self.emit, self._intents)
        self._operations = Operations(self._state, self._executor, self.emit, self._intents)
        self._audit = AuditLog(self._state, Records(), self._operations.moves)
        access = Access(self._router, log=logging.getLogger("hostpassd.access"))
        default = Options(timeout=config.timeout)
        ManagerMethods(
            self._state,
            self._router,
            access,
            self._operations,
            self._publisher,
            self._sync,
            self._rescan,
            self.emit,
            default,
        )
        self._synced = Shared(self._catch_up)
        self._rescanned = Shared(self._read_afresh, RESCAN_PAUSE)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._told = asyncio.Event()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Starts, serves until a signal or the loss of the bus, and stops."""
        stop = asyncio.Event()
        # What nobody catches leaves the state and what was told of it apart: end, and be started afresh.
        asyncio.get_running_loop().set_exception_handler(self._fail)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            await self._start()
            await self._until_over(stop)
        finally:
            notify("STOPPING=1")
            await self._stop()

    async def _start(self) -> None:
        await self._router.connect(self._bus_address)
        self._udev.arm()
        await self._udev.scan()
        self._uses.start()
        await self._uses.read_now()
        for hypervisor in self._hypervisors.values():
            self._keep(hypervisor.run())
            if folder := folder_of(hypervisor.uri):
                StoredWatch(hypervisor, folder)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._told.wait(), START_LIMIT)
        self._publisher.flush()
        await self._router.own_name(names.BUS_NAME)
        self._publisher.announce_running()
        self._audit.tells_foreign = True
        self._publisher.flush()
        notify("READY=1\n" + self._status())
        self._keep(self._watchdog())
        self._keep(self._router.warm())
        self._keep(self._operations.upkeep.keep_log())

    async def _until_over(self, stop: asyncio.Event) -> None:
        stopping = asyncio.ensure_future(stop.wait())
        over: set[asyncio.Future[Any]] = {stopping, self._router.lost, self._failed}
        await asyncio.wait(over, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if self._failed.done():
            raise errors.Failed("hostpassd made a mistake (see above) and ends, to be started afresh")
        if self._router.lost.done():
            raise errors.Failed("the message bus is gone: hostpassd ends, to be started again with it")

    async def _stop(self) -> None:
        await self._operations.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self._failed.done():
            self._publisher.flush()
        await self._router.close()

    def emit(self, event: Event) -> None:
        """The one way in: an event to the state, its changes to the bus, the event to whoever waits for it."""
        try:
            self._take(event)
        except Exception:
            # The state and what was told of it are apart from now on, whoever takes this error.
            self._end()
            raise

    def _take(self, event: Event) -> None:
        batches = self._state.apply(event)
        for listener in (self._publisher, self._executor, self._operations, self._audit):
            listener.notice(event, batches)
        match event:
            case HypervisorChanged():
                if set(self._state.hypervisors) >= set(self._hypervisors) and not self._awaiting_lists():
                    self._told.set()
                notify(self._status())
            case FilesHang():
                notify(self._status())
            case MachinesListed():
                if not self._awaiting_lists():
                    self._told.set()

    def _awaiting_lists(self) -> bool:
        """Whether a connected hypervisor has not told its machines yet."""
        return any(h.connected and not h.listed for h in self._state.hypervisors.values())

    async def _settle(self) -> None:
        """Lets the state catch up with udev; a failure is udev's own to tell."""
        with contextlib.suppress(errors.TimedOut):
            await self._udev.settled(asyncio.get_running_loop().time() + SETTLE_LIMIT)

    async def _sync(self) -> None:
        """Returns when all that happened before the call is in the state."""
        async with _limited(SYNC_LIMIT):
            await self._synced()

    async def _rescan(self) -> None:
        """Returns when everything has been read afresh since the call."""
        async with _limited(RESCAN_LIMIT):
            await self._rescanned()

    async def _catch_up(self) -> None:
        async with _limited(SYNC_LIMIT) as limit:
            await self._udev.settled(limit.when() or 0.0)
            await self._read_others()

    async def _read_afresh(self) -> None:
        async with _limited(RESCAN_LIMIT):
            await self._udev.scan()
            await self._read_others()

    async def _read_others(self) -> None:
        await asyncio.gather(*(self._refresh(h) for h in self._hypervisors.values()))
        try:
            await self._uses.read_now()
        except OSError as error:
            raise errors.Failed(f"what the host uses its devices for cannot be read ({error}): try again") from None

    def _refresh_uses(self) -> None:
        self._uses.refresh()

    def _files_hang(self, files: tuple[str, ...]) -> None:
        """Other files hang than before: what was not read of one that answers again is read now."""
        if set(self._state.hanging) - set(files):
            self._udev.scan_soon()
            self._uses.refresh()
        self.emit(FilesHang(files))

    async def _refresh(self, hypervisor: Hypervisor) -> None:
        """Reads all machines again; those of a hypervisor that is away stay as they were, marked stale."""
        with contextlib.suppress(errors.HypervisorUnavailable):
            await hypervisor.refresh()

    def _status(self) -> str:
        held = sum(1 for machine in self._state.machines for _ in self._state.holds_of(machine))
        lost = [h.uri for h in self._state.hypervisors.values() if not h.connected]
        text = f"STATUS={len(self._state.devices)} devices, {len(self._state.machines)} machines, {held} held"
        silent = [*lost, *self._state.hanging]
        text += f"; no answer from {', '.join(silent)}" if silent else ""
        return text + (f"; no operations: {self._intents.problem}" if self._intents.problem else "")

    async def _watchdog(self) -> None:
        """Tells systemd that the loop turns, twice in each period that it allows."""
        period = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
        while period:
            notify("WATCHDOG=1\n" + self._status())
            await asyncio.sleep(period / 2)

    def _fail(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        # Only a callback of the loop itself, such as `end_daemon_on_error`: other tasks have owners for their errors.
        if "handle" in context:
            self._end()

    def _end(self) -> None:
        if not self._failed.done():
            self._failed.set_result(None)

    def _keep(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Runs what nothing works without: if it fails, the daemon ends, to be started afresh."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(end_daemon_on_error)


@contextlib.asynccontextmanager
async def _limited(seconds: float) -> AsyncIterator[asyncio.Timeout]:
    """What takes longer than that is TimedOut."""
    try:
        async with asyncio.timeout(seconds) as limit:
            yield limit
    except TimeoutError:
        raise errors.TimedOut(f"udev or libvirt did not answer within {seconds:g} seconds: try again") from None


def notify(text: str) -> None:
    """Tells the service manager TEXT (sd_notify(3)); nothing where there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier, contextlib.suppress(OSError):
        notifier.sendto(text.encode(), "\0" + address[1:] if address[0] == "@" else address)
