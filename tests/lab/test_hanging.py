"""A libvirt that does not return: a job ends in time, Cancel and a stop of the service work, and then all is clean."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.lab.front import ERROR, BusError, Front
from tests.lab.guest import Guest
from tests.lab.machine import Host
from tests.lab.test_assign import DRIVERS, LONE, address, driver, hostdevs

STICK = "usb_2_2"
LUN = "scsi_0_0_0_0"
JOB = "org.hostpassd1.Job"

NewGuest = Callable[..., Guest]


@pytest.fixture(scope="module")
def running(host: Host) -> Iterator[Guest]:
    """A running machine whose guest answers."""
    guest = Guest(host, "hanging")
    guest.define()
    guest.start()
    guest.wait_up()
    yield guest
    guest.clean_up()


@contextlib.contextmanager
def frozen(host: Host, pid: str) -> Iterator[None]:
    """While the process does nothing."""
    host.run(f"kill -STOP {pid}")
    try:
        yield
    finally:
        host.run(f"kill -CONT {pid}")


def _qemu(host: Host) -> str:
    return host.run("cat /run/libvirt/qemu/hanging.pid").stdout.strip()


def _libvirtd(host: Host) -> str:
    return host.run("pidof libvirtd").stdout.strip()


def _times_out(front: Front) -> None:
    with pytest.raises(BusError, match=ERROR + "TimedOut.*libvirt is still at it"):
        front.assign("hanging", LONE, timeout=5)


def _ends_clean(host: Host, front: Front, running: Guest) -> None:
    host.wait_for("! grep -q begin /var/lib/hostpassd/intents", timeout=90)
    host.wait_for(f"test -d /sys/bus/pci/drivers/{DRIVERS[LONE]}/{address(LONE)}")
    front.sync()
    assert front.holds(LONE) == front.holds(STICK) == []
    assert hostdevs(running.live_xml()) == hostdevs(running.stored_xml()) == 0
    assert driver(host, LONE) == DRIVERS[LONE] == front.device(LONE)["Driver"]
    assert "Traceback" not in host.run("journalctl -u hostpassd -b --no-pager").stdout


def test_a_guest_that_is_frozen_hangs_no_job_and_no_cancel_and_nobody_else(
    host: Host, front: Front, running: Guest, guest: NewGuest
) -> None:
    other = guest("unfrozen", kernel=False)
    other.define()
    front.sync()
    with frozen(host, _qemu(host)):
        _times_out(front)
        waits = front.assign("hanging", LONE, wait=False, timeout=300)
        hangs = front.assign("hanging", STICK, wait=False, timeout=300)
        assert front.properties(waits, JOB)["State"] == "queued"
        for job in (waits, hangs):
            front.call(job, JOB, "Cancel")
            assert front.properties(job, JOB)["State"] == "cancelled"
        assert "libvirt is still at it" in front.properties(hangs, JOB)["Error"][2]
        front.assign("unfrozen", LUN)
        front.dismiss("unfrozen", LUN)
    _ends_clean(host, front, running)
    front.assign("hanging", LONE)
    front.dismiss("hanging", LONE)
    _ends_clean(host, front, running)


@pytest.mark.parametrize("process", [_qemu, _libvirtd], ids=["QEMU", "libvirtd"])
def test_the_service_stops_while_libvirt_hangs_and_the_next_start_puts_it_in_order(
    host: Host, front: Front, running: Guest, process: Callable[[Host], str]
) -> None:
    front.sync()
    with frozen(host, process(host)):
        _times_out(front)
        front.assign("hanging", STICK, wait=False, timeout=300)
        host.run("systemctl stop hostpassd", timeout=100)
        assert host.run("systemctl show -p Result --value hostpassd").stdout.strip() == "success"
    host.run("systemctl start hostpassd", timeout=100)
    _ends_clean(host, front, running)
