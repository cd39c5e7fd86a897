"""An event loop whose time is moved by hand and that never waits: histories of minutes run in milliseconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class Clockwork(asyncio.SelectorEventLoop):
    """Runs what is ready, and stops when all that is left waits for a time or for somebody else."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.faults: list[str] = []  # what the loop was told of by its exception handler
        self._still = _Still(self)
        super().__init__(self._still)
        self.set_exception_handler(lambda loop, context: self.faults.append(_told(context)))

    def time(self) -> float:
        """The time that `advance` has come to."""
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., _T], *args: Any) -> asyncio.Future[_T]:  # type: ignore[override]
        """Calls FUNC at once: no thread could turn this loop."""
        future: asyncio.Future[_T] = self.create_future()
        try:
            future.set_result(func(*args))
        except OSError as error:
            future.set_exception(error)
        return future

    def do(self, call: Callable[[], _T]) -> _T:
        """What CALL returns, made in the loop, after everything that came of it."""
        done: list[_T] = []
        self.call_soon(lambda: done.append(call()))
        self.run_forever()
        return done[0]

    def run_until_idle(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Runs COROUTINE, which has to end without waiting for a time or for others."""
        task = self.create_task(coroutine)
        self.run_forever()
        task.result()

    def advance(self, seconds: float) -> None:
        """Lets that much time pass, timer by timer."""
        end = self.now + seconds
        while True:
            self.run_forever()
            step = self._still.next_timer
            if step is None or self.now + step > end:
                break
            self.now += step
        self.now = end
        self.run_forever()

    def abandon(self) -> None:
        """Everything in the loop ends where it stands, as in a killed process."""
        for task in asyncio.all_tasks(self):
            task.cancel()
        self.run_forever()
        self.close()


class _Still(selectors.SelectSelector):
    """Where the loop would wait it stops instead."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self.next_timer: float | None = None  # seconds

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout != 0:
            self.next_timer = timeout
            self._loop.stop()
        return []


def _told(context: dict[str, Any]) -> str:
    error = context.get("exception")
    notes = " ".join(getattr(error, "__notes__", ()))
    return f"{context['message']}: {error!r} {notes}"
