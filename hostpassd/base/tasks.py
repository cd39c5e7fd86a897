"""Tasks that nobody waits for, and waiting for the first of several things."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any


def end_daemon_on_error(task: asyncio.Task[Any]) -> None:
    """A done callback: what TASK raised goes to the loop, whose handler ends the daemon, to be started afresh."""
    if not task.cancelled():
        task.result()


class Tasks:
    """The tasks of one owner, each forgotten as it ends. ON_END is a done callback of each."""

    def __init__(self, on_end: Callable[[asyncio.Task[Any]], None] = end_daemon_on_error) -> None:
        self._on_end = on_end
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Has WORK done from the next turn of the loop on."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._on_end)
        return task

    def cancel(self) -> None:
        """Ends all of them where they wait."""
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        """Cancels all, and returns when they have ended."""
        self.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def __iter__(self) -> Iterator[asyncio.Task[Any]]:
        return iter(tuple(self._tasks))

    def __len__(self) -> int:
        return len(self._tasks)


async def first(*futures: asyncio.Future[Any], over: asyncio.Event | None = None, timeout: float | None = None) -> None:
    """Returns when one of FUTURES is done, OVER is set, or TIMEOUT seconds have passed. It ends none of them."""
    ending = asyncio.ensure_future(over.wait()) if over else None
    waited = {*futures, *([ending] if ending else [])}
    try:
        await asyncio.wait(waited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if ending:
            ending.cancel()
