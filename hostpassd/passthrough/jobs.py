"""A job while it runs."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping

from hostpassd import errors
from hostpassd.model.events import Event, JobChanged
from hostpassd.model.job import Job


class RunningJob:
    """One job as it runs: its row in the state, its deadline, and the wish to cancel it."""

    def __init__(self, job: Job, emit: Callable[[Event], None], seconds: float, details: Mapping[str, str]) -> None:
        self.job = job
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
    def number(self) -> int:
        """Its number."""
        return self.job.number

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - asyncio.get_running_loop().time()

    def check(self) -> None:
        """Raises Cancelled or TimedOut when the job should not go on."""
        if self.cancelled.is_set():
            raise errors.Cancelled("The job was cancelled.")
        if self.left <= 0:
            raise errors.TimedOut(f"The job did not end within {self.seconds:g} seconds: give it a longer timeout.")

    def tell(self, **what: object) -> None:
        """Moves the job on in the state: WHAT are fields of Job."""
        self.job = dataclasses.replace(self.job, **what)  # type: ignore[arg-type]
        self._emit(JobChanged(self.job))
