"""What failed is tried again after ever longer pauses."""

from __future__ import annotations

import asyncio
from collections.abc import Collection


class Backoff:
    """When each thing that failed may be tried again: after FIRST seconds, then twice as many each time, to LIMIT."""

    def __init__(self, first: float, limit: float) -> None:
        self._first = first
        self._limit = limit
        self._pauses: dict[str, float] = {}  # the last one of each
        self._not_before: dict[str, float] = {}  # in the loop's time

    def is_due(self, what: str) -> bool:
        """Whether WHAT may be tried now; it always may be that never failed."""
        return asyncio.get_running_loop().time() >= self._not_before.get(what, 0.0)

    def failed(self, what: str) -> float:
        """Notes that WHAT failed again; in how many seconds it is due."""
        pause = min(2 * self._pauses[what], self._limit) if what in self._pauses else self._first
        self._pauses[what] = pause
        self._not_before[what] = asyncio.get_running_loop().time() + pause
        return pause

    def keep(self, wanted: Collection[str]) -> None:
        """Only these are still to be tried."""
        for what in [what for what in self._pauses if what not in wanted]:
            del self._pauses[what], self._not_before[what]
