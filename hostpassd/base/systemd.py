"""Talking to the service manager."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable


def notify(text: str) -> None:
    """Tells the service manager TEXT (sd_notify(3)); nothing where there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier, contextlib.suppress(OSError):
        notifier.sendto(text.encode(), "\0" + address[1:] if address[0] == "@" else address)


async def feed_watchdog(status: Callable[[], str]) -> None:
    """Tells it that the loop turns, and the STATUS, twice in each period that it allows (sd_watchdog_enabled(3))."""
    period = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    while period:
        notify("WATCHDOG=1\n" + status())
        await asyncio.sleep(period / 2)
