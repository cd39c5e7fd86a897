"""Changes of the state -> batches of signals, each in the order that the interface promises."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from hostpassd import names
from hostpassd.bus.present import (
    OBJECTS,
    Properties,
    error_row,
    hold_row,
    interfaces_of,
    manager_properties,
    missing_row,
    path_of,
)
from hostpassd.bus.router import Batch, Interfaces, Router, Signal
from hostpassd.model.events import Event
from hostpassd.model.machine import Hold
from hostpassd.state import MANAGER, Changes, Entity, State
from hostpassd.state.counters import Counters


class Publisher:
    """Gathers changes and sends them as batches.

    In each batch: objects added, properties changed, holds, objects removed, and last the Manager's Generation.
    """

    def __init__(self, state: State, router: Router, counters: Counters) -> None:
        self._state = state
        self._router = router
        self._counters = counters
        self._pending = Changes()
        self._scheduled: asyncio.Handle | None = None
        self.generation = 0
        self.running = False
        router.publish(Batch(added={names.MANAGER_PATH: {names.MANAGER: self._manager()}}))
        router.show_live(names.MANAGER, "Counters", counters.now)

    def notice(self, event: Event, batches: Sequence[Changes]) -> None:
        """Takes the changes of an event in; they go out at the end of this turn of the loop, or with `flush`."""
        self._note(batches)

    def _note(self, batches: Iterable[Changes]) -> None:
        for changes in batches:
            if self._pending.reopens(changes):
                self.flush()
            self._pending.merge(changes)
        if self._pending and self._scheduled is None:
            self._scheduled = asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Sends what is pending, now: values before replies."""
        if self._scheduled:
            self._scheduled.cancel()
            self._scheduled = None
        changes, self._pending = self._pending, Changes()
        if changes:
            self.generation += 1
            try:
                self._router.publish(self._batch(changes))
            except Exception as error:
                # What was told and what is are apart from now on: for the loop's handler, whoever called.
                context = {"message": "a batch could not be published", "exception": error, "handle": None}
                asyncio.get_running_loop().call_exception_handler(context)
                raise

    def announce_running(self) -> None:
        """The daemon is ready: State is no longer starting."""
        self.running = True
        changes = Changes()
        changes.change(MANAGER)
        self._note([changes])

    def _batch(self, changes: Changes) -> Batch:
        return Batch(
            added=dict(self._present(changes.added)),
            changed=dict(self._present(changes.changed)),
            signals=list(self._signals(changes)),
            removed=[path_of(entity) for entity in changes.removed],
            last={names.MANAGER_PATH: {names.MANAGER: self._last()}},
        )

    def _present(self, entities: Iterable[Entity]) -> Iterable[tuple[str, Interfaces]]:
        """The path and interfaces of each of ENTITIES that is there.

        A batch can close after what it changed has gone: then a later one removes it.
        """
        for entity in entities:
            if entity == MANAGER:
                rows = {key: value for key, value in self._manager().items() if key not in self._last()}
                yield names.MANAGER_PATH, {names.MANAGER: rows}
                continue
            interfaces = interfaces_of(self._state, entity)
            if interfaces is not None:
                yield path_of(entity), dict.fromkeys(OBJECTS[entity[0]].passing) | interfaces

    def _manager(self) -> Properties:
        return manager_properties(self._state, self.running) | self._last()

    def _last(self) -> Properties:
        """What is different after each batch."""
        return {"Generation": self.generation, "Counters": self._counters.now()}

    def _signals(self, changes: Changes) -> Iterable[Signal]:
        for hold in changes.holds_removed:
            yield _of_hold("HoldRemoved", hold, hold_row(hold))
        for lost in changes.holds_missing:
            for row in lost.rows:
                yield _of_hold("HoldMissing", lost.hold, missing_row(row))
        for before, after in changes.holds_changed:
            old, new = hold_row(before), hold_row(after)
            if old != new:
                yield _of_hold("HoldChanged", after, new, old)
        for hold in changes.holds_added:
            yield _of_hold("HoldAdded", hold, hold_row(hold))
        for job in changes.jobs_ended:
            name, details, message = error_row(job.error)
            yield Signal(names.job_path(job.number), names.JOB, "Completed", [job.state, name, message, details])


def _of_hold(member: str, hold: Hold, *rows: Any) -> Signal:
    """The signal MEMBER about HOLD, with ROWS."""
    body = [names.device_path(hold.device), names.machine_path(hold.machine), *rows]
    return Signal(names.MANAGER_PATH, names.MANAGER, member, body)
