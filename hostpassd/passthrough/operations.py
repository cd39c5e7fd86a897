"""Assign and dismiss from a caller's wish to a job's end: look up, authorise, look up again, plan, execute."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from hostpassd import errors, names
from hostpassd.audit import AuditLog
from hostpassd.base.tasks import end_daemon_on_error
from hostpassd.model.codes import Blocker
from hostpassd.model.events import Event, HypervisorChanged, JobForgotten, MachineGone, MachineRead, MachinesListed
from hostpassd.model.job import Job
from hostpassd.model.machine import Machine, MachineKey, Missing
from hostpassd.passthrough import plan as plans
from hostpassd.passthrough.execute import Control, Executor
from hostpassd.passthrough.intent_rows import Unfinished
from hostpassd.passthrough.intents import IntentLog
from hostpassd.passthrough.plan import Attach, Options, Plan, Release
from hostpassd.state import State, find

log = logging.getLogger(__name__)

# How long an ended job stays, in seconds, so that a caller that did not wait cannot miss its end.
JOB_STAYS = 30.0
JOBS_PER_USER = 16
# Seconds between two attempts at giving a device back, whatever happens meanwhile: the first pause, and the longest.
UPKEEP_PAUSES = 1.0, 60.0
# The same between two attempts at what else was left, when neither a job nor a new connection brings about one.
RETRY_PAUSES = 60.0, 3600.0
# Seconds that a stop waits for jobs to be undone; the rest is in the intent log, for the next start.
STOP_PATIENCE = 10.0
# Seconds between two attempts to write the intent log, while it cannot be written and nobody asks for an operation.
LOG_RETRY = 10.0

# What puts something in order.
Work = Callable[[], Coroutine[Any, Any, None]]

# An action, and what polkit, its rules and its prompts are told of one device that it is about.
Check = tuple[str, Mapping[str, str]]

# Asks about all devices of a plan; raises NotAuthorized and its kin.
Authorise = Callable[[Sequence[Check]], Awaitable[None]]

# Of what polkit is told, what no permission rests on: how things stand at present. What there is to say of the
# companions, of a machine that runs or not, and of what was overridden, a Permission says more exactly.
_PRESENT = frozenset({"device.driver", "device.companions", "machine.state", "override"})

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


@dataclasses.dataclass(frozen=True, slots=True)
class Wish:
    """What a caller asked for, as it was spelt."""

    operation: str  # assign, dismiss
    machine: str
    device: str
    options: Options
    uid: int


@dataclasses.dataclass(frozen=True, slots=True)
class Permission:
    """What a caller is authorised for: these devices, to or from this machine, past these blockers."""

    machine: MachineKey
    devices: frozenset[tuple[str, int, frozenset[tuple[str, str]]]]  # name, instance, what else it was authorised by
    attaches: bool  # whether something comes into the running machine: who asked for that is not served without it
    asks_guest: bool  # whether something is taken out of it, which the guest may have let go of by itself meanwhile
    overridden: frozenset[Blocker]

    def covers(self, other: Permission) -> bool:
        """Whether whoever has this may do what OTHER is for: the same, or less."""
        within = other.devices <= self.devices and other.overridden <= self.overridden
        same = (other.machine, other.attaches) == (self.machine, self.attaches)
        return within and same and other.asks_guest <= self.asks_guest


class Operations:
    """All jobs."""

    def __init__(
        self, state: State, executor: Executor, emit: Callable[[Event], None], intents: IntentLog, audit_log: AuditLog
    ) -> None:
        self._state = state
        self._audit_log = audit_log
        self._executor = executor
        self._emit = emit
        self._intents = intents
        self._controls: dict[int, Control] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._tidying: asyncio.Task[None] | None = None
        self._upkeep: dict[str, asyncio.Task[None]] = {}  # what puts in order what jobs left, by device or job
        self._again: dict[str, Work] = {}  # what is to be done once more when one of these has ended
        self._connected: set[str] = set()  # the hypervisors that have not listed their machines since they were
        self._later: asyncio.TimerHandle | None = None  # when what was left is tried again
        self._pauses: dict[str, float] = {}  # the last one, by device; '' for what else was left
        self._stopping = False
        self._untidy = False
        self._retry = False
        self._last = 0

    async def start(self, wish: Wish, authorise: Authorise) -> Control:
        """Authorises WISH and starts its job. Raises what keeps it from being started; nothing is changed then."""
        try:
            return await self._start(wish, authorise)
        except errors.HostpassError as error:
            self._audit_refusal(wish, error)
            raise

    async def _start(self, wish: Wish, authorise: Authorise) -> Control:
        plan = self._allowed_plan(wish)
        permission, checks = self._permission(plan, wish.options), self.checks(plan, wish.options)
        self._check_limit(wish.uid)
        await self._intents.check(plan)
        await authorise(checks)
        again = self._allowed_plan(wish)
        if not permission.covers(self._permission(again, wish.options)):
            raise errors.StalePlan("the device or the machine changed while authorisation was asked for: look again")
        self._check_limit(wish.uid)
        if self._stopping:
            raise errors.Failed("hostpassd is being stopped: try again when it runs")
        return self._begin(wish, again, permission)

    def control(self, number: int) -> Control:
        """The running job NUMBER. Error: Failed when it has ended."""
        control = self._controls.get(number)
        if not control:
            raise errors.Failed(f"job {number} has ended: there is nothing to cancel")
        return control

    def moves(self, machine: str, device: str) -> bool:
        """Whether a job moves DEVICE to or from MACHINE (a UUID), or one that was not finished has done so."""
        if any(c.job.machine == machine and device in c.devices for c in self._controls.values()):
            return True
        return any(left.machine == machine and device in _devices_of(left) for left in self._intents.unfinished)

    def notice(self, event: Event) -> None:
        """Called for each event after the state has taken it in."""
        if isinstance(event, HypervisorChanged):
            self._connected.add(event.uri)
        if isinstance(event, MachinesListed | MachineRead | MachineGone):
            # Not at each reading: a retry has its machine read. Not at each list: anybody may ask for one.
            back = isinstance(event, MachinesListed) and event.uri in self._connected
            if isinstance(event, MachinesListed):
                self._connected.discard(event.uri)
            self._tidy_soon(retry=back)

    async def keep_log(self) -> None:
        """Has the intent log written at the start, and again whenever that has failed, until cancelled.

        What was left is tried again each time that it could be.
        """
        while True:
            with contextlib.suppress(errors.StateFolderError):
                await self._intents.catch_up()
                self._tidy_soon(retry=True)
            await self._intents.trouble.wait()
            await asyncio.sleep(LOG_RETRY)

    async def stop(self) -> None:
        """Cancels all jobs, and returns when each is undone or left in the intent log: soon, whatever libvirt does."""
        self._stopping = True
        if self._later:
            self._later.cancel()
        controls = list(self._controls.values())
        for control in controls:
            control.cancelled.set()
        await self._wait_for_jobs()
        for control in controls:
            control.hurried.set()
        await self._wait_for_jobs()
        rest = {*self._tasks, *self._upkeep.values(), *filter(None, [self._tidying])}
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest)

    async def _wait_for_jobs(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_PATIENCE)

    def _tidy_soon(self, *, retry: bool) -> None:
        """Gives back what is idle, soon; RETRY: and tries again what was left."""
        if not (self._intents.lent or (retry and self._intents.unfinished)):
            return
        self._untidy, self._retry = True, self._retry or retry
        if self._tidying is None or self._tidying.done():
            self._tidying = asyncio.get_running_loop().create_task(self._tidy())

    async def _tidy(self) -> None:
        while self._untidy:
            retry, self._untidy, self._retry = self._retry, False, False
            for left in self._intents.unfinished if retry else ():
                self._look_after(_job_of(left), functools.partial(self._recover_alone, left))
            for device, uri in self._executor.idle():
                if self._reachable(uri):
                    self._look_after(device, functools.partial(self._give_back, device))

    def _look_after(self, what: str, work: Work) -> asyncio.Task[None]:
        """WORK in a task of its own, which nobody's giving up ends: libvirt can be at it for as long as it likes."""
        if what in self._upkeep:
            self._again[what] = work
        else:
            self._upkeep[what] = asyncio.get_running_loop().create_task(self._safely(work))
            self._upkeep[what].add_done_callback(lambda _: self._looked_after(what))
        return self._upkeep[what]

    def _looked_after(self, what: str) -> None:
        del self._upkeep[what]
        if (work := self._again.pop(what, None)) and not self._stopping:
            self._look_after(what, work)

    async def _safely(self, work: Work) -> None:
        try:
            await work()
        except Exception:
            log.exception("what was left of earlier operations could not be put in order")

    async def _give_back(self, device: str) -> None:
        await self._executor.give_back(device)
        if device in self._intents.lent:
            # Not again at once: what cannot be done may itself bring about the events for which it is tried.
            await asyncio.sleep(self._pause(device, UPKEEP_PAUSES))
        else:
            self._pauses.pop(device, None)

    def _pause(self, what: str, pauses: tuple[float, float]) -> float:
        """Seconds until WHAT is tried again: twice as long each time, from the first of PAUSES to the second."""
        first, longest = pauses
        self._pauses[what] = min(2 * self._pauses.get(what, first / 2), longest)
        return self._pauses[what]

    def _retry_later(self) -> None:
        """Has what was left tried again after a while."""
        if self._later is None and not self._stopping:
            pause = self._pause("", RETRY_PAUSES)
            self._later = asyncio.get_running_loop().call_later(pause, self._retry_now)

    def _retry_now(self) -> None:
        self._later = None
        self._tidy_soon(retry=True)

    async def _recover_alone(self, left: Unfinished) -> None:
        alone = contextlib.AsyncExitStack()
        await alone.enter_async_context(self._executor.alone(left.groups))
        await self._recover(left, alone)

    async def _recover(self, left: Unfinished, alone: contextlib.AsyncExitStack) -> None:
        """Finishes or undoes what was LEFT, if its hypervisor can be reached. ALONE has the locks, ours from now on."""
        async with alone:
            if not self._intents.left(left.number) or not self._reachable(left.uri):
                return
            await self._executor.recover(left)
            if self._intents.left(left.number):
                self._retry_later()
            else:
                self._pauses.pop("", None)
                for device in _devices_of(left):
                    self._audit_recovery(left, device)
        self._tidy_soon(retry=False)

    def _reachable(self, uri: str) -> bool:
        hypervisor = self._state.hypervisors.get(uri)
        return hypervisor is not None and hypervisor.connected and hypervisor.listed

    def _left_on(self, groups: tuple[str, ...]) -> list[Unfinished]:
        """What was left of earlier operations on one of GROUPS."""
        return [left for left in self._intents.unfinished if not set(left.groups).isdisjoint(groups)]

    def _allowed_plan(self, wish: Wish) -> Plan:
        """The plan of WISH as it may be executed. Errors: those of `plan`, Blocked, StalePlan."""
        options = wish.options
        try:
            plan = self.plan(wish)
        except errors.HostpassError as error:
            if options.plan and isinstance(error, _MAY_CHANGE):
                raise errors.StalePlan(f"the plan does not hold any more: {error}") from None
            raise
        if options.plan and plan.token != options.plan:
            raise errors.StalePlan("what the plan rests on has changed: ask for a new plan and look at it")
        plans.check_allowed(plan, options.override)
        return plan

    def plan(self, wish: Wish) -> Plan:
        """What WISH would do, blocked or not. Nothing is changed, nobody is asked."""
        machine = find.one_machine(self._state, wish.machine)
        if wish.operation == "assign":
            return plans.plan_assign(self._state, machine, find.one_device(self._state, wish.device), wish.options)
        if row := find.missing_by_id(self._state, machine, wish.device):
            return self._plan_missing(machine, (row,), wish.options)
        try:
            device = find.one_device(self._state, wish.device)
            return plans.plan_dismiss(self._state, machine, device, wish.options)
        except (errors.NoSuchDevice, errors.NotAssigned, errors.StalePlan):
            rows = find.missing_at(self._state, machine, wish.device, wish.options.instance)
            if not rows:
                raise
        return self._plan_missing(machine, rows, wish.options)

    def _plan_missing(self, machine: Machine, rows: Sequence[Missing], options: Options) -> Plan:
        last = self._state.last_place(machine.key, rows[0].id)
        if options.instance not in (None, last[1]):
            raise errors.StalePlan(f"{rows[0].id} is not the instance {options.instance}: look again")
        return plans.plan_dismiss_missing(machine, rows, last, options)

    def checks(self, plan: Plan, options: Options) -> list[Check]:
        """What each device of PLAN is to be authorised for, by itself."""
        return [
            (_action_of(plan, past), self._details(plan, name, past))
            for name, past in self._overridden(plan, options).items()
        ]

    def _overridden(self, plan: Plan, options: Options) -> dict[str, list[Blocker]]:
        """The blockers that the caller goes past, by the device of PLAN that is, or is above, what they name."""
        found: dict[str, list[Blocker]] = {name: [] for name in plan.devices}
        for blocker in plan.overridden(options.override):
            line = (blocker.device, *(above.name for above in self._state.ancestors(blocker.device)))
            found[next((name for name in line if name in found), plan.device)].append(blocker)
        return found

    def _details(self, plan: Plan, name: str, overridden: Sequence[Blocker]) -> dict[str, str]:
        """What polkit, its rules and its prompt are told of the device NAME of PLAN."""
        machine = self._state.copies[plan.machine]
        device = self._state.device(name)
        if device and (name, device.instance) not in zip(plan.devices, plan.instances, strict=True):
            device = None  # another one, where something that is missing was last
        facts = (device.usb or device.pci) if device else None
        product = getattr(facts, "product_id", getattr(facts, "device_id", None))
        return {
            "device.name": _one_word(name),
            "device.kind": device.kind if device else "",
            "device.label": device.label if device else name,
            "device.vendor-id": f"{facts.vendor_id:04x}" if facts else "",
            "device.product-id": f"{product:04x}" if product is not None else "",
            "device.serial": device.serial if device else "",
            "device.driver": device.driver if device else "",
            "device.companions": " ".join(d for d in plan.devices if d != name),
            "machine.name": machine.name,
            "machine.uuid": machine.uuid,
            "machine.state": machine.state,
            "operation": plan.operation,
            "override": " ".join(sorted({blocker.code for blocker in overridden})),
        }

    def _permission(self, plan: Plan, options: Options) -> Permission:
        """The permission that PLAN takes, as things are now."""
        details = [self._details(plan, name, ()) for name in plan.devices]
        counts = [frozenset((key, value) for key, value in row.items() if key not in _PRESENT) for row in details]
        return Permission(
            plan.machine,
            frozenset(zip(plan.devices, plan.instances, counts, strict=True)),
            any(isinstance(step, Attach) for step in plan.steps),
            any(isinstance(step, Release) for step in plan.steps),
            frozenset(plan.overridden(options.override)),
        )

    def _check_limit(self, uid: int) -> None:
        running = Counter(control.job.started_by_uid for control in self._controls.values())
        if running[uid] >= JOBS_PER_USER:
            raise errors.LimitExceeded(f"you have {running[uid]} jobs running: wait until one of them ends")

    def _begin(self, wish: Wish, plan: Plan, permission: Permission) -> Control:
        self._last += 1
        job = Job(self._last, plan.operation, plan.machine.uuid, plan.device, wish.uid)
        details = self._details(plan, plan.device, plan.overridden(wish.options.override))
        control = Control(job, self._emit, wish.options.timeout, plan.devices, details)
        self._controls[job.number] = control
        task = asyncio.get_running_loop().create_task(self._run(wish, plan, permission, control))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(end_daemon_on_error)
        return control

    async def _run(self, wish: Wish, plan: Plan, permission: Permission, control: Control) -> None:
        result: dict[str, object] = {"state": "done", "progress": 1.0, "step": ""}
        try:
            await self._run_alone(wish, plan, permission, control)
        except errors.Cancelled as error:
            result = {"state": "cancelled", "error_name": names.ERROR_PREFIX + error.name, "error_message": str(error)}
        except errors.HostpassError as error:
            result = {"state": "failed", "error_name": names.ERROR_PREFIX + error.name, "error_message": str(error)}
        except Exception:
            log.exception("job %d ended with a fault of hostpassd", control.job.number)
            text = "hostpassd made a mistake: see its journal, and look at the device before trying again"
            result = {"state": "failed", "error_name": names.ERROR_PREFIX + "Failed", "error_message": text}
        finally:
            del self._controls[control.job.number]
        control.tell(**result)
        for device in control.devices:
            self._audit(control.job, device)
        control.ended.set()
        self._tidy_soon(retry=True)
        asyncio.get_running_loop().call_later(JOB_STAYS, self._emit, JobForgotten(control.job.number))

    async def _run_alone(self, wish: Wish, plan: Plan, permission: Permission, control: Control) -> None:
        """Waits for its turn; plans afresh then, because the job before may have changed everything."""
        alone = contextlib.AsyncExitStack()
        turn = asyncio.ensure_future(self._turn(alone, plan.groups))
        cancel = asyncio.ensure_future(control.cancelled.wait())
        try:
            await asyncio.wait({turn, cancel}, timeout=control.left, return_when=asyncio.FIRST_COMPLETED)
            if not turn.done() and not control.cancelled.is_set():
                who = "libvirt is still at" if self._left_on(plan.groups) else "there was no end in time of"
                raise errors.TimedOut(f"{who} an earlier job on the same device or group: try again")
            control.check()
            turn.result()
            again = self._allowed_plan(wish)
            if not permission.covers(self._permission(again, wish.options)):
                raise errors.StalePlan("the device or the machine changed before the job's turn came: look again")
            await self._executor.run(again, control)
        finally:
            for waiting in (turn, cancel):
                waiting.cancel()
            await asyncio.wait({turn, cancel})
            left = self._intents.left(control.job.number)
            if control.still_at_it and left:
                # The locks stay with what libvirt is at.
                self._look_after(f"call of {_job_of(left)}", functools.partial(self._recover, left, alone.pop_all()))
            await alone.aclose()

    async def _turn(self, alone: contextlib.AsyncExitStack, groups: tuple[str, ...]) -> None:
        """Takes the locks of GROUPS into ALONE, after one more try at what was left of earlier operations on them."""
        tried: set[int] = set()
        while True:
            await alone.enter_async_context(self._executor.alone(groups))
            left = [o for o in self._left_on(groups) if o.number not in tried and self._reachable(o.uri)]
            if not left:
                return
            await alone.aclose()
            for other in left:
                tried.add(other.number)
                # Whoever waits for this turn can stop waiting: that ends no recovery.
                await asyncio.wait({self._look_after(_job_of(other), functools.partial(self._recover_alone, other))})

    def audit_cancel(self, job: Job, uid: int, error: errors.HostpassError | None = None) -> None:
        """Into the journal: UID cancelled JOB, or was refused with ERROR."""
        text = f"cancel of job {job.number}, the {job.operation} of {job.device}"
        fields = {
            "device": job.device,
            "machine": job.machine,
            "machine_name": self._state.machine_name(job.machine),
            "operation": "cancel",
            "job": str(job.number),
        }
        if error:
            self._audit_log.refusal(uid, f"{text} refused ({error})", **fields, result=_full_name(error))
        else:
            self._audit_log.write(names.MESSAGE_OPERATION, text, **fields, result="done", uid=str(uid))

    def _audit_recovery(self, left: Unfinished, device: str) -> None:
        self._audit_log.write(
            names.MESSAGE_OPERATION,
            f"{left.operation} of {device} was not finished, and what it left has been put in order",
            device=device,
            machine=left.machine,
            machine_name=self._state.machine_name(left.machine),
            operation=left.operation,
            job=str(left.number) if left.number > 0 else "",
            result="recovered",
        )

    def _audit(self, job: Job, device: str) -> None:
        why = f" ({job.error_message})" if job.error_message else ""
        along = "" if device == job.device else f", along with {job.device}"
        self._audit_log.write(
            names.MESSAGE_OPERATION,
            f"{job.operation} of {device}{along}: {job.state}{why}",
            device=device,
            machine=job.machine,
            machine_name=self._state.machine_name(job.machine),
            operation=job.operation,
            job=str(job.number),
            result=job.error_name or job.state,
            uid=str(job.started_by_uid),
        )

    def _audit_refusal(self, wish: Wish, error: errors.HostpassError) -> None:
        if isinstance(error, _NOTHING_THERE):
            log.debug("%s by user %d refused: %s", wish.operation, wish.uid, error)
            return
        device, machine = "", None
        with contextlib.suppress(errors.HostpassError):
            device = find.one_device(self._state, wish.device).name
        with contextlib.suppress(errors.HostpassError):
            machine = find.one_machine(self._state, wish.machine)
        self._audit_log.refusal(
            wish.uid,
            f"{wish.operation} of {device or wish.device} refused ({error})",
            device=device,
            spelt="" if device else wish.device,
            machine=machine.uuid if machine else "",
            machine_name=machine.shown_name if machine else "",
            operation=wish.operation,
            result=_full_name(error),
        )


def _job_of(left: Unfinished) -> str:
    """What names the job that left it, and no device."""
    return f"job {left.number}"


def _devices_of(left: Unfinished) -> list[str]:
    """The devices that an unfinished operation moves, each once."""
    return list(dict.fromkeys(step.device for step in left.steps))


def _full_name(error: errors.HostpassError) -> str:
    """The bus name of ERROR."""
    return (names.STANDARD_ERROR_PREFIX if error.standard else names.ERROR_PREFIX) + error.name


def _one_word(name: str) -> str:
    """NAME as one word: the id of a missing thing is a claim of whoever wrote the machine's configuration."""
    return re.sub(r"[^!-~]", "\N{REPLACEMENT CHARACTER}", name)


def _action_of(plan: Plan, overridden: Sequence[Blocker]) -> str:
    """The polkit action that a device of PLAN needs, past these blockers of its own."""
    if plan.operation == "dismiss":
        return names.ACTION_DISMISS
    return names.ACTION_ASSIGN_OVERRIDE if overridden else names.ACTION_ASSIGN
