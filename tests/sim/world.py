"""A small world for the logic's tests: devices, and a hypervisor that behaves as libvirt was seen to."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Collection

from hostpassd import errors, names
from hostpassd.machines.domain_xml import claim_of
from hostpassd.model.device import Block, Device, Input, Mdev, Net, Pci, Scsi, Usb, device_name
from hostpassd.model.events import (
    DeviceAdded,
    DeviceRemoved,
    DeviceSeen,
    DevicesScanned,
    Event,
    HypervisorChanged,
    MachineRead,
    MachinesListed,
)
from hostpassd.model.job import Job
from hostpassd.model.machine import Claim, Machine, MachineKey, PciSource, Ports
from hostpassd.passthrough.assign import Assign
from hostpassd.passthrough.dismiss import Dismiss
from hostpassd.passthrough.request import Request
from hostpassd.state import State

URI = "qemu:///system"
UUID = "11111111-2222-3333-4444-555555555555"
OTHER = "99999999-2222-3333-4444-555555555555"
KEY = MachineKey(URI, UUID)


REQUESTS: dict[str, type[Request]] = {"assign": Assign, "dismiss": Dismiss}


def error_name(job: Job) -> str:
    """The whole name of the error that JOB ended with, '' for none."""
    return names.error_name(job.error) if job.error else ""


def pci(
    address: str,
    parent: Device | None = None,
    *,
    driver: str = "e1000e",
    code: int = 0x020000,
    group: int = -1,
    header: int = 0,
    physical: Device | None = None,
    **facts: object,
) -> Device:
    """A PCI function; in a group of its own number unless GROUP says otherwise."""
    own = Pci(
        address=address,
        class_code=code,
        class_name="",
        vendor_id=0x8086,
        device_id=0x10D3,
        subsystem_vendor_id=0,
        subsystem_device_id=0,
        revision=0,
        header_type=header,
        iommu_group=group,
        numa_node=-1,
        reset_methods=(),
        boot_display=False,
        physical_function=physical.name if physical else None,
        max_virtual_functions=0,
        off_bus=False,
    )
    own = dataclasses.replace(own, **facts)  # type: ignore[arg-type]
    return _device("pci", address, parent, own, driver=driver, label=address)


def bridge(address: str, parent: Device | None = None, group: int = 0) -> Device:
    """A PCI bridge on pcieport."""
    return pci(address, parent, driver="pcieport", code=0x060400, group=group, header=1)


def usb(
    port: str,
    parent: Device | None = None,
    *,
    number: int = 2,
    vendor: int = 0x46F4,
    product: int = 0x0001,
    device_class: int = 0,
    serial: str = "",
) -> Device:
    """A USB device on bus 1."""
    own = Usb(1, number, port, vendor, product, device_class, 480, ("08:06:50",))
    return _device("usb", port, parent, own, driver="usb", label=f"stick {serial or port}", serial=serial)


def scsi(host: int, channel: int, target: int, lun: int, parent: Device | None = None) -> Device:
    """A SCSI disk."""
    return _device(
        "scsi", f"{host}:{channel}:{target}:{lun}", parent, Scsi(host, channel, target, lun, "disk", ""), driver="sd"
    )


def block(name: str, parent: Device) -> Device:
    """A whole disk."""
    return _device("block", name, parent, Block(f"/dev/{name}", 1 << 30), nodes=(f"/dev/{name}",))


def net(name: str, parent: Device) -> Device:
    """A network interface."""
    return _device("net", name, parent, Net(name, "52:54:00:00:00:01"))


def keyboard(name: str, parent: Device, seat: str = "seat0") -> Device:
    """The input device of a keyboard."""
    return _device("input", name, parent, Input(seat))


def mdev(uuid: str, parent: Device) -> Device:
    """A mediated device of PARENT."""
    device = _device("mdev", uuid, parent, Mdev(uuid, "sim-1"))
    return dataclasses.replace(device, name=device_name("mdev", uuid, parent.sysfs_path.rpartition("/")[2]))


def _device(
    kind: str,
    kernel: str,
    parent: Device | None,
    facts: Pci | Usb | Scsi | Block | Net | Input | Mdev,
    *,
    driver: str = "",
    label: str = "",
    serial: str = "",
    nodes: tuple[str, ...] = (),
) -> Device:
    path = f"{parent.sysfs_path if parent else '/sys/devices/pci0000:00'}/{kernel}"
    name = device_name(kind, kernel)
    parent_name = parent.name if parent else None
    return Device(name, kind, path, parent_name, nodes, driver, label or kernel, serial=serial, facts=(facts,))


def state_of(*devices: Device) -> State:
    """A state with these devices, parents first."""
    state = State()
    state.apply(DevicesScanned(devices))
    return state


def hostdev(device: Device, alias: str = "hostdev0", *, config: bool = False) -> Claim:
    """The claim that a <hostdev> of DEVICE makes in the live half, or in the stored one."""
    from hostpassd.machines.domain_xml import hostdev_xml

    return claim_of(hostdev_xml(device, alias=alias, config=config, unique=True))


_PORTS = Ports((1, 2, 3, 4, 5), tuple((6, slot) for slot in range(1, 32)))


def machine(
    name: str = "vm",
    uuid: str = UUID,
    *,
    running: bool = True,
    persistent: bool = True,
    live: tuple[Claim, ...] = (),
    config: tuple[Claim, ...] = (),
    uri: str = URI,
) -> Machine:
    """A machine of the hypervisor URI."""
    state = "running" if running else "shut off"
    return Machine(
        uuid, name, uri, state, persistent, live, config, ports=_PORTS if running else Ports(), config_ports=_PORTS
    )


class Stuck:
    """A call that does not return."""

    def __init__(self, about: str, lock: str, effect: Callable[[], None]) -> None:
        self.about, self.lock, self.effect = about, lock, effect
        self.given_up = False
        self.returned: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self, error: errors.HostpassError | None) -> None:
        """It returns; nobody needs to wait for it any more."""
        if error:
            self.returned.set_exception(error)
            self.returned.exception()
        else:
            self.returned.set_result(None)


class Libvirt:
    """A hypervisor on a STATE's devices that does what LAB-like runs of libvirt and VFIO showed.

    A managed device goes to vfio-pci as it is attached; an attach while a group member is on a host driver fails; a
    node device that was detached stays on vfio-pci until it is re-attached; a host driver cannot bind while a group
    member is in a machine. It has its own truth, and tells it as events while the connection is there.

    `before` and `after` are called with each call's name, around its effect. `refuse`: libvirt's words, by call;
    `fail`: whether a call is refused; `hang`: whether a call is taken, and its effect comes later, when something waits
    for it; `stick`: whether a call does not return until `let_go`. `withhold` swallows DeviceAdded, `stubborn` is a
    deaf guest.
    """

    def __init__(self, state: State, emit: Callable[[Event], None], *machines: Machine, uri: str = URI) -> None:
        self.state = state  # of it only the devices, which are the host's own truth
        self.emit = emit
        self.uri = uri
        self.machines = {m.uuid: m for m in machines}
        self.connected = True
        self.home = {d.name: d.driver for d in state.devices.values()}
        self.detached: set[str] = set()
        self.asked: set[str] = set()
        self.calls: list[str] = []
        self.refuse: dict[str, str] = {}
        self.fail: Callable[[str], bool] = lambda call: False
        self.hang: Callable[[str], bool] = lambda call: False
        self.stick: Callable[[str], bool] = lambda call: False
        self.before: Callable[[str], None] = lambda call: None
        self.after: Callable[[str], None] = lambda call: None
        self.withhold = False
        self.stubborn = False
        self.ports = 5
        self._hanging: list[tuple[str, Callable[[], None]]] = []
        self.stuck: list[Stuck] = []
        self.come_back()

    # The connection.

    def lose(self) -> None:
        """The connection is lost: nothing is told any more. libvirt is still at what it was at."""
        self.connected = False
        for call in self.stuck:
            self._hanging.append((call.lock, call.effect))
            call.end(errors.HypervisorUnavailable("the connection to libvirt was lost"))
        self.stuck.clear()
        self.emit(HypervisorChanged(self.uri, False, "libvirt has closed the connection"))

    def come_back(self) -> None:
        """It is there again, and all machines are listed."""
        self.connected = True
        self.emit(HypervisorChanged(self.uri, True))
        self.emit(MachinesListed(self.uri, tuple(self.machines.values())))

    def calm(self) -> None:
        """From here on every call works."""
        self.refuse, self.fail, self.hang = {}, lambda call: False, lambda call: False
        self.stick = lambda call: False
        self.before, self.after = lambda call: None, lambda call: None

    def finish(self, *locks: str) -> None:
        """The calls that hang at these locks (none given: all) come to their end."""
        for lock, effect in list(self._hanging):
            if not locks or lock in locks:
                self._hanging.remove((lock, effect))
                with contextlib.suppress(errors.HostpassError):
                    effect()

    def let_go(self, outcome: str) -> None:
        """The calls that are stuck return: done, refused, or both, done and then refused."""
        stuck, self.stuck = self.stuck, []
        for call in stuck:
            error = errors.HypervisorRefused("libvirt refused: it was stuck.") if outcome != "done" else None
            if outcome != "refused":
                with contextlib.suppress(errors.HostpassError):
                    call.effect()
            call.end(error)

    # What the daemon calls.

    async def attach_live(self, uuid: str, xml: str) -> None:
        await self._call("attach_live", uuid, lambda: self._attach_live(uuid, claim_of(xml)))

    async def attach_config(self, uuid: str, xml: str) -> None:
        await self._call("attach_config", uuid, lambda: self.store(uuid, claim_of(xml)))

    async def detach_live(self, uuid: str, alias: str) -> None:
        await self._call("detach_live", uuid, lambda: self._detach_live(uuid, alias))

    async def detach_config(self, uuid: str, claim: Claim) -> None:
        await self._call("detach_config", uuid, lambda: self._detach_config(uuid, claim))

    async def detach_host(self, name: str) -> None:
        await self._call("detach_host", "host", lambda: self._detach_host(name), name)

    async def reattach_host(self, name: str) -> None:
        await self._call("reattach_host", "host", lambda: self._reattach_host(name), name)

    async def wait_until_returned(self, names: Collection[str]) -> None:
        while stuck := [call.returned for call in self.stuck if call.about in names]:
            await asyncio.wait(stuck)

    async def wait_until_idle(self, uuid: str) -> None:
        await self._call("wait_until_idle", uuid, lambda: self._read(uuid))

    # What others do.

    def guest_releases(self, uuid: str, alias: str) -> None:
        """The guest lets a device go."""
        self.asked.discard(alias)
        machine = self.machines[uuid]
        gone = [c for c in machine.live if c.alias == alias]
        self.put(dataclasses.replace(machine, live=tuple(c for c in machine.live if c.alias != alias)))
        for claim in gone:
            device = self._device(claim)
            if device.pci and device.name not in self.detached:
                self.bind(device.name, "" if self._owned(device.name) else self.home[device.name])
        self._tell(DeviceRemoved(MachineKey(self.uri, uuid), alias))

    def destroy(self, uuid: str) -> None:
        """The machine is powered off."""
        for claim in self.machines[uuid].live:
            self.guest_releases(uuid, claim.alias)
        self.put(dataclasses.replace(self.machines[uuid], state="shut off", live=()))

    # Effects.

    def _attach_live(self, uuid: str, claim: Claim) -> None:
        machine, device = self.machines[uuid], self._device(claim)
        if device.pci:
            self._check_group(device)
            if sum(isinstance(c.source, PciSource) for c in machine.live) >= self.ports:
                raise errors.NoFreePort("No more available PCI slots")
            self.bind(device.name, "vfio-pci")
        self.put(dataclasses.replace(machine, live=(*machine.live, claim)))
        if not self.withhold:
            self._tell(DeviceAdded(MachineKey(self.uri, uuid), claim.alias))

    def store(self, uuid: str, claim: Claim) -> None:
        machine = self.machines[uuid]
        if any(c.id == claim.id for c in machine.config):
            raise errors.AlreadyAssigned("device is already in the domain configuration")
        self.put(dataclasses.replace(machine, config=(*machine.config, claim)))

    def _detach_live(self, uuid: str, alias: str) -> None:
        if all(c.alias != alias for c in self.machines[uuid].live):
            raise errors.NotAssigned(f"no device {alias}")
        if alias in self.asked:
            raise errors.UnplugPending(f"libvirt refused: Device {alias} is already in the process of unplug.")
        if self.stubborn:
            self.asked.add(alias)
        else:
            self.guest_releases(uuid, alias)

    def _detach_config(self, uuid: str, claim: Claim) -> None:
        machine = self.machines[uuid]
        self.put(
            dataclasses.replace(
                machine, config=tuple(c for c in machine.config if (c.id, c.alias) != (claim.id, claim.alias))
            )
        )

    def _detach_host(self, name: str) -> None:
        self.detached.add(name)
        self.bind(name, "vfio-pci")

    def _reattach_host(self, name: str) -> None:
        self.detached.discard(name)
        self.bind(name, "" if self._owned(name) else self.home[name])

    def _read(self, uuid: str) -> None:
        if uuid not in self.machines:
            raise errors.NoSuchMachine("no domain with matching uuid")
        self._tell(MachineRead(self.machines[uuid]))

    # How a call goes.

    async def _call(self, call: str, lock: str, effect: Callable[[], None], about: str = "") -> None:
        """LOCK: what libvirt takes for the call, a machine's job or the list of host devices. ABOUT: a node device."""
        if not self.connected:
            raise errors.HypervisorUnavailable("libvirt is not connected")
        self.finish(lock)
        self.calls.append(call)
        if self.hang(call):
            self._hanging.append((lock, effect))
        if self.stick(call):
            stuck = Stuck(about or lock, lock, effect)
            self.stuck.append(stuck)
            try:
                await asyncio.wait({stuck.returned})
            except asyncio.CancelledError:
                stuck.given_up = True
                raise
            return stuck.returned.result()
        self.before(call)
        self._check_connected()
        if call in self.refuse or self.fail(call):
            raise errors.HypervisorRefused(f"libvirt refused: {self.refuse.get(call, call + ' was told to fail')}.")
        effect()
        self.after(call)
        await asyncio.sleep(0)  # as every real call does, it lets others go first
        self._check_connected()

    def _check_connected(self) -> None:
        if not self.connected:
            raise errors.HypervisorUnavailable("the connection to libvirt was lost")

    def put(self, machine: Machine) -> None:
        self.machines[machine.uuid] = machine
        self._tell(MachineRead(machine))

    def _tell(self, event: Event) -> None:
        if self.connected:
            self.emit(event)

    def _device(self, claim: Claim) -> Device:
        return self.state.devices[self.state.keyed(claim.source.lookup_keys()[0])[0]]

    def _mates(self, name: str) -> list[str]:
        device = self.state.devices[name]
        return [n for n in self.state.group(device.pci.iommu_group) if n != name] if device.pci else []

    def _owned(self, name: str) -> bool:
        held = {self._device(claim).name for machine in self.machines.values() for claim in machine.live}
        return not held.isdisjoint(self._mates(name))

    def _check_group(self, device: Device) -> None:
        for mate in self._mates(device.name):
            other = self.state.devices[mate]
            if other.driver not in ("", "vfio-pci", "pcieport"):
                raise errors.HypervisorRefused(f"group {device.pci.iommu_group if device.pci else 0} is not viable")

    def bind(self, name: str, driver: str) -> None:
        self.emit(DeviceSeen(dataclasses.replace(self.state.devices[name], driver=driver)))
