"""The daemon's life: a fault of its own ends it, to be started afresh, wherever it comes up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostpassd import daemon as daemon_module
from hostpassd import errors
from hostpassd.bus.router import Router
from hostpassd.config import Config
from hostpassd.daemon import Daemon
from hostpassd.host import udev as udev_module
from hostpassd.host import uses as uses_module
from hostpassd.host.sysfs import Memory
from hostpassd.host.udev import Udev
from hostpassd.host.uses import HostUses
from hostpassd.machines.hypervisor import Hypervisor
from hostpassd.machines.stored import StoredWatch
from hostpassd.model.events import HypervisorChanged

URI = "test:///default"
PATIENCE = 20


async def nothing(*_: Any) -> None:
    """In the place of what reaches out of the process."""


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Daemon]]:
    """Makes a daemon without a bus, a host or a hypervisor."""
    for kind, name in (
        (Router, "connect"),
        (Router, "own_name"),
        (Udev, "scan"),
        (HostUses, "read_now"),
        (Hypervisor, "run"),
    ):
        monkeypatch.setattr(kind, name, nothing)
    monkeypatch.setattr(Udev, "arm", lambda _: None)
    monkeypatch.setattr(HostUses, "start", lambda _: None)
    monkeypatch.setattr(daemon_module, "START_LIMIT", 0.0)
    yield lambda: Daemon(Config(hypervisors=(URI,)), tmp_path, None)


async def fault(*_: Any) -> None:
    raise RuntimeError("a fault of ours")


def plain_fault(*_: Any) -> None:
    raise RuntimeError("a fault of ours")


async def ends(daemon: Daemon) -> None:
    with pytest.raises(errors.Failed, match="made a mistake"):
        await asyncio.wait_for(daemon.run(), PATIENCE)


@pytest.mark.parametrize(("kind", "name"), [(Hypervisor, "run"), (Router, "warm"), (Daemon, "_watchdog")])
async def test_a_fault_in_what_always_runs(
    daemon: Callable[[], Daemon], monkeypatch: pytest.MonkeyPatch, kind: type, name: str
) -> None:
    monkeypatch.setattr(kind, name, fault)
    await ends(daemon())


def scan_again(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(udev_module, "_read_all", plain_fault)
    daemon._udev._overflowed()


def scan_what_moved(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(udev_module, "_read_all", plain_fault)
    batch = udev_module._Batch({"/sys/devices/x": "pci_x"}, Memory())
    batch._leave("/sys/devices/x")
    daemon._udev._apply(batch)


def read_uevents(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udev_module._Batch, "read", plain_fault)
    daemon._udev._queue.append(None)
    daemon._udev._work()


def read_host_uses(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(uses_module, "read_uses", plain_fault)
    daemon._uses._due()


def read_what_was_stored(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hypervisor, "refresh", fault)
    watch = StoredWatch(daemon._hypervisors[URI], "/none")
    watch._everything = True
    watch._read()


def take_an_event_in_a_task_that_goes_on(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon._state, "apply", plain_fault)
    with contextlib.suppress(RuntimeError):
        daemon.emit(HypervisorChanged(URI, False, "x"))


def publish_in_a_handler(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.emit(HypervisorChanged(URI, False, "x"))
    monkeypatch.setattr(daemon._router, "publish", plain_fault)
    with contextlib.suppress(RuntimeError):
        daemon._publisher.flush()


FAULTS = [
    scan_again,
    scan_what_moved,
    read_uevents,
    read_host_uses,
    read_what_was_stored,
    take_an_event_in_a_task_that_goes_on,
    publish_in_a_handler,
]


@pytest.mark.parametrize("go_wrong", FAULTS)
async def test_a_fault_on_the_way(
    daemon: Callable[[], Daemon],
    monkeypatch: pytest.MonkeyPatch,
    go_wrong: Callable[[Daemon, pytest.MonkeyPatch], None],
) -> None:
    made = daemon()
    own_name = Router.own_name

    async def when_started(*arguments: Any) -> None:
        await own_name(*arguments)
        asyncio.get_running_loop().call_soon(go_wrong, made, monkeypatch)

    monkeypatch.setattr(made._router, "own_name", when_started)
    await ends(made)
