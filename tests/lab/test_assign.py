"""Assign and dismiss on real devices, under the shipped unit: there and back, refused, failing, waiting."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab.front import DEVICES, ERROR, BusError, Front, Recording
from tests.lab.guest import Guest
from tests.lab.machine import PATIENCE, Host

LONE = "pci_0000_01_00_0"
PAIR = ("pci_0000_06_01_0", "pci_0000_06_02_0")
DRIVERS = {LONE: "e1000e", PAIR[0]: "e1000", PAIR[1]: "snd_intel8x0"}

NewGuest = Callable[..., Guest]


def address(name: str) -> str:
    """pci_0000_01_00_0 as 0000:01:00.0."""
    _, domain, bus, slot, function = name.split("_")
    return f"{domain}:{bus}:{slot}.{function}"


def driver(host: Host, name: str) -> str:
    """What sysfs says; '' for none."""
    shown = host.run(f"readlink /sys/bus/pci/devices/{address(name)}/driver", check=False).stdout
    return shown.strip().rpartition("/")[2]


def hostdevs(xml: str) -> int:
    return xml.count("<hostdev")


def only_hold(front: Front, name: str) -> dict[str, Any]:
    """The one hold on a device."""
    [[_, hold]] = front.device(name)["Holders"]
    return hold  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def running(host: Host) -> Iterator[Guest]:
    """A running machine with five root ports and a conventional bridge, shared by the tests that leave it as it was."""
    guest = Guest(host, "running")
    guest.define()
    guest.start()
    guest.wait_up()
    yield guest
    guest.clean_up()


def test_the_lone_nic_there_and_back(host: Host, front: Front, running: Guest, recording: Recording) -> None:
    job = front.assign("running", address(LONE))
    assert front.properties(job, "org.hostpassd1.Job")["State"] == "done"  # at once: it does not stay for long
    assert driver(host, LONE) == "vfio-pci" == front.device(LONE)["Driver"]
    running.wait_sees(r"e1000e .*eth[0-9].*52:54:00")
    assert hostdevs(running.live_xml()) == hostdevs(running.stored_xml()) == 1
    [[machine, hold]] = front.device(LONE)["Holders"]
    assert (hold["kind"], hold["live"], hold["config"], hold["releasing"]) == ("hostdev", True, True, False)
    assert f"alias name='{hold['alias']}'" in running.live_xml()
    added = recording.wait_for("HoldAdded", DEVICES + LONE)
    assert added["body"][:2] == [DEVICES + LONE, machine]
    assert recording.wait_for("Completed", job)["body"] == ["done", "", "", {}]
    with pytest.raises(BusError, match=ERROR + "AlreadyAssigned"):
        front.assign("running", LONE)
    job = front.dismiss("running", LONE)
    assert driver(host, LONE) == DRIVERS[LONE] == front.device(LONE)["Driver"]
    assert hostdevs(running.live_xml()) == hostdevs(running.stored_xml()) == 0
    assert front.device(LONE)["Holders"] == [] and front.device(LONE)["Assignable"]
    recording.wait_for("HoldRemoved", DEVICES + LONE)
    assert recording.wait_for("Completed", job)["body"][0] == "done"


def test_several_are_one_operation(host: Host, front: Front, running: Guest) -> None:
    several = [LONE, *PAIR]
    sets = [row[0] for row in front.manager("ListCandidates", "sa{sv}", "running", {})[0]]
    assert [DEVICES + LONE] in sets and [DEVICES + name for name in PAIR] in sets
    options = {"timeout": ["u", PATIENCE]}
    front.manager("Assign", "sasa{sv}", "running", [PAIR[0], address(LONE)], options)
    assert [driver(host, name) for name in several] == ["vfio-pci"] * 3
    assert hostdevs(running.live_xml()) == hostdevs(running.stored_xml()) == 3
    assert not any(DEVICES + LONE in row[0] for row in front.manager("ListCandidates", "sa{sv}", "running", {})[0])
    front.manager("Dismiss", "sasa{sv}", "running", [LONE, PAIR[1]], options)
    assert [driver(host, name) for name in several] == [DRIVERS[name] for name in several]
    assert hostdevs(running.live_xml()) == hostdevs(running.stored_xml()) == 0


def test_a_group_moves_as_one_both_ways(host: Host, front: Front, running: Guest) -> None:
    assert front.device(PAIR[0])["Companions"] == [DEVICES + PAIR[1]]
    front.assign("running", PAIR[0])
    assert [driver(host, name) for name in PAIR] == ["vfio-pci", "vfio-pci"]
    assert hostdevs(running.live_xml()) == hostdevs(running.stored_xml()) == 2
    front.dismiss("running", PAIR[1])
    assert [driver(host, name) for name in PAIR] == [DRIVERS[name] for name in PAIR]
    assert hostdevs(running.live_xml()) == hostdevs(running.stored_xml()) == 0


@pytest.mark.parametrize(("spelling", "name"), [("serial:STICK-0001", "usb_2_2"), ("/dev/sda", "scsi_0_0_0_0")])
def test_the_stick_and_the_disk_there_and_back(
    host: Host, front: Front, running: Guest, spelling: str, name: str
) -> None:
    before = host.run("lsblk -dnro NAME,SERIAL | sort").stdout
    front.assign("running", spelling)
    assert front.holds(name) == [(True, True)]
    assert hostdevs(running.live_xml()) == hostdevs(running.stored_xml()) == 1
    front.dismiss("running", name)
    assert front.holds(name) == []
    assert hostdevs(running.live_xml()) == hostdevs(running.stored_xml()) == 0
    host.wait_for(f'test "$(lsblk -dnro NAME,SERIAL | sort | wc -l)" = {len(before.splitlines())}')


def test_a_stick_is_stored_as_one_that_a_start_needs(front: Front, running: Guest) -> None:
    front.assign("running", "serial:STICK-0001", startup_policy="mandatory")
    assert "startupPolicy='mandatory'" in running.stored_xml() and "startupPolicy" not in running.live_xml()
    assert only_hold(front, "usb_2_2")["startup-policy"] == "mandatory"
    front.dismiss("running", "usb_2_2")
    assert hostdevs(running.live_xml()) == hostdevs(running.stored_xml()) == 0


def test_the_nic_has_the_driver_and_the_rom_that_were_chosen(host: Host, front: Front, running: Guest) -> None:
    rom = "/usr/share/qemu/lab.rom"
    host.run(f"truncate -s 4096 {rom}")
    with pytest.raises(BusError, match=r"InvalidOption.*rom-file"):
        front.assign("running", LONE, rom_file="/etc/hostname")
    front.assign("running", LONE, driver="vfio-pci", rom_file=rom)
    for xml in (running.live_xml(), running.stored_xml()):
        assert re.search(r"<driver [^>]*model='vfio-pci'", xml) and f"<rom file='{rom}'/>" in xml
    assert only_hold(front, LONE)["driver"] == "vfio-pci"
    front.dismiss("running", LONE)
    assert hostdevs(running.live_xml()) == hostdevs(running.stored_xml()) == 0 and driver(host, LONE) == DRIVERS[LONE]
    host.run(f"rm {rom}")


def test_a_boot_order_is_for_machines_that_boot_by_their_devices(
    host: Host, front: Front, running: Guest, guest: NewGuest
) -> None:
    with pytest.raises(BusError, match=r"HypervisorRefused.*leave the option boot-order out"):
        front.assign("running", LONE, boot_order=2)
    assert hostdevs(running.live_xml()) == hostdevs(running.stored_xml()) == 0
    drive = "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/><boot order='1'/></disk>"
    ordered = guest("ordered", devices=drive)
    ordered.define()
    ordered.start()
    ordered.wait_up()
    front.sync()
    front.assign("ordered", LONE, boot_order=2)
    assert "<boot order='2'/>" in ordered.live_xml() and "<boot order='2'/>" in ordered.stored_xml()
    assert only_hold(front, LONE)["boot-order"] == 2
    front.dismiss("ordered", LONE)
    assert hostdevs(ordered.live_xml()) == hostdevs(ordered.stored_xml()) == 0 and driver(host, LONE) == DRIVERS[LONE]


@pytest.mark.parametrize(
    ("spelling", "codes", "words"),
    [
        ("/dev/vda", {"host-system"}, "mounted at /"),
        ("0000:00:04.0", {"network-in-use"}, "10.0.2.15"),
        ("00:1f.2", {"group-not-viable"}, "0000:00:1f.0 (lpc_ich)"),
        ("00:05.0", {"bridge"}, "0000:00:05.0"),
        ("1-1", {"hub"}, "hub"),
    ],
)
def test_what_the_host_needs_is_refused(
    front: Front, running: Guest, spelling: str, codes: set[str], words: str
) -> None:
    with pytest.raises(BusError) as error:
        front.assign("running", spelling)
    assert error.value.name == ERROR + "Blocked"
    assert set(re.findall(r"([a-z-]+): ", error.value.message)) >= codes and words in error.value.message
    assert hostdevs(running.live_xml()) == hostdevs(running.stored_xml()) == 0


def test_a_stopped_machine_has_it_after_its_start(host: Host, front: Front, guest: NewGuest) -> None:
    stopped = guest("stopped")
    stopped.define()
    front.sync()
    front.assign("stopped", LONE)
    assert driver(host, LONE) == DRIVERS[LONE] and front.holds(LONE) == [(False, True)]
    stopped.start()
    stopped.wait_up()
    assert driver(host, LONE) == "vfio-pci" and stopped.sees(r"e1000e .*eth[0-9]")
    front.sync()
    assert front.holds(LONE) == [(True, True)]
    stopped.destroy()
    front.sync()
    assert front.holds(LONE) == [(False, True)] and driver(host, LONE) == DRIVERS[LONE]
    front.dismiss("stopped", LONE)
    assert front.holds(LONE) == [] and hostdevs(stopped.stored_xml()) == 0


def test_a_transient_machine_gets_the_live_half(host: Host, front: Front, guest: NewGuest) -> None:
    transient = guest("transient", persistent=False)
    transient.start()
    transient.wait_up()
    front.sync()
    with pytest.raises(BusError, match=ERROR + "InvalidOption"):
        front.assign("transient", LONE, config=True)
    front.assign("transient", PAIR[0])
    assert [front.holds(name) for name in PAIR] == [[(True, False)], [(True, False)]]
    transient.destroy()
    host.wait_for(f'test "$(basename $(readlink /sys/bus/pci/devices/{address(PAIR[0])}/driver))" = e1000')
    host.wait_for(f'test "$(basename $(readlink /sys/bus/pci/devices/{address(PAIR[1])}/driver))" = snd_intel8x0')


def test_an_attach_that_fails_last_is_undone_to_the_letter(host: Host, front: Front, guest: NewGuest) -> None:
    """Both functions are conventional; in a bridge with one free slot libvirt takes just the first."""
    tight = guest("tight", devices=ALL_SLOTS_BUT_ONE)
    tight.define()
    tight.start()
    tight.wait_up()
    front.sync()
    before = (tight.live_xml(), tight.stored_xml(), [driver(host, name) for name in PAIR])
    with pytest.raises(BusError, match=r"Blocked.*no-free-port"):
        front.assign("tight", PAIR[0])
    with pytest.raises(BusError) as error:
        front.assign("tight", PAIR[0], override=["no-free-port"])
    assert error.value.name == ERROR + "HypervisorRefused", error.value
    assert (tight.live_xml(), tight.stored_xml(), [driver(host, name) for name in PAIR]) == before
    assert [front.holds(name) for name in PAIR] == [[], []]


def test_without_a_conventional_bridge_the_refusal_says_what_is_missing(front: Front, guest: NewGuest) -> None:
    modern = guest("modern", conventional_bridge=False)
    modern.define()
    modern.start()
    modern.wait_up()
    front.sync()
    with pytest.raises(BusError, match=r"Blocked.*no-free-port.*pcie-to-pci-bridge"):
        front.assign("modern", PAIR[0])
    with pytest.raises(BusError, match=r"HypervisorRefused.*pcie-to-pci-bridge"):
        front.assign("modern", PAIR[0], override=["no-free-port"])
    assert hostdevs(modern.live_xml()) == hostdevs(modern.stored_xml()) == 0


def test_a_guest_that_never_answers_keeps_the_device_and_the_truth_is_told(
    host: Host, front: Front, guest: NewGuest, recording: Recording
) -> None:
    deaf = guest("deaf", kernel=False)
    deaf.define()
    deaf.start()
    front.sync()
    front.assign("deaf", LONE)
    with pytest.raises(BusError, match=ERROR + "GuestDidNotRelease"):
        front.dismiss_in_vain("deaf", LONE)
    [[_, hold]] = front.device(LONE)["Holders"]
    assert (hold["live"], hold["config"], hold["releasing"]) == (True, False, True)
    assert "HoldRemoved" not in recording.members()
    deaf.destroy()
    recording.wait_for("HoldRemoved", DEVICES + LONE)
    front.sync()
    assert front.device(LONE)["Holders"] == []
    host.wait_for(f'test "$(basename $(readlink /sys/bus/pci/devices/{address(LONE)}/driver))" = e1000e')


# What takes up slots of the guest's conventional bridge (bus 7) and costs nothing: one slot stays free.
ALL_SLOTS_BUT_ONE = "".join(
    f"<controller type='usb' index='{slot}' model='piix3-uhci'>"
    f"<address type='pci' domain='0x0000' bus='0x07' slot='{slot:#04x}' function='0x0'/></controller>"
    for slot in range(1, 31)
)
