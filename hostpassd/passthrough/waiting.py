"""Bounded waits: for libvirt calls that may never return, and for events that may never come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from hostpassd import errors
from hostpassd.base.tasks import first
from hostpassd.model.events import DeviceAdded, DeviceRemoved, Event, MachinesListed, RemovalFailed
from hostpassd.model.machine import MachineKey
from hostpassd.state import State

# Seconds that a call of libvirt may go on for when its job is cancelled: then it can be undone in the job.
CALL_PATIENCE = 5.0

_Said = type[DeviceAdded] | type[DeviceRemoved] | type[RemovalFailed]


class StillAtIt(Exception):
    """libvirt has not returned from a call in time: its effect can come later yet. The message is the step."""


class Patience:
    """For how long something is waited for: that many SECONDS, or, but for calls under way, until OVER is set."""

    def __init__(self, what: str, seconds: float, over: asyncio.Event | None = None) -> None:
        self.what = what  # for people: a step
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._over = over

    @property
    def is_over(self) -> bool:
        """Whether it was ended early."""
        return self._over is not None and self._over.is_set()

    async def wait(self, future: asyncio.Future[Any]) -> None:
        """Returns when FUTURE is done, or when the patience is at its end."""
        await first(future, over=self._over, timeout=self._left)

    async def made(self, call: Coroutine[Any, Any, None]) -> None:
        """Waits for a CALL of libvirt. One that does not return in time is given up: raises StillAtIt.

        One that is under way when the patience is ended early gets a while more.
        """
        task = asyncio.ensure_future(call)
        try:
            await self.wait(task)
            if not task.done() and self.is_over:
                await asyncio.wait({task}, timeout=min(CALL_PATIENCE, self._left))
        finally:
            task.cancel()
        await asyncio.wait({task})
        if task.cancelled():
            raise StillAtIt(self.what)
        task.result()

    @property
    def _left(self) -> float:
        return max(0.0, self._deadline - asyncio.get_running_loop().time())


class Heard:
    """What libvirt has said of one alias of one machine since it is listened to."""

    def __init__(self, state: State, key: MachineKey) -> None:
        self._state = state
        self._key = key
        self.said: _Said | None = None

    @property
    def has_left(self) -> bool:
        """Whether the device has left the machine: libvirt says so, or the machine has no live half any more."""
        machine = self._state.copies.get(self._key)
        return self.said is DeviceRemoved or machine is None or not (machine.active or machine.live)


class Waiting:
    """What jobs wait for, told by events. Jobs learn from these alone what became of what they did."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._heard: dict[tuple[MachineKey, str], Heard] = {}
        self._predicates: dict[asyncio.Future[None], Callable[[], bool]] = {}

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not (self._heard or self._predicates)

    def notice(self, event: Event) -> None:
        """Called for each event after the state has taken it in."""
        if isinstance(event, DeviceAdded | DeviceRemoved | RemovalFailed):
            if heard := self._heard.get((event.machine, event.alias)):
                heard.said = type(event)
        if isinstance(event, MachinesListed):
            self._catch_up(event.uri)
        for future, predicate in list(self._predicates.items()):
            if not future.done() and predicate():
                future.set_result(None)

    def _catch_up(self, uri: str) -> None:
        """An event that libvirt sent while it was not connected is lost: a list of all machines stands for it."""
        for (key, alias), heard in self._heard.items():
            if key.uri == uri and heard.said is not RemovalFailed:
                machine = self._state.copies.get(key)
                there = machine is not None and any(claim.alias == alias for claim in machine.live)
                heard.said = DeviceAdded if there else DeviceRemoved

    @contextlib.contextmanager
    def listening(self, key: MachineKey, alias: str) -> Iterator[Heard]:
        """Listens to what libvirt says of ALIAS, from before it is asked for anything."""
        self._heard[(key, alias)] = heard = Heard(self._state, key)
        try:
            yield heard
        finally:
            del self._heard[(key, alias)]

    async def until(self, predicate: Callable[[], bool], patience: Patience) -> bool:
        """Waits for events until PREDICATE holds; False when the time is over. Raises Cancelled when that ends it."""
        if predicate():
            return True
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._predicates[future] = predicate
        try:
            await patience.wait(future)
        finally:
            del self._predicates[future]
        if not future.done() and patience.is_over:
            raise errors.Cancelled("The job was cancelled.")
        return future.done()
