"""Long work on the loop, in pieces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")

# Seconds of such work in one turn of the loop; everything else has its turn in between.
SHARE = 0.001


class Pieces:
    """Does the long work of many a piece at a time: in each turn of the loop one piece of one of them, in rounds."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def all_of(self, steps: Iterable[_T]) -> list[_T]:
        """All that STEPS come to. Raises what a step raises."""
        left, done = iter(steps), list[_T]()
        while True:
            async with self._turn:
                if not _do_some(left, done):
                    return done
                await asyncio.sleep(0)


def _do_some(steps: Iterator[_T], done: list[_T]) -> bool:
    """Adds to DONE what the next of STEPS come to, at least one's. Returns whether there may be more."""
    end = time.monotonic() + SHARE
    for each in steps:
        done.append(each)
        if time.monotonic() >= end:
            return True
    return False
