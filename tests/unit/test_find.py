"""What a text spells."""

from __future__ import annotations

import pytest

from hostpassd.find import find_devices
from tests.unit.world import net, pci, state_of, usb

NIC = pci("0000:01:00.0", group=2)


@pytest.mark.parametrize("text", ["1-1", "0000:01:00.0", "52:54:00:00:00:01", "usb7", "8086:10d3", "eth0"])
def test_a_serial_number_cannot_stand_in_for_a_place_or_an_id(text: str) -> None:
    liar = usb("1-5", number=9, serial=text)
    assert find_devices(state_of(liar), text) == ([liar.name] if text == "eth0" else [])
    truth = (NIC, net("eth0", NIC), usb("1-1", number=3), usb("usb7", number=1, device_class=9))
    assert liar.name not in find_devices(state_of(liar, *truth), text)


def test_ids_and_serials_find_all_that_have_them() -> None:
    twins = usb("1-1", number=3, serial="SAME"), usb("1-2", number=4, serial="SAME")
    state = state_of(*twins)
    for text in ("46f4:0001", "46F4:0001", "SAME"):
        assert find_devices(state, text) == [twin.name for twin in twins]
    assert find_devices(state, "") == find_devices(state, "same") == []
