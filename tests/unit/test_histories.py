"""Random histories of a whole daemon on a simulated host: what it knows and tells is always what is true.

Everything but the four outer ends is real: the daemon's own wiring, state, jobs, intent log, router and the bytes on
the bus. At the ends are `truth` (udev, host uses, libvirt) and `listener` (the bus, polkit, one client that folds).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dbus_next import Variant
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import hostpassd.bus.access
from hostpassd import names
from hostpassd.bus import present
from hostpassd.machines.domain_xml import claim_of
from hostpassd.model.codes import OVERRIDABLE
from hostpassd.model.device import Device, MdevParent, MdevType, same_thing
from hostpassd.model.events import (
    DeviceSeen,
    DevicesScanned,
    Event,
    HostUse,
    HostUsesRead,
    HypervisorChanged,
    MachinesListed,
    host_use,
)
from hostpassd.model.machine import Claim, InterfaceSource, Machine, NodeSource, UsbSource
from hostpassd.passthrough.intent_rows import Unfinished
from hostpassd.passthrough.intents import IntentLog
from hostpassd.passthrough.steps import Attach, Store
from hostpassd.state import State
from hostpassd.sync import RESCAN_PAUSE
from tests.sim.clockwork import Clockwork
from tests.sim.disk import Disk, no_room
from tests.sim.ends import daemon_on, simulated
from tests.sim.listener import OBJECT_MANAGER, Bus, Reply, Tree, holds_of_devices, holds_of_machines, plain
from tests.sim.truth import STUBS, URI, Ear, Elsewhere, Host, HostEnd, Libvirt
from tests.sim.world import block, bridge, hostdev, keyboard, mdev, net, pci, scsi, usb

# --- what there is on the host ---

PORT = bridge("0000:00:01.0", group=1)
NIC = pci("0000:01:00.0", PORT, group=2, express=True)
SOUND = pci("0000:01:00.1", PORT, group=2, driver="snd", code=0x040300, express=True)
WIRE = net("enp1s0", NIC)
XHCI = pci("0000:00:14.0", group=3, driver="xhci_hcd", code=0x0C0330)
HUB = usb("usb1", XHCI, number=1, device_class=9)
STICK = usb("1-1", HUB, number=3, serial="A")
TWIN = usb("1-2", HUB, number=4, serial="B")
STICK_LUN = scsi(6, 0, 0, 0, STICK)
STICK_DISK = block("sdb", STICK_LUN)
KEYS = dataclasses.replace(keyboard("input3", TWIN), device_nodes=("/dev/input/event3",))
OTHER_XHCI = pci("0000:00:15.0", group=5, driver="xhci_hcd", code=0x0C0330)
OTHER_HUB = usb("usb1", OTHER_XHCI, number=1, device_class=9)  # a bus number goes to whoever comes first
HBA = pci("0000:00:05.0", group=4, driver="virtio-pci", code=0x010000)
LUN = scsi(2, 0, 0, 0, HBA)
DISK = block("sda", LUN)
ISA = pci("0000:00:1f.0", group=7, driver="lpc_ich", code=0x060100)
SMBUS = pci("0000:00:1f.3", group=7, driver="i801_smbus", code=0x0C0500)
PF = pci("0000:02:00.0", group=8, driver="igb", express=True)
VF = pci("0000:02:10.0", group=9, driver="igbvf", physical=PF, express=True)
GPU = pci("0000:03:00.0", group=10, driver="mtty", code=0x030000, boot_display=True)
GPU = dataclasses.replace(GPU, facts=(*GPU.facts, MdevParent((MdevType("sim-1", "Sim", 2),))))
MDEV = mdev("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", GPU)
THINGS = {name: thing for name, thing in globals().items() if isinstance(thing, Device)}
ENDPOINTS = ("NIC", "SOUND", "XHCI", "HBA", "SMBUS", "PF", "VF", "GPU")
ASSIGNABLE = ("NIC", "SOUND", "STICK", "TWIN", "LUN", "XHCI", "HBA", "VF", "MDEV")
USERS = ("WIRE", "STICK_DISK", "DISK")

# --- what machines may claim ---


def _claim(kind: str, source: Any, text: str) -> Claim:
    return Claim(kind, source, "", f"<{kind}/>", f"{kind}:{text}", text)


def _by_ids(vendor: int) -> Claim:
    xml = f"<hostdev type='usb'><source><vendor id='{vendor:#06x}'/><product id='0x0001'/></source></hostdev>"
    return dataclasses.replace(_claim("hostdev", UsbSource(vendor, 1), f"usb:{vendor:04x}:0001"), xml=xml)


def _by_address(start: str, tag: str) -> Claim:
    """As libvirt would be given it again, by the undoing of a dismissal."""
    address = "<address type='pci' domain='0x0000' bus='{}' slot='{}' function='0x0'/>"
    place = address.format("0x02", "0x10") if tag == "interface" else address.format("0x09", "0x00")
    return dataclasses.replace(claim_of(f"<{start}><source>{place}</source></{tag}>"), alias="")


GONE = _by_ids(0xDEAD)
_CLAIMS = (
    *(dataclasses.replace(hostdev(THINGS[name]), alias="") for name in ASSIGNABLE),
    _by_ids(0x46F4),
    GONE,
    _by_address("hostdev mode='subsystem' type='pci'", "hostdev"),
    _by_address("interface type='hostdev'", "interface"),
    _claim("macvtap", InterfaceSource("enp1s0"), "net:enp1s0"),
    _claim("disk", NodeSource("/dev/sdb1"), "node:/dev/sdb1"),
    _claim("disk", NodeSource("/dev/sdb"), "node:/dev/sdb"),
    _claim("disk", NodeSource("/dev/sda"), "node:/dev/sda"),
    _claim("evdev", NodeSource("/dev/input/event3"), "node:/dev/input/event3"),
)
CLAIMS = {claim.id: claim for claim in _CLAIMS}
UUIDS = ("11111111-2222-3333-4444-555555555555", "77777777-2222-3333-4444-555555555555")
NAMES = ("vm", "other", "renamed")
CALLS = ("attach_live", "attach_config", "detach_live", "detach_config", "detach_host", "reattach_host")

OPTIONS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"wait": st.booleans()},
    optional={
        "live": st.booleans(),
        "config": st.booleans(),
        "timeout": st.sampled_from((1, 5, 30)),
    },
)
_SIGNATURES = {"live": "b", "config": "b", "wait": "b", "timeout": "u", "instance": "t", "override": "as", "plan": "s"}


class _Mistakes(logging.Handler):
    """What the daemon logs of its own faults, and of what could not be undone."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.faults: list[str] = []
        self.not_undone: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.faults.append(self.format(record))
        elif "could not" in record.getMessage():
            self.not_undone.append(record.getMessage())


class Life:
    """One daemon from its start to its end, with a client on its bus."""

    def __init__(self, host: Host, libvirt: Libvirt, elsewhere: Elsewhere, folder: Path) -> None:
        self.host = host
        self.libvirt = libvirt
        self.elsewhere = elsewhere
        self.loop = Clockwork()
        self.uses = HostUsesRead({})
        self._instances: dict[str, int] = {}
        self.loop.do(lambda: self._make(folder))
        self.loop.run_until_idle(self.daemon.start())
        self.client = self.bus.client
        self.client.start(self.managed_objects())

    def _make(self, folder: Path) -> None:
        ear = Ear(self.emit)
        self.libvirt.ear = self.elsewhere.ear = ear
        self.udev = HostEnd(self.host, ear)
        hypervisors = {URI: self.libvirt, Elsewhere.uri: self.elsewhere}
        ends = simulated(folder, host=self.udev, hypervisors=hypervisors, bus=self._connect)
        self.inlet = ends.inlet
        self.daemon = daemon_on(ends)
        self.state = self.daemon.state

    def _connect(self, *arguments: Any) -> Bus:
        self.bus = Bus(*arguments)
        return self.bus

    def emit(self, event: Event) -> None:
        """What the outside tells the daemon; host uses are remembered as long as their devices are the same.

        What is below a thing that turns out to be another keeps its uses until the next reading; what led to it is
        looked for anew.
        """
        before = dict(self.state.devices)
        self.inlet.emit(event)
        if isinstance(event, HostUsesRead):
            self.uses, self._instances = event, {}
        seen = event.devices if isinstance(event, DevicesScanned) else ()
        seen = (event.device,) if isinstance(event, DeviceSeen) else seen
        others = {d.name for d in seen if d.name in before and not same_thing(before[d.name], d)}
        here = {name: device.instance for name, device in self.state.devices.items()}
        lost = {name for name, instance in self._instances.items() if here.get(name) != instance}
        self._instances.update(here)
        if lost:
            uses = {n: rows for n, rows in self.uses.uses.items() if n not in lost or (n in here and n not in others)}
            left = {node: tuple(d for d in disks if d not in lost) for node, disks in self.uses.nodes.items()}
            self.uses = HostUsesRead(uses, {n: disks for n, disks in left.items() if disks or not self.uses.nodes[n]})

    def kill(self) -> None:
        """The daemon ends where it stands."""
        self.libvirt.ear = self.elsewhere.ear = None
        self.libvirt.forget_calls()
        self.bus.cut()
        self.loop.abandon()

    def call(
        self, member: str, signature: str = "", *body: Any, path: str = names.MANAGER_PATH, interface: str = ""
    ) -> Reply:
        """The client calls, and everything happens that can."""
        return self.loop.do(lambda: self.bus.call(path, interface or names.MANAGER, member, signature, *body))

    def managed_objects(self) -> Tree:
        """GetManagedObjects, off the wire."""
        reply = self.call("GetManagedObjects", path=names.ROOT, interface=OBJECT_MANAGER)
        assert reply.body and not reply.error
        return dict(reply.body[0])

    @property
    def is_told(self) -> bool:
        """Whether the daemon has heard everything."""
        return not self.host.notices and not self.host.uses_due and self.libvirt.connected and self.libvirt.is_told


class Operations(RuleBasedStateMachine):
    """Callers, guests and a libvirt with moods. After each rule what is told is compared with what is true."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="hostpassd-histories-"))
        self.patches = pytest.MonkeyPatch()
        self.disk = Disk(self.patches)
        self.patches.setattr("hostpassd.passthrough.intents.CHECK_PAUSE", 0.0)
        self.mistakes = _Mistakes()
        logging.getLogger("hostpassd").addHandler(self.mistakes)
        self.numbers = 10
        self.ours: set[str] = set()  # aliases of what jobs have brought about
        self.sound = True

    @initialize(away=st.sets(st.sampled_from(tuple(THINGS)), max_size=3), running=st.sets(st.sampled_from(UUIDS)))
    def begin(self, away: set[str], running: set[str]) -> None:
        """A host with most of its devices, and two machines."""
        self.host = Host(*(thing for thing in THINGS.values() if thing is not OTHER_HUB))
        self.libvirt, self.elsewhere = Libvirt(self.host), Elsewhere()
        for name in sorted(away):
            if device := self._here(name):
                self.host.unplug(device)
        for uuid, name in zip(UUIDS, NAMES, strict=False):
            state = "running" if uuid in running else "shut off"
            self.libvirt.put(Machine(uuid, name, URI, state, persistent=True))
        self.life = Life(self.host, self.libvirt, self.elsewhere, self.folder)

    def _here(self, thing: str) -> Device | None:
        return self.host.present.get(THINGS[thing].sysfs_path)

    # --- libvirt and its guests ---

    @rule(uuid=st.sampled_from(UUIDS), mood=st.sampled_from(("prompt", "late", "refuse")))
    def mood(self, uuid: str, mood: str) -> None:
        """How a guest will take it to be asked."""
        self.libvirt.moods[uuid] = mood

    @precondition(lambda self: self.libvirt.asked)
    @rule(yes=st.booleans())
    def guest_answers(self, yes: bool) -> None:
        """A guest that was asked lets go or refuses."""
        ask = next(iter(self.libvirt.asked))
        (self.libvirt.release if yes else self.libvirt.refuse)(*ask)

    @rule(call=st.sampled_from(CALLS))
    def fail(self, call: str) -> None:
        """The next such call fails."""
        self.libvirt.fail.add(call)

    @rule(when=st.sampled_from(("before", "after")))
    def stall(self, when: str) -> None:
        """Calls take long from now on."""
        self.libvirt.stalled = when

    @rule()
    def resume(self) -> None:
        """Calls go on."""
        self.life.loop.do(self.libvirt.resume)

    @rule(late=st.booleans())
    def events_are_late(self, late: bool) -> None:
        """libvirt's events come after the readings that show their effects."""
        self.libvirt.late = late

    @rule(uuid=st.sampled_from(UUIDS))
    def start_or_stop(self, uuid: str) -> None:
        """A machine starts, or its power goes."""
        machine = self.libvirt.machines.get(uuid)
        if machine and machine.active:
            self.libvirt.destroy(uuid)
        elif machine:
            self.libvirt.start(uuid)
            # Also what a job has only stored for now: the undoing of that is not asked of a guest.
            self.ours |= {claim.alias for claim in self.libvirt.machines[uuid].live}

    @rule(full=st.booleans())
    def fill(self, full: bool) -> None:
        """There is no room any more in the state folder, or there is."""
        self.disk.at = no_room if full else lambda call: None

    @rule()
    def blink(self) -> None:
        """libvirtd is started again; calls under way are lost."""
        for step in (self.libvirt.lose, self.libvirt.resume, self.libvirt.come_back):
            self.life.loop.do(step)

    # --- what the daemon hears ---

    @rule()
    def read_everything(self) -> None:
        """All that is true is told in one turn of the loop."""
        self.life.loop.do(self._tell_everything)

    def _tell_everything(self) -> None:
        self.life.udev.drain()
        self.life.emit(self.host.read_uses())
        self.libvirt.deliver_all()

    @rule(member=st.sampled_from(("Sync", "Rescan")))
    def sync(self, member: str) -> None:
        """A client wants to be told of everything."""
        reply = self.life.call(member)
        if not reply.there:
            self.life.loop.advance(RESCAN_PAUSE)  # two Rescans keep apart
        assert reply.there and not reply.error, reply

    # --- operations ---

    @rule(
        member=st.sampled_from(("Assign", "Dismiss")),
        uuid=st.sampled_from(UUIDS),
        things=st.lists(
            st.sampled_from((*ASSIGNABLE, "WIRE", "STICK_DISK", "DISK", "HUB")), min_size=1, max_size=3, unique=True
        ),
        options=OPTIONS,
        careful=st.sampled_from(("", "instance", "plan", "override")),
    )
    def operate(self, member: str, uuid: str, things: list[str], options: dict[str, Any], careful: str) -> None:
        """A caller assigns or dismisses."""
        self._operate(member, uuid, [THINGS[thing].name for thing in things], dict(options), careful)

    def _operate(self, member: str, uuid: str, devices: list[str], options: dict[str, Any], careful: str) -> None:
        if member == "Assign" and careful != "override":
            options["override"] = sorted(OVERRIDABLE)
        if careful == "instance" and devices[0] in self.life.state.devices:
            options["instance"] = self.life.state.devices[devices[0]].instance
        if careful == "plan":
            without = {key: value for key, value in options.items() if key != "plan"}
            reply = self.life.call(f"Plan{member}", "sasa{sv}", uuid, devices, _packed(without))
            assert reply.there
            if not reply.error:
                options["plan"] = reply.body[0]["token"]  # type: ignore[index]
        reply = self.life.call(member, "sasa{sv}", uuid, devices, _packed(options))
        reply.member = f"{member}-wait" if options["wait"] else member

    @rule(uuid=st.sampled_from(UUIDS), which=st.integers(0, 2), options=OPTIONS)
    def dismiss_missing(self, uuid: str, which: int, options: dict[str, Any]) -> None:
        """A caller dismisses something that is not here."""
        rows = self.life.state.missing.get(uuid, ())
        if rows:
            self._operate("Dismiss", uuid, [rows[which % len(rows)].id], dict(options), "")

    @rule(which=st.integers(0, 7), options=OPTIONS)
    def dismiss_held(self, which: int, options: dict[str, Any]) -> None:
        """A caller dismisses what a machine has."""
        held = [(uuid, hold.device) for uuid in UUIDS for hold in self.life.state.holds_of(uuid)]
        if held:
            uuid, device = held[which % len(held)]
            self._operate("Dismiss", uuid, [device], dict(options), "")

    @rule(uuid=st.sampled_from(UUIDS), things=st.sampled_from((("NIC", "SOUND"), ("SOUND", "NIC"), ("TWIN", "TWIN"))))
    def race(self, uuid: str, things: tuple[str, str]) -> None:
        """Two callers want one group, or one device, at once."""
        for thing in things:
            self._operate("Assign", uuid, [THINGS[thing].name], {"wait": False}, "")

    @rule(which=st.integers(0, 3))
    def cancel(self, which: int) -> None:
        """A caller ends a job."""
        jobs = sorted(job.number for job in self.life.daemon.operations.running)
        if jobs:
            path = names.job_path(jobs[which % len(jobs)])
            self.life.call("Cancel", path=path, interface=names.JOB)

    @rule(slow=st.booleans())
    def prompts(self, slow: bool) -> None:
        """Whoever is asked for a password takes time from now on, or answers."""
        if slow:
            self.life.bus.prompting = True
        else:
            self.life.loop.do(self.life.bus.answer_prompts)

    @rule(seconds=st.sampled_from((0.5, 3.0, 25.0)))
    def time_passes(self, seconds: float) -> None:
        """Jobs may run out of time."""
        self.life.loop.advance(seconds)

    @rule()
    def kill(self) -> None:
        """The daemon is killed and started again. An assign that shows as a whole by then may count as done."""
        self.life.kill()
        for unfinished in IntentLog(self.folder / "intents", (URI,)).unfinished:
            self._note_whole(unfinished)
        self.life = Life(self.host, self.libvirt, self.elsewhere, self.folder)

    def _note_whole(self, unfinished: Unfinished) -> None:
        machine = self.libvirt.machines.get(unfinished.machine)
        live, stored = ({c.alias for c in half} for half in (machine.live, machine.config)) if machine else ((), ())
        attached = {step.alias for step in unfinished.steps if isinstance(step, Attach)}
        written = {step.claim.alias for step in unfinished.steps if isinstance(step, Store)}
        # By the time that the new daemon looks at it the machine can be off, and the live half gone with it.
        all_begun = unfinished.begun == len(unfinished.steps) and not unfinished.failed
        if (all_begun or attached <= set(live)) and written <= set(stored):
            self.ours |= attached | written

    @rule()
    def another_client(self) -> None:
        """Whoever comes now is told what the first client has folded."""
        tree = self.life.managed_objects()
        folded = self.life.client.tree
        for manager in (face[names.MANAGER_PATH][names.MANAGER] for face in (tree, folded)):
            manager.pop("Counters", None)  # no signal tells them
        assert folded == tree

    # --- what must always be so ---

    @invariant()
    def the_contract_is_kept(self) -> None:
        """No fault was logged, and nothing that the client heard broke the contract of the wire."""
        self.sound = False
        faults = [*self.life.loop.faults, *self.mistakes.faults, *self.life.client.complaints]
        assert not faults, "\n".join(faults)
        assert not self.life.client.batch
        self._note_ours()
        self.sound = True

    @invariant()
    def what_is_told_is_true(self) -> None:
        """The client's fold is what a daemon that starts now would tell, of what is true, or known as yet."""
        self.sound = False
        client = self.life.client
        others = (names.DEVICES, names.MACHINES)
        told = {path: faces for path, faces in client.tree.items() if path.startswith(others)}
        differences = _differences(_comparable(told), _comparable(self._fresh()))
        assert not differences, "\n".join(differences)
        jobs = self.life.state.jobs.values()
        assert {p: f[names.JOB] for p, f in client.tree.items() if p.startswith(names.JOBS)} == {
            names.job_path(job.number): plain(present.job_properties(job)) for job in jobs
        }
        assert holds_of_devices(client.tree) == holds_of_machines(client.tree) == client.holds
        self.sound = True

    def _fresh(self) -> Tree:
        life, fresh = self.life, State()
        scan = self.host.scan() if life.is_told else _scan_of(life.state.devices.values())
        known = [machine for key, machine in life.state.copies.items() if key.uri == URI]
        machines = self.libvirt.machines.values() if life.is_told else known
        for event in (
            scan,
            HostUsesRead(self.host.uses, life.uses.nodes) if life.is_told else life.uses,
            HypervisorChanged(URI, True),
            MachinesListed(URI, tuple(machines)),
            HypervisorChanged(Elsewhere.uri, True),
            MachinesListed(Elsewhere.uri, tuple(self.elsewhere.machines.values())),
        ):
            fresh.apply(event)
        entities = [("device", name) for name in fresh.devices] + [("machine", uuid) for uuid in fresh.machines]
        return {present.path_of(entity): plain(present.interfaces_of(fresh, entity)) for entity in entities}

    def _note_ours(self) -> None:
        for job in self.life.state.jobs.values():
            machine = self.libvirt.machines.get(job.machine)
            # A guest can refuse to let go of what is undone; then the job has said so.
            stays = job.state == "done" or "not undone" in str(job.error)
            if machine and job.operation == "assign" and stays:
                asked = job.asked
                moved = [d.name for d in THINGS.values() if d.name in asked or any(_mates(d, name) for name in asked)]
                starts = tuple(f"ua-hostpassd-{name.replace('_', '-')}-" for name in moved)
                self.ours |= {c.alias for c in (*machine.live, *machine.config) if c.alias.startswith(starts)}

    # --- what must be so when all has come to rest ---

    @rule()
    def rest(self) -> None:
        """Everything that can still happen happens, and then nothing is left over."""
        libvirt = self.libvirt
        libvirt.fail, libvirt.moods, libvirt.late = set(), {}, False
        self.fill(False)
        if not libvirt.connected:
            self.blink()
        self.prompts(False)
        for _ in range(4):
            self.resume()
            for ask in list(libvirt.asked):
                libvirt.release(*ask)
            self.read_everything()
            self.sync("Rescan")
            for _ in range(3):
                self.life.loop.advance(15)
                self._note_ours()
        self.sync("Sync")
        self.life.loop.advance(1)
        self.sync("Sync")
        self._nothing_is_left()

    def _nothing_is_left(self) -> None:
        self.sound = False
        daemon, executor = self.life.daemon, self.life.daemon.executor
        assert self.life.is_told
        assert not self.life.state.jobs and not daemon.operations.running and not daemon.operations.tasks
        assert not daemon.operations.upkeep.tasks
        assert executor.waiting.is_idle and not executor.locked
        assert all(reply.there for reply in self.life.bus.replies.values())
        if not self.mistakes.not_undone:
            self._intent_log_is_clean()
            self._drivers_are_home()
            self._aliases_are_somebodys()
        self.sound = True

    def _intent_log_is_clean(self) -> None:
        log = IntentLog(self.folder / "intents", (URI,))
        # What is unfinished with a machine that is gone is found to be over when it is looked at again.
        assert not [left for left in log.unfinished if left.machine in self.libvirt.machines]
        for name in log.lent:
            device = self.host.named(name)
            assert device is None or self.libvirt.group_taken(device), f"{name} is lent to nobody"

    def _drivers_are_home(self) -> None:
        for device in self.host.present.values():
            home = self.host.home[device.name]
            if device.pci and device.driver != home and device.name not in self.host.blame:
                assert self.libvirt.group_taken(device), f"{device.name} is on {device.driver!r} and nobody has it"

    def _aliases_are_somebodys(self) -> None:
        for machine in self.libvirt.machines.values():
            for claim in (*machine.live, *machine.config):
                assert not claim.alias.startswith("ua-hostpassd-") or claim.alias in self.ours, claim

    def teardown(self) -> None:
        """Every history comes to rest."""
        try:
            if self.sound and hasattr(self, "life"):
                self.rest()
                self.the_contract_is_kept()
                self.what_is_told_is_true()
                self.another_client()
        finally:
            if hasattr(self, "life"):
                self.life.kill()
            logging.getLogger("hostpassd").removeHandler(self.mistakes)
            self.patches.undo()
            shutil.rmtree(self.folder)


class Histories(Operations):
    """All that, on a host and with machines that others change at any time."""

    # --- the host ---

    @rule(thing=st.sampled_from(tuple(THINGS)), backwards=st.booleans())
    def plug(self, thing: str, backwards: bool) -> None:
        """A device comes with what is below it; its children's uevents can be first."""
        device = THINGS[thing]
        if self.host.named(device.name) or not self.host.has_room_for(device):
            return
        self.numbers += 1
        taken = {d.name for d in self.host.present.values()}  # the other controller may have the bus number
        things = [device, *(t for t in THINGS.values() if t.sysfs_path.startswith(device.sysfs_path + "/"))]
        things = [each for each in things if each.name not in taken]
        for each in things:
            self.host.present[each.sysfs_path] = self._numbered(each)
        for each in reversed(things) if backwards else things:
            self.host.plug(self.host.present[each.sysfs_path])

    def _numbered(self, device: Device) -> Device:
        if not device.usb or device.usb.device_class == 9:
            return device
        return dataclasses.replace(device, facts=(dataclasses.replace(device.usb, number=self.numbers),))

    @rule(thing=st.sampled_from(tuple(THINGS)), backwards=st.booleans())
    def unplug(self, thing: str, backwards: bool) -> None:
        """A device goes with what is below it."""
        device = self._here(thing)
        if device:
            self.libvirt.unplug(device, backwards)

    @rule(thing=st.sampled_from(("STICK", "TWIN", "LUN", "NIC", "HUB")))
    def replug(self, thing: str) -> None:
        """Out and in again: nothing is told in between."""
        self.unplug(thing, False)
        self.plug(thing, False)

    @rule(thing=st.sampled_from(tuple(THINGS)), label=st.sampled_from(("", "x", "y")))
    def change(self, thing: str, label: str) -> None:
        """A uevent of a device that is there, with another label or the same."""
        device = self._here(thing)
        if device:
            self.host.plug(dataclasses.replace(device, label=label or device.label))

    @rule(thing=st.sampled_from(ENDPOINTS), driver=st.sampled_from(("", "vfio-pci", "home")))
    def rebind(self, thing: str, driver: str) -> None:
        """virsh nodedev-detach and its kin, by others."""
        device = self._here(thing)
        if not device or device.sysfs_path in self.libvirt.taken:
            return
        driver = self.host.home[device.name] if driver == "home" else driver
        if driver not in STUBS and self.libvirt.group_taken(device):
            return
        self.host.bind(device.name, driver)
        if driver in STUBS:
            self.host.blame.add(device.name)

    @rule(used=st.sets(st.sampled_from(USERS)), system=st.booleans())
    def use(self, used: set[str], system: bool) -> None:
        """The host mounts, unmounts, brings interfaces up and down."""
        here = [device for device in map(self._here, sorted(used)) if device]
        self.host.uses = {d.name: (_use(d, system=system),) for d in here}
        self.host.uses_due = True

    # --- machines, by others ---

    @rule(
        uuid=st.sampled_from(UUIDS),
        name=st.sampled_from(NAMES),
        stored=st.lists(st.sampled_from(tuple(CLAIMS)), max_size=3, unique=True),
    )
    def define(self, uuid: str, name: str, stored: list[str]) -> None:
        """A machine is made, renamed, made persistent, its stored half written anew."""
        old = self.libvirt.machines.get(uuid) or Machine(uuid, name, URI, "shut off", persistent=True)
        name = old.name if old.active else name
        self.libvirt.put(dataclasses.replace(old, name=name, persistent=True, config=tuple(CLAIMS[c] for c in stored)))

    @rule(uuid=st.sampled_from(UUIDS))
    def undefine(self, uuid: str) -> None:
        """A machine loses its stored half, and itself if it does not run."""
        machine = self.libvirt.machines.get(uuid)
        if machine and machine.active:
            self.libvirt.put(dataclasses.replace(machine, persistent=False, config=()))
        elif machine:
            self.libvirt.forget(uuid)

    @rule(
        uuid=st.sampled_from(UUIDS),
        name=st.sampled_from(NAMES),
        live=st.none() | st.sets(st.sampled_from(("STICK", "TWIN", "LUN")), max_size=2),
        stored=st.none() | st.sets(st.sampled_from(tuple(CLAIMS)), max_size=2),
    )
    def copy_elsewhere(self, uuid: str, name: str, live: set[str] | None, stored: set[str] | None) -> None:
        """Another hypervisor has a machine with the same UUID, running or not; or has it no more."""
        machine = Machine(
            uuid,
            name,
            Elsewhere.uri,
            "shut off" if live is None else "running",
            persistent=stored is not None,
            live=tuple(hostdev(THINGS[thing], f"far-{thing}") for thing in sorted(live or ())),
            config=tuple(CLAIMS[claim] for claim in sorted(stored or ())),
        )
        there = live is not None or stored is not None
        self.life.loop.do(lambda: self.elsewhere.put(uuid, machine if there else None))

    @rule(uuid=st.sampled_from(UUIDS), thing=st.sampled_from(ASSIGNABLE))
    def attach_by_others(self, uuid: str, thing: str) -> None:
        """virsh attach-device."""
        device = self._here(thing)
        if device and uuid in self.libvirt.machines:
            self.numbers += 1
            self.libvirt.attach_by_others(uuid, hostdev(device, f"hostdev{self.numbers}"))

    @rule(uuid=st.sampled_from(UUIDS), which=st.integers(0, 3))
    def detach_by_others(self, uuid: str, which: int) -> None:
        """virsh detach-device."""
        machine = self.libvirt.machines.get(uuid)
        if machine and machine.live:
            self.libvirt.release(uuid, machine.live[which % len(machine.live)].alias, by_others=True)

    # --- how the daemon hears of it ---

    @rule()
    def lose_libvirt(self) -> None:
        """libvirtd goes, or comes back."""
        self.life.loop.do(self.libvirt.lose if self.libvirt.connected else self.libvirt.come_back)
        self.life.loop.do(self.libvirt.resume)

    @rule(which=st.integers(0, 5))
    def pass_on(self, which: int) -> None:
        """One uevent comes through."""
        event = self.host.deliver(lambda count: which % count)
        if event:
            self.life.loop.do(lambda: self.life.emit(event))

    @rule(apart=st.booleans())
    def pass_all_on(self, apart: bool) -> None:
        """All uevents come through, each in a turn of the loop or all in one."""
        if not apart:
            self.life.loop.do(self.life.udev.drain)
        while self.host.notices:
            self.pass_on(0)

    @rule(which=st.integers(0, 1))
    def read_machine(self, which: int) -> None:
        """A machine is read, told of or not."""
        self.life.loop.do(lambda: self.libvirt.deliver(UUIDS[which]))

    @rule()
    def overflow(self) -> None:
        """uevents were lost: everything is read afresh."""
        self.host.notices = []
        self.life.loop.do(lambda: self.life.emit(self.host.scan()))
        self.host.uses_due = True


def _use(device: Device, *, system: bool) -> HostUse:
    if device.kind == "net":
        return host_use("address", addresses=(f"/{device.name}",))
    return host_use("mount", mount_points=(f"/{device.name}",), system=system)


def _packed(options: dict[str, Any]) -> dict[str, Variant]:
    return {key: Variant(_SIGNATURES[key], value) for key, value in options.items()}


def _scan_of(devices: Any) -> DevicesScanned:
    return DevicesScanned(tuple(sorted(devices, key=lambda d: d.sysfs_path.count("/"))))


def _mates(device: Device, name: str) -> bool:
    other = next((d for d in THINGS.values() if d.name == name), None)
    return bool(device.pci and other and other.pci and device.pci.iommu_group == other.pci.iommu_group)


def _differences(told: Tree, true: Tree) -> list[str]:
    """Each property that is told otherwise than it is."""
    keys = {(p, i, k) for tree in (told, true) for p, faces in tree.items() for i, row in faces.items() for k in row}
    rows = []
    for path, interface, key in sorted(keys):
        one, other = (tree.get(path, {}).get(interface, {}).get(key, "nothing") for tree in (told, true))
        if one != other:
            rows.append(f"{path} {key}: told {one}, true {other}")
    return rows


def _comparable(tree: Tree) -> Tree:
    """Without what a daemon that starts now cannot know: instances, who was asked to let go, what the missing was."""
    compared = json.loads(json.dumps(tree))
    for interfaces in compared.values():
        device, machine = interfaces.get(names.DEVICE), interfaces.get(names.MACHINE)
        if device:
            del device["Instance"]
        for _, hold in device["Holders"] if device else machine["Devices"]:
            del hold["releasing"]
        for row in machine["Missing"] if machine else ():
            for key in ("label", "category", "location"):
                row.pop(key, None)
    return dict(compared)


async def _somebody(uid: int) -> str:
    return str(uid)


@pytest.fixture(autouse=True)
def _no_audit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host's journal is not filled with made-up operations."""
    monkeypatch.setattr("hostpassd.audit.JOURNAL", "/nonexistent")
    monkeypatch.setattr(hostpassd.bus.access, "_person", _somebody)  # its thread would end at any time
    yield


# More of them, and other ones each time: HISTORIES=2000 ./dev test tests/unit/test_histories.py
_WANTED = int(os.environ.get("HISTORIES", "0"))


@pytest.mark.parametrize("machine", [Operations, Histories])
def test_whatever_happens_what_is_told_is_true(machine: type[RuleBasedStateMachine]) -> None:
    """A function, not a TestCase: pytest-asyncio cannot collect one of those (0.20)."""
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=_WANTED or 40,
            stateful_step_count=40,
            deadline=None,
            derandomize=not _WANTED,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )
