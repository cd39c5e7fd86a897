"""What is counted, and what is not."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hostpassd import errors
from hostpassd.model.events import DeviceGone, DeviceSeen, DevicesScanned, Event
from hostpassd.state import State
from hostpassd.state.counters import Counters
from tests.sim.house import PAIR, STICK, House
from tests.sim.world import bridge, net, pci, usb


class Counted:
    """Counters on a state of their own."""

    def __init__(self) -> None:
        self.state = State()
        self.counters = Counters(self.state)

    def take(self, event: Event) -> None:
        self.counters.notice(event, self.state.apply(event))

    def counts(self) -> dict[str, int]:
        return {name: count for name, count in self.counters.now().items() if count}


def test_what_can_be_assigned_counts_as_plugged_once_the_start_is_over() -> None:
    counted = Counted()
    port, nic = bridge("0000:00:01.0", group=1), pci("0000:01:00.0", group=2)
    counted.take(DevicesScanned((port, nic)))
    assert counted.counts() == {}
    counted.counters.counts_plugs = True
    hub, stick = usb("1-1", number=3, device_class=9), usb("1-2", number=4)
    for device in (net("enp1s0", nic), hub, stick):
        counted.take(DeviceSeen(device))
    counted.take(DeviceSeen(dataclasses.replace(stick, label="Another")))
    assert counted.counts() == {"plugs": 1}
    counted.take(DeviceSeen(usb("1-2", number=5)))  # another one, and nobody said that the first had gone
    assert counted.counts() == {"plugs": 1, "replugs": 1}
    counted.take(DeviceGone(hub.sysfs_path))
    counted.take(DevicesScanned((port,)))
    assert counted.counts() == {"plugs": 1, "replugs": 1, "unplugs": 2}


@pytest.fixture
async def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    made = House(tmp_path, monkeypatch)
    yield made
    made.close()


async def test_jobs_count_by_their_ends_and_refusals_by_themselves(house: House) -> None:
    def counts() -> dict[str, int]:
        return {name: count for name, count in house.daemon.counters.now().items() if count}

    assert (await house.do("assign", STICK)).job.state == "done"
    assert counts() == {"jobs-done": 1}
    with pytest.raises(errors.NotAuthorized):
        await house.start("assign", PAIR[0], denied=True)
    assert counts() == {"jobs-done": 1, "refused": 1}
    house.libvirt.fails = lambda call: True
    assert (await house.do("assign", PAIR[0])).job.state == "failed"
    assert counts() == {"jobs-done": 1, "refused": 1, "jobs-failed": 1}
