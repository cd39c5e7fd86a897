"""A job as the state has it and clients see it."""

from __future__ import annotations

import dataclasses

from hostpassd.model.codes import Fact


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One running or just ended operation."""

    number: int
    operation: str  # assign, dismiss
    machine: str  # UUID; '' for an operation on no machine
    asked: tuple[str, ...]  # the names of the devices that were asked for, in tree order
    devices: tuple[str, ...]  # the names of all that move, in tree order
    started_by_uid: int
    state: str = "queued"  # running, waiting-for-guest, undoing, done, failed, cancelled
    step: Fact | None = None  # what it does or waits for
    step_number: int = 0  # from 1 on; 0: it has not begun
    step_count: int = 0
    deadline: int = 0  # microseconds of CLOCK_REALTIME; 0: none
    error: Exception | None = None  # why it failed, or was cancelled

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self.state in ("done", "failed", "cancelled")
