"""Faults of our own, in tasks that nobody waits for."""

from __future__ import annotations

import asyncio
from typing import Any


def end_daemon_on_error(task: asyncio.Task[Any]) -> None:
    """A done callback: what TASK raised goes to the loop, whose handler ends the daemon, to be started afresh."""
    if not task.cancelled():
        task.result()
