"""Addresses of PCI functions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpassd.model.pci_address import PciAddress

addresses = st.builds(
    PciAddress, st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFF), st.integers(0, 0x1F), st.integers(0, 7)
)


@given(address=addresses)
def test_what_is_written_is_read(address: PciAddress) -> None:
    assert PciAddress.parse(str(address)) == address


@given(one=addresses, other=addresses)
def test_one_slot_is_all_but_the_function(one: PciAddress, other: PciAddress) -> None:
    assert (one.slot == other.slot) == (one[:3] == other[:3]) and one.slot.function == 0


def test_they_are_in_order_as_numbers() -> None:
    texts = ["0000:02:00.0", "0000:0a:00.1", "0000:10:00.0", "10000:00:00.0"]
    assert sorted(map(PciAddress.parse, reversed(texts))) == list(map(PciAddress.parse, texts))


@pytest.mark.parametrize("text", ["", "01:00.0", "0000:01:00", "0000:01:20.0", "0000:01:00.8", "0000:01:00.0\n", "x"])
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no PCI address"):
        PciAddress.parse(text)
