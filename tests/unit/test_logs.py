"""The log on stderr: nobody waits for whoever reads it, and of what it quotes nothing can look like another line."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from hostpassd.base import logs
from hostpassd.base.logs import Lines


class Reader:
    """The other end of stderr."""

    def __init__(self) -> None:
        self._end, self.stderr = os.pipe()

    def lines(self) -> list[str]:
        """All that is written until stderr is closed."""
        with open(self._end, encoding="utf-8") as file:
            return file.read().splitlines()

    def start_reading(self) -> str:
        """A first bit of what there is."""
        return os.read(self._end, 4096).decode()


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    made = Reader()
    monkeypatch.setattr(logs, "_STDERR", made.stderr)
    return made


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    made = logging.getLogger("test_logs")
    made.propagate = False
    made.setLevel(logging.INFO)
    lines = Lines()
    made.addHandler(lines)
    yield made
    lines.close()
    made.removeHandler(lines)


def finish(log: logging.Logger, reader: Reader) -> list[str]:
    """What was written, all of it."""
    log.handlers[0].close()
    os.close(reader.stderr)
    return reader.lines()


def test_lines_come_in_order_and_whole_by_the_end(reader: Reader, log: logging.Logger) -> None:
    for number in range(100):
        log.info("line %d", number)
    assert finish(log, reader) == [f"test_logs: line {number}" for number in range(100)]


def test_what_is_quoted_is_no_line_of_its_own(reader: Reader, log: logging.Logger) -> None:
    log.warning("Machine %s: %s", "a\n<0>hostpassd: all is lost", "b\u202ec\x9b2J\r\x1b[2K")
    try:
        raise ValueError("why\n<0>hostpassd: all is lost\rhostpassd: indeed\x1b[2K")
    except ValueError:
        log.exception("it failed")
    first, second, third, *rest = finish(log, reader)
    assert first == "test_logs: Machine a <0>hostpassd: all is lost: bc2J [2K"
    assert (second, third) == ("test_logs: it failed", "  Traceback (most recent call last):")
    assert rest[-3:] == ["  ValueError: why", "  <0>hostpassd: all is lost", "  hostpassd: indeed[2K"]
    assert all(line.startswith("  ") for line in rest)


def test_nobody_waits_for_a_reader_that_stopped(
    reader: Reader, log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_END_LIMIT", 0.05)
    for _ in range(logs.WAITING_LIMIT * 4):
        log.info("x" * 200)
    log.handlers[0].close()
    lines = [reader.start_reading()]
    while "lines are lost" not in "".join(lines):
        lines.append(reader.start_reading())
    count = int("".join(lines).rpartition("hostpassd.base.logs: ")[2].partition(" ")[0])
    assert logs.WAITING_LIMIT < count < logs.WAITING_LIMIT * 3
