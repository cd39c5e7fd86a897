"""The lab is what the other tests take it for; hostpassd runs beside and is not asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.lab import machine
from tests.lab.front import BusError, Front
from tests.lab.guest import Guest, pci_hostdev, scsi_hostdev, usb_hostdev
from tests.lab.machine import CommandFailed, Host

NewGuest = Callable[..., Guest]


def group_of(host: Host, address: str) -> set[str]:
    return set(host.run(f"ls /sys/bus/pci/devices/{address}/iommu_group/devices").stdout.split())


def driver_is(address: str, driver: str) -> str:
    return f'[ "$(basename $(readlink /sys/bus/pci/devices/{address}/driver))" = {driver} ]'


def test_groups_are_those_of_a_real_machine(host: Host) -> None:
    assert group_of(host, machine.LONE_NIC) == {machine.LONE_NIC}
    assert group_of(host, machine.SRIOV_NIC) == {machine.SRIOV_NIC}
    together = {machine.BRIDGE, machine.BRIDGED_NIC, machine.BRIDGED_SOUND}
    assert group_of(host, machine.BRIDGED_NIC) == together
    assert group_of(host, "0000:00:1f.0") == {"0000:00:1f.0", "0000:00:1f.2", "0000:00:1f.3"}


def test_commands_run_as_any_user(host: Host) -> None:
    assert host.run("id -un", user="tester").stdout == "tester\n"
    assert host.run("cat", input="as it was\n").stdout == "as it was\n"
    with pytest.raises(CommandFailed) as failed:
        host.run("exit 3", user="helper")
    assert failed.value.result.status == 3
    with pytest.raises(TimeoutError):
        host.run("sleep 60", timeout=1)


def test_sticks_go_and_come(host: Host) -> None:
    stick = f"/dev/disk/by-id/usb-QEMU_QEMU_HARDDISK_{machine.STICK_SERIAL}-0:0"
    host.unplug("stick")
    host.run(f"udevadm wait --removed --timeout=280 {stick}")
    host.plug_usb_storage("stick", machine.STICK_SERIAL, port="2")
    host.plug_usb_storage("twin", "STICK-0002", port="3")
    host.run(f"udevadm wait --timeout=280 {stick} {stick.replace(machine.STICK_SERIAL, 'STICK-0002')}")
    assert host.run("lsusb -d 46f4:0001").stdout.count("\n") == 2
    host.unplug("twin")


def test_cards_go_and_come(host: Host) -> None:
    host.plug("e1000e", "card", bus="empty1", mac="52:54:00:00:00:20")
    host.run("udevadm wait --timeout=280 /sys/bus/pci/devices/0000:03:00.0")
    host.unplug("card")
    host.run("udevadm wait --removed --timeout=280 /sys/bus/pci/devices/0000:03:00.0")


def test_virtual_functions_have_groups_of_their_own(host: Host) -> None:
    count = f"/sys/bus/pci/devices/{machine.SRIOV_NIC}/sriov_numvfs"
    host.run(f"echo 2 > {count}")
    try:
        assert group_of(host, "0000:02:10.0") == {"0000:02:10.0"}
        assert group_of(host, "0000:02:10.2") == {"0000:02:10.2"}
    finally:
        host.run(f"echo 0 > {count}")


def test_mediated_devices_can_be_made(host: Host) -> None:
    kinds = "/sys/devices/virtual/mtty/mtty/mdev_supported_types"
    made = "/sys/bus/mdev/devices/c2177883-f1bb-47f0-914d-32a22e3a8804"
    host.run("modprobe mtty")
    host.run(f"echo c2177883-f1bb-47f0-914d-32a22e3a8804 > {kinds}/mtty-2/create && test -e {made}")
    host.run(f"echo 1 > {made}/remove && rmmod mtty")


def test_a_guest_is_handed_devices_and_gives_them_back(host: Host, guest: NewGuest) -> None:
    one = guest("hands")
    one.define()
    one.start()
    one.wait_up()
    card = pci_hostdev(machine.LONE_NIC)
    one.attach(card)
    one.wait_sees("e1000e .*PCI Express:")
    one.detach(card)
    host.wait_for(driver_is(machine.LONE_NIC, "e1000e"))
    for device, sign in (
        (usb_hostdev(0x46F4, 1), "SerialNumber: STICK-0001"),
        (scsi_hostdev(0, 0, 0, 0), "sd 0:0:0:0"),
    ):
        one.attach(device)
        one.wait_sees(sign)
        one.detach(device)
    assert one.run("uname -s").stdout == "Linux\n"


def test_a_guest_without_a_kernel_never_lets_go(host: Host, guest: NewGuest) -> None:
    one = guest("deaf-by-itself", kernel=False)
    one.define()
    one.start()
    one.attach(pci_hostdev(machine.LONE_NIC))
    one.detach(pci_hostdev(machine.LONE_NIC), check=False)
    assert "0x01" in one.live_xml().split("<hostdev")[1]
    one.destroy()
    host.wait_for(driver_is(machine.LONE_NIC, "e1000e"))


def test_errors_on_the_bus_have_names(host: Host) -> None:
    tester = Front(host, "tester")
    try:
        with pytest.raises(BusError) as refused:
            tester.call(
                "/org/freedesktop/systemd1",
                "org.freedesktop.systemd1.Manager",
                "GetUnit",
                "s",
                "no-such.service",
                destination="org.freedesktop.systemd1",
            )
    finally:
        tester.close()
    assert refused.value.name == "org.freedesktop.systemd1.NoSuchUnit"
