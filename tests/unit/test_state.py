"""The state: what each event changes, and nothing else."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hostpassd.model.codes import Detail, detailed
from hostpassd.model.device import Device, Scsi, same_thing
from hostpassd.model.events import (
    DeviceGone,
    DeviceRemoved,
    DeviceSeen,
    DevicesScanned,
    Event,
    HostUse,
    HostUsesRead,
    HypervisorChanged,
    MachineGone,
    MachineRead,
    MachinesListed,
    ProblemChanged,
    Releasing,
    host_use,
)
from hostpassd.model.machine import Claim, Hold, InterfaceSource, Look, MachineKey, NodeSource, Settings, UsbSource
from hostpassd.passthrough.assign import blockers_for
from hostpassd.state import MANAGER, Changes, State
from hostpassd.state.eligibility import blockers, companions, is_leaf, use_blockers
from hostpassd.state.holdings import Holdings
from hostpassd.state.multimap import Multimap
from hostpassd.state.problems import problems
from hostpassd.state.tree import Tree
from tests.sim.world import (
    KEY,
    OTHER,
    URI,
    UUID,
    block,
    bridge,
    hostdev,
    keyboard,
    machine,
    net,
    pci,
    scsi,
    state_of,
    usb,
)

STICK = usb("1-1", number=3, serial="A")
TWIN = usb("1-2", number=4, serial="B")


def by_ids(alias: str = "hostdev0", bus: int | None = None, number: int | None = None) -> Claim:
    source = UsbSource(0x46F4, 0x0001, bus, number)
    return Claim("hostdev", source, alias, "<hostdev/>", f"hostdev:usb:46f4:0001:{bus}:{number}", "usb 46f4:0001")


def held(state: State, uuid: str = UUID) -> dict[str, tuple[bool, bool]]:
    return {hold.device: (hold.live, hold.config) for hold in state.holds_of(uuid)}


def test_a_hold_appears_moves_and_goes_with_one_signal_each() -> None:
    state = state_of(STICK)
    batches = state.apply(MachineRead(machine(live=(hostdev(STICK),))))
    assert [h.device for b in batches for h in b.holds_added] == [STICK.name]
    batches = state.apply(MachineRead(machine(live=(hostdev(STICK),), config=(hostdev(STICK),))))
    assert not any(b.holds_added or b.holds_removed for b in batches)
    assert held(state) == {STICK.name: (True, True)}
    batches = state.apply(MachineRead(machine()))
    assert [(h.device, h.live, h.config) for b in batches for h in b.holds_removed] == [(STICK.name, True, True)]


def test_a_claim_finds_its_device_when_that_comes_and_is_missing_when_it_goes() -> None:
    state = State()
    state.apply(MachineRead(machine(config=(by_ids(),))))
    assert [row.config for row in state.missing[UUID]] == [True]
    assert state.apply(DeviceSeen(STICK))[0].holds_added
    instance = state.devices[STICK.name].instance
    assert state.missing[UUID] == () and held(state) == {STICK.name: (False, True)}
    [batch] = state.apply(DeviceGone(STICK.sysfs_path))
    assert held(state) == {} and len(state.missing[UUID]) == 1
    [lost] = batch.holds_missing
    assert lost.hold.device == STICK.name and lost.rows == state.missing[UUID] and not batch.holds_removed
    assert state.last_place(KEY, state.missing[UUID][0].id) == (STICK.name, instance)


def test_what_is_missing_is_told_as_it_was_last_and_what_never_was_here_is_not_known() -> None:
    state = state_of(STICK)
    state.apply(MachineRead(machine(config=(by_ids(), on_node("/dev/not-here")))))
    state.apply(DeviceSeen(dataclasses.replace(STICK, label="Data Traveler")))
    state.apply(DeviceGone(STICK.sysfs_path))
    rows = {row.source: row.look for row in state.missing[UUID]}
    assert rows == {"usb 46f4:0001": Look("Data Traveler", "disk", "1-1"), "/dev/not-here": Look()}


def moved(batches: list[Changes]) -> list[tuple[str, str]]:
    """What became of holds, and on which devices."""
    return [
        *(("removed", hold.device) for b in batches for hold in b.holds_removed),
        *(("missing", lost.hold.device) for b in batches for lost in b.holds_missing),
        *(("changed", hold.device) for b in batches for _, hold in b.holds_changed),
        *(("added", hold.device) for b in batches for hold in b.holds_added),
    ]


def test_what_is_missing_comes_back_or_is_given_back() -> None:
    state = state_of(STICK)
    state.apply(MachineRead(machine(config=(by_ids(),))))
    assert moved(state.apply(DeviceGone(STICK.sysfs_path))) == [("missing", STICK.name)]
    assert moved(state.apply(DeviceSeen(STICK))) == [("added", STICK.name)]
    state.apply(DeviceGone(STICK.sysfs_path))
    assert moved(state.apply(MachineRead(machine("renamed", config=(by_ids(),))))) == []
    assert moved(state.apply(MachineRead(machine()))) == [("removed", STICK.name)]
    assert moved(state.apply(MachineRead(machine(config=(by_ids(),))))) == []  # it never was here
    assert moved(state.apply(MachineGone(KEY))) == []


def test_what_is_missing_is_told_as_it_is_at_the_end_of_the_batch() -> None:
    state = state_of(STICK)
    both = machine(live=(by_ids(),), config=(by_ids(),))
    state.apply(MachineRead(both))
    batch = Changes()
    for event in (DeviceGone(STICK.sysfs_path), MachineRead(dataclasses.replace(both, config=()))):
        for changes in state.apply(event):
            batch.merge(changes)
    [lost] = batch.holds_missing
    assert lost.rows == state.missing[UUID] and [(row.live, row.config) for row in lost.rows] == [(True, False)]


def test_what_comes_back_elsewhere_is_held_there_and_was_never_given_back() -> None:
    state = state_of(STICK)
    state.apply(MachineRead(machine(config=(by_ids(),))))
    state.apply(DeviceGone(STICK.sysfs_path))
    assert moved(state.apply(DeviceSeen(TWIN))) == [("added", TWIN.name)]
    assert moved(state.apply(MachineRead(machine()))) == [("removed", TWIN.name)]


def test_what_another_device_makes_ambiguous_is_missing_and_not_given_back() -> None:
    state = state_of(STICK)
    state.apply(MachineRead(machine(config=(by_ids(),))))
    [batch] = state.apply(DeviceSeen(TWIN))
    [lost] = batch.holds_missing
    [row] = lost.rows
    assert moved([batch]) == [("missing", STICK.name)] and row.ambiguous and (row,) == state.missing[UUID]
    assert moved(state.apply(DeviceGone(TWIN.sysfs_path))) == [("added", STICK.name)]
    state.apply(DeviceSeen(TWIN))
    assert moved(state.apply(DeviceGone(STICK.sysfs_path))) == [("added", TWIN.name)]
    assert moved(state.apply(DeviceGone(TWIN.sysfs_path))) == [("missing", TWIN.name)]
    assert not state.missing[UUID][0].ambiguous


def test_a_hold_beside_a_stale_claim_is_given_back_by_itself() -> None:
    state = state_of(STICK)
    state.apply(MachineRead(machine(live=(by_ids("old", 1, 3),))))
    state.apply(DeviceGone(STICK.sysfs_path))
    state.apply(DeviceSeen(usb("1-1", number=9, serial="A")))
    fresh = by_ids("new", 1, 9)
    assert moved(state.apply(MachineRead(machine(live=(by_ids("old", 1, 3), fresh))))) == [("added", STICK.name)]
    assert moved(state.apply(MachineRead(machine(live=(by_ids("old", 1, 3),))))) == [("removed", STICK.name)]


def test_a_machine_that_goes_gives_back_what_is_missing_too() -> None:
    state = state_of(STICK)
    state.apply(MachineRead(machine(config=(by_ids(),))))
    state.apply(DeviceGone(STICK.sysfs_path))
    assert moved(state.apply(MachineGone(KEY))) == [("removed", STICK.name)]


def test_any_change_of_a_hold_is_told_with_what_it_was() -> None:
    state = state_of(STICK)
    state.apply(HypervisorChanged(URI, True))
    state.apply(MachineRead(machine(live=(hostdev(STICK, "ua-x"),))))
    both = machine(live=(hostdev(STICK, "ua-x"),), config=(hostdev(STICK, "ua-x"),))
    for event, field in (
        (MachineRead(both), "config"),
        (Releasing(KEY, "ua-x"), "releasing"),
        (HypervisorChanged(URI, False), "stale"),
    ):
        [batch] = state.apply(event)
        [(before, after)] = batch.holds_changed
        assert (getattr(before, field), getattr(after, field)) == (False, True)
        assert not batch.holds_added and not batch.holds_removed


def test_of_several_claims_the_first_that_says_something_is_told() -> None:
    state = state_of(STICK)
    first = dataclasses.replace(by_ids(bus=1, number=3), settings=Settings(boot_order=1, managed=False))
    second = dataclasses.replace(by_ids(), settings=Settings(boot_order=2, startup_policy="optional"))
    state.apply(
        MachineRead(machine(live=(first,), config=(dataclasses.replace(second, guest_address="0000:04:00.0"),)))
    )
    [hold] = state.holds_on(STICK.name)
    assert hold.settings == Settings(boot_order=1, managed=False, startup_policy="optional")
    assert hold.guest_address == "0000:04:00.0"
    assert hold.claims == (first.id, second.id)
    state.apply(MachineRead(machine(config=(second,))))
    [hold] = state.holds_on(STICK.name)
    assert (hold.settings, hold.guest_address) == (second.settings, "")


def test_a_device_that_goes_and_comes_back_in_one_batch_is_told_as_what_became_of_it() -> None:
    state = state_of(STICK)
    state.apply(MachineRead(machine(config=(by_ids(),))))
    batch = Changes()
    ambiguous_for_a_moment: list[Event] = [DeviceSeen(TWIN), DeviceGone(TWIN.sysfs_path)]
    for event in ambiguous_for_a_moment:
        for changes in state.apply(event):
            batch.merge(changes)
    assert moved([batch]) == []
    for event in (*ambiguous_for_a_moment, MachineRead(machine(live=(by_ids(),)))):
        for changes in state.apply(event):
            batch.merge(changes)
    [(before, after)] = batch.holds_changed
    assert ((before.live, before.config), (after.live, after.config)) == ((False, True), (True, False))
    assert moved([batch]) == [("changed", STICK.name)]


def test_twins_are_told_apart_by_number_and_by_the_live_half() -> None:
    state = state_of(STICK, TWIN)
    state.apply(MachineRead(machine(live=(by_ids(bus=1, number=4),), config=(by_ids(),))))
    assert held(state) == {TWIN.name: (True, True)}
    state.apply(MachineRead(machine("b", OTHER, running=False, config=(by_ids(),))))
    assert held(state, OTHER) == {}
    assert len(state.missing[OTHER]) == 1


def test_a_stale_twin_is_missing_and_not_the_newly_plugged_one() -> None:
    state = state_of(STICK)
    state.apply(MachineRead(machine(live=(by_ids(bus=1, number=3),))))
    state.apply(DeviceGone(STICK.sysfs_path))
    state.apply(DeviceSeen(usb("1-1", number=9, serial="A")))
    assert held(state) == {} and len(state.missing[UUID]) == 1


def test_an_identity_that_cannot_be_read_or_is_another_loses_nothing_below() -> None:
    lun = scsi(2, 0, 0, 0)
    lun = dataclasses.replace(lun, facts=(Scsi(2, 0, 0, 0, "disk", "naa.1"),))
    disk = block("sda", lun)
    state = state_of(lun, disk)
    uses = HostUsesRead({disk.name: (host_use("mount", mount_points=("/",), system=True),)})
    state.apply(uses)
    first = state.devices[lun.name].instance
    state.apply(DeviceSeen(dataclasses.replace(lun, facts=(Scsi(2, 0, 0, 0, "disk", ""),))))
    assert state.devices[lun.name].instance == first
    assert [b.code for b in blockers(state, state.devices[lun.name])] == ["host-system"]
    state.apply(DeviceSeen(lun))
    batches = state.apply(DeviceSeen(dataclasses.replace(lun, facts=(Scsi(2, 0, 0, 0, "disk", "naa.2"),))))
    assert [set(b.added) for b in batches] == [set(), {("device", lun.name), ("device", disk.name)}]
    assert state.devices[lun.name].instance > first
    assert [b.code for b in blockers(state, state.devices[lun.name])] == ["host-system"]


def test_a_device_that_cannot_be_read_now_is_not_gone() -> None:
    one, two, three = (pci(f"0000:0{n}:00.0", group=n) for n in (1, 2, 3))
    state = state_of(one, two, three)
    state.apply(HostUsesRead({two.name: (host_use("address", addresses=("192.0.2.7/24",)),)}))
    state.apply(DevicesScanned((one,), unread=(two.sysfs_path, "/sys/devices/never/seen")))
    assert set(state.devices) == {one.name, two.name}
    assert [b.code for b in blockers(state, state.devices[two.name])] == ["network-in-use"]


def test_an_interface_in_another_namespace_blocks_its_device() -> None:
    card = pci("0000:01:00.0", group=1)
    state = state_of(card)
    state.apply(HostUsesRead({card.name: (host_use("upper-link", kinds=("netns",)),)}))
    [blocker] = blockers(state, state.devices[card.name])
    assert (blocker.code, blocker.severity) == ("network-in-use", "override")


def test_a_hold_that_comes_and_goes_in_one_batch_was_never_told() -> None:
    state = state_of(STICK)
    batch = Changes()
    for event in (MachineRead(machine(live=(hostdev(STICK),))), MachineRead(machine())):
        for changes in state.apply(event):
            batch.merge(changes)
    assert (batch.holds_added, batch.holds_removed) == ([], [])


def test_who_leaves_a_group_changes_those_that_stay() -> None:
    one, two = pci("0000:04:01.0", group=5), pci("0000:04:02.0", group=5)
    state = state_of(one, two)
    [batch] = state.apply(DeviceSeen(pci("0000:04:02.0", group=6)))
    assert ("device", one.name) in batch.changed and companions(state, state.devices[one.name]) == ()


def test_the_live_twin_is_in_use_whichever_it_is_and_a_mainboard_port_is_held_itself() -> None:
    port = Device("tty_ttyS0", "tty", "/sys/devices/platform/ttyS0", None, ("/dev/ttyS0",))
    state = state_of(STICK, TWIN, port)
    state.apply(HostUsesRead({}, {"br0": (), "/dev/loop0": ()}))
    bridge_claim = Claim("macvtap", InterfaceSource("br0"), "", "<interface/>", "macvtap:net:br0", "interface br0")
    live = (by_ids(), on_node("/dev/ttyS0"), on_node("/dev/loop0"), bridge_claim, on_node("/dev/not-here"))
    state.apply(MachineRead(machine(live=live)))
    assert held(state) == dict.fromkeys((STICK.name, TWIN.name, port.name), (True, False))
    assert [row.source for row in state.missing[UUID]] == ["/dev/not-here"]


def on_node(path: str) -> Claim:
    return Claim("disk", NodeSource(path), "", "<disk/>", f"disk:node:{path}", path)


def test_a_volume_is_held_on_every_disk_behind_it() -> None:
    first, second = scsi(2, 0, 0, 0), scsi(2, 0, 1, 0)
    disks = block("sda", first), block("sdb", second)
    state = state_of(first, second, *disks)
    state.apply(MachineRead(machine(live=(on_node("/dev/vg/data"),), config=(on_node("/dev/sda1"),))))
    assert held(state) == {} and len(state.missing[UUID]) == 2
    nodes = {"/dev/vg/data": (disks[0].name, disks[1].name), "/dev/sda1": (disks[0].name,)}
    state.apply(HostUsesRead({}, nodes))
    assert held(state) == {first.name: (True, True), second.name: (True, False)} and state.missing[UUID] == ()
    [batch] = state.apply(DeviceGone(disks[1].sysfs_path))
    assert moved([batch]) == [("missing", second.name)]  # the volume has lost a disk and stands on the other
    assert [row.source for lost in batch.holds_missing for row in lost.rows] == ["/dev/vg/data"]
    # What is in its place now is another disk, until it has been looked at.
    state.apply(DeviceSeen(disks[1]))
    assert held(state) == {first.name: (True, True)}
    [batch] = state.apply(HostUsesRead({}, nodes))
    assert [hold.device for hold in batch.holds_added] == [second.name]
    state.apply(HostUsesRead({}))
    assert held(state) == {} and len(state.missing[UUID]) == 2


def test_a_claim_stands_on_what_its_device_lies_below_now() -> None:
    card = pci("0000:01:00.0", group=1)
    lun = scsi(2, 0, 0, 0, card)
    disk = block("sda", lun)
    state = state_of(card, dataclasses.replace(disk, parent=card.name))
    state.apply(HostUsesRead({}, {"/dev/sda1": (disk.name,)}))
    state.apply(MachineRead(machine(live=(on_node("/dev/sda"),), config=(on_node("/dev/sda1"),))))
    assert held(state) == {card.name: (True, True)}
    state.apply(DeviceSeen(lun))
    [batch] = state.apply(DeviceSeen(disk))  # its parent is another one than was known first
    assert held(state) == {lun.name: (True, True)}
    assert [h.device for h in batch.holds_removed] == [card.name]
    # A child that comes before its parent.
    state.apply(DeviceGone(lun.sysfs_path))
    state.apply(DeviceSeen(disk))
    state.apply(HostUsesRead({}, {"/dev/sda1": (disk.name,)}))
    assert held(state) == {disk.name: (True, True)}
    state.apply(DeviceSeen(lun))
    assert held(state) == {lun.name: (True, True)}


def test_a_replug_is_another_instance_and_ends_a_batch() -> None:
    state = state_of(STICK)
    first = state.devices[STICK.name].instance
    batches = state.apply(DeviceSeen(usb("1-1", number=9)))
    assert [list(b.removed) for b in batches] == [[("device", STICK.name)], []]
    assert [list(b.added) for b in batches] == [[], [("device", STICK.name)]]
    assert state.devices[STICK.name].instance > first


def test_an_update_keeps_the_instance_and_says_nothing_when_nothing_differs() -> None:
    state = state_of(STICK)
    assert state.apply(DeviceSeen(STICK)) == []
    first = state.devices[STICK.name].instance
    state.apply(DeviceSeen(dataclasses.replace(STICK, driver="")))
    assert state.devices[STICK.name].instance == first


def test_problems_are_told_in_order_and_go_with_what_they_come_of() -> None:
    state = State()

    def after(event: Event) -> list[tuple[str, dict[str, Detail]]]:
        [batch] = state.apply(event)
        assert MANAGER in batch.changed
        assert all(fact.device == "" for fact in problems(state))
        return [(fact.code, dict(fact.details)) for fact in problems(state)]

    bare, grouped = pci("0000:00:03.0", group=-1), pci("0000:00:04.0", group=4)
    full = ProblemChanged("state-folder", True, detailed(error="It is full"))
    assert after(full) == [("state-folder", {"error": "It is full"})]
    assert state.apply(full) == []
    assert after(DeviceSeen(bare)) == [("no-iommu", {}), ("state-folder", {"error": "It is full"})]
    lost = [("hypervisor-unreachable", {"uri": uri, "error": "gone"}) for uri in ("a:///", "b:///")]
    after(HypervisorChanged("a:///", False, "gone"))
    assert after(HypervisorChanged("b:///", False, "gone"))[1:3] == lost
    assert after(HypervisorChanged("a:///", True))[1:2] == lost[1:]
    assert [code for code, _ in after(DeviceSeen(grouped))] == ["hypervisor-unreachable", "state-folder"]
    assert [code for code, _ in after(ProblemChanged("state-folder", False))] == ["hypervisor-unreachable"]
    assert "no-iommu" in [code for code, _ in after(DeviceGone(grouped.sysfs_path))]
    after(DeviceGone(bare.sysfs_path))
    assert after(HypervisorChanged("b:///", True)) == []


def test_an_unreachable_hypervisor_leaves_holds_stale_and_signals_no_removal() -> None:
    state = state_of(STICK)
    state.apply(HypervisorChanged(URI, True))
    state.apply(MachineRead(machine(live=(hostdev(STICK),))))
    batches = state.apply(HypervisorChanged(URI, False, "gone"))
    assert state.degraded and not any(b.holds_removed or b.removed for b in batches)
    assert [hold.stale for hold in state.holds_of(UUID)] == [True]
    state.apply(HypervisorChanged(URI, True))
    state.apply(MachineRead(machine(live=(hostdev(STICK),))))
    assert [hold.stale for hold in state.holds_of(UUID)] == [False]


def test_releasing_shows_until_the_guest_lets_go() -> None:
    state = state_of(STICK)
    state.apply(MachineRead(machine(live=(hostdev(STICK, "ua-x"),))))
    state.apply(Releasing(KEY, "ua-x"))
    assert [hold.releasing for hold in state.holds_of(UUID)] == [True]
    state.apply(MachineRead(machine()))
    state.apply(DeviceRemoved(KEY, "ua-x"))
    state.apply(MachineRead(machine(live=(hostdev(STICK, "ua-x"),))))
    assert [hold.releasing for hold in state.holds_of(UUID)] == [False]


def test_a_machine_that_goes_takes_its_holds_along() -> None:
    state = state_of(STICK)
    state.apply(MachineRead(machine(live=(hostdev(STICK),))))
    (batch,) = state.apply(MachineGone(KEY))
    assert [h.device for h in batch.holds_removed] == [STICK.name]
    assert list(state.holds_on(STICK.name)) == [] and list(batch.removed) == [("machine", UUID)]


def test_only_what_is_concerned_changes() -> None:
    devices = [pci(f"0000:{n:02x}:00.0", group=n) for n in range(1, 60)]
    state = state_of(*devices)
    (batch,) = state.apply(DeviceSeen(dataclasses.replace(devices[0], driver="vfio-pci")))
    assert set(batch.changed) == {("device", devices[0].name)}


def test_a_virtual_function_changes_when_its_physical_one_goes_or_comes() -> None:
    physical = pci("0000:02:00.0", group=8)
    virtual = pci("0000:02:10.0", group=9, physical=physical)
    state = state_of(physical, virtual)
    for event in (DeviceGone(physical.sysfs_path), DeviceSeen(physical)):
        (batch,) = state.apply(event)
        assert ("device", virtual.name) in batch.changed, event


AWAY = "qemu+ssh://away/system"
AWAY_KEY = MachineKey(AWAY, UUID)


def told_of(state: State) -> tuple[str, list[str]]:
    """Whose machine has the path, and why its stick cannot be assigned."""
    return state.machines[UUID].uri, [b.code for b in blockers(state, state.devices[STICK.name])]


def test_of_two_machines_with_one_uuid_the_one_that_runs_has_the_path_and_the_holds_of_both_count() -> None:
    state = state_of(STICK)
    running = machine(live=(hostdev(STICK),), config=(hostdev(STICK),))
    copy = machine("copy", running=False, uri=AWAY)
    for first, second in ((running, copy), (copy, running)):
        state.apply(MachineRead(first))
        state.apply(MachineRead(second))
        assert told_of(state) == (URI, ["held-live", "held-config"])
        # Neither a change of the copy nor its end is a change of what runs.
        assert state.apply(MachineRead(dataclasses.replace(copy, name="other"))) == []
        assert state.apply(MachineGone(copy.key)) == []
        assert told_of(state) == (URI, ["held-live", "held-config"])
        state.apply(MachineRead(copy))
    batches = state.apply(MachinesListed(URI, ()))
    assert [hold.device for b in batches for hold in b.holds_removed] == [STICK.name]
    assert told_of(state) == (AWAY, [])
    [batch] = state.apply(MachinesListed(AWAY, ()))
    assert list(batch.removed) == [("machine", UUID)] and not state.machines and not state.copies


def test_a_path_that_goes_to_another_hypervisor_is_another_object_and_keeps_its_holds() -> None:
    state = state_of(STICK)
    state.apply(MachineRead(machine(live=(hostdev(STICK, "here"),))))
    state.apply(MachineRead(machine("arrives", running=False, config=(hostdev(STICK),), uri=AWAY)))
    assert [(h.live, h.config, h.alias) for h in state.holds_of(UUID)] == [(True, True, "here")]
    state.apply(MachineRead(machine(running=False)))
    assert told_of(state) == (AWAY, ["held-config"])  # neither runs
    state.apply(MachineRead(machine(live=(hostdev(STICK, "here"),))))
    incoming = machine("arrives", live=(hostdev(STICK, "there"),), uri=AWAY)
    state.apply(MachineRead(dataclasses.replace(incoming, state="paused")))
    assert told_of(state) == (URI, ["held-live"])
    batches = state.apply(MachineRead(incoming))
    assert told_of(state) == (AWAY, ["held-live"])  # both run: the same one whoever was first
    assert [list(b.removed) for b in batches] == [[("machine", UUID)], []]
    batches = state.apply(HypervisorChanged(AWAY, False, "gone"))
    assert told_of(state) == (URI, ["held-live"])
    assert [list(b.removed) for b in batches] == [[("machine", UUID)], []]
    assert [list(b.added) for b in batches] == [[], [("machine", UUID)]]
    assert not any(b.holds_added or b.holds_removed for b in batches)
    assert [(h.alias, h.stale) for h in state.holds_of(UUID)] == [("here", True)]


def test_a_release_is_told_of_the_machine_that_was_asked() -> None:
    state = state_of(STICK, TWIN)
    state.apply(MachineRead(machine(live=(hostdev(STICK, "ua-x"),))))
    state.apply(MachineRead(machine("copy", live=(hostdev(TWIN, "ua-x"),), uri=AWAY)))
    state.apply(Releasing(KEY, "ua-x"))
    state.apply(DeviceRemoved(AWAY_KEY, "ua-x"))
    assert {h.device: h.releasing for h in state.holds_of(UUID)} == {STICK.name: True, TWIN.name: False}


def test_what_a_copy_has_is_not_the_target_machines_own() -> None:
    state = state_of(STICK)
    here = machine(live=(hostdev(STICK),))
    state.apply(MachineRead(here))
    assert [b.code for b in blockers_for(state, [state.devices[STICK.name]], here)] == []
    state.apply(MachineRead(machine("copy", running=False, config=(hostdev(STICK),), uri=AWAY)))
    assert [b.code for b in blockers_for(state, [state.devices[STICK.name]], here)] == ["held-config"]
    state.apply(MachineRead(machine(config=(hostdev(STICK),))))
    state.apply(MachineRead(machine("copy", live=(hostdev(STICK),), uri=AWAY)))
    assert [b.code for b in blockers_for(state, [state.devices[STICK.name]], here)] == ["held-live"]


def test_what_holds_a_virtual_function_blocks_all_above_the_physical_one_as_long_as_that() -> None:
    port = bridge("0000:00:01.0", group=1)
    physical = pci("0000:02:00.0", port, group=8)
    virtual = pci("0000:02:10.0", port, group=9, physical=physical)
    state = state_of(port, physical, virtual)

    def held_live(name: str) -> list[str]:
        return [b.message for b in blockers(state, state.devices[name]) if b.code == "held-live"]

    state.apply(MachineRead(machine(live=(hostdev(virtual),))))
    assert [b.code for b in state.below(port.name)] == ["held-live"] * 2
    assert "virtual functions pci_0000_02_10_0" in held_live(physical.name)[0]
    [batch] = state.apply(MachineRead(machine("renamed", live=(hostdev(virtual),))))
    assert "renamed has " in held_live(physical.name)[0]
    assert {("device", d.name) for d in (port, physical, virtual)} <= set(batch.changed)
    state.apply(DeviceGone(virtual.sysfs_path))
    assert held_live(physical.name) == [] and not state.below(port.name)


# --- incremental equals from scratch ---

_PORT = bridge("0000:00:01.0", group=1)
_CARD = pci("0000:01:00.0", _PORT, group=2, code=0x0C0330)
_MATE = pci("0000:01:00.1", _PORT, group=2, driver="snd")
_HUB = usb("usb1", _CARD, device_class=9)
_A = usb("1-1", _HUB, number=3)
_B = usb("1-2", _HUB, number=4)
_LUN = scsi(2, 0, 0, 0, _A)
_DISK = block("sdb", _LUN)
_KEYS = keyboard("input3", _B)
_IF = net("eth0", _MATE)
_PF = pci("0000:02:00.0", _PORT, group=8, driver="igb")
_VF = pci("0000:02:10.0", _PORT, group=9, driver="igbvf", physical=_PF)
_ALL = (_PORT, _CARD, _MATE, _HUB, _A, _B, _LUN, _DISK, _KEYS, _IF, _PF, _VF)

_on_bridge = Claim("macvtap", InterfaceSource("br0"), "", "<interface/>", "macvtap:net:br0", "interface br0")
_claims = st.lists(
    st.sampled_from(
        [
            *(hostdev(d, d.name) for d in (_A, _CARD, _MATE, _PF, _VF)),
            *(by_ids("i"), by_ids("n", 1, 4), on_node("/dev/sdb"), on_node("/dev/sdb1"), on_node("/dev/vg/data")),
            _on_bridge,
        ],
    ),
    max_size=3,
)
_uris = st.sampled_from((URI, AWAY))
_uuids = st.sampled_from((UUID, UUID, OTHER))
_machines = st.builds(
    lambda name, uuid, uri, running, live, stored: machine(
        name, uuid, running=running, live=tuple(live) if running else (), config=tuple(stored), uri=uri
    ),
    st.sampled_from(("vm", "renamed")),
    _uuids,
    _uris,
    st.booleans(),
    _claims,
    _claims,
)
_things = st.sampled_from((*_ALL, _VF, _LUN))  # most happens to these
_moved = {  # by name, what lies elsewhere: of no function and in another group, below nothing, on no seat
    _VF.name: pci("0000:02:10.0", _PORT, group=8, driver="igbvf"),
    _MATE.name: dataclasses.replace(_MATE, parent=None),
    _KEYS.name: dataclasses.replace(_KEYS, facts=()),
}
_seen = st.one_of(
    _things,
    _things.map(lambda d: dataclasses.replace(d, driver="vfio-pci")),
    _things.map(lambda d: dataclasses.replace(d, label="other")),
    st.sampled_from((_A, _B)).map(lambda d: usb(d.usb.port if d.usb else "", _HUB, number=77)),
    st.sampled_from(sorted(_moved)).map(_moved.__getitem__),
)


def _scan(seen: list[Device], gone: set[str], unread: set[str]) -> DevicesScanned:
    """A scan of everything, but of what is at or below the paths GONE; what SEEN is as said."""
    others = {device.name: device for device in seen}
    here = [d for d in _ALL if not any(f"{d.sysfs_path}/".startswith(f"{path}/") for path in gone)]
    return DevicesScanned(
        tuple(others.get(d.name, d) for d in here if d.sysfs_path not in unread),
        tuple(d.sysfs_path for d in here if d.sysfs_path in unread),
    )


_paths = st.sets(_things.map(lambda d: d.sysfs_path), max_size=2)
_scans = st.builds(_scan, st.lists(_seen, max_size=4), _paths, _paths)
_used = st.sets(st.sampled_from((_DISK.name, _IF.name, _CARD.name)))
_behind = st.sets(st.sampled_from((_DISK.name, _IF.name))).map(lambda names: tuple(sorted(names)))
_nodes = st.dictionaries(st.sampled_from(("/dev/sdb1", "/dev/vg/data", "br0")), _behind)
_events = st.one_of(
    _seen.map(DeviceSeen),
    _things.map(lambda d: DeviceGone(d.sysfs_path)),
    _scans,
    _machines.map(MachineRead),
    _machines.map(MachineRead),
    st.tuples(_uris, _uuids).map(lambda key: MachineGone(MachineKey(*key))),
    st.tuples(_uris, st.lists(_machines, max_size=2, unique_by=lambda m: m.uuid)).map(
        lambda listed: MachinesListed(listed[0], tuple(dataclasses.replace(m, uri=listed[0]) for m in listed[1]))
    ),
    st.tuples(_uris, st.booleans()).map(lambda which: HypervisorChanged(*which)),
    st.tuples(_uris, _uuids, st.sampled_from((_A.name, "i")), st.booleans()).map(
        lambda ask: Releasing(MachineKey(ask[0], ask[1]), ask[2], ask[3])
    ),
    st.tuples(_used, _nodes).map(
        lambda read: HostUsesRead({n: (host_use("mount", mount_points=(f"/mnt/{n}",)),) for n in read[0]}, read[1])
    ),
)


def _depth(device: Device) -> int:
    return device.sysfs_path.count("/")


def _told(state: State) -> dict[str, object]:
    """Everything derived about each device and machine."""
    rows: dict[str, object] = {}
    for device in state.devices.values():
        rows[device.name] = (
            dataclasses.replace(device, instance=0),
            state.children(device.name),
            blockers(state, device),
            companions(state, device),
            sorted(map(repr, state.holds_on(device.name))),
            state.uses_of(device.name),
        )
    for uuid, shown in state.machines.items():
        rows[uuid] = (
            shown,
            sorted(map(repr, state.holds_of(uuid))),
            sorted(repr(dataclasses.replace(row, look=Look())) for row in state.missing.get(uuid, ())),
        )
    rows["problems"] = [fact for fact in problems(state) if fact.code != "hypervisor-unreachable"]
    return rows


class Readings:
    """What the host was last said to do with its devices, as far as it is still known."""

    def __init__(self) -> None:
        self.uses: dict[str, tuple[HostUse, ...]] = {}
        self.nodes: dict[str, tuple[str, ...]] = {}

    def follow(self, event: Event, before: Mapping[str, Device], after: Mapping[str, Device]) -> None:
        """EVENT has changed the devices from BEFORE to AFTER."""
        if isinstance(event, HostUsesRead):
            self.uses = event.uses
            self.nodes = {node: tuple(n for n in names if n in after) for node, names in event.nodes.items()}
        seen = event.devices if isinstance(event, DevicesScanned) else ()
        seen = (event.device,) if isinstance(event, DeviceSeen) else seen
        # What is below a thing that turns out to be another keeps its uses; what led to it is looked for anew.
        others = {d.name for d in seen if d.name in before and not same_thing(before[d.name], d)}
        self.uses = {name: rows for name, rows in self.uses.items() if name in after and name not in others}
        lost = {name for name, d in before.items() if name not in after or after[name].instance != d.instance}
        left = {node: tuple(name for name in names if name not in lost) for node, names in self.nodes.items()}
        self.nodes = {node: names for node, names in left.items() if names or not self.nodes[node]}


def _check_tree(tree: Tree) -> None:
    devices = tree.devices.values()
    pci_devices = [(d.name, d.pci) for d in devices if d.pci]
    assert tree.by_path == {d.sysfs_path: d.name for d in devices}
    assert _pairs(tree.by_parent) == {(d.parent, d.name) for d in devices if d.parent}
    assert _pairs(tree.groups) == {(pci.iommu_group, name) for name, pci in pci_devices if pci.iommu_group >= 0}
    assert _pairs(tree.functions) == {(p.physical_function, name) for name, p in pci_devices if p.physical_function}
    keyboards = {(d.keyboard_of, d.name) for d in devices if d.keyboard_of}
    assert _pairs(tree.keyboards) == keyboards
    lines = [{name, *(above.name for above in tree.ancestors(name))} for _, name in keyboards]  # there is one seat
    assert tree.only_keyboards == dict.fromkeys(set.intersection(*lines) if lines else (), "seat0")


def _pairs(multimap: Multimap[Any, Any]) -> set[tuple[Any, Any]]:
    return {(key, value) for key, values in multimap.groups() for value in values}


def _check_spread(state: State) -> None:
    spread, tree = state.spread, state.tree
    assert set(spread.uses) <= set(tree.devices)
    for device in tree.devices.values():
        assert spread.own.get(device.name, ()) == use_blockers(state, device)
        below = [tree.devices[name] for name in tree.descendants(device.name)]
        assert dict(spread.below(device.name)) == Counter(b for d in below for b in use_blockers(state, d))
        leaves = [d for d in below if is_leaf(d, any(a.kind == "usb" for a in tree.ancestors(d.name)))]
        assert spread.leaves[device.name] == len(leaves)


def _check_holdings(holdings: Holdings) -> None:
    told = {(device, uuid, kind) for uuid, rows in holdings.told.items() for device, kind in rows}
    assert {(device, *row) for device, row in _pairs(holdings.by_device)} == told
    leading = {(name, node) for node, names in holdings.nodes.items() for name in names}
    assert _pairs(holdings.leading) == leading
    assert set(holdings.machines) == {key.uuid for key in holdings.copies}
    assert set(holdings.by_machine) == set(holdings.missing_in) == set(holdings.copies)
    absent = {(key.uuid, row.id) for key, rows in holdings.missing_in.items() for row in rows}
    for uuid, lost in holdings.lost.items():
        assert not set(lost) & set(holdings.told.get(uuid, {}))
        assert all(any((uuid, claim) in absent for claim in each.hold.claims) for each in lost.values())


class Folded:
    """What a listener knows that folds what is told of holds."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str, str], Hold] = {}
        self.missing: set[tuple[str, str, str]] = set()

    def hear(self, batch: Changes) -> None:
        for hold in batch.holds_removed:
            assert self.held.pop(_row(hold), None) or _row(hold) in self.missing
            self.missing.discard(_row(hold))
        for lost in batch.holds_missing:
            self.held.pop(_row(lost.hold), None)
            self.missing.add(_row(lost.hold))
        for before, after in batch.holds_changed:
            assert self.held[_row(after)] == before
            self.held[_row(after)] = after
        for hold in batch.holds_added:
            assert _row(hold) not in self.held
            self.missing.discard(_row(hold))
            self.held[_row(hold)] = hold


def _row(hold: Hold) -> tuple[str, str, str]:
    return (hold.machine, hold.device, hold.kind)


def _check_told(event: Event, batches: list[Changes], folded: Folded, state: State) -> None:
    for batch in batches:
        folded.hear(batch)
        # Unplugging is not giving back.
        assert not (isinstance(event, DeviceGone) and batch.holds_removed)
    told = [hold for uuid in state.machines for hold in state.holds_of(uuid)]
    assert folded.held == {_row(hold): hold for hold in told}
    lost = {(uuid, *row) for uuid, rows in state.holdings.lost.items() for row in rows}
    assert lost <= folded.missing and not folded.missing & folded.held.keys()


@settings(max_examples=600, deadline=None)
@given(st.booleans(), st.lists(_events, max_size=25))
def test_any_history_gives_what_a_fresh_reading_gives(whole: bool, events: list[Event]) -> None:
    state = state_of(*_ALL) if whole else State()  # most has most to do where there is everything
    readings, folded = Readings(), Folded()
    for event in events:
        devices, before = dict(state.devices), _told(state)
        batches = state.apply(event)
        readings.follow(event, devices, state.devices)
        named = {key for b in batches for where in (b.added, b.changed, b.removed) for _, key in where}
        after = _told(state)
        assert {key for key in {**before, **after} if before.get(key) != after.get(key)} <= named
        _check_tree(state.tree)
        _check_spread(state)
        _check_holdings(state.holdings)
        _check_told(event, batches, folded, state)
    fresh = State()
    fresh.apply(DevicesScanned(tuple(sorted(state.devices.values(), key=_depth))))
    fresh.apply(HostUsesRead(readings.uses, readings.nodes))
    for m in sorted(state.copies.values(), key=lambda m: m.key):
        fresh.apply(MachineRead(m))
        for alias in state.holdings.asked[m.key]:
            fresh.apply(Releasing(m.key, alias))
    assert _told(state) == _told(fresh)
    for key in state.copies:
        assert set(state.holds_in(key)) == set(fresh.holds_in(key))
