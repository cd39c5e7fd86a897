"""Watching a folder for files that come, change or go, by inotify and the event loop."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable

IN_CLOSE_WRITE = 0x8
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
_IN_Q_OVERFLOW = 0x4000
_IN_IGNORED = 0x8000
_IN_ONLYDIR = 0x01000000

_MASK = IN_CLOSE_WRITE | IN_MOVED_TO | IN_CREATE | IN_DELETE | _IN_ONLYDIR
_HEADER = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows
_BUFFER = 65536  # bytes read at once

_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """A folder under watch until `close`. To be made and closed on the running event loop.

    CALLBACK gets the names of the files that came, were written or went, all that were known at once.
    An empty set means that something was missed (the kernel's queue ran over, or the folder itself has gone):
    look at everything. OSError: the folder cannot be watched.
    """

    def __init__(self, path: str, callback: Callable[[set[str]], None]) -> None:
        self._callback = callback
        self._descriptor = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), path)
        try:
            _checked(_libc.inotify_add_watch(self._descriptor, os.fsencode(path), _MASK), path)
        except OSError:
            os.close(self._descriptor)
            raise
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._read)

    def close(self) -> None:
        """End the watch; no callback comes after it. Closing twice is harmless."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _read(self) -> None:
        try:
            data = os.read(self._descriptor, _BUFFER)
        except BlockingIOError:
            return
        names, missed = _parse(data)
        if missed:
            self._callback(set())
        elif names:
            self._callback(names)


def _parse(data: bytes) -> tuple[set[str], bool]:
    """The names in a buffer of inotify events, and whether something was missed."""
    names: set[str] = set()
    missed = False
    offset = 0
    while offset < len(data):
        _, mask, _, length = _HEADER.unpack_from(data, offset)
        offset += _HEADER.size
        name = data[offset : offset + length].rstrip(b"\0")
        offset += length
        missed = missed or bool(mask & (_IN_Q_OVERFLOW | _IN_IGNORED))
        if name:
            names.add(os.fsdecode(name))
    return names, missed


def _checked(result: int, path: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)
    return result
