"""Threads for calls that block, so that the loop does not."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Queue = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class InOrder(Executor):
    """Makes calls in one thread, one after the other in the order of `submit`, which one thread alone may use.

    The end of the process does not wait for it, unlike for a ThreadPoolExecutor's: a call that hangs keeps nobody.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: _Queue = SimpleQueue()
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self._calls.put, None)

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """The result, to be, of FN called with these arguments."""
        if self._thread is None:
            thread = threading.Thread(target=_work, args=(self._calls,), name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        future: Future[_T] = Future()
        self._calls.put((future, lambda: fn(*args, **kwargs)))
        return future


def _work(calls: _Queue) -> None:
    while call := calls.get():
        future, make = call
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = make()
        except BaseException as error:  # the caller's to deal with, whatever it is
            future.set_exception(error)
        else:
            future.set_result(result)
        del call, future, make  # while it waits for the next one nothing of this one is kept


def in_thread(call: Callable[[], _T], name: str) -> asyncio.Future[_T]:
    """Makes CALL in a new thread called NAME, which the end of the process does not wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def deliver(result: Any, error: Exception | None) -> None:
        if future.done():
            return
        if error:
            future.set_exception(error)
        else:
            future.set_result(result)

    def work() -> None:
        result, failure = None, None
        try:
            result = call()
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(deliver, result, failure)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future
