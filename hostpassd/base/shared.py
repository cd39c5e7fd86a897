"""Work that many ask for and all share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from hostpassd.errors import HostpassError

_T = TypeVar("_T")


class Shared(Generic[_T]):
    """WORK, done for all who call meanwhile: each gets what a run comes to that begins after the call.

    At least PAUSE seconds lie between the end of a run and the beginning of the next.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, _T]], pause: float = 0.0) -> None:
        self._work = work
        self._pause = pause
        self._running = asyncio.Lock()
        self._next: asyncio.Task[_T] | None = None
        self._not_before = 0.0

    async def __call__(self) -> _T:
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._run())
            self._next.add_done_callback(_hear)
        return await asyncio.shield(self._next)

    async def _run(self) -> _T:
        loop = asyncio.get_running_loop()
        async with self._running:
            if (wait := self._not_before - loop.time()) > 0:
                await asyncio.sleep(wait)
            self._next = None
            try:
                return await self._work()
            finally:
                self._not_before = loop.time() + self._pause


def _hear(task: asyncio.Task[Any]) -> None:
    """A failure is for those who wait, and is no news when all have gone. A fault is for the loop's handler, too."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, HostpassError | OSError):
        raise error
