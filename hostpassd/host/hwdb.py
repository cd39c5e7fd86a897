"""Names of vendors, products and PCI classes by their ids.

They are looked up here, and not taken from what udev has set on the device: that is missing for a moment whenever udev
handles an event of the device, and a name must not change and change back with it. Asked are udev's own hardware
database, where it is installed, and then pci.ids and usb.ids, the files of lspci and lsusb. Nothing of either is kept
but the answers, the newest few thousand: a question costs about a millisecond when its ids come up first, and nothing
after that. So whoever reads devices asks one `Names` of the whole daemon, which a scan fills from its thread; on the
loop there is then a millisecond for each model that is new to the host.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import re
from collections.abc import Callable, Mapping, Sequence

from hostpassd.model.text import clean

log = logging.getLogger(__name__)

# The packages pci.ids and usb.ids of Debian; hwdata of others, and of Debian too.
PCI_IDS = ("/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids")
USB_IDS = ("/usr/share/misc/usb.ids", "/usr/share/hwdata/usb.ids")

ANSWERS = 4096  # whoever plugs in devices can make up ids without end

# Below its first line an entry has lines that begin with a tab; comments can stand anywhere.
_NEXT_ENTRY = re.compile(rb"\n[^\t#\r\n]")

Properties = Mapping[str, str]


class Names:
    """Names by ids; an empty name where there is none."""

    def __init__(
        self,
        udev: Callable[[str], Properties] | None = None,
        pci_ids: Sequence[str] = PCI_IDS,
        usb_ids: Sequence[str] = USB_IDS,
    ) -> None:
        """UDEV: udev's properties for a modalias (`udev_properties` by default)."""
        self._udev = udev or udev_properties
        self._pci_ids = pci_ids
        self._usb_ids = usb_ids
        self.cached = functools.lru_cache(ANSWERS)(self._look_up)

    def pci(self, vendor: int, device: int, modalias: str = "") -> tuple[str, str]:
        """The names of a PCI vendor and of its device; MODALIAS, the device's own, tells the board that it is on."""
        return self.cached("pci", vendor, device, modalias)

    def pci_class(self, class_code: int) -> str:
        """The name of a PCI subclass, or of the base class where only that has one; CLASS_CODE has 24 bits."""
        base, sub = self.cached("class", class_code >> 16, class_code >> 8 & 0xFF)
        return sub or base

    def usb(self, vendor: int, product: int, modalias: str = "") -> tuple[str, str]:
        """The names of a USB vendor and of its product; MODALIAS: the device's own."""
        return self.cached("usb", vendor, product, modalias)

    def forget(self) -> None:
        """Ask anew from now on: the files may be others."""
        self.cached.cache_clear()

    def _look_up(self, kind: str, upper: int, lower: int, modalias: str = "") -> tuple[str, str]:
        """The names of an entry and of one below it, each from the first source that has it."""
        names = self._in_udev(kind, upper, lower, modalias)
        if not all(names):
            found = self._in_files(kind, upper, lower)
            names = (names[0] or found[0], names[1] or found[1])
        return names

    def _in_udev(self, kind: str, upper: int, lower: int, modalias: str) -> tuple[str, str]:
        shortest, properties = _UDEV[kind]
        found = self._udev(modalias or shortest.format(upper, lower))
        return clean(found.get(properties[0], "")), clean(found.get(properties[1], ""))

    def _in_files(self, kind: str, upper: int, lower: int) -> tuple[str, str]:
        files = self._usb_ids if kind == "usb" else self._pci_ids
        keys = (f"C {upper:02x}", f"{lower:02x}") if kind == "class" else (f"{upper:04x}", f"{lower:04x}")
        names = ("", "")
        for path in files:
            if not all(names):
                found = in_file(path, *(key.encode() for key in keys))
                names = (names[0] or found[0], names[1] or found[1])
        return names


# The beginning of a modalias that udev's patterns for these ids match, and the properties that they then set.
_DATABASE = ("ID_VENDOR_FROM_DATABASE", "ID_MODEL_FROM_DATABASE")
_UDEV = {
    "pci": ("pci:v{:08X}d{:08X}", _DATABASE),
    "usb": ("usb:v{:04X}p{:04X}", _DATABASE),
    "class": (
        "pci:v00000000d00000000sv00000000sd00000000bc{:02x}sc{:02x}i00",
        ("ID_PCI_CLASS_FROM_DATABASE", "ID_PCI_SUBCLASS_FROM_DATABASE"),
    ),
}


def in_file(path: str, upper: bytes, lower: bytes) -> tuple[str, str]:
    """The names of the entry UPPER and of LOWER below it in a file of lspci's and lsusb's format."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return _in_text(text, upper, lower)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        log.debug("no names from %s: %s", path, error)
        return "", ""


def _in_text(text: mmap.mmap, upper: bytes, lower: bytes) -> tuple[str, str]:
    key = upper + b"  "
    start = 0 if text[: len(key)] == key else text.find(b"\n" + key) + 1
    if not start and text[: len(key)] != key:
        return "", ""
    following = _NEXT_ENTRY.search(text, start)
    end = following.start() if following else len(text)
    line = text.find(b"\n\t" + lower + b"  ", start, end)
    return _rest(text, start + len(key)), _rest(text, line + len(lower) + 4) if line >= 0 else ""


def _rest(text: mmap.mmap, start: int) -> str:
    end = text.find(b"\n", start)
    return clean(text[start : end if end >= 0 else len(text)])


def udev_properties(modalias: str) -> Properties:
    """What udev's hardware database (hwdb.bin) has for MODALIAS; nothing where there is no such database.

    udev sets these on devices by itself where it runs. It need not run here, and need not have in a container.
    """
    library = libudev()
    database = library.udev_hwdb_new(None) if library else None
    if not library or not database:
        return {}
    found = {}
    try:
        entry = library.udev_hwdb_get_properties_list_entry(database, modalias.encode(), 0)
        while entry:
            value = library.udev_list_entry_get_value(entry) or b""
            found[library.udev_list_entry_get_name(entry).decode()] = value.decode("utf-8", "replace")
            entry = library.udev_list_entry_get_next(entry)
    finally:
        library.udev_hwdb_unref(database)
    return found


@functools.cache
def libudev() -> ctypes.CDLL | None:
    """libudev with the types of the calls above; pyudev declares them too, but offers no way to make them."""
    try:
        library = ctypes.CDLL("libudev.so.1")
    except OSError as error:
        log.debug("no names from udev's hardware database: %s", error)
        return None
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    for name, arguments, result in (
        ("udev_hwdb_new", [pointer], pointer),
        ("udev_hwdb_unref", [pointer], pointer),
        ("udev_hwdb_get_properties_list_entry", [pointer, text, ctypes.c_uint], pointer),
        ("udev_list_entry_get_next", [pointer], pointer),
        ("udev_list_entry_get_name", [pointer], text),
        ("udev_list_entry_get_value", [pointer], text),
    ):
        call = getattr(library, name)
        call.argtypes, call.restype = arguments, result
    return library
