"""The methods of Manager and Job: calls in, the rest of the daemon asked, answers out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from hostpassd import errors, names
from hostpassd.bus import options
from hostpassd.bus.access import Access
from hostpassd.bus.present import plan_row
from hostpassd.bus.publisher import Publisher
from hostpassd.bus.router import Call, Router
from hostpassd.passthrough.execute import Control
from hostpassd.passthrough.operations import Check, Operations, Wish
from hostpassd.passthrough.plan import Options
from hostpassd.state import State, find


class ManagerMethods:
    """Handles the calls on the Manager and on Jobs."""

    def __init__(
        self,
        state: State,
        router: Router,
        access: Access,
        operations: Operations,
        publisher: Publisher,
        sync: Callable[[], Awaitable[None]],
        rescan: Callable[[], Awaitable[None]],
        default: Options,
    ) -> None:
        self._state = state
        self._router = router
        self._access = access
        self._operations = operations
        self._publisher = publisher
        self._sync = sync
        self._rescan = rescan
        self._default = default
        router.handle(names.MANAGER, "FindDevices", self._find_devices)
        router.handle(names.MANAGER, "GetMachine", self._get_machine, quick=True)
        router.handle(names.MANAGER, "Assign", self._assign)
        router.handle(names.MANAGER, "Dismiss", self._dismiss)
        router.handle(names.MANAGER, "PlanAssign", self._plan_assign)
        router.handle(names.MANAGER, "PlanDismiss", self._plan_dismiss)
        router.handle(names.MANAGER, "Sync", self._handle_sync)
        router.handle(names.MANAGER, "Rescan", self._handle_rescan)
        router.handle(names.JOB, "Cancel", self._cancel)

    async def _find_devices(self, call: Call) -> Sequence[Any]:
        text = await find.followed(call.args[0])
        return [[names.device_path(name) for name in find.find_devices(self._state, text)]]

    async def _get_machine(self, call: Call) -> Sequence[Any]:
        return [names.machine_path(find.one_machine(self._state, call.args[0]).uuid)]

    async def _assign(self, call: Call) -> Sequence[Any]:
        return await self._operate(call, "assign", options.ASSIGN)

    async def _dismiss(self, call: Call) -> Sequence[Any]:
        return await self._operate(call, "dismiss", options.DISMISS)

    async def _plan_assign(self, call: Call) -> Sequence[Any]:
        return await self._preview(call, "assign", options.PLAN_ASSIGN)

    async def _plan_dismiss(self, call: Call) -> Sequence[Any]:
        return await self._preview(call, "dismiss", options.PLAN_DISMISS)

    async def _preview(self, call: Call, operation: str, known: Mapping[str, str]) -> Sequence[Any]:
        """The dry run: nobody is asked, nothing is done."""
        machine, device, given = call.args
        wish = Wish(operation, machine, await find.followed(device), options.read(given, known, self._default), 0)
        plan = self._operations.plan(wish)
        answer = await self._access.would(call, self._operations.checks(plan, wish.options))
        return [plan_row(plan, wish.options, answer)]

    async def _operate(self, call: Call, operation: str, known: Mapping[str, str]) -> Sequence[Any]:
        machine, device, given = call.args
        wish = Wish(
            operation,
            machine,
            await find.followed(device),
            options.read(given, known, self._default),
            await self._router.uid_of(call.sender),
        )

        async def authorise(checks: Sequence[Check]) -> None:
            await self._access.check(call, checks)

        control = await self._operations.start(wish, authorise)
        if wish.options.wait:
            await control.ended.wait()
        self._publisher.flush()
        job = control.job
        if wish.options.wait and job.state != "done":
            raise errors.by_name(job.error_name.removeprefix(names.ERROR_PREFIX), job.error_message)
        return [names.job_path(job.number)]

    async def _handle_sync(self, call: Call) -> Sequence[Any]:
        await self._sync()
        self._publisher.flush()
        return [self._publisher.generation]

    async def _handle_rescan(self, call: Call) -> Sequence[Any]:
        await self._rescan()
        self._publisher.flush()
        return []

    async def _cancel(self, call: Call) -> Sequence[Any]:
        control = self._operations.control(int(call.path.rpartition("/")[2]))
        uid = await self._router.uid_of(call.sender)
        try:
            await self._cancel_as(call, control, uid)
        except errors.HostpassError as error:
            self._operations.audit_cancel(control.job, uid, error)
            raise
        self._operations.audit_cancel(control.job, uid)
        return []

    async def _cancel_as(self, call: Call, control: Control, uid: int) -> None:
        if uid != control.job.started_by_uid:
            await self._access.check(call, [(names.ACTION_CANCEL_OTHERS, control.details)])
        control.cancelled.set()
        await control.ended.wait()
        self._publisher.flush()
        if control.job.state != "cancelled":
            why = f": {control.job.error_message}" if control.job.error_message else ""
            raise errors.Failed(
                f"job {control.job.number} could not be cancelled any more, it is {control.job.state}{why}"
            )
