"""The daemon's life: a fault of its own ends it, to be started afresh, wherever it comes up."""

from __future__ import annotations

import asyncio
import contextlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostpassd import errors
from hostpassd.bus.router import Router
from hostpassd.daemon import Daemon
from hostpassd.ends import Ends
from hostpassd.host.udev import Udev
from hostpassd.host.uses import HostUses
from hostpassd.machines.stored import StoredWatch
from hostpassd.model.events import HypervisorChanged
from tests.sim.ends import Still, daemon_on, simulated

URI = "sim:///"
PATIENCE = 20


async def fault(*_: Any) -> None:
    raise RuntimeError("a fault of ours")


def plain_fault(*_: Any) -> None:
    raise RuntimeError("a fault of ours")


class Faulty(Still):
    """A hypervisor with a fault in it."""

    run = refresh = fault


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostpassd.daemon.START_LIMIT", 0.0)


@pytest.fixture(autouse=True)
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How far the daemon was when it froze what is there: not that of this process, where tests are, too."""
    found: list[str] = []
    monkeypatch.setattr("hostpassd.daemon.gc.collect", lambda: found.append("collected"))
    monkeypatch.setattr("hostpassd.daemon.gc.freeze", lambda: found.append("frozen"))
    return found


async def ends_by_itself(running: asyncio.Future[None]) -> None:
    with pytest.raises(errors.Failed, match="made a mistake"):
        await asyncio.wait_for(running, PATIENCE)


@pytest.mark.parametrize("where", ["a hypervisor", "the router", "the watchdog"])
async def test_a_fault_in_what_always_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    if where == "the router":
        monkeypatch.setattr(Router, "warm", fault)
    if where == "the watchdog":
        monkeypatch.setattr("hostpassd.daemon.feed_watchdog", fault)
    hypervisor = Faulty() if where == "a hypervisor" else Still()
    daemon = daemon_on(simulated(tmp_path, hypervisors={URI: hypervisor}))
    await ends_by_itself(asyncio.ensure_future(daemon.run()))


class Place:
    """A daemon that runs, its ends, and a folder."""

    def __init__(self, daemon: Daemon, ends: Ends, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.daemon, self.ends, self.folder, self.monkeypatch = daemon, ends, folder, monkeypatch


def scan_again(place: Place) -> None:
    place.monkeypatch.setattr("hostpassd.host.udev.read_all", plain_fault)
    Udev(place.ends.inlet.emit).scan_soon()


def scan_what_moved(place: Place) -> None:
    place.monkeypatch.setattr("hostpassd.host.udev.read_all", plain_fault)
    moved = types.SimpleNamespace(
        names={}, blocks={}, nics=set(), gone=set(), events=[], uses_changed=False, moved=True
    )
    Udev(place.ends.inlet.emit)._apply(moved)  # type: ignore[arg-type]


def read_uevents(place: Place) -> None:
    place.monkeypatch.setattr("hostpassd.host.udev._Batch.read", plain_fault)
    udev = Udev(place.ends.inlet.emit)
    udev._queue.append(None)
    udev._work()


def read_host_uses(place: Place) -> None:
    place.monkeypatch.setattr("hostpassd.host.uses.read_uses", plain_fault)
    HostUses(place.ends.inlet.emit, lambda path: None, {}, (), "").refresh()


def read_what_was_stored(place: Place) -> None:
    StoredWatch(Faulty(), str(place.folder))  # type: ignore[arg-type]
    (place.folder / "vm.new").write_text("")
    (place.folder / "\udcff.xml").write_text("")


def take_an_event_in_a_task_that_goes_on(place: Place) -> None:
    place.monkeypatch.setattr(place.daemon.state, "apply", plain_fault)
    with contextlib.suppress(RuntimeError):
        place.ends.inlet.emit(HypervisorChanged(URI, False, "x"))


def publish_in_a_handler(place: Place) -> None:
    place.ends.inlet.emit(HypervisorChanged(URI, False, "x"))
    place.monkeypatch.setattr(place.daemon.router, "publish", plain_fault)
    with contextlib.suppress(RuntimeError):
        place.daemon.publisher.flush()


FAULTS = [
    scan_again,
    scan_what_moved,
    read_uevents,
    read_host_uses,
    read_what_was_stored,
    take_an_event_in_a_task_that_goes_on,
    publish_in_a_handler,
]


async def test_the_collector_does_not_look_through_what_was_there_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: list[str]
) -> None:
    monkeypatch.setattr(Daemon, "announce_running", lambda daemon: frozen.append("running"))
    running = asyncio.ensure_future(daemon_on(simulated(tmp_path, hypervisors={URI: Still()})).run())
    while "frozen" not in frozen:
        await asyncio.sleep(0)
    assert frozen == ["running", "collected", "frozen"]
    running.cancel()
    await asyncio.wait({running})


@pytest.mark.parametrize("go_wrong", FAULTS)
async def test_a_fault_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, go_wrong: Callable[[Place], None]
) -> None:
    ends = simulated(tmp_path, hypervisors={URI: Still()})
    daemon = daemon_on(ends)
    running = asyncio.ensure_future(daemon.run())
    while not daemon.publisher.running:
        await asyncio.sleep(0)
    go_wrong(Place(daemon, ends, tmp_path, monkeypatch))
    await ends_by_itself(running)
