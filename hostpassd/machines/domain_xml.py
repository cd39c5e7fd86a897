"""Domain XML to claims, and a device to the element that hands it to a machine. Pure: no I/O, no libvirt."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from lxml import etree

from hostpassd.model.codes import WARNINGS, Fact, fact
from hostpassd.model.device import Device, Facts, Mdev, Pci, Scsi, Usb
from hostpassd.model.drivers import DRIVER_NAME
from hostpassd.model.machine import (
    STARTUP_POLICIES,
    Claim,
    ClaimSource,
    InterfaceSource,
    MdevSource,
    NodeSource,
    PciSource,
    Ports,
    ScsiSource,
    Settings,
    UsbSource,
)
from hostpassd.model.pci_address import PciAddress
from hostpassd.model.text import clean

# What strtoull takes at base 0, which is how libvirt reads an address (virXMLPropUInt): 010 is 8, 0x10 is 16.
_NUMBER = re.compile(r"[ \t\n\r\f\v]*\+?(?:0[xX](?P<hex>[0-9a-fA-F]+)|(?P<octal>0[0-7]*)|(?P<decimal>[1-9][0-9]*))")

# A generator of random numbers is the machine's own; these two are the host's for everybody.
_SHARED_RANDOM = frozenset({"/dev/random", "/dev/urandom"})

_NODE_TAGS = {"storage": "block", "misc": "char"}


# The longest string that libvirt sends or takes (REMOTE_STRING_MAX of its protocol), in bytes.
_LONGEST = 4 << 20

# While lxml parses it puts its own loader of external entities into libxml2, for the whole process. Two threads that
# parse at once can leave it there for good, and libvirt, which shares libxml2, then crashes in it when it reads a file
# (lxml 4.9: _register_document_loader; seen with test:///FILE).
_PARSING = threading.Lock()


class _Broken(ValueError):
    """This element claims something, but not in a way that can be read."""

    def warning(self, tag: str) -> Fact:
        """What is told of it, an element with TAG."""
        return fact(WARNINGS["unreadable-hold"], "", element=tag, fault=clean(str(self)))


class _Unknown(_Broken):
    """This element claims something in a way of which nothing is known."""

    def warning(self, tag: str) -> Fact:
        return fact(WARNINGS["unknown-reference"], "", element=tag, fault=clean(str(self)))


class _InPool(_Broken):
    """This element claims a volume of a storage pool."""

    def __init__(self, pool: str, volume: str) -> None:
        super().__init__(pool, volume)
        self._pool, self._volume = pool, volume

    def warning(self, tag: str) -> Fact:
        return fact(WARNINGS["pool-unavailable"], "", pool=clean(self._pool), volume=clean(self._volume))


def read_claims(xml: str) -> tuple[tuple[Claim, ...], list[Fact]]:
    """The claims on host devices in XML, one half of a domain, and a warning for each that is not understood.

    ValueError: XML is no XML at all, has a document type, which libvirt never writes, or is longer than it can send.
    """
    claims: list[Claim] = []
    warnings: list[Fact] = []
    domain = _parse(xml)
    for element, claim in _claims_in(domain, warnings):
        if not _doubles_serial(element, claim, claims):
            claims.append(claim)
    return tuple(claims), [*warnings, *_on_command_line(domain)]


def is_live(xml: str) -> bool:
    """Whether XML is a running machine's live half, which alone has an id. ValueError: XML cannot be read."""
    return _parse(xml).get("id") is not None


def read_title(xml: str) -> str:
    """The title of the machine in XML, '' for none. ValueError: XML cannot be read."""
    return clean(_parse(xml).findtext("title") or "")


def claim_of(element_xml: str) -> Claim:
    """The claim that one element makes. ValueError: it makes none that can be read."""
    claims, warnings = read_claims(f"<domain><devices>{element_xml}</devices></domain>")
    if not claims:
        raise ValueError(warnings[0].message if warnings else "The element claims no device of this host.")
    return claims[0]


# Controllers whose bus takes one PCI Express device, at slot 0.
_EXPRESS_PORTS = frozenset({"pcie-root-port", "pcie-switch-downstream-port"})
# Controllers whose bus takes conventional devices, and their first slot for these. Slot 0 is the bus's own; of
# pci-root libvirt keeps 1 for the chipset and 2 for the display.
_FIRST_SLOTS = {"pci-root": 3, "pci-bridge": 1, "pcie-to-pci-bridge": 1}
_SLOTS = 32


def read_ports(xml: str) -> Ports:
    """The free places for PCI devices in XML, one half of a domain. ValueError: XML cannot be read."""
    models: dict[int, str] = {}
    used: set[tuple[int, int]] = set()
    for element in _parse(xml).iterfind("devices/*"):
        if element.tag == "controller" and element.get("type") == "pci":
            with contextlib.suppress(_Broken):
                models[_number(element, "index")] = element.get("model", "")
        if address := _guest_address(element):
            place = PciAddress.parse(address)
            used.add((place.bus, place.device))
    taken = {bus for bus, _ in used}
    express = (bus for bus, model in models.items() if model in _EXPRESS_PORTS and bus not in taken)
    slots = (
        (bus, slot)
        for bus, model in models.items()
        if model in _FIRST_SLOTS
        for slot in range(_FIRST_SLOTS[model], _SLOTS)
    )
    return Ports(tuple(express), tuple(place for place in slots if place not in used))


# How a machine is to have a device of which nobody says more: as libvirt has it.
_NOTHING_SAID = Settings()


def hostdev_xml(
    device: Device,
    *,
    alias: str,
    config: bool,
    unique: bool,
    guest_address: str = "",
    multifunction: bool = False,
    rom_file: str = "",
    settings: Settings = _NOTHING_SAID,
) -> str:
    """The <hostdev> element that hands DEVICE to a machine.

    CONFIG: for the stored half. UNIQUE: no other USB device here has its vendor and product. ALIAS: "ua-..." or "".
    GUEST_ADDRESS: 0000:04:00.0 or "", for a PCI or mediated device. ROM_FILE: the path of what the guest sees as its
    ROM, or "" for its own. SETTINGS: of these the startup policy (of a USB device, in the stored half), the VFIO
    driver, the ROM's bar and the boot order are a caller's to choose. ValueError: DEVICE is of no kind that can be
    handed over, or GUEST_ADDRESS is no PCI address.
    """
    facts, write = _writer(device)
    element = etree.Element("hostdev", mode="subsystem")
    source = etree.SubElement(element, "source")
    write(element, source, facts, config, unique)
    if config and settings.startup_policy:
        source.set("startupPolicy", settings.startup_policy)
    _write_settings(element, settings, rom_file)
    if alias:
        etree.SubElement(element, "alias", name=alias)
    if guest_address:
        _write_guest_address(element, guest_address, multifunction)
    return _text(element)


def with_claim(domain_xml: str, element_xml: str) -> str:
    """DOMAIN_XML with ELEMENT_XML added to its devices. ValueError: one of them cannot be read."""
    domain = _parse(domain_xml)
    devices = domain.find("devices")
    if devices is None:
        devices = etree.SubElement(domain, "devices")
    devices.append(_parse(element_xml))
    return _text(domain)


def without_claim(domain_xml: str, claim: Claim) -> str:
    """DOMAIN_XML without the element that makes CLAIM. LookupError: it has none. ValueError: it cannot be read."""
    domain = _parse(domain_xml)
    found = [element for element, other in _claims_in(domain, []) if other.id == claim.id]
    if not found:
        raise LookupError(f"No element makes the claim {claim.id}.")
    # A serial port's console is the same claim written twice: libvirt would make the serial port again from it.
    for element in found if claim.kind == "chardev" else found[:1]:
        element.getparent().remove(element)
    return _text(domain)


def _parse(xml: str) -> etree._Element:
    data = xml.encode("utf-8", "replace")
    if len(data) > _LONGEST:
        raise ValueError(f"The XML is longer than {_LONGEST} bytes, which is more than libvirt can send.")
    try:
        with _PARSING:
            if b"<!DOCTYPE" in data:
                etree.fromstring(data, _parser(target=_NoDocumentType()))
            return etree.fromstring(data, _parser())
    except etree.XMLSyntaxError as error:
        raise ValueError(f"The XML cannot be read: {clean(str(error))}") from None


def _parser(**more: object) -> etree.XMLParser:
    # Not huge_tree: libxml2's own limits are also what libvirt reads with, and they bound what an entity can grow to.
    return etree.XMLParser(encoding="utf-8", resolve_entities=False, no_network=True, load_dtd=False, **more)


class _NoDocumentType:
    """Refuses an XML with a document type before libxml2 reads any entity of it.

    A document type's words alone, in a comment or CDATA of the metadata, are fine.
    """

    def doctype(self, *_: object) -> None:
        raise ValueError("The XML has a document type, which libvirt never writes.")

    def close(self) -> None:
        """lxml asks for one."""


def _text(element: etree._Element) -> str:
    return str(etree.tostring(element, encoding="unicode", with_tail=False))


def _claims_in(domain: etree._Element, warnings: list[Fact]) -> Iterator[tuple[etree._Element, Claim]]:
    for element in domain.iterfind("devices/*"):
        reader = _READERS.get(element.tag) if isinstance(element.tag, str) else None
        if reader is None:
            continue
        try:
            read = reader(element)
        except _Broken as error:
            warnings.append(error.warning(element.tag))
            continue
        if read is not None:
            yield element, _claim(element, *read)


# QEMU's own command line, which libvirt hands on. A device of the host is named there by one of these, or by its node.
_ARGUMENTS = "{http://libvirt.org/schemas/domain/qemu/1.0}commandline/{*}arg"
_OF_THE_HOST = re.compile(r"\b(?:vfio-|usb-host|input-linux)|(?<![\w/])/dev/(?P<node>[^,\s]+)")
# What these nodes give everybody has, or they are none of a device.
_SHARED_NODES = re.compile(r"(?:u?random|null|zero|kvm|net/tun|vhost-net|vhost-vsock|shm/.*|hugepages.*|fd/.*|pts/.*)")


def _on_command_line(domain: etree._Element) -> Iterator[Fact]:
    for argument in domain.iterfind(_ARGUMENTS):
        value = argument.get("value", "")
        if any(not _SHARED_NODES.fullmatch(found["node"] or "-") for found in _OF_THE_HOST.finditer(value)):
            yield fact(WARNINGS["unknown-reference"], "", element="qemu:arg", fault=clean(value))


def _claim(element: etree._Element, kind: str, source: ClaimSource) -> Claim:
    alias = element.find("alias")
    written = element.find("source")
    return Claim(
        kind=kind,
        source=source,
        alias=clean(alias.get("name", "")) if alias is not None else "",
        xml=_text(element),
        id=_fit(f"{kind}:{source.id}"),
        text=clean(source.text),
        missing=written is not None and written.get("missing") == "yes",
        guest_address=_guest_address(element),
        settings=_settings(element),
    )


def _doubles_serial(element: etree._Element, claim: Claim, earlier: list[Claim]) -> bool:
    """Whether this is the console that libvirt writes for serial port 0, which is the same thing again."""
    return element.tag == "console" and any(claim.id == other.id for other in earlier)


def _fit(text: str) -> str:
    """TEXT fit for the bus and still one of a kind: what cleaning changes, a digest of the whole makes up for."""
    fit = clean(text, 200)
    return fit if fit == text else f"{fit}#{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:16]}"


# Reading: one function for each element that can claim a device of the host. None: it claims none.

_Read = tuple[str, ClaimSource] | None


def _read_hostdev(element: etree._Element) -> _Read:
    mode = element.get("mode", "subsystem")
    kind = element.get("type", "")
    if mode == "capabilities":
        return _read_capabilities(element, kind)
    if mode != "subsystem":
        raise _Unknown(f"its mode {mode!r} is not known")
    reader = _SUBSYSTEMS.get(kind)
    if reader is None:
        raise _Unknown(f"its type {kind!r} is not known")
    source = reader(element)
    return ("hostdev", source) if source is not None else None


def _read_capabilities(element: etree._Element, kind: str) -> _Read:
    if kind == "net":
        return "capabilities", InterfaceSource(_content(element, "source/interface"))
    if kind in _NODE_TAGS:
        return "capabilities", NodeSource(_content(element, f"source/{_NODE_TAGS[kind]}"))
    raise _Unknown(f"its type {kind!r} is not known")


def _read_interface(element: etree._Element) -> _Read:
    kind = element.get("type")
    if kind == "direct":
        # In the stored half of an interface on a libvirt network there is none: that is chosen at the start.
        name = _attribute(element, "source", "dev")
        return ("macvtap", InterfaceSource(name)) if name else None
    if kind != "hostdev":
        return None
    address = _only(element, "source/address")
    if address.get("type") == "pci":
        return "interface", _read_pci(element)
    if address.get("type") == "usb":
        return "interface", _read_usb(element)
    raise _Unknown(f"its source is of the type {address.get('type')!r}, which is not known")


def _read_disk(element: etree._Element) -> _Read:
    kind = element.get("type")
    if kind == "block":
        path = _attribute(element, "source", "dev")  # an empty drive has none
        return ("disk", NodeSource(path)) if path else None
    if kind == "volume" and (volume := _attribute(element, "source", "volume")):
        raise _InPool(_attribute(element, "source", "pool"), volume)
    return ("disk", _read_pci(element)) if kind == "nvme" else None


def _read_input(element: etree._Element) -> _Read:
    name = {"evdev": "dev", "passthrough": "evdev"}.get(element.get("type", ""))
    if name is None:
        return None
    path = _attribute(element, "source", name)
    if not path:
        raise _Broken("it names no device node")
    return "evdev", NodeSource(path)


def _read_chardev(element: etree._Element) -> _Read:
    if element.get("type") != "dev":
        return None
    path = _attribute(element, "source", "path")
    if not path:
        raise _Broken("it names no device node")
    return "chardev", NodeSource(path)


def _read_rng(element: etree._Element) -> _Read:
    backend = element.find("backend")
    if backend is None or backend.get("model") != "random":
        return None
    path = (backend.text or "").strip()
    return ("rng", NodeSource(path)) if path and path not in _SHARED_RANDOM else None


def _read_tpm(element: etree._Element) -> _Read:
    backend = element.find("backend")
    if backend is None or backend.get("type") != "passthrough":
        return None
    path = _attribute(element, "backend/device", "path")
    return "tpm", NodeSource(path or "/dev/tpm0")  # libvirt's own default


def _read_pci(element: etree._Element) -> PciSource:
    return PciSource(_pci_address(_only(element, "source/address")))


def _read_usb(element: etree._Element) -> UsbSource:
    vendor, product = element.find("source/vendor"), element.find("source/product")
    address = element.find("source/address")
    if vendor is None and product is None and address is None:
        raise _Broken("it names no USB device")
    if (vendor is None) != (product is None):
        raise _Broken("it names a vendor or a product, but not both")
    ids = (_number(vendor, "id", 0xFFFF), _number(product, "id", 0xFFFF)) if vendor is not None else (None, None)
    place = (_number(address, "bus"), _number(address, "device")) if address is not None else (None, None)
    return UsbSource(*ids, *place)


def _read_scsi(element: etree._Element) -> ScsiSource | None:
    if _attribute(element, "source", "protocol"):  # iSCSI: the machine's own initiator, nothing of this host's
        return None
    adapter = _attribute(element, "source/adapter", "name")
    host = re.fullmatch(r"scsi_host([0-9]{1,9})", adapter)
    if host is None:
        raise _Broken(f"its adapter {adapter!r} is no SCSI host")
    address = _only(element, "source/address")
    channel, target, lun = (_number(address, name, 2**64 - 1) for name in ("bus", "target", "unit"))
    return ScsiSource(int(host[1]), channel, target, lun)


def _read_mdev(element: etree._Element) -> MdevSource:
    written = _attribute(element, "source/address", "uuid")
    try:
        return MdevSource(str(uuid.UUID(written)))
    except ValueError:
        raise _Broken(f"{written!r} is no UUID") from None


def _read_nothing(element: etree._Element) -> None:
    """A type that hands no device of the tree to the machine (vhost targets are configured, not plugged in)."""


_READERS: dict[str, Callable[[etree._Element], _Read]] = {
    "hostdev": _read_hostdev,
    "interface": _read_interface,
    "disk": _read_disk,
    "input": _read_input,
    "serial": _read_chardev,
    "parallel": _read_chardev,
    "console": _read_chardev,
    "rng": _read_rng,
    "tpm": _read_tpm,
}

_SUBSYSTEMS: dict[str, Callable[[etree._Element], ClaimSource | None]] = {
    "pci": _read_pci,
    "usb": _read_usb,
    "scsi": _read_scsi,
    "scsi_host": _read_nothing,
    "mdev": _read_mdev,
}


def _only(element: etree._Element, path: str) -> etree._Element:
    found = element.find(path)
    if found is None:
        raise _Broken(f"it has no {path}")
    return found


def _attribute(element: etree._Element, path: str, name: str) -> str:
    found = element.find(path)
    return str(found.get(name, "")) if found is not None else ""


def _content(element: etree._Element, path: str) -> str:
    text = (_only(element, path).text or "").strip()
    if not text:
        raise _Broken(f"its {path} is empty")
    return text


def _number(element: etree._Element, name: str, limit: int = 0xFFFFFFFF) -> int:
    written = element.get(name)
    if written is None:
        raise _Broken(f"it has no {name}")
    match = _NUMBER.fullmatch(written)
    if match is None or len(written) > 64:
        raise _Broken(f"its {name} {written!r} is no number")
    value = int(match["hex"] or match["octal"] or match["decimal"], 16 if match["hex"] else 8 if match["octal"] else 10)
    if value > limit:
        raise _Broken(f"its {name} {written!r} is out of range")
    return value


_PCI_PARTS = {"domain": 0xFFFFFFFF, "bus": 0xFF, "slot": 0x1F, "function": 7}


def _pci_address(element: etree._Element) -> str:
    """The address of a PCI function; as in libvirt a part that is not written is 0, but not all of them."""
    if not any(name in element.attrib for name in _PCI_PARTS):
        raise _Broken("its PCI address is empty")
    parts = [_number(element, name, limit) if name in element.attrib else 0 for name, limit in _PCI_PARTS.items()]
    return str(PciAddress(*parts))


def _guest_address(element: etree._Element) -> str:
    address = element.find("address")
    if address is None or address.get("type") != "pci":
        return ""
    try:
        return _pci_address(address)
    except _Broken:
        return ""  # "to be assigned": an address with nothing in it


# Settings: whoever defines a machine can write anything, and what is none of the words that there are is left out.

_YES_NO = {"yes": True, "no": False}
_ON_OFF = {"on": True, "off": False}
_DECIMAL = re.compile(r"[0-9]{1,10}")
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")


def _settings(element: etree._Element) -> Settings:
    policy = _attribute(element, "source", "startupPolicy")
    mac = _attribute(element, "mac", "address")
    return Settings(
        managed=_YES_NO.get(element.get("managed") or _attribute(element, "source", "managed")),
        startup_policy=policy if policy in STARTUP_POLICIES else None,
        driver=_variant_driver(element),
        rom_bar=_ON_OFF.get(_attribute(element, "rom", "bar")),
        mac_address=mac.lower() if _MAC.fullmatch(mac) else None,
        vlan=_whole(element, "vlan/tag", "id", 0, 4095),
        boot_order=_whole(element, "boot", "order", 1, 0xFFFFFFFF),
    )


def _variant_driver(element: etree._Element) -> str | None:
    """The kernel's driver that is asked for (libvirt 10.0). The driver's `name` is what QEMU takes it with: vfio."""
    if element.tag != "hostdev" and element.get("type") != "hostdev":
        return None
    driver = _attribute(element, "driver", "model")
    return driver if DRIVER_NAME.fullmatch(driver) else None


def _whole(element: etree._Element, path: str, name: str, lowest: int, highest: int) -> int | None:
    written = _attribute(element, path, name)
    number = int(written) if _DECIMAL.fullmatch(written) else -1
    return number if lowest <= number <= highest else None


# Writing.


# Facts, the element and its source, whether it is for the stored half, whether nothing else here has the same ids.
_Write = Callable[[etree._Element, etree._Element, Any, bool, bool], None]


def _writer(device: Device) -> tuple[Facts, _Write]:
    for facts in device.facts:
        if write := _WRITERS.get(type(facts)):
            return facts, write
    raise ValueError(f"A device of the kind {device.kind} cannot be handed to a machine.")


def _write_pci(element: etree._Element, source: etree._Element, pci: Pci, config: bool, unique: bool) -> None:
    element.set("type", "pci")
    element.set("managed", "yes")
    etree.SubElement(source, "address", _pci_attributes(pci.address))


def _write_usb(element: etree._Element, source: etree._Element, usb: Usb, config: bool, unique: bool) -> None:
    """Live always by bus and number, too: that is this very plug-in, and libvirt checks that the rest is so."""
    element.set("type", "usb")
    if config:
        source.set("startupPolicy", "optional")
    named = usb.vendor_id != 0  # libvirt refuses a vendor of 0
    if named:
        etree.SubElement(source, "vendor", id=f"{usb.vendor_id:#06x}")
        etree.SubElement(source, "product", id=f"{usb.product_id:#06x}")
    if not (config and unique and named):
        etree.SubElement(source, "address", bus=str(usb.bus), device=str(usb.number))


def _write_scsi(element: etree._Element, source: etree._Element, scsi: Scsi, config: bool, unique: bool) -> None:
    element.set("type", "scsi")
    etree.SubElement(source, "adapter", name=f"scsi_host{scsi.host}")
    etree.SubElement(source, "address", bus=str(scsi.channel), target=str(scsi.target), unit=str(scsi.lun))


def _write_mdev(element: etree._Element, source: etree._Element, mdev: Mdev, config: bool, unique: bool) -> None:
    element.set("type", "mdev")
    element.set("model", mdev.api)
    etree.SubElement(source, "address", uuid=mdev.uuid)


_WRITERS: dict[type[Facts], _Write] = {Pci: _write_pci, Usb: _write_usb, Scsi: _write_scsi, Mdev: _write_mdev}


def _write_settings(element: etree._Element, settings: Settings, rom_file: str) -> None:
    if settings.driver is not None:
        etree.SubElement(element, "driver", model=settings.driver)
    rom = {} if settings.rom_bar is None else {"bar": "on" if settings.rom_bar else "off"}
    rom |= {"file": rom_file} if rom_file else {}
    if rom:
        etree.SubElement(element, "rom", rom)
    if settings.boot_order is not None:
        etree.SubElement(element, "boot", order=str(settings.boot_order))


def _write_guest_address(element: etree._Element, guest_address: str, multifunction: bool) -> None:
    if element.get("type") not in ("pci", "mdev"):
        raise ValueError("Only a PCI or mediated device has a PCI address in the machine.")
    address = etree.SubElement(element, "address", {"type": "pci", **_pci_attributes(guest_address)})
    if multifunction:
        address.set("multifunction", "on")


def _pci_attributes(address: str) -> dict[str, str]:
    domain, bus, slot, function = PciAddress.parse(clean(address))
    return {"domain": f"0x{domain:04x}", "bus": f"0x{bus:02x}", "slot": f"0x{slot:02x}", "function": f"0x{function:x}"}
