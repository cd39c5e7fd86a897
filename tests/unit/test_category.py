"""Categories: by ids, class and descriptors, whoever drives the thing."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from hostpassd.model.category import CATEGORIES, USB_ORDER, category, interface_category
from tests.sim.hardware import THINGS, Thing, event, lun, net, pci, usb

DOCUMENT = Path(__file__).parents[2] / "docs/categories.md"


@pytest.mark.parametrize("thing", THINGS, ids=str)
def test_things_of_real_life(thing: Thing) -> None:
    assert category(thing.device, thing.below, thing.parent) == thing.category


@pytest.mark.parametrize("thing", THINGS, ids=str)
def test_the_driver_bound_now_says_nothing(thing: Thing) -> None:
    for driver in ("vfio-pci", "usbfs", "uvcvideo"):
        device = dataclasses.replace(thing.device, driver=driver)
        assert category(device, thing.below, thing.parent) == thing.category


@pytest.mark.parametrize("thing", [thing for thing in THINGS if thing.device.kind in ("pci", "usb")], ids=str)
def test_a_thing_is_the_same_while_a_machine_has_it(thing: Thing) -> None:
    assert category(thing.device, (), thing.parent, before=thing.category) == thing.category


def test_all_words_are_known_and_come_up() -> None:
    assert {thing.category for thing in THINGS} == CATEGORIES


# The base class counts where the subclass has no word of its own.
@pytest.mark.parametrize(
    ("code", "word"),
    [
        (0x0000, "other"), (0x0100, "storage-controller"), (0x0107, "storage-controller"),
        (0x0108, "disk"), (0x0180, "storage-controller"), (0x0200, "network"), (0x0280, "wifi"), (0x0300, "gpu"),
        (0x0302, "gpu"), (0x0380, "gpu"), (0x0400, "other"), (0x0401, "audio"), (0x0403, "audio"), (0x0480, "camera"),
        (0x0500, "system"), (0x0580, "system"), (0x0600, "bridge"), (0x0604, "bridge"), (0x0680, "bridge"),
        (0x0700, "serial"), (0x0780, "serial"), (0x0800, "system"), (0x0880, "system"), (0x0B40, "accelerator"),
        (0x0B00, "other"), (0x0C00, "other"), (0x0C03, "usb-controller"), (0x0C05, "system"), (0x0C80, "other"),
        (0x0D11, "bluetooth"), (0x0D80, "other"), (0x1080, "other"), (0x1180, "other"), (0x1200, "accelerator"),
        (0x1300, "other"), (0xFF00, "other"),
    ],
)  # fmt: skip
def test_pci_classes(code: int, word: str) -> None:
    assert category(pci("8086:0001", code)) == word


@pytest.mark.parametrize(
    ("triple", "word"),
    [
        ("08:06:50", "disk"), ("08:06:62", "disk"), ("08:01:50", "disk"), ("08:04:01", "disk"),
        ("08:02:50", "optical-drive"), ("08:05:50", "optical-drive"), ("02:02:01", "serial"), ("02:02:ff", "network"),
        ("02:06:00", "network"), ("02:0d:00", "network"), ("02:0e:00", "network"), ("e0:01:03", "network"),
        ("ef:04:01", "network"), ("0a:00:00", "other"), ("e0:01:01", "bluetooth"), ("e0:02:01", "other"),
        ("03:01:01", "keyboard"), ("03:01:02", "mouse"), ("03:00:00", "other"), ("03:00:01", "other"),
        ("07:01:02", "printer"), ("06:01:01", "camera"), ("0e:02:00", "camera"), ("0b:00:00", "smartcard"),
        ("ff:42:01", "phone"), ("ff:ff:ff", "other"), ("fe:01:01", "other"), ("ff:5d:01", "game-controller"),
        ("58:42:00", "game-controller"), ("", "other"),
    ],
)  # fmt: skip
def test_interfaces(triple: str, word: str) -> None:
    assert interface_category(triple) == word


# An interface, or else a mark, that shows each word.
INTERFACES = {
    "smartcard": "0b:00:00",
    "camera": "0e:01:00",
    "bluetooth": "e0:01:01",
    "phone": "ff:42:01",
    "printer": "07:01:02",
    "disk": "08:06:50",
    "optical-drive": "08:02:50",
    "network": "02:06:00",
    "audio": "01:01:00",
    "keyboard": "03:01:01",
    "mouse": "03:01:02",
    "game-controller": "ff:5d:01",
    "serial": "02:02:01",
}
MARKS = {"security-key": "fido", "scanner": "scanner"}


@pytest.mark.parametrize("earlier", range(len(USB_ORDER)))
def test_the_first_of_what_interfaces_show_counts(earlier: int) -> None:
    one = USB_ORDER[earlier]
    for other in USB_ORDER[earlier:]:
        if (one, other) == ("scanner", "printer"):
            continue  # an all-in-one goes by its printer
        interfaces = " ".join(INTERFACES.get(word, "03:00:00") for word in (other, one))
        marks = tuple(MARKS[word] for word in (one, other) if word in MARKS)
        assert category(usb("abcd:0001", interfaces, marks=marks)) == one, (one, other)
        assert category(usb("abcd:0001", "ff:00:00", other=interfaces, marks=marks)) == one, (one, other)


def test_a_hub_is_a_hub_whatever_is_plugged_into_it() -> None:
    hub = usb("05e3:0610", "09:00:01 08:06:50", device_class=9)
    assert category(hub, (net("wlan0", "wlan"), lun("disk"))) == "hub"


def test_what_only_a_driver_tells_is_kept_while_nothing_tells_anything_else() -> None:
    stick = usb("148f:7601", "ff:ff:ff")
    assert category(stick, (net("wlan0", "wlan"),)) == "wifi"
    assert category(stick, (), before="wifi") == "wifi"
    assert category(stick, ()) == "other"
    # It turns out that behind the disc there is a disk.
    assert category(usb("0781:5406", "08:06:50"), (lun("cd/dvd"), lun("disk")), before="optical-drive") == "disk"
    # What descriptors alone tell needs no memory: here the ids or the configuration have become others.
    assert category(usb("0781:5406", "08:06:50"), (), before="camera") == "disk"


def test_what_hangs_below_a_pci_device_is_not_what_it_is() -> None:
    assert category(pci("8086:a36d", 0x0C03), (net("wlan0", "wlan"), event("keyboard"))) == "usb-controller"


def test_an_ethernet_interface_makes_no_wifi() -> None:
    assert category(usb("148f:7601", "ff:ff:ff"), (net("wlan0"),)) == "other"


# The icons of the freedesktop.org icon naming specification that stand for devices, and the few others in use here.
ICONS = {
    *("audio-card", "camera-photo", "camera-web", "computer", "drive-harddisk", "drive-optical"),
    *("drive-removable-media", "input-gaming", "input-keyboard", "input-mouse", "media-flash", "media-tape", "modem"),
    *("multimedia-player", "network-wired", "network-wireless", "phone", "printer", "scanner", "video-display"),
    *("dialog-password", "security-high", "network-receive", "applications-system", "applications-science"),
}


def test_the_document_has_a_row_and_an_icon_for_each_word() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| .+ \| `([a-z-]+)` \|$", DOCUMENT.read_text("utf-8"), re.MULTILINE)
    assert sorted(word for word, _ in rows) == sorted(CATEGORIES)
    assert {icon for _, icon in rows} <= ICONS
