"""The daemon's wiring: Sync and Rescan, and what it is told of the host that cannot be read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostpassd import daemon as daemon_module
from hostpassd import errors
from hostpassd.bus.router import Router
from hostpassd.config import Config
from hostpassd.daemon import Daemon
from hostpassd.host import rtnetlink
from hostpassd.host.udev import Udev
from hostpassd.machines.hypervisor import Hypervisor

URI = "test:///default"


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


class Rig:
    """A daemon, and what it reads with."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.daemon = Daemon(Config(hypervisors=(URI,)), folder, None)
        self.scan, self.settled, self.refresh, self.read_now = (Counted() for _ in range(4))
        hypervisor = self.daemon._hypervisors[URI]
        for where, name, what in (
            (self.daemon._udev, "scan", self.scan),
            (self.daemon._udev, "settled", self.settled),
            (hypervisor, "refresh", self.refresh),
            (self.daemon._uses, "read_now", self.read_now),
        ):
            monkeypatch.setattr(where, name, what)


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


async def test_who_asks_meanwhile_shares_a_rescan_and_a_sync(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.daemon._rescanned, "_pause", 0.01)
    for ask, reads in ((rig.daemon._rescan, rig.scan), (rig.daemon._sync, rig.settled)):
        first = asyncio.create_task(ask())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.gather(first, *(ask() for _ in range(31)))
        assert reads.count == 2
    assert rig.refresh.count == rig.read_now.count == 4


async def test_rescans_keep_apart(rig: Rig) -> None:
    """Anybody may ask for them: their cost is bounded, whoever asks how often."""
    assert rig.daemon._rescanned._pause == daemon_module.RESCAN_PAUSE > 0
    await rig.daemon._rescan()
    second = asyncio.create_task(rig.daemon._rescan())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(second), 0.05)
    assert rig.scan.count == 1
    await second
    assert rig.scan.count == 2


@pytest.mark.parametrize("limit", ["SYNC_LIMIT", "RESCAN_LIMIT"])
async def test_what_does_not_end_is_timed_out(rig: Rig, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    async def never(*_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(daemon_module, limit, 0.02)
    monkeypatch.setattr(rig.daemon._hypervisors[URI], "refresh", never)
    with pytest.raises(errors.TimedOut, match=r"within 0\.02 seconds"):
        await (rig.daemon._sync if limit == "SYNC_LIMIT" else rig.daemon._rescan)()


async def test_host_uses_that_cannot_be_read_are_told_in_words(rig: Rig) -> None:
    rig.read_now.error = PermissionError(1, "Operation not permitted")
    for ask in (rig.daemon._sync, rig.daemon._rescan):
        with pytest.raises(errors.Failed, match=r"uses its devices for cannot be read \(.*not permitted\): try again"):
            await ask()


async def test_a_file_that_hangs_is_told_as_degraded_and_read_when_it_answers(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    again: list[str] = []
    monkeypatch.setattr(rig.daemon._udev, "scan_soon", lambda: again.append("devices"))
    monkeypatch.setattr(rig.daemon._uses, "refresh", lambda: again.append("uses"))
    rig.daemon._files_hang(("/sys/devices/a/wwid",))
    rig.daemon._files_hang(("/sys/devices/a/wwid", "/sys/devices/b/config"))
    assert rig.daemon._state.degraded and again == []
    assert rig.daemon._status().endswith("no answer from /sys/devices/a/wwid, /sys/devices/b/config")
    rig.daemon._files_hang(("/sys/devices/b/config",))
    assert rig.daemon._state.degraded and again == ["devices", "uses"]
    rig.daemon._files_hang(())
    assert not rig.daemon._state.degraded


async def nothing(*_: Any) -> None:
    """In the place of what reaches out of the process."""


async def test_a_network_that_keeps_changing_does_not_keep_the_daemon_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump_once: Callable[..., rtnetlink.Dump] = rtnetlink._dump_once

    def never_whole(request: int, payload: bytes) -> rtnetlink.Dump:
        return rtnetlink.Dump(dump_once(request, payload).rows, whole=False)

    monkeypatch.setattr(rtnetlink, "_dump_once", never_whole)
    monkeypatch.setattr(Router, "connect", nothing)
    monkeypatch.setattr(Router, "own_name", nothing)
    monkeypatch.setattr(Udev, "arm", lambda _: None)
    monkeypatch.setattr(Udev, "scan", nothing)
    monkeypatch.setattr(Hypervisor, "run", nothing)
    monkeypatch.setattr(daemon_module, "START_LIMIT", 0.0)
    daemon = Daemon(Config(hypervisors=(URI,)), tmp_path, None)
    try:
        await daemon._start()
        assert daemon._publisher.running and daemon._uses._timer is not None  # it goes on, and looks again
    finally:
        daemon._uses.close()
        await daemon._stop()
