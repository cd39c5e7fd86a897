"""The daemon's wiring, on ends of all sorts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from hostpassd.host import rtnetlink
from hostpassd.host.uses import HostUses
from hostpassd.model.events import FilesHang
from tests.sim.ends import Still, daemon_on, simulated


async def test_a_file_that_hangs_is_told_as_degraded(tmp_path: Path) -> None:
    ends = simulated(tmp_path)
    daemon = daemon_on(ends)
    ends.inlet.emit(FilesHang(("/sys/devices/a/wwid", "/sys/devices/b/config")))
    assert daemon.state.degraded
    assert daemon.status().endswith("no answer from /sys/devices/a/wwid, /sys/devices/b/config")
    ends.inlet.emit(FilesHang(()))
    assert not daemon.state.degraded and "no answer" not in daemon.status()


async def test_it_starts_without_an_answer_of_libvirts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostpassd.daemon.START_LIMIT", 0.0)
    daemon = daemon_on(simulated(tmp_path, hypervisors={"sim:///": Still()}))
    await daemon.start()
    assert daemon.publisher.running
    await daemon.stop()


class OnlyUses(Still):
    """A host of which nothing but its uses is read."""

    uses: HostUses

    async def start(self) -> None:
        self.uses.start()
        await self.read_uses()

    async def read_uses(self) -> None:
        await self.uses.read_now()


async def test_a_network_that_keeps_changing_does_not_keep_the_daemon_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Callable[..., rtnetlink.Dump] = rtnetlink.dump_once

    def never_whole(request: int, payload: bytes) -> rtnetlink.Dump:
        return dataclasses.replace(whole(request, payload), whole=False)

    monkeypatch.setattr(rtnetlink, "dump_once", never_whole)
    host = OnlyUses()
    ends = simulated(tmp_path, host=host, hypervisors={"sim:///": Still()})
    host.uses = HostUses(ends.inlet.emit, lambda path: None, {}, (), str(tmp_path))
    monkeypatch.setattr("hostpassd.daemon.START_LIMIT", 0.0)
    daemon = daemon_on(ends)
    try:
        await daemon.start()
        assert daemon.publisher.running
    finally:
        host.uses.close()
        await daemon.stop()
