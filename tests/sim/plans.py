"""A host whose plans are looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hostpassd.model.device import Device
from hostpassd.model.events import MachineRead
from hostpassd.model.machine import Machine, Ports
from hostpassd.passthrough.assign import Assign
from hostpassd.passthrough.dismiss import Dismiss
from hostpassd.passthrough.request import Options, Plan
from hostpassd.state import State
from tests.sim.world import bridge, machine, pci, scsi, state_of, usb

PORT = bridge("0000:00:01.0", group=1)
NIC = pci("0000:01:00.0", PORT, group=2)
STICK = usb("1-1", number=3)
PAIR = (pci("0000:04:01.0", group=5), pci("0000:04:02.0", group=5, driver="snd", code=0x040100))
LUN = scsi(2, 0, 1, 0)


def world(*machines: Machine) -> State:
    state = state_of(PORT, NIC, STICK, *PAIR, LUN)
    for m in machines:
        state.apply(MachineRead(m))
    return state


def assign(state: State, device: Device, options: Options | None = None) -> Plan:
    return assign_all(state, [device.name], options)


def assign_all(state: State, devices: Sequence[str], options: Options | None = None) -> Plan:
    return Assign("vm", tuple(devices), options or Options(), 0).plan(state)


def dismiss(state: State, device: str, options: Options | None = None) -> Plan:
    return dismiss_all(state, [device], options)


def dismiss_all(state: State, devices: Sequence[str], options: Options | None = None) -> Plan:
    return Dismiss(machine().uuid, tuple(devices), options or Options(), 0).plan(state)


def accepting(*codes: str) -> Options:
    return Options(override=frozenset(codes))


def kinds(plan: Plan) -> list[str]:
    return [f"{type(step).__name__} {step.device}" for step in plan.steps]


CARD = tuple(
    pci(f"0000:0a:00.{n}", group=9, driver=driver, code=code, express=True)
    for n, driver, code in ((0, "nouveau", 0x030000), (1, "snd", 0x040300), (2, "xhci_hcd", 0x0C0330))
)


def with_ports(*devices: Device, ports: Ports, running: bool = False) -> State:
    state = state_of(*devices)
    state.apply(MachineRead(dataclasses.replace(machine(running=running), config_ports=ports)))
    return state
