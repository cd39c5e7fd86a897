"""The tree beside what is not our code: virsh, lspci, lsusb, lsscsi, sysfs."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.lab.front import DEVICE, DEVICES, Front
from tests.lab.machine import Host


def _by_kind(front: Front, *kinds: str) -> dict[str, dict[str, dict[str, Any]]]:
    found = front.objects()
    devices = {path.removeprefix(DEVICES): row for path, row in found.items() if path.startswith(DEVICES)}
    return {name: row for name, row in devices.items() if row[DEVICE]["Kind"] in kinds}


def test_the_names_are_those_of_libvirt(host: Host, front: Front) -> None:
    front.sync()
    for kinds, capabilities in (
        (("pci",), "pci"),
        (("usb",), "usb_device"),
        (("scsi",), "scsi"),
        (("scsi-host",), "scsi_host"),
        (("scsi-target",), "scsi_target"),
    ):
        listed = set(host.run(f"virsh nodedev-list --cap {capabilities}").stdout.split())
        assert set(_by_kind(front, *kinds)) == listed, capabilities


def test_pci_is_as_lspci_says(host: Host, front: Front) -> None:
    front.sync()
    mine = {row["org.hostpassd1.Device.PCI"]["Address"]: row for row in _by_kind(front, "pci").values()}
    blocks = host.run("lspci -vmmnnDk").stdout.strip().split("\n\n")
    listed = [dict(line.split(":\t", 1) for line in block.splitlines() if ":\t" in line) for block in blocks]
    assert {row["Slot"] for row in listed} == set(mine)
    for row in listed:
        device, pci = mine[row["Slot"]][DEVICE], mine[row["Slot"]]["org.hostpassd1.Device.PCI"]
        ids = {key: int(re.findall(r"\[([0-9a-f]{4})\]$", row[key])[0], 16) for key in ("Class", "Vendor", "Device")}
        assert (pci["ClassCode"] >> 8, pci["VendorId"], pci["DeviceId"]) == tuple(ids.values()), row
        if "SVendor" in row:
            subsystem = [int(re.findall(r"\[([0-9a-f]{4})\]$", row[key])[0], 16) for key in ("SVendor", "SDevice")]
            assert [pci["SubsystemVendorId"], pci["SubsystemDeviceId"]] == subsystem, row
        assert pci["Revision"] == int(row.get("Rev", "0"), 16), row
        assert device["Driver"] == row.get("Driver", ""), row
        group = host.run(f"readlink /sys/bus/pci/devices/{row['Slot']}/iommu_group", check=False).stdout.strip()
        assert pci["IommuGroup"] == (int(group.rpartition("/")[2]) if group else -1), row


def test_usb_is_as_lsusb_says(host: Host, front: Front) -> None:
    front.sync()
    mine = {
        (row["org.hostpassd1.Device.USB"]["BusNumber"], row["org.hostpassd1.Device.USB"]["DeviceNumber"]): row
        for row in _by_kind(front, "usb").values()
    }
    listed = re.findall(r"Bus (\d+) Device (\d+): ID ([0-9a-f]{4}):([0-9a-f]{4})", host.run("lsusb").stdout)
    assert {(int(bus), int(number)) for bus, number, _, _ in listed} == set(mine)
    for bus, number, vendor, product in listed:
        row = mine[(int(bus), int(number))]
        usb = row["org.hostpassd1.Device.USB"]
        assert (usb["VendorId"], usb["ProductId"]) == (int(vendor, 16), int(product, 16))
        path = row[DEVICE]["SysfsPath"]
        said = host.run(f"cd {path} && cat speed bDeviceClass; cat serial 2>/dev/null || echo").stdout.split("\n")
        assert (usb["Speed"], usb["DeviceClass"], row[DEVICE]["Serial"]) == (
            int(float(said[0])),
            int(said[1], 16),
            said[2],
        )
        assert usb["Port"] == path.rpartition("/")[2]


def test_scsi_is_as_lsscsi_says(host: Host, front: Front) -> None:
    front.sync()
    mine = {
        tuple(row["org.hostpassd1.Device.SCSI"][key] for key in ("Host", "Channel", "Target", "Lun")): row
        for row in _by_kind(front, "scsi").values()
    }
    listed = re.findall(r"^\[(\d+):(\d+):(\d+):(\d+)\]\s+(\S+)", host.run("lsscsi").stdout, re.MULTILINE)
    assert {tuple(map(int, row[:4])) for row in listed} == set(mine)
    for *where, word in listed:
        assert mine[tuple(map(int, where))]["org.hostpassd1.Device.SCSI"]["Type"] == word


def test_disks_and_interfaces_are_as_lsblk_and_ip_say(host: Host, front: Front) -> None:
    front.sync()
    blocks = {row["org.hostpassd1.Device.Block"]["Node"]: row for row in _by_kind(front, "block").values()}
    for disk in json.loads(host.run("lsblk -dbJo PATH,SIZE,TYPE").stdout)["blockdevices"]:
        if disk["type"] in ("disk", "rom") and not disk["path"].startswith(("/dev/loop", "/dev/zram", "/dev/nbd")):
            assert blocks[disk["path"]]["org.hostpassd1.Device.Block"]["Size"] == disk["size"], disk
    nets = {row["org.hostpassd1.Device.Net"]["Interface"]: row for row in _by_kind(front, "net").values()}
    for link in json.loads(host.run("ip -j link show").stdout):
        if link["ifname"] != "lo":
            assert nets[link["ifname"]]["org.hostpassd1.Device.Net"]["MacAddress"] == link["address"]


def test_every_device_hangs_where_sysfs_has_it(host: Host, front: Front) -> None:
    front.sync()
    devices = {path: row[DEVICE] for path, row in front.objects().items() if path.startswith(DEVICES)}
    for path, device in devices.items():
        assert host_path_ok(device["SysfsPath"])
        if device["Parent"] != "/":
            assert device["SysfsPath"].startswith(devices[device["Parent"]]["SysfsPath"] + "/")
            assert path in devices[device["Parent"]]["Children"]
        above = [d["SysfsPath"] for d in devices.values() if device["SysfsPath"].startswith(d["SysfsPath"] + "/")]
        nearest = max(above, key=len, default="")
        assert nearest == (devices[device["Parent"]]["SysfsPath"] if device["Parent"] != "/" else "")
    there = host.run("cd /sys/devices && ls -d " + " ".join(d["SysfsPath"] for d in devices.values())).stdout.split()
    assert len(there) == len(devices)


def host_path_ok(path: str) -> bool:
    """Below /sys/devices, and outside its virtual part."""
    return path.startswith("/sys/devices/") and not path.startswith("/sys/devices/virtual/")
