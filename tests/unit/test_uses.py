"""Host uses as they are read: by name, once for many changes, again where a reading was not whole."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Collection
from pathlib import Path

import pytest

from hostpassd.host import uses
from hostpassd.host.reading import Files, Sysfs
from hostpassd.host.storage import BlockNode
from hostpassd.host.uses import HostUses
from hostpassd.model.events import Event, HostUsesRead, host_use
from tests.unit.test_storage import Disks


def test_the_random_generator_is_a_virtio_or_a_tpms(tmp_path: Path) -> None:
    disks = Disks(tmp_path)
    sysfs = Sysfs(str(disks.root / "sys"))
    assert uses.random_generator(sysfs) == {}
    misc = disks.folder("/sys/devices/virtual/misc/hw_random")
    misc.mkdir(parents=True)
    disks.link("/sys/class/misc/hw_random", "/sys/devices/virtual/misc/hw_random")
    (misc / "rng_current").write_text("intel\n")
    assert uses.random_generator(sysfs) == {"/dev/hwrng": ()}
    for path, link, name in (
        ("/sys/devices/pci0/virtio3", "/sys/bus/virtio/devices/virtio3", "virtio_rng.0"),
        ("/sys/devices/pnp0/tpm/tpm0", "/sys/class/tpm/tpm0", "tpm-rng-0"),
    ):
        disks.folder(path).mkdir(parents=True)
        disks.link(link, path)
        disks.link(f"/sys/bus/virtio/drivers/virtio_rng/{Path(path).name}", path)
        (misc / "rng_current").write_text(name + "\n")
        assert uses.random_generator(sysfs) == {"/dev/hwrng": (path,)}


class Readings:
    """Host uses over a reading that takes a moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self.count = 0
        monkeypatch.setattr(uses, "read_uses", self.read)
        self.blocks = {"/sys/a": BlockNode(("/dev/a",))}
        self.nics = {"/sys/n"}
        self.whole = True
        self.uses = HostUses(self.events.append, {"/sys/a": "a", "/sys/b": "a"}.get, self.blocks, self.nics, "")

    def read(
        self, state_folder: str, blocks: dict[str, BlockNode], nics: Collection[str], files: Files
    ) -> uses.Reading:
        assert blocks == self.blocks and blocks is not self.blocks
        assert nics == self.nics and nics is not self.nics
        self.count += 1
        found = {
            "/sys/a": (host_use("mount", mount_points=(str(self.count),)),),
            "/sys/b": (host_use("swap"),),
            "/sys/c": (),
        }
        return uses.Reading(found, {"/dev/x": ("/sys/a", "/sys/b"), "/dev/y": ("/sys/c",)}, self.whole)


async def test_readings_are_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = Readings(monkeypatch)
    event = await readings.uses.read_now()
    assert event == HostUsesRead(
        {"a": (host_use("mount", mount_points=("1",)), host_use("swap"))}, {"/dev/x": ("a",), "/dev/y": ()}
    )
    assert readings.events == [event]


async def test_a_storm_costs_one_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = Readings(monkeypatch)
    for _ in range(1000):
        readings.uses.refresh()
    await asyncio.sleep(0.2)
    assert readings.count == 1


async def test_a_reading_begins_after_the_call_and_callers_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = Readings(monkeypatch)
    first = asyncio.create_task(readings.uses.read_now())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    others = await asyncio.gather(*(readings.uses.read_now() for _ in range(10)))
    assert readings.count == 2
    assert (await first) is not others[0]
    assert all(other is others[0] for other in others)


async def test_a_reading_that_is_not_whole_counts_and_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = Readings(monkeypatch)
    monkeypatch.setattr(HostUses, "_AGAIN", 0.01)
    again = asyncio.Event()

    def emit(event: Event) -> None:
        readings.events.append(event)
        if readings.count == 2:
            again.set()

    readings.uses._emit = emit
    readings.whole = False
    event = await readings.uses.read_now()
    assert readings.events == [event] and event.uses
    readings.whole = True
    await asyncio.wait_for(again.wait(), 20)
    assert readings.uses._timer is None


async def test_a_failed_reading_leaves_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    readings = Readings(monkeypatch)

    def fail(*_: object) -> None:
        raise OSError("no netlink today")

    monkeypatch.setattr(uses, "read_uses", fail)
    readings.uses.refresh()
    await asyncio.sleep(0.2)
    assert readings.events == []
    assert "no netlink today" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts something")
async def test_a_mount_is_seen_and_idleness_wakes_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    readings = Readings(monkeypatch)
    readings.uses.start()
    try:
        mounted = await asyncio.to_thread(subprocess.run, ["mount", "-t", "tmpfs", "none", str(tmp_path)], check=False)
        if mounted.returncode:
            pytest.skip("may not mount here")
        await asyncio.sleep(0.3)
        after_mount = readings.count
        assert after_mount > 0
        await asyncio.to_thread(subprocess.run, ["umount", str(tmp_path)], check=True)
        await asyncio.sleep(0.3)
        after_umount = readings.count
        assert after_umount > after_mount
        await asyncio.sleep(1)
        # Others may mount here too; a watch that spins would have read twenty times.
        assert readings.count < after_umount + 5
    finally:
        readings.uses.close()
