"""Runs a plan, undoes it on failure, keeps the intent log."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

from hostpassd import errors
from hostpassd.model.events import Event, Releasing
from hostpassd.model.machine import MachineKey
from hostpassd.passthrough.intent_rows import Unfinished
from hostpassd.passthrough.intents import IntentLog
from hostpassd.passthrough.jobs import RunningJob
from hostpassd.passthrough.loans import Loans
from hostpassd.passthrough.outcome import Failure, Then, has_asked, is_over, outcome, with_more
from hostpassd.passthrough.request import Plan
from hostpassd.passthrough.steps import Attach, Libvirt, Seen, Step, told
from hostpassd.passthrough.waiting import CALL_PATIENCE, Heard, Patience, StillAtIt, Waiting
from hostpassd.state import Changes, State

# Seconds that each step of undoing, and giving a device back to its driver, may take beyond the job's own time.
GRACE = 20.0


class Executor:
    """Runs plans. Learns what became of an effect from events only, like everybody else."""

    def __init__(
        self,
        state: State,
        libvirt: Callable[[str], Libvirt],
        settle: Callable[[], Awaitable[None]],
        emit: Callable[[Event], None],
        intents: IntentLog,
    ) -> None:
        self.state = state
        self.libvirt = libvirt  # by hypervisor URI
        self.settle = settle
        self.emit = emit
        self.waiting = Waiting(state)
        self.loans = Loans(state, libvirt, settle, intents, self.waiting)
        self._intents = intents
        self._locks: dict[str, asyncio.Lock] = {}

    def notice(self, event: Event, batches: Sequence[Changes]) -> None:
        """Called for each event after the state has taken it in."""
        self.waiting.notice(event)

    @contextlib.asynccontextmanager
    async def alone(self, locks: tuple[str, ...]) -> AsyncIterator[None]:
        """While no other operation runs that has one of LOCKS (a plan's, sorted)."""
        async with contextlib.AsyncExitStack() as taken:
            for lock in locks:
                await taken.enter_async_context(self._locks.setdefault(lock, asyncio.Lock()))
            yield

    @property
    def locked(self) -> list[str]:
        """The locks that are taken now."""
        return [name for name, lock in self._locks.items() if lock.locked()]

    async def run(self, plan: Plan, job: RunningJob) -> None:
        """Runs PLAN to its end, or raises after what can be undone is undone; the rest is left in the intent log."""
        if plan.machine:
            self.check_there(plan.machine)
        await self._intents.begin(job.number, plan)
        begun: list[Step] = []
        try:
            for at, step in enumerate(plan.steps):
                await self._announce(plan, at, job)
                begun.append(step)
                # What is owed to the host is begun even when the time is over.
                seconds = max(job.left, CALL_PATIENCE) if step.is_owed else job.left
                await self.perform(plan.machine, step, Patience(step.text, seconds, job.cancelled), job)
            await self.settle()
        except Exception as error:
            if not isinstance(error, StillAtIt):
                await self.settle()
            raise await self._wind_up(plan, begun, error, job) from None
        await self._intents.end(job.number)

    async def perform(
        self, key: MachineKey | None, step: Step, patience: Patience, job: RunningJob | None = None
    ) -> None:
        """Does one STEP of an operation on the machine KEY."""
        await step.do(_Hands(self, key, patience, job))

    async def wait_out(self, key: MachineKey | None, step: Step) -> None:
        """Returns when libvirt is not at STEP any more, as far as the step itself can tell."""
        await step.wait_out(_Hands(self, key, Patience(step.text, GRACE), None))

    async def _announce(self, plan: Plan, at: int, job: RunningJob) -> None:
        """Before the effect of a step: the job is told to be at it, and it is on disk what is about to be done."""
        step = plan.steps[at]
        if not step.is_owed:
            job.check()
        job.tell(state="running", step=told(self.state, step), step_number=at + 1, step_count=len(plan.steps))
        if step.asks_guest and plan.machine:
            await self.loans.owe(_owed(plan.steps), plan.machine.uri)
        try:
            await self._intents.step(job.number, at)
        except errors.StateFolderError:
            if not step.is_owed:  # that is on disk already, as lent: to give it back nothing more has to be
                raise

    async def _wind_up(self, plan: Plan, steps: list[Step], error: Exception, job: RunningJob) -> Exception:
        """After ERROR in the last of STEPS: does what is to be done now. The error to tell, with what is left."""
        then, count = outcome(steps, error, away=self._is_away(plan.machine))
        begun, number = steps[:count], job.number
        on_return = "the rest is done" if has_asked(begun) else "what was begun is undone"
        match then:
            case Then.AT_WORK:
                job.still_at_it = True
                await self._intents.leave(number, count)
                return _given_up_at(job, f"libvirt is still at it ({error}), and {on_return} when it has returned")
            case Then.STOP:
                await self._intents.end(number)
                return self._stopped(plan, begun, error)
            case Then.ON_RETURN:
                await self._intents.leave(number, count)
                return with_more(error, f"{on_return} when libvirt is back")
            case Then.FINISH:
                await self._intents.leave(number, count)
                seen = self.seen(plan.machine)
                left = "; ".join(step.text for step in plan.steps if not step.shows(seen))
                return with_more(error, f"not done yet, and tried again: {left}")
            case Then.UNDO:
                return await self._undo_now(plan, begun, error, job)

    async def _undo_now(self, plan: Plan, begun: list[Step], error: Exception, job: RunningJob) -> Exception:
        job.tell(state="undoing")
        await self._intents.fail(job.number, len(begun))
        await self.loans.forgive(_owed(plan.steps))
        try:
            failures = await self.undo(self._intents.running(job.number), job)
        except StillAtIt as step:
            job.still_at_it = True
            await self._intents.leave(job.number, len(begun))
            return with_more(error, f"not undone yet, because libvirt is still at it: {step}")
        await self.loans.drivers_back(step.device for step in begun if isinstance(step, Attach))
        if is_over(failures):
            await self._intents.end(job.number)
        else:
            await self._intents.leave(job.number, len(begun))
        return with_more(error, f"not undone: {'; '.join(map(str, failures))}") if failures else error

    def _stopped(self, plan: Plan, begun: list[Step], error: Exception) -> Exception:
        """ERROR, and what becomes of the devices now that nobody waits for the guest any more."""
        seen = self.seen(plan.machine)
        asked = [step.device for step in begun if step.asks_guest and not step.shows(seen)]
        if asked and not isinstance(error, errors.GuestDidNotRelease):
            error = with_more(error, f"the guest was asked for {', '.join(asked)} and can still let go")
        rest = [step.device for step in plan.steps[len(begun) :] if step.asks_guest]
        return with_more(error, f"{', '.join(rest)} was not asked for and stays with the machine") if rest else error

    async def undo(self, left: Unfinished, job: RunningJob | None = None) -> list[Failure]:
        """Takes the begun steps back, last first, as far as they show in the truth, and each only once."""
        failures = []
        for at in sorted(set(range(left.begun)) - left.undone, reverse=True):
            step = left.steps[at]
            back = step.undo()
            if back and step.is_to_be_undone(self.seen(left.key)):
                if job:
                    job.tell(step=told(self.state, back))
                if failed := await self.attempt(left.key, back, job):
                    failures += failed
                    continue
            await self._intents.undone(left.number, at)
        return failures

    async def attempt(self, key: MachineKey | None, step: Step, job: RunningJob | None = None) -> list[Failure]:
        """Does STEP; its failure, if it fails. Raises StillAtIt."""
        try:
            await self.perform(key, step, Patience(step.text, GRACE, job.hurried if job else None))
        except errors.HostpassError as error:
            return [Failure(step, error)]
        return []

    def seen(self, key: MachineKey | None) -> Seen:
        """What shows of an operation on the machine KEY."""
        return Seen(self.state.copies.get(key) if key else None, self.loans.lent)

    def check_there(self, key: MachineKey) -> MachineKey:
        """KEY; raises NoSuchMachine if the machine is gone."""
        if key not in self.state.copies:
            raise errors.NoSuchMachine(f"The machine {key.uuid} is gone: nothing more can be done to it.")
        return key

    def _is_away(self, key: MachineKey | None) -> bool:
        """Whether its hypervisor cannot be reached: then the state does not show the truth."""
        machine = self.state.copies.get(key) if key else None
        return machine is not None and machine.stale


class _Hands:
    """What a step acts through: see `steps.Hands`."""

    def __init__(self, executor: Executor, key: MachineKey | None, patience: Patience, job: RunningJob | None) -> None:
        self._executor = executor
        self._key = key
        self._patience = patience
        self._job = job

    @property
    def key(self) -> MachineKey:
        assert self._key, "a step on a machine, in an operation on none"
        return self._executor.check_there(self._key)

    @property
    def libvirt(self) -> Libvirt:
        return self._executor.libvirt(self.key.uri)

    @property
    def machine_name(self) -> str:
        return self._executor.state.machine_name(self.key.uuid)

    @property
    def seen(self) -> Seen:
        return self._executor.seen(self._key)

    async def made(self, call: Coroutine[Any, Any, None]) -> None:
        await self._patience.made(call)

    async def until(self, predicate: Callable[[], bool]) -> bool:
        return await self._executor.waiting.until(predicate, self._patience)

    def listening(self, alias: str) -> contextlib.AbstractContextManager[Heard]:
        return self._executor.waiting.listening(self.key, alias)

    def releasing(self, alias: str, *, asked: bool = True) -> None:
        if asked and self._job:
            self._job.tell(state="waiting-for-guest")
        self._executor.emit(Releasing(self.key, alias, asked))

    async def lend(self, device: str, driver: str) -> None:
        await self._executor.loans.lend(device, self.key.uri, driver)

    async def give_back(self, device: str) -> None:
        await self._executor.loans.give_back(device, self._patience)

    async def reattach_if_free(self, device: str) -> None:
        loans = self._executor.loans
        if self._key and device in self._executor.state.devices and loans.is_group_free(device):
            await loans.reattach(device, self._key.uri, self._patience)


def _owed(steps: Sequence[Step]) -> list[str]:
    """The devices that STEPS give back to the host."""
    return [step.device for step in steps if step.is_owed]


def _given_up_at(job: RunningJob, what: str) -> errors.HostpassError:
    if job.cancelled.is_set():
        return errors.Cancelled(f"The job was cancelled; {what}.")
    return errors.TimedOut(f"The job did not end within {job.seconds:g} seconds; {what}.")
