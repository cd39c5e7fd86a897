"""Blocking reads of the kernel's small files, off the loop. A file that hangs is given up, and the rest goes on.

Most files in sysfs are memory, but some wait for a lock that a driver holds (the strings of a USB device while it is
reset), or for the device itself.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import time
from collections.abc import Callable, Collection
from typing import TypeVar

from hostpassd.base.threads import in_thread

log = logging.getLogger(__name__)
_T = TypeVar("_T")

PATIENCE = 5.0  # seconds that one file may take
_LOOK = 1.0  # seconds between two looks at a job
# How many files of one name may hang before none of that name is read: each of them keeps a thread.
_LIMIT = 8


class Hung(Exception):
    """A job was given up because it hangs at a file."""


class GivenUp(Exception):
    """Ends a job that was given up, once the file that it hung at has answered."""


class Files:
    """What one job reads with, in its thread."""

    def __init__(self, hanging: Collection[str] = ()) -> None:
        self._hanging = hanging
        self._at = ""
        self._since = 0.0
        self.given_up = False

    def read(self, file: str, *parts: tuple[int, int]) -> list[bytes]:
        """PARTS (offset, size) of FILE. Raises OSError, ETIMEDOUT if it hangs."""
        self.begin(file)
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return [os.pread(descriptor, size, offset) for offset, size in parts]
            finally:
                os.close(descriptor)
        finally:
            self.end()

    def begin(self, file: str) -> None:
        """What follows, until `end`, may hang at FILE. Raises OSError if that hangs already."""
        if self._hanging and self._avoids(file):
            raise OSError(errno.ETIMEDOUT, "it does not answer")
        self._since = time.monotonic()
        self._at = file

    def end(self) -> None:
        """What `begin` began is over."""
        self._at = ""
        if self.given_up:
            raise GivenUp

    def hangs_at(self, seconds: float) -> str:
        """The file that has taken longer than SECONDS by now, '' for none. For the loop."""
        file, since = self._at, self._since
        return file if file and time.monotonic() - since > seconds else ""

    def _avoids(self, file: str) -> bool:
        hanging = tuple(self._hanging)  # which the loop may change meanwhile
        name = file.rpartition("/")[2]
        return file in hanging or sum(other.rpartition("/")[2] == name for other in hanging) >= _LIMIT


class Sysfs:
    """The links and small files that storage is resolved by; ROOT is another folder in tests."""

    def __init__(self, root: str = "/sys", files: Files | None = None) -> None:
        self._root = root
        self._files = files or Files()

    def real(self, path: str) -> str | None:
        """Where PATH (below /sys, without it) leads, as /sys/devices/...; None: nowhere."""
        place = os.path.realpath(f"{self._root}/{path}")
        if not os.path.exists(place):
            return None
        return "/sys" + place.removeprefix(os.path.realpath(self._root))

    def names(self, path: str) -> list[str]:
        """What is in the folder PATH (/sys/...), sorted; empty if there is none."""
        try:
            return sorted(os.listdir(self._root + path.removeprefix("/sys")))
        except OSError:
            return []

    def has(self, path: str) -> bool:
        """Whether there is PATH (/sys/...)."""
        return os.path.exists(self._root + path.removeprefix("/sys"))

    def text(self, path: str) -> str:
        """The text of the file PATH (/sys/...); '' if there is none."""
        try:
            return os.fsdecode(self._files.read(self._root + path.removeprefix("/sys"), (0, 4096))[0]).strip()
        except OSError:
            return ""


class Reader:
    """Runs jobs that read. CHANGED is called on the loop with the files that hang, whenever that changes."""

    def __init__(self, changed: Callable[[tuple[str, ...]], None] = lambda files: None) -> None:
        self._changed = changed
        self._hanging: dict[str, None] = {}

    async def run(self, job: Callable[[Files], _T]) -> _T:
        """What JOB returns, made in a thread. Hung: it hangs at a file, which no job is let near until it answers."""
        files = Files(self._hanging)
        done = in_thread(functools.partial(job, files), "read")
        while True:
            await asyncio.wait({done}, timeout=_LOOK)
            if done.done():
                return done.result()
            if file := files.hangs_at(PATIENCE):
                files.given_up = True
                self._give_up(file, done)
                raise Hung(file)

    def _give_up(self, file: str, done: asyncio.Future[_T]) -> None:
        log.error("%s does not answer: it is left unread until it does", file)
        self._hanging[file] = None
        done.add_done_callback(functools.partial(self._back, file))
        self._changed(tuple(self._hanging))

    def _back(self, file: str, done: asyncio.Future[_T]) -> None:
        if not done.cancelled():
            done.exception()  # GivenUp, which nobody waits for
        log.warning("%s answers again", file)
        del self._hanging[file]
        self._changed(tuple(self._hanging))
