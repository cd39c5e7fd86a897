"""The log: lines on stderr. A thread of its own writes them: whoever reads them and stops does not stop the loop."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading

from hostpassd.model.text import clean

_STDERR = 2

# Lines that wait to be written; past it they are counted.
WAITING_LIMIT = 1024

# Characters of a message, which can quote devices, machines and callers.
_MESSAGE_LIMIT = 8192

# Seconds that the end of the process waits for what is still to be written.
_END_LIMIT = 2.0


class Lines(logging.Handler):
    """Writes each record to stderr, as one line and what tracebacks there are."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: queue.Queue[str | None] = queue.Queue(WAITING_LIMIT)
        self._lost = 0
        self._writer = threading.Thread(target=self._write, name="log", daemon=True)
        self._writer.start()

    def format(self, record: logging.LogRecord) -> str:
        """The text of RECORD: nothing that it quotes looks like a line of its own, and a traceback is indented."""
        text = clean(f"{record.name}: {record.getMessage()}", _MESSAGE_LIMIT)
        if record.exc_info:
            traceback = logging.Formatter().formatException(record.exc_info).splitlines()
            text += "".join(f"\n  {_without_controls(line)}" for line in traceback)
        return text + "\n"

    def emit(self, record: logging.LogRecord) -> None:
        """Has RECORD written; it is lost where too many wait."""
        try:
            self._waiting.put_nowait(self.format(record))
        except queue.Full:
            self._lost += 1
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Waits until what was said is written, but not for ever."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=_END_LIMIT)
            self._writer.join(_END_LIMIT)
        super().close()

    def _write(self) -> None:
        while (text := self._waiting.get()) is not None:
            _write_all(text)
            if self._waiting.empty():
                self._tell_lost()
        self._tell_lost()

    def _tell_lost(self) -> None:
        lost, self._lost = self._lost, 0
        if lost:
            _write_all(f"hostpassd.base.logs: {lost} lines are lost: nobody read them in time\n")


def _without_controls(line: str) -> str:
    """LINE of a traceback, with its indentation."""
    text = line.lstrip(" ")
    return " " * (len(line) - len(text)) + clean(text, _MESSAGE_LIMIT)


def _write_all(text: str) -> None:
    # Not through sys.stderr: the end of the process would wait for its lock, for ever.
    data = text.encode("utf-8", "backslashreplace")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(_STDERR, data) :]
