"""The intent log: what each operation is about to do, on disk before it is done, so that no crash leaves it half."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from hostpassd import errors
from hostpassd.base.threads import InOrder
from hostpassd.model.codes import detailed
from hostpassd.model.events import Event, ProblemChanged
from hostpassd.passthrough.intent_rows import (
    VERSION,
    Loan,
    Reading,
    Unfinished,
    begin_row,
    gone_on,
    is_superseded,
    object_in,
    rows_of,
    strings_in,
    superseded,
)
from hostpassd.passthrough.request import Plan
from hostpassd.passthrough.rowfile import RowFile

log = logging.getLogger(__name__)
_T = TypeVar("_T")

# hostpassd 1.0 kept such rows without checksums in a file of this name.
_FORMER_NAME = "journal"
# Seconds that a write may take. A disk that hangs must not hang a job beyond its time, nor the end of the daemon.
PATIENCE = 15.0
# Seconds, at least, from a failure to the next attempt that a mere wish for an operation brings about: anybody can have
# as many wishes as they like.
CHECK_PAUSE = 1.0


class IntentLog:
    """What operations are about to do, were about to do when they ended, and what is owed to host drivers.

    A method that announces something (`begin`, `step`, `lend`) raises StateFolderError when it cannot be written: then
    it must not be done. The others tell what is so already: where they cannot write, this object knows it, and writes
    it before anything else (`catch_up`).

    `lent`: what is owed to its host driver, by device name.
    """

    def __init__(self, path: Path, hypervisors: Collection[str]) -> None:
        self._file = RowFile(path)
        self._former = path.with_name(_FORMER_NAME)
        self._writer = InOrder("intent-log")
        self._hypervisors = hypervisors  # the configured ones
        self._is_read = False
        self.under_way: dict[int, Unfinished] = {}
        self._left: dict[int, Unfinished] = {}
        self.kept: list[str] = []  # rows that are not understood, with the version rows that they stand below
        self.lent: dict[str, Loan] = {}
        self.problem = ""  # why it cannot be read or written, for people
        self.trouble = asyncio.Event()  # set while there is one
        self._emit: Callable[[Event], None] = lambda event: None
        self._failures = 0
        self._failed_at = -math.inf
        self._catching_up: asyncio.Future[None] | None = None
        self._pending = 0  # calls that the thread has not returned from, the waiting ones included
        self._alive_at = 0.0  # when the thread last ended one, or got one while it had none
        self.hanging: asyncio.Future[Any] | None = None  # a call that has taken longer than it may
        try:
            self._take(self._read())
        except OSError as error:
            self._note(error)

    def announce(self, emit: Callable[[Event], None]) -> None:
        """Has EMIT told of the problem: at once if there is one, then whenever it is another one or over."""
        self._emit = emit
        if self.problem:
            self._tell_problem()

    @property
    def unfinished(self) -> tuple[Unfinished, ...]:
        """What no job works on any more, and is still to be finished or undone."""
        return tuple(self._left.values())

    def left(self, number: int) -> Unfinished | None:
        """Of these the one with NUMBER."""
        return self._left.get(number)

    def running(self, number: int) -> Unfinished:
        """What the job NUMBER has begun."""
        return self.under_way[number]

    async def check(self, plan: Plan) -> None:
        """Raises StateFolderError or Failed if PLAN cannot be written down, or is about what is not understood."""
        if self.trouble.is_set():
            if time.monotonic() < self._failed_at + CHECK_PAUSE:
                raise errors.StateFolderError(self.problem)
            await self.catch_up()
        self._check_kept(plan)

    def _check_kept(self, plan: Plan) -> None:
        kept = [strings_in(row) for row in self.kept]
        for thing in (*plan.devices, *plan.locks, *([plan.machine.uuid] if plan.machine else [])):
            if any(strings is None or thing in strings for strings in kept):
                raise errors.Failed(
                    f"{self._file.path} tells of something unfinished with {thing}, in rows that are damaged or that "
                    "another version of hostpassd wrote: start that version; or put things in order by hand, stop "
                    "hostpassd, take these rows out of that file, and start hostpassd again."
                )

    async def begin(self, number: int, plan: Plan) -> None:
        """The job NUMBER starts with PLAN; what it makes of its devices counts from here on.

        So what was left of earlier operations that moved them to or from that machine is over, as far as they go. What
        merely shares a group with them, as two sticks share their controller's, stays to be put in order.
        """
        if self.trouble.is_set():
            await self.catch_up()
        self._check_kept(plan)
        before = {left.number: left for left in self._left.values() if _meet(left, plan)}
        after = [superseded(left, plan.devices) for left in before.values()]
        uri, machine = plan.machine or ("", "")
        begun = Unfinished(number, plan.operation, machine, uri, plan.locks, plan.steps, 0)
        self.under_way[number] = begun
        for left in after:
            self._left[left.number] = left
            if is_superseded(left):
                del self._left[left.number]
        over = before.keys() - self._left.keys()
        try:
            # What goes on in part has no row that says so.
            await self._write(begin_row(begun, sorted(over)), anew=len(over) < len(before))
        except errors.StateFolderError:
            del self.under_way[number]
            self._left |= before
            raise

    async def step(self, number: int, at: int) -> None:
        """The effect of the step AT (from 0) is about to begin; those before it are done."""
        before = self.under_way[number]
        try:
            await self._go_on({"step": number, "begun": at + 1})
        except errors.StateFolderError:
            self.under_way[number] = before
            raise

    async def lend(self, device: str, uri: str, driver: str) -> None:
        """A device is about to be taken from its host DRIVER by the hypervisor URI, or is to go back to one ('')."""
        before = self.lent.get(device)
        self.lent[device] = (uri, driver)
        try:
            await self._write({"lend": device, "uri": uri, "driver": driver})
        except errors.StateFolderError:
            del self.lent[device]
            if before:
                self.lent[device] = before
            raise

    async def fail(self, number: int, begun: int) -> None:
        """The job has failed: its first BEGUN steps are to be undone, or, where a guest was asked, the rest done."""
        await self._tell(self._go_on({"fail": number, "begun": begun}))

    async def done(self, number: int, at: int) -> None:
        """The effect of the step AT was seen."""
        await self._tell(self._go_on({"done": number, "at": at}))

    async def undone(self, number: int, at: int) -> None:
        """The step AT has been taken back, or needs not be."""
        await self._tell(self._go_on({"undone": number, "at": at}))

    async def leave(self, number: int, begun: int) -> None:
        """The job is over, not what it did: the first BEGUN steps are still to be undone, or the rest to be done."""
        if (self.under_way[number].failed, self.under_way[number].begun) != (True, begun):
            await self.fail(number, begun)
        self._left[number] = self.under_way.pop(number)

    async def end(self, number: int) -> None:
        """An operation is over: done, or undone."""
        self.under_way.pop(number, None)
        self._left.pop(number, None)
        await self._tell(self._write({"end": number}, compact=not self.under_way))

    async def give_back(self, device: str) -> None:
        """It is back with its host driver."""
        if self.lent.pop(device, None):
            await self._tell(self._write({"return": device}))

    async def catch_up(self) -> None:
        """Reads the file, if that could not be done yet, and writes everything anew. StateFolderError.

        This is done once for all who ask for it meanwhile.
        """
        if self._catching_up is None or self._catching_up.done():
            self._catching_up = asyncio.ensure_future(self._catch_up())
            self._catching_up.add_done_callback(_look_at)
        await asyncio.shield(self._catching_up)

    async def _catch_up(self) -> None:
        if not self._is_read:
            self._take(await self._in_thread(self._read))
        everything, failures = self._everything(), self._failures
        await self._in_thread(lambda: self._write_anew(everything))
        self._clear(failures)

    # --- reading ---

    def _read(self) -> list[str | None]:
        rows = self._file.read()
        if not rows:
            with contextlib.suppress(FileNotFoundError):
                former = self._former.read_text(encoding="utf-8", errors="replace").splitlines()
                rows = [json.dumps({"version": VERSION}), *(_as_today(row) for row in map(object_in, former) if row)]
        return rows

    def _take(self, rows: list[str | None]) -> None:
        if self._is_read:
            return  # somebody else has read it meanwhile
        reading = Reading()
        for row in rows:
            reading.take(row)
        reading.close_section()
        # Below 0: the numbers of this run's jobs start at 1 again.
        renumbered = (dataclasses.replace(left, number=-at) for at, left in enumerate(reading.operations, 1))
        self._left = {left.number: left for left in renumbered}
        self.kept, self.lent = reading.kept, reading.lent
        self._is_read = True
        self._file.set_aside = reading.damaged
        self._tell_what_stays(reading)

    def _tell_what_stays(self, reading: Reading) -> None:
        """Logs what is not put in order by itself."""
        path = self._file.path
        if reading.damaged:
            log.error("%s is damaged: it is kept as %s.corrupt-1 (or -2 ...), what can be read counts", path, path)
        if self.kept:
            log.error("%s has rows of another version, or damaged ones: operations on what they name are refused", path)
        for left in self._left.values():
            if left.uri and left.uri not in self._hypervisors:
                text = "An earlier %s on %s was not finished, and stays so: the configuration names %s no more."
                log.warning(text, left.operation, ", ".join(left.devices), left.uri)
        for device, (uri, _) in self.lent.items():
            if uri not in self._hypervisors:
                text = "%s stays without its host driver: it is lent to %s, which the configuration names no more."
                log.warning(text, device, uri)

    # --- writing ---

    def _write_anew(self, everything: Iterable[str]) -> None:
        self._file.replace(everything)
        self._former.unlink(missing_ok=True)

    async def _go_on(self, row: dict[str, Any]) -> None:
        number = next(iter(row.values()))
        operations = self.under_way if number in self.under_way else self._left
        operations[number] = gone_on(operations[number], row)
        await self._write(row)

    async def _write(self, row: dict[str, Any], *, compact: bool = False, anew: bool = False) -> None:
        everything, failures = self._everything(), self._failures
        if anew or self.trouble.is_set():  # the file is not what is known here
            call = functools.partial(self._file.replace, everything)
        else:
            call = functools.partial(self._file.add, json.dumps(row), everything, compact=compact)
        await self._in_thread(call)
        self._clear(failures)

    async def _tell(self, writing: Coroutine[Any, Any, None]) -> None:
        """Waits for WRITING; a failure has been noted, and is made up for by `catch_up`."""
        with contextlib.suppress(errors.StateFolderError):
            await writing

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        """What CALL returns. Calls are made one after the other, also if whoever waits for one is cancelled."""
        try:
            if self.hanging and not self.hanging.done():
                raise TimeoutError(errno.ETIMEDOUT, "")
            future = self._submit(call)
            await self._wait_for(future)
            return future.result()
        except OSError as error:
            raise errors.StateFolderError(self._note(error)) from None

    def _submit(self, call: Callable[[], _T]) -> asyncio.Future[_T]:
        def make() -> _T:
            try:
                return call()
            finally:
                self._alive_at = time.monotonic()

        def ended(future: asyncio.Future[_T]) -> None:
            self._pending -= 1
            _look_at(future)

        if not self._pending:
            self._alive_at = time.monotonic()
        self._pending += 1
        future = asyncio.get_running_loop().run_in_executor(self._writer, make)
        future.add_done_callback(ended)
        return future

    async def _wait_for(self, future: asyncio.Future[Any]) -> None:
        """Returns when FUTURE is done. TimeoutError: one call hangs; a queue of many takes its time, and goes on."""
        while not future.done():
            left = self._alive_at + PATIENCE - time.monotonic()
            if left <= 0:
                self.hanging = future
                raise TimeoutError(errno.ETIMEDOUT, "")
            await asyncio.wait({future}, timeout=left)

    def _note(self, error: OSError) -> str:
        """ERROR in words; it is logged when it is news."""
        words = _words(self._file.path, error)
        if words != self.problem:
            log.error("%s", words)
        self.trouble.set()
        self._say(words)
        self._failures += 1
        self._failed_at = time.monotonic()
        return words

    def _clear(self, failures: int) -> None:
        """Ends the trouble after a write of all that was known; not if FAILURES, counted before it, have become more.

        Then something came meanwhile that could not be written.
        """
        if failures != self._failures or not self.trouble.is_set():
            return
        log.info("%s is written again", self._file.path)
        self.trouble.clear()
        self._say("")

    def _say(self, words: str) -> None:
        if words != self.problem:
            self.problem = words
            self._tell_problem()

    def _tell_problem(self) -> None:
        self._emit(ProblemChanged("state-folder", bool(self.problem), detailed(error=self.problem.rstrip("."))))

    def _everything(self) -> Iterator[str]:
        """All rows that are still to be known, as things are now; they are made when, and where, they are written."""
        return _all_rows(tuple(self.kept), (*self._left.values(), *self.under_way.values()), tuple(self.lent.items()))


def _all_rows(kept: Iterable[str], operations: Iterable[Unfinished], lent: Iterable[tuple[str, Loan]]) -> Iterator[str]:
    yield from kept
    yield json.dumps({"version": VERSION})
    for operation in operations:
        yield from map(json.dumps, rows_of(operation))
    for device, (uri, driver) in lent:
        yield json.dumps({"lend": device, "uri": uri, "driver": driver})


def _meet(left: Unfinished, plan: Plan) -> bool:
    """Whether LEFT moved a device of PLAN to or from its machine, and has a lock in common with it."""
    shared = not set(left.locks).isdisjoint(plan.locks)
    return shared and left.key == plan.machine and not set(left.devices).isdisjoint(plan.devices)


def _look_at(future: asyncio.Future[Any]) -> None:
    """Retrieves the error of a FUTURE that nobody waits for any more, so that asyncio does not log it."""
    if not future.cancelled():
        future.exception()


# Steps as hostpassd 1.0 called them.
_FORMER_STEPS = {
    "Store": "store",
    "Unstore": "unstore",
    "Free": "detach",
    "GiveBack": "reattach",
    "Attach": "attach",
    "Release": "unplug",
}


def _as_today(row: dict[str, Any]) -> str:
    """Converts a row of hostpassd 1.0 to the present format; a row that does not look like one stays unchanged."""
    if "begin" in row:
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            steps = [{"step": _FORMER_STEPS[step["kind"]], **step} for step in row["steps"]]
            for step in steps:
                del step["kind"]
            row = row | {"instead": [], "steps": steps, "locks": row["groups"]}
            del row["groups"]
    return json.dumps(row)


def _words(path: Path, error: OSError) -> str:
    """ERROR for people: what is wrong, and what to do."""
    folder = path.parent
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"The state folder {folder} is full: free some room and try again."
        case errno.EROFS:
            return f"The state folder {folder} is on a file system that is read-only: make it writable and try again."
        case errno.EACCES | errno.EPERM:
            user = f"The user of hostpassd (uid {os.geteuid()})"
            return f"The state folder {folder} is not open to {user}: give it to that user and try again."
        case errno.ETIMEDOUT:
            return f"The disk of the state folder {folder} does not answer: see the kernel's log, and try again."
        case errno.EIO:
            return f"The disk of the state folder {folder} has an error: see the kernel's log, mend it and try again."
    return f"The intent log {path} cannot be read or written ({error.strerror}): mend that and try again."
