"""Operations from a caller's request to a job's end: plan, authorise, plan again, wait for the turn, execute."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from hostpassd import errors
from hostpassd.base.tasks import Tasks, first
from hostpassd.model.events import Event, JobForgotten, OperationRefused
from hostpassd.model.job import Job
from hostpassd.passthrough.execute import Executor
from hostpassd.passthrough.intents import IntentLog
from hostpassd.passthrough.jobs import RunningJob
from hostpassd.passthrough.permission import Authorise, Permission, checks, details, permission
from hostpassd.passthrough.request import Plan, Request
from hostpassd.passthrough.upkeep import Upkeep
from hostpassd.state import Changes, State
from hostpassd.state.find import one_device, one_machine

log = logging.getLogger(__name__)

# How long an ended job stays, in seconds, so that a caller that did not wait cannot miss its end.
JOB_STAYS = 30.0
JOBS_PER_USER = 16
# Seconds that a stop waits for jobs to be undone; the rest is in the intent log, for the next start.
STOP_PATIENCE = 10.0

# Refusals for what is not there. Anybody can make as many as they like, so they are no records.
_NOTHING_THERE = (
    errors.InvalidArgs,
    errors.NoSuchDevice,
    errors.AmbiguousDevice,
    errors.NoSuchMachine,
    errors.AmbiguousMachine,
)

# Refusals that what changed since a plan was shown can bring about.
_MAY_CHANGE = (
    errors.NoSuchDevice,
    errors.AmbiguousDevice,
    errors.AmbiguousMachine,
    errors.AlreadyAssigned,
    errors.NotAssigned,
)


class Operations:
    """All jobs."""

    def __init__(self, state: State, executor: Executor, emit: Callable[[Event], None], intents: IntentLog) -> None:
        self._state = state
        self._executor = executor
        self._emit = emit
        self._intents = intents
        self.upkeep = Upkeep(executor, intents, emit)
        self._running: dict[int, RunningJob] = {}
        self._tasks = Tasks()
        self._stopping = False
        self._last = 0

    @property
    def running(self) -> Sequence[RunningJob]:
        """The jobs that have not ended."""
        return tuple(self._running.values())

    @property
    def tasks(self) -> frozenset[asyncio.Task[None]]:
        """Theirs."""
        return frozenset(self._tasks)

    async def start(self, request: Request, authorise: Authorise) -> RunningJob:
        """Authorises REQUEST and starts its job. Raises what keeps it from being started; nothing is changed then."""
        try:
            return await self._start(request, authorise)
        except errors.HostpassError as error:
            self._tell_refusal(request, error)
            raise

    async def _start(self, request: Request, authorise: Authorise) -> RunningJob:
        plan = self._allowed_plan(request)
        permitted, asked = permission(self._state, plan), checks(self._state, plan)
        self._check_limit(request.uid)
        await self._intents.check(plan)
        await authorise(asked)
        again = self._allowed_plan(request)
        if not permitted.covers(permission(self._state, again)):
            raise errors.StalePlan("The device or the machine changed while authorisation was asked for: look again.")
        self._check_limit(request.uid)
        if self._stopping:
            raise errors.Failed("hostpassd is being stopped: try again when it runs.")
        return self._begin(again, permitted)

    def job(self, number: int) -> RunningJob:
        """The running job NUMBER. Error: Failed when it has ended."""
        job = self._running.get(number)
        if not job:
            raise errors.Failed(f"Job {number} has ended: there is nothing to cancel.")
        return job

    def moves(self, machine: str, device: str) -> bool:
        """Whether a job moves DEVICE to or from MACHINE (a UUID), or one that was not finished has done so."""
        if any(job.job.machine == machine and device in job.job.devices for job in self._running.values()):
            return True
        return any(left.machine == machine and device in left.devices for left in self._intents.unfinished)

    def notice(self, event: Event, batches: Sequence[Changes]) -> None:
        """Called for each event after the state has taken it in."""
        self.upkeep.notice(event, batches)

    async def stop(self) -> None:
        """Cancels all jobs, and returns when each is undone or left in the intent log: soon, whatever libvirt does."""
        self._stopping = True
        self.upkeep.stop()
        jobs = self.running
        for job in jobs:
            job.cancelled.set()
        await self._wait_for_jobs()
        for job in jobs:
            job.hurried.set()
        await self._wait_for_jobs()
        rest = {*self._tasks, *self.upkeep.tasks}
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest)

    async def _wait_for_jobs(self) -> None:
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=STOP_PATIENCE)

    def _allowed_plan(self, request: Request) -> Plan:
        """The plan of REQUEST as it may be executed. Errors: those of its `plan`, Blocked, StalePlan."""
        token = request.options.plan
        try:
            plan = request.plan(self._state)
        except errors.HostpassError as error:
            if token and isinstance(error, _MAY_CHANGE):
                raise errors.StalePlan(f"The plan does not hold any more: {error}") from None
            raise
        if token and plan.token != token:
            raise errors.StalePlan("What the plan rests on has changed: ask for a new plan and look at it.")
        plan.check_allowed()
        return plan

    def _check_limit(self, uid: int) -> None:
        running = Counter(job.job.started_by_uid for job in self._running.values())
        if running[uid] >= JOBS_PER_USER:
            raise errors.LimitExceeded(f"You have {running[uid]} jobs running: wait until one of them ends.")

    def _begin(self, plan: Plan, permitted: Permission) -> RunningJob:
        self._last += 1
        machine = plan.machine.uuid if plan.machine else ""
        seconds = plan.request.options.timeout
        row = Job(
            self._last,
            plan.operation,
            machine,
            plan.asked,
            plan.devices,
            plan.request.uid,
            step_count=len(plan.steps),
            deadline=int((time.time() + seconds) * 1e6),
        )
        told = details(self._state, plan, plan.asked[0], plan.overridden)
        job = RunningJob(row, self._emit, seconds, told)
        self._running[job.number] = job
        self._tasks.start(self._run(plan, permitted, job))
        return job

    async def _run(self, plan: Plan, permitted: Permission, job: RunningJob) -> None:
        result: dict[str, object] = {"state": "done"}
        try:
            await self._run_alone(plan, permitted, job)
        except errors.HostpassError as error:
            result = {"state": "cancelled" if isinstance(error, errors.Cancelled) else "failed", "error": error}
        except Exception:
            log.exception("Job %d ended with a fault of hostpassd.", job.number)
            text = "hostpassd made a mistake: see its log, and look at the device before trying again."
            result = {"state": "failed", "error": errors.Failed(text)}
        finally:
            del self._running[job.number]
        job.tell(**result, step=None, deadline=0)
        job.ended.set()
        self.upkeep.tidy_soon(retry=True)
        asyncio.get_running_loop().call_later(JOB_STAYS, self._emit, JobForgotten(job.number))

    async def _run_alone(self, plan: Plan, permitted: Permission, job: RunningJob) -> None:
        """Waits for its turn; plans afresh then, because the job before may have changed everything."""
        alone = contextlib.AsyncExitStack()
        turn = asyncio.ensure_future(self._turn(alone, plan.locks))
        try:
            await first(turn, over=job.cancelled, timeout=job.left)
            if not turn.done() and not job.cancelled.is_set():
                who = "libvirt is still at" if self.upkeep.left_on(plan.locks) else "there was no end in time of"
                raise errors.TimedOut(f"The turn did not come: {who} an earlier job on the same device or group.")
            job.check()
            turn.result()
            again = self._allowed_plan(plan.request)
            if not permitted.covers(permission(self._state, again)):
                raise errors.StalePlan("The device or the machine changed before the job's turn came: look again.")
            await self._executor.run(again, job)
        finally:
            turn.cancel()
            await asyncio.wait({turn})
            left = self._intents.left(job.number)
            if job.still_at_it and left:
                self.upkeep.take_over(left, alone.pop_all())
            await alone.aclose()

    async def _turn(self, alone: contextlib.AsyncExitStack, locks: tuple[str, ...]) -> None:
        """Takes LOCKS into ALONE, after one more try at what was left of earlier operations that have one of them."""
        tried: set[int] = set()
        while True:
            await alone.enter_async_context(self._executor.alone(locks))
            left = [o for o in self.upkeep.left_on(locks) if o.number not in tried and self.upkeep.is_reachable(o)]
            if not left:
                return
            await alone.aclose()
            tried |= {other.number for other in left}
            await self.upkeep.try_once_more(left)

    def _tell_refusal(self, request: Request, error: errors.HostpassError) -> None:
        if isinstance(error, _NOTHING_THERE):
            log.debug("%s by user %d refused: %s", request.operation, request.uid, error)
            return
        devices: tuple[str, ...] = ()
        machine = None
        with contextlib.suppress(errors.HostpassError):
            devices = tuple(one_device(self._state, text).name for text in request.devices)
        with contextlib.suppress(errors.HostpassError):
            machine = one_machine(self._state, request.machine)
        uuid = machine.uuid if machine else ""
        spelt = ", ".join(request.devices)
        self._emit(OperationRefused(request.operation, uuid, devices, spelt, request.uid, error))
