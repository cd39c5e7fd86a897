"""What others do: virsh, QMP, libvirtd's comings and goings, users without rights. Nobody asks hostpassd for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab.front import DEVICES, ERROR, BusError, Front, Recording, fold
from tests.lab.guest import Guest, pci_hostdev, usb_hostdev
from tests.lab.machine import PATIENCE, STICK_SERIAL, Host

LONE = "pci_0000_01_00_0"
STICK = "usb_2_2"

NewGuest = Callable[..., Guest]


@pytest.fixture(scope="module")
def running(host: Host) -> Iterator[Guest]:
    """A running machine, shared by the tests that leave it as it was."""
    guest = Guest(host, "others")
    guest.define()
    guest.start()
    guest.wait_up()
    yield guest
    guest.clean_up()


@pytest.mark.parametrize(("flags", "half"), [("--live", (True, False)), ("--config", (False, True))])
@pytest.mark.parametrize(
    ("name", "xml"), [(STICK, usb_hostdev(0x46F4, 1)), (LONE, pci_hostdev("0000:01:00.0"))], ids=[STICK, LONE]
)
def test_virsh_attach_and_detach_are_seen_without_asking(
    front: Front, running: Guest, recording: Recording, flags: str, half: tuple[bool, bool], name: str, xml: str
) -> None:
    running.attach(xml, flags)
    hold = recording.wait_for("HoldAdded", DEVICES + name)["body"][2]
    assert (hold["live"], hold["config"]) == half
    assert front.holds(name) == [half]
    running.detach(xml, flags)
    recording.wait_for("HoldRemoved", DEVICES + name)
    assert front.holds(name) == []


@pytest.fixture
def spare(host: Host) -> Iterator[Callable[[bool], None]]:
    """Plugs a second stick into one port, or unplugs it. It is STICK's twin, so it never stays behind."""
    here = "lsblk -dnro SERIAL | grep -q SPARE-0001"
    plugged = False

    def put(there: bool) -> None:
        nonlocal plugged
        if there:
            host.plug_usb_storage("spare", "SPARE-0001", port="4")
        else:
            host.unplug("spare")
        plugged = there
        host.wait_for(here if there else f"! {here}")

    yield put
    if plugged:
        put(False)


def test_plug_and_unplug_fold_to_the_truth(front: Front, recording: Recording, spare: Callable[[bool], None]) -> None:
    front.sync()
    first = front.objects()
    spare(True)
    front.sync()
    stick, *_ = front.manager("FindDevices", "s", "serial:SPARE-0001")[0]
    there = front.objects()
    assert stick == DEVICES + "usb_2_4" and stick in there
    instance = there[stick]["org.hostpassd1.Device"]["Instance"]
    spare(False)
    front.sync()
    assert stick not in front.objects()
    spare(True)
    front.sync()
    assert front.objects()[stick]["org.hostpassd1.Device"]["Instance"] > instance
    spare(False)
    generation = front.sync()
    folded = fold(first, recording.until_generation(generation))
    assert _lasting(folded) == _lasting(front.objects())


def test_a_stick_that_is_pulled_out_is_missing_and_not_given_back(
    host: Host, front: Front, running: Guest, recording: Recording
) -> None:
    xml = usb_hostdev(0x46F4, 1)
    running.attach(xml, "--config")
    recording.wait_for("HoldAdded", DEVICES + STICK)
    recording.forget()
    host.unplug("stick")
    try:
        missing = recording.wait_for("HoldMissing", DEVICES + STICK)["body"][2]
        front.sync()
        assert front.machine("others")["Missing"] == [missing]
        assert (missing["kind"], missing["category"], missing["location"]) == ("hostdev", "disk", "2-2")
    finally:
        host.plug_usb_storage("stick", STICK_SERIAL, port="2")
    assert recording.wait_for("HoldAdded", DEVICES + STICK)["body"][2]["config"]
    assert "HoldRemoved" not in recording.members()
    assert front.machine("others")["Missing"] == []
    running.detach(xml, "--config")
    recording.wait_for("HoldRemoved", DEVICES + STICK)
    front.sync()
    records = host.run(f"journalctl --sync && journalctl HOSTPASSD_DEVICE={STICK} -o json -n 4").stdout.splitlines()
    assert [json.loads(row)["HOSTPASSD_OPERATION"] for row in records] == ["added", "missing", "found", "removed"]


def _lasting(tree: dict[str, Any]) -> dict[str, Any]:
    """Without jobs, which go whenever their time is over, and what counts that."""
    counts = ("Generation", "Counters")
    return {
        path: {name: {key: values[key] for key in values if key not in counts} for name, values in interfaces.items()}
        for path, interfaces in tree.items()
        if "/jobs/" not in path
    }


def test_two_hundred_changes_each_right_after_one_sync(host: Host, front: Front, guest: NewGuest) -> None:
    """A change by virsh, one Sync, one read: always right, never a retry."""
    stopped = guest("rounds")
    stopped.define()
    host.run("cat > /root/nic.xml", input=pci_hostdev("0000:01:00.0"))
    virsh = host.open("exec virsh -q")
    assert virsh.stdin and virsh.stdout
    for number in range(200):
        word, held = ("attach", [(False, True)]) if number % 2 == 0 else ("detach", [])
        virsh.stdin.write(f"{word}-device rounds /root/nic.xml --config\necho done-{number}\n".encode())
        virsh.stdin.flush()
        while (line := virsh.stdout.readline()) and f"done-{number}" not in line.decode():
            pass
        front.sync()
        assert front.holds(LONE) == held, number
    virsh.communicate(timeout=PATIENCE)


def test_a_user_without_rights_reads_and_may_not_assign(host: Host, running: Guest) -> None:
    tester = Front(host, "tester")
    try:
        assert tester.device(LONE)["Driver"] == "e1000e"
        assert tester.machine("others")["State"] == "running"
        with pytest.raises(BusError, match=r"InteractiveAuthorizationRequired|NotAuthorized"):
            tester.assign("others", STICK)
        assert tester.holds(STICK) == []
    finally:
        tester.close()


def test_with_an_agent_that_says_yes_the_user_may(host: Host, front: Front, running: Guest) -> None:
    said = host.run(f"python3 -B /opt/lab/agreeing_agent.py tester others {STICK}").stdout
    lines = [json.loads(line) for line in said.splitlines()]
    assert lines[-1]["error"] is None and lines[-1]["reply"][0].startswith("/org/hostpassd1/jobs/"), said
    assert any("others" in line.get("message", "") for line in lines), said
    assert front.holds(STICK) == [(True, True)]
    journal = host.run(f"journalctl HOSTPASSD_DEVICE={STICK} HOSTPASSD_OPERATION=assign -o json -n 1").stdout
    assert json.loads(journal)["HOSTPASSD_UID"] == host.run("id -u tester").stdout.strip()
    front.dismiss("others", STICK)


def _started(host: Host) -> str:
    return host.run("systemctl show -p MainPID --value hostpassd").stdout


@pytest.fixture
def held(front: Front, running: Guest) -> Iterator[None]:
    """The stick is in the running machine, both halves."""
    front.assign("others", STICK)
    yield
    front.dismiss("others", STICK)


@pytest.mark.usefixtures("held")
def test_libvirtd_restarted(host: Host, front: Front, recording: Recording) -> None:
    before, pid = front.holds(STICK), _started(host)
    host.run("systemctl restart libvirtd")
    _await_state(host, "running")
    front.sync()
    assert front.holds(STICK) == before == [(True, True)]
    assert front.state() == "running" and _started(host) == pid
    assert "HoldRemoved" not in recording.members()


@pytest.mark.usefixtures("held")
def test_libvirtd_stopped_and_started(host: Host, front: Front, recording: Recording) -> None:
    pid = _started(host)
    host.run("systemctl stop libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket")
    _await_state(host, "degraded")
    [[_, hold]] = front.device(STICK)["Holders"]
    assert hold["stale"] and hold["live"] and hold["config"]
    assert front.machine("others")["Devices"]
    with pytest.raises(BusError, match=ERROR + "HypervisorUnavailable"):
        front.assign("others", LONE)
    assert front.sync() > 0
    host.run("systemctl start libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket libvirtd.service")
    _await_state(host, "running")
    front.sync()
    [[_, hold]] = front.device(STICK)["Holders"]
    assert not hold["stale"] and _started(host) == pid
    signals = recording.until_generation(front.sync())
    assert "HoldRemoved" not in {signal["member"] for signal in signals}
    # Jobs of earlier tests end their stay whenever it is over.
    gone = [signal["body"][0] for signal in signals if signal["member"] == "InterfacesRemoved"]
    assert [path for path in gone if "/jobs/" not in path] == []


@pytest.mark.usefixtures("held")
def test_libvirtd_frozen_and_thawed(host: Host, front: Front) -> None:
    pid = _started(host)
    host.run("kill -STOP $(pidof libvirtd)")
    try:
        _await_state(host, "degraded")
        assert front.device(STICK)["Holders"][0][1]["stale"]
    finally:
        host.run("kill -CONT $(pidof libvirtd)")
    _await_state(host, "running")
    front.sync()
    assert front.holds(STICK) == [(True, True)] and _started(host) == pid


def _await_state(host: Host, state: str) -> None:
    words = "get-property org.hostpassd1 /org/hostpassd1/manager org.hostpassd1.Manager State"
    host.wait_for(f"busctl {words} | grep -q '\"{state}\"'")


# The receive buffers of a process's netlink sockets.
RECEIVE_BUFFERS = """
import ctypes, os, socket, sys
process = os.pidfd_open(int(sys.argv[1]))
for name in os.listdir(f"/proc/{sys.argv[1]}/fd"):
    if os.readlink(f"/proc/{sys.argv[1]}/fd/{name}").startswith("socket:"):
        copy = socket.socket(fileno=ctypes.CDLL(None).syscall(438, process, int(name), 0))
        if copy.family == socket.AF_NETLINK:
            print(copy.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
"""


def test_it_runs_confined_and_as_nobody_else(host: Host) -> None:
    shown = host.run("systemd-analyze security --no-pager hostpassd | tail -n 1").stdout
    assert float(shown.split("hostpassd.service:")[1].split()[0]) <= 1.2, shown
    pid = _started(host).strip()
    assert host.run(f"ps -o user= -p {pid}").stdout.strip().startswith("hostpas")
    # The one capability was there when the sockets of uevents were opened, and no thread has it now.
    sets = host.run(f"cat /proc/{pid}/task/*/status | grep -E '^Cap' | grep -v '^CapBnd'").stdout.split()[1::2]
    assert len(sets) > 4 and {int(value, 16) for value in sets} == {0}, sets
    sizes = host.run(f"python3 -c '{RECEIVE_BUFFERS}' {pid}").stdout.split()
    assert sum(int(size) >= 256 << 20 for size in sizes) == 2, sizes
    assert "Traceback" not in host.run("journalctl -u hostpassd -b --no-pager").stdout


def test_the_interfaces_tree_and_introspection_work_with_busctl(host: Host) -> None:
    # A job that goes between its listing and its own turn is an error to busctl: jobs stay 30 s after their end.
    host.wait_for('tree="$(busctl --list tree org.hostpassd1)" && ! echo "$tree" | grep -q /jobs/')
    tree = host.run("busctl --list tree org.hostpassd1").stdout.split()
    assert DEVICES + LONE in tree
    shown = host.run(f"busctl introspect org.hostpassd1 {DEVICES}{LONE}").stdout
    assert ".IommuGroup" in shown and "emits-change" in shown and "const" in shown


def test_it_survives_its_own_restart(host: Host, front: Front) -> None:
    before = {path for path in front.objects() if "/jobs/" not in path}
    host.run("systemctl restart hostpassd")
    assert {path for path in front.objects() if "/jobs/" not in path} == before
