"""Object paths and links, before what they spell is looked up."""

from __future__ import annotations

import os
import threading

import pytest

from hostpassd import names
from hostpassd.bus import spelling
from hostpassd.state import find
from tests.sim.world import OTHER, net, pci, state_of

NIC = pci("0000:01:00.0", group=2)
INTERFACE = net("sda", NIC)


async def test_an_object_path_means_that_very_object() -> None:
    assert await spelling.device_text(names.device_path(NIC.name)) == NIC.name
    assert spelling.machine_text(names.machine_path(OTHER)) == OTHER


@pytest.mark.parametrize("last", ["sda", "0000:01:00.0", "1-1", "serial:x", "", "hostdev:usb:0951:1666", "a/b_c"])
async def test_what_is_no_name_is_not_looked_up_in_its_place(last: str) -> None:
    """A path that no object can have is nothing, and not what else its last part could spell."""
    text = await spelling.device_text(names.DEVICES + "/" + last)
    assert find.find_devices(state_of(NIC, INTERFACE), text) == []
    assert spelling.machine_text(names.MACHINES + "/" + last) == names.MACHINES + "/" + last


@pytest.mark.parametrize("text", ["vm", OTHER, "/org/hostpassd1/jobs/1", "", names.MACHINES])
def test_other_words_for_a_machine_stay_as_they_are(text: str) -> None:
    assert spelling.machine_text(text) == text


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, threading.Thread]]:
    """What is looked up in the file system, and by which thread."""
    asked: list[tuple[str, threading.Thread]] = []

    def realpath(path: str) -> str:
        asked.append((path, threading.current_thread()))
        return "/sys/devices/there"

    monkeypatch.setattr(os.path, "realpath", realpath)
    return asked


@pytest.mark.parametrize(
    "text",
    [
        "/sys/class/net/enp1s0",
        "/sys/bus/pci/devices/0000:01:00.0/",
        "/sys/dev/block/8:0",
        "/sys/tmp/x/../../dev/char/1:3",
    ],
)
async def test_the_kernels_own_links_are_followed_off_the_loop(
    text: str, followed: list[tuple[str, threading.Thread]]
) -> None:
    assert await spelling.device_text(text) == "/sys/devices/there"
    [(path, thread)] = followed
    assert path == os.path.normpath(text) and thread is not threading.main_thread()


@pytest.mark.parametrize(
    "text",
    [
        "/sys/class/../../tmp/x/l",
        "/sys/../tmp/x/l",
        "/sys/devices/pci0000:00/driver",
        "/sys/kernel/debug/x",
        "/sys/fs/fuse/connections",
        "/dev/disk/by-id/x",
        "/proc/self/root",
        "//sys/class/net/enp1s0",
        "sys/class/net/enp1s0",
        "/sys/class/net/lo/../../../../tmp/x",
        "/sys/class/" + "a/" * 40,
    ],
)
async def test_nothing_else_is_followed(text: str, followed: list[tuple[str, threading.Thread]]) -> None:
    assert await spelling.device_text(text) == text and followed == []


@pytest.mark.parametrize("text", ["x" * 513, "/sys/" + "a/" * 300, "/sys/class/" + "a" * 512])
async def test_a_text_that_is_longer_than_any_name_is_not_followed(
    text: str, followed: list[tuple[str, threading.Thread]]
) -> None:
    assert await spelling.device_text(text) == text and followed == []
