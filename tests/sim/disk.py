"""A disk below the intent log that can lose power, be full or slow: what is on it then."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostpassd.passthrough import rowfile


class Died(BaseException):
    """The daemon was killed here."""


def no_room(call: str) -> None:
    """What `Disk.at` does on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


Image = dict[str, bytes]  # the files of a folder


class _File:
    def __init__(self, data: bytes = b"") -> None:
        self.now = self.safe = data
        self.since: list[bytes] = []  # what it has been since it was on disk

    def become(self, data: bytes) -> None:
        self.now = data
        self.since.append(data)

    def remains(self) -> Iterator[bytes]:
        """What can be on disk: what is safe, with any part of what came after it, or with zeros in its place."""
        yield self.safe
        for data in self.since:
            fresh = data.removeprefix(self.safe)
            safe = data[: len(data) - len(fresh)]
            yield safe + bytes(len(fresh))
            yield from (safe + fresh[:length] for length in range(1, len(fresh) + 1))


class Disk:
    """In the place of `os` in the row file: does what it is asked for, and remembers what a power cut would leave.

    `moments` counts what changes the disk or has it written down. `at` is called before each, with the call's name; if
    it raises, the call fails with that, a write half way.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moments = 0
        self.at: Callable[[str], object] = lambda call: None
        self._names: dict[str, _File] = {}
        self._folders: list[dict[str, _File]] = [{}]  # as it is on disk, and as it was after each change since
        self._open: dict[int, _File | None] = {}  # None: the folder
        self._dead: set[threading.Thread] = set()  # whose daemon was killed
        monkeypatch.setattr(rowfile, "os", self)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    # --- what the row file calls ---

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        name = os.path.basename(path)
        if flags & os.O_CREAT:
            self._happen("open")
        descriptor = os.open(path, flags, mode)
        if flags & os.O_CREAT:
            self._names[name] = _File()
            self._folder_changed()
        self._open[descriptor] = None if flags & os.O_DIRECTORY else self._names[name]
        return descriptor

    def write(self, descriptor: int, data: bytes) -> int:
        file = self._open[descriptor]
        assert file
        try:
            self._happen("write")
        except (OSError, Died):
            file.become(file.now + data[: os.write(descriptor, data[: len(data) // 2])])
            raise
        written = os.write(descriptor, data)
        file.become(file.now + data[:written])
        return written

    def fsync(self, descriptor: int) -> None:
        self._happen("fsync")
        file = self._open[descriptor]
        if file:
            file.safe, file.since = file.now, []
        else:
            self._folders = self._folders[-1:]

    def ftruncate(self, descriptor: int, length: int) -> None:
        file = self._open[descriptor]
        assert file
        self._happen("ftruncate")
        os.ftruncate(descriptor, length)
        file.become(file.now[:length])

    def replace(self, source: Any, target: Any) -> None:
        self._happen("replace")
        os.replace(source, target)
        self._names[os.path.basename(target)] = self._names.pop(os.path.basename(source))
        self._folder_changed()

    def unlink(self, path: Any) -> None:
        self._happen("unlink")
        os.unlink(path)
        self._names.pop(os.path.basename(path), None)
        self._folder_changed()

    def close(self, descriptor: int) -> None:
        del self._open[descriptor]
        os.close(descriptor)

    def _happen(self, call: str) -> None:
        if threading.current_thread() in self._dead:
            raise Died
        self.moments += 1
        try:
            self.at(call)
        except Died:
            self._dead.add(threading.current_thread())
            raise

    def _folder_changed(self) -> None:
        self._folders.append(dict(self._names))

    # --- what a power cut leaves ---

    def images(self) -> Iterator[Image]:
        """All that the folder can hold after a power cut: each of its states since it was on disk, with each of all
        that can be left of a file."""
        for names in self._folders:
            images: list[Image] = [{}]
            for name, file in names.items():
                images = [image | {name: data} for image in images for data in file.remains()]
            yield from images

    def now(self) -> Image:
        """What it holds for whoever is there: all that is left after a mere kill."""
        return {name: file.now for name, file in self._names.items()}

    def lay(self, image: Image, folder: Path) -> None:
        """The power is back: FOLDER holds IMAGE, and nothing goes wrong any more."""
        for path in folder.iterdir():
            path.unlink()
        for name, data in image.items():
            (folder / name).write_bytes(data)
        self.at = lambda call: None
        self._names = {name: _File(data) for name, data in image.items()}
        self._folders = [dict(self._names)]
