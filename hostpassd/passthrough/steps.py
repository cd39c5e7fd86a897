"""The steps that operations are made of.

Each is one class: its text, how it is done, how one sees that it is done, what takes it back, and its row in the intent
log.

A new step is a class here, in `STEPS`. What it does it does through `Hands`, and it comes back as events like anybody
else's change.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any, ClassVar, Protocol

from hostpassd import errors
from hostpassd.machines.domain_xml import claim_of
from hostpassd.model.codes import STEPS as STEPS_TOLD
from hostpassd.model.codes import Fact, fact
from hostpassd.model.events import DeviceAdded, RemovalFailed
from hostpassd.model.machine import Claim, Machine, MachineKey
from hostpassd.model.naming import shown
from hostpassd.model.order import Forest


class Libvirt(Protocol):
    """What steps do to the world. Each returns when its effect, if it shows at once, is in the state.

    Whoever cancels one of them gives it up: its effect can come later yet, and `wait_until_returned` waits for that.
    """

    async def attach_live(self, uuid: str, xml: str) -> None: ...
    async def attach_config(self, uuid: str, xml: str) -> None: ...
    async def detach_live(self, uuid: str, alias: str) -> None: ...
    async def detach_config(self, uuid: str, claim: Claim) -> None: ...
    async def detach_host(self, name: str) -> None: ...
    async def reattach_host(self, name: str) -> None: ...
    async def wait_until_returned(self, names: Collection[str]) -> None: ...
    async def wait_until_idle(self, uuid: str) -> None: ...


class Answer(Protocol):
    """What libvirt has said of one alias since it is listened to."""

    @property
    def said(self) -> type | None: ...

    @property
    def has_left(self) -> bool: ...


class Hands(Protocol):
    """What a step acts through, for one operation and for as long as it may take."""

    @property
    def key(self) -> MachineKey:
        """The machine. Error: NoSuchMachine, it is gone."""

    @property
    def libvirt(self) -> Libvirt:
        """The machine's. Error: NoSuchMachine, it is gone."""

    @property
    def machine_name(self) -> str:
        """What the machine is called in messages."""

    @property
    def seen(self) -> Seen:
        """What shows now."""

    async def made(self, call: Coroutine[Any, Any, None]) -> None:
        """Waits for a CALL of libvirt. Raises StillAtIt when it does not return in time."""

    async def until(self, predicate: Callable[[], bool]) -> bool:
        """Waits for events until PREDICATE holds; False when the time is over. Error: Cancelled."""

    def listening(self, alias: str) -> contextlib.AbstractContextManager[Answer]:
        """Listens to what libvirt says of ALIAS."""

    def releasing(self, alias: str, *, asked: bool = True) -> None:
        """Tells the state that the guest is asked to let ALIAS go, or is not any more."""

    async def lend(self, device: str, driver: str) -> None:
        """Writes down that DEVICE is owed to its host DRIVER."""

    async def give_back(self, device: str) -> None:
        """Gives DEVICE back to its host driver, if that is owed and can be."""

    async def reattach_if_free(self, device: str) -> None:
        """Has libvirt re-attach DEVICE, if no machine has its group."""


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """What shows of an operation: its machine as it was last read, and what is owed to host drivers."""

    machine: Machine | None
    lent: Collection[str]

    @property
    def live(self) -> tuple[Claim, ...]:
        """The claims of the live half."""
        return self.machine.live if self.machine else ()

    @property
    def config(self) -> tuple[Claim, ...]:
        """The claims of the stored half."""
        return self.machine.config if self.machine else ()


@dataclasses.dataclass(frozen=True, slots=True)
class Step(abc.ABC):
    """One step, about one device."""

    device: str

    code: ClassVar[str]
    asks_guest: ClassVar[bool] = False  # so that it cannot be taken back
    is_owed: ClassVar[bool] = False  # to the host: it is done also after a cancel, and when the time is over

    def fact(self, what: str = "") -> Fact:
        """What it does; WHAT: its device, for people."""
        return fact(STEPS_TOLD[self.code], self.device, what=what or self.device, **self.more())

    def more(self) -> dict[str, str]:
        """More details of `fact`."""
        return {}

    @property
    def text(self) -> str:
        """What it does, to stand in a sentence."""
        message = self.fact().message
        return message[0].lower() + message[1:].removesuffix(".")

    @abc.abstractmethod
    async def do(self, hands: Hands) -> None:
        """Does it, and returns when it shows. Raises what went wrong; its effect can be there all the same."""

    @abc.abstractmethod
    def shows(self, seen: Seen) -> bool:
        """Whether its effect is there. The alias tells ours from what others did."""

    def is_to_be_undone(self, seen: Seen) -> bool:
        """Whether its effect is there to be taken back."""
        return self.shows(seen)

    def undo(self) -> Step | None:
        """The step that takes this one back; None where nothing can, or need."""
        return None

    async def wait_out(self, hands: Hands) -> None:  # noqa: B027 (most have nothing to do)
        """Called before one looks what shows, where it was given up or its daemon died: libvirt can be at it yet."""

    def fields(self) -> dict[str, str]:
        """What its row has beside its code and device."""
        return {}

    @classmethod
    def of(cls, device: str, fields: Mapping[str, str]) -> Step:
        """The step with these FIELDS. KeyError, TypeError, ValueError: they are another version's."""
        return cls(device, **fields)


@dataclasses.dataclass(frozen=True, slots=True)
class Store(Step):
    """Put a device into the stored configuration, as `claim.xml` says."""

    claim: Claim

    code = "store"

    async def do(self, hands: Hands) -> None:
        await hands.made(hands.libvirt.attach_config(hands.key.uuid, self.claim.xml))

    def shows(self, seen: Seen) -> bool:
        return any(c.id == self.claim.id and c.alias == self.claim.alias for c in seen.config)

    def undo(self) -> Step:
        return Unstore(self.device, self.claim)

    def fields(self) -> dict[str, str]:
        return {"xml": self.claim.xml}

    @classmethod
    def of(cls, device: str, fields: Mapping[str, str]) -> Step:
        return cls(device, _claim_in(**fields))


@dataclasses.dataclass(frozen=True, slots=True)
class Unstore(Step):
    """Take a claim out of the stored configuration."""

    claim: Claim

    code = "unstore"

    async def do(self, hands: Hands) -> None:
        await hands.made(hands.libvirt.detach_config(hands.key.uuid, self.claim))

    def shows(self, seen: Seen) -> bool:
        return seen.machine is not None and not any(_same(c, self.claim) for c in seen.config)

    def is_to_be_undone(self, seen: Seen) -> bool:
        """What somebody else has stored meanwhile stands in for ours."""
        return seen.machine is not None and all(c.id != self.claim.id for c in seen.config)

    def undo(self) -> Step:
        return Store(self.device, self.claim)

    def fields(self) -> dict[str, str]:
        return {"xml": self.claim.xml}

    @classmethod
    def of(cls, device: str, fields: Mapping[str, str]) -> Step:
        return cls(device, _claim_in(**fields))


@dataclasses.dataclass(frozen=True, slots=True)
class Detach(Step):
    """Take a device from its host driver, as a node device, so that its group can be owned."""

    driver: str  # the host driver that it has now

    code = "detach"

    def more(self) -> dict[str, str]:
        return {"driver": self.driver}

    async def do(self, hands: Hands) -> None:
        await hands.lend(self.device, self.driver)
        await hands.made(hands.libvirt.detach_host(self.device))

    def shows(self, seen: Seen) -> bool:
        return self.device in seen.lent

    def undo(self) -> Step:
        return Reattach(self.device)

    async def wait_out(self, hands: Hands) -> None:
        """Nothing tells that a device is still being detached, but libvirt re-attaches it only after that."""
        await hands.reattach_if_free(self.device)

    def fields(self) -> dict[str, str]:
        return {"driver": self.driver}


@dataclasses.dataclass(frozen=True, slots=True)
class Reattach(Step):
    """Give a device back to its host driver, when the whole group is free."""

    code = "reattach"
    is_owed = True

    async def do(self, hands: Hands) -> None:
        await hands.give_back(self.device)

    def shows(self, seen: Seen) -> bool:
        return self.device not in seen.lent


@dataclasses.dataclass(frozen=True, slots=True)
class Attach(Step):
    """Attach a device to the running machine and wait for libvirt's added event of its alias."""

    alias: str
    xml: str
    card: str = ""  # the host's slot with it and others: libvirt takes only function 0 of a guest's slot while it runs

    code = "attach"

    def more(self) -> dict[str, str]:
        return {"card": self.card}

    async def do(self, hands: Hands) -> None:
        with hands.listening(self.alias) as answer:
            await hands.made(hands.libvirt.attach_live(hands.key.uuid, self.xml))
            if not await hands.until(lambda: answer.said is DeviceAdded):
                raise errors.TimedOut(f"libvirt did not confirm that {self.device} was added: see the machine's log.")

    def shows(self, seen: Seen) -> bool:
        return any(c.alias == self.alias for c in seen.live)

    def undo(self) -> Step:
        return Unplug(self.device, self.alias)

    def fields(self) -> dict[str, str]:
        return {"alias": self.alias, "xml": self.xml}


@dataclasses.dataclass(frozen=True, slots=True)
class Unplug(Step):
    """Ask the guest to let a device go and wait for libvirt's removed event of its alias."""

    alias: str
    claim_id: str = ""  # of what has that alias, where another device could have it later; '' for an alias of ours

    code = "unplug"
    asks_guest = True

    async def do(self, hands: Hands) -> None:
        if self.shows(hands.seen):
            return  # by now, and another device can have that alias
        with hands.listening(self.alias) as answer:
            hands.releasing(self.alias)
            if await self._is_asked(hands):
                await self._wait_for(answer, hands)

    async def _is_asked(self, hands: Hands) -> bool:
        """Asks; whether there is an answer to be waited for."""
        try:
            await hands.made(hands.libvirt.detach_live(hands.key.uuid, self.alias))
        except errors.NotAssigned:
            return False
        except errors.UnplugPending:
            return True  # asked before and not answered yet: libvirt does not ask twice, the answer still comes
        except errors.HypervisorRefused:
            if self.shows(hands.seen):
                return False  # done all the same
            hands.releasing(self.alias, asked=False)
            raise
        return True

    async def _wait_for(self, answer: Answer, hands: Hands) -> None:
        if not await hands.until(lambda: answer.has_left or answer.said is RemovalFailed):
            raise errors.GuestDidNotRelease(f"{hands.machine_name} has not let {self.device} go in time: {_STILL}")
        if answer.said is RemovalFailed:
            raise errors.GuestDidNotRelease(f"{hands.machine_name} refused to let {self.device} go: {_STILL}")

    def shows(self, seen: Seen) -> bool:
        return all(c.alias != self.alias or self.claim_id not in ("", c.id) for c in seen.live)

    def fields(self) -> dict[str, str]:
        return {"alias": self.alias, "claim_id": self.claim_id}


def told(devices: Forest, step: Step) -> Fact:
    """What STEP does, with its device, one of DEVICES or one that was, as people know it."""
    device = devices.device(step.device)
    return step.fact(shown(device) if device else "")


# What the intent log knows: a step that is not in it is another version's.
STEPS: dict[str, type[Step]] = {step.code: step for step in (Store, Unstore, Detach, Reattach, Attach, Unplug)}

_STILL = "it still has the device, and the hold ends whenever the guest lets go."


def _claim_in(xml: str) -> Claim:
    """The claim in a row. TypeError: the row has other fields."""
    return claim_of(xml)


def _same(claim: Claim, other: Claim) -> bool:
    """Whether both are one element, and not the same device stored again by somebody else."""
    return (claim.id, claim.alias, claim.xml) == (other.id, other.alias, other.xml)
