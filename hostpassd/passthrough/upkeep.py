"""Schedules the repair of what jobs left behind: unfinished operations, and devices owed to host drivers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from hostpassd import errors
from hostpassd.model.events import (
    Event,
    HypervisorChanged,
    MachineGone,
    MachineRead,
    MachinesListed,
    OperationRecovered,
)
from hostpassd.passthrough.execute import Executor
from hostpassd.passthrough.intent_rows import Unfinished
from hostpassd.passthrough.intents import IntentLog
from hostpassd.passthrough.recovery import Recovery
from hostpassd.state import Changes

log = logging.getLogger(__name__)

# Seconds between two attempts at giving a device back, whatever happens meanwhile: the first pause, and the longest.
UPKEEP_PAUSES = 1.0, 60.0
# The same between two attempts at what else was left, when neither a job nor a new connection brings about one.
RETRY_PAUSES = 60.0, 3600.0
# Seconds between two attempts to write the intent log, while it cannot be written and nobody asks for an operation.
LOG_RETRY = 10.0

# What puts something in order.
Work = Callable[[], Coroutine[Any, Any, None]]


class Upkeep:
    """Retries unfinished operations: after each job, when libvirt is back, and after growing pauses.

    Each thing has a task of its own, which ends when libvirt lets it: nobody who waits for it, and gives up, ends it.
    """

    def __init__(self, executor: Executor, intents: IntentLog, emit: Callable[[Event], None]) -> None:
        self._executor = executor
        self._state = executor.state
        self._intents = intents
        self._emit = emit
        self._recovery = Recovery(executor, intents)
        self._working: dict[str, asyncio.Task[None]] = {}  # by device or job
        self._again: dict[str, Work] = {}  # what is to be done once more when one of these has ended
        self._tidying: asyncio.Task[None] | None = None
        self._untidy = self._retry = False
        self._connected: set[str] = set()  # the hypervisors that have not listed their machines since they were
        self._later: asyncio.TimerHandle | None = None  # when what was left is tried again
        self._pauses: dict[str, float] = {}  # the last one, by device; '' for what else was left
        self._stopping = False

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """What works now."""
        tasks = {*self._working.values(), *filter(None, [self._tidying])}
        return {task for task in tasks if not task.done()}

    def notice(self, event: Event, batches: Sequence[Changes]) -> None:
        """Called for each event after the state has taken it in."""
        if isinstance(event, HypervisorChanged):
            self._connected.add(event.uri)
        if isinstance(event, MachinesListed | MachineRead | MachineGone):
            # Not at each reading: a retry has its machine read. Not at each list: anybody may ask for one.
            back = isinstance(event, MachinesListed) and event.uri in self._connected
            if isinstance(event, MachinesListed):
                self._connected.discard(event.uri)
            self.tidy_soon(retry=back)

    async def keep_log(self) -> None:
        """Has the intent log written at the start, and again whenever that has failed, until cancelled.

        What was left is tried again each time that it could be.
        """
        while True:
            with contextlib.suppress(errors.StateFolderError):
                await self._intents.catch_up()
                self.tidy_soon(retry=True)
            await self._intents.trouble.wait()
            await asyncio.sleep(LOG_RETRY)

    def stop(self) -> None:
        """Begins no further retries."""
        self._stopping = True
        if self._later:
            self._later.cancel()

    def left_on(self, locks: tuple[str, ...]) -> list[Unfinished]:
        """The unfinished operations that share one of LOCKS."""
        return [left for left in self._intents.unfinished if not set(left.locks).isdisjoint(locks)]

    async def try_once_more(self, left: Sequence[Unfinished]) -> None:
        """Tries once more to put each of LEFT in order. Cancelling this wait does not cancel the recovery."""
        for other in left:
            await asyncio.wait({self._look_after(_job_of(other), functools.partial(self._recover_alone, other))})

    def take_over(self, left: Unfinished, alone: contextlib.AsyncExitStack) -> None:
        """Looks after what libvirt is still at. ALONE has its locks, which stay taken until that is put in order."""
        self._look_after(f"call of {_job_of(left)}", functools.partial(self._recover, left, alone))

    def is_reachable(self, left: Unfinished) -> bool:
        """Whether LEFT could be put in order now."""
        return self._can_reach(left.uri)

    def tidy_soon(self, *, retry: bool) -> None:
        """Gives back what is idle, soon; RETRY: and tries again what was left."""
        if not (self._intents.lent or (retry and self._intents.unfinished)):
            return
        self._untidy, self._retry = True, self._retry or retry
        if self._tidying is None or self._tidying.done():
            self._tidying = asyncio.get_running_loop().create_task(self._tidy())

    async def _tidy(self) -> None:
        while self._untidy:
            retry, self._untidy, self._retry = self._retry, False, False
            for left in self._intents.unfinished if retry else ():
                self._look_after(_job_of(left), functools.partial(self._recover_alone, left))
            for device, uri in self._executor.loans.idle():
                if self._can_reach(uri):
                    self._look_after(device, functools.partial(self._give_back, device))

    def _look_after(self, what: str, work: Work) -> asyncio.Task[None]:
        """WORK in a task of its own, which nobody's giving up ends: libvirt can be at it for as long as it likes."""
        if what in self._working:
            self._again[what] = work
        else:
            self._working[what] = asyncio.get_running_loop().create_task(self._safely(work))
            self._working[what].add_done_callback(lambda _: self._looked_after(what))
        return self._working[what]

    def _looked_after(self, what: str) -> None:
        del self._working[what]
        if (work := self._again.pop(what, None)) and not self._stopping:
            self._look_after(what, work)

    async def _safely(self, work: Work) -> None:
        try:
            await work()
        except Exception:
            log.exception("What was left of earlier operations could not be put in order.")

    async def _give_back(self, device: str) -> None:
        await self._recovery.give_back(device)
        if device in self._intents.lent:
            # Not again at once: what cannot be done may itself bring about the events for which it is tried.
            await asyncio.sleep(self._pause(device, UPKEEP_PAUSES))
        else:
            self._pauses.pop(device, None)

    def _pause(self, what: str, pauses: tuple[float, float]) -> float:
        """Seconds until WHAT is tried again: twice as long each time, from the first of PAUSES to the second."""
        first, longest = pauses
        self._pauses[what] = min(2 * self._pauses.get(what, first / 2), longest)
        return self._pauses[what]

    def _retry_later(self) -> None:
        """Has what was left tried again after a while."""
        if self._later is None and not self._stopping:
            pause = self._pause("", RETRY_PAUSES)
            self._later = asyncio.get_running_loop().call_later(pause, self.retry_now)

    def retry_now(self) -> None:
        """Retries now; called when the pause is over."""
        self._later = None
        self.tidy_soon(retry=True)

    async def _recover_alone(self, left: Unfinished) -> None:
        alone = contextlib.AsyncExitStack()
        await alone.enter_async_context(self._executor.alone(left.locks))
        await self._recover(left, alone)

    async def _recover(self, left: Unfinished, alone: contextlib.AsyncExitStack) -> None:
        """Finishes or undoes what was LEFT, if its hypervisor can be reached. ALONE has the locks, ours from now on."""
        async with alone:
            if not self._intents.left(left.number) or not self._can_reach(left.uri):
                return
            await self._recovery.recover(left)
            if self._intents.left(left.number):
                self._retry_later()
            else:
                self._pauses.pop("", None)
                self._emit(OperationRecovered(left.operation, left.machine, tuple(left.devices), left.number))
        self.tidy_soon(retry=False)

    def _can_reach(self, uri: str) -> bool:
        """Whether the hypervisor URI, if it is about one, can be reached and has told its machines."""
        hypervisor = self._state.hypervisors.get(uri)
        return not uri or (hypervisor is not None and hypervisor.connected and hypervisor.listed)


def _job_of(left: Unfinished) -> str:
    """What names the job that left it, and no device."""
    return f"job {left.number}"
