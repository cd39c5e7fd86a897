"""Names by ids: which source counts, files of every sort, and that nothing is looked up twice."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpassd.host import hwdb, udev
from hostpassd.host.hwdb import PCI_IDS, USB_IDS, Names
from hostpassd.host.reading import Files
from hostpassd.host.sysfs import Memory

PCI_TEXT = """\
#
#\tList of PCI ID's
#
# Syntax:
# vendor  vendor_name

0010  Allied Telesis, Inc (Wrong ID)
# This is a relabelled RTL-8139
\t8139  AT-2500TX V3 Ethernet
8086  Intel Corporation
\t10c9  82576 Gigabit Network Connection
\t\t103c 31ef  NC362i Integrated Dual port Gigabit Server Adapter
\t\t8086 10ca  A subsystem that is no device
# a note
\t10ca  82576 Virtual Function
\t1521  I350  Gigabit Network Connection

8087  Intel (another one)
\t1533  of another vendor
ffff  Illegal Vendor ID

C 01  Mass storage controller
\t00  SCSI storage controller
\t08  Non-Volatile memory controller
\t\t02  NVM Express
C 02  Network controller
\t00  Ethernet controller
"""
USB_TEXT = "1d6b  Linux Foundation\n\t0002  2.0 root hub\n05ac  Caf\xe9\nHUT 0c  Consumer\n\t02b  no product"

NONE = ("", "")


def no_udev(modalias: str) -> Mapping[str, str]:
    """A host without udev's database."""
    return {}


@pytest.fixture
def names(tmp_path: Path) -> Names:
    """Names from the files above."""
    (tmp_path / "pci.ids").write_text(PCI_TEXT)
    (tmp_path / "usb.ids").write_text(USB_TEXT, "latin-1")
    return Names(no_udev, [str(tmp_path / "pci.ids")], [str(tmp_path / "usb.ids")])


@pytest.mark.parametrize(
    ("vendor", "device", "expected"),
    [
        (0x8086, 0x10CA, ("Intel Corporation", "82576 Virtual Function")),
        (0x8086, 0x1521, ("Intel Corporation", "I350 Gigabit Network Connection")),
        (0x8086, 0x1533, ("Intel Corporation", "")),
        (0x8086, 0x31EF, ("Intel Corporation", "")),
        (0x0010, 0x8139, ("Allied Telesis, Inc (Wrong ID)", "AT-2500TX V3 Ethernet")),
        (0xFFFF, 0x0000, ("Illegal Vendor ID", "")),
        (0x103C, 0x31EF, NONE),
        (0x0200, 0x0000, NONE),
    ],
)
def test_pci(names: Names, vendor: int, device: int, expected: tuple[str, str]) -> None:
    assert names.pci(vendor, device) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0x010802, "Non-Volatile memory controller"),
        (0x020000, "Ethernet controller"),
        (0x028000, "Network controller"),
        (0x120000, ""),
    ],
)
def test_pci_classes(names: Names, code: int, expected: str) -> None:
    assert names.pci_class(code) == expected


def test_usb(names: Names) -> None:
    assert names.usb(0x1D6B, 0x0002) == ("Linux Foundation", "2.0 root hub")  # in the very first lines
    assert names.usb(0x05AC, 0x0001) == ("Caf\ufffd", "")
    assert names.usb(0x1D6B, 0x02B) == ("Linux Foundation", "")
    assert names.usb(0x8086, 0x10CA) == NONE


# Which source counts.


def test_udev_s_database_comes_first_and_the_file_adds_what_it_lacks(names: Names, tmp_path: Path) -> None:
    asked: list[str] = []

    def database(modalias: str) -> Mapping[str, str]:
        asked.append(modalias)
        return {"ID_VENDOR_FROM_DATABASE": "Intel\x1b Corp.", "ID_PCI_CLASS_FROM_DATABASE": "Network"}

    both = Names(database, [str(tmp_path / "pci.ids")], [])
    assert both.pci(0x8086, 0x10CA) == ("Intel Corp.", "82576 Virtual Function")
    assert both.pci_class(0x020000) == "Ethernet controller"
    assert both.usb(0x1D6B, 0x0002) == ("Intel Corp.", "")
    assert asked == [
        "pci:v00008086d000010CA",
        "pci:v00000000d00000000sv00000000sd00000000bc02sc00i00",
        "usb:v1D6Bp0002",
    ]


def test_a_second_file_adds_what_the_first_lacks(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("8086  Intel\n")
    (tmp_path / "new").write_text("8086  Intel Corporation\n\t10ca  82576\n")
    files = [str(tmp_path / name) for name in ("absent", "old", "new")]
    assert Names(no_udev, files).pci(0x8086, 0x10CA) == ("Intel", "82576")


# Files of every sort.


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\0" * 5000,
        b"8086",
        b"8086 Intel",
        b"8086\tIntel",
        b"8086  ",
        b"\t10ca  82576\n8087  x",
        b"\xff" * 99,
    ],
)
def test_a_broken_file_has_no_names(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pci.ids").write_bytes(content)
    assert Names(no_udev, [str(tmp_path / "pci.ids")]).pci(0x8086, 0x10CA) == NONE


def test_an_absent_file_and_a_folder_have_no_names(tmp_path: Path) -> None:
    assert Names(no_udev, [str(tmp_path / "none"), str(tmp_path)]).pci(0x8086, 0x10CA) == NONE


def test_a_file_without_a_last_newline_and_with_dos_ones(tmp_path: Path) -> None:
    (tmp_path / "pci.ids").write_bytes(b"\r\n8086  Intel\r\n\r\n\t10c9  82576\r\n\t10ca  82576\x07 VF")
    assert Names(no_udev, [str(tmp_path / "pci.ids")]).pci(0x8086, 0x10CA) == ("Intel", "82576 VF")


NAME = st.text("".join(map(chr, range(0x21, 0x7F))), min_size=1, max_size=12)
IDS = st.integers(0, 0xFFFF)
COMMENT = st.sampled_from(["", "# 8086  no vendor\n", "\n", "#\t10ca  no device\n"])
ENTRIES = st.dictionaries(IDS, st.tuples(NAME, st.dictionaries(IDS, NAME, max_size=4), COMMENT), max_size=6)


@given(ENTRIES, st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
def test_what_stands_in_a_file_is_found_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory,
    entries: Mapping[int, tuple[str, Mapping[int, str], str]],
    vendor: int,
    device: int,
) -> None:
    path = tmp_path_factory.mktemp("ids") / "pci.ids"
    lines = []
    for number, (name, devices, comment) in entries.items():
        lines += [f"{number:04x}  {name}\n", comment]
        for lower, lower_name in devices.items():
            lines += [f"\t{lower:04x}  {lower_name}\n", f"\t\t{vendor:04x} {device:04x}  subsystem\n", comment]
    path.write_text("".join(lines), "ascii")
    names = Names(no_udev, [str(path)])
    for upper in {*entries, vendor}:
        name, devices, _ = entries.get(upper, ("", {}, ""))
        for lower in {*devices, device}:
            assert names.pci(upper, lower) == (name, devices.get(lower, ""))


def _parsed(path: str) -> dict[str, tuple[str, dict[str, str]]]:
    """A whole file, read line by line."""
    found: dict[str, tuple[str, dict[str, str]]] = {}
    devices: dict[str, str] = {}
    for line in Path(path).read_text("utf-8", "replace").splitlines():
        if top := re.fullmatch(r"([0-9a-f]{4}|C [0-9a-f]{2})  (.*)", line):
            devices = {}
            found[top[1]] = (top[2], devices)
        elif below := re.fullmatch(r"\t([0-9a-f]{2,4})  (.*)", line):
            devices[below[1]] = below[2]
        elif line[:1] not in ("", "\t", "#"):
            devices = {}
    return found


@pytest.mark.parametrize(("path", "which"), [(PCI_IDS[0], "pci"), (USB_IDS[0], "usb")])
def test_the_files_of_the_packages(path: str, which: str) -> None:
    """Every vendor of Debian's packages pci.ids and usb.ids, with its last device and one that is not there."""
    parsed = {key: row for key, row in _parsed(path).items() if len(key) == 4 and not key.startswith("C ")}
    assert len(parsed) > 2000
    find: Callable[[int, int], tuple[str, str]] = getattr(Names(no_udev, [path], [path]), which)
    for vendor in [*list(parsed)[::40], *(key for key in ("8086", "10de", "1d6b", "046d") if key in parsed)]:
        name, devices = parsed[vendor]
        last = list(devices)[-1:]
        for device in [*last, "fffe"]:
            wanted = " ".join(name.split()), " ".join(devices.get(device, "").split())
            assert find(int(vendor, 16), int(device, 16)) == wanted


def test_the_classes_of_the_package() -> None:
    parsed = {key[2:]: row for key, row in _parsed(PCI_IDS[0]).items() if key.startswith("C ")}
    names = Names(no_udev)
    for base in ("01", "02", "03", "0c", "12"):
        for sub, name in parsed[base][1].items():
            assert names.pci_class(int(base + sub + "00", 16)) == name


# Nothing is looked up twice.


def test_each_id_is_looked_up_once(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, bytes, bytes]] = []
    real = hwdb.in_file

    def counted(path: str, upper: bytes, lower: bytes) -> tuple[str, str]:
        opened.append((path, upper, lower))
        return real(path, upper, lower)

    monkeypatch.setattr(hwdb, "in_file", counted)
    for _ in range(1000):
        names.pci(0x8086, 0x10CA)
        names.pci(0xABCD, 0x0001)
        names.pci_class(0x020000)
    assert len(opened) == 3
    names.forget()
    names.pci(0x8086, 0x10CA)
    assert len(opened) == 4


def test_a_scan_asks_anew(names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So Rescan shows what a file has that was installed meanwhile."""
    monkeypatch.setattr(udev, "NAMES", names)
    monkeypatch.setattr(udev, "_paths", list)
    assert names.pci(0xABCD, 0x0001) == NONE
    (tmp_path / "pci.ids").write_text("abcd  New\n\t0001  Card\n")
    assert names.pci(0xABCD, 0x0001) == NONE
    udev.read_all(Memory(), Files())
    assert names.pci(0xABCD, 0x0001) == ("New", "Card")


def test_made_up_ids_do_not_pile_up(names: Names) -> None:
    for device in range(3 * hwdb.ANSWERS):
        names.cached("usb", 0xFFFF, device)
    assert names.cached.cache_info().currsize == hwdb.ANSWERS


# udev's own database.


class Library:
    """libudev, with a database of one entry."""

    def __init__(self, entry: list[tuple[bytes, bytes | None]] | None) -> None:
        self.entry = entry
        self.open = 0

    def udev_hwdb_new(self, udev: None) -> int:
        self.open += self.entry is not None
        return 0 if self.entry is None else 17

    def udev_hwdb_unref(self, database: int) -> None:
        self.open -= 1

    def udev_hwdb_get_properties_list_entry(self, database: int, modalias: bytes, flags: int) -> int:
        assert (database, flags) == (17, 0)
        return 1 if modalias == b"usb:v1D6Bp0002" and self.entry else 0

    def udev_list_entry_get_name(self, number: int) -> bytes:
        return self._row(number)[0]

    def udev_list_entry_get_value(self, number: int) -> bytes | None:
        return self._row(number)[1]

    def udev_list_entry_get_next(self, number: int) -> int:
        return number + 1 if self.entry and number < len(self.entry) else 0

    def _row(self, number: int) -> tuple[bytes, bytes | None]:
        assert self.entry
        return self.entry[number - 1]


def test_udev_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library([(b"ID_VENDOR_FROM_DATABASE", b"Linux \xff"), (b"ID_AUTOSUSPEND", None)])
    monkeypatch.setattr(hwdb, "libudev", lambda: library)
    found = hwdb.udev_properties("usb:v1D6Bp0002")
    assert found == {"ID_VENDOR_FROM_DATABASE": "Linux \ufffd", "ID_AUTOSUSPEND": ""}
    assert hwdb.udev_properties("usb:v1D6Bp0003") == {}
    assert library.open == 0


@pytest.mark.parametrize("library", [None, Library(None)])
def test_no_library_and_no_database(monkeypatch: pytest.MonkeyPatch, library: Library | None) -> None:
    monkeypatch.setattr(hwdb, "libudev", lambda: library)
    assert hwdb.udev_properties("usb:v1D6Bp0002") == {}


def test_libudev_has_these_calls() -> None:
    library = hwdb.libudev()
    assert library is not None
    database = library.udev_hwdb_new(None)
    if database:
        library.udev_hwdb_unref(database)
    assert isinstance(hwdb.udev_properties("pci:v00008086d000010CA"), dict)
