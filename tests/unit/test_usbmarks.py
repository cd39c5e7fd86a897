"""What descriptors show: interfaces of all configurations, FIDO, MTP."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpassd.host.usbmarks import all_interfaces, is_fido, marks

DEVICE = bytes.fromhex("12010003000000095a0b530100 31 01020602".replace(" ", ""))


def configuration(*triples: str) -> bytes:
    """A configuration's descriptors with an interface and an endpoint for each of TRIPLES."""
    body = b""
    for number, triple in enumerate(triples):
        body += bytes([9, 4, number, 0, 1]) + bytes.fromhex(triple.replace(":", "")) + b"\0"
        body += bytes([7, 5, 0x81, 2, 0, 2, 0])
    return bytes([9, 2]) + (9 + len(body)).to_bytes(2, "little") + bytes([len(triples), 1, 0, 0xA0, 50]) + body


def test_interfaces_of_all_configurations() -> None:
    """An RTL8153: vendor-specific first, the standard's class in the second configuration."""
    descriptors = DEVICE + configuration("ff:ff:00") + configuration("02:06:00", "0a:00:00", "0a:00:00")
    assert all_interfaces(descriptors) == ("ff:ff:00", "02:06:00", "0a:00:00")


@given(st.binary(max_size=200))
def test_any_descriptors_can_be_read(descriptors: bytes) -> None:
    for triple in all_interfaces(descriptors):
        assert len(triple) == 8


@pytest.mark.parametrize("cut", range(60))
def test_descriptors_that_were_cut_off(cut: int) -> None:
    descriptors = DEVICE + configuration("08:06:50", "03:01:01")
    assert all_interfaces(descriptors[: len(descriptors) - cut]) in (("08:06:50", "03:01:01"), ("08:06:50",), ())


# Report descriptors as hid-recorder shows them.
FIDO = "06d0f1 0901 a101 0920 1500 26ff00 7508 9540 8102 0921 1500 26ff00 7508 9540 9102 c0"
KEYBOARD = "0501 0906 a101 0507 19e0 29e7 1500 2501 7501 9508 8102 c0"
VENDOR = "06 00ff 0901 a101 06 ffff c0"
KEYBOARD_WITH_A_LONG_ITEM = f"fe 03 aa 06d0f1 {KEYBOARD}"


@pytest.mark.parametrize(
    ("report", "fido"),
    [
        (FIDO, True), (KEYBOARD + FIDO, True), (KEYBOARD, False), (VENDOR, False), ("", False), ("06d0", False),
        ("07d0f10000", True), (KEYBOARD_WITH_A_LONG_ITEM, False), (f"fe 03 aa bbccdd {FIDO}", True), ("fe", False),
        ("0ad0f1", False),
    ],
)  # fmt: skip
def test_fido(report: str, fido: bool) -> None:
    assert is_fido(bytes.fromhex(report)) is fido


@given(st.binary(max_size=100))
def test_any_report_can_be_read(report: bytes) -> None:
    is_fido(report)


class Folder:
    """A device's folder in sysfs."""

    def __init__(self, **files: bytes) -> None:
        self.files = {name.replace("__", "/"): content for name, content in files.items()}

    def read(self, name: str) -> bytes:
        return self.files.get(name, b"")

    def text(self, name: str) -> str:
        return self.read(name).decode().strip()

    def entries(self, name: str = "") -> list[str]:
        inside = (path.removeprefix(f"{name}/") for path in self.files if path.startswith(f"{name}/"))
        return sorted({path.partition("/")[0] for path in inside})


def test_marks() -> None:
    hid = "1-1:1.1/0003:1050:0407.0003/report_descriptor"
    key = Folder(**{"1-1:1.0/interface": b"MTP\n", hid: bytes.fromhex(FIDO)})
    assert marks(key, ["1-1:1.0", "1-1:1.1"], matched_by_sane=False) == ("fido", "mtp")
    assert marks(key, ["1-1:1.0"], matched_by_sane=True) == ("mtp", "scanner")
    other = Folder(**{"1-1:1.0/interface": b"MTP-like\n", "1-1:1.0/uevent": bytes.fromhex(FIDO)})
    assert marks(other, ["1-1:1.0", "1-1:1.7"], matched_by_sane=False) == ()
