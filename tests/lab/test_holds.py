"""Every way a machine can hold a device, made with virsh: on the right device, of the right kind, gone when it goes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.front import DEVICES, Front, Recording
from tests.lab.guest import Guest, pci_hostdev, usb_hostdev
from tests.lab.machine import Host

NIC, VIRTUAL, NVME, RANDOM = "pci_0000_01_00_0", "pci_0000_02_10_0", "pci_0000_08_00_0", "pci_0000_00_0f_0"
LUN, STICK, TABLET, SERIAL_PORT = "scsi_0_0_0_0", "usb_2_2", "usb_1_1_1", "usb_1_1_2"
LIVE, STORED = "--live", "--config"


def disk(path: str) -> str:
    source = f"<driver name='qemu' type='raw'/><source dev='{path}'/>"
    return f"<disk type='block' device='disk'>{source}<target dev='sdd' bus='scsi'/></disk>"


def direct(interface: str) -> str:
    source = f"<source dev='{interface}' mode='bridge'/><mac address='52:54:00:aa:00:01'/>"
    return f"<interface type='direct'>{source}<model type='virtio'/></interface>"


BY_ID = disk("/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_DISK-0001")
NVME_DISK = (
    "<disk type='nvme' device='disk'><driver name='qemu' type='raw'/>"
    "<source type='pci' managed='yes' namespace='1'><address domain='0' bus='8' slot='0' function='0'/></source>"
    "<target dev='vdc' bus='virtio'/></disk>"
)
POINTER = (
    "<input type='evdev'>"
    "<source dev='/dev/input/by-id/usb-QEMU_QEMU_USB_Tablet_28754-0000:00:0b.0-1.1-event-mouse'/></input>"
)
SERIAL = (
    "<serial type='dev'><source path='/dev/serial/by-id/usb-QEMU_QEMU_USB_SERIAL_SERIAL-0001-if00-port0'/></serial>"
)
RNG = "<rng model='virtio'><backend model='random'>/dev/hwrng</backend></rng>"


@pytest.fixture(scope="module")
def running(host: Host) -> Iterator[Guest]:
    """A running machine, shared by the tests that leave it as it was."""
    guest = Guest(host, "holds")
    guest.define()
    guest.start()
    guest.wait_up()
    yield guest
    guest.clean_up()


@pytest.mark.parametrize(
    ("device", "kind", "xml", "flags"),
    [
        (LUN, "disk", BY_ID, LIVE),
        (LUN, "disk", BY_ID, STORED),
        (NVME, "disk", NVME_DISK, LIVE),
        (NVME, "disk", NVME_DISK, STORED),
        (NIC, "macvtap", direct("enp1s0"), LIVE),
        (NIC, "macvtap", direct("enp1s0"), STORED),
        (TABLET, "evdev", POINTER, LIVE),
        (TABLET, "evdev", POINTER, STORED),
        (SERIAL_PORT, "chardev", SERIAL, STORED),
        (RANDOM, "rng", RNG, STORED),
        (STICK, "hostdev", usb_hostdev(0x46F4, 1), STORED),
        (NIC, "hostdev", pci_hostdev("0000:01:00.0"), STORED),
    ],
)
def test_a_hold_is_on_its_device_as_long_as_it_is(
    front: Front, running: Guest, recording: Recording, device: str, kind: str, xml: str, flags: str
) -> None:
    half = (flags == LIVE, flags == STORED)
    running.attach(xml, flags)
    hold = recording.wait_for("HoldAdded", DEVICES + device)["body"][2]
    assert (hold["kind"], hold["live"], hold["config"], hold["trial"]) == (kind, *half, False)
    assert hold.get("mac-address", "52:54:00:aa:00:01") == "52:54:00:aa:00:01"
    assert ("mac-address" in hold) is (kind == "macvtap")
    assert [(row["kind"], row["live"], row["config"]) for _, row in front.device(device)["Holders"]] == [(kind, *half)]
    assert {"held-live" if flags == LIVE else "held-config"} <= set(front.blockers(device))
    assert [path for path, _ in front.machine("holds")["Devices"]] == [DEVICES + device]
    running.detach(xml, flags)
    recording.wait_for("HoldRemoved", DEVICES + device)
    assert front.device(device)["Holders"] == [] and front.machine("holds")["Devices"] == []


def test_a_virtual_function_out_of_a_network_is_held_by_whoever_got_it(
    host: Host, front: Front, running: Guest, recording: Recording
) -> None:
    function = "<address type='pci' domain='0' bus='2' slot='0x10' function='0'/>"
    pool = f"<network><name>pool</name><forward mode='hostdev' managed='yes'>{function}</forward></network>"
    interface = "<interface type='network'><source network='pool'/><mac address='52:54:00:aa:00:02'/></interface>"
    count = "/sys/bus/pci/devices/0000:02:00.0/sriov_numvfs"
    host.run(f"ip link set enp2s0 up && echo 2 > {count} && udevadm settle")
    try:
        host.run("virsh -q net-define /dev/stdin && virsh -q net-start pool", input=pool)
        running.attach(interface, "--live --config")
        assert recording.wait_for("HoldAdded", DEVICES + VIRTUAL)["body"][2]["kind"] == "interface"
        front.sync()
        assert front.holds(VIRTUAL) == [(True, False)] and front.device(VIRTUAL)["Driver"] == "vfio-pci"
        assert front.machine("holds")["Missing"] == []
        assert "held-live" in front.blockers(VIRTUAL)
        running.detach(interface, "--live --config")
        recording.wait_for("HoldRemoved", DEVICES + VIRTUAL)
        assert front.holds(VIRTUAL) == []
    finally:
        host.run(f"virsh -q net-destroy pool; virsh -q net-undefine pool; echo 0 > {count}; ip link set enp2s0 down")


def test_a_partition_and_a_volume_are_their_disks(
    host: Host, front: Front, running: Guest, recording: Recording
) -> None:
    path = host.run("lsblk -dnro PATH,SERIAL | awk '$2==\"DISK-0001\" {print $1}'").stdout.strip()
    host.run(f"echo ',32M\n,' | sfdisk -q {path} && udevadm settle")
    try:
        host.run(f"pvcreate -qq {path}2 && vgcreate -qq herd {path}2 && lvcreate -qq -n flock -l 100%FREE herd")
        for source in (path + "1", "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_DISK-0001-part1", "/dev/herd/flock"):
            running.attach(disk(source))
            recording.wait_for("HoldAdded", DEVICES + LUN)
            front.sync()
            assert front.holds(LUN) == [(True, False)] and front.machine("holds")["Missing"] == []
            running.detach(disk(source))
            recording.wait_for("HoldRemoved", DEVICES + LUN)
            recording.forget()
    finally:
        host.run(f"vgremove -qq -f herd; wipefs -qa {path}2 {path}; partx -d {path}; udevadm settle", check=False)


def test_what_is_not_of_this_host_is_missing_or_nothing(host: Host, front: Front) -> None:
    network = "<source protocol='iscsi' name='iqn.2014-08.com.example:kid/1'><host name='192.0.2.1'/></source>"
    devices = (
        f"<hostdev mode='subsystem' type='scsi'>{network}</hostdev>"
        "<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>"
        + usb_hostdev(0x1234, 0x5678)
    )
    other = Guest(host, "elsewhere", devices=devices)
    other.define()
    try:
        front.sync()
        assert front.machine("elsewhere")["Devices"] == []
        rows = {row["source"]: row for row in front.machine("elsewhere")["Missing"]}
        assert set(rows) == {"/dev/tpm0", "usb 1234:5678"}
        assert all((row["live"], row["config"]) == (False, True) for row in rows.values())
        assert {row["kind"] for row in rows.values()} == {"tpm", "hostdev"}
        assert not any("label" in row for row in rows.values())  # they never were here
        front.dismiss("elsewhere", rows["usb 1234:5678"]["id"])
        assert [row["source"] for row in front.machine("elsewhere")["Missing"]] == ["/dev/tpm0"]
        assert "0x1234" not in other.stored_xml()
    finally:
        other.clean_up()


def test_a_mediated_device(host: Host, front: Front, running: Guest, recording: Recording) -> None:
    uuid = "c2177883-f1bb-47f0-914d-32a22e3a8804"
    name = f"mdev_{uuid.replace('-', '_')}_mtty"
    xml = f"<hostdev mode='subsystem' type='mdev' model='vfio-pci'><source><address uuid='{uuid}'/></source></hostdev>"
    parent = "/sys/devices/virtual/mtty/mtty"
    host.run(f"modprobe mtty && echo {uuid} > {parent}/mdev_supported_types/mtty-2/create && udevadm settle")
    try:
        running.attach(xml)
        assert recording.wait_for("HoldAdded", DEVICES + name)["body"][2]["kind"] == "hostdev"
        running.detach(xml)
        recording.wait_for("HoldRemoved", DEVICES + name)
        front.assign("holds", name)
        assert front.holds(name) == [(True, True)] and running.live_xml().count(f"<address uuid='{uuid}'/>") == 1
        front.dismiss("holds", name)
        assert front.holds(name) == [] and uuid not in running.stored_xml() + running.live_xml()
    finally:
        # While a machine has it, the kernel lets nobody remove it, and waits.
        running.detach(xml, check=False)
        host.wait_for(f"! virsh dumpxml holds | grep -q \"<address uuid='{uuid}'\"")
        host.run(f"echo 1 > /sys/bus/mdev/devices/{uuid}/remove; rmmod mtty", check=False)
