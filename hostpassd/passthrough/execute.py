"""Runs a plan, undoes it on failure, keeps the intent log."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any, Protocol

from hostpassd import errors
from hostpassd.model.events import (
    DeviceAdded,
    DeviceRemoved,
    Event,
    JobChanged,
    MachinesListed,
    Releasing,
    RemovalFailed,
)
from hostpassd.model.job import Job
from hostpassd.model.machine import Claim, MachineKey
from hostpassd.passthrough.intent_rows import Unfinished
from hostpassd.passthrough.intents import IntentLog
from hostpassd.passthrough.plan import Attach, Free, GiveBack, Plan, Release, Step, Store, Unstore, lock_of, undo
from hostpassd.state import State

log = logging.getLogger(__name__)

# Seconds that each step of undoing, and giving a device back to its driver, may take beyond the job's own time.
_GRACE = 20.0
# Seconds that a call of libvirt may go on for when its job is cancelled: then it can be undone in the job.
_PATIENCE = 5.0

_STUBS = frozenset({"vfio-pci", "pci-stub"})


class Effects(Protocol):
    """What execution does to the world. Each returns when its effect, if it shows at once, is in the state.

    Whoever cancels one of them gives it up: its effect can come later yet, and `wait_until_returned` waits for that.
    """

    async def attach_live(self, uuid: str, xml: str) -> None: ...
    async def attach_stored(self, uuid: str, xml: str) -> None: ...
    async def detach_live(self, uuid: str, alias: str) -> None: ...
    async def detach_stored(self, uuid: str, claim: Claim) -> None: ...
    async def detach_host(self, name: str) -> None: ...
    async def reattach_host(self, name: str) -> None: ...
    async def wait_until_returned(self, names: Collection[str]) -> None: ...
    async def wait_until_idle(self, uuid: str) -> None: ...


class Control:
    """One job as it runs: its row in the state, its deadline, and the wish to cancel it."""

    def __init__(
        self,
        job: Job,
        emit: Callable[[Event], None],
        seconds: float,
        devices: tuple[str, ...],
        details: Mapping[str, str],
    ) -> None:
        self.job = job
        self.devices = devices  # all that move
        self.details = details  # what polkit was told of its device and machine
        self.cancelled = asyncio.Event()
        self.hurried = asyncio.Event()  # undoing is not to be waited for any more either: the daemon stops
        self.ended = asyncio.Event()
        self.still_at_it = False  # libvirt has not returned from a call of it
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


class Patience:
    """For how long something is waited for: that many SECONDS, or, but for calls under way, until OVER is set."""

    def __init__(self, what: str, seconds: float, over: asyncio.Event | None = None) -> None:
        self.what = what  # for people: a step
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._over = over

    @property
    def is_over(self) -> bool:
        """Whether it was ended early."""
        return self._over is not None and self._over.is_set()

    async def wait(self, future: asyncio.Future[Any]) -> None:
        """Returns when FUTURE is done, or when the patience is at its end."""
        over = asyncio.ensure_future(self._over.wait()) if self._over else None
        waited: set[asyncio.Future[Any]] = {future, over} if over else {future}
        try:
            await asyncio.wait(waited, timeout=self._left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if over:
                over.cancel()

    async def wait_for_call(self, call: asyncio.Future[Any]) -> None:
        """As `wait`; a CALL that is under way when it is ended early gets a while more."""
        await self.wait(call)
        if not call.done() and self.is_over:
            await asyncio.wait({call}, timeout=min(_PATIENCE, self._left))

    @property
    def _left(self) -> float:
        return max(0.0, self._deadline - asyncio.get_running_loop().time())


class StillAtIt(Exception):
    """libvirt has not returned from a call in time: its effect can come later yet. The message is the step."""


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """A step that could not be done, and why."""

    step: Step
    error: errors.HostpassError

    def __str__(self) -> str:
        return f"{self.step.text} ({self.error})"


class Executor:
    """Runs plans. Learns what became of an effect from events only, like everybody else."""

    def __init__(
        self,
        state: State,
        effects: Callable[[str], Effects],
        settle: Callable[[], Awaitable[None]],
        emit: Callable[[Event], None],
        intents: IntentLog,
    ) -> None:
        self._state = state
        self._effects = effects  # by hypervisor URI
        self._settle = settle
        self._emit = emit
        self._intents = intents
        self._heard: dict[tuple[MachineKey, str], type[DeviceAdded | DeviceRemoved | RemovalFailed] | None] = {}
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._said: dict[int | str, str] = {}  # what was logged last of an operation or device that is still left

    @contextlib.asynccontextmanager
    async def alone(self, groups: tuple[str, ...]) -> AsyncIterator[None]:
        """While no other operation runs on one of GROUPS (a plan's, sorted)."""
        async with contextlib.AsyncExitStack() as locks:
            for group in groups:
                await locks.enter_async_context(self._locks.setdefault(group, asyncio.Lock()))
            yield

    def notice(self, event: Event) -> None:
        """Called for each event after the state has taken it in."""
        if isinstance(event, DeviceAdded | DeviceRemoved | RemovalFailed):
            if (event.machine, event.alias) in self._heard:
                self._heard[(event.machine, event.alias)] = type(event)
        if isinstance(event, MachinesListed):
            self._catch_up(event.uri)
        for future, predicate in list(self._waiting.items()):
            if not future.done() and predicate():
                future.set_result(None)

    def _catch_up(self, uri: str) -> None:
        """An event that libvirt sent while it was not connected is lost: a list of all machines stands for it."""
        for key, alias in [heard for heard in self._heard if heard[0].uri == uri]:
            machine = self._state.copies.get(key)
            there = machine is not None and any(claim.alias == alias for claim in machine.live)
            if self._heard[(key, alias)] is not RemovalFailed:
                self._heard[(key, alias)] = DeviceAdded if there else DeviceRemoved

    async def run(self, plan: Plan, control: Control) -> None:
        """Runs PLAN to its end, or raises after what can be undone is undone; the rest is left in the intent log."""
        number, uri = control.job.number, self._uri(plan.machine)
        await self._intents.begin(number, plan, uri)
        begun: list[Step] = []
        try:
            for at, step in enumerate(plan.steps):
                if not isinstance(step, GiveBack):  # of use to nobody any more, and owed to the host
                    control.check()
                control.tell(state="running", step=step.text, progress=at / len(plan.steps))
                if isinstance(step, Release):
                    await self._owe(plan, uri)
                await self._intend(number, at, step)
                begun.append(step)
                # What is given back to the host is begun even when the time is over.
                seconds = max(control.left, _PATIENCE) if isinstance(step, GiveBack) else control.left
                await self._perform(plan.machine, step, Patience(step.text, seconds, control.cancelled), control)
            await self._settle()
        except StillAtIt as error:
            raise await self._leave_at_work(plan, begun, str(error), control) from None
        except Exception as error:
            await self._settle()
            raise await self._wind_up(plan, begun, error, control) from None
        await self._intents.end(number)

    async def _intend(self, number: int, at: int, step: Step) -> None:
        """Before the effect of STEP. What is lent is on disk already: to give it back nothing more has to be."""
        try:
            await self._intents.step(number, at)
        except errors.StateFolderError:
            if not isinstance(step, GiveBack):
                raise

    async def _drivers_back(self, devices: list[str]) -> None:
        """libvirt gives a managed device back by itself, a moment after its removal."""
        here = [name for name in devices if (device := self._state.device(name)) and device.pci]
        free = Patience("", 2.0)
        await self._until(lambda: all(self._has_host_driver(n) or not self._group_is_free(n) for n in here), free)

    async def _owe(self, plan: Plan, uri: str) -> None:
        """Writes down, before a guest is first asked, that its devices are owed to their host drivers.

        It can let go of the last one when no job waits for that any more.
        """
        for step in plan.steps:
            if isinstance(step, GiveBack) and step.device not in self._intents.lent:
                await self._intents.lend(step.device, uri, "")

    async def _forgive(self, steps: tuple[Step, ...]) -> None:
        """No guest was asked after all."""
        for step in steps:
            if isinstance(step, GiveBack) and self._intents.lent.get(step.device, ("", "known"))[1] == "":
                await self._intents.give_back(step.device)

    async def _wind_up(self, plan: Plan, begun: list[Step], error: Exception, control: Control) -> Exception:
        """After ERROR: undoes what was begun, or leaves it in the intent log. The error to tell, with what is left."""
        number = control.job.number
        if begun and isinstance(begun[-1], Release) and isinstance(error, _REFUSALS):
            begun.pop()  # so no guest was asked
        asked = _asked_a_guest(begun)
        if asked and isinstance(error, _GIVEN_UP):
            await self._intents.end(number)
            return self._given_up(plan, begun, error)
        if isinstance(error, errors.HypervisorUnavailable) or self._is_away(plan.machine):
            await self._intents.leave(number, len(begun))
            what = "the rest is done" if asked else "what was begun is undone"
            return _with(error, f"{what} when libvirt is back")
        if asked:
            await self._intents.leave(number, len(begun))
            left = "; ".join(step.text for step in plan.steps if not self._shows(plan.machine, step))
            return _with(error, f"not done yet, and tried again: {left}")
        control.tell(state="undoing")
        await self._intents.fail(number, len(begun))
        await self._forgive(plan.steps)
        try:
            failures = await self._undo(self._intents.running(number), control)
        except StillAtIt as step:
            control.still_at_it = True
            await self._intents.leave(number, len(begun))
            return _with(error, f"not undone yet, because libvirt is still at it: {step}")
        await self._drivers_back([step.device for step in begun if isinstance(step, Attach)])
        if _is_over(failures):
            await self._intents.end(number)
        else:
            await self._intents.leave(number, len(begun))
        return _with(error, f"not undone: {'; '.join(map(str, failures))}") if failures else error

    async def _leave_at_work(self, plan: Plan, begun: list[Step], step: str, control: Control) -> Exception:
        """Leaves in the intent log what libvirt does not return from, as if the connection were lost. What to tell."""
        control.still_at_it = True
        await self._intents.leave(control.job.number, len(begun))
        then = "the rest is done" if _asked_a_guest(begun) else "what was begun is undone"
        what = f"libvirt is still at it ({step}), and {then} when it has returned from that"
        if control.cancelled.is_set():
            return errors.Cancelled(f"the job was cancelled; {what}")
        return errors.TimedOut(f"the job did not end within {control.seconds:g} seconds; {what}")

    def _given_up(self, plan: Plan, begun: list[Step], error: Exception) -> Exception:
        """ERROR, and what becomes of the devices now that nobody waits for the guest any more."""
        asked = [s.device for s in begun if isinstance(s, Release) and not self._shows(plan.machine, s)]
        if asked and not isinstance(error, errors.GuestDidNotRelease):
            error = _with(error, f"the guest was asked for {', '.join(asked)} and can still let go")
        rest = [s.device for s in plan.steps[len(begun) :] if isinstance(s, Release)]
        return _with(error, f"{', '.join(rest)} was not asked for and stays with the machine") if rest else error

    async def _undo(self, left: Unfinished, control: Control | None) -> list[Failure]:
        """Takes the begun steps back, last first, as far as they show in the truth, and each only once."""
        failures = []
        for at in sorted(set(range(left.begun)) - left.undone, reverse=True):
            step = left.steps[at]
            back = undo(step)
            if back and self._is_to_be_undone(left.key, step):
                if control:
                    control.tell(step="undo: " + back.text)
                if failed := await self._try(left.key, back, control):
                    failures += failed
                    continue
            await self._intents.undone(left.number, at)
        return failures

    async def _finish(self, left: Unfinished) -> list[Failure]:
        """Does what does not show in the truth yet, and was never seen done; unless no guest can have been asked."""
        failures = []
        for at, step in enumerate(left.steps):
            if at in left.done:
                continue
            if not self._shows(left.key, step) and (failed := await self._try(left.key, step)):
                if isinstance(step, Release) and isinstance(failed[0].error, _REFUSALS) and self._asked_nobody(left):
                    await self._forgive(left.steps)
                    return await self._undo(left, None)
                failures += failed
                continue
            await self._intents.done(left.number, at)
        return failures

    def _asked_nobody(self, left: Unfinished) -> bool:
        """Whether libvirt, which now refuses to ask a guest for one, has taken none of the devices from it."""
        return not any(isinstance(step, Release) and self._shows(left.key, step) for step in left.steps)

    async def _try(self, key: MachineKey, step: Step, control: Control | None = None) -> list[Failure]:
        try:
            await self._perform(key, step, Patience(step.text, _GRACE, control.hurried if control else None))
        except errors.HostpassError as error:
            return [Failure(step, error)]
        return []

    async def recover(self, left: Unfinished) -> None:
        """Undoes an operation that was left, or finishes it where a guest was asked; else it stays left.

        One that shows as a whole, when nobody was told otherwise, is finished: only its end was not written. What
        libvirt does not return from is waited for.
        """
        while still := self._intents.left(left.number):
            try:
                return await self._put_in_order(still)
            except StillAtIt as step:
                log.warning("an earlier %s is not in order yet, libvirt is still at it: %s", left.operation, step)

    async def _put_in_order(self, left: Unfinished) -> None:
        begun = list(left.steps[: left.begun])
        asked = _asked_a_guest(begun)
        if left.number not in self._said:
            log.warning("an earlier %s was not finished: it is put in order", left.operation)
            self._said[left.number] = ""
        try:
            await self._wait_out(left, begun)
        except errors.NoSuchMachine:
            await self._end_left(left)
            return
        except errors.HostpassError as error:
            self._say_once(left.number, f"what the earlier {left.operation} did cannot be seen yet: {error}")
            return
        failures = []
        if not (self._is_whole(left) or self._is_taken_back(left)):
            failures = await (self._finish(left) if asked else self._undo(left, None))
        if failures:
            told = "; ".join(map(str, failures))
            self._say_once(left.number, f"of the earlier {left.operation} this could not be done: {told}")
        if _is_over(failures):
            await self._end_left(left)

    async def _end_left(self, left: Unfinished) -> None:
        self._said.pop(left.number, None)
        await self._intents.end(left.number)

    def _say_once(self, about: int | str, text: str) -> None:
        """Logs TEXT unless it is what was said last ABOUT an operation or a device."""
        if self._said.get(about) != text:
            log.error("%s", text)
            self._said[about] = text

    def _is_whole(self, left: Unfinished) -> bool:
        """Whether all that was to be done has been, and who asked for it was not told that it failed.

        A power cut, or a machine's own end, takes the live half with it: the other one is what was asked for.
        """
        if left.failed or left.begun < len(left.steps):
            return False
        machine = self._state.copies.get(left.key)
        rest = (step for at, step in enumerate(left.steps) if at not in left.done)
        if machine and not machine.active:
            rest = (step for step in rest if not isinstance(step, Attach))
        return all(self._shows(left.key, step) for step in rest)

    def _is_taken_back(self, left: Unfinished) -> bool:
        """Whether all that was seen removed is there again, although the operation was never seen to fail.

        So it was undone before it asked a guest, and the disk failed such that the log tells of the asking alone.
        """
        removed = [left.steps[at] for at in left.done - left.undone if isinstance(left.steps[at], Unstore)]
        return bool(removed) and not left.failed and not any(self._shows(left.key, step) for step in removed)

    async def _wait_out(self, left: Unfinished, begun: list[Step]) -> None:
        """Returns when libvirt works on the last step no more, and the truth is in the state."""
        effects = self._effects(left.uri)
        await effects.wait_until_returned({left.machine, *(step.device for step in begun)})
        await effects.wait_until_idle(left.machine)
        last = begun[-1] if begun else None
        if isinstance(last, Free) and last.device in self._state.devices and self._group_is_free(last.device):
            # Nothing tells that a device is still being freed, but libvirt gives it back only after that.
            await self._reattach(last.device, left.uri, Patience(GiveBack(last.device).text, _GRACE))
        await self._settle()

    def idle(self) -> list[tuple[str, str]]:
        """What is lent, and to which hypervisor, though no machine has its group any more (one that was shut down)."""
        return [(device, uri) for device, (uri, _) in self._intents.lent.items() if self._group_is_free(device)]

    async def give_back(self, device: str) -> None:
        """Gives DEVICE back, if that is still to be done when its group's turn comes."""
        here = self._state.device(device)
        async with self.alone((lock_of(here) if here else device,)):
            while (loan := self._intents.lent.get(device)) and self._group_is_free(device):
                try:
                    await self._give_back(device, Patience(GiveBack(device).text, _GRACE))
                    self._said.pop(device, None)
                    return
                except errors.HostpassError as error:
                    self._say_once(device, f"{device} could not be given back to its host driver: {error}")
                    return
                except StillAtIt as step:
                    log.warning("libvirt is still at it: %s", step)
                    await self._effects(loan[0]).wait_until_returned({device})

    # --- steps ---

    async def _perform(self, key: MachineKey, step: Step, patience: Patience, control: Control | None = None) -> None:
        if isinstance(step, GiveBack):
            await self._give_back(step.device, patience)
            return
        effects = self._effects(self._uri(key))
        match step:
            case Store(_, claim):
                await _made(effects.attach_stored(key.uuid, claim.xml), patience)
            case Unstore(_, claim):
                await _made(effects.detach_stored(key.uuid, claim), patience)
            case Free(device, driver):
                await self._intents.lend(device, self._uri(key), driver)
                await _made(effects.detach_host(device), patience)
            case Attach(_, alias, xml):
                await self._attach(effects, key, alias, xml, patience)
            case Release():
                if control:
                    control.tell(state="waiting-for-guest")
                await self._release(effects, key, step, patience)

    async def _attach(self, effects: Effects, key: MachineKey, alias: str, xml: str, patience: Patience) -> None:
        self._heard[(key, alias)] = None
        try:
            await _made(_attached(effects, key.uuid, xml), patience)
            if not await self._until(lambda: self._heard[(key, alias)] is DeviceAdded, patience):
                raise errors.TimedOut(f"libvirt did not confirm that {alias} was added: see the machine's log")
        finally:
            del self._heard[(key, alias)]

    async def _release(self, effects: Effects, key: MachineKey, step: Release, patience: Patience) -> None:
        alias = step.alias
        if self._shows(key, step):
            return  # by now, and another device can have that alias
        self._heard[(key, alias)] = None
        try:
            self._emit(Releasing(key, alias))
            try:
                await _made(effects.detach_live(key.uuid, alias), patience)
            except errors.NotAssigned:
                return
            except errors.HypervisorRefused as error:
                if self._shows(key, step):
                    return  # done all the same
                # Asked before and not answered yet: libvirt does not ask twice, the answer still comes.
                if "unplug" not in str(error) or _MULTIFUNCTION in str(error):
                    self._emit(Releasing(key, alias, asked=False))
                    raise _explained(error) from None
            if not await self._until(lambda: self._answered(key, alias), patience):
                raise errors.GuestDidNotRelease(
                    f"{self._state.machine_name(key.uuid)} has not let {alias} go in time: {_STILL}"
                )
            if self._heard[(key, alias)] is RemovalFailed:
                raise errors.GuestDidNotRelease(
                    f"{self._state.machine_name(key.uuid)} refused to let {alias} go: {_STILL}"
                )
        finally:
            del self._heard[(key, alias)]

    def _answered(self, key: MachineKey, alias: str) -> bool:
        machine = self._state.copies.get(key)
        heard = self._heard[(key, alias)]
        return heard in (DeviceRemoved, RemovalFailed) or machine is None or not (machine.active or machine.live)

    async def _give_back(self, device: str, patience: Patience) -> None:
        """Gives DEVICE back to its host driver, if that is owed and can be, and waits until udev shows one."""
        await self._settle()
        if device not in self._intents.lent or not self._group_is_free(device):
            return
        uri, _ = self._intents.lent[device]
        if not self._has_host_driver(device):
            await self._reattach(device, uri, patience)
        await self._intents.give_back(device)

    async def _reattach(self, device: str, uri: str, patience: Patience) -> None:
        effects = self._effects(uri)
        await _made(effects.reattach_host(device), patience)
        await self._settle()
        here = self._state.device(device)
        if here and here.driver in _STUBS:
            return  # where the administrator has it (driverctl, vfio-pci.ids)
        if not self._has_host_driver(device):
            # VFIO lets go of the group a moment after libvirt's event: then the first probe finds it still owned.
            await self._until(lambda: self._has_host_driver(device), Patience("", 2.0))
        if not self._has_host_driver(device):
            await _made(effects.reattach_host(device), patience)
            await self._settle()

    def _has_host_driver(self, device: str) -> bool:
        here = self._state.device(device)
        return here is None or (here.driver != "" and here.driver not in _STUBS)

    def _group_is_free(self, device: str) -> bool:
        here = self._state.device(device)
        group = (
            self._state.group(here.pci.iommu_group) if here and here.pci and here.pci.iommu_group >= 0 else (device,)
        )
        return not any(hold.live for name in group for hold in self._state.holds_on(name))

    def _shows(self, key: MachineKey, step: Step) -> bool:
        """Whether the effect of STEP is there. The alias tells ours from what others did."""
        machine = self._state.copies.get(key)
        match step:
            case Store(_, claim):
                stored = machine.stored if machine else ()
                return any(c.id == claim.id and c.alias == claim.alias for c in stored)
            case Unstore(_, claim):
                return machine is not None and not any(_same(c, claim) for c in machine.stored)
            case Attach(_, alias, _):
                return machine is not None and any(c.alias == alias for c in machine.live)
            case Free(device, _):
                return device in self._intents.lent
            case GiveBack(device):
                return device not in self._intents.lent
            case Release(_, alias, claim_id):
                live = machine.live if machine else ()
                return all(c.alias != alias or claim_id not in ("", c.id) for c in live)

    def _is_to_be_undone(self, key: MachineKey, step: Step) -> bool:
        """Whether the effect of STEP is there. What somebody else has stored meanwhile stands in for ours."""
        machine = self._state.copies.get(key)
        if isinstance(step, Unstore):
            return machine is not None and all(c.id != step.claim.id for c in machine.stored)
        return self._shows(key, step)

    def _is_away(self, key: MachineKey) -> bool:
        """Whether its hypervisor cannot be reached: then the state does not show the truth."""
        machine = self._state.copies.get(key)
        return machine is not None and machine.stale

    def _uri(self, key: MachineKey) -> str:
        machine = self._state.copies.get(key)
        if not machine:
            raise errors.NoSuchMachine(f"the machine {key.uuid} is gone: nothing more can be done to it")
        return machine.uri

    async def _until(self, predicate: Callable[[], bool], patience: Patience) -> bool:
        """Waits for events until PREDICATE holds; False when the time is over. Raises Cancelled when that ends it."""
        if predicate():
            return True
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = predicate
        try:
            await patience.wait(future)
        finally:
            del self._waiting[future]
        if not future.done() and patience.is_over:
            raise errors.Cancelled("the job was cancelled")
        return future.done()


async def _made(call: Coroutine[Any, Any, None], patience: Patience) -> None:
    """Waits for a CALL of libvirt. One that does not return in time is given up: raises StillAtIt."""
    made = asyncio.ensure_future(call)
    try:
        await patience.wait_for_call(made)
    finally:
        made.cancel()
    await asyncio.wait({made})
    if made.cancelled():
        raise StillAtIt(patience.what)
    made.result()


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


def _same(claim: Claim, other: Claim) -> bool:
    """Whether both are one element, and not the same device stored again by somebody else."""
    return (claim.id, claim.alias, claim.xml) == (other.id, other.alias, other.xml)


def _asked_a_guest(begun: list[Step]) -> bool:
    """Whether a guest was asked to let go: that cannot be taken back."""
    return any(isinstance(step, Release) for step in begun)


def _is_over(failures: list[Failure]) -> bool:
    """Whether nothing is left that could be tried again: what a guest keeps, only the guest can give."""
    return all(isinstance(failure.error, errors.GuestDidNotRelease) for failure in failures)


def _with(error: Exception, more: str) -> Exception:
    """ERROR with MORE in its message; a fault of our own keeps its own."""
    return type(error)(f"{error}; {more}") if isinstance(error, errors.HostpassError) else error


# With these libvirt says that it has not done what it was asked for.
_REFUSALS = (errors.HypervisorRefused, errors.NotSupported, errors.NoSuchMachine)
# After these nobody goes on asking.
_GIVEN_UP = (errors.GuestDidNotRelease, errors.Cancelled, errors.TimedOut)
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
