"""Power cuts, kills and a disk that fails, at every write of the intent log: the truth is clean after each."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hostpassd.model.device import Device
from hostpassd.passthrough.jobs import RunningJob
from hostpassd.passthrough.rowfile import rows_in
from tests.sim.disk import Died, Disk, Image
from tests.sim.world import UUID, Libvirt, error_name
from tests.unit.test_execute import LUN, PAIR, STICK, World

Truth = tuple[object, ...]

every_operation = pytest.mark.parametrize("operation", ["assign", "dismiss"])
every_device = pytest.mark.parametrize("device", [PAIR[0], STICK], ids=lambda d: d.name)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


async def prepared(folder: Path, disk: Disk, operation: str, device: Device) -> World:
    """What is done already is to stay so, whatever becomes of the operation."""
    folder.mkdir()
    disk.lay({}, folder)
    world = World(folder)
    assert (await world.do("assign", LUN)).state == "done"
    if operation == "dismiss":
        assert (await world.do("assign", device)).state == "done"
    await world.quiet()
    disk.moments = 0
    return world


async def restarted(world: World, folder: Path, powered_off: bool) -> World:
    """A new daemon on the same truth, or on that after a power cut, and what it has done by itself when it is quiet."""
    world.libvirt.calm()
    world.libvirt.emit = world.emit_early  # nobody else hears of it
    if powered_off:
        power_off(world.libvirt)
    new = World(folder, libvirt=world.libvirt)
    new.libvirt.come_back()
    await new.quiet()
    return new


def power_off(libvirt: Libvirt) -> None:
    """The host starts afresh, without running machines and with every device on its own driver."""
    libvirt.destroy(UUID)
    libvirt.detached.clear()
    for name, driver in libvirt.home.items():
        libvirt.host.bind(name, driver)


async def clean_states(folder: Path, disk: Disk, operation: str, device: Device, powered_off: bool) -> list[Truth]:
    """The truth after a restart without the operation, and with it done."""
    folder.mkdir(exist_ok=True)
    found = []
    for name in ("without", "with"):
        world = await prepared(folder / name, disk, operation, device)
        if name == "with":
            assert (await world.do(operation, device)).state == "done"
            await world.quiet()
        found.append((await restarted(world, folder / name, powered_off)).truth())
    assert found[0] != found[1]
    return found


async def run_until(world: World, disk: Disk, moment: int, operation: str, device: Device) -> RunningJob:
    """Runs the operation; the daemon is dead from MOMENT on."""

    def die(_: str) -> None:
        if disk.moments >= moment:
            raise Died

    disk.at = world.libvirt.before = die
    control = await world.start(operation, device)
    await asyncio.gather(*world.operations.tasks, return_exceptions=True)
    while busy := world.operations.upkeep.tasks:
        await asyncio.gather(*busy, return_exceptions=True)
    return control


def different(images: list[Image]) -> list[Image]:
    """Of IMAGES one for each that a daemon can tell from the others."""
    return list({tuple(rows_in(image.get("intents", b""))): image for image in images}.values())


@every_operation
@every_device
@pytest.mark.parametrize("powered_off", [False, True], ids=["killed", "power cut"])
async def test_at_every_write_in_whatever_part_it_comes_to_one_of_two_clean_states(
    tmp_path: Path, disk: Disk, operation: str, device: Device, powered_off: bool
) -> None:
    clean = await clean_states(tmp_path, disk, operation, device, powered_off)
    ends = set()
    moment = which = 0
    ended = False
    while not ended:
        folder = tmp_path / f"{moment} {which}"
        world = await prepared(folder, disk, operation, device)
        control = await run_until(world, disk, moment + 1, operation, device)
        ended = control.ended.is_set()
        images = different(list(disk.images()) if powered_off else [disk.now()])
        disk.lay(images[which], folder)
        new = await restarted(world, folder, powered_off)
        where = f"moment {moment}, {which} of {len(images)}: {images[which].get('intents')!r}"
        assert new.truth() in (clean[1:] if control.job.state == "done" else clean), where
        assert new.intents.unfinished == (), where
        ends.add(clean.index(new.truth()))
        moment, which = (moment, which + 1) if which + 1 < len(images) else (moment + 1, 0)
        ended = ended and which == 0
    assert ends == {0, 1} and moment > 10


FAILURES = {
    "open": errno.ENOSPC,
    "write": errno.ENOSPC,
    "fsync": errno.EIO,
    "ftruncate": errno.EIO,
    "replace": errno.EROFS,
    "unlink": errno.EROFS,
}


def fails_from(disk: Disk, moment: int, to: float) -> Callable[[str], None]:
    """What `at` does when the calls from MOMENT TO another fail, each as it can."""

    def fail(call: str) -> None:
        if moment <= disk.moments <= to and call in FAILURES:
            raise OSError(FAILURES[call], os.strerror(FAILURES[call]))

    return fail


@every_operation
@every_device
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("powered_off", [False, True], ids=["restart", "power cut"])
async def test_a_write_that_fails_is_told_of_and_nothing_is_half_or_undone_that_was_told_done(
    tmp_path: Path, disk: Disk, operation: str, device: Device, lasting: bool, powered_off: bool
) -> None:
    clean = await clean_states(tmp_path / "running", disk, operation, device, False)
    later = await clean_states(tmp_path / "later", disk, operation, device, powered_off)
    told = set()
    moment, met = 0, True
    while met:
        moment += 1
        folder = tmp_path / str(moment)
        world = await prepared(folder, disk, operation, device)
        disk.at = fails_from(disk, moment, float("inf") if lasting else moment)
        job = await world.do(operation, device)
        met = disk.moments >= moment
        await world.quiet()
        told.add(job.state)
        if job.state == "failed":
            assert error_name(job) == "org.hostpassd1.Error.Failed", moment
            assert f"state folder {folder}" in str(job.error) and "mistake" not in str(job.error), moment
        ends = {1} if job.state == "done" else {0} if operation == "assign" else {0, 1}
        end = clean.index(world.truth())
        assert end in ends and world.intents.unfinished == (), moment
        for _ in range(2):  # at once, and with the disk mended
            world = await restarted(world, folder, powered_off)
            assert later.index(world.truth()) == end, moment
            disk.at = lambda call: None
            await world.intents.catch_up()
        other = {"assign": "dismiss", "dismiss": "assign"}[operation]
        assert (await world.do(other if end else operation, device)).state == "done", moment
    assert told == {"failed", "done"} and moment > 10
