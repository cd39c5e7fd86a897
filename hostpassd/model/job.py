"""A job as the state has it and clients see it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One running or just ended operation."""

    number: int
    operation: str  # assign, dismiss
    machine: str  # UUID; '' for an operation on no machine
    devices: tuple[str, ...]  # the names of all that move, the one that was asked for first
    started_by_uid: int
    state: str = "queued"  # running, waiting-for-guest, undoing, done, failed, cancelled
    step: str = ""  # for people
    progress: float = 0.0  # 0 to 1
    error: Exception | None = None  # why it failed, or was cancelled

    @property
    def device(self) -> str:
        """The device that was asked for."""
        return self.devices[0]

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self.state in ("done", "failed", "cancelled")
