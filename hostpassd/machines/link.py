"""The calls in progress on one connection to libvirt, in threads: how many at once, and which hang."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from hostpassd.base.threads import in_thread
from hostpassd.machines.connection import Connection
from hostpassd.model.machine import Machine

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# Calls at once: fewer than the 5 requests that libvirtd takes from one client at a time (max_client_requests). At that
# limit it does not read on, answers no keepalive, and the connection would be lost.
CALLS_AT_ONCE = 4
CHANGES_AT_ONCE = 3


class Link:
    """One connection as the loop sees it: which calls threads make on it, and which of these nobody waits for.

    A call is in `calls` from its beginning until libvirt returns from it, and in `changes` or `hanging` only as long.
    Once `lost` is done no call is begun; the connection is closed when the last call on it has returned.
    """

    connection: Connection

    def __init__(self) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.listed = False
        self.waiting = asyncio.Lock()  # one at a time waits for a machine to be idle: it takes a place meanwhile
        self.calls: set[asyncio.Future[Any]] = set()  # that have not returned
        self.changes: set[asyncio.Future[Any]] = set()  # of these
        self.hanging: dict[asyncio.Future[Any], str] = {}  # of these, whom nobody waits for, and what they are about
        self.readings: dict[str, asyncio.Task[Machine | None]] = {}  # of machines, by UUID

    async def wait_for_place(self, changes: int) -> None:
        """Returns when fewer than CALLS_AT_ONCE calls and fewer than CHANGES changes are made, or at a loss."""
        while not self.lost.done() and (len(self.calls) >= CALLS_AT_ONCE or len(self.changes) >= changes):
            await self.first(self.calls)

    def begin(self, call: Callable[[Connection], _T]) -> asyncio.Future[_T]:
        """Makes CALL in a thread of its own."""
        made = in_thread(functools.partial(call, self.connection), "libvirt-call")
        self.calls.add(made)
        made.add_done_callback(self._returned)
        return made

    async def first(self, calls: Iterable[asyncio.Future[Any]]) -> None:
        """Returns when one of CALLS has returned, or the connection is lost."""
        waited: set[asyncio.Future[Any]] = {*calls, self.lost}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Closes the connection once the calls in progress, which use it, have returned."""
        while self.calls:
            await asyncio.wait(self.calls)
        await in_thread(self.connection.close, "libvirt-call")

    def _returned(self, call: asyncio.Future[Any]) -> None:
        self.calls.discard(call)
        self.changes.discard(call)
        about = self.hanging.pop(call, None)
        error = None if call.cancelled() else call.exception()
        if about is not None:
            _log.warning(
                "A call about %s, from which libvirt did not return for long, has ended: %s", about, error or "done"
            )
