"""Domain XML to claims and back."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import subprocess
import sys
import threading
from pathlib import Path

import libvirt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from hostpassd.machines.domain_xml import claim_of, hostdev_xml, read_claims, read_ports, with_claim, without_claim
from hostpassd.model.device import Block, Device, Facts, Mdev, Pci, Scsi, Usb
from hostpassd.model.machine import (
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

MDEV_UUID = "c2177883-f1bb-47f0-914d-32a22e3a8804"


def domain(*elements: str) -> str:
    return (
        "<domain type='kvm' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>win</name>"
        "<metadata><hostdev mode='subsystem' type='pci'/></metadata>"
        f"<devices><emulator>/usr/bin/qemu</emulator><!-- a comment -->{''.join(elements)}</devices></domain>"
    )


def hostdev(kind: str, source: str, rest: str = "", source_attributes: str = "") -> str:
    return f"<hostdev mode='subsystem' type='{kind}'><source {source_attributes}>{source}</source>{rest}</hostdev>"


def pci(bus: str, slot: str = "0x00", function: str = "0x0") -> str:
    return hostdev("pci", f"<address domain='0x0000' bus='{bus}' slot='{slot}' function='{function}'/>")


def only(*elements: str) -> Claim:
    claims, warnings = read_claims(domain(*elements))
    assert warnings == []
    assert len(claims) == 1
    return claims[0]


IDS = "<vendor id='0x0951'/><product id='0x1666'/>"
LUN = "<adapter name='scsi_host2'/><address bus='0' target='3' unit='17'/>"

CLAIMS: list[tuple[str, str, ClaimSource, str]] = [
    (pci("0x01"), "hostdev", PciSource("0000:01:00.0"), "hostdev:pci:0000:01:00.0"),
    (
        hostdev("pci", "<address bus='0x0a' slot='0x1f' function='0x7'/>"),
        "hostdev",
        PciSource("0000:0a:1f.7"),
        "hostdev:pci:0000:0a:1f.7",
    ),
    (
        hostdev("pci", "<address domain='0x10000' bus='1' slot='2' function='3'/>"),
        "hostdev",
        PciSource("10000:01:02.3"),
        "hostdev:pci:10000:01:02.3",
    ),
    (hostdev("usb", IDS), "hostdev", UsbSource(0x0951, 0x1666), "hostdev:usb:0951:1666"),
    (
        hostdev("usb", IDS + "<address bus='1' device='4'/>"),
        "hostdev",
        UsbSource(0x0951, 0x1666, 1, 4),
        "hostdev:usb:0951:1666:1:4",
    ),
    (hostdev("usb", "<address bus='1' device='4'/>"), "hostdev", UsbSource(bus=1, number=4), "hostdev:usb:bus1:4"),
    (hostdev("scsi", LUN), "hostdev", ScsiSource(2, 0, 3, 17), "hostdev:scsi:2:0:3:17"),
    (
        hostdev("mdev", f"<address uuid='{MDEV_UUID.upper()}'/>"),
        "hostdev",
        MdevSource(MDEV_UUID),
        f"hostdev:mdev:{MDEV_UUID}",
    ),
    (
        "<interface type='hostdev' managed='yes'><mac address='52:54:00:00:00:01'/><source>"
        "<address type='pci' domain='0x0000' bus='0x03' slot='0x10' function='0x1'/></source></interface>",
        "interface",
        PciSource("0000:03:10.1"),
        "interface:pci:0000:03:10.1",
    ),
    (
        "<interface type='hostdev'><source><address type='usb' bus='2' device='9'/></source></interface>",
        "interface",
        UsbSource(bus=2, number=9),
        "interface:usb:bus2:9",
    ),
    (
        "<interface type='direct'><source network='lan' dev='enp3s0' mode='bridge'/></interface>",
        "macvtap",
        InterfaceSource("enp3s0"),
        "macvtap:net:enp3s0",
    ),
    (
        "<disk type='block' device='disk'><source dev='/dev/disk/by-id/ata-X'/><target dev='vda'/></disk>",
        "disk",
        NodeSource("/dev/disk/by-id/ata-X"),
        "disk:node:/dev/disk/by-id/ata-X",
    ),
    (
        "<disk type='nvme' device='disk'><source type='pci' managed='yes' namespace='1'>"
        "<address domain='0x0000' bus='0x02' slot='0x00' function='0x0'/></source></disk>",
        "disk",
        PciSource("0000:02:00.0"),
        "disk:pci:0000:02:00.0",
    ),
    (
        "<input type='evdev'><source dev='/dev/input/event3' grab='all'/></input>",
        "evdev",
        NodeSource("/dev/input/event3"),
        "evdev:node:/dev/input/event3",
    ),
    (
        "<input type='passthrough' bus='virtio'><source evdev='/dev/input/event4'/></input>",
        "evdev",
        NodeSource("/dev/input/event4"),
        "evdev:node:/dev/input/event4",
    ),
    (
        "<parallel type='dev'><source path='/dev/parport0'/></parallel>",
        "chardev",
        NodeSource("/dev/parport0"),
        "chardev:node:/dev/parport0",
    ),
    (
        "<rng model='virtio'><backend model='random'>/dev/hwrng</backend></rng>",
        "rng",
        NodeSource("/dev/hwrng"),
        "rng:node:/dev/hwrng",
    ),
    (
        "<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>",
        "tpm",
        NodeSource("/dev/tpm0"),
        "tpm:node:/dev/tpm0",
    ),
    (
        "<hostdev mode='capabilities' type='storage'><source><block>/dev/sdf1</block></source></hostdev>",
        "capabilities",
        NodeSource("/dev/sdf1"),
        "capabilities:node:/dev/sdf1",
    ),
    (
        "<hostdev mode='capabilities' type='misc'><source><char>/dev/input/event3</char></source></hostdev>",
        "capabilities",
        NodeSource("/dev/input/event3"),
        "capabilities:node:/dev/input/event3",
    ),
    (
        "<hostdev mode='capabilities' type='net'><source><interface>eth0</interface></source></hostdev>",
        "capabilities",
        InterfaceSource("eth0"),
        "capabilities:net:eth0",
    ),
]


@pytest.mark.parametrize(("element", "kind", "source", "key"), CLAIMS)
def test_each_way_to_hold_a_device_is_read(element: str, kind: str, source: ClaimSource, key: str) -> None:
    claim = only(element)
    assert (claim.kind, claim.source, claim.id) == (kind, source, key)
    assert claim.text
    assert etree.fromstring(claim.xml).tag == etree.fromstring(element).tag


@pytest.mark.parametrize(
    "element",
    [
        hostdev("scsi", "<host name='example.com' port='3260'/>", source_attributes="protocol='iscsi' name='iqn.x/1'"),
        hostdev("scsi_host", "", source_attributes="protocol='vhost' wwpn='naa.5123456789abcde0'"),
        "<disk type='file'><source file='/var/lib/x.img'/></disk>",
        "<disk type='block' device='cdrom'><target dev='sda'/></disk>",
        "<disk type='volume' device='cdrom'><target dev='sda'/></disk>",
        "<interface type='network'><source network='default'/></interface>",
        "<interface type='direct'><source network='lan'/></interface>",
        "<input type='tablet' bus='usb'/>",
        "<serial type='pty'><source path='/dev/pts/3'/></serial>",
        "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
        "<rng model='virtio'><backend model='random'>/dev/random</backend></rng>",
        "<rng model='virtio'><backend model='egd' type='udp'/></rng>",
        "<tpm model='tpm-crb'><backend type='emulator'/></tpm>",
        "<redirdev bus='usb' type='spicevmc'/>",
    ],
)
def test_what_holds_nothing_of_this_host_is_no_claim_and_no_warning(element: str) -> None:
    assert read_claims(domain(element)) == ((), [])


@pytest.mark.parametrize(
    "element",
    [
        hostdev("cxl", ""),
        "<hostdev mode='teleport' type='usb'/>",
        "<hostdev mode='capabilities' type='cxl'/>",
        "<hostdev/>",
        hostdev("pci", ""),
        hostdev("pci", "<address/>"),
        pci("0x01", function="8"),
        pci("0x01", slot="0x20"),
        pci("08"),
        pci("-1"),
        pci("1 "),
        pci("0x"),
        pci("9" * 5000),
        hostdev("usb", ""),
        hostdev("usb", "<vendor id='0x0951'/>"),
        hostdev("usb", "<product id='0x1666'/>"),
        hostdev("usb", "<vendor/><product/>"),
        hostdev("usb", "<address bus='1' port='1.2'/>"),
        hostdev("scsi", "<adapter name='fc_host2'/><address bus='0' target='3' unit='17'/>"),
        hostdev("scsi", "<adapter name='scsi_host2'/>"),
        hostdev("mdev", "<address uuid='no-uuid'/>"),
        "<interface type='hostdev'><source/></interface>",
        "<interface type='hostdev'><source><address type='ccw'/></source></interface>",
        "<disk type='nvme'><source/></disk>",
        "<input type='evdev'/>",
        "<serial type='dev'/>",
        "<hostdev mode='capabilities' type='misc'><source><char/></source></hostdev>",
    ],
)
def test_a_broken_element_is_one_warning_and_costs_the_others_nothing(element: str) -> None:
    claims, warnings = read_claims(domain(pci("0x01"), element, hostdev("usb", IDS)))
    assert [claim.id for claim in claims] == ["hostdev:pci:0000:01:00.0", "hostdev:usb:0951:1666"]
    assert len(warnings) == 1
    assert warnings[0].code in ("unreadable-hold", "unknown-reference")
    assert len(warnings[0].message) < 400


@pytest.mark.parametrize(
    ("element", "code", "details"),
    [
        (hostdev("cxl", ""), "unknown-reference", {"element": "hostdev", "fault": "its type 'cxl' is not known"}),
        (
            "<hostdev mode='teleport' type='usb'/>",
            "unknown-reference",
            {"element": "hostdev", "fault": "its mode 'teleport' is not known"},
        ),
        (
            pci("0x01", slot="0x20"),
            "unreadable-hold",
            {"element": "hostdev", "fault": "its slot '0x20' is out of range"},
        ),
        ("<input type='evdev'/>", "unreadable-hold", {"element": "input", "fault": "it names no device node"}),
        (
            "<disk type='volume' device='disk'><source pool='vms' volume='root'/></disk>",
            "pool-unavailable",
            {"pool": "vms", "volume": "root"},
        ),
    ],
)
def test_what_is_not_understood_is_a_warning_that_says_what(element: str, code: str, details: dict[str, str]) -> None:
    claims, [found] = read_claims(domain(element))
    assert claims == () and (found.code, dict(found.details)) == (code, details)
    with pytest.raises(ValueError, match=re.escape(found.message)):
        claim_of(element)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("vfio-pci,host=0000:01:00.0", True),
        ("vfio-pci-nohotplug,sysfsdev=/sys/bus/pci/devices/0000:01:00.0", True),
        ("usb-host,hostbus=1,hostaddr=4", True),
        ("input-linux,id=kbd1,evdev=/dev/input/by-id/usb-keyboard,grab_all=on", True),
        ("file=/dev/sdb,format=raw", True),
        ("/dev/disk/by-id/ata-X", True),
        ("memory-backend-file,mem-path=/dev/shm/looking-glass,size=32M", False),
        ("rng-random,filename=/dev/urandom", False),
        ("isa-applesmc,osk=x", False),
        ("file=/srv/dev/sdb.img", False),
        ("", False),
    ],
)
def test_a_device_of_the_host_on_the_command_line_is_a_warning(argument: str, told: bool) -> None:
    lines = f"<qemu:commandline><qemu:arg value='-device'/><qemu:arg value='{argument}'/></qemu:commandline></domain>"
    claims, warnings = read_claims(domain(pci("0x01")).replace("</domain>", lines))
    assert len(claims) == 1
    assert [(found.code, dict(found.details)) for found in warnings] == (
        [("unknown-reference", {"element": "qemu:arg", "fault": argument})] if told else []
    )


@pytest.mark.parametrize(
    ("written", "number"),
    [("010", 8), ("0x10", 16), ("10", 10), ("0", 0), ("00", 0), ("+7", 7), (" 7", 7), ("0X1f", 31)],
)
def test_numbers_are_read_as_libvirt_reads_them(written: str, number: int) -> None:
    claim = only(hostdev("usb", f"<address bus='{written}' device='1'/>"))
    assert claim.source == UsbSource(bus=number, number=1)


def test_twins_are_two_claims() -> None:
    twins = [hostdev("usb", f"{IDS}<address bus='1' device='{number}'/>") for number in (4, 5)]
    claims, _ = read_claims(domain(*twins))
    assert [claim.id for claim in claims] == ["hostdev:usb:0951:1666:1:4", "hostdev:usb:0951:1666:1:5"]


def test_the_same_source_has_the_same_id_in_both_halves() -> None:
    stored = only(hostdev("scsi", LUN))
    live = only(hostdev("scsi", LUN, "<alias name='hostdev0'/><address type='drive' controller='0'/>"))
    assert live.id == stored.id
    assert (live.alias, stored.alias) == ("hostdev0", "")


def test_missing_and_the_guest_address() -> None:
    absent = only(hostdev("usb", IDS, "<alias name='ua-1'/>", "startupPolicy='optional' missing='yes'"))
    assert absent.missing and absent.alias == "ua-1" and absent.text == "usb 0951:1666"
    address = "<address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x1'/>"
    assert only(hostdev("mdev", f"<address uuid='{MDEV_UUID}'/>", address)).guest_address == "0000:04:00.1"
    assert only(hostdev("mdev", f"<address uuid='{MDEV_UUID}'/>", "<address type='pci'/>")).guest_address == ""


VF = "<source><address type='pci' domain='0' bus='3' slot='16' function='1'/></source>"


@pytest.mark.parametrize(
    ("element", "said"),
    [
        (pci("0x01"), Settings()),
        (
            hostdev("pci", "<address bus='1'/>", "<driver name='vfio'/><rom bar='off' file='/x'/><boot order='2'/>"),
            Settings(rom_bar=False, boot_order=2),
        ),
        (
            "<hostdev mode='subsystem' type='pci' managed='no'><driver name='vfio' model='mlx5_vfio_pci'/>"
            "<source><address bus='1'/></source><rom bar='on'/></hostdev>",
            Settings(managed=False, driver="mlx5_vfio_pci", rom_bar=True),
        ),
        (hostdev("usb", IDS, source_attributes="startupPolicy='optional'"), Settings(startup_policy="optional")),
        (
            f"<interface type='hostdev' managed='yes'>{VF}<mac address='52:54:00:AA:00:01'/>"
            "<vlan trunk='yes'><tag id='42'/><tag id='47'/></vlan><driver model='vfio-pci'/></interface>",
            Settings(managed=True, driver="vfio-pci", mac_address="52:54:00:aa:00:01", vlan=42),
        ),
        (
            "<disk type='nvme'><driver name='qemu' model='x'/><source managed='yes'><address bus='2'/></source></disk>",
            Settings(managed=True),
        ),
    ],
)
def test_how_a_machine_is_to_have_a_device(element: str, said: Settings) -> None:
    assert only(element).settings == said


@pytest.mark.parametrize("number", ["", "x", "-1", "4096", "9" * 4000, "\u0664", "1e3", "0x10", " 1"])
def test_settings_that_make_no_sense_are_left_out(number: str) -> None:
    element = (
        f"<interface type='hostdev' managed='{number}'>{VF.replace('<source', f'<source startupPolicy={number!r}')}"
        f"<mac address='52:54:00:00:00:{number}'/><vlan><tag id='{number}'/></vlan><rom bar='{number}'/>"
        f"<driver model='../{number}'/><boot order='{'0' if number == '4096' else number}'/></interface>"
    )
    assert only(element).settings == Settings()


def test_a_console_that_doubles_a_serial_port_counts_once() -> None:
    serial = "<serial type='dev'><source path='/dev/ttyS0'/><target port='0'/></serial>"
    console = "<console type='dev'><source path='/dev/ttyS0'/><target type='serial' port='0'/></console>"
    assert only(serial, console).id == "chardev:node:/dev/ttyS0"
    assert only(console).id == "chardev:node:/dev/ttyS0"
    left = without_claim(domain(serial, console, pci("0x01")), only(serial))
    assert [claim.id for claim in read_claims(left)[0]] == ["hostdev:pci:0000:01:00.0"]


def test_long_and_hostile_strings_are_cut_for_people_and_stay_apart() -> None:
    long = "/dev/" + "x" * 4096
    paths = [long + "1", long + "2", "/dev/a\u202eb", "/dev/ab"]
    claims = [only(f"<disk type='block'><source dev='{path}'/></disk>") for path in paths]
    assert len({claim.id for claim in claims}) == len(paths)
    assert all(len(claim.id) < 256 and len(claim.text) <= 256 and claim.id.isprintable() for claim in claims)
    assert claims[0].source == NodeSource(paths[0])


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "<domain>",
        "<domain><name>a\0b</name></domain>",
        "<!DOCTYPE d [<!ENTITY a 'x'>]><domain>&a;</domain>",
        "<!-- c --> <!DOCTYPE d [<!ENTITY a SYSTEM 'file:///etc/hostname'>]><domain>&a;</domain>",
        "\ufeff<!DOCTYPE d [<!ENTITY a 'x'>]><domain><devices a='&a;'/></domain>",
        "<?xml version='1.0' encoding='utf-16'?><!DOCTYPE d [<!ENTITY a 'x'>]><domain a='&a;'/>",
        "<!DOCTYPE d SYSTEM 'file:///etc/hostname'><domain/>",
        "<domain>" + "x" * (4 << 20) + "</domain>",
    ],
    ids=range(9),
)
def test_what_is_no_domain_xml_is_an_error_and_no_empty_list(xml: str) -> None:
    with pytest.raises(ValueError):
        read_claims(xml)


def test_a_huge_description_is_read() -> None:
    """As large as libvirt can send one."""
    xml = domain(pci("0x01"))
    xml = xml.replace("<metadata>", "<metadata>" + "<a>" * 200 + "x" * ((4 << 20) - 2000) + "</a>" * 200)
    assert len(read_claims(xml)[0]) == 1


def test_the_words_of_a_document_type_in_metadata_are_only_words() -> None:
    words = "<metadata><!-- <!DOCTYPE d [<!ENTITY a 'x'>]> --><![CDATA[<!DOCTYPE d>]]>"
    assert len(read_claims(domain(pci("0x01")).replace("<metadata>", words))[0]) == 1


HOSTILE = """
import resource
from hostpassd.machines.domain_xml import read_claims
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
grows = "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 12))
for xml in (
    "<!-- -->" * 50_000 + "<domain",
    "<?x y?> " * 50_000 + "<!DOCTYPE d>",
    "\ufeff<!-- -->" + "<!-- --> " * 50_000 + "<!DOCTYPE d [<!ENTITY a0 'x'>" + grows + "]><domain a='&a11;'/>",
    "<a>" * 1_000_000,
):
    try:
        read_claims(xml)
    except ValueError:
        print("refused")
"""


def test_what_is_hostile_costs_neither_time_nor_memory() -> None:
    """In a process of its own, which the kernel ends when it is not done with little of either."""
    command, folder = [sys.executable, "-c", HOSTILE], Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["refused"] * 4), done.stderr


def test_threads_that_read_at_once_leave_libxml2_as_it_was() -> None:
    libxml2 = ctypes.CDLL("libxml2.so.2")
    libxml2.xmlGetExternalEntityLoader.restype = ctypes.c_void_p
    before = libxml2.xmlGetExternalEntityLoader()
    xml = domain(*[pci("0x01")] * 500)
    readers = [threading.Thread(target=lambda: [read_claims(xml) for _ in range(40)]) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert libxml2.xmlGetExternalEntityLoader() == before


# Writing.


def a_pci() -> Pci:
    return Pci("0000:0a:1f.7", 0x020000, "", 0x8086, 1, 0, 0, 0, 0, 1, -1, (), False, None, 0, False)


def device(kind: str, facts: Facts) -> Device:
    return Device(name="x", kind=kind, sysfs_path="/sys/devices/x", parent=None, facts=(facts,))


DEVICES = [
    (device("pci", a_pci()), PciSource("0000:0a:1f.7")),
    (device("usb", Usb(1, 10, "1-4", 0x0951, 0x16, 0, 480, ())), UsbSource(0x0951, 0x16, 1, 10)),
    (device("scsi", Scsi(2, 0, 3, 17, "disk", "")), ScsiSource(2, 0, 3, 17)),
    (device("mdev", Mdev(MDEV_UUID, "mtty-1")), MdevSource(MDEV_UUID)),
]


@pytest.mark.parametrize(("given_device", "source"), DEVICES)
@pytest.mark.parametrize("stored", [False, True])
def test_what_is_written_is_read_again(given_device: Device, source: ClaimSource, stored: bool) -> None:
    written = hostdev_xml(given_device, alias="ua-hostpassd-1", config=stored, unique=False)
    claim = only(written)
    assert (claim.source, claim.alias, claim.kind) == (source, "ua-hostpassd-1", "hostdev")


@given(
    st.integers(0, 255),
    st.integers(1, 127),
    st.integers(0, 0xFFFF),
    st.integers(0, 0xFFFF),
    st.booleans(),
    st.booleans(),
)
def test_any_usb_device_written_is_read_again(
    bus: int, number: int, vendor: int, product: int, stored: bool, unique: bool
) -> None:
    usb = device("usb", Usb(bus, number, "1-4", vendor, product, 0, 480, ()))
    names = (vendor, product) if vendor else (None, None)
    place = (None, None) if stored and unique and vendor else (bus, number)
    assert only(hostdev_xml(usb, alias="", config=stored, unique=unique)).source == UsbSource(*names, *place)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("ids", [(0x0951, 0x16), (0x0951, 0), (0, 0x16), (0, 0)])
def test_libvirt_takes_any_usb_device_as_it_is_written(ids: tuple[int, int], stored: bool, unique: bool) -> None:
    usb = device("usb", Usb(1, 5, "1-4", *ids, 0, 480, ()))
    written = hostdev_xml(usb, alias="", config=stored, unique=unique)
    whole = f"""<domain type='test'><name>x</name><memory>1024</memory><os><type>hvm</type></os>
    <devices>{written}</devices></domain>"""
    connection = libvirt.open("test:///default")
    try:
        taken = connection.defineXML(whole).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        assert [claim.source for claim in read_claims(taken)[0]] == [only(written).source]
    finally:
        connection.close()


def test_a_usb_device_is_optional_in_the_stored_half_only() -> None:
    usb = DEVICES[1][0]
    stored = etree.fromstring(hostdev_xml(usb, alias="", config=True, unique=True))
    assert stored.find("source").get("startupPolicy") == "optional"
    assert stored.find("source/address") is None
    live = etree.fromstring(hostdev_xml(usb, alias="", config=False, unique=True))
    assert live.find("source").get("startupPolicy") is None
    assert dict(live.find("source/address").attrib) == {"bus": "1", "device": "10"}
    chosen = Settings(startup_policy="mandatory")
    assert only(hostdev_xml(usb, alias="", config=True, unique=True, settings=chosen)).settings == chosen
    assert only(hostdev_xml(usb, alias="", config=False, unique=True, settings=chosen)).settings == Settings()


CHOSEN = [
    (DEVICES[0][0], Settings(rom_bar=True, boot_order=3)),
    (DEVICES[1][0], Settings(startup_policy="mandatory", boot_order=1)),
]


@pytest.mark.parametrize(("given_device", "chosen"), CHOSEN)
def test_libvirt_has_a_device_as_the_caller_chose(given_device: Device, chosen: Settings) -> None:
    written = hostdev_xml(given_device, alias="", config=True, unique=True, settings=chosen)
    whole = f"""<domain type='test'><name>x</name><memory>1024</memory><os><type>hvm</type></os>
    <devices>{written}</devices></domain>"""
    connection = libvirt.open("test:///default")
    try:
        flags = libvirt.VIR_DOMAIN_DEFINE_VALIDATE
        taken = connection.defineXMLFlags(whole, flags).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        [claim] = read_claims(taken)[0]
        assert dataclasses.replace(claim.settings, managed=None) == chosen
    finally:
        connection.close()


@pytest.mark.parametrize("bar", [None, True, False])
def test_a_rom_is_a_file_beside_its_bar(bar: bool | None) -> None:
    said = {} if bar is None else {"bar": "on" if bar else "off"}
    for file, wanted in (("", said), ("/usr/share/a&b,c.rom", {**said, "file": "/usr/share/a&b,c.rom"})):
        written = hostdev_xml(
            DEVICES[0][0], alias="", config=True, unique=True, rom_file=file, settings=Settings(rom_bar=bar)
        )
        assert [dict(rom.attrib) for rom in etree.fromstring(written).iterfind("rom")] == ([wanted] if wanted else [])
        assert only(written).settings.rom_bar is bar


def test_a_driver_is_written_as_libvirt_10_reads_it() -> None:
    chosen = Settings(managed=True, driver="mlx5_vfio_pci")
    written = hostdev_xml(DEVICES[0][0], alias="", config=False, unique=True, settings=chosen)
    assert dict(etree.fromstring(written).find("driver").attrib) == {"model": "mlx5_vfio_pci"}
    assert only(written).settings == chosen


def test_a_pci_device_is_managed_and_takes_its_place_in_the_guest() -> None:
    xml = hostdev_xml(
        DEVICES[0][0],
        alias="",
        config=True,
        unique=True,
        guest_address="0000:04:00.0",
        multifunction=True,
        settings=Settings(rom_bar=False),
    )
    element = etree.fromstring(xml)
    assert element.get("managed") == "yes"
    assert element.find("rom").get("bar") == "off"
    assert element.find("alias") is None
    address = {"domain": "0x0000", "bus": "0x04", "slot": "0x00", "function": "0x0", "multifunction": "on"}
    assert dict(element.find("address").attrib) == {"type": "pci", **address}
    assert only(xml).guest_address == "0000:04:00.0"


def test_what_cannot_be_written_is_an_error() -> None:
    with pytest.raises(ValueError):
        hostdev_xml(device("block", Block("/dev/sda", 1)), alias="", config=False, unique=True)
    with pytest.raises(ValueError):
        hostdev_xml(DEVICES[1][0], alias="", config=True, unique=True, guest_address="0000:04:00.0")
    with pytest.raises(ValueError):
        hostdev_xml(DEVICES[0][0], alias="", config=True, unique=True, guest_address="4:0.0")


def test_an_alias_is_never_markup() -> None:
    written = hostdev_xml(DEVICES[0][0], alias="ua-'/><x y='\"&", config=False, unique=True)
    assert only(written).alias == "ua-'/><x y='\"&"


def test_with_and_without_a_claim() -> None:
    before = domain(pci("0x01"))
    after = with_claim(before, hostdev("usb", IDS))
    claims, _ = read_claims(after)
    assert [claim.id for claim in claims] == ["hostdev:pci:0000:01:00.0", "hostdev:usb:0951:1666"]
    assert [claim.id for claim in read_claims(without_claim(after, claims[0]))[0]] == ["hostdev:usb:0951:1666"]
    with pytest.raises(LookupError):
        without_claim(before, claims[1])
    assert len(read_claims(with_claim("<domain/>", hostdev("usb", IDS)))[0]) == 1


# Free places.


def controller(index: str, model: str, address: str = "") -> str:
    return f"<controller type='pci' index='{index}' model='{model}'>{address}</controller>"


def guest(bus: str, slot: str, function: str = "0x0", more: str = "") -> str:
    return f"<address type='pci' domain='0x0000' bus='{bus}' slot='{slot}' function='{function}' {more}/>"


def test_the_free_places_of_a_machine_are_known_by_address() -> None:
    found = read_ports(
        domain(
            controller("0", "pcie-root"),
            controller("1", "pcie-root-port", guest("0x00", "0x02", more="multifunction='on'")),
            controller("2", "pcie-root-port", guest("0x00", "0x02", "0x1")),
            controller("3", "pcie-to-pci-bridge", guest("0x01", "0x00")),
            controller("010", "pcie-root-port", guest("0x00", "0x02", "0x2")),
            controller("0x11", "pcie-switch-downstream-port"),
            controller("18", "pcie-root-port"),
            "<controller type='usb' index='2'/>",
            hostdev("pci", "<address bus='2' slot='0'/>", guest("18", "0")),
            "<memballoon model='virtio'>" + guest("010", "0x0") + "</memballoon>",
            "<video>" + guest("3", "0x01") + "</video>",
            "<sound>" + guest("3", "037") + "</sound>",
            "<sound>" + guest("3", "10", "0x7") + "</sound>",
            "<interface type='user'><address type='pci'/></interface>",
        )
    )
    slots = [slot for slot in range(2, 31) if slot != 10]
    assert found == Ports(express=(2, 17), conventional=tuple((3, slot) for slot in slots))


def test_the_slots_that_libvirt_keeps_on_the_root_bus_are_not_free() -> None:
    ports = read_ports(domain(controller("0", "pci-root"), "<sound>" + guest("0x00", "0x04") + "</sound>"))
    assert ports.conventional[:2] == ((0, 3), (0, 5)) and ports.conventional[-1] == (0, 31)
    with pytest.raises(ValueError):
        read_ports("<domain")


# Anything at all.

_words = st.sampled_from(
    [
        "subsystem",
        "capabilities",
        "pci",
        "usb",
        "scsi",
        "mdev",
        "hostdev",
        "nvme",
        "block",
        "dev",
        "0x1",
        "010",
        "yes",
        "",
    ]
) | st.text(st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="\ufffe\uffff"), max_size=8)
_names = [
    "mode",
    "type",
    "bus",
    "device",
    "id",
    "name",
    "uuid",
    "domain",
    "slot",
    "function",
    "target",
    "unit",
    "missing",
    "managed",
    "order",
    "model",
]
_tags = ["hostdev", "interface", "disk", "source", "address", "vendor", "product", "adapter", "alias", "backend", "rng"]
_tags += ["driver", "boot", "mac", "vlan", "tag", "rom"]


@st.composite
def _elements(draw: st.DrawFn, depth: int = 3) -> etree._Element:
    element = etree.Element(
        draw(st.sampled_from(_tags)), draw(st.dictionaries(st.sampled_from(_names), _words, max_size=4))
    )
    element.text = draw(_words)
    for child in draw(st.lists(_elements(depth - 1), max_size=3)) if depth else []:
        element.append(child)
    return element


@settings(max_examples=300, deadline=None)
@given(_elements())
def test_reading_never_fails_on_any_element(element: etree._Element) -> None:
    claims, warnings = read_claims(domain(etree.tostring(element, encoding="unicode"), pci("0x77")))
    assert claims[-1].id == "hostdev:pci:0000:77:00.0"
    assert len(claims) + len(warnings) <= 2


def test_a_mediated_device_is_of_the_model_that_its_parent_makes() -> None:
    """libvirt takes vfio-ap and vfio-ccw on s390x, and nothing else for these."""
    for api in ("vfio-pci", "vfio-ap", "vfio-ccw"):
        given = Device("m", "mdev", "/sys/devices/m", None, facts=(Mdev(MDEV_UUID, "x", api),))
        assert f'model="{api}"' in hostdev_xml(given, alias="", config=True, unique=True)
