"""Requests and plans. A request is a value that knows how to plan itself and which polkit action it needs.

A new operation is one class here or in a file of its own (see assign.py, dismiss.py), the steps that it is made of
(steps.py), and a row each in the interface, its policy and the table of methods. It need not be about a machine.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from typing import ClassVar

from hostpassd import errors
from hostpassd.model.codes import NEVER, Blocker, Fact
from hostpassd.model.machine import MachineKey
from hostpassd.passthrough.steps import Step
from hostpassd.state import State


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What a caller asks for. None: the default for this machine and device."""

    live: bool | None = None
    config: bool | None = None
    instance: int | None = None
    timeout: int = 20  # seconds, for the whole job
    wait: bool = True
    guest_address: str = ""
    rom_bar: bool | None = None
    rom_file: str | None = None  # the path of a file that may be one
    driver: str | None = None  # a VFIO variant driver
    startup_policy: str | None = None  # of STARTUP_POLICIES
    boot_order: int | None = None  # from 1 on
    override: frozenset[str] = frozenset()  # codes of blockers that the caller accepts
    plan: str = ""  # the token of the plan that this must still be

    @property
    def given(self) -> frozenset[str]:
        """The names, as callers write them, of those that are not as they are by themselves."""
        fields = dataclasses.fields(self)
        return frozenset(f.name.replace("_", "-") for f in fields if getattr(self, f.name) != f.default)


@dataclasses.dataclass(frozen=True, slots=True)
class Request(abc.ABC):
    """An operation as the caller asked for it: devices and machine are unresolved texts."""

    machine: str  # '': it is about no machine
    devices: tuple[str, ...]
    options: Options
    uid: int  # the caller's

    operation: ClassVar[str]  # the word for it: in the interface, the intent log, the audit log

    @abc.abstractmethod
    def plan(self, state: State) -> Plan:
        """Resolves the texts and plans the operation on STATE; blockers are in the plan. Raises what else is wrong."""

    @abc.abstractmethod
    def action(self, overridden: bool) -> str:
        """The polkit action that each device needs; OVERRIDDEN: the caller overrides blockers of that device."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """One operation: what moves, and the steps in order. Nothing is decided after it is made."""

    request: Request = dataclasses.field(repr=False, compare=False)
    machine: MachineKey | None
    asked: tuple[str, ...]  # the devices that were asked for, in tree order (of a missing one: where it was last)
    devices: tuple[str, ...]  # all that move, in tree order
    instances: tuple[int, ...]  # of `devices`, to see a replug between prompt and execution
    steps: tuple[Step, ...]
    locks: tuple[str, ...]  # two plans that share one never run together; sorted
    blockers: tuple[Blocker, ...] = ()  # without the machine's own holds
    loses: tuple[str, ...] = ()  # the functions that the host loses
    consequences: tuple[Fact, ...] = ()

    @property
    def operation(self) -> str:
        """The request's."""
        return self.request.operation

    @property
    def token(self) -> str:
        """Names this very plan: another one whenever anything that it rests on is another."""
        return hashlib.sha256(f"{self.operation} {self!r}".encode()).hexdigest()[:32]

    @property
    def refused(self) -> tuple[Blocker, ...]:
        """The blockers that its caller does not accept, or cannot."""
        accepted = self.request.options.override
        return tuple(b for b in self.blockers if b.severity == NEVER or b.code not in accepted)

    @property
    def overridden(self) -> tuple[Blocker, ...]:
        """The blockers that its caller goes past."""
        refused = self.refused
        return tuple(b for b in self.blockers if b not in refused)

    def check_allowed(self) -> None:
        """Raises Blocked unless the caller accepts all that blocks it."""
        if found := self.refused:
            told = " ".join(f"{b.code}: {b.message}" for b in found)
            raise errors.Blocked(f"{', '.join(self.asked)} cannot be assigned: {told}", found)
