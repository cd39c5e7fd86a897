"""Runs a plan, undoes it on failure, keeps the journal."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol

from hostpassd import errors
from hostpassd.events import DeviceAdded, DeviceRemoved, Event, Job, JobChanged, Releasing, RemovalFailed
from hostpassd.machines.machine import Claim
from hostpassd.passthrough.journal import Journal, Unfinished
from hostpassd.passthrough.plan import Attach, Free, GiveBack, Plan, Release, Step, Store, Unstore, lock_of, undo
from hostpassd.state import State

log = logging.getLogger(__name__)

# Seconds that undoing, and giving devices back to their drivers, may take beyond the job's own time.
_GRACE = 20.0

_STUBS = frozenset({"vfio-pci", "pci-stub"})


class Effects(Protocol):
    """What execution does to the world. Each returns when its effect, if it shows at once, is in the state."""

    async def attach_live(self, uuid: str, xml: str) -> None: ...
    async def attach_stored(self, uuid: str, xml: str) -> None: ...
    async def detach_live(self, uuid: str, alias: str) -> None: ...
    async def detach_stored(self, uuid: str, claim: Claim) -> None: ...
    async def detach_host(self, name: str) -> None: ...
    async def reattach_host(self, name: str) -> None: ...


class Control:
    """One job as it runs: its row in the state, its deadline, and the wish to cancel it."""

    def __init__(self, job: Job, emit: Callable[[Event], None], seconds: float, details: Mapping[str, str]) -> None:
        self.job = job
        self.details = details  # what polkit was told of its device and machine
        self.cancelled = asyncio.Event()
        self.ended = asyncio.Event()
        self._emit = emit
        self.seconds = seconds
        self._deadline = asyncio.get_running_loop().time() + seconds
        emit(JobChanged(job))

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - asyncio.get_running_loop().time()

    def check(self) -> None:
        """Raises Cancelled or TimedOut when the job should not go on."""
        if self.cancelled.is_set():
            raise errors.Cancelled("the job was cancelled")
        if self.left <= 0:
            raise errors.TimedOut(f"the job did not end within {self.seconds:g} seconds: give it a longer timeout")

    def tell(self, **what: object) -> None:
        """Moves the job on in the state."""
        self.job = _replace(self.job, **what)
        self._emit(JobChanged(self.job))


def _replace(job: Job, **what: object) -> Job:
    return dataclasses.replace(job, **what)  # type: ignore[arg-type]


class Executor:
    """Runs plans. Learns what became of an effect from events only, like everybody else."""

    def __init__(
        self,
        state: State,
        effects: Callable[[str], Effects],
        settle: Callable[[], Awaitable[None]],
        emit: Callable[[Event], None],
        journal: Journal,
    ) -> None:
        self._state = state
        self._effects = effects  # by hypervisor URI
        self._settle = settle
        self._emit = emit
        self._journal = journal
        self._heard: dict[tuple[str, str], type[DeviceAdded | DeviceRemoved | RemovalFailed] | None] = {}
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    @contextlib.asynccontextmanager
    async def alone(self, groups: tuple[str, ...]) -> AsyncIterator[None]:
        """While no other operation runs on one of GROUPS (a plan's, sorted)."""
        async with contextlib.AsyncExitStack() as locks:
            for group in groups:
                await locks.enter_async_context(self._locks.setdefault(group, asyncio.Lock()))
            yield

    def notice(self, event: Event) -> None:
        """Called for each event after the state has taken it in."""
        if isinstance(event, DeviceAdded | DeviceRemoved | RemovalFailed) and (event.uuid, event.alias) in self._heard:
            self._heard[(event.uuid, event.alias)] = type(event)
        for future, predicate in list(self._waiting.items()):
            if not future.done() and predicate():
                future.set_result(None)

    async def run(self, plan: Plan, control: Control) -> None:
        """Runs PLAN to its end, or raises after everything that can be undone is undone."""
        number = control.job.number
        self._journal.begin(number, plan)
        begun: list[Step] = []
        try:
            for at, step in enumerate(plan.steps):
                control.check()
                control.tell(state="running", step=step.text, progress=at / len(plan.steps))
                self._journal.step(number, at)
                begun.append(step)
                await self._perform(plan.machine, step, control)
            await self._settle()
        except Exception as error:
            await self._settle()
            failures = []
            if not _asked_a_guest(begun):
                control.tell(state="undoing")
                failures = await self.undo(plan.machine, begun, control)
            self._journal.end(number)
            raise _with(error, failures) from None
        self._journal.end(number)

    async def undo(self, uuid: str, begun: list[Step], control: Control | None) -> list[str]:
        """Takes steps back, last first, as far as they show in the truth; returns what failed."""
        failures = []
        for step in reversed(begun):
            back = undo(step)
            if back is None or not self._shows(uuid, step):
                continue
            if control:
                control.tell(step="undo: " + back.text)
            try:
                await self._perform(uuid, back, None)
            except errors.HostpassError as error:
                log.error("could not undo: %s: %s", back.text, error)
                failures.append(f"{back.text} ({error})")
        return failures

    async def recover(self, unfinished: Unfinished) -> None:
        """Undoes an operation of an earlier run that did not get to its end, or finishes it where a guest was asked."""
        uuid, begun = unfinished.machine, list(unfinished.steps[: unfinished.begun])
        left = [step for step in unfinished.steps if not self._shows(uuid, step)]
        if left and _asked_a_guest(begun):
            log.warning("an earlier %s was not finished: going on with it", unfinished.operation)
            await self._finish(uuid, left)
        elif left:
            log.warning("an earlier %s was not finished: undoing it", unfinished.operation)
            await self.undo(uuid, begun, None)

    async def _finish(self, uuid: str, left: list[Step]) -> None:
        for step in left:
            try:
                await self._perform(uuid, step, None)
            except errors.HostpassError as error:
                log.error("could not finish: %s: %s", step.text, error)
                return

    async def give_back_idle(self) -> None:
        """Gives back what was lent to groups that no machine has any more (a machine that was shut down, say)."""
        for device in list(self._journal.lent):
            here = self._state.device(device)
            async with self.alone((lock_of(here) if here else device,)):
                if device in self._journal.lent and self._group_is_free(device):
                    try:
                        await self._give_back(device)
                    except errors.HostpassError as error:
                        log.error("%s could not be given back to its host driver: %s", device, error)

    # --- steps ---

    async def _perform(self, uuid: str, step: Step, control: Control | None) -> None:
        effects = self._effects(self._uri(uuid))
        match step:
            case Store(_, claim):
                await effects.attach_stored(uuid, claim.xml)
            case Unstore(_, claim):
                await effects.detach_stored(uuid, claim)
            case Free(device, driver):
                self._journal.lend(device, self._uri(uuid), driver)
                await effects.detach_host(device)
            case GiveBack(device):
                await self._give_back(device, self._uri(uuid))
            case Attach(_, alias, xml):
                await self._attach(effects, uuid, alias, xml, control)
            case Release(_, alias):
                await self._release(effects, uuid, alias, control)

    async def _attach(self, effects: Effects, uuid: str, alias: str, xml: str, control: Control | None) -> None:
        self._heard[(uuid, alias)] = None
        try:
            await _attached(effects, uuid, xml)
            if not await self._until(lambda: self._heard[(uuid, alias)] is DeviceAdded, control):
                raise errors.TimedOut(f"libvirt did not confirm that {alias} was added: see the machine's log")
        finally:
            del self._heard[(uuid, alias)]

    async def _release(self, effects: Effects, uuid: str, alias: str, control: Control | None) -> None:
        self._heard[(uuid, alias)] = None
        try:
            self._emit(Releasing(uuid, alias))
            if control:
                control.tell(state="waiting-for-guest")
            try:
                await effects.detach_live(uuid, alias)
            except errors.HypervisorRefused as error:
                # Asked before and not answered yet: libvirt does not ask twice, the answer still comes.
                if "unplug" not in str(error) or _MULTIFUNCTION in str(error):
                    self._emit(Releasing(uuid, alias, asked=False))
                    raise _explained(error) from None
            if not await self._until(lambda: self._answered(uuid, alias), control):
                raise errors.GuestDidNotRelease(
                    f"{self._state.machine_name(uuid)} has not let {alias} go in time: {_STILL}"
                )
            if self._heard[(uuid, alias)] is RemovalFailed:
                raise errors.GuestDidNotRelease(f"{self._state.machine_name(uuid)} refused to let {alias} go: {_STILL}")
        finally:
            del self._heard[(uuid, alias)]

    def _answered(self, uuid: str, alias: str) -> bool:
        machine = self._state.machines.get(uuid)
        return self._heard[(uuid, alias)] is not None or machine is None or not (machine.active or machine.live)

    async def _give_back(self, device: str, uri: str = "") -> None:
        """Gives DEVICE back to its host driver and waits until udev shows one."""
        uri = self._journal.lent.get(device, (uri, ""))[0]
        await self._settle()
        if device in self._state.devices and not self._group_is_free(device):
            return
        if not self._has_host_driver(device):
            await self._reattach(device, uri)
        self._journal.give_back(device)

    async def _reattach(self, device: str, uri: str) -> None:
        effects = self._effects(uri)
        await effects.reattach_host(device)
        await self._settle()
        if not self._has_host_driver(device):
            # VFIO lets go of the group a moment after libvirt's event: then the first probe finds it still owned.
            await self._until(lambda: self._has_host_driver(device), None, 2.0)
        if not self._has_host_driver(device):
            await effects.reattach_host(device)
            await self._settle()
        here = self._state.device(device)
        if here and here.driver in _STUBS:
            raise errors.Failed(f"{device} is still bound to {here.driver}: give it back with virsh nodedev-reattach")

    def _has_host_driver(self, device: str) -> bool:
        here = self._state.device(device)
        return here is None or (here.driver != "" and here.driver not in _STUBS)

    def _group_is_free(self, device: str) -> bool:
        here = self._state.device(device)
        group = (
            self._state.group(here.pci.iommu_group) if here and here.pci and here.pci.iommu_group >= 0 else (device,)
        )
        return not any(hold.live for name in group for hold in self._state.holds_on(name))

    def _shows(self, uuid: str, step: Step) -> bool:
        """Whether the effect of STEP is there. The alias tells ours from what others did."""
        machine = self._state.machines.get(uuid)
        match step:
            case Store(_, claim):
                stored = machine.stored if machine else ()
                return any(c.id == claim.id and c.alias in (claim.alias, "") for c in stored)
            case Unstore(_, claim):
                return machine is not None and all(c.id != claim.id for c in machine.stored)
            case Attach(_, alias, _):
                return machine is not None and any(c.alias == alias for c in machine.live)
            case Free(device, _):
                return device in self._journal.lent
            case GiveBack(device):
                return device not in self._journal.lent
            case Release(_, alias):
                return machine is None or all(c.alias != alias for c in machine.live)

    def _uri(self, uuid: str) -> str:
        machine = self._state.machines.get(uuid)
        if not machine:
            raise errors.NoSuchMachine(f"the machine {uuid} is gone: nothing more can be done to it")
        return machine.uri

    async def _until(self, predicate: Callable[[], bool], control: Control | None, seconds: float = _GRACE) -> bool:
        """Waits for events until PREDICATE holds; False when the time is over. Raises Cancelled when the job is."""
        if predicate():
            return True
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = predicate
        cancel = asyncio.ensure_future(control.cancelled.wait()) if control else None
        try:
            waited: set[asyncio.Future[Any]] = {future, cancel} if cancel else {future}
            await asyncio.wait(
                waited, timeout=control.left if control else seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if cancel and cancel.done() and not future.done():
                raise errors.Cancelled("the job was cancelled")
            return future.done()
        finally:
            del self._waiting[future]
            if cancel:
                cancel.cancel()


def _explained(error: errors.HypervisorRefused) -> errors.HypervisorRefused:
    """With what to do, where libvirt's words do not say it."""
    return errors.HypervisorRefused(f"{error} {_WHOLE_CARD}") if _MULTIFUNCTION in str(error) else error


async def _attached(effects: Effects, uuid: str, xml: str) -> None:
    """Attaches; libvirt's words for a full machine do not say of what."""
    try:
        await effects.attach_live(uuid, xml)
    except errors.HypervisorRefused as error:
        if "PCI slots" not in str(error):
            raise
        raise errors.HypervisorRefused(f"{error} {_NO_SLOT}") from None


def _asked_a_guest(begun: list[Step]) -> bool:
    """Whether a guest was asked to let go: that cannot be taken back."""
    return any(isinstance(step, Release) for step in begun)


def _with(error: Exception, failures: list[str]) -> Exception:
    """The error to tell, with what could not be undone."""
    if isinstance(error, errors.HostpassError) and failures:
        return type(error)(f"{error}; not undone: {'; '.join(failures)}")
    return error


_MULTIFUNCTION = "multifunction"  # "cannot hot unplug multifunction PCI device"
_WHOLE_CARD = (
    "A card of several functions in one slot stays with a machine while it runs: shut the machine down and dismiss it "
    "then, or dismiss it with live=false, so that the machine's next start is without it."
)
_NO_SLOT = (
    "The machine has no free place for it: give it an empty pcie-root-port for a PCI Express device, "
    "or a pcie-to-pci-bridge with a free slot for a conventional one."
)
_STILL = "it still has the device, and the hold ends whenever the guest lets go"
