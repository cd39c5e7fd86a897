"""State -> the objects and properties that dbus/*.xml declares; changes -> batches of signals."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from hostpassd import __version__, names
from hostpassd.bus.router import Batch, Interfaces, Router, Signal, Variant
from hostpassd.events import Job
from hostpassd.host.device import Block, Device, Facts, Input, Mdev, MdevParent, Net, Pci, Scsi, Usb, UsbInterface
from hostpassd.machines.machine import Hold, Machine, Missing
from hostpassd.passthrough import eligibility
from hostpassd.passthrough.plan import Options, Plan
from hostpassd.state import MANAGER, Changes, Entity, State

Properties = dict[str, Any]


def path_of(entity: Entity) -> str:
    """The object path of an entity."""
    kind, key = entity
    match kind:
        case "device":
            return names.device_path(key)
        case "machine":
            return names.machine_path(key)
        case "job":
            return names.job_path(int(key))
    return names.ROOT


def interfaces_of(state: State, entity: Entity) -> Interfaces:
    """The interfaces of an entity with all their properties, as they are now."""
    kind, key = entity
    match kind:
        case "device":
            return device_interfaces(state, state.devices[key])
        case "machine":
            return {names.MACHINE: machine_properties(state, state.machines[key])}
        case "job":
            return {names.JOB: job_properties(state.jobs[int(key)])}
    raise KeyError(entity)


def device_interfaces(state: State, device: Device) -> Interfaces:
    """Device and those of its sub-interfaces that apply."""
    blockers = eligibility.blockers(state, device)
    parent = device.parent if device.parent in state.devices else None
    found: Interfaces = {
        names.DEVICE: {
            "Name": device.name,
            "Kind": device.kind,
            "SysfsPath": device.sysfs_path,
            "Instance": device.instance,
            "Parent": names.device_path(parent) if parent else "/",
            "Children": _paths(state.children(device.name)),
            "DeviceNodes": list(device.device_nodes),
            "Driver": device.driver,
            "Label": device.label,
            "Vendor": device.vendor,
            "Product": device.product,
            "Serial": device.serial,
            "Assignable": not blockers,
            "Blockers": [[b.code, b.severity, b.message] for b in blockers],
            "Companions": _paths(eligibility.companions(state, device)),
            "Holders": [[names.machine_path(h.machine), hold_row(h)] for h in _sorted(state.holds_on(device.name))],
            "HostUses": [[use.kind, use.detail] for use in state.uses_of(device.name)],
        }
    }
    for facts in device.facts:
        shown = _facts(state, device, facts)
        found |= [shown] if shown else []
    return found


def _facts(state: State, device: Device, facts: Facts) -> tuple[str, Properties] | None:
    """The interface of FACTS and its properties; None: they show in none."""
    match facts:
        case Pci():
            return names.DEVICE_PCI, _pci(state, device, facts)
        case Usb():
            return names.DEVICE_USB, _usb(facts)
        case Scsi(host, channel, target, lun, type_, wwid):
            rows = {"Host": host, "Channel": channel, "Target": target, "Lun": lun, "Type": type_, "Wwid": wwid}
            return names.DEVICE_SCSI, rows
        case Mdev(uuid, type_):
            return names.DEVICE_MDEV, {"Uuid": uuid, "Type": type_}
        case MdevParent(types):
            return names.DEVICE_MDEV_PARENT, {"Types": [list(row) for row in types]}
        case Net(interface, mac_address):
            return names.DEVICE_NET, {"Interface": interface, "MacAddress": mac_address}
        case Block(node, size):
            return names.DEVICE_BLOCK, {"Node": node, "Size": size}
        case Input() | UsbInterface():
            return None


def _pci(state: State, device: Device, pci: Pci) -> Properties:
    function = pci.physical_function
    return {
        "Address": pci.address,
        "Class": pci.class_code,
        "ClassName": pci.class_name,
        "VendorId": pci.vendor_id,
        "DeviceId": pci.device_id,
        "SubsystemVendorId": pci.subsystem_vendor_id,
        "SubsystemDeviceId": pci.subsystem_device_id,
        "Revision": pci.revision,
        "IommuGroup": pci.iommu_group,
        "NumaNode": pci.numa_node,
        "ResetMethods": list(pci.reset_methods),
        "BootDisplay": pci.boot_display,
        "PhysicalFunction": names.device_path(function) if function in state.devices and function else "/",
        "VirtualFunctions": _paths(sorted(state.virtual_functions(device.name))),
        "MaxVirtualFunctions": pci.max_virtual_functions,
    }


def _usb(usb: Usb) -> Properties:
    return {
        "Bus": usb.bus,
        "Number": usb.number,
        "Port": usb.port,
        "VendorId": usb.vendor_id,
        "ProductId": usb.product_id,
        "Class": usb.device_class,
        "Speed": usb.speed,
        "Interfaces": list(usb.interfaces),
    }


def hold_row(hold: Hold) -> dict[str, Variant]:
    """A hold as it goes over the bus."""
    return {
        "kind": Variant("s", hold.kind),
        "live": Variant("b", hold.live),
        "config": Variant("b", hold.config),
        "alias": Variant("s", hold.alias),
        "releasing": Variant("b", hold.releasing),
        "stale": Variant("b", hold.stale),
    }


def machine_properties(state: State, machine: Machine) -> Properties:
    """The properties of a machine."""
    return {
        "Name": machine.name,
        "Uuid": machine.uuid,
        "Uri": machine.uri,
        "State": machine.state,
        "Persistent": machine.persistent,
        "Devices": [[names.device_path(h.device), hold_row(h)] for h in _sorted(state.holds_of(machine.uuid))],
        "Missing": [missing_row(row) for row in state.missing.get(machine.uuid, ())],
    }


def missing_row(row: Missing) -> dict[str, Variant]:
    """A claim on something that is not here, as it goes over the bus."""
    return {
        "id": Variant("s", row.id),
        "source": Variant("s", row.source),
        "live": Variant("b", row.live),
        "config": Variant("b", row.config),
        "alias": Variant("s", row.alias),
    }


def plan_row(plan: Plan, options: Options, authorization: str) -> dict[str, Variant]:
    """A plan as it goes over the bus."""
    blockers = [[names.device_path(b.device), b.code, b.severity, b.message] for b in plan.blockers]
    return {
        "token": Variant("s", plan.token),
        "possible": Variant("b", not plan.refused(options.override)),
        "devices": Variant("ao", [names.device_path(_path_element(name)) for name in plan.devices]),
        "blockers": Variant("a(osss)", blockers),
        "loses": Variant("ao", _paths(plan.loses)),
        "steps": Variant("as", [step.text for step in plan.steps]),
        "consequences": Variant("as", list(plan.consequences)),
        "authorization": Variant("s", authorization),
    }


def job_properties(job: Job) -> Properties:
    """The properties of a job."""
    return {
        "Operation": job.operation,
        "Machine": names.machine_path(job.machine),
        "Device": names.device_path(_path_element(job.device)),
        "StartedByUid": job.started_by_uid,
        "State": job.state,
        "Step": job.step,
        "Progress": job.progress,
        "ErrorName": job.error_name,
        "ErrorMessage": job.error_message,
    }


def _path_element(name: str) -> str:
    """NAME as an element of an object path: the id of a missing thing has characters that a path must not have."""
    return "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name)


def manager_properties(state: State, running: bool, generation: int) -> Properties:
    """The properties of the Manager."""
    word = "degraded" if state.degraded else "running"
    return {
        "Version": __version__,
        "State": word if running else "starting",
        "Hypervisors": [[h.uri, h.connected, h.error] for h in state.hypervisors.values()],
        "Generation": generation,
    }


def _paths(devices: Iterable[str]) -> list[str]:
    return [names.device_path(name) for name in devices]


def _sorted(holds: Iterable[Hold]) -> list[Hold]:
    return sorted(holds, key=lambda hold: (hold.device, hold.machine, hold.kind))


class Publisher:
    """Gathers changes and sends them as batches, each in the order that the design gives."""

    def __init__(self, state: State, router: Router) -> None:
        self._state = state
        self._router = router
        self._pending = Changes()
        self._scheduled: asyncio.Handle | None = None
        self.generation = 0
        self.running = False
        router.publish(Batch(added={names.ROOT: {names.MANAGER: self._manager()}}))

    def note(self, batches: Iterable[Changes]) -> None:
        """Takes changes in; they go out at the end of this turn of the loop, or with `flush`."""
        for changes in batches:
            if self._pending.reopens(changes):
                self.flush()
            self._pending.merge(changes)
        if self._pending and self._scheduled is None:
            self._scheduled = asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Sends what is pending, now: values before replies."""
        if self._scheduled:
            self._scheduled.cancel()
            self._scheduled = None
        changes, self._pending = self._pending, Changes()
        if changes:
            self.generation += 1
            try:
                self._router.publish(self._batch(changes))
            except Exception as error:
                # What was told and what is are apart from now on: for the loop's handler, whoever called.
                context = {"message": "a batch could not be published", "exception": error, "handle": None}
                asyncio.get_running_loop().call_exception_handler(context)
                raise

    def announce_running(self) -> None:
        """The daemon is ready: State is no longer starting."""
        self.running = True
        changes = Changes()
        changes.change(MANAGER)
        self.note([changes])

    def _batch(self, changes: Changes) -> Batch:
        return Batch(
            added={
                path_of(entity): interfaces_of(self._state, entity) for entity in changes.added if self._has(entity)
            },
            changed={path_of(entity): self._interfaces(entity) for entity in changes.changed if self._has(entity)},
            signals=list(self._signals(changes)),
            removed=[path_of(entity) for entity in changes.removed],
            last={names.ROOT: {names.MANAGER: {"Generation": self.generation}}},
        )

    def _interfaces(self, entity: Entity) -> Interfaces:
        if entity == MANAGER:
            return {names.MANAGER: {k: v for k, v in self._manager().items() if k != "Generation"}}
        found = interfaces_of(self._state, entity)
        if entity[0] == "device" and names.DEVICE_MDEV_PARENT not in found:
            # A driver that goes takes its mediated device types along.
            found[names.DEVICE_MDEV_PARENT] = None
        return found

    def _has(self, entity: Entity) -> bool:
        """A batch can close after what it changed has gone: then a later one removes it."""
        kind, key = entity
        where: Mapping[Any, Any] = self._state.devices if kind == "device" else self._state.machines
        return entity == MANAGER or (int(key) in self._state.jobs if kind == "job" else key in where)

    def _manager(self) -> Properties:
        return manager_properties(self._state, self.running, self.generation)

    def _signals(self, changes: Changes) -> Iterable[Signal]:
        for member, holds in (("HoldRemoved", changes.holds_removed), ("HoldAdded", changes.holds_added)):
            for hold in holds:
                body = [names.device_path(hold.device), names.machine_path(hold.machine), hold_row(hold)]
                yield Signal(names.ROOT, names.MANAGER, member, body)
        for job in changes.jobs_ended:
            yield Signal(
                names.job_path(job.number), names.JOB, "Completed", [job.state, job.error_name, job.error_message]
            )
