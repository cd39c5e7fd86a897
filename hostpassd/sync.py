"""Sync and Rescan: the state catches up with what is outside, for all who ask meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection

from hostpassd import errors
from hostpassd.base.shared import Shared
from hostpassd.ends import Host, Hypervisor

# Seconds: a Sync or a Rescan that takes longer is an error; between two Rescans, which anybody may ask for, there are
# RESCAN_PAUSE.
SYNC_LIMIT = 10.0
RESCAN_LIMIT = 60.0
RESCAN_PAUSE = 1.0
# Seconds that a job waits for udev to show what it did.
SETTLE_LIMIT = 5.0


class Sync:
    """Has the ends read what they have not told yet."""

    def __init__(self, host: Host, hypervisors: Collection[Hypervisor], pause: float = RESCAN_PAUSE) -> None:
        self._host = host
        self._hypervisors = hypervisors
        self._synced = Shared(self._catch_up)
        self._rescanned = Shared(self._read_afresh, pause)

    async def sync(self) -> None:
        """Returns when all that happened before the call is in the state. Errors: TimedOut, Failed."""
        async with _limited(SYNC_LIMIT):
            await self._synced()

    async def rescan(self) -> None:
        """Returns when everything has been read afresh since the call. Errors: TimedOut, Failed."""
        async with _limited(RESCAN_LIMIT):
            await self._rescanned()

    async def settle(self) -> None:
        """Lets the state catch up with udev; a failure is udev's own to tell."""
        with contextlib.suppress(errors.TimedOut):
            await self._host.settled(asyncio.get_running_loop().time() + SETTLE_LIMIT)

    async def _catch_up(self) -> None:
        async with _limited(SYNC_LIMIT) as limit:
            await self._host.settled(limit.when() or 0.0)
            await self._read_others()

    async def _read_afresh(self) -> None:
        async with _limited(RESCAN_LIMIT):
            await self._host.scan()
            await self._read_others()

    async def _read_others(self) -> None:
        await asyncio.gather(*map(_refresh, self._hypervisors))
        try:
            await self._host.read_uses()
        except OSError as error:
            raise errors.Failed(f"What the host uses its devices for cannot be read ({error}): try again.") from None


async def _refresh(hypervisor: Hypervisor) -> None:
    """Reads all machines again; those of a hypervisor that is away stay as they were, marked stale."""
    with contextlib.suppress(errors.HypervisorUnavailable):
        await hypervisor.refresh()


@contextlib.asynccontextmanager
async def _limited(seconds: float) -> AsyncIterator[asyncio.Timeout]:
    """What takes longer than that is TimedOut."""
    try:
        async with asyncio.timeout(seconds) as limit:
            yield limit
    except TimeoutError:
        raise errors.TimedOut(f"udev or libvirt did not answer within {seconds:g} seconds: try again.") from None
