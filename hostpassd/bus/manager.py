"""The methods of Manager and Job: calls in, the rest of the daemon asked, answers out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from hostpassd import errors, names
from hostpassd.bus import options
from hostpassd.bus.access import Access
from hostpassd.bus.present import candidate_row, plan_row
from hostpassd.bus.publisher import Publisher
from hostpassd.bus.roms import RomFiles
from hostpassd.bus.router import Call, Router, Rows
from hostpassd.bus.spelling import device_text, machine_text
from hostpassd.model.events import CancelAnswered, Event
from hostpassd.passthrough.assign import Assign
from hostpassd.passthrough.candidates import candidates, ranks
from hostpassd.passthrough.dismiss import Dismiss
from hostpassd.passthrough.jobs import RunningJob
from hostpassd.passthrough.operations import Operations
from hostpassd.passthrough.permission import Check, checks
from hostpassd.passthrough.plan import check_number
from hostpassd.passthrough.request import Options, Request
from hostpassd.state import State, find


class Sync(Protocol):
    """Has the state catch up with what is outside."""

    async def sync(self) -> None: ...
    async def rescan(self) -> None: ...


class ManagerMethods:
    """Handles the calls on the Manager and on Jobs."""

    def __init__(
        self,
        state: State,
        router: Router,
        access: Access,
        operations: Operations,
        publisher: Publisher,
        sync: Sync,
        emit: Callable[[Event], None],
        default: Options,
        roms: RomFiles,
    ) -> None:
        self._state = state
        self._router = router
        self._access = access
        self._operations = operations
        self._publisher = publisher
        self._sync = sync
        self._emit = emit
        self._default = default
        self._roms = roms
        router.handle(names.MANAGER, "FindDevices", self._find_devices, reads=True)
        router.handle(names.MANAGER, "GetMachine", self._get_machine, quick=True)
        router.handle(names.MANAGER, "ListCandidates", self._list_candidates, reads=True)
        router.handle(names.MANAGER, "Assign", self._assign)
        router.handle(names.MANAGER, "Dismiss", self._dismiss)
        router.handle(names.MANAGER, "PlanAssign", self._plan_assign, reads=True)
        router.handle(names.MANAGER, "PlanDismiss", self._plan_dismiss, reads=True)
        router.handle(names.MANAGER, "Sync", self._handle_sync)
        router.handle(names.MANAGER, "Rescan", self._handle_rescan)
        router.handle(names.JOB, "Cancel", self._cancel)

    async def _find_devices(self, call: Call) -> Sequence[Any]:
        text = await device_text(call.args[0])
        return [[names.device_path(name) for name in find.find_devices(self._state, text)]]

    async def _get_machine(self, call: Call) -> Sequence[Any]:
        return [names.machine_path(find.one_machine(self._state, machine_text(call.args[0])).uuid)]

    async def _list_candidates(self, call: Call) -> Rows:
        text, wanted = call.args
        everything = options.given(wanted, options.LIST_CANDIDATES).get("all", False)
        machine = find.one_machine(self._state, machine_text(text))
        pieces = self._router.pieces
        ranked = sorted(filter(None, await pieces.all_of(ranks(self._state))))
        steps = candidates(self._state, machine, [name for _, name in ranked], everything=everything)
        found = sorted(filter(None, await pieces.all_of(steps)), key=lambda each: not each.possible)
        answers = await self._access.would_each(call, [each.checks for each in found])
        return Rows(candidate_row(each, answer) for each, answer in zip(found, answers, strict=True))

    async def _assign(self, call: Call) -> Sequence[Any]:
        return await self._operate(call, Assign, options.ASSIGN)

    async def _dismiss(self, call: Call) -> Sequence[Any]:
        return await self._operate(call, Dismiss, options.DISMISS)

    async def _plan_assign(self, call: Call) -> Sequence[Any]:
        return await self._preview(call, Assign, options.ASSIGN)

    async def _plan_dismiss(self, call: Call) -> Sequence[Any]:
        return await self._preview(call, Dismiss, options.DISMISS)

    async def _request(self, call: Call, kind: type[Request], known: Mapping[str, str], uid: int) -> Request:
        machine, devices, given = call.args
        check_number(devices)
        wanted = options.read(given, known, self._default)
        if wanted.rom_file is not None:
            wanted = dataclasses.replace(wanted, rom_file=await self._roms.find(wanted.rom_file))
        return kind(machine_text(machine), tuple([await device_text(text) for text in devices]), wanted, uid)

    async def _preview(self, call: Call, kind: type[Request], known: Mapping[str, str]) -> Sequence[Any]:
        """The dry run: nobody is asked, nothing is done."""
        plan = (await self._request(call, kind, known, 0)).plan(self._state)
        answer = await self._access.would(call, checks(self._state, plan))
        return [plan_row(self._state, plan, answer)]

    async def _operate(self, call: Call, kind: type[Request], known: Mapping[str, str]) -> Sequence[Any]:
        return await self._run(call, await self._request(call, kind, known, await self._router.uid_of(call.sender)))

    async def _run(self, call: Call, request: Request) -> Sequence[Any]:
        async def authorise(asked: Sequence[Check]) -> None:
            await self._access.check(call, asked)

        running = await self._operations.start(request, authorise)
        if request.options.wait:
            await running.ended.wait()
        self._publisher.flush()
        job = running.job
        if request.options.wait and job.error:
            raise job.error
        return [names.job_path(job.number)]

    async def _handle_sync(self, call: Call) -> Sequence[Any]:
        await self._sync.sync()
        self._publisher.flush()
        return [self._publisher.generation]

    async def _handle_rescan(self, call: Call) -> Sequence[Any]:
        await self._sync.rescan()
        self._publisher.flush()
        return []

    async def _cancel(self, call: Call) -> Sequence[Any]:
        running = self._operations.job(int(call.path.rpartition("/")[2]))
        uid = await self._router.uid_of(call.sender)
        try:
            await self._cancel_as(call, running, uid)
        except errors.HostpassError as error:
            self._emit(CancelAnswered(running.job, uid, error))
            raise
        self._emit(CancelAnswered(running.job, uid))
        return []

    async def _cancel_as(self, call: Call, running: RunningJob, uid: int) -> None:
        if uid != running.job.started_by_uid:
            await self._access.check(call, [("cancel-others", running.details)])
        running.cancelled.set()
        await running.ended.wait()
        self._publisher.flush()
        job = running.job
        if job.state != "cancelled":
            why = f": {job.error}" if job.error else "."
            raise errors.Failed(f"Job {job.number} could not be cancelled any more, it is {job.state}{why}")
