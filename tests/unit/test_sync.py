"""Sync and Rescan: shared, bounded, and told in words where they fail."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hostpassd import errors, sync
from hostpassd.sync import Sync


class Counted:
    """In the place of what reads: waits a moment, and counts."""

    def __init__(self) -> None:
        self.count = 0
        self.error: Exception | None = None

    async def __call__(self, *_: Any) -> None:
        self.count += 1
        await asyncio.sleep(0.01)
        if self.error:
            raise self.error


class Reads:
    """A host and a hypervisor that count."""

    def __init__(self) -> None:
        self.scan, self.settled, self.read_uses, self.refresh = (Counted() for _ in range(4))


def made(reads: Reads, pause: float = 0.01) -> Sync:
    return Sync(reads, [reads], pause)  # type: ignore[arg-type, list-item]


async def test_who_asks_meanwhile_shares_a_rescan_and_a_sync() -> None:
    reads = Reads()
    syncing = made(reads)
    for ask, counted in ((syncing.rescan, reads.scan), (syncing.sync, reads.settled)):
        first = asyncio.create_task(ask())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.gather(first, *(ask() for _ in range(31)))
        assert counted.count == 2
    assert reads.refresh.count == reads.read_uses.count == 4


async def test_rescans_keep_apart() -> None:
    """Anybody may ask for them: their cost is bounded, whoever asks how often."""
    assert sync.RESCAN_PAUSE > 0
    reads = Reads()
    syncing = made(reads, pause=0.5)
    await syncing.rescan()
    second = asyncio.create_task(syncing.rescan())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(second), 0.05)
    assert reads.scan.count == 1
    await second
    assert reads.scan.count == 2


@pytest.mark.parametrize("limit", ["SYNC_LIMIT", "RESCAN_LIMIT"])
async def test_what_does_not_end_is_timed_out(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    async def never(*_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(sync, limit, 0.02)
    reads = Reads()
    reads.refresh = never  # type: ignore[assignment]
    syncing = made(reads)
    with pytest.raises(errors.TimedOut, match=r"within 0\.02 seconds"):
        await (syncing.sync if limit == "SYNC_LIMIT" else syncing.rescan)()


async def test_host_uses_that_cannot_be_read_are_told_in_words() -> None:
    reads = Reads()
    reads.read_uses.error = PermissionError(1, "Operation not permitted")
    syncing = made(reads)
    for ask in (syncing.sync, syncing.rescan):
        with pytest.raises(errors.Failed, match=r"uses its devices for cannot be read \(.*not permitted\): try again"):
            await ask()


async def test_a_hypervisor_that_is_away_is_no_failure() -> None:
    reads = Reads()
    reads.refresh.error = errors.HypervisorUnavailable("It is away.")
    await made(reads).sync()
    assert reads.read_uses.count == 1
