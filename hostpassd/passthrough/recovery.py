"""Finishes or undoes operations that were interrupted: the daemon died, or the hypervisor was lost."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from hostpassd import errors
from hostpassd.passthrough.execute import GRACE, Executor
from hostpassd.passthrough.intent_rows import Unfinished
from hostpassd.passthrough.intents import IntentLog
from hostpassd.passthrough.outcome import REFUSALS, Failure, has_asked, is_over
from hostpassd.passthrough.plan import lock_of
from hostpassd.passthrough.steps import Attach, Reattach, Step, Unstore
from hostpassd.passthrough.waiting import Patience, StillAtIt

log = logging.getLogger(__name__)


class Recovery:
    """Compares what the intent log says with what shows, and finishes or undoes the difference.

    It says to the log what cannot be put in order, once for as long as that stays the same.
    """

    def __init__(self, executor: Executor, intents: IntentLog) -> None:
        self._executor = executor
        self._state = executor.state
        self._loans = executor.loans
        self._intents = intents
        self._said: dict[int | str, str] = {}  # what was logged last of an operation or device that is still left

    async def recover(self, left: Unfinished) -> None:
        """Undoes an operation that was left, or finishes it where a guest was asked; else it stays left.

        One that shows as a whole, when nobody was told otherwise, is finished: only its end was not written. What
        libvirt does not return from is waited for.
        """
        while still := self._intents.left(left.number):
            try:
                return await self._put_in_order(still)
            except StillAtIt as step:
                log.warning("An earlier %s is not in order yet, libvirt is still at it: %s.", left.operation, step)

    async def give_back(self, device: str) -> None:
        """Gives DEVICE back, if that is still to be done when its group's turn comes."""
        here = self._state.device(device)
        async with self._executor.alone((lock_of(here) if here else device,)):
            while device in self._loans.lent and self._loans.is_group_free(device):
                lender = self._loans.lender(device)
                try:
                    await self._loans.give_back(device, Patience(Reattach(device).text, GRACE))
                    self._said.pop(device, None)
                    return
                except errors.HostpassError as error:
                    self._say_once(device, f"{device} could not be given back to its host driver: {error}")
                    return
                except StillAtIt as step:
                    log.warning("libvirt is still at it: %s.", step)
                    await self._executor.libvirt(lender).wait_until_returned({device})

    async def _put_in_order(self, left: Unfinished) -> None:
        begun = left.steps[: left.begun]
        if left.number not in self._said:
            log.warning("An earlier %s was not finished: it is put in order.", left.operation)
            self._said[left.number] = ""
        try:
            await self._wait_out(left, begun)
        except errors.NoSuchMachine:
            await self._end(left)
            return
        except errors.HostpassError as error:
            self._say_once(left.number, f"What the earlier {left.operation} did cannot be seen yet: {error}")
            return
        failures = []
        if not (self._is_whole(left) or self._is_taken_back(left)):
            failures = await (self._finish(left) if has_asked(begun) else self._executor.undo(left))
        if failures:
            told = "; ".join(map(str, failures))
            self._say_once(left.number, f"Of the earlier {left.operation} this could not be done: {told}.")
        if is_over(failures):
            await self._end(left)

    async def _wait_out(self, left: Unfinished, begun: tuple[Step, ...]) -> None:
        """Returns when libvirt works on the last step no more, and the truth is in the state."""
        if left.key:
            libvirt = self._executor.libvirt(left.key.uri)
            await libvirt.wait_until_returned({left.key.uuid, *(step.device for step in begun)})
            await libvirt.wait_until_idle(left.key.uuid)
        if begun:
            await self._executor.wait_out(left.key, begun[-1])
        await self._executor.settle()

    async def _finish(self, left: Unfinished) -> list[Failure]:
        """Does what does not show in the truth yet, and was never seen done; unless no guest can have been asked."""
        failures = []
        for at, step in enumerate(left.steps):
            if at in left.done:
                continue
            if not self._shows(left, step) and (failed := await self._executor.attempt(left.key, step)):
                if step.asks_guest and isinstance(failed[0].error, REFUSALS) and self._asked_nobody(left):
                    await self._loans.forgive(step.device for step in left.steps if step.is_owed)
                    return await self._executor.undo(left)
                failures += failed
                continue
            await self._intents.done(left.number, at)
        return failures

    def _shows(self, left: Unfinished, step: Step) -> bool:
        return step.shows(self._executor.seen(left.key))

    def _asked_nobody(self, left: Unfinished) -> bool:
        """Whether libvirt, which now refuses to ask a guest for one, has taken none of the devices from it."""
        return not any(step.asks_guest and self._shows(left, step) for step in left.steps)

    def _is_whole(self, left: Unfinished) -> bool:
        """Whether all that was to be done has been, and who asked for it was not told that it failed.

        A power cut, or a machine's own end, takes the live half with it: the other one is what was asked for.
        """
        if left.failed or left.begun < len(left.steps):
            return False
        machine = self._state.copies.get(left.key) if left.key else None
        rest: Iterable[Step] = (step for at, step in enumerate(left.steps) if at not in left.done)
        if machine and not machine.active:
            rest = (step for step in rest if not isinstance(step, Attach))
        return all(self._shows(left, step) for step in rest)

    def _is_taken_back(self, left: Unfinished) -> bool:
        """Whether all that was seen removed is there again, although the operation was never seen to fail.

        So it was undone before it asked a guest, and the disk failed such that the log tells of the asking alone.
        """
        removed = [left.steps[at] for at in left.done - left.undone if isinstance(left.steps[at], Unstore)]
        return bool(removed) and not left.failed and not any(self._shows(left, step) for step in removed)

    async def _end(self, left: Unfinished) -> None:
        self._said.pop(left.number, None)
        await self._intents.end(left.number)

    def _say_once(self, about: int | str, text: str) -> None:
        """Logs TEXT unless it is what was said last ABOUT an operation or a device."""
        if self._said.get(about) != text:
            log.error("%s", text)
            self._said[about] = text
