"""Watching a folder for files that come, change or go, by inotify and the event loop."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import PurePath

_log = logging.getLogger(__name__)

_IN_ATTRIB = 0x4
_IN_CLOSE_WRITE = 0x8
_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_IN_DELETE = 0x200
_IN_DELETE_SELF = 0x400
_IN_MOVE_SELF = 0x800
_IN_UNMOUNT = 0x2000
_IN_Q_OVERFLOW = 0x4000
_IN_IGNORED = 0x8000
_IN_ONLYDIR = 0x01000000

_SELF = _IN_DELETE_SELF | _IN_MOVE_SELF
_LOST = _SELF | _IN_UNMOUNT | _IN_IGNORED
_FILES = _IN_CLOSE_WRITE | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE
# Attributes, too: a folder whose mode forbade it can be watched from then on.
_NEXT = _IN_CREATE | _IN_MOVED_TO | _IN_MOVED_FROM | _IN_DELETE | _IN_ATTRIB
_HEADER = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows
_BUFFER = 65536  # bytes read at once

_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """The folder PATH under watch until `close`, there or not. To be made and closed on the running event loop.

    CALLBACK gets the names of the files that came, were written or went, all that were known at once. An empty set
    means that something was missed: look at everything. The kernel's queue ran over, or the folder itself has come,
    gone, or been replaced; it is found again by a watch on each folder above it.

    A watch that the kernel refuses (no right to, no room for it) is logged once; where it had no room, it is tried
    again every RETRY seconds.
    """

    def __init__(self, path: str, callback: Callable[[set[str]], None], retry: float = 60.0) -> None:
        self._path = PurePath(path)
        self._callback = callback
        self._seconds = retry
        self._loop = asyncio.get_running_loop()
        self._descriptor = -1
        self._next: dict[int, str | None] = {}  # by watch, the name in that folder that leads on to ours
        self._retry: asyncio.TimerHandle | None = None
        self._warned = False
        self._arm()

    def close(self) -> None:
        """End the watch; no callback comes after it. Closing twice is harmless."""
        if self._retry:
            self._retry.cancel()
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _arm(self) -> None:
        self.close()
        self._next = {}
        try:
            self._descriptor = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
            self._loop.add_reader(self._descriptor, self._read)
            self._add_watches()
        except OSError as error:
            self._warn(error)
            self._retry = self._loop.call_later(self._seconds, self._arm_again)

    def _arm_again(self) -> None:
        self._arm()
        self._callback(set())

    def _add_watches(self) -> None:
        """Watches each folder from the root down, so that the watch above sees one that is replaced meanwhile."""
        folders = [*reversed(self._path.parents), self._path]
        names = [*self._path.parts[1:], None]
        for folder, name in zip(folders, names, strict=True):
            mask = _IN_ONLYDIR | _SELF | (_FILES if name is None else _NEXT)
            try:
                watch = _checked(_libc.inotify_add_watch(self._descriptor, os.fsencode(folder), mask))
            except (FileNotFoundError, NotADirectoryError):
                return
            except PermissionError as error:
                if name is None:
                    self._warn(error)
                continue
            self._next[watch] = name
        self._warned = False

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            _log.warning("%s cannot be watched, what others change in it is seen late: %s", self._path, error.strerror)
        self._warned = True

    def _read(self) -> None:
        try:
            data = os.read(self._descriptor, _BUFFER)
        except BlockingIOError:
            return
        names: set[str] = set()
        missed = moved = False
        for watch, mask, name in _events(data):
            missed = missed or bool(mask & _IN_Q_OVERFLOW)
            leads_on = self._next.get(watch)
            if mask & _LOST or (leads_on is not None and name == leads_on):
                moved = True
            elif leads_on is None and name:
                names.add(name)
        if moved:
            self._arm()
        if moved or missed:
            self._callback(set())
        elif names:
            self._callback(names)


def _events(data: bytes) -> Iterator[tuple[int, int, str]]:
    """The watch, the mask and the name of each event in a buffer."""
    offset = 0
    while offset < len(data):
        watch, mask, _, length = _HEADER.unpack_from(data, offset)
        offset += _HEADER.size
        yield watch, mask, os.fsdecode(data[offset : offset + length].rstrip(b"\0"))
        offset += length


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
