"""A job as it is told."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One running or just ended assign or dismiss."""

    number: int
    operation: str  # assign, dismiss
    machine: str  # UUID
    device: str  # name
    started_by_uid: int
    state: str = "queued"
    step: str = ""
    progress: float = 0.0
    error_name: str = ""  # with its bus prefix
    error_message: str = ""

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self.state in ("done", "failed", "cancelled")
