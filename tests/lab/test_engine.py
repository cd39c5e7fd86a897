"""What it is trusted for: plans that go stale, callers at once, a guest that answers late, a kill at every step."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import pytest

from tests.lab.front import DEVICES, ERROR, BusError, Front, Recording
from tests.lab.guest import Guest
from tests.lab.machine import PATIENCE, Host
from tests.lab.test_assign import DRIVERS, LONE, PAIR, driver, hostdevs

GRAPHICS = ("pci_0000_07_00_0", "pci_0000_07_00_1")
LUN = "scsi_0_0_0_0"
MANAGED = "org.hostpassd1 /org/hostpassd1/manager org.hostpassd1.Manager"

NewGuest = Callable[..., Guest]


@pytest.fixture(scope="module")
def running(host: Host) -> Iterator[Guest]:
    """A running machine, shared by the tests that leave it as it was."""
    guest = Guest(host, "engine")
    guest.define()
    guest.start()
    guest.wait_up()
    yield guest
    guest.clean_up()


def test_a_plan_says_what_will_happen(host: Host, front: Front, running: Guest) -> None:
    front.sync()
    command = f"busctl --json=short call {MANAGED} PlanAssign 'sasa{{sv}}'"
    [told] = json.loads(host.run(f"{command} engine 1 {PAIR[0]} 0").stdout)["data"]
    plan = {key: value["data"] for key, value in told.items()}
    assert plan["possible"] and plan["authorization"] == "yes" and plan["blockers"] == []
    assert plan["devices"] == [DEVICES + name for name in PAIR]
    assert {path.removeprefix(DEVICES)[:4] for path in plan["loses"]} == {"net_", "soun"}
    order = [step[1] for step in plan["steps"]]
    assert order == ["store", "store", "detach", "detach", "attach", "attach"]
    assert "no-migration" in [row[1] for row in plan["consequences"]]
    assert [driver(host, name) for name in PAIR] == [DRIVERS[name] for name in PAIR]
    assert running.live_xml().count("<hostdev") == running.stored_xml().count("<hostdev") == 0


def test_a_plan_goes_stale_with_what_it_rests_on_and_with_nothing_else(
    host: Host, front: Front, running: Guest
) -> None:
    path = host.run("lsblk -dnro PATH,SERIAL | awk '$2==\"DISK-0001\" {print $1}'").stdout.strip()
    front.sync()
    token = front.plan("Assign", "engine", LUN)["token"]
    host.run(f"mkfs.ext4 -q {path} && mkdir -p /mnt/stale && mount {path} /mnt/stale")
    try:
        front.sync()
        with pytest.raises(BusError, match=ERROR + "StalePlan"):
            front.assign("engine", LUN, plan=token)
    finally:
        host.run(f"umount /mnt/stale; wipefs -qa {path}; udevadm settle")
    front.sync()
    token = front.plan("Assign", "engine", LUN)["token"]
    host.plug_usb_storage("unrelated", "UNRELATED-0001")
    host.wait_for("lsblk -dnro SERIAL | grep -q UNRELATED-0001")
    front.sync()
    front.assign("engine", LUN, plan=token)
    front.dismiss("engine", LUN)
    token = front.plan("Assign", "engine", "serial:UNRELATED-0001")["token"]
    host.unplug("unrelated")
    host.wait_for("! lsblk -dnro SERIAL | grep -q UNRELATED-0001")
    front.sync()
    with pytest.raises(BusError, match=ERROR + "(StalePlan|NoSuchDevice)"):
        front.assign("engine", "serial:UNRELATED-0001", plan=token)


def test_two_callers_at_once_on_one_group_never_make_half_of_it(
    host: Host, front: Front, running: Guest, guest: NewGuest
) -> None:
    other = guest("rival", kernel=False)
    other.define()
    other.start()
    front.sync()
    call = f"busctl --timeout=280 call {MANAGED} Assign 'sasa{{sv}}'"
    one, two = f"{call} engine 1 {PAIR[0]} 1 timeout u 250", f"{call} rival 1 {PAIR[1]} 1 timeout u 250"
    said = host.run(f"({one}; echo ended $?) 2>&1 & ({two}; echo ended $?) 2>&1 & wait").stdout
    assert sorted(re.findall(r"ended (\d+)", said)) == ["0", "1"], said
    assert "held-live" in said or "held-config" in said or "busy" in said, said
    front.sync()
    holders = [[path for path, _ in front.device(name)["Holders"]] for name in PAIR]
    assert holders[0] == holders[1] and len(holders[0]) == 1
    winner = front.properties(holders[0][0], "org.hostpassd1.Machine")["Name"]
    if winner == "rival":
        other.destroy()
        front.sync()
    front.dismiss(winner, PAIR[0])
    assert [front.holds(name) for name in PAIR] == [[], []]
    host.wait_for(" && ".join(f"test -d /sys/bus/pci/drivers/{DRIVERS[name]}/{_place(name)}" for name in PAIR))


def _place(name: str) -> str:
    _, domain, bus, slot, function = name.split("_")
    return f"{domain}:{bus}:{slot}.{function}"


def test_a_guest_that_answers_late_still_ends_the_hold(
    host: Host, front: Front, running: Guest, recording: Recording
) -> None:
    front.assign("engine", PAIR[0])
    host.run("virsh -q suspend engine")
    try:
        front.sync()
        with pytest.raises(BusError, match=ERROR + "GuestDidNotRelease"):
            front.dismiss_in_vain("engine", PAIR[0])
        assert any(hold["releasing"] for name in PAIR for _, hold in front.device(name)["Holders"])
        assert "HoldRemoved" not in recording.members() and hostdevs(running.stored_xml()) == 0
    finally:
        host.run("virsh -q resume engine")
    recording.wait_for("HoldRemoved", DEVICES + PAIR[0])
    front.sync()
    for name in PAIR:
        if front.holds(name):
            front.dismiss("engine", name)
    host.wait_for(" && ".join(f"test -d /sys/bus/pci/drivers/{DRIVERS[name]}/{_place(name)}" for name in PAIR))
    front.sync()
    assert [front.device(name)["Driver"] for name in PAIR] == [DRIVERS[name] for name in PAIR]
    assert [front.holds(name) for name in PAIR] == [[], []]


def test_a_graphics_card_moves_with_its_sound_and_stays_one_card(host: Host, front: Front, running: Guest) -> None:
    homes = [driver(host, name) for name in GRAPHICS]
    assert homes == ["bochs-drm", "snd_hda_intel"]
    assert front.device(GRAPHICS[0])["Companions"] == [DEVICES + GRAPHICS[1]]
    front.assign("engine", GRAPHICS[0])
    assert [front.holds(name) for name in GRAPHICS] == [[(True, True)]] * 2
    places = re.findall(r"</source>.*?<address type='pci' ([^/]*)/>", running.stored_xml(), re.DOTALL)[-2:]
    slots = {re.sub(r" function='0x.'| multifunction='on'", "", place) for place in places}
    assert len(slots) == 1, places
    assert ["multifunction='on'" in place for place in places] == [True, False]
    assert [re.findall(r"function='(0x\d)'", place) for place in places] == [["0x0"], ["0x1"]]
    running.wait_sees(r"1234:1111")
    front.dismiss("engine", GRAPHICS[1])
    assert [driver(host, name) for name in GRAPHICS] == homes
    assert hostdevs(running.live_xml()) == hostdevs(running.stored_xml()) == 0


# The intent log is on disk before each effect, so its fsyncs are the daemon's steps: it is killed at each in turn.
KILL_AT = "strace -qq -f -o /dev/null -e trace=fsync -e inject=fsync:signal=SIGKILL:when={} -p {}"


@pytest.mark.parametrize("operation", ["Assign", "Dismiss"])
def test_killed_at_every_step_it_ends_in_one_of_two_clean_states(
    host: Host, front: Front, running: Guest, operation: str
) -> None:
    """As long as a kill still comes: a step that is added joins by itself."""
    ends = set()
    for at in range(1, 60):
        _bring(front, "engine", held=operation == "Dismiss")
        killed = _operate_and_die(host, front, operation, at)
        held = _one_clean_state(host, front, running)
        ends.add((killed, held))
        if not killed:
            break
    assert not killed and at > 8, at
    assert (False, operation == "Assign") in ends and len({held for killed, held in ends if killed}) >= 1
    _bring(front, "engine", held=False)


def _bring(front: Front, machine: str, *, held: bool) -> None:
    """The pair is, or is not, with the machine."""
    front.sync()
    if bool(front.holds(PAIR[0])) != held:
        (front.assign if held else front.dismiss)(machine, PAIR[0])


def _operate_and_die(host: Host, front: Front, operation: str, at: int) -> bool:
    """Runs the operation, the daemon killed at its step AT; whether it was, and systemd has started it again."""
    pid = host.run("systemctl show -p MainPID --value hostpassd").stdout.strip()
    tracer = host.open(f"exec {KILL_AT.format(at, pid)}")
    host.wait_for(f"grep -q '^TracerPid:.[1-9]' /proc/{pid}/status")
    call = f"busctl --timeout=280 call {MANAGED} {operation} 'sasa{{sv}}'"
    # The end is on disk before the answer comes. What is dying has a folder in /proc for a while yet.
    killed = host.run(f"{call} engine 1 {PAIR[0]} 1 timeout u 250", check=False, timeout=PATIENCE).status != 0
    if killed:
        host.wait_for(
            f"systemctl is-active -q hostpassd && test $(systemctl show -p MainPID --value hostpassd) != {pid}"
        )
    else:
        host.run("pkill -x strace")
    tracer.communicate(timeout=PATIENCE)
    return killed


def _one_clean_state(host: Host, front: Front, running: Guest) -> bool:
    """Whether the machine has all of the pair, or nothing; nothing else may be, drivers and intent log included."""
    host.wait_for("! grep -q begin /var/lib/hostpassd/intents", timeout=90)
    front.sync()
    holds = [front.holds(name) for name in PAIR]
    assert holds in ([[], []], [[(True, True)], [(True, True)]]), holds
    held = holds[0] != []
    count = 2 if held else 0
    assert hostdevs(running.live_xml()) == hostdevs(running.stored_xml()) == count
    if held:
        assert [driver(host, name) for name in PAIR] == ["vfio-pci", "vfio-pci"]
    else:
        host.wait_for(" && ".join(f"test -d /sys/bus/pci/drivers/{DRIVERS[name]}/{_place(name)}" for name in PAIR))
    return held


def test_a_devices_story_is_in_the_journal(host: Host, front: Front, running: Guest) -> None:
    since = host.run("date +'%Y-%m-%d %H:%M:%S'").stdout.strip()
    front.assign("engine", LONE)
    front.dismiss("engine", LONE)
    running.attach(_hostdev(LONE), "--config")
    front.sync()
    running.detach(_hostdev(LONE), "--config")
    front.sync()
    with pytest.raises(BusError, match=ERROR + "Blocked"):
        front.assign("engine", "/dev/vda")
    lines = host.run(f"journalctl --since '{since}' HOSTPASSD_DEVICE={LONE} -o json --no-pager").stdout.splitlines()
    story = [json.loads(line) for line in lines]
    assert [row["HOSTPASSD_OPERATION"] for row in story] == ["assign", "dismiss", "added", "removed"]
    assert {row["HOSTPASSD_MACHINE_NAME"] for row in story} == {"engine"}
    assert [row.get("HOSTPASSD_RESULT") for row in story[:2]] == ["done", "done"]
    assert [row.get("HOSTPASSD_UID") for row in story[:2]] == ["0", "0"]
    assert all(len(row["MESSAGE_ID"]) == 32 for row in story)


def _hostdev(name: str) -> str:
    from tests.lab.guest import pci_hostdev

    return pci_hostdev(_place(name))
