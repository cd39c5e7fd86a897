"""What the host uses: through every layer, on everything above it, and gone with a signal as soon as it is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.lab.front import DEVICE, DEVICES, Front, Recording
from tests.lab.machine import Host

LUN, CONTROLLER = "scsi_0_0_0_0", "pci_0000_00_0c_0"
STICK, USB_CONTROLLER = "usb_2_2", "pci_0000_00_0b_0"
SPARE, SOUND = "pci_0000_06_01_0", "pci_0000_06_02_0"
IGB = "pci_0000_02_00_0"


def disk(host: Host, serial: str) -> str:
    return host.run(f"lsblk -dnro PATH,SERIAL | awk '$2==\"{serial}\" {{print $1}}'").stdout.strip()


def interface(host: Host, address: str) -> str:
    return host.run(f"ls /sys/bus/pci/devices/{address}/net").stdout.strip()


def told(recording: Recording, name: str, wanted: Callable[[dict[str, str]], bool]) -> None:
    """Waits for a signal after which the blockers of the device are as WANTED. Nobody asks for it."""

    def matches(signal: dict[str, Any]) -> bool:
        if signal["path"] != DEVICES + name or signal["member"] != "PropertiesChanged" or signal["body"][0] != DEVICE:
            return False
        rows = signal["body"][1].get("Blockers")
        return rows is not None and wanted({code: text for _, code, _, _, text in rows})

    recording.wait_until(matches)


def test_a_mount_on_lvm_on_luks_blocks_the_disk_and_its_controller(
    host: Host, front: Front, recording: Recording
) -> None:
    path = disk(host, "DISK-0001")
    before = {name: front.blockers(name) for name in (LUN, CONTROLLER)}
    assert before[LUN] == {}
    host.run(f"""
        echo -n secret | cryptsetup -q luksFormat --pbkdf pbkdf2 --pbkdf-force-iterations 1000 {path} -
        echo -n secret | cryptsetup open --key-file - {path} safe
        pvcreate -qq /dev/mapper/safe && vgcreate -qq vault /dev/mapper/safe
        lvcreate -qq -n data -l 100%FREE vault && mkfs.ext4 -q /dev/vault/data
        mkdir -p /mnt/data && mount /dev/vault/data /mnt/data
    """)
    chain = f"LVM volume vault-data on LUKS safe on {path}"
    try:
        for name in (LUN, CONTROLLER):
            told(recording, name, lambda codes: "/mnt/data mounted from" in codes.get("mounted", ""))
            assert f"({chain})" in front.blockers(name)["mounted"]
            assert "LVM volume vault-data" in front.blockers(name)["storage-stack"]
        name = "block_sda" if path == "/dev/sda" else "block_sdb"
        [[of, details]] = [[of, row] for of, code, row, _ in front.device(name)["HostUses"] if code == "mount"]
        assert of == DEVICES + name and (details["mount-points"], details["volumes"]) == (["/mnt/data"], [chain])
        recording.forget()
        host.run("umount /mnt/data")
        for name in (LUN, CONTROLLER):
            told(recording, name, lambda codes: "mounted" not in codes)
            assert "storage-stack" in front.blockers(name)
        recording.forget()
        host.run("vgchange -qq -an vault && cryptsetup close safe")
        for name in (LUN, CONTROLLER):
            told(recording, name, lambda codes: "storage-stack" not in codes)
            assert front.blockers(name) == before[name]
    finally:
        host.run(
            f"umount /mnt/data; vgchange -qq -an vault; cryptsetup close safe; wipefs -qa {path}; udevadm settle",
            check=False,
        )


def test_swap_is_the_systems(host: Host, front: Front, recording: Recording) -> None:
    path = disk(host, "STICK-0001")
    host.run(f"mkswap -q {path} && swapon {path}")
    try:
        for name in (STICK, USB_CONTROLLER):
            told(recording, name, lambda codes: f"(swap on {path})" in codes.get("host-system", ""))
        recording.forget()
        host.run(f"swapoff {path}")
        for name in (STICK, USB_CONTROLLER):
            told(recording, name, lambda codes: "host-system" not in codes)
        assert front.blockers(STICK) == {}
    finally:
        host.run(f"swapoff {path}; wipefs -qa {path}", check=False)


@pytest.mark.parametrize(
    ("kind", "address", "devices"), [("bridge", "0000:06:01.0", (SPARE, SOUND)), ("bond", "0000:02:00.0", (IGB,))]
)
def test_a_member_of_a_bridge_or_a_bond(
    host: Host, front: Front, recording: Recording, kind: str, address: str, devices: tuple[str, ...]
) -> None:
    member = interface(host, address)
    host.run(f"ip link add {kind}7 type {kind} && ip link set {member} down && ip link set {member} master {kind}7")
    try:
        for name in devices:
            told(recording, name, lambda codes: f"{kind}7" in codes.get("network-in-use", ""))
        recording.forget()
        host.run(f"ip link set {member} nomaster")
        for name in devices:
            told(recording, name, lambda codes: "network-in-use" not in codes)
            assert front.blockers(name) == {}
    finally:
        host.run(f"ip link set {member} nomaster; ip link del {kind}7", check=False)


def test_an_address_and_what_stands_on_a_vlan(host: Host, front: Front, recording: Recording) -> None:
    member = interface(host, "0000:06:01.0")
    host.run(f"ip link set {member} up && ip link add link {member} name tagged type vlan id 7")
    try:
        told(recording, SPARE, lambda codes: "tagged" in codes.get("network-in-use", ""))
        host.run("ip address add 192.0.2.7/24 dev tagged")
        told(recording, SPARE, lambda codes: "192.0.2.7/24" in codes.get("network-in-use", ""))
        recording.forget()
        host.run("ip link del tagged")
        told(recording, SPARE, lambda codes: "network-in-use" not in codes)
    finally:
        host.run(f"ip link del tagged; ip link set {member} down", check=False)


def test_an_interface_in_another_network_namespace(host: Host, front: Front, recording: Recording) -> None:
    """A container's: what it does there cannot be seen, so it is not free. A daemon that starts then knows it, too."""
    member = interface(host, "0000:06:01.0")
    host.run(f"ip netns add away && ip link set {member} netns away")
    try:
        told(recording, SPARE, lambda codes: "netns" in codes.get("network-in-use", ""))
        assert front.blockers(SOUND).keys() == {"network-in-use"}  # its companion's
        host.run("systemctl restart hostpassd")
        front.sync()
        assert "netns" in front.blockers(SPARE)["network-in-use"]
        recording.forget()
        host.run(f"ip -n away link set {member} netns 1")
        told(recording, SPARE, lambda codes: "network-in-use" not in codes)
        assert front.blockers(SPARE) == {}
    finally:
        host.run(f"ip -n away link set {member} netns 1; ip netns del away", check=False)
