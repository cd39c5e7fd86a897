"""What polkit is asked about a plan, and which later plans its answer still covers. Pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence

from hostpassd.model.codes import Blocker
from hostpassd.model.machine import MachineKey
from hostpassd.passthrough.request import Plan
from hostpassd.passthrough.steps import Attach
from hostpassd.state import State
from hostpassd.state.eligibility import mates

# An action, and what polkit, its rules and its prompts are told of one device that it is about.
Check = tuple[str, Mapping[str, str]]

# Asks about all devices of a plan; raises NotAuthorized and its kin.
Authorise = Callable[[Sequence[Check]], Awaitable[None]]

# Of what polkit is told, what no permission rests on: how things stand at present. What there is to say of the
# companions, of a machine that runs or not, and of what was overridden, a Permission says more exactly.
_PRESENT = frozenset({"device.driver", "device.companions", "machine.state", "override"})


@dataclasses.dataclass(frozen=True, slots=True)
class Permission:
    """What a caller is authorised for: these devices, to or from this machine, past these blockers."""

    machine: MachineKey | None
    devices: frozenset[tuple[str, int, frozenset[tuple[str, str]]]]  # name, instance, what else it was authorised by
    attaches: bool  # whether something comes into the running machine: who asked for that is not served without it
    asks_guest: bool  # whether something is taken out of it, which the guest may have let go of by itself meanwhile
    overridden: frozenset[Blocker]

    def covers(self, other: Permission) -> bool:
        """Whether whoever has this may do what OTHER is for: the same, or less."""
        past = all(any(each.is_within(known) for known in self.overridden) for each in other.overridden)
        within = other.devices <= self.devices and past
        same = (other.machine, other.attaches) == (self.machine, self.attaches)
        return within and same and other.asks_guest <= self.asks_guest


def permission(state: State, plan: Plan) -> Permission:
    """The permission that PLAN takes, as things are now."""
    rows = [details(state, plan, name, ()) for name in plan.devices]
    counts = [frozenset((key, value) for key, value in row.items() if key not in _PRESENT) for row in rows]
    return Permission(
        plan.machine,
        frozenset(zip(plan.devices, plan.instances, counts, strict=True)),
        any(isinstance(step, Attach) for step in plan.steps),
        any(step.asks_guest for step in plan.steps),
        frozenset(plan.overridden),
    )


def checks(state: State, plan: Plan) -> list[Check]:
    """What each device of PLAN is to be authorised for, by itself."""
    return [
        (plan.request.action(bool(past)), details(state, plan, name, past))
        for name, past in _overridden(state, plan).items()
    ]


def _overridden(state: State, plan: Plan) -> dict[str, list[Blocker]]:
    """The blockers that the caller goes past, by the device of PLAN that is, or is above, what they name."""
    found: dict[str, list[Blocker]] = {name: [] for name in (*plan.asked, *plan.devices)}
    for blocker in plan.overridden:
        line = (blocker.device, *(above.name for above in state.ancestors(blocker.device)))
        found[next((name for name in line if name in found), plan.asked[0])].append(blocker)
    return found


def details(state: State, plan: Plan, name: str, overridden: Sequence[Blocker]) -> dict[str, str]:
    """What polkit, its rules and its prompt are told of the device NAME of PLAN, past the blockers OVERRIDDEN."""
    machine = state.copies[plan.machine] if plan.machine else None
    device = state.device(name)
    if device and (name, device.instance) not in zip(plan.devices, plan.instances, strict=True):
        device = None  # another one, where something that is missing was last
    ids = [f"{number:04x}" for number in (device and device.ids) or ()] or ["", ""]
    return {
        "device.name": _one_word(name),
        "device.kind": device.kind if device else "",
        "device.label": device.label if device else name,
        "device.vendor-id": ids[0],
        "device.product-id": ids[1],
        "device.serial": device.serial if device else "",
        "device.driver": device.driver if device else "",
        "device.companions": " ".join(_companions(state, plan, name)),
        "machine.name": machine.name if machine else "",
        "machine.uuid": machine.uuid if machine else "",
        "machine.state": machine.state if machine else "",
        "operation": plan.operation,
        "override": " ".join(sorted({blocker.code for blocker in overridden})),
    }


def _companions(state: State, plan: Plan, name: str) -> list[str]:
    """Of the devices that PLAN moves, those that move because NAME does, or the other way round."""
    if len(plan.asked) == 1:
        return [other for other in plan.devices if other != name]
    device = state.device(name)
    beside = {mate.name for mate in mates(state, device)} if device else set()
    return [other for other in plan.devices if other in beside]


def _one_word(name: str) -> str:
    """NAME as one word: the id of a missing thing is a claim of whoever wrote the machine's configuration."""
    return re.sub(r"[^!-~]", "\N{REPLACEMENT CHARACTER}", name)
