"""What a machine could be given: the list that an "add device" dialog shows. Pure.

There can be thousands of devices, so each part of it is made in steps, between which the state may change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from hostpassd import errors
from hostpassd.model.codes import Blocker
from hostpassd.model.device import ASSIGNABLE_KINDS
from hostpassd.model.machine import Machine
from hostpassd.model.order import Key, tree_key
from hostpassd.passthrough.assign import Assign
from hostpassd.passthrough.permission import Check, checks
from hostpassd.passthrough.request import Options, Plan
from hostpassd.state import State

# Nobody looks for what these stop, for it can be had only by taking more than it, or never.
_UNLISTED = frozenset({"hub", "bridge", "not-leaf"})


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """What a machine could be given as one: of its plan only what is told, for there can be thousands."""

    devices: tuple[str, ...]  # the one that it is about first
    possible: bool
    blockers: tuple[Blocker, ...]
    loses: tuple[str, ...]
    checks: Sequence[Check]  # what the caller has to be authorised for


def ranks(state: State) -> Iterator[tuple[Key, str] | None]:
    """A step for each device: its place in tree order if an operation could be about it, hubs and bridges included."""
    for name in list(state.devices):
        device = state.device(name)
        is_subject = device and device.kind in ASSIGNABLE_KINDS and state.target(name) == name
        yield (tree_key(state, name), name) if is_subject else None


def candidates(state: State, machine: Machine, names: Iterable[str], *, everything: bool) -> Iterator[Candidate | None]:
    """A step for each of the devices NAMES: what a plan hands to MACHINE with it; None if it is not listed.

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
        devices = tuple(dict.fromkeys((*plan.asked, *plan.devices)))
        yield Candidate(devices, not plan.refused, plan.blockers, plan.loses, checks(state, plan))


def _is_unlisted(plan: Plan) -> bool:
    """Whether the device of PLAN is stopped by what it is; what stops a companion is a reason to be told."""
    return any(b.device in plan.asked and b.code in _UNLISTED for b in plan.blockers)


def _plan(state: State, machine: Machine, name: str) -> Plan | None:
    try:
        return Assign(machine.uuid, (name,), Options(), 0).plan(state)
    except (errors.AlreadyAssigned, errors.NoSuchDevice):
        return None
