"""A file of rows that a crash or a power cut at any moment leaves readable. Everything here blocks."""

from __future__ import annotations

import contextlib
import itertools
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

# Bytes. No intent log comes near it: a larger file is something else, and not to be read into memory.
_LIMIT = 16 << 20


class RowFile:
    """Rows of text, one a line, each behind a checksum, on disk when `add` or `replace` returns; both raise OSError.

    A file is made, or written anew, under another name, which it loses when it is on disk: there is a whole one at any
    moment. A row that was written in part, by a crash or for want of room, is the last one, and is left out on reading.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set_aside = False  # whether what is there is to be kept under another name, and not lost to the next write
        self._written: tuple[int, int, int] | None = None  # device, inode and length of the file, after a good write

    def read(self) -> list[str | None]:
        """The rows, as `rows_in` has it; none when there is no file."""
        try:
            with self.path.open("rb") as file:
                data = file.read(_LIMIT + 1)
        except FileNotFoundError:
            return []
        if len(data) > _LIMIT:
            return [None]
        return rows_in(data)

    def add(self, row: str, everything: Iterable[str], *, compact: bool = False) -> None:
        """Adds ROW; or writes EVERYTHING, which has it, anew, where the file is not as this object left it.

        That is so at first, after a write that failed, and when others changed or removed the file. COMPACT: writes
        EVERYTHING anew after that, if that can be done.
        """
        if not self._is_as_written():
            self.replace(everything)
            return
        self._append(_line(row))
        if compact:
            with contextlib.suppress(OSError):  # with the row added the file says the same
                self.replace(everything)

    def _is_as_written(self) -> bool:
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino, found.st_size) == self._written

    def _append(self, data: bytes) -> None:
        assert self._written
        device, inode, length = self._written
        self._written = None  # until the write has gone well
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            _write_down(descriptor, data)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, length)
            raise
        finally:
            os.close(descriptor)
        self._written = device, inode, length + len(data)

    def replace(self, rows: Iterable[str]) -> None:
        """Writes ROWS anew."""
        data = b"".join(map(_line, rows))
        self._written = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_down(descriptor, data)
            found = os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # what is of no use takes no room
            raise
        finally:
            os.close(descriptor)
        if self.set_aside:
            self._set_aside()
        os.replace(temporary, self.path)
        # Without this a power cut can bring the old file back, and with it what was ended meanwhile.
        self._sync_folder()
        self._written = found.st_dev, found.st_ino, len(data)

    def _set_aside(self) -> None:
        """Gives the file that is there a second name, PATH.corrupt-1 or the next that is free."""
        for number in itertools.count(1):
            try:
                os.link(self.path, f"{self.path}.corrupt-{number}")
            except FileExistsError:
                continue
            except FileNotFoundError:
                pass  # somebody has taken it away
            break
        self.set_aside = False

    def _sync_folder(self) -> None:
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def rows_in(data: bytes) -> list[str | None]:
    """The rows of a file, and None for each line that is none; a last one that was written in part is left out.

    One that has its end was written as a whole, and is damaged.
    """
    rows = [_row(line) for line in data.split(b"\n") if line]
    if len(rows) > 1 and rows[-1] is None and not data.endswith(b"\n"):
        rows.pop()
    return rows


def _write_down(descriptor: int, data: bytes) -> None:
    """Returns when DATA is on disk."""
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


def _line(row: str) -> bytes:
    text = row.encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _row(line: bytes) -> str | None:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None
