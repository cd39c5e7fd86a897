"""State -> the objects and properties that dbus/*.xml declares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hostpassd import __version__, names
from hostpassd.bus.router import Interfaces, Variant
from hostpassd.errors import Blocked
from hostpassd.model.codes import KEYS, NEVER, Blocker, Detail, Details, Fact
from hostpassd.model.device import Block, Device, Facts, Mdev, MdevParent, MdevType, Net, Pci, Scsi, Usb
from hostpassd.model.job import Job
from hostpassd.model.machine import Hold, Machine, Missing
from hostpassd.model.naming import identity_id, location, role
from hostpassd.model.order import in_tree_order
from hostpassd.passthrough.candidates import Candidate
from hostpassd.passthrough.request import Plan
from hostpassd.passthrough.steps import told
from hostpassd.state import Entity, HypervisorState, State, eligibility
from hostpassd.state.problems import problems

Properties = dict[str, Any]

# What this build does of what the interface provides for.
FEATURES = ("several", "candidates")


def path_of(entity: Entity) -> str:
    """The object path of an entity."""
    kind, key = entity
    return OBJECTS[kind].path(key)


def interfaces_of(state: State, entity: Entity) -> Interfaces | None:
    """The interfaces of an entity with all their properties, as they are now; None if it is not there."""
    kind, key = entity
    return OBJECTS[kind].interfaces(state, key)


def device_interfaces(state: State, device: Device) -> Interfaces:
    """Device and those of its sub-interfaces that apply."""
    blockers = eligibility.blockers(state, device)
    parent = device.parent if device.parent in state.devices else None
    owner = state.target(device.name)
    found: Interfaces = {
        names.DEVICE: {
            "Name": device.name,
            "Kind": device.kind,
            "Role": role(device, state.ancestors(device.name)),
            "Owner": names.device_path(owner) if owner else "/",
            "Id": identity_id(device),
            "SysfsPath": device.sysfs_path,
            "Instance": device.instance,
            "Parent": names.device_path(parent) if parent else "/",
            "Children": _paths(in_tree_order(state, state.children(device.name))),
            "DeviceNodes": list(device.device_nodes),
            "Driver": device.driver,
            "Label": device.label,
            "Location": location(device),
            "Category": state.category(device.name),
            "Vendor": device.vendor,
            "Product": device.product,
            "Serial": device.serial,
            "Assignable": not blockers,
            "Blockers": [reason_row(b) for b in blockers],
            "Companions": _paths(in_tree_order(state, eligibility.companions(state, device))),
            "Holders": [[names.machine_path(h.machine), hold_row(h)] for h in _sorted(state.holds_on(device.name))],
            "HostUses": [fact_row(fact) for fact in eligibility.host_uses(state, device)],
        },
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
        case Mdev(uuid, type_, api):
            return names.DEVICE_MDEV, {"Uuid": uuid, "Type": type_, "DeviceApi": api}
        case MdevParent(types):
            return names.DEVICE_MDEV_PARENT, {"Types": [[each.id, _mdev_type(each)] for each in types]}
        case Net(interface, mac_address):
            return names.DEVICE_NET, {"Interface": interface, "MacAddress": mac_address}
        case Block(node, size):
            return names.DEVICE_BLOCK, {"Node": node, "Size": size}
    return None


def _pci(state: State, device: Device, pci: Pci) -> Properties:
    function = pci.physical_function
    return {
        "Address": pci.address,
        "ClassCode": pci.class_code,
        "ClassName": pci.class_name,
        "VendorId": pci.vendor_id,
        "DeviceId": pci.device_id,
        "SubsystemVendorId": pci.subsystem_vendor_id,
        "SubsystemDeviceId": pci.subsystem_device_id,
        "Revision": pci.revision,
        "IommuGroup": pci.iommu_group,
        "NumaNode": pci.numa_node,
        "ResetMethods": list(pci.reset_methods),
        "PhysicalFunction": names.device_path(function) if function in state.devices and function else "/",
        "VirtualFunctions": _paths(in_tree_order(state, state.virtual_functions(device.name))),
        "MaxVirtualFunctions": pci.max_virtual_functions,
        "VfioDevice": pci.vfio_device,
    }


def _usb(usb: Usb) -> Properties:
    return {
        "BusNumber": usb.bus,
        "DeviceNumber": usb.number,
        "Port": usb.port,
        "VendorId": usb.vendor_id,
        "ProductId": usb.product_id,
        "DeviceClass": usb.device_class,
        "Speed": usb.speed,
        "Interfaces": list(usb.interfaces),
        "Socket": usb.socket,
    }


def _mdev_type(given: MdevType) -> dict[str, Variant]:
    return {
        "name": Variant("s", given.name),
        "available": Variant("u", given.available),
        "device-api": Variant("s", given.api),
        "description": Variant("s", given.description),
    }


# The keys of a hold's settings, and their types.
_SETTINGS = {
    "managed": "b",
    "startup-policy": "s",
    "driver": "s",
    "rom-bar": "b",
    "mac-address": "s",
    "vlan": "u",
    "boot-order": "u",
}


def hold_row(hold: Hold) -> dict[str, Variant]:
    """A hold as it goes over the bus. What its claims do not say is left out."""
    settings = {key: getattr(hold.settings, key.replace("-", "_")) for key in _SETTINGS}
    return {
        "kind": Variant("s", hold.kind),
        "live": Variant("b", hold.live),
        "config": Variant("b", hold.config),
        "alias": Variant("s", hold.alias),
        "releasing": Variant("b", hold.releasing),
        "stale": Variant("b", hold.stale),
        "trial": Variant("b", False),
        **({"guest-address": Variant("s", hold.guest_address)} if hold.guest_address else {}),
        **{key: Variant(_SETTINGS[key], value) for key, value in settings.items() if value is not None},
    }


def machine_properties(state: State, machine: Machine) -> Properties:
    """The properties of a machine."""
    holds = state.holds_of(machine.uuid)
    return {
        "Name": machine.name,
        "Title": machine.title,
        "Uuid": machine.uuid,
        "Uri": machine.uri,
        "State": machine.state.replace(" ", "-"),
        "Active": machine.active,
        "Persistent": machine.persistent,
        "Devices": [[names.device_path(h.device), hold_row(h)] for h in _in_tree_order(state, holds)],
        "Missing": [missing_row(row) for row in state.missing.get(machine.uuid, ())],
        "Warnings": [fact_row(fact) for fact in machine.warnings],
    }


def missing_row(row: Missing) -> dict[str, Variant]:
    """A claim that means no device here, as it goes over the bus. What is not known of it is left out."""
    known = {"label": row.look.label, "category": row.look.category, "location": row.look.location}
    return {
        "id": Variant("s", row.id),
        "source": Variant("s", row.source),
        "live": Variant("b", row.live),
        "config": Variant("b", row.config),
        "alias": Variant("s", row.alias),
        "kind": Variant("s", row.kind),
        **{key: Variant("s", text) for key, text in known.items() if text},
        **({"ambiguous": Variant("b", True)} if row.ambiguous else {}),
    }


def reason_row(blocker: Blocker) -> list[Any]:
    """A reason: device, code, severity, details, message."""
    path = names.device_path(blocker.device)
    return [path, blocker.code, blocker.severity, _details(blocker.details), blocker.message]


def _details(details: Details) -> dict[str, Variant]:
    return {key: _detail(key, value) for key, value in details}


def _detail(key: str, value: Detail) -> Variant:
    if key == "machine":
        return Variant("o", names.machine_path(str(value)))
    return Variant(KEYS[key], list(value) if isinstance(value, tuple) else value)


def fact_row(fact: Fact) -> list[Any]:
    """A fact: device or /, code, details, message."""
    path = names.device_path(_path_element(fact.device)) if fact.device else "/"
    return [path, fact.code, _details(fact.details), fact.message]


def plan_row(state: State, plan: Plan, authorization: str) -> dict[str, Variant]:
    """A plan as it goes over the bus. It has no steps where nobody can accept what blocks it."""
    steps = () if any(b.severity == NEVER for b in plan.blockers) else plan.steps
    return {
        "token": Variant("s", plan.token),
        "possible": Variant("b", not plan.refused),
        "devices": Variant("ao", [names.device_path(_path_element(name)) for name in plan.devices]),
        "blockers": Variant("a(ossa{sv}s)", [reason_row(b) for b in plan.blockers]),
        "loses": Variant("ao", _paths(plan.loses)),
        "steps": Variant("a(osa{sv}s)", [fact_row(told(state, step)) for step in steps]),
        "consequences": Variant("a(osa{sv}s)", [fact_row(fact) for fact in plan.consequences]),
        "authorization": Variant("s", authorization),
    }


def candidate_row(candidate: Candidate, authorization: str) -> list[Any]:
    """What a machine could be given, as it goes over the bus: the devices, whether, the reasons, more."""
    more = {"loses": Variant("ao", _paths(candidate.loses)), "authorization": Variant("s", authorization)}
    return [_paths(candidate.devices), candidate.possible, [reason_row(b) for b in candidate.blockers], more]


def job_properties(job: Job) -> Properties:
    """The properties of a job."""
    return {
        "Operation": job.operation,
        "Machine": names.machine_path(job.machine) if job.machine else "/",
        "Devices": [names.device_path(_path_element(name)) for name in job.devices],
        "StartedByUid": job.started_by_uid,
        "State": job.state,
        "Step": fact_row(job.step) if job.step else ["/", "", {}, ""],
        "StepNumber": job.step_number,
        "StepCount": job.step_count,
        "Deadline": job.deadline,
        "Error": error_row(job.error),
    }


def error_row(error: Exception | None) -> list[Any]:
    """An error as it goes over the bus: name, details, message; all empty for none."""
    return [names.error_name(error), _error_details(error), str(error)] if error else ["", {}, ""]


def _error_details(error: Exception) -> dict[str, Variant]:
    if not isinstance(error, Blocked):
        return {}
    return {"blockers": Variant("a(ossa{sv}s)", [reason_row(b) for b in error.blockers])}


def _path_element(name: str) -> str:
    """NAME as an element of an object path: the id of a missing thing has characters that a path must not have."""
    return "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name)


def manager_properties(state: State, running: bool) -> Properties:
    """The properties of the Manager, but for those that are of the batches that were told."""
    word = "degraded" if state.degraded else "running"
    return {
        "Version": __version__,
        "Features": list(FEATURES),
        "State": word if running else "starting",
        "Problems": [fact_row(problem) for problem in problems(state)],
        "Hypervisors": [_hypervisor_row(hypervisor) for hypervisor in state.hypervisors.values()],
    }


def _hypervisor_row(hypervisor: HypervisorState) -> list[Any]:
    details = {"error": Variant("s", hypervisor.error)} if hypervisor.error else {}
    return [hypervisor.uri, hypervisor.connected, details]


def _paths(devices: Iterable[str]) -> list[str]:
    return [names.device_path(name) for name in devices]


def _in_tree_order(state: State, holds: Iterable[Hold]) -> list[Hold]:
    held: dict[str, list[Hold]] = {}
    for hold in _sorted(holds):
        held.setdefault(hold.device, []).append(hold)
    return [hold for name in in_tree_order(state, held) for hold in held[name]]


def _sorted(holds: Iterable[Hold]) -> list[Hold]:
    return sorted(holds, key=lambda hold: (hold.device, hold.machine, hold.kind))


@dataclasses.dataclass(frozen=True, slots=True)
class ObjectType:
    """One kind of object.

    `path`: of the object with this key. `interfaces`: with all their values, None if there is no such object now.
    `passing`: the interfaces that an object can lose while it stays.
    """

    path: Callable[[str], str]
    interfaces: Callable[[State, str], Interfaces | None]
    passing: tuple[str, ...] = ()


def _device(state: State, name: str) -> Interfaces | None:
    device = state.device(name)
    return device_interfaces(state, device) if device else None


def _machine(state: State, uuid: str) -> Interfaces | None:
    machine = state.machines.get(uuid)
    return {names.MACHINE: machine_properties(state, machine)} if machine else None


def _job(state: State, number: str) -> Interfaces | None:
    job = state.jobs.get(int(number))
    return {names.JOB: job_properties(job)} if job else None


# By the kind of entity. A new kind of object is one row here and its interface in dbus/org.hostpassd1.xml.
OBJECTS: Mapping[str, ObjectType] = {
    # A driver that goes takes its mediated device types along.
    "device": ObjectType(names.device_path, _device, passing=(names.DEVICE_MDEV_PARENT,)),
    "machine": ObjectType(names.machine_path, _machine),
    "job": ObjectType(lambda number: names.job_path(int(number)), _job),
}
