"""Wiring and life cycle, nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import time
from typing import Any

from hostpassd import errors, names
from hostpassd.audit import AuditLog, Records
from hostpassd.base.systemd import feed_watchdog, notify
from hostpassd.base.tasks import Tasks, first
from hostpassd.bus.access import Access
from hostpassd.bus.manager import ManagerMethods
from hostpassd.bus.publisher import Publisher
from hostpassd.bus.roms import RomFiles
from hostpassd.bus.router import Router
from hostpassd.bus.spec import Specification
from hostpassd.config import Config
from hostpassd.ends import Ends
from hostpassd.model.events import Event, FilesHang, HypervisorChanged, MachinesListed
from hostpassd.passthrough.execute import Executor
from hostpassd.passthrough.intents import IntentLog
from hostpassd.passthrough.operations import Operations
from hostpassd.passthrough.request import Options
from hostpassd.state import State
from hostpassd.state.counters import Counters
from hostpassd.sync import Sync

# Seconds that a start waits for libvirt.
START_LIMIT = 10.0


class Daemon:
    """One hostpassd: everything made here and joined here, but for the ENDS."""

    def __init__(self, config: Config, ends: Ends) -> None:
        self._ends = ends
        # Instances must not repeat over a restart: no daemon hands out a million in a second.
        self.state = State(time.monotonic_ns() // 1000, config.excluded_classes, config.never)
        self.router = Router(Specification.load(), log=logging.getLogger("hostpassd.bus"), connection=ends.connection)
        self.counters = Counters(self.state)
        self.publisher = Publisher(self.state, self.router, self.counters)
        self.intents = IntentLog(ends.state_folder / "intents", config.hypervisors)
        sync = Sync(ends.host, ends.hypervisors.values())
        self.executor = Executor(self.state, ends.hypervisors.__getitem__, sync.settle, ends.inlet.emit, self.intents)
        self.operations = Operations(self.state, self.executor, ends.inlet.emit, self.intents)
        self._audit = AuditLog(self.state, Records(), self.operations.moves)
        # Each hears of every event after the state has taken it in. The counters first, for the publisher tells them.
        # The publisher next: what others then bring about is told after it. The audit log last: it asks whether a job
        # is still at work.
        self._listeners = (self.counters, self.publisher, self.executor, self.operations, self._audit)
        access = Access(self.router, ends.inlet.emit, log=logging.getLogger("hostpassd.access"))
        options = Options(timeout=config.timeout)
        ManagerMethods(
            self.state,
            self.router,
            access,
            self.operations,
            self.publisher,
            sync,
            ends.inlet.emit,
            options,
            RomFiles(config.rom_folders),
        )
        self._tasks = Tasks()  # what nothing works without: if one fails, the daemon ends, to be started afresh
        self._told = asyncio.Event()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ends.inlet.open(self._take)
        self.intents.announce(ends.inlet.emit)

    async def run(self) -> None:
        """Starts, serves until a signal or the loss of the bus, and stops."""
        stop = asyncio.Event()
        # What nobody catches leaves the state and what was told of it apart: end, and be started afresh.
        asyncio.get_running_loop().set_exception_handler(self._fail)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            await self.start()
            # Of what is there now little goes. The collector would look through all of it again and again, each time in
            # one turn of the loop.
            gc.collect()
            gc.freeze()
            await self._until_over(stop)
        finally:
            notify("STOPPING=1")
            await self.stop()

    async def start(self) -> None:
        """Returns when all is read, or libvirt does not answer, and the bus name is owned."""
        await self.router.connect(self._ends.bus_address)
        await self._ends.host.start()
        for uri, hypervisor in self._ends.hypervisors.items():
            self._tasks.start(hypervisor.run())
            self._ends.watch(uri)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._told.wait(), START_LIMIT)
        self.publisher.flush()
        await self.router.own_name(names.BUS_NAME)
        self.announce_running()
        self.publisher.flush()
        notify("READY=1\n" + self.status())
        self._tasks.start(feed_watchdog(self.status))
        self._tasks.start(self.router.warm())
        self._tasks.start(self.operations.upkeep.keep_log())

    def announce_running(self) -> None:
        """The start is over: what changes from here on is somebody's change."""
        self.publisher.announce_running()
        self.counters.counts_plugs = True
        self._audit.tells_foreign = True

    async def _until_over(self, stop: asyncio.Event) -> None:
        await first(self.router.lost, self._failed, over=stop)
        if self._failed.done():
            raise errors.Failed("hostpassd made a mistake (see above) and ends, to be started afresh.")
        if self.router.lost.done():
            raise errors.Failed("The message bus is gone: hostpassd ends, to be started again with it.")

    async def stop(self) -> None:
        """Ends all that was begun: soon, whatever libvirt does."""
        await self.operations.stop()
        await self._tasks.stop()
        if not self._failed.done():
            self.publisher.flush()
        await self.router.close()

    def _take(self, event: Event) -> None:
        """An event to the state, and what it changed to all listeners."""
        try:
            batches = self.state.apply(event)
            for listener in self._listeners:
                listener.notice(event, batches)
            self._notice(event)
        except Exception:
            # The state and what was told of it are apart from now on, whoever takes this error.
            self._end()
            raise

    def _notice(self, event: Event) -> None:
        if isinstance(event, HypervisorChanged | FilesHang):
            notify(self.status())
        known = self.state.hypervisors
        all_known = isinstance(event, HypervisorChanged) and known.keys() >= self._ends.hypervisors.keys()
        if (all_known or isinstance(event, MachinesListed)) and all(
            h.listed or not h.connected for h in known.values()
        ):
            self._told.set()

    def status(self) -> str:
        """How it is, in a line for people: systemd's STATUS=."""
        held = sum(1 for machine in self.state.machines for _ in self.state.holds_of(machine))
        lost = [h.uri for h in self.state.hypervisors.values() if not h.connected]
        text = f"STATUS={len(self.state.devices)} devices, {len(self.state.machines)} machines, {held} held"
        silent = [*lost, *self.state.hanging]
        text += f"; no answer from {', '.join(silent)}" if silent else ""
        return text + (f"; no operations: {self.intents.problem}" if self.intents.problem else "")

    def _fail(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        # Only a callback of the loop itself, such as `end_daemon_on_error`: other tasks have owners for their errors.
        if "handle" in context:
            self._end()

    def _end(self) -> None:
        if not self._failed.done():
            self._failed.set_result(None)
