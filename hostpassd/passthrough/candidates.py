"""What a machine could be given: the list that an "add device" dialog shows. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from hostpassd import errors
from hostpassd.model.device import ASSIGNABLE_KINDS
from hostpassd.model.machine import Machine
from hostpassd.model.order import in_tree_order
from hostpassd.passthrough.assign import Assign
from hostpassd.passthrough.request import Options, Plan
from hostpassd.state import State

# Nobody looks for what these stop, for it can be had only by taking more than it, or never.
_UNLISTED = frozenset({"hub", "bridge", "not-leaf"})


def subjects(state: State) -> list[str]:
    """The devices that an operation could be about, hubs and bridges included, in tree order."""
    found = (d.name for d in state.devices.values() if d.kind in ASSIGNABLE_KINDS and state.target(d.name) == d.name)
    return in_tree_order(state, found)


def plans(state: State, machine: Machine, names: list[str], *, everything: bool) -> Iterator[Plan | None]:
    """The plan that hands each of the devices NAMES to MACHINE by itself; None of one that is not to be listed.

    Not listed is what the machine has in every half that the defaults ask for, what is gone by now, what moves with one
    before it, and, unless EVERYTHING is, what is a hub or a bridge or has others below it that can be assigned.
    """
    listed: set[frozenset[str]] = set()
    for name in names:
        plan = _plan(state, machine, name)
        moving = frozenset(plan.devices if plan else ())
        if not plan or moving in listed or (not everything and _is_unlisted(plan)):
            yield None
            continue
        listed.add(moving)
        yield plan


def _is_unlisted(plan: Plan) -> bool:
    """Whether the device of PLAN is stopped by what it is; what stops a companion is a reason to be told."""
    return any(b.device in plan.asked and b.code in _UNLISTED for b in plan.blockers)


def _plan(state: State, machine: Machine, name: str) -> Plan | None:
    try:
        return Assign(machine.uuid, (name,), Options(), 0).plan(state)
    except (errors.AlreadyAssigned, errors.NoSuchDevice):
        return None
